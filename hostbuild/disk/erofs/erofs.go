// Package erofs makes read-only EROFS file systems for data that is already in
// place: the caller writes the files' data into the image first and tells the
// Tree where it lies; the Tree then writes the metadata behind it, and returns
// the image's first part, which holds the superblock, to be put in place last.
// So an image can be made while its data streams by.
//
// The format is the kernel's fs/erofs/erofs_fs.h: extended inodes, flat plain
// data, no compression. Block sizes of 512 and 4096 bytes are in use here: with
// 512, a layer's tar can serve as the data part as it is (see AddTar), because a
// tar's members begin at multiples of 512.
//
// The same calls give the same bytes. A Tree is bounded: maxEntries, maxMetadata.
package erofs

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Limits of one file system. They keep a Tree below some 150 MB.
const (
	maxEntries  = 1 << 19  // names
	maxMetadata = 32 << 20 // bytes of names, link targets and extended attributes
	maxName     = 255      // bytes of one name
	maxPath     = 4095     // bytes of a path or of a link's target
	maxXattrs   = 60 << 10 // bytes of one inode's extended attributes
	maxHops     = 40       // symbolic links on the way to a name
)

// SuperSize is the size of an image's first part, which Finish returns.
const SuperSize = 4096

// Errors of Add, Link and AddTar.
var (
	ErrLimit    = errors.New("over a limit of the layer format")
	ErrBadName  = errors.New("unusable name")
	ErrBadEntry = errors.New("unusable entry")
)

// Types of a Mode, as in stat(2).
const (
	TypeMask    = 0o170000
	TypeFIFO    = 0o010000
	TypeChar    = 0o020000
	TypeDir     = 0o040000
	TypeBlock   = 0o060000
	TypeRegular = 0o100000
	TypeSymlink = 0o120000
)

// Entry is what a name stands for.
type Entry struct {
	Mode         uint32 // type and permissions
	UID, GID     uint32
	Mtime        time.Time
	Start, Size  int64             // of a regular file's data in the image, in bytes; Start is a multiple of the block size
	Target       string            // of a symbolic link
	Major, Minor uint32            // of a device
	Xattrs       map[string]string // full name to value
}

// inode is kept small: there may be maxEntries of them.
type inode struct {
	start, size int64 // start: of the data in the image
	mtime       int64
	more        *more // nil for most
	nsec        uint32
	uid, gid    uint32
	nid         uint32 // place in the metadata in units of 32 bytes; 0 before the layout
	nlink       uint32
	mode        uint16
}

// more is what most inodes do not have.
type more struct {
	children map[string]*inode // of a directory
	parent   *inode            // of a directory; the root's is itself
	opaque   bool              // a directory that hides those of lower layers
	target   string            // of a symbolic link
	rdev     uint32            // of a device
	xattrs   map[string]string
}

func (n *inode) is(typ uint16) bool { return n.mode&TypeMask == typ }

// whiteout is overlayfs's sign for a removed name.
func (n *inode) whiteout() bool { return n.is(TypeChar) && n.more.rdev == 0 }

// Tree is a file system being made. It is not safe for concurrent use.
type Tree struct {
	bits    uint // log2 of the block size
	root    *inode
	mtime   time.Time
	entries int
	meta    int
}

// New makes a tree with an empty root directory, 0755. blockSize is a power of
// two from 512 to 4096. mtime is that of directories that exist only because
// something lies below them; those are 0755, too.
func New(blockSize int, mtime time.Time) *Tree {
	t := &Tree{mtime: mtime}
	for 1<<t.bits < blockSize {
		t.bits++
	}
	t.root = newInode(t.missingDir())
	t.root.more.parent = t.root
	return t
}

func (t *Tree) missingDir() Entry { return Entry{Mode: TypeDir | 0o755, Mtime: t.mtime} }

func newInode(e Entry) *inode {
	n := &inode{
		start: e.Start, size: e.Size, mtime: e.Mtime.Unix(), nsec: uint32(e.Mtime.Nanosecond()),
		uid: e.UID, gid: e.GID, mode: uint16(e.Mode),
	}
	switch {
	case n.is(TypeDir):
		n.more = &more{children: map[string]*inode{}, xattrs: e.Xattrs}
	case n.is(TypeSymlink):
		n.more = &more{target: strings.Clone(e.Target), xattrs: e.Xattrs}
		n.size = int64(len(e.Target))
	case n.is(TypeChar) || n.is(TypeBlock):
		n.more = &more{rdev: e.Minor&0xff | e.Major<<8 | e.Minor&^0xff<<12, xattrs: e.Xattrs}
	case len(e.Xattrs) > 0:
		n.more = &more{xattrs: e.Xattrs}
	}
	return n
}

// Add puts an entry at path, whose leading slash, empty parts and "." parts do
// not count. Missing parents are made, symbolic links among the parents are
// followed inside the tree. A later entry replaces an earlier one; a directory
// that is added again keeps what is in it.
func (t *Tree) Add(path string, e Entry) error {
	_, err := t.add(path, e)
	return err
}

func (t *Tree) add(path string, e Entry) (*inode, error) {
	if err := t.check(e); err != nil {
		return nil, err
	}
	dir, name, err := t.parent(path, true)
	if err != nil {
		return nil, err
	}
	n := newInode(e)
	if dir == nil {
		if !n.is(TypeDir) {
			return nil, fmt.Errorf("%w: the root is not a directory", ErrBadEntry)
		}
		t.root.adopt(n)
		return t.root, nil
	}
	return t.put(dir, name, n)
}

func (t *Tree) check(e Entry) error {
	switch e.Mode & TypeMask {
	case TypeRegular:
		if e.Start%(1<<t.bits) != 0 || e.Start < 0 || e.Size < 0 {
			return fmt.Errorf("%w: data of %d bytes at %d", ErrBadEntry, e.Size, e.Start)
		}
	case TypeSymlink:
		if e.Target == "" || len(e.Target) > maxPath || strings.Contains(e.Target, "\x00") {
			return fmt.Errorf("%w: a symbolic link's target of %d bytes", ErrBadEntry, len(e.Target))
		}
	case TypeChar, TypeBlock:
		if e.Major >= 1<<12 || e.Minor >= 1<<20 {
			return fmt.Errorf("%w: device number %d:%d", ErrBadEntry, e.Major, e.Minor)
		}
	case TypeDir, TypeFIFO:
	default:
		return fmt.Errorf("%w: type %#o", ErrBadEntry, e.Mode&TypeMask)
	}
	b, err := encodeXattrs(e.Xattrs, false)
	t.meta += len(b) + len(e.Target)
	return err
}

// Link makes path another name of target, which must be there and no directory.
func (t *Tree) Link(path, target string) error {
	dir, name, err := t.parent(target, false)
	if err != nil {
		return fmt.Errorf("hard link to %.200q: %w", target, err)
	}
	var n *inode
	if dir != nil {
		n = dir.more.children[name]
	}
	if n == nil || n.is(TypeDir) || n.whiteout() {
		return fmt.Errorf("%w: hard link to %.200q, which is no earlier file of the same layer", ErrBadEntry, target)
	}
	dir, name, err = t.parent(path, true)
	if err != nil {
		return err
	}
	if dir == nil {
		return fmt.Errorf("%w: the root is not a directory", ErrBadEntry)
	}
	_, err = t.put(dir, name, n)
	return err
}

// remove marks path as removed from lower layers. What this layer itself has
// there stays, and hides the lower layers' part.
func (t *Tree) remove(path string) error {
	dir, name, err := t.parent(path, true)
	if err != nil {
		return err
	}
	if dir == nil {
		return fmt.Errorf("%w: the root cannot be removed", ErrBadEntry)
	}
	if old := dir.more.children[name]; old != nil {
		if old.is(TypeDir) {
			old.more.opaque = true
		}
		return nil
	}
	_, err = t.put(dir, name, newInode(Entry{Mode: TypeChar, Mtime: t.mtime}))
	return err
}

// hide makes the directory hide those of lower layers.
func (t *Tree) hide(path string) error {
	dir, name, err := t.parent(path, true)
	if err != nil {
		return err
	}
	n := t.root
	if dir != nil {
		n = dir.more.children[name]
		if n == nil || n.whiteout() {
			if n, err = t.put(dir, name, newInode(t.missingDir())); err != nil {
				return err
			}
		}
	}
	if !n.is(TypeDir) {
		return fmt.Errorf("%w: an opaque mark in %.200q, which is not a directory", ErrBadEntry, path)
	}
	n.more.opaque = true
	return nil
}

// In lists the names in all directories of the given names, in no order.
func (t *Tree) In(dirs ...string) []string {
	var names []string
	var walk func(dir *inode, listed bool)
	walk = func(dir *inode, listed bool) {
		for name, n := range dir.more.children {
			if listed && !n.whiteout() {
				names = append(names, name)
			}
			if n.is(TypeDir) {
				walk(n, slices.Contains(dirs, name))
			}
		}
	}
	walk(t.root, false)
	return names
}

// put gives n a name in dir, and returns what lies there then.
func (t *Tree) put(dir *inode, name string, n *inode) (*inode, error) {
	if len(name) > maxName {
		return nil, fmt.Errorf("%w: a part of %d bytes, more than %d", ErrBadName, len(name), maxName)
	}
	t.entries++
	t.meta += len(name)
	if t.entries > maxEntries {
		return nil, fmt.Errorf("%w: more than %d entries", ErrLimit, maxEntries)
	}
	if t.meta > maxMetadata {
		return nil, fmt.Errorf("%w: more than %d bytes of names, link targets and attributes", ErrLimit, maxMetadata)
	}
	old := dir.more.children[name]
	if n.is(TypeDir) {
		if old != nil && old.is(TypeDir) {
			old.adopt(n)
			return old, nil
		}
		n.more.parent = dir
		n.more.opaque = old != nil && old.whiteout()
	}
	dir.more.children[strings.Clone(name)] = n // not a part of a long path
	return n, nil
}

// adopt takes over the attributes of a directory that is listed again.
func (n *inode) adopt(from *inode) {
	n.mode, n.uid, n.gid, n.mtime, n.nsec = from.mode, from.uid, from.gid, from.mtime, from.nsec
	n.more.xattrs = from.more.xattrs
}

// parent finds the directory and the last name of path. The root has neither.
func (t *Tree) parent(path string, create bool) (*inode, string, error) {
	if len(path) > maxPath {
		return nil, "", fmt.Errorf("%w: a path of %d bytes, more than %d", ErrBadName, len(path), maxPath)
	}
	parts := split(path)
	if slices.Contains(parts, "..") || strings.Contains(path, "\x00") {
		return nil, "", fmt.Errorf(`%w: ".." or a zero byte in it`, ErrBadName)
	}
	if len(parts) == 0 {
		return nil, "", nil
	}
	name := parts[len(parts)-1]
	dir, hops := t.root, 0
	for parts = parts[:len(parts)-1]; len(parts) > 0; {
		p := parts[0]
		parts = parts[1:]
		if p == ".." { // from a symbolic link
			dir = dir.more.parent
			continue
		}
		next := dir.more.children[p]
		switch {
		case next == nil || next.whiteout():
			if !create {
				return nil, "", fmt.Errorf("%w: no directory %q", ErrBadEntry, p)
			}
			var err error
			if next, err = t.put(dir, p, newInode(t.missingDir())); err != nil {
				return nil, "", err
			}
		case next.is(TypeSymlink):
			if hops++; hops > maxHops {
				return nil, "", fmt.Errorf("%w: too many symbolic links on the way", ErrBadName)
			}
			if strings.HasPrefix(next.more.target, "/") {
				dir = t.root
			}
			parts = append(split(next.more.target), parts...)
			continue
		case !next.is(TypeDir):
			return nil, "", fmt.Errorf("%w: %q on the way is not a directory", ErrBadEntry, p)
		}
		dir = next
	}
	return dir, name, nil
}

// split gives the parts of a path that count.
func split(path string) []string {
	return slices.DeleteFunc(strings.Split(path, "/"), func(p string) bool { return p == "" || p == "." })
}

// xattrSpaces are the name spaces that the format has a number for.
var xattrSpaces = []struct {
	prefix string
	index  byte
}{
	{"user.", 1},
	{"system.posix_acl_access", 2},
	{"system.posix_acl_default", 3},
	{"trusted.", 4},
	{"security.", 6},
}

const opaqueXattr = "trusted.overlay.opaque"

// xattrSpace divides an attribute's name; ok is false for those that are left out:
// of a name space that the format does not know, as a file system that does not
// have them would, and overlayfs's own, which are not an image's to set.
func xattrSpace(full string) (index byte, name string, ok bool) {
	if strings.HasPrefix(full, "trusted.overlay.") {
		return 0, "", false
	}
	for _, s := range xattrSpaces {
		if name, ok := strings.CutPrefix(full, s.prefix); ok {
			return s.index, name, true
		}
	}
	return 0, "", false
}

// encodeXattrs makes the inline part of an inode.
func encodeXattrs(xattrs map[string]string, opaque bool) ([]byte, error) {
	if len(xattrs) == 0 && !opaque {
		return nil, nil
	}
	var out []byte
	put := func(index byte, name, value string) {
		out = append(out, byte(len(name)), index, byte(len(value)), byte(len(value)>>8))
		out = append(append(out, name...), value...)
		out = append(out, make([]byte, -len(out)&3)...)
	}
	for _, full := range slices.Sorted(maps.Keys(xattrs)) {
		index, name, ok := xattrSpace(full)
		if !ok {
			continue
		}
		value := xattrs[full]
		if len(name) > maxName || len(out)+len(name)+len(value) > maxXattrs {
			return nil, fmt.Errorf("%w: extended attributes over %d bytes", ErrLimit, maxXattrs)
		}
		put(index, name, value)
	}
	if opaque {
		put(4, strings.TrimPrefix(opaqueXattr, "trusted."), "y")
	}
	if out == nil {
		return nil, nil
	}
	return append(make([]byte, 12), out...), nil
}
