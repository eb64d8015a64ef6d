// Package xts is AES-XTS over whole disk sectors, as dm-crypt's
// aes-xts-plain64 does it: the tweak of a sector is its number, counted in
// 512-byte units whatever the sector size, as a 128-bit little-endian integer.
//
// It promises the same bytes as golang.org/x/crypto/xts at many times its speed:
// eight blocks at once where the processor has AES instructions (amd64), else three
// passes over a sector that stays in the first-level cache. Sectors are multiples
// of 512 bytes, so there is no ciphertext stealing. It gives no integrity.
package xts

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"fmt"
)

// KeySize is the size of an AES-256-XTS key: data key, then tweak key.
const KeySize = 64

// unit is what a tweak counts.
const unit = 512

// Cipher holds the two expanded keys. It is safe for concurrent use.
type Cipher struct {
	data, tweak cipher.Block
	fast        *fast // nil: not on this machine
}

// New takes a key of KeySize bytes.
func New(key []byte) (*Cipher, error) {
	if len(key) != KeySize {
		return nil, fmt.Errorf("xts: key of %d bytes, want %d", len(key), KeySize)
	}
	d, err := aes.NewCipher(key[:KeySize/2])
	if err != nil {
		return nil, err
	}
	t, err := aes.NewCipher(key[KeySize/2:])
	if err != nil {
		return nil, err
	}
	return &Cipher{data: d, tweak: t, fast: newFast(key[:KeySize/2])}, nil
}

// Encrypt encrypts data in place. off is the byte offset of data in the
// encrypted area; off and len(data) are multiples of sectorSize, which is a
// multiple of 512.
func (c *Cipher) Encrypt(data []byte, off int64, sectorSize int) {
	if c.fast != nil {
		c.sectors(data, off, sectorSize, c.fast.encrypt)
		return
	}
	c.sectors(data, off, sectorSize, slow(c.data.Encrypt))
}

// Decrypt undoes Encrypt.
func (c *Cipher) Decrypt(data []byte, off int64, sectorSize int) {
	c.sectors(data, off, sectorSize, slow(c.data.Decrypt))
}

func (c *Cipher) sectors(data []byte, off int64, sectorSize int, crypt func(sector []byte, tweak *[aes.BlockSize]byte)) {
	if sectorSize <= 0 || sectorSize%unit != 0 || off%int64(sectorSize) != 0 || len(data)%sectorSize != 0 {
		panic(fmt.Sprintf("xts: %d bytes at %d are not whole sectors of %d", len(data), off, sectorSize))
	}
	t := new([aes.BlockSize]byte)
	for len(data) > 0 {
		binary.LittleEndian.PutUint64(t[:], uint64(off)/unit)
		clear(t[8:])
		c.tweak.Encrypt(t[:], t[:])
		crypt(data[:sectorSize], t)
		data = data[sectorSize:]
		off += int64(sectorSize)
	}
}

// slow is a sector's encryption or decryption by single blocks.
func slow(block func(dst, src []byte)) func(s []byte, t *[aes.BlockSize]byte) {
	return func(s []byte, t *[aes.BlockSize]byte) {
		lo, hi := binary.LittleEndian.Uint64(t[:]), binary.LittleEndian.Uint64(t[8:])
		mask(s, lo, hi)
		for b := s; len(b) >= aes.BlockSize; b = b[aes.BlockSize:] {
			block(b, b)
		}
		mask(s, lo, hi)
	}
}

// mask XORs each block of s with its tweak, starting from the tweak (lo, hi).
func mask(s []byte, lo, hi uint64) {
	for ; len(s) >= aes.BlockSize; s = s[aes.BlockSize:] {
		b := s[:aes.BlockSize]
		binary.LittleEndian.PutUint64(b, binary.LittleEndian.Uint64(b)^lo)
		binary.LittleEndian.PutUint64(b[8:], binary.LittleEndian.Uint64(b[8:])^hi)
		carry := hi >> 63
		hi = hi<<1 | lo>>63
		lo = lo<<1 ^ carry*0x87
	}
}
