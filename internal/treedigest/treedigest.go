// Package treedigest pins a folder that another party can change: the builder
// lists every file with its digest (Scan), the guest takes a verified copy of the
// folder by that list (Tree.Copy).
//
// A copy, because a check alone is worth nothing: who owns the drive can give one
// content to the check and another to the next reader. What Copy leaves was read
// once, and hashed as it was read.
//
// Names, types, permissions, contents and link targets are pinned; owners, times
// and extended attributes are not, and the copy has none of the folder's. The
// package knows nothing of drives or of what the files are for.
package treedigest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unicode/utf8"
)

// Limits of a tree: the list lies in the guest config, the copy in the guest's memory.
const (
	maxEntries = 2048
	maxSize    = 64 << 20 // bytes of all files
)

// Tree is a list of files, folders and links, ordered by path. Every parent of an
// entry is in it, before the entry.
type Tree []Entry

// Entry is a file (with SHA256), a link (with Link) or a folder (with neither).
type Entry struct {
	Path   string `json:"path"` // relative, with slashes
	Mode   Mode   `json:"mode,omitempty"`
	Size   int64  `json:"size,omitempty"`   // of a file, in bytes
	SHA256 string `json:"sha256,omitempty"` // of a file, hex
	Link   string `json:"link,omitempty"`   // a link's target
}

// Mode is an entry's permissions, as in stat(2) without the type. In JSON it is
// an octal string. A link has none.
type Mode uint32

func (m Mode) String() string { return fmt.Sprintf("%04o", uint32(m)) }

// MarshalText writes the octal form.
func (m Mode) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText reads what MarshalText writes, and nothing else.
func (m *Mode) UnmarshalText(b []byte) error {
	n, err := strconv.ParseUint(string(b), 8, 12)
	if err != nil || Mode(n).String() != string(b) {
		return fmt.Errorf("mode %q is not four octal digits", b)
	}
	*m = Mode(n)
	return nil
}

func (e Entry) isFile() bool { return e.SHA256 != "" }
func (e Entry) isLink() bool { return e.Link != "" }
func (e Entry) isDir() bool  { return !e.isFile() && !e.isLink() }

func (e Entry) kind() string {
	switch {
	case e.isFile():
		return "a file"
	case e.isLink():
		return "a link"
	}
	return "a folder"
}

// ErrTooLarge says that a tree is over maxEntries or maxSize.
var ErrTooLarge = errors.New("too large to be pinned")

// Difference says where a folder first differs from its tree.
type Difference struct {
	Path string
	What string // "was removed", "was added", ...
}

func (d *Difference) Error() string { return fmt.Sprintf("%q %s", d.Path, d.What) }

func differs(name, format string, a ...any) error {
	return &Difference{name, fmt.Sprintf(format, a...)}
}

// Scan lists what is below the host folders or files of roots, each under its
// name: all of it, or only the files that are named, with the folders on their way.
// A root may be a link; links below it are listed as such.
func Scan(roots map[string]string, files ...string) (Tree, error) {
	wanted := map[string]bool{}
	for _, f := range files {
		for p := f; p != "." && p != "/"; p = path.Dir(p) {
			wanted[p] = true
		}
	}
	var t Tree
	var size int64
	for name, root := range roots {
		root, err := filepath.EvalSymlinks(root)
		if err != nil {
			return nil, err
		}
		err = filepath.WalkDir(root, func(file string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			rel, err := filepath.Rel(root, file)
			if err != nil {
				return err
			}
			p := path.Join(name, filepath.ToSlash(rel))
			if len(files) > 0 && !wanted[p] {
				if d.IsDir() {
					return fs.SkipDir
				}
				return nil
			}
			e, err := scan(file, p, d)
			if err != nil {
				return err
			}
			t = append(t, e)
			if size += e.Size; len(t) > maxEntries || size > maxSize {
				return fmt.Errorf("%w: more than %d files and folders or %d MiB", ErrTooLarge, maxEntries, maxSize>>20)
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	slices.SortFunc(t, func(a, b Entry) int { return strings.Compare(a.Path, b.Path) })
	for _, f := range files {
		switch i, found := slices.BinarySearchFunc(t, f, func(e Entry, p string) int { return strings.Compare(e.Path, p) }); {
		case !found:
			return nil, fmt.Errorf("%q is not there", f)
		case t[i].isDir():
			return nil, fmt.Errorf("%q is a folder; name its files", f)
		}
	}
	return t, t.Validate()
}

func scan(file, name string, d fs.DirEntry) (Entry, error) {
	e := Entry{Path: name}
	if !utf8.ValidString(name) {
		return e, fmt.Errorf("%q: its name is not UTF-8", file)
	}
	info, err := d.Info()
	if err != nil {
		return e, err
	}
	e.Mode = permissions(info)
	switch {
	case info.IsDir():
	case info.Mode()&fs.ModeSymlink != 0:
		e.Mode = 0
		e.Link, err = os.Readlink(file)
	case info.Mode().IsRegular():
		var f *os.File
		if f, err = os.Open(file); err != nil {
			return e, err
		}
		defer f.Close()
		e.Size, e.SHA256, err = hash(io.Discard, io.LimitReader(f, maxSize+1))
	default:
		err = fmt.Errorf("%s is neither file, folder nor link; move it out of the folder", file)
	}
	return e, err
}

func permissions(info fs.FileInfo) Mode { return Mode(info.Sys().(*syscall.Stat_t).Mode & 0o7777) }

// hash copies r to w.
func hash(w io.Writer, r io.Reader) (int64, string, error) {
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(w, h), r)
	return n, hex.EncodeToString(h.Sum(nil)), err
}

// Digest is the hex SHA-256 of the list, and so of all that it pins.
func (t Tree) Digest() string {
	h := sha256.New()
	if err := json.NewEncoder(h).Encode(t); err != nil {
		panic(err) // strings and numbers only
	}
	return hex.EncodeToString(h.Sum(nil))
}

// Validate checks the form of every entry, their order and the limits.
func (t Tree) Validate() error {
	if len(t) > maxEntries {
		return fmt.Errorf("%w: %d entries, more than %d", ErrTooLarge, len(t), maxEntries)
	}
	dirs := map[string]bool{".": true}
	var size int64
	for i, e := range t {
		sum, err := hex.DecodeString(e.SHA256)
		switch {
		case e.Path == "." || e.Path != path.Clean(e.Path) || !filepath.IsLocal(e.Path) || !utf8.ValidString(e.Path) || strings.Contains(e.Path, "\x00"):
			return fmt.Errorf("path %q is not a clean relative one", e.Path)
		case i > 0 && e.Path <= t[i-1].Path:
			return fmt.Errorf("path %q is out of order", e.Path)
		case !dirs[path.Dir(e.Path)]:
			return fmt.Errorf("the folder of %q is not in the list", e.Path)
		case e.isFile() && e.isLink():
			return fmt.Errorf("%q is both file and link", e.Path)
		case e.isFile() && (err != nil || len(sum) != sha256.Size || e.SHA256 != strings.ToLower(e.SHA256)):
			return fmt.Errorf("%q: sha256 is not 64 hex characters", e.Path)
		case e.Mode > 0o7777 || e.isLink() && e.Mode != 0 || !e.isFile() && e.Size != 0 || e.Size < 0 || e.Size > maxSize:
			return fmt.Errorf("%q: mode or size is out of range", e.Path)
		case strings.Contains(e.Link, "\x00") || len(e.Link) > 4095:
			return fmt.Errorf("%q: the link's target is not one", e.Path)
		}
		if e.isDir() {
			dirs[e.Path] = true
		}
		if size += e.Size; size > maxSize {
			return fmt.Errorf("%w: more than %d MiB", ErrTooLarge, maxSize>>20)
		}
	}
	return nil
}

// lostAndFound is ext4's own; nobody put it there.
const lostAndFound = "lost+found"

// Copy copies t out of the folder src into dst, which it makes. Where src does
// not hold exactly what t lists, the error is a *Difference. Without exact, src may
// hold more, and its folders may have other permissions.
//
// src is hostile: no name is followed out of it, no more is read than t says, and
// nothing but files, folders and links is opened.
func (t Tree) Copy(ctx context.Context, src, dst string, exact bool) error {
	from, err := os.OpenRoot(src)
	if err != nil {
		return err
	}
	defer from.Close()
	if err := os.Mkdir(dst, 0o755); err != nil {
		return err
	}
	to, err := os.OpenRoot(dst)
	if err != nil {
		return err
	}
	defer to.Close()
	c := copier{from: from, to: to, exact: exact, known: map[string]bool{lostAndFound: true}}
	for _, e := range t {
		c.known[e.Path] = true
	}
	if err := c.additions("."); err != nil {
		return err
	}
	for _, e := range t {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := c.entry(e); err != nil {
			return err
		}
	}
	for _, e := range slices.Backward(t) { // a folder that is not writable takes nothing more
		if e.isDir() {
			if err := to.Chmod(e.Path, e.Mode.fileMode()); err != nil {
				return err
			}
		}
	}
	return nil
}

// fileMode is m in package os's words.
func (m Mode) fileMode() fs.FileMode {
	f := fs.FileMode(m & 0o777)
	for bit, word := range map[Mode]fs.FileMode{0o4000: fs.ModeSetuid, 0o2000: fs.ModeSetgid, 0o1000: fs.ModeSticky} {
		if m&bit != 0 {
			f |= word
		}
	}
	return f
}

type copier struct {
	from, to *os.Root
	exact    bool
	known    map[string]bool
}

// entry compares and copies one entry.
func (c *copier) entry(e Entry) error {
	info, err := c.from.Lstat(e.Path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return differs(e.Path, "was removed")
	case err != nil: // a link on the way that leads nowhere, a damaged file system
		return differs(e.Path, "cannot be read: %v", err)
	}
	switch {
	case e.isLink() != (info.Mode()&fs.ModeSymlink != 0), e.isDir() != info.IsDir(), e.isFile() != info.Mode().IsRegular():
		return differs(e.Path, "is no longer %s", e.kind())
	case e.isLink():
		return c.link(e)
	case permissions(info) != e.Mode && (c.exact || e.isFile()):
		return differs(e.Path, "has mode %s, and had %s", permissions(info), e.Mode)
	case e.isFile():
		return c.file(e)
	}
	if err := c.to.Mkdir(e.Path, 0o700); err != nil {
		return err
	}
	return c.additions(e.Path)
}

func (c *copier) link(e Entry) error {
	target, err := c.from.Readlink(e.Path)
	if err != nil {
		return differs(e.Path, "cannot be read: %v", err)
	}
	if target != e.Link {
		return differs(e.Path, "leads to %q, and led to %q", target, e.Link)
	}
	return c.to.Symlink(e.Link, e.Path)
}

func (c *copier) file(e Entry) error {
	in, err := c.from.OpenFile(e.Path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return differs(e.Path, "cannot be read: %v", err)
	}
	defer in.Close()
	out, err := c.to.OpenFile(e.Path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	src := &source{r: io.LimitReader(in, e.Size+1)}
	n, sum, err := hash(out, src)
	switch {
	case src.err != nil:
		return differs(e.Path, "cannot be read: %v", src.err)
	case err != nil: // of the copy
		return err
	case n > e.Size:
		return differs(e.Path, "has more than its %d bytes", e.Size)
	case n < e.Size:
		return differs(e.Path, "has %d bytes, and had %d", n, e.Size)
	case sum != e.SHA256:
		return differs(e.Path, "was changed: SHA-256 is %s, and was %s", sum, e.SHA256)
	}
	return out.Chmod(e.Mode.fileMode())
}

// source keeps the error of reading apart from that of writing.
type source struct {
	r   io.Reader
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

// additions looks for names in a folder that the tree does not list. It stops at
// the first, however many there are.
func (c *copier) additions(dir string) error {
	if !c.exact {
		return nil
	}
	f, err := c.from.Open(dir)
	if err != nil {
		return differs(dir, "cannot be read: %v", err)
	}
	defer f.Close()
	for {
		names, err := f.Readdirnames(256)
		for _, name := range names {
			if p := path.Join(dir, name); !c.known[p] {
				return differs(p, "was added")
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return differs(dir, "cannot be read: %v", err)
		}
	}
}
