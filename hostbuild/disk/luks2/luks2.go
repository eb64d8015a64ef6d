// Package luks2 makes the LUKS2 header of crypt_root: one PBKDF2 key slot, one
// aes-xts-plain64 segment with 4096-byte sectors, no tokens. The layout follows
// the LUKS2 On-Disk Format Specification 1.1; cryptsetup accepts it.
//
// The header is written once and never changes, so that its SHA-256 can be
// pinned in the guest config: a LUKS2 header carries no keyed checksum of its
// own. Few PBKDF2 iterations are enough because the passphrase is 64 random bytes.
package luks2

import (
	"bytes"
	"crypto/pbkdf2"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"

	"coffer/hostbuild/disk/xts"
)

// Sizes in bytes.
const (
	// DataOffset is where the payload begins, and the size of the header.
	DataOffset = 1 << 20
	// SectorSize is the size of an encrypted sector of the payload.
	SectorSize = 4096
	// KeySize is the size of the volume key.
	KeySize = xts.KeySize

	copySize   = 16384 // one of the two copies: binary part and JSON
	binarySize = 4096
	areaOffset = 2 * copySize // the only key slot's area
	areaSize   = 258048       // 4000 stripes of KeySize, rounded up to 4096
	stripes    = 4000
	iterations = 1000 // the least cryptsetup allows
	saltSize   = 32
)

// Params says what to make.
type Params struct {
	Passphrase []byte
	Label      string // at most 47 bytes
	Rand       io.Reader
}

// Format makes a header of DataOffset bytes and the volume key it protects.
// The caller wipes the key.
func Format(p Params) (header, volumeKey []byte, err error) {
	if len(p.Passphrase) < 32 {
		return nil, nil, errors.New("luks2: the passphrase is shorter than 32 bytes: too weak for so few PBKDF2 iterations")
	}
	if len(p.Label) > 47 {
		return nil, nil, fmt.Errorf("luks2: label %q is longer than 47 bytes", p.Label)
	}
	header = make([]byte, DataOffset)
	random := make([]byte, KeySize+2*saltSize+2*64+16)
	defer clear(random)
	if _, err := io.ReadFull(p.Rand, random); err != nil {
		return nil, nil, fmt.Errorf("luks2: read randomness: %w", err)
	}
	take := func(n int) []byte {
		b := random[:n:n]
		random = random[n:]
		return b
	}
	volumeKey = bytes.Clone(take(KeySize))
	if bytes.Equal(volumeKey[:KeySize/2], volumeKey[KeySize/2:]) {
		return nil, nil, errors.New("luks2: the source of randomness repeats itself")
	}
	slotSalt, digestSalt := take(saltSize), take(saltSize)
	copySalts := [2][]byte{take(64), take(64)}
	uuid := UUID([16]byte(take(16)))

	kek, err := pbkdf2.Key(sha256.New, string(p.Passphrase), slotSalt, iterations, KeySize)
	if err != nil {
		return nil, nil, fmt.Errorf("luks2: derive the slot key: %w", err)
	}
	defer clear(kek)
	slot, err := xts.New(kek)
	if err != nil {
		return nil, nil, err
	}
	area := header[areaOffset : areaOffset+areaSize]
	if err := split(area[:stripes*KeySize], volumeKey, p.Rand); err != nil {
		return nil, nil, err
	}
	slot.Encrypt(area, 0, 512)

	digest, err := pbkdf2.Key(sha256.New, string(volumeKey), digestSalt, iterations, sha256.Size)
	if err != nil {
		return nil, nil, fmt.Errorf("luks2: digest of the volume key: %w", err)
	}
	meta, err := json.Marshal(metadata(slotSalt, digestSalt, digest))
	if err != nil {
		return nil, nil, err
	}
	for i, magic := range []string{"LUKS\xba\xbe", "SKUL\xba\xbe"} {
		c := header[i*copySize : (i+1)*copySize]
		copy(c, magic)
		binary.BigEndian.PutUint16(c[6:], 2)
		binary.BigEndian.PutUint64(c[8:], copySize)
		binary.BigEndian.PutUint64(c[16:], 1) // sequence number
		copy(c[24:72], p.Label)
		copy(c[72:], "sha256")
		copy(c[104:168], copySalts[i])
		copy(c[168:], uuid)
		binary.BigEndian.PutUint64(c[256:], uint64(i*copySize))
		copy(c[binarySize:], meta)
		sum := sha256.Sum256(c) // with the checksum's own field zero
		copy(c[448:], sum[:])
	}
	return header, volumeKey, nil
}

// split is LUKS's anti-forensic splitter with SHA-256: dst takes stripes
// pieces, all of which are needed to get key back.
func split(dst, key []byte, random io.Reader) error {
	last := len(dst) - len(key)
	if _, err := io.ReadFull(random, dst[:last]); err != nil {
		return fmt.Errorf("luks2: read randomness: %w", err)
	}
	d := make([]byte, len(key))
	defer clear(d)
	for s := dst[:last]; len(s) > 0; s = s[len(key):] {
		for i := range d {
			d[i] ^= s[i]
		}
		diffuse(d)
	}
	for i := range d {
		dst[last+i] = d[i] ^ key[i]
	}
	return nil
}

func diffuse(d []byte) {
	var in [4 + sha256.Size]byte
	for i := 0; i*sha256.Size < len(d); i++ {
		block := d[i*sha256.Size : (i+1)*sha256.Size]
		binary.BigEndian.PutUint32(in[:], uint32(i))
		copy(in[4:], block)
		sum := sha256.Sum256(in[:])
		copy(block, sum[:])
	}
	clear(in[:])
}

type object = map[string]any

// metadata is the JSON area. Which numbers are strings is the format's choice.
func metadata(slotSalt, digestSalt, digest []byte) object {
	const cipher = "aes-xts-plain64"
	return object{
		"keyslots": object{"0": object{
			"type": "luks2", "key_size": KeySize,
			"af":   object{"type": "luks1", "stripes": stripes, "hash": "sha256"},
			"area": object{"type": "raw", "offset": strconv.Itoa(areaOffset), "size": strconv.Itoa(areaSize), "encryption": cipher, "key_size": KeySize},
			"kdf":  object{"type": "pbkdf2", "hash": "sha256", "iterations": iterations, "salt": slotSalt},
		}},
		"tokens": object{},
		"segments": object{"0": object{
			"type": "crypt", "offset": strconv.Itoa(DataOffset), "size": "dynamic", "iv_tweak": "0", "encryption": cipher, "sector_size": SectorSize,
		}},
		"digests": object{"0": object{
			"type": "pbkdf2", "keyslots": []string{"0"}, "segments": []string{"0"}, "hash": "sha256",
			"iterations": iterations, "salt": digestSalt, "digest": digest,
		}},
		"config": object{"json_size": strconv.Itoa(copySize - binarySize), "keyslots_size": strconv.Itoa(DataOffset - areaOffset)},
	}
}

// UUID writes 16 random bytes as an RFC 9562 version 4 UUID.
func UUID(b [16]byte) string {
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	h := hex.EncodeToString(b[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}
