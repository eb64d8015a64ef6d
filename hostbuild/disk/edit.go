package disk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"coffer/hostbuild/disk/ext4"
)

// ErrInUse says that a VM has the drive open.
var ErrInUse = errors.New("a VM uses the drive; stop it first")

// PutDrive copies a host file or folder into the plain drive in a qcow2 file. dest
// is its name in the drive, or a folder that is there, into which it goes. All
// belongs to 0:0, with the permissions that it has on the host; files that are
// there are replaced.
func PutDrive(ctx context.Context, file, src, dest string, now time.Time) error {
	err := editDrive(ctx, file, func(raw *os.File, size int64) (int64, error) {
		l := lister{raw: raw.Name(), dirs: map[string][]DriveEntry{}}
		dest := path.Clean("/" + dest)
		if e, ok, err := l.find(ctx, dest); err != nil {
			return 0, err
		} else if ok && e.Mode&typeMask == syscall.S_IFDIR {
			abs, err := filepath.Abs(src)
			if err != nil {
				return 0, err
			}
			dest = path.Join(dest, filepath.Base(abs))
		}
		stage := driveStage{items: map[string]ext4.Item{}}
		if err := stage.addTree(dest, src); err != nil {
			return 0, err
		}
		items, err := l.against(ctx, stage.list(), dest)
		if err != nil {
			return 0, err
		}
		err = ext4.Populate(ctx, raw.Name(), now, items)
		if errors.Is(err, ext4.ErrFull) {
			err = fmt.Errorf("%w: `hostbuild drive resize` it: %w", ErrTooSmall, err)
		}
		return size, err
	})
	if err != nil {
		return fmt.Errorf("put %s into drive %s: %w", src, file, err)
	}
	return nil
}

// lister looks names up in a drive, and each folder once.
type lister struct {
	raw  string
	dirs map[string][]DriveEntry
}

func (l lister) find(ctx context.Context, name string) (e DriveEntry, ok bool, err error) {
	if name == "/" {
		return DriveEntry{Mode: syscall.S_IFDIR}, true, nil
	}
	dir, base := path.Split(name)
	dir = path.Clean(dir)
	parent, ok, err := l.find(ctx, dir)
	if err != nil || !ok || parent.Mode&typeMask != syscall.S_IFDIR {
		return e, false, err
	}
	if _, ok := l.dirs[dir]; !ok {
		if l.dirs[dir], err = ext4.List(ctx, l.raw, dir); err != nil {
			return e, false, err
		}
	}
	i := slices.IndexFunc(l.dirs[dir], func(e DriveEntry) bool { return e.Name == base })
	if i < 0 {
		return e, false, nil
	}
	return l.dirs[dir][i], true, nil
}

// against marks the items that are there already, and leaves out parents of dest
// that need not be made. A folder does not replace a file, nor a file a folder.
func (l lister) against(ctx context.Context, items []ext4.Item, dest string) ([]ext4.Item, error) {
	var out []ext4.Item
	for _, it := range items {
		e, ok, err := l.find(ctx, it.Path)
		if err != nil {
			return nil, err
		}
		if isDir := it.Source+it.Link == ""; ok && isDir != (e.Mode&typeMask == syscall.S_IFDIR) {
			return nil, fmt.Errorf("%w: %s is a folder on one side only", ErrBadFile, it.Path)
		}
		it.There = ok
		if ok && strings.HasPrefix(dest, it.Path+"/") {
			continue
		}
		out = append(out, it)
	}
	return out, nil
}

// ResizeDrive makes the plain drive in a qcow2 file, and the file system on it,
// size bytes large.
func ResizeDrive(ctx context.Context, file string, size int64) error {
	size = roundUp(size, blockSize)
	err := editDrive(ctx, file, func(raw *os.File, old int64) (int64, error) {
		if size < minDrive {
			return 0, fmt.Errorf("%w: %d bytes, less than %d", ErrTooSmall, size, minDrive)
		}
		if err := raw.Truncate(max(size, old)); err != nil {
			return 0, err
		}
		if err := ext4.Resize(ctx, raw.Name(), size); err != nil {
			return 0, err
		}
		return size, raw.Truncate(size)
	})
	if err != nil {
		return fmt.Errorf("resize drive %s: %w", file, err)
	}
	return nil
}

// editDrive lets f change a raw copy of a drive and then puts it in the drive's
// place, whole. f returns the drive's new size.
func editDrive(ctx context.Context, file string, f func(raw *os.File, size int64) (int64, error)) error {
	in, size, err := source(file)
	if err != nil {
		return err
	}
	defer in.Close()
	if err := notInUse(file); err != nil {
		return err
	}
	raw, virtual, err := rawCopy(in, size)
	if err != nil {
		return err
	}
	defer os.Remove(raw.Name())
	defer raw.Close()
	if err := ext4.Check(ctx, raw.Name()); err != nil {
		return err
	}
	newSize, err := f(raw, virtual)
	if err != nil {
		return err
	}
	st, err := in.Stat()
	if err != nil {
		return err
	}
	out, err := newPartial(file, st.Mode().Perm())
	if err != nil {
		return explain(file, err)
	}
	return explain(file, out.finish(packRaw(raw, newSize, out.File)))
}

// notInUse fails where QEMU has the file open: it holds locks on some of the bytes
// from 100 on (block/file-posix.c).
func notInUse(file string) error {
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: 0, Start: 100, Len: 200}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lock); err != nil {
		return &fs.PathError{Op: "look for locks", Path: file, Err: err}
	}
	if lock.Type != unix.F_UNLCK {
		return ErrInUse
	}
	return nil
}

// GetDrive copies a file or folder of the plain drive in a qcow2 file to dest on
// the host, which must not be there. The drive may come from a host that is not
// trusted: only regular files and folders come out, for the caller alone, and no
// more data than the drive's file has bytes; skipped lists what else there was.
func GetDrive(ctx context.Context, file, src, dest string) (skipped []string, err error) {
	err = withRaw(file, func(raw string, size int64) error {
		src := path.Clean("/" + src)
		e, ok, err := lister{raw, map[string][]DriveEntry{}}.find(ctx, src)
		if err == nil && !ok {
			err = fs.ErrNotExist
		}
		if err != nil {
			return err
		}
		g := getter{raw: raw, left: size}
		err = g.get(ctx, src, dest, e.Mode, 0)
		skipped = g.skipped
		return err
	})
	if err != nil {
		return skipped, fmt.Errorf("get %s of drive %s: %w", src, file, err)
	}
	return skipped, nil
}

// ErrTooMuch says that a drive holds more than its file has bytes.
var ErrTooMuch = errors.New("it holds more data than its file has bytes: blocks or folders are there several times over, by hard links or by forgery; get the files that you need one by one")

// getter copies out of a raw drive. left is how many bytes of data may still come:
// a drive whose files share blocks, or whose folders hold themselves, could
// otherwise fill any disk. Zeros become holes, which take no room here either.
type getter struct {
	raw     string
	left    int64
	skipped []string
}

func (g *getter) take(n int64) error {
	if g.left -= n; g.left < 0 {
		return ErrTooMuch
	}
	return nil
}

func (g *getter) get(ctx context.Context, src, dest string, mode uint32, depth int) error {
	const maxDepth, inode = 100, 128 // bytes that a file has at least
	switch mode & typeMask {
	case syscall.S_IFREG:
		if err := g.take(inode); err != nil {
			return err
		}
		f, err := os.OpenFile(dest, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		w := &holeWriter{f: f, take: g.take}
		err = ext4.Read(ctx, g.raw, src, w)
		if g.left < 0 { // debugfs, cut off, says less
			err = ErrTooMuch
		}
		return errors.Join(err, f.Truncate(w.off), f.Close())
	case syscall.S_IFDIR:
	default:
		g.skipped = append(g.skipped, src)
		return nil
	}
	if depth == maxDepth {
		return fmt.Errorf("%w: folders more than %d deep", ErrBadFile, maxDepth)
	}
	if err := g.take(blockSize); err != nil {
		return err
	}
	if err := os.Mkdir(dest, 0o700); err != nil {
		return err
	}
	entries, err := ext4.List(ctx, g.raw, src)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name == "" || e.Name == "." || e.Name == ".." || strings.ContainsAny(e.Name, "/\x00") {
			return fmt.Errorf("%w: a name %q", ErrBadFile, e.Name)
		}
		if err := g.get(ctx, path.Join(src, e.Name), filepath.Join(dest, e.Name), e.Mode, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// holeWriter writes a file from its start and leaves holes where blocks are zero;
// take allows the rest. The file's size is for the caller to set.
type holeWriter struct {
	f    *os.File
	off  int64
	take func(int64) error
}

func (w *holeWriter) Write(p []byte) (int, error) {
	var zeros [blockSize]byte
	for done := 0; done < len(p); {
		b := p[done:]
		b = b[:min(int64(len(b)), blockSize-w.off%blockSize)]
		if !bytes.Equal(b, zeros[:len(b)]) {
			if err := w.take(int64(len(b))); err != nil {
				return done, err
			}
			if _, err := w.f.WriteAt(b, w.off); err != nil {
				return done, err
			}
		}
		w.off += int64(len(b))
		done += len(b)
	}
	return len(p), nil
}
