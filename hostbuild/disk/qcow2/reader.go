package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sort"
)

// ErrInvalid is wrapped by every error about an image's contents.
var ErrInvalid = errors.New("not a usable qcow2 image")

// Reader reads an image. It is safe for concurrent use.
type Reader struct {
	f       io.ReaderAt
	size    int64
	cluster int64
	extents []extent
}

type extent struct{ virtual, file, length int64 }

// Masks of table entries.
const (
	offsetMask = 0x00fffffffffffe00
	compressed = 1 << 62
	zero       = 1
)

// Bounds of what is kept in memory about an image. A Writer's has 16 KiB of L1 for
// each TiB.
const (
	maxL1       = 32 << 20 // bytes, as QEMU has it
	maxClusters = 1 << 31  // of the file, a bit for each
)

// NewReader reads the tables of the image in f, a file of fileSize bytes. Each
// cluster of the file may be used once: an image cannot be larger than its file
// except by unallocated clusters.
func NewReader(f io.ReaderAt, fileSize int64) (*Reader, error) {
	h := make([]byte, headerSize)
	if n, err := f.ReadAt(h, 0); n < 72 {
		if err == io.EOF {
			err = errors.New("too short")
		}
		return nil, fmt.Errorf("%w: header: %w", ErrInvalid, err)
	}
	u32 := func(at int) uint32 { return binary.BigEndian.Uint32(h[at:]) }
	u64 := func(at int) uint64 { return binary.BigEndian.Uint64(h[at:]) }
	refuse := func(format string, a ...any) (*Reader, error) {
		return nil, fmt.Errorf("%w: "+format, append([]any{ErrInvalid}, a...)...)
	}
	version, bits, size, l1Size, l1At := u32(4), u32(20), u64(24), int64(u32(36)), u64(40)
	switch {
	case u32(0) != magic:
		return refuse("no qcow2 magic")
	case version != 2 && version != 3:
		return refuse("version %d", version)
	case u64(8) != 0:
		return refuse("it has a backing file")
	case bits < 9 || bits > 21:
		return refuse("clusters of 2^%d bytes", bits)
	case size > maxSize:
		return refuse("virtual size of %d bytes, more than %d", size, int64(maxSize))
	case u32(32) != 0:
		return refuse("it is encrypted")
	}
	if version == 3 {
		const dirty = 1 // refcounts may be stale; they are not read here
		if f := u64(72); f&^dirty != 0 {
			return refuse("incompatible features %#x (corrupt, external data file, or extended tables)", f)
		}
	}
	r := &Reader{f: f, size: int64(size), cluster: 1 << bits}
	perTable := r.cluster / 8
	tables := ceil(ceil(r.size, r.cluster), perTable)
	if l1Size < tables {
		return refuse("L1 table of %d entries, %d are needed", l1Size, tables)
	}
	// The tables lie in the file, so its size bounds the memory that they take; but
	// a sparse file costs nothing.
	if tables*8 > maxL1 || ceil(fileSize, r.cluster) > maxClusters {
		return refuse("%d bytes in clusters of %d, in a file of %d, are too many", r.size, r.cluster, fileSize)
	}
	inFile := func(at uint64, n int64) bool {
		return at%uint64(r.cluster) == 0 && at != 0 && at <= uint64(fileSize) && n <= fileSize-int64(at)
	}
	if tables > 0 && !inFile(l1At, tables*8) {
		return refuse("L1 table at %d is outside the file", l1At)
	}
	l1 := make([]byte, tables*8)
	if _, err := readFull(f, l1, int64(l1At)); err != nil {
		return refuse("L1 table: %w", err)
	}
	used := make([]uint64, ceil(ceil(fileSize, r.cluster), 64))
	claim := func(at uint64) bool {
		c := int64(at) / r.cluster
		bit := uint64(1) << (c % 64)
		free := used[c/64]&bit == 0
		used[c/64] |= bit
		return free
	}
	l2 := make([]byte, r.cluster)
	for i := range tables {
		at := binary.BigEndian.Uint64(l1[8*i:]) & offsetMask
		if at == 0 {
			continue
		}
		if !inFile(at, r.cluster) || !claim(at) {
			return refuse("L2 table %d at %d is outside the file or used twice", i, at)
		}
		if _, err := readFull(f, l2, int64(at)); err != nil {
			return refuse("L2 table %d: %w", i, err)
		}
		for j := range perTable {
			e := binary.BigEndian.Uint64(l2[8*j:])
			virtual := (i*perTable + j) * r.cluster
			at := e & offsetMask
			switch {
			case e&compressed != 0:
				return refuse("the cluster at %d is compressed", virtual)
			case at == 0 || version == 3 && e&zero != 0:
				continue
			case virtual >= r.size:
				return refuse("a cluster at %d, behind the end", virtual)
			case !inFile(at, 1) || !claim(at):
				return refuse("the cluster at %d lies at %d, outside the file or used twice", virtual, at)
			}
			r.add(extent{virtual, int64(at), min(r.cluster, r.size-virtual)})
		}
	}
	return r, nil
}

// add appends an extent, joined to the last one where they are neighbours.
func (r *Reader) add(e extent) {
	if n := len(r.extents); n > 0 {
		l := &r.extents[n-1]
		if l.virtual+l.length == e.virtual && l.file+l.length == e.file {
			l.length += e.length
			return
		}
	}
	r.extents = append(r.extents, e)
}

// Size is the virtual size in bytes.
func (r *Reader) Size() int64 { return r.size }

// ReadAt reads the virtual disk.
func (r *Reader) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off > r.size {
		return 0, fmt.Errorf("qcow2: offset %d lies outside the disk of %d", off, r.size)
	}
	short := int64(len(p)) > r.size-off
	if short {
		p = p[:r.size-off]
	}
	clear(p)
	i := sort.Search(len(r.extents), func(i int) bool { return r.extents[i].virtual+r.extents[i].length > off })
	for end := off + int64(len(p)); i < len(r.extents) && r.extents[i].virtual < end; i++ {
		e := r.extents[i]
		from, to := max(off, e.virtual), min(end, e.virtual+e.length)
		if _, err := readFull(r.f, p[from-off:to-off], e.file+from-e.virtual); err != nil {
			return 0, fmt.Errorf("qcow2: read at %d: %w", from, err)
		}
	}
	if short {
		return len(p), io.EOF
	}
	return len(p), nil
}

// CopyTo writes the allocated parts of the disk to their places in w.
// The rest is zero.
func (r *Reader) CopyTo(w io.WriterAt) error {
	buf := make([]byte, 1<<20)
	for _, e := range r.extents {
		for done := int64(0); done < e.length; {
			b := buf[:min(int64(len(buf)), e.length-done)]
			if _, err := readFull(r.f, b, e.file+done); err != nil {
				return fmt.Errorf("qcow2: read at %d: %w", e.file+done, err)
			}
			if _, err := w.WriteAt(b, e.virtual+done); err != nil {
				return err
			}
			done += int64(len(b))
		}
	}
	return nil
}

// readFull reads b at off. A file's last cluster may be cut short: what is
// missing reads as zero.
func readFull(f io.ReaderAt, b []byte, off int64) (int, error) {
	n, err := f.ReadAt(b, off)
	if err == io.EOF {
		clear(b[n:])
		err = nil
	}
	return n, err
}
