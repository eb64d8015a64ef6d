package ext4

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// Extent is a part of a file system in bytes; both are multiples of BlockSize.
type Extent struct{ Off, Len int64 }

// Live lists the parts of a file system, just made by Make in the sparse file f,
// that must keep their contents, in order. They are what mke2fs has written, and
// what it has left as a hole although it is in use: the used parts of the inode
// tables, and bitmaps. Whatever else is read as noise instead of zeros makes
// no difference: no kernel or e2fsck looks at it before it has written it.
func Live(f *os.File) ([]Extent, error) {
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	extents, err := Data(f)
	if err != nil {
		return nil, err
	}
	used, err := usedMetadata(f, size)
	if err != nil {
		return nil, fmt.Errorf("read the file system's groups: %w", err)
	}
	return join(append(extents, used...)), nil
}

// Data lists the parts of a sparse file that are no holes, in order.
func Data(f *os.File) ([]Extent, error) {
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	var out []Extent
	for off := int64(0); off < size; {
		start, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("list the holes of %s: %w", f.Name(), err)
		}
		end, err := unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
		if err != nil {
			return nil, fmt.Errorf("list the holes of %s: %w", f.Name(), err)
		}
		start = start / BlockSize * BlockSize
		out = append(out, Extent{start, min(roundUp(end), size) - start})
		off = end
	}
	return out, nil
}

// usedMetadata reads superblock and group descriptors (Documentation/filesystems/ext4
// of the kernel).
func usedMetadata(f io.ReaderAt, size int64) ([]Extent, error) {
	sb := make([]byte, 1024)
	if _, err := f.ReadAt(sb, 1024); err != nil {
		return nil, err
	}
	const (
		magic          = 0xEF53
		incompat64bit  = 0x80
		incompatMetaBG = 0x10
		inodeUninit    = 1
		blockUninit    = 2
	)
	u16 := func(b []byte, at int) int64 { return int64(binary.LittleEndian.Uint16(b[at:])) }
	u32 := func(b []byte, at int) int64 { return int64(binary.LittleEndian.Uint32(b[at:])) }
	blocks := u32(sb, 4) | u32(sb, 0x150)<<32
	perGroup, inodesPerGroup := u32(sb, 0x20), u32(sb, 0x28)
	inodeSize, descSize := u16(sb, 0x58), u16(sb, 0xFE)
	incompat := u32(sb, 0x60)
	switch {
	case u16(sb, 0x38) != magic:
		return nil, errors.New("no ext4 superblock")
	case u32(sb, 0x18) != 2 || incompat&incompat64bit == 0 || incompat&incompatMetaBG != 0 || descSize != 64,
		perGroup != 8*BlockSize, inodesPerGroup == 0, inodeSize != 256, blocks < 0 || blocks > size/BlockSize:
		return nil, errors.New("not a file system as this package makes them")
	}
	groups := (blocks + perGroup - 1) / perGroup
	desc := make([]byte, groups*descSize)
	if _, err := f.ReadAt(desc, BlockSize); err != nil {
		return nil, err
	}
	var out []Extent
	add := func(block, n int64) { out = append(out, Extent{block * BlockSize, n * BlockSize}) }
	add(0, 1+(int64(len(desc))+BlockSize-1)/BlockSize)
	for ; len(desc) > 0; desc = desc[descSize:] {
		u48 := func(lo, hi int) int64 { return u32(desc, lo) | u32(desc, hi)<<32 }
		flags := u16(desc, 0x12)
		if flags&blockUninit == 0 {
			add(u48(0, 0x20), 1)
		}
		if flags&inodeUninit == 0 {
			add(u48(4, 0x24), 1)
			unused := u16(desc, 0x1C) | u16(desc, 0x32)<<16
			if n := (inodesPerGroup - unused) * inodeSize; n > 0 {
				add(u48(8, 0x28), (n+BlockSize-1)/BlockSize)
			}
		}
	}
	for _, e := range out {
		if e.Off < 0 || e.Len < 0 || e.Off+e.Len > size {
			return nil, fmt.Errorf("metadata at %d, outside the file system", e.Off)
		}
	}
	return out, nil
}

// join sorts extents and joins those that touch.
func join(in []Extent) []Extent {
	slices.SortFunc(in, func(a, b Extent) int { return cmp.Compare(a.Off, b.Off) })
	var out []Extent
	for _, e := range in {
		if n := len(out); n > 0 && e.Off <= out[n-1].Off+out[n-1].Len {
			out[n-1].Len = max(out[n-1].Len, e.Off+e.Len-out[n-1].Off)
			continue
		}
		out = append(out, e)
	}
	return out
}

func roundUp(n int64) int64 { return (n + BlockSize - 1) / BlockSize * BlockSize }
