// Package snp reads and writes what AMD SEV-SNP firmware and Linux hand to a
// guest: attestation reports, the certificate table next to them, and the JSON
// form of both that Trustee's key broker takes as evidence.
//
// It parses strictly, with bounded sizes, and never panics on input. It does no
// cryptography and trusts nothing: package verify judges a report.
//
// Layouts: AMD "SEV Secure Nested Paging Firmware ABI" (56860), table
// ATTESTATION_REPORT; evidence: the serde form of virtee/sev's AttestationReport.
package snp

import (
	"crypto/ecdsa"
	"crypto/sha512"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"slices"
)

// ReportSize is the size of an attestation report in bytes.
const ReportSize = 0x4a0

// SignedSize is the size of its signed part: bytes 0 to 0x29f.
const SignedSize = 0x2a0

// Report versions that ParseReport takes. Version 2 does not name the CPU and
// 5 adds the mitigation vectors.
const (
	MinVersion = 2
	MaxVersion = 5
)

// Bits of Report.Policy. The lowest 16 bits are the minimum ABI version.
const (
	PolicySMT          = 1 << 16
	PolicyAlwaysOne    = 1 << 17
	PolicyMigrateMA    = 1 << 18
	PolicyDebug        = 1 << 19
	PolicySingleSocket = 1 << 20
)

// Bits of Report.PlatformInfo.
const (
	PlatformSMT        = 1 << 0
	PlatformECC        = 1 << 2
	PlatformAliasCheck = 1 << 5 // the memory was checked for aliases (BadRAM)
)

// Values of Report.SigAlgo and Report.SigningKey.
const (
	SigAlgoECDSAP384SHA384 = 1

	SigningKeyVCEK = 0
	SigningKeyVLEK = 1
	SigningKeyNone = 7
)

var (
	ErrReportSize     = errors.New("not the size of an SNP report")
	ErrReportVersion  = errors.New("unsupported SNP report version")
	ErrUnknownProduct = errors.New("unknown AMD product")
)

// FirmwareVersion is the version of the SNP firmware.
type FirmwareVersion struct{ Major, Minor, Build uint8 }

// Report is an attestation report. Byte arrays stand as in the report; R and S
// are little endian.
type Report struct {
	Version          uint32
	GuestSVN         uint32
	Policy           uint64
	FamilyID         [16]byte
	ImageID          [16]byte
	VMPL             uint32
	SigAlgo          uint32
	CurrentTCB       TCB
	PlatformInfo     uint64
	KeyInfo          uint32
	ReportData       [64]byte
	Measurement      [48]byte
	HostData         [32]byte
	IDKeyDigest      [48]byte
	AuthorKeyDigest  [48]byte
	ReportID         [32]byte
	ReportIDMA       [32]byte
	ReportedTCB      TCB
	CPUFamily        uint8 // this and the next two: zero in version 2
	CPUModel         uint8
	CPUStepping      uint8
	ChipID           [64]byte
	CommittedTCB     TCB
	Current          FirmwareVersion
	Committed        FirmwareVersion
	LaunchTCB        TCB
	LaunchMitVector  uint64 // this and the next: zero before version 5
	CurrentMitVector uint64
	SignatureR       [72]byte
	SignatureS       [72]byte

	// rest is the report as parsed. It keeps the bytes that no field above
	// knows, which the signature covers too.
	rest [ReportSize]byte
}

// ParseReport parses a report of exactly ReportSize bytes.
func ParseReport(b []byte) (*Report, error) {
	if len(b) != ReportSize {
		return nil, fmt.Errorf("%w: %d bytes, want %d", ErrReportSize, len(b), ReportSize)
	}
	r := &Report{rest: [ReportSize]byte(b)}
	if r.Version = binary.LittleEndian.Uint32(b); r.Version < MinVersion || r.Version > MaxVersion {
		return nil, fmt.Errorf("%w: %d, want %d to %d", ErrReportVersion, r.Version, MinVersion, MaxVersion)
	}
	if r.Version >= 3 { // the layout of a TCB depends on the family
		r.CPUFamily = b[0x188]
	}
	r.transfer(reader(b))
	return r, nil
}

// Marshal returns the report's ReportSize bytes.
func (r *Report) Marshal() []byte {
	b := r.rest
	r.transfer(writer(b[:]))
	return b[:]
}

// transfer moves every field between r and its place in the report.
func (r *Report) transfer(m mover) {
	turin := turinLayout(r.Version, r.CPUFamily)
	m.u32(0x00, &r.Version)
	m.u32(0x04, &r.GuestSVN)
	m.u64(0x08, &r.Policy)
	m.bytes(0x10, r.FamilyID[:])
	m.bytes(0x20, r.ImageID[:])
	m.u32(0x30, &r.VMPL)
	m.u32(0x34, &r.SigAlgo)
	m.tcb(0x38, &r.CurrentTCB, turin)
	m.u64(0x40, &r.PlatformInfo)
	m.u32(0x48, &r.KeyInfo)
	m.bytes(0x50, r.ReportData[:])
	m.bytes(0x90, r.Measurement[:])
	m.bytes(0xc0, r.HostData[:])
	m.bytes(0xe0, r.IDKeyDigest[:])
	m.bytes(0x110, r.AuthorKeyDigest[:])
	m.bytes(0x140, r.ReportID[:])
	m.bytes(0x160, r.ReportIDMA[:])
	m.tcb(0x180, &r.ReportedTCB, turin)
	if r.Version >= 3 {
		m.u8(0x188, &r.CPUFamily)
		m.u8(0x189, &r.CPUModel)
		m.u8(0x18a, &r.CPUStepping)
	}
	m.bytes(0x1a0, r.ChipID[:])
	m.tcb(0x1e0, &r.CommittedTCB, turin)
	m.firmware(0x1e8, &r.Current)
	m.firmware(0x1ec, &r.Committed)
	m.tcb(0x1f0, &r.LaunchTCB, turin)
	if r.Version >= 5 {
		m.u64(0x1f8, &r.LaunchMitVector)
		m.u64(0x200, &r.CurrentMitVector)
	}
	m.bytes(0x2a0, r.SignatureR[:])
	m.bytes(0x2e8, r.SignatureS[:])
}

// SigningKey says which key signed the report: SigningKeyVCEK, SigningKeyVLEK
// or SigningKeyNone.
func (r *Report) SigningKey() uint32 { return r.KeyInfo >> 2 & 7 }

// MaskChipKey reports that the host turned signing off: such a report carries
// no signature.
func (r *Report) MaskChipKey() bool { return r.KeyInfo&2 != 0 }

// SignedBy reports whether the certificate's key signed the report. Whether the
// certificate is worth anything is another question.
func (r *Report) SignedBy(vek *x509.Certificate) bool {
	key, ok := vek.PublicKey.(*ecdsa.PublicKey)
	digest := sha512.Sum384(r.Marshal()[:SignedSize])
	return ok && ecdsa.Verify(key, digest[:], leInt(r.SignatureR), leInt(r.SignatureS))
}

func leInt(b [72]byte) *big.Int {
	slices.Reverse(b[:])
	return new(big.Int).SetBytes(b[:])
}

// Product names the CPU's product line: "Milan", "Genoa" or "Turin". AMD keeps
// one set of signing roots for each. Bergamo and Siena belong to Genoa.
func (r *Report) Product() (string, error) {
	f, m := r.CPUFamily, r.CPUModel
	switch {
	case r.Version < 3:
		return "", fmt.Errorf("%w: a version %d report does not name the CPU", ErrUnknownProduct, r.Version)
	case f == 0x19 && m <= 0x0f:
		return "Milan", nil
	case f == 0x19 && (m >= 0x10 && m <= 0x1f || m >= 0xa0 && m <= 0xaf):
		return "Genoa", nil
	case f == 0x1a && m <= 0x11:
		return "Turin", nil
	}
	return "", fmt.Errorf("%w: CPU family %#x model %#x", ErrUnknownProduct, f, m)
}

// VCEKPath is the path and query by which AMD's key distribution service, or a
// mirror of it, has the VCEK of the report's chip and TCB (57230): numbers have
// two digits at least, and Turin's chip ids 8 bytes.
func (r *Report) VCEKPath() (string, error) {
	product, err := r.Product()
	if err != nil {
		return "", err
	}
	if r.ChipID == [64]byte{} {
		return "", errors.New("the host masks the chip id by which to ask for a VCEK")
	}
	id, fmc, t := r.ChipID[:], "", r.ReportedTCB
	if t.FMC != nil {
		id, fmc = id[:8], fmt.Sprintf("fmcSPL=%02d&", *t.FMC)
	}
	return fmt.Sprintf("/vcek/v1/%s/%x?%sblSPL=%02d&teeSPL=%02d&snpSPL=%02d&ucodeSPL=%02d",
		product, id, fmc, t.Bootloader, t.TEE, t.SNP, t.Microcode), nil
}

// mover reads fields from a report or writes them to it, so that the layout
// stands in one place.
type mover struct {
	b     []byte
	write bool
}

func reader(b []byte) mover { return mover{b, false} }
func writer(b []byte) mover { return mover{b, true} }

func (m mover) bytes(off int, p []byte) {
	if m.write {
		copy(m.b[off:], p)
	} else {
		copy(p, m.b[off:])
	}
}

func (m mover) u8(off int, p *uint8) {
	if m.write {
		m.b[off] = *p
	} else {
		*p = m.b[off]
	}
}

func (m mover) u32(off int, p *uint32) {
	if m.write {
		binary.LittleEndian.PutUint32(m.b[off:], *p)
	} else {
		*p = binary.LittleEndian.Uint32(m.b[off:])
	}
}

func (m mover) u64(off int, p *uint64) {
	if m.write {
		binary.LittleEndian.PutUint64(m.b[off:], *p)
	} else {
		*p = binary.LittleEndian.Uint64(m.b[off:])
	}
}

func (m mover) firmware(off int, p *FirmwareVersion) {
	m.u8(off, &p.Build)
	m.u8(off+1, &p.Minor)
	m.u8(off+2, &p.Major)
}

func (m mover) tcb(off int, p *TCB, turin bool) {
	i := tcbOffsets(turin)
	if turin {
		fmc := p.parts()[0]
		m.u8(off+i.fmc, &fmc)
		if !m.write {
			p.FMC = &fmc
		}
	}
	m.u8(off+i.bootloader, &p.Bootloader)
	m.u8(off+i.tee, &p.TEE)
	m.u8(off+i.snp, &p.SNP)
	m.u8(off+i.microcode, &p.Microcode)
}
