package snp

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// CertType names a certificate as Trustee's evidence does.
type CertType string

// Certificates that a host's table can hold. The intermediate that signs VLEKs
// (ASVK) goes by the name ASK.
const (
	VCEK CertType = "VCEK" // signed the report; one for each chip and TCB
	VLEK CertType = "VLEK" // signed the report; lent to a cloud provider by AMD
	ASK  CertType = "ASK"
	ARK  CertType = "ARK"
	CRL  CertType = "CRL"
)

// Cert is a certificate (or revocation list) as DER.
type Cert struct {
	Type CertType
	Data []byte
}

// ErrCertTable is what ParseCertTable's errors wrap.
var ErrCertTable = errors.New("invalid SNP certificate table")

const (
	entrySize  = 24
	maxEntries = 32
	// minCertSize keeps Trustee alive: it slices the first 27 bytes of every
	// certificate without a look at its length.
	minCertSize = 27
)

type guid [16]byte

// certGUIDs gives the table's GUIDs, in the byte order in which they are written.
func certGUIDs() map[CertType]guid {
	return map[CertType]guid{
		VCEK: parseGUID("63da758d-e664-4564-adc5-f4b93be8accd"),
		VLEK: parseGUID("a8074bc2-a25a-483e-aae6-39c045a0b8a1"),
		ASK:  parseGUID("4ab7b379-bbac-4fe4-a02f-05aef327c782"),
		ARK:  parseGUID("c0b406a4-a803-4952-9743-3fb6014cd0ae"),
		CRL:  parseGUID("92f81bc3-5811-4d3d-97ff-d19f88dc67ea"),
	}
}

func parseGUID(s string) (g guid) {
	hex.Decode(g[:], []byte(strings.ReplaceAll(s, "-", "")))
	return g
}

// ParseCertTable parses the table that Linux hands out as auxblob: entries of
// {GUID, offset u32, length u32}, ended by one with a zero GUID, then the data. An
// empty table is none. Entries of unknown kind and entries too short to be a
// certificate are dropped. The result does not share b's memory.
func ParseCertTable(b []byte) ([]Cert, error) {
	if len(b) == 0 {
		return nil, nil
	}
	types := map[guid]CertType{}
	for t, g := range certGUIDs() {
		types[g] = t
	}
	var certs []Cert
	for i := range maxEntries {
		if len(b) < (i+1)*entrySize {
			return nil, fmt.Errorf("%w: no end of the entries within %d bytes", ErrCertTable, len(b))
		}
		e := b[i*entrySize:][:entrySize]
		g := guid(e[:16])
		if g == (guid{}) {
			return certs, nil
		}
		off, n := uint64(binary.LittleEndian.Uint32(e[16:])), uint64(binary.LittleEndian.Uint32(e[20:]))
		if off+n > uint64(len(b)) {
			return nil, fmt.Errorf("%w: entry %d ends at %d, beyond the table's %d bytes", ErrCertTable, i, off+n, len(b))
		}
		if t, ok := types[g]; ok && n >= minCertSize {
			certs = append(certs, Cert{t, slices.Clone(b[off : off+n])})
		}
	}
	return nil, fmt.Errorf("%w: more than %d entries", ErrCertTable, maxEntries-1)
}

// MarshalCertTable is the inverse of ParseCertTable. A certificate of a type
// without GUID is left out.
func MarshalCertTable(certs []Cert) []byte {
	guids := certGUIDs()
	certs = slices.DeleteFunc(slices.Clone(certs), func(c Cert) bool { return guids[c.Type] == guid{} })
	table := make([]byte, entrySize*(len(certs)+1))
	for i, c := range certs {
		e := table[i*entrySize:]
		g := guids[c.Type]
		copy(e, g[:])
		binary.LittleEndian.PutUint32(e[16:], uint32(len(table)))
		binary.LittleEndian.PutUint32(e[20:], uint32(len(c.Data)))
		table = append(table, c.Data...)
	}
	return table
}
