package measure

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
)

const (
	pageSize = 4096
	// maxOVMF bounds a firmware image; edk2's largest has 16 MiB.
	maxOVMF = 64 << 20
	// maxSections and maxPages bound the metadata; OVMF.amdsev.fd has 7 and 80.
	maxSections = 64
	maxPages    = 1 << 16
)

// ErrOVMF is what ParseOVMF's errors wrap.
var ErrOVMF = errors.New("not a firmware for SEV-SNP")

type sectionType uint32

const (
	secMem       sectionType = 1
	secSecrets   sectionType = 2
	secCPUID     sectionType = 3
	secSVSMCAA   sectionType = 4
	secKernelSHA sectionType = 0x10
)

// section is a piece of guest memory that QEMU adds to the measured launch.
type section struct {
	gpa  uint64
	size uint32
	kind sectionType
}

// OVMF is a firmware image with its SEV metadata.
type OVMF struct {
	image     []byte
	sections  []section
	apEIP     uint32
	hashTable uint64 // guest address; 0 for none
	hashSize  uint32
}

// KernelHashes reports whether the firmware checks kernel, initrd and command
// line: it has a hash table and measures the page that holds it. Debian's
// OVMF.fd does not, its OVMF.amdsev.fd does.
func (o *OVMF) KernelHashes() bool {
	return o.hashTable != 0 && slices.ContainsFunc(o.sections, o.holdsHashes)
}

func (o *OVMF) holdsHashes(s section) bool {
	return s.kind == secKernelSHA && s.size == pageSize && s.gpa == o.hashTable&^(pageSize-1)
}

// GUIDs of the table at the image's end.
func guidFooter() guid      { return mustGUID("96b582de-1fb2-45f7-baea-a366c55a082d") }
func guidResetVector() guid { return mustGUID("00f771de-1a7e-4fcb-890e-68c77e2fb44e") }
func guidHashTable() guid   { return mustGUID("7255371f-3a3b-4b04-927b-1da6efa8d454") }
func guidSEVMetadata() guid { return mustGUID("dc886566-984a-4798-a75e-5585a7bf67cc") }

func le32(b []byte) uint32 { return binary.LittleEndian.Uint32(b) }

// ParseOVMF parses a firmware image. Its GUID table ends 32 bytes before the
// image's end and is read backwards: each entry is data, u16 length (of data,
// length and GUID), GUID. The footer is such an entry whose length is that of
// the whole table. The image's memory is kept, not copied.
func ParseOVMF(image []byte) (*OVMF, error) {
	o, err := parseOVMF(image)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrOVMF, err)
	}
	return o, nil
}

func parseOVMF(image []byte) (*OVMF, error) {
	if len(image) == 0 || len(image)%pageSize != 0 || len(image) > maxOVMF {
		return nil, fmt.Errorf("size %d is not a multiple of %d up to %d", len(image), pageSize, maxOVMF)
	}
	const header = 2 + 16 // length and GUID
	table := image[:len(image)-32]
	id, size := entryHeader(table)
	if id != guidFooter() {
		return nil, errors.New("no GUID table at its end")
	}
	if size < header || size > len(table) {
		return nil, fmt.Errorf("its GUID table claims %d bytes", size)
	}
	table = table[len(table)-size : len(table)-header]

	o := &OVMF{image: image}
	metadata, found := []byte(nil), map[guid]bool{}
	for len(table) > 0 {
		if len(table) < header {
			return nil, fmt.Errorf("its GUID table has %d stray bytes", len(table))
		}
		id, size := entryHeader(table)
		if size < header || size > len(table) {
			return nil, fmt.Errorf("an entry of its GUID table claims %d of %d bytes", size, len(table))
		}
		if found[id] {
			return nil, errors.New("its GUID table has an entry twice")
		}
		found[id] = true
		data := table[len(table)-size : len(table)-header]
		table = table[:len(table)-size]
		var err error
		switch id {
		case guidResetVector():
			if err = wantSize("reset vector", data, 4); err == nil {
				o.apEIP = le32(data)
			}
		case guidHashTable():
			if err = wantSize("hash table", data, 8); err == nil {
				o.hashTable, o.hashSize = uint64(le32(data)), le32(data[4:])
			}
		case guidSEVMetadata():
			if err = wantSize("SEV metadata", data, 4); err == nil {
				metadata, err = fromEnd(image, le32(data))
			}
		}
		if err != nil {
			return nil, err
		}
	}
	if !found[guidResetVector()] || metadata == nil {
		return nil, errors.New("it has no SEV reset vector or no SEV metadata")
	}
	var err error
	o.sections, err = parseSections(metadata)
	return o, err
}

// ReadOVMF reads a firmware file that is fit for a bundle: one that checks
// kernel, initrd and command line.
func ReadOVMF(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("firmware: %w", err)
	}
	defer f.Close()
	image, err := io.ReadAll(io.LimitReader(f, maxOVMF+1))
	if err != nil {
		return nil, fmt.Errorf("firmware: read %s: %w", path, err)
	}
	return image, CheckOVMF(path, image)
}

// CheckOVMF refuses a firmware image that is not fit for a bundle. name tells
// people where it came from.
func CheckOVMF(name string, image []byte) error {
	const cure = "a bundle needs OVMF.amdsev.fd (Debian's package ovmf-amdsev, or edk2's OvmfPkg/AmdSev/AmdSevX64.dsc)"
	o, err := ParseOVMF(image)
	if err != nil {
		return fmt.Errorf("firmware %s: %w; %s", name, err, cure)
	}
	if !o.KernelHashes() {
		missing := "hash table"
		if o.hashTable != 0 {
			missing = "measured page for its hash table (section type 0x10)"
		}
		return fmt.Errorf("firmware %s: %w: it has no %s; %s", name, ErrNoKernelHashes, missing, cure)
	}
	return nil
}

// entryHeader reads the GUID and the length of the entry that ends b.
func entryHeader(b []byte) (guid, int) {
	return guid(b[len(b)-16:]), int(binary.LittleEndian.Uint16(b[len(b)-18:]))
}

func wantSize(what string, data []byte, n int) error {
	if len(data) != n {
		return fmt.Errorf("its %s entry has %d bytes, want %d", what, len(data), n)
	}
	return nil
}

func fromEnd(image []byte, off uint32) ([]byte, error) {
	if uint64(off) > uint64(len(image)) {
		return nil, fmt.Errorf("its SEV metadata is said to start %d bytes before the end", off)
	}
	return image[len(image)-int(off):], nil
}

func parseSections(b []byte) ([]section, error) {
	const header, entry = 16, 12
	if len(b) < header || string(b[:4]) != "ASEV" {
		return nil, errors.New("its SEV metadata has no signature")
	}
	if v := le32(b[8:]); v != 1 {
		return nil, fmt.Errorf("its SEV metadata has version %d, want 1", v)
	}
	n := int(le32(b[12:]))
	if n > maxSections || len(b) < header+n*entry {
		return nil, fmt.Errorf("its SEV metadata claims %d sections", n)
	}
	var sections []section
	pages := 0
	for i := range n {
		e := b[header+i*entry:]
		s := section{uint64(le32(e)), le32(e[4:]), sectionType(le32(e[8:]))}
		switch s.kind {
		case secMem, secSecrets, secCPUID, secSVSMCAA, secKernelSHA:
		default:
			return nil, fmt.Errorf("its SEV section %d has the unknown type %#x", i, s.kind)
		}
		if s.gpa%pageSize != 0 || s.size%pageSize != 0 || s.size == 0 {
			return nil, fmt.Errorf("its SEV section %d (%#x, %#x bytes) is not made of pages", i, s.gpa, s.size)
		}
		if pages += int(s.size / pageSize); pages > maxPages {
			return nil, fmt.Errorf("its SEV sections have more than %d pages", maxPages)
		}
		sections = append(sections, s)
	}
	return sections, nil
}
