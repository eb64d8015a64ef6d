// Package verity makes dm-verity hash trees of format 1: SHA-256, 4096-byte
// data and hash blocks, salt before the data. The root hash, the superblock and
// the tree are those that `veritysetup format` writes for the same salt and UUID.
//
// The caller hashes its data blocks itself, in any order (Hasher.Leaf), and keeps
// the hashes wherever it likes; the tree is made from them.
package verity

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
)

// Sizes in bytes.
const (
	BlockSize = 4096
	HashSize  = sha256.Size
	SaltSize  = 32

	perBlock = BlockSize / HashSize // hashes in a hash block
)

// Hasher hashes blocks under one salt. It is not safe for concurrent use.
type Hasher struct {
	salt []byte
	h    hash.Hash
}

// NewHasher takes the salt that goes before every block.
func NewHasher(salt []byte) *Hasher { return &Hasher{salt: salt, h: sha256.New()} }

// Append hashes each block of data and appends the hashes to dst.
func (h *Hasher) Append(dst, data []byte) []byte {
	for ; len(data) >= BlockSize; data = data[BlockSize:] {
		h.h.Reset()
		h.h.Write(h.salt)
		h.h.Write(data[:BlockSize])
		dst = h.h.Sum(dst)
	}
	return dst
}

// Params describes the tree to write.
type Params struct {
	Salt   []byte // SaltSize bytes
	UUID   [16]byte
	Blocks int64       // data blocks, at least 2
	Leaves io.ReaderAt // Blocks hashes of the data blocks, in order
}

// TreeSize is the size in bytes of superblock and tree for so many data blocks.
func TreeSize(blocks int64) int64 {
	n := int64(1)
	for blocks > 1 {
		blocks = (blocks + perBlock - 1) / perBlock
		n += blocks
	}
	return n * BlockSize
}

// Write writes the superblock and the tree, TreeSize(p.Blocks) bytes, and
// returns the root hash. It holds a 128th of the leaves in memory.
func Write(w io.Writer, p Params) (root [HashSize]byte, err error) {
	if p.Blocks < 2 || len(p.Salt) != SaltSize {
		return root, errors.New("verity: a tree needs two data blocks and a salt of 32 bytes")
	}
	h := NewHasher(p.Salt)
	leaves := func() io.Reader { return io.NewSectionReader(p.Leaves, 0, p.Blocks*HashSize) }
	first, err := hashLevel(h, leaves())
	if err != nil {
		return root, fmt.Errorf("verity: read the block hashes: %w", err)
	}
	upper := [][]byte{first} // from the leaves' parents up to the root hash
	for top := first; len(top) > HashSize; {
		top, err = hashLevel(h, bytes.NewReader(top))
		if err != nil {
			return root, err
		}
		upper = append(upper, top)
	}
	root = [HashSize]byte(upper[len(upper)-1])

	bw := bufio.NewWriterSize(w, 1<<20)
	bw.Write(superblock(p))
	for i := len(upper) - 2; i >= 0; i-- { // the root hash itself lies outside
		if err := copyPadded(bw, bytes.NewReader(upper[i])); err != nil {
			return root, err
		}
	}
	if err := copyPadded(bw, leaves()); err != nil {
		return root, err
	}
	return root, bw.Flush()
}

// hashLevel reads the hashes of one level and returns those of the level above.
func hashLevel(h *Hasher, r io.Reader) ([]byte, error) {
	var out []byte
	block := make([]byte, BlockSize)
	br := bufio.NewReaderSize(r, 1<<20)
	for {
		n, err := io.ReadFull(br, block)
		if n > 0 {
			clear(block[n:])
			out = h.Append(out, block)
		}
		switch err {
		case nil:
		case io.EOF, io.ErrUnexpectedEOF:
			return out, nil
		default:
			return nil, err
		}
	}
}

func copyPadded(w io.Writer, r io.Reader) error {
	n, err := io.Copy(w, r)
	if err != nil {
		return err
	}
	_, err = w.Write(make([]byte, -n&(BlockSize-1)))
	return err
}

func superblock(p Params) []byte {
	b := make([]byte, BlockSize)
	copy(b, "verity")
	binary.LittleEndian.PutUint32(b[8:], 1)  // superblock version
	binary.LittleEndian.PutUint32(b[12:], 1) // hash type: normal
	copy(b[16:], p.UUID[:])
	copy(b[32:], "sha256")
	binary.LittleEndian.PutUint32(b[64:], BlockSize)
	binary.LittleEndian.PutUint32(b[68:], BlockSize)
	binary.LittleEndian.PutUint64(b[72:], uint64(p.Blocks))
	binary.LittleEndian.PutUint16(b[80:], uint16(len(p.Salt)))
	copy(b[88:], p.Salt)
	return b
}
