package xts

import (
	"encoding/binary"
	"math/bits"

	"golang.org/x/sys/cpu"
)

const (
	rounds    = 14 // of AES-256
	groupSize = 8 * 16
)

// fast encrypts eight blocks at once with the processor's AES instructions, which
// crypto/aes does for its own modes alone.
type fast struct {
	keys [(rounds + 1) * 16]byte
}

// newFast expands a data key of 32 bytes; nil where the processor cannot.
func newFast(key []byte) *fast {
	if !cpu.X86.HasAES || !cpu.X86.HasSSE41 {
		return nil
	}
	const words = 32 / 4 // of the key
	f := new(fast)
	copy(f.keys[:], key)
	word := func(i int) uint32 { return binary.LittleEndian.Uint32(f.keys[4*i:]) }
	rcon := uint32(1)
	for i := words; i < len(f.keys)/4; i++ { // FIPS 197, section 5.2
		t := word(i - 1)
		switch i % words {
		case 0:
			t = subWord(bits.RotateLeft32(t, -8)) ^ rcon
			rcon <<= 1
		case 4:
			t = subWord(t)
		}
		binary.LittleEndian.PutUint32(f.keys[4*i:], word(i-words)^t)
	}
	return f
}

// encrypt encrypts a sector of whole groups in place, from its first tweak on.
func (f *fast) encrypt(sector []byte, tweak *[16]byte) {
	encryptBlocks(&f.keys, tweak, &sector[0], len(sector)/groupSize)
}

//go:noescape
func encryptBlocks(keys *[(rounds + 1) * 16]byte, tweak *[16]byte, data *byte, groups int)

// subWord is the S-box on each byte.
func subWord(w uint32) uint32
