// Package measure predicts the launch digest (MEASUREMENT) that AMD SEV-SNP
// firmware reports for a guest which QEMU 9.1 or later starts with
// kernel-hashes=on on a host kernel from 6.10 on.
//
// The digest covers the firmware image, the hashes of kernel, initrd and
// command line, and the first state of every vCPU: so also the number of vCPUs,
// the CPU model and SEV_FEATURES. It does not cover memory size, devices, ACPI
// tables, the launch policy or host_data.
//
// Layouts: AMD "SEV Secure Nested Paging Firmware ABI" (56860) for PAGE_INFO,
// AMD APM volume 2 for the VMSA, QEMU's target/i386/sev.c for the hash table.
package measure

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
)

// DefaultGuestFeatures is SEV_FEATURES as upstream KVM with QEMU 9.1 to 11.1 sets it: SNPActive.
const DefaultGuestFeatures = 0x1

const maxVCPUs = 512

var (
	ErrNoKernelHashes = errors.New("the firmware does not check kernel, initrd and command line (OVMF.amdsev.fd does)")
	ErrUnknownCPU     = errors.New("unknown CPU model")
)

// Input is what a launch is made of.
type Input struct {
	OVMF          []byte
	Kernel        [32]byte // SHA-256 of the whole vmlinuz file
	Initrd        [32]byte // SHA-256 of the whole initrd file
	HasKernel     bool     // without a kernel nothing of Kernel, Initrd and Cmdline is measured
	HasInitrd     bool
	Cmdline       string // QEMU's -append, byte for byte
	VCPUs         int
	CPU           string // QEMU's -cpu without options
	CPUSignature  uint32 // CPUID(1).EAX, where CPU is ""
	GuestFeatures uint64 // SEV_FEATURES; 0 stands for DefaultGuestFeatures
	VMM           VMM
	AfterOVMF     *[48]byte // the digest after the firmware's pages, if it is known already

	cmdlineSum *[32]byte // Explain's, in place of Cmdline's
}

// VMM is the program that makes the guest. They start vCPUs in different states.
type VMM int

// VMMs.
const (
	QEMU VMM = iota
	EC2
	KRUN
)

// Result is the launch digest and what led to it, for comparing step by step.
type Result struct {
	LaunchDigest  [48]byte
	AfterOVMF     [48]byte // digest after the firmware's pages
	AfterMetadata [48]byte // digest after the firmware's metadata sections
	VMSABSP       [48]byte // SHA-384 of the first vCPU's VMSA
	VMSAAP        [48]byte // SHA-384 of the others' VMSA; zero with one vCPU
}

// Digest computes the launch digest.
func Digest(in Input) (*Result, error) {
	ovmf, err := ParseOVMF(in.OVMF)
	if err != nil {
		return nil, err
	}
	if in.AfterOVMF != nil {
		return (&firmware{ovmf, *in.AfterOVMF}).launch(in)
	}
	return (&firmware{ovmf, ovmf.Digest()}).launch(in)
}

// firmware is a parsed image and the digest after its pages. What varies else
// is cheap to compute from here.
type firmware struct {
	*OVMF
	digest [48]byte
}

func newFirmware(image []byte) (*firmware, error) {
	ovmf, err := ParseOVMF(image)
	if err != nil {
		return nil, err
	}
	return &firmware{ovmf, ovmf.Digest()}, nil
}

// launch goes on from the firmware's pages with all of in but OVMF.
func (f *firmware) launch(in Input) (*Result, error) {
	sig, err := in.CPUSignature, error(nil)
	if in.CPU != "" || sig == 0 {
		if sig, err = CPUSignature(in.CPU); err != nil {
			return nil, err
		}
	}
	if in.VCPUs < 1 || in.VCPUs > maxVCPUs {
		return nil, fmt.Errorf("%d vCPUs: want 1 to %d", in.VCPUs, maxVCPUs)
	}
	if in.HasInitrd && !in.HasKernel {
		return nil, errors.New("an initrd without a kernel is not measured")
	}
	if in.GuestFeatures == 0 {
		in.GuestFeatures = DefaultGuestFeatures
	}
	var hashes []byte
	if in.HasKernel {
		if hashes, err = hashPage(f.OVMF, in); err != nil {
			return nil, err
		}
	}

	ld := launch{f.digest}
	r := Result{AfterOVMF: f.digest}
	for _, s := range f.sections {
		if in.VMM != EC2 || s.kind != secCPUID {
			ld.addSection(s, hashes)
		}
	}
	if in.VMM == EC2 { // the CPUID page comes last
		for _, s := range f.sections {
			if s.kind == secCPUID {
				ld.addSection(s, hashes)
			}
		}
	}
	r.AfterMetadata = ld.digest
	r.VMSABSP = sha512.Sum384(vmsa(in.VMM, bspEIP, sig, in.GuestFeatures))
	ld.add(pageVMSA, vmsaGPA, r.VMSABSP)
	if in.VCPUs > 1 {
		r.VMSAAP = sha512.Sum384(vmsa(in.VMM, f.apEIP, sig, in.GuestFeatures))
	}
	for range in.VCPUs - 1 {
		ld.add(pageVMSA, vmsaGPA, r.VMSAAP)
	}
	r.LaunchDigest = ld.digest
	return &r, nil
}

// Digest is the launch digest after the firmware's own pages.
func (o *OVMF) Digest() [48]byte {
	var ld launch
	for off := 0; off < len(o.image); off += pageSize {
		ld.add(pageNormal, 1<<32-uint64(len(o.image)-off), sha512.Sum384(o.image[off:off+pageSize]))
	}
	return ld.digest
}

type pageType uint8

const (
	pageNormal  pageType = 1
	pageVMSA    pageType = 2
	pageZero    pageType = 3
	pageSecrets pageType = 5
	pageCPUID   pageType = 6
)

const (
	vmsaGPA = 0xFFFFFFFFF000
	bspEIP  = 0xfffffff0
)

// launch extends the digest page by page as the firmware does.
type launch struct{ digest [48]byte }

func (l *launch) add(t pageType, gpa uint64, contents [48]byte) {
	const size = 0x70
	info := make([]byte, 0, size)
	info = append(info, l.digest[:]...)
	info = append(info, contents[:]...)
	info = binary.LittleEndian.AppendUint16(info, size)
	info = append(info, byte(t), 0, 0, 0, 0, 0) // type, IMI, VMPL permissions, reserved
	info = binary.LittleEndian.AppendUint64(info, gpa)
	l.digest = sha512.Sum384(info)
}

// addSection adds a metadata section. hashes is the page with the hash table,
// nil without a kernel.
func (l *launch) addSection(s section, hashes []byte) {
	t, contents := pageZero, [48]byte{}
	switch {
	case s.kind == secSecrets:
		t = pageSecrets
	case s.kind == secCPUID:
		t = pageCPUID
	case s.kind == secKernelSHA && hashes != nil:
		t, contents = pageNormal, sha512.Sum384(hashes)
	}
	for off := uint64(0); off < uint64(s.size); off += pageSize {
		l.add(t, s.gpa+off, contents)
	}
}

// hashPage makes the page with QEMU's table of the three hashes.
func hashPage(o *OVMF, in Input) ([]byte, error) {
	if !o.KernelHashes() {
		return nil, ErrNoKernelHashes
	}
	initrd := sha256.Sum256(nil)
	if in.HasInitrd {
		initrd = in.Initrd
	}
	cmdline := sha256.Sum256([]byte(in.Cmdline + "\x00"))
	if in.cmdlineSum != nil {
		cmdline = *in.cmdlineSum
	}
	const (
		header = 16 + 2
		entry  = header + 32
		length = header + 3*entry
		padded = 176 // QEMU aligns the table to 16 bytes
	)
	table := make([]byte, 0, padded)
	add := func(id string, size uint16) {
		g := mustGUID(id)
		table = binary.LittleEndian.AppendUint16(append(table, g[:]...), size)
	}
	add("9438d606-4f22-4cc9-b479-a793d411fd21", length)
	for _, e := range []struct {
		id  string
		sum [32]byte
	}{
		{"97d02dd8-bd20-4c94-aa78-e7714d36ab2a", cmdline},
		{"44baf731-3a2f-4bd7-9af1-41e29169781d", initrd},
		{"4de79437-abd2-427f-b835-d5b172d2045b", in.Kernel},
	} {
		add(e.id, entry)
		table = append(table, e.sum[:]...)
	}
	page, off := make([]byte, pageSize), int(o.hashTable%pageSize)
	if off+padded > pageSize || o.hashSize < padded {
		return nil, fmt.Errorf("%w: no room for %d bytes of hashes at %#x", ErrOVMF, padded, o.hashTable)
	}
	copy(page[off:], table)
	return page, nil
}

// vmsa makes the save area with which a vCPU starts at eip.
func vmsa(vmm VMM, eip, cpuSignature uint32, features uint64) []byte {
	b := make([]byte, pageSize)
	le := binary.LittleEndian
	// What KVM sets for QEMU, and other VMMs do not.
	cs, ss, tr, rdx, mxcsr, fcw := uint16(0x9b), uint16(0x93), uint16(0x8b), uint64(cpuSignature), uint32(0x1f80), uint16(0x37f)
	if vmm != QEMU {
		ss, tr, rdx, mxcsr, fcw = 0x92, 0x83, 0, 0, 0
		if vmm == KRUN || eip == bspEIP {
			cs = 0x9a
		}
	}
	segment := func(off int, selector, attributes uint16, base uint64) {
		le.PutUint16(b[off:], selector)
		le.PutUint16(b[off+2:], attributes)
		le.PutUint32(b[off+4:], 0xffff)
		le.PutUint64(b[off+8:], base)
	}
	segment(0x00, 0, 0x93, 0)                      // ES
	segment(0x10, 0xf000, cs, uint64(eip)&^0xffff) // CS
	segment(0x20, 0, ss, 0)                        // SS
	segment(0x30, 0, 0x93, 0)                      // DS
	segment(0x40, 0, 0x93, 0)                      // FS
	segment(0x50, 0, 0x93, 0)                      // GS
	segment(0x60, 0, 0, 0)                         // GDTR
	segment(0x70, 0, 0x82, 0)                      // LDTR
	segment(0x80, 0, 0, 0)                         // IDTR
	segment(0x90, 0, tr, 0)                        // TR
	le.PutUint64(b[0xd0:], 0x1000)                 // EFER: SVME
	le.PutUint64(b[0x148:], 0x40)                  // CR4: MCE
	le.PutUint64(b[0x158:], 0x10)                  // CR0: ET
	le.PutUint64(b[0x160:], 0x400)                 // DR7
	le.PutUint64(b[0x168:], 0xffff0ff0)            // DR6
	le.PutUint64(b[0x170:], 2)                     // RFLAGS
	le.PutUint64(b[0x178:], uint64(eip)&0xffff)    // RIP
	le.PutUint64(b[0x268:], 0x0007040600070406)    // G_PAT
	le.PutUint64(b[0x310:], rdx)                   // RDX
	le.PutUint64(b[0x3b0:], features)              // SEV_FEATURES
	le.PutUint64(b[0x3e8:], 1)                     // XCR0
	le.PutUint32(b[0x408:], mxcsr)                 // MXCSR
	le.PutUint16(b[0x410:], fcw)                   // X87_FCW
	return b
}

// cpus maps QEMU's CPU models to family, model and stepping.
func cpus() map[string][3]uint32 {
	m := map[string][3]uint32{}
	for _, c := range []struct {
		names string
		fms   [3]uint32
	}{
		{"EPYC EPYC-v1 EPYC-v2 EPYC-v3 EPYC-v4 EPYC-IBPB", [3]uint32{23, 1, 2}},
		{"EPYC-Rome EPYC-Rome-v1 EPYC-Rome-v2 EPYC-Rome-v3", [3]uint32{23, 49, 0}},
		{"EPYC-Milan EPYC-Milan-v1 EPYC-Milan-v2", [3]uint32{25, 1, 1}},
		{"EPYC-Genoa EPYC-Genoa-v1", [3]uint32{25, 17, 0}},
		{"EPYC-Turin", [3]uint32{26, 0, 0}},
	} {
		for name := range strings.FieldsSeq(c.names) {
			m[name] = c.fms
		}
	}
	return m
}

// CPUModels lists the CPU models whose signature is known, sorted.
func CPUModels() []string { return slices.Sorted(maps.Keys(cpus())) }

// CPUSignature returns what CPUID(1).EAX holds on a model of QEMU's.
func CPUSignature(model string) (uint32, error) {
	c, ok := cpus()[model]
	if !ok {
		return 0, fmt.Errorf("%w: %q; known are %s", ErrUnknownCPU, model, strings.Join(CPUModels(), ", "))
	}
	return Signature(c[0], c[1], c[2]), nil
}

// Signature is CPUID(1).EAX of a CPU.
func Signature(family, model, stepping uint32) uint32 {
	low, high := family, uint32(0)
	if family > 0xf {
		low, high = 0xf, family-0xf
	}
	return high&0xff<<20 | model>>4&0xf<<16 | low<<8 | model&0xf<<4 | stepping&0xf
}

// HexSHA256 is a firmware's digest as manifests hold it.
func HexSHA256(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// HashFile returns the SHA-256 of a file, as Input wants it.
func HashFile(path string) (sum [32]byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return sum, err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return sum, fmt.Errorf("hash %s: %w", path, err)
	}
	return [32]byte(h.Sum(nil)), nil
}

type guid [16]byte

// mustGUID returns the GUID as firmware stores it: the first three groups
// little endian. It is for constants.
func mustGUID(s string) guid {
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || len(b) != 16 {
		panic("bad GUID " + s)
	}
	slices.Reverse(b[0:4])
	slices.Reverse(b[4:6])
	slices.Reverse(b[6:8])
	return guid(b)
}
