package erofs

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"iter"
	"maps"
	"slices"
)

const (
	inodeSize = 64
	slotSize  = 32
	// firstSlot keeps the root's number from being 0, which readers of
	// directories take for "no file". The root comes first because the
	// superblock has 16 bits for it.
	firstSlot  = 2
	direntSize = 12
)

type layout struct {
	inodes []*inode // in the order of their places
	dirs   []directory
	links  []*inode
	next   uint32 // free slot
}

type directory struct {
	*inode
	names []string // sorted, with "." and ".."
}

// Finish writes the metadata to w, which begins at offset off of the image, a
// multiple of the block size. It returns the image's first SuperSize bytes and
// its whole size, a multiple of 4096. The Tree is spent then.
func (t *Tree) Finish(w io.Writer, off int64) (super []byte, size int64, err error) {
	l := layout{next: firstSlot}
	t.visit(&l, t.root)

	blockSize := int64(1) << t.bits
	inodesEnd := off + int64(l.next)*slotSize
	at := roundUp(inodesEnd, blockSize)
	for _, d := range l.dirs {
		d.start = at
		at = roundUp(at+d.size, blockSize)
	}
	for _, n := range l.links {
		n.start = at
		at = roundUp(at+n.size, blockSize)
	}
	size = roundUp(at, SuperSize)
	if size>>t.bits > 1<<32-1 {
		return nil, 0, fmt.Errorf("%w: %d bytes in blocks of %d", ErrLimit, size, blockSize)
	}

	out := &padder{w: bufio.NewWriterSize(w, 1<<20), off: off}
	out.pad(off + firstSlot*slotSize)
	for _, n := range l.inodes {
		out.pad(off + int64(n.nid)*slotSize)
		b, err := t.encode(n)
		if err != nil {
			return nil, 0, err
		}
		out.write(b)
	}
	out.pad(inodesEnd)
	for _, d := range l.dirs {
		out.pad(d.start)
		for names := range blocks(d.names, int(blockSize)) {
			out.pad(roundUp(out.off, blockSize))
			out.write(d.block(names))
		}
	}
	for _, n := range l.links {
		out.pad(n.start)
		out.write([]byte(n.more.target))
	}
	out.pad(size)
	if err := out.w.Flush(); err != nil {
		return nil, 0, err
	}

	super = make([]byte, SuperSize)
	sb := super[1024:]
	binary.LittleEndian.PutUint32(sb[0:], 0xE0F5E1E2)
	binary.LittleEndian.PutUint32(sb[8:], 2) // compatible features: times are mtimes
	sb[12] = byte(t.bits)
	binary.LittleEndian.PutUint16(sb[14:], uint16(t.root.nid))
	binary.LittleEndian.PutUint64(sb[16:], uint64(len(l.inodes)))
	binary.LittleEndian.PutUint32(sb[36:], uint32(size>>t.bits))
	binary.LittleEndian.PutUint32(sb[40:], uint32(off>>t.bits))
	return super, size, nil
}

// visit gives n and all below it their places, in depth-first order.
func (t *Tree) visit(l *layout, n *inode) {
	n.nlink++
	if n.nid != 0 {
		return // another name of the same inode
	}
	n.nid = l.next
	l.inodes = append(l.inodes, n)
	l.next += uint32(roundUp(int64(inodeSize+len(n.xattrs())), slotSize) / slotSize)
	switch {
	case n.is(TypeSymlink):
		l.links = append(l.links, n)
	case n.is(TypeDir):
		names := slices.Sorted(maps.Keys(n.more.children))
		n.nlink = 2
		for _, c := range n.more.children {
			if c.is(TypeDir) {
				n.nlink++
			}
		}
		names = append(names, ".", "..")
		slices.Sort(names)
		for block := range blocks(names, 1<<t.bits) {
			n.size = roundUp(n.size, 1<<t.bits) + int64(used(block))
		}
		l.dirs = append(l.dirs, directory{n, names})
		for _, name := range names {
			if name != "." && name != ".." {
				t.visit(l, n.more.children[name])
			}
		}
	}
}

// xattrs is the inode's inline part; check has seen that it can be encoded.
func (n *inode) xattrs() []byte {
	if n.more == nil {
		return nil
	}
	b, _ := encodeXattrs(n.more.xattrs, n.more.opaque)
	return b
}

// encode makes an extended inode with its attributes.
func (t *Tree) encode(n *inode) ([]byte, error) {
	b := make([]byte, inodeSize, 128)
	x := n.xattrs()
	binary.LittleEndian.PutUint16(b[0:], 1) // extended, flat plain
	if len(x) > 0 {
		binary.LittleEndian.PutUint16(b[2:], uint16(1+(len(x)-12)/4))
	}
	binary.LittleEndian.PutUint16(b[4:], n.mode)
	binary.LittleEndian.PutUint64(b[8:], uint64(n.size))
	switch {
	case n.is(TypeChar) || n.is(TypeBlock):
		binary.LittleEndian.PutUint32(b[16:], n.more.rdev)
	case n.size > 0:
		if (n.start+n.size)>>t.bits > 1<<32-1 {
			return nil, fmt.Errorf("%w: data at %d", ErrLimit, n.start)
		}
		binary.LittleEndian.PutUint32(b[16:], uint32(n.start>>t.bits))
	}
	binary.LittleEndian.PutUint32(b[20:], n.nid)
	binary.LittleEndian.PutUint32(b[24:], n.uid)
	binary.LittleEndian.PutUint32(b[28:], n.gid)
	binary.LittleEndian.PutUint64(b[32:], uint64(n.mtime))
	binary.LittleEndian.PutUint32(b[40:], n.nsec)
	binary.LittleEndian.PutUint32(b[44:], n.nlink)
	return append(b, x...), nil
}

// block makes one directory block of the given names.
func (d directory) block(names []string) []byte {
	b := make([]byte, direntSize*len(names), used(names))
	for i, name := range names {
		n := d.inode
		switch name {
		case ".":
		case "..":
			n = d.more.parent
		default:
			n = d.more.children[name]
		}
		e := b[direntSize*i : direntSize*(i+1)]
		binary.LittleEndian.PutUint64(e, uint64(n.nid))
		binary.LittleEndian.PutUint16(e[8:], uint16(len(b)))
		e[10] = n.fileType()
		b = append(b, name...)
	}
	return b
}

func (n *inode) fileType() byte {
	switch n.mode & TypeMask {
	case TypeRegular:
		return 1
	case TypeDir:
		return 2
	case TypeChar:
		return 3
	case TypeBlock:
		return 4
	case TypeFIFO:
		return 5
	default: // TypeSymlink: check has refused the rest
		return 7
	}
}

// blocks cuts a directory's names into those of one block each.
func blocks(names []string, blockSize int) iter.Seq[[]string] {
	return func(yield func([]string) bool) {
		for len(names) > 0 {
			n, size := 0, 0
			for n < len(names) && size+direntSize+len(names[n]) <= blockSize {
				size += direntSize + len(names[n])
				n++
			}
			if !yield(names[:n]) {
				return
			}
			names = names[n:]
		}
	}
}

// used is the part of a block that its names take.
func used(names []string) int {
	size := 0
	for _, name := range names {
		size += direntSize + len(name)
	}
	return size
}

// padder writes at known offsets. An error stays in w until Flush.
type padder struct {
	w   *bufio.Writer
	off int64
}

func (p *padder) write(b []byte) {
	p.w.Write(b)
	p.off += int64(len(b))
}

func (p *padder) pad(to int64) {
	for p.off < to {
		p.write(zeros[:min(int64(len(zeros)), to-p.off)])
	}
}

var zeros [SuperSize]byte

func roundUp(n, unit int64) int64 { return (n + unit - 1) / unit * unit }
