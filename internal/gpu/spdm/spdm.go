// Package spdm reads the attestation reports of NVIDIA GPUs (Hopper, Blackwell)
// and LS10 switches: an SPDM 1.1 GET_MEASUREMENTS request followed by the signed
// MEASUREMENTS response, as NVML returns them.
//
// It promises that a report it accepts is one exact encoding: no length is taken
// on trust, no byte is left over, no field appears twice, and the request asked
// for every measurement with a signature. It checks the signature against a key
// it is given. It does not know whose key that is, which nonce was asked for or
// what the measurements should be.
package spdm

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha512"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
)

// maxSize is the size of NVML's buffer for a report.
const maxSize = 8192

const (
	version       = 0x11
	requestSize   = 37
	signatureSize = 96
	blockSize     = 55
	digestSize    = 48
	maxBlocks     = 64
)

var (
	// ErrFormat is a report that cannot be read.
	ErrFormat = errors.New("attestation report is malformed")
	// ErrRequest is a report for a request that asked for less than everything,
	// signed.
	ErrRequest = errors.New("attestation report answers another request")
	// ErrSignature is a report that the key did not sign.
	ErrSignature = errors.New("attestation report's signature is wrong")
)

// FieldType names a field of the opaque data.
type FieldType uint16

// The fields that are used here or shown to people; the numbers are NVIDIA's.
const (
	DriverVersion  FieldType = 3
	VBIOSVersion   FieldType = 6
	NVDEC0Status   FieldType = 11
	ChipSKU        FieldType = 15
	Project        FieldType = 17
	ProjectSKU     FieldType = 18
	FWID           FieldType = 20
	PPCIEStatus    FieldType = 21
	SwitchPDI      FieldType = 22
	SwitchGPUPDIs  FieldType = 26
	OpaqueVersion  FieldType = 34
	ChipInfo       FieldType = 35
	FeatureFlag    FieldType = 36
	maxOpaqueMajor           = 1
)

// NVDEC0 states and protected-PCIe states, as one byte of their fields.
const (
	Enabled  byte = 0xAA
	Disabled byte = 0x55
)

// Field is one field of the opaque data, as it stands in the report.
type Field struct {
	Type  FieldType
	Value []byte
}

// Report is a report that was read. Its slices point into the bytes given to Parse.
type Report struct {
	Nonce          [32]byte   // the request's
	ResponderNonce [32]byte   // the device's own
	Measurements   [][]byte   // SHA-384 values; the block of index i+1 stands at i
	Opaque         []Field    // in the report's order, each type once
	Padded         bool       // one zero byte follows the signature (drivers 580.95.05 and about)
	signed         []byte     // what the signature covers
	signature      [2]big.Int // r, s
}

// Parse reads a report.
func Parse(b []byte) (*Report, error) {
	if len(b) > maxSize {
		return nil, fmt.Errorf("%w: %d bytes, at most %d are possible", ErrFormat, len(b), maxSize)
	}
	c := cursor{b: b}
	r := &Report{}
	if err := r.request(&c); err != nil {
		return nil, err
	}
	if err := r.response(&c); err != nil {
		return nil, err
	}
	return r, nil
}

func (r *Report) request(c *cursor) error {
	head, nonce, slot := c.take(4), c.take(32), c.take(1)
	switch {
	case c.short:
		return fmt.Errorf("%w: %d bytes are less than a request's %d", ErrFormat, len(c.b), requestSize)
	case head[0] != version:
		return fmt.Errorf("%w: SPDM version %#x, only 1.1 (0x11) is known", ErrFormat, head[0])
	case head[1] != 0xE0:
		return fmt.Errorf("%w: it starts with code %#x, want GET_MEASUREMENTS (0xe0)", ErrFormat, head[1])
	case head[2] != 0x01 || head[3] != 0xFF || slot[0] != 0:
		return fmt.Errorf("%w: parameters %#x %#x slot %d, want a signature over all measurements (0x1 0xff slot 0)", ErrRequest, head[2], head[3], slot[0])
	}
	copy(r.Nonce[:], nonce)
	return nil
}

func (r *Report) response(c *cursor) error {
	head := c.take(5)
	recordLen := c.take(3)
	if c.short {
		return fmt.Errorf("%w: it ends in the response's header", ErrFormat)
	}
	length := int(recordLen[0]) | int(recordLen[1])<<8 | int(recordLen[2])<<16
	blocks := int(head[4])
	switch {
	case head[0] != version || head[1] != 0x60 || head[2] != 0 || head[3] != 0:
		return fmt.Errorf("%w: response header %x, want 11600000", ErrFormat, head[:4])
	case blocks < 1 || blocks > maxBlocks:
		return fmt.Errorf("%w: %d measurement blocks, want 1 to %d", ErrFormat, blocks, maxBlocks)
	case length != blocks*blockSize:
		return fmt.Errorf("%w: %d measurement blocks in %d bytes, want %d", ErrFormat, blocks, length, blocks*blockSize)
	}
	if err := r.record(c.take(length), blocks); err != nil {
		return err
	}
	nonce, opaqueLen := c.take(32), c.take(2)
	if c.short {
		return fmt.Errorf("%w: it ends before the opaque data", ErrFormat)
	}
	copy(r.ResponderNonce[:], nonce)
	opaque := c.take(int(binary.LittleEndian.Uint16(opaqueLen)))
	r.signed = c.b[:c.at]
	signature := c.take(signatureSize)
	rest := c.b[c.at:]
	switch {
	case c.short:
		return fmt.Errorf("%w: it ends in the opaque data or the signature", ErrFormat)
	case len(rest) == 1 && rest[0] == 0:
		r.Padded = true
	case len(rest) > 0:
		return fmt.Errorf("%w: %d bytes follow the signature", ErrFormat, len(rest))
	}
	r.signature[0].SetBytes(signature[:signatureSize/2])
	r.signature[1].SetBytes(signature[signatureSize/2:])
	return r.opaque(opaque)
}

func (r *Report) record(b []byte, blocks int) error {
	if b == nil {
		return fmt.Errorf("%w: it ends in the measurements", ErrFormat)
	}
	r.Measurements = make([][]byte, blocks)
	for i := range blocks {
		block := b[i*blockSize : (i+1)*blockSize]
		index := int(block[0])
		// DMTF specification 1, 51 bytes of it: a digest (type 1) of 48 bytes.
		if want := []byte{1, 51, 0, 1, digestSize, 0}; !bytes.Equal(block[1:7], want) {
			return fmt.Errorf("%w: measurement block %d has header %x, want %x", ErrFormat, i+1, block[1:7], want)
		}
		if index < 1 || index > blocks || r.Measurements[index-1] != nil {
			return fmt.Errorf("%w: measurement block %d has index %d, which is out of range or there twice", ErrFormat, i+1, index)
		}
		r.Measurements[index-1] = block[7:]
	}
	return nil
}

func (r *Report) opaque(b []byte) error {
	for len(b) > 0 {
		if len(b) < 4 {
			return fmt.Errorf("%w: %d bytes are left over in the opaque data", ErrFormat, len(b))
		}
		t, n := FieldType(binary.LittleEndian.Uint16(b)), int(binary.LittleEndian.Uint16(b[2:]))
		if b = b[4:]; n > len(b) {
			return fmt.Errorf("%w: opaque field %d has %d bytes, %d are left", ErrFormat, t, n, len(b))
		}
		if _, twice := r.Field(t); twice {
			return fmt.Errorf("%w: opaque field %d is there twice", ErrFormat, t)
		}
		r.Opaque = append(r.Opaque, Field{t, b[:n:n]})
		b = b[n:]
	}
	if v, ok := r.Field(OpaqueVersion); ok && (len(v) == 0 || v[0] > maxOpaqueMajor || len(bytes.Trim(v[1:], "\x00")) > 0) {
		return fmt.Errorf("%w: opaque data version %x, only %d is known", ErrFormat, v, maxOpaqueMajor)
	}
	return nil
}

// Field returns a field of the opaque data.
func (r *Report) Field(t FieldType) ([]byte, bool) {
	i := slices.IndexFunc(r.Opaque, func(f Field) bool { return f.Type == t })
	if i < 0 {
		return nil, false
	}
	return r.Opaque[i].Value, true
}

// Text returns a field of ASCII text without the NULs at its end. Only letters,
// digits and "._-" are accepted, since such text becomes part of file names and
// addresses.
func (r *Report) Text(t FieldType) (string, error) {
	v, ok := r.Field(t)
	if !ok {
		return "", fmt.Errorf("%w: opaque field %d is missing", ErrFormat, t)
	}
	s := strings.TrimRight(string(v), "\x00")
	for _, c := range []byte(s) {
		if !('0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || c == '.' || c == '_' || c == '-') {
			return "", fmt.Errorf("%w: opaque field %d is not plain text: %q", ErrFormat, t, v)
		}
	}
	if s == "" || strings.Contains(s, "..") {
		return "", fmt.Errorf("%w: opaque field %d holds %q", ErrFormat, t, s)
	}
	return s, nil
}

// Byte returns a field that holds one status byte, and false where it is absent
// or of another length.
func (r *Report) Byte(t FieldType) (byte, bool) {
	v, ok := r.Field(t)
	if !ok || len(v) != 1 {
		return 0, false
	}
	return v[0], true
}

// VBIOS returns the VBIOS version as NVIDIA prints it, "96.00.9F.00.01". A GPU's
// report holds 8 bytes, the first half reversed; a switch's holds text.
func (r *Report) VBIOS() (string, error) {
	v, ok := r.Field(VBIOSVersion)
	if !ok || len(v) != 8 {
		return r.Text(VBIOSVersion)
	}
	return fmt.Sprintf("%02X.%02X.%02X.%02X.%02X", v[3], v[2], v[1], v[0], v[4]), nil
}

// PDIs returns the 8-byte device identifiers of a field in hex, as NVIDIA prints
// them (each reversed).
func (r *Report) PDIs(t FieldType) []string {
	v, _ := r.Field(t)
	var pdis []string
	for ; len(v) >= 8; v = v[8:] {
		pdis = append(pdis, fmt.Sprintf("%#016x", binary.LittleEndian.Uint64(v)))
	}
	return pdis
}

// VerifySignature checks that key signed the report (ECDSA P-384, SHA-384).
func (r *Report) VerifySignature(key *ecdsa.PublicKey) error {
	digest := sha512.Sum384(r.signed)
	if !ecdsa.Verify(key, digest[:], &r.signature[0], &r.signature[1]) {
		return ErrSignature
	}
	return nil
}

// cursor hands out a buffer piece by piece.
type cursor struct {
	b     []byte
	at    int
	short bool // more was asked for than there is
}

// take returns the next n bytes, or nil and notes it where there are fewer.
func (c *cursor) take(n int) []byte {
	if c.short || n > len(c.b)-c.at {
		c.short = true
		return nil
	}
	c.at += n
	return c.b[c.at-n : c.at]
}
