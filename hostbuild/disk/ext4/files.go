package ext4

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strconv"
	"strings"
	"time"
)

// ErrFull says that the file system has no room for what is to be put into it.
var ErrFull = errors.New("the file system is full")

// ErrBadName refuses names that debugfs's command language cannot express.
var ErrBadName = errors.New("unusable name")

// Item is one thing to put into a file system. It will belong to 0:0.
type Item struct {
	Path   string // absolute; its directory is there or comes first
	Mode   uint32 // permissions
	Source string // host file to copy, or
	Link   string // target of a symbolic link, or neither: a directory
	// There says that the name is there already: a directory then stays, with the
	// new permissions, and a file or link is replaced.
	There bool
}

// Populate puts items into the file system in the file at image, with now as
// all their times.
func Populate(ctx context.Context, image string, now time.Time, items []Item) error {
	if len(items) == 0 {
		return nil
	}
	var script bytes.Buffer
	line := func(words ...string) error {
		start := script.Len()
		for _, w := range words {
			q, err := quote(w)
			if err != nil {
				return err
			}
			script.WriteString(q)
			script.WriteByte(' ')
		}
		script.WriteByte('\n')
		const maxLine = 8000 // debugfs reads lines into 8 KiB
		if script.Len()-start > maxLine {
			return fmt.Errorf("%w: longer than %d bytes", ErrBadName, maxLine)
		}
		return nil
	}
	line("set_current_time", "@"+strconv.FormatInt(max(now.Unix(), 1), 10))
	cwd := "/"
	for _, it := range items {
		if err := it.put(line, &cwd); err != nil {
			return fmt.Errorf("%q: %w", it.Path, err)
		}
	}
	return run(ctx, now, &script, nil, "debugfs", "-w", "-f", "-", image)
}

// put writes the commands for one item. They take bare names in the working
// directory: debugfs does not understand the paths of names in "/".
func (it Item) put(line func(words ...string) error, cwd *string) error {
	dir, name := path.Split(it.Path)
	if dir = path.Clean(dir); dir != *cwd {
		if err := line("cd", dir); err != nil {
			return err
		}
		*cwd = dir
	}
	typ := uint32(0o040000)
	var err error
	if it.There && it.Source+it.Link != "" {
		if err := line("rm", name); err != nil {
			return err
		}
	}
	switch {
	case it.Link != "":
		return line("symlink", name, it.Link)
	case it.Source != "":
		typ = 0o100000
		err = line("write", it.Source, name)
	case !it.There:
		err = line("mkdir", name)
	}
	if err != nil {
		return err
	}
	return line("set_inode_field", it.Path, "mode", "0"+strconv.FormatUint(uint64(typ|it.Mode&0o7777), 8))
}

// quote writes a word as debugfs's parser takes it.
func quote(s string) (string, error) {
	for _, c := range []byte(s) {
		if c < ' ' || c == 0x7f {
			return "", fmt.Errorf("%w: control characters in %q", ErrBadName, s)
		}
	}
	return `"` + strings.ReplaceAll(s, `"`, `""`) + `"`, nil
}

// Entry is one name of a directory.
type Entry struct {
	Name     string
	Mode     uint32 // type and permissions, as in stat(2)
	UID, GID uint32
	Size     int64
}

// Drives may be read while a guest writes to them, where bitmaps and their
// checksums do not always agree: debugfs -c reads without bitmaps.

// List lists the directory dir of the file system in the file at image, without
// "." and "..". A directory that is not there gives fs.ErrNotExist.
func List(ctx context.Context, image, dir string) ([]Entry, error) {
	q, err := quote(path.Clean("/" + dir))
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	if err := run(ctx, time.Now(), nil, &out, "debugfs", "-c", "-R", "ls -p "+q, image); err != nil {
		return nil, err
	}
	return parseListing(&out)
}

// parseListing reads what `ls -p` of debugfs prints. The names come from drives that
// hosts have written to: they may hold anything, line ends included, which makes
// entries that are not there.
func parseListing(r io.Reader) ([]Entry, error) {
	var list []Entry
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		// /inode/mode/uid/gid/name/size/, the last but for directories
		f := strings.Split(sc.Text(), "/")
		if len(f) < 7 || f[5] == "." || f[5] == ".." || f[1] == "0" {
			continue
		}
		mode, err1 := strconv.ParseUint(f[2], 8, 32)
		uid, err2 := strconv.ParseUint(f[3], 10, 32)
		gid, err3 := strconv.ParseUint(f[4], 10, 32)
		size, err4 := int64(0), error(nil)
		if f[6] != "" {
			size, err4 = strconv.ParseInt(f[6], 10, 64)
		}
		if err := errors.Join(err1, err2, err3, err4); err != nil {
			return nil, fmt.Errorf("debugfs: unknown form of listing %q: %w", sc.Text(), err)
		}
		list = append(list, Entry{f[5], uint32(mode), uint32(uid), uint32(gid), size})
	}
	return list, sc.Err()
}

// Read writes the file at name of the file system in the file at image to w.
func Read(ctx context.Context, image, name string, w io.Writer) error {
	q, err := quote(path.Clean("/" + name))
	if err != nil {
		return err
	}
	return run(ctx, time.Now(), nil, w, "debugfs", "-c", "-R", "cat "+q, image)
}
