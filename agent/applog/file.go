package applog

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// File is a log file that rotates by size: NAME, NAME.1 (newer) to NAME.<Keep>
// (oldest). It never fails. On a full drive it gives up its oldest backup, and
// then drops.
type File struct {
	dir    *os.Root
	name   string
	max    int64
	keep   int
	notice Notice

	mu      sync.Mutex
	f       *os.File
	size    int64
	pending int64
	dropped int64
	retry   time.Time // no attempt to open before
}

// reopenAfter is the wait between attempts to open a file that does not open.
const reopenAfter = time.Second

// NewFile logs to name in dir: at most keep+1 files of max bytes each.
func NewFile(dir *os.Root, name string, max int64, keep int, notice Notice) *File {
	return &File{dir: dir, name: name, max: max, keep: keep, notice: notice}
}

// Write always takes all of p and never fails. It blocks as long as the drive does.
func (l *File) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	rest := p
	if l.pending > 0 {
		notice := fmt.Sprintf(string(l.notice), l.pending)
		if n := l.write([]byte(notice)); n == len(notice) {
			l.pending = 0
		}
	}
	for len(rest) > 0 {
		if l.size >= l.max {
			l.rotate()
		}
		chunk := rest
		if room := l.max - l.size; l.size > 0 && int64(len(chunk)) > room {
			// Cut after a line's end where there is one.
			chunk = chunk[:max(room, 1)]
			for i := len(chunk) - 1; i >= 0; i-- {
				if chunk[i] == '\n' {
					chunk = chunk[:i+1]
					break
				}
			}
		} else if int64(len(chunk)) > l.max {
			chunk = chunk[:l.max]
		}
		n := l.write(chunk)
		if lost := len(chunk) - n; lost > 0 {
			l.pending += int64(lost)
			l.dropped += int64(lost)
		}
		rest = rest[len(chunk):]
	}
	return len(p), nil
}

// Dropped is the number of bytes that could not be written so far.
func (l *File) Dropped() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dropped
}

// Close syncs and closes the file. A later Write opens it again.
func (l *File) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f == nil {
		return nil
	}
	err := errors.Join(l.f.Sync(), l.f.Close())
	l.f = nil
	return err
}

// write writes p and returns how much of it.
func (l *File) write(p []byte) int {
	done := 0
	for try := 0; try <= l.keep && done < len(p); try++ {
		if !l.open() {
			break
		}
		n, err := l.f.Write(p[done:])
		done += n
		l.size += int64(n)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
			l.drop()
			break
		}
		if !l.removeOldest() {
			break
		}
	}
	return done
}

func (l *File) open() bool {
	if l.f != nil {
		return true
	}
	now := time.Now()
	if now.Before(l.retry) {
		return false
	}
	f, size, err := openRegular(l.dir, l.name)
	if err != nil {
		l.retry = now.Add(reopenAfter)
		return false
	}
	l.f, l.size = f, size
	return true
}

// drop closes a file that gives errors; the next write opens it anew.
func (l *File) drop() {
	l.f.Close()
	l.f = nil
	l.retry = time.Now().Add(reopenAfter)
}

// openRegular opens name for appending. Whatever else lies at that name, a
// symlink or a FIFO that the workload or the host put there, is removed first.
func openRegular(dir *os.Root, name string) (*os.File, int64, error) {
	if fi, err := dir.Lstat(name); err == nil && !fi.Mode().IsRegular() {
		if err := dir.RemoveAll(name); err != nil {
			return nil, 0, err
		}
	}
	f, err := dir.OpenFile(name, os.O_WRONLY|os.O_APPEND|os.O_CREATE|unix.O_NONBLOCK, 0o644)
	if err != nil {
		return nil, 0, err
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", name)
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, fi.Size(), nil
}

func (l *File) backup(i int) string { return fmt.Sprintf("%s.%d", l.name, i) }

// rotate moves every file one on. An error leaves the present file in use; the
// size bound of the whole then still holds, because the file is emptied.
func (l *File) rotate() {
	if l.f == nil {
		return
	}
	l.f.Close()
	l.f = nil
	l.dir.RemoveAll(l.backup(l.keep))
	for i := l.keep - 1; i >= 1; i-- {
		l.dir.Rename(l.backup(i), l.backup(i+1))
	}
	var err error
	if l.keep > 0 {
		err = l.dir.Rename(l.name, l.backup(1))
	}
	if err != nil || l.keep == 0 {
		l.dir.RemoveAll(l.name)
	}
	l.size = 0
}

func (l *File) removeOldest() bool {
	for i := l.keep; i >= 1; i-- {
		if err := l.dir.Remove(l.backup(i)); err == nil {
			return true
		}
	}
	return false
}
