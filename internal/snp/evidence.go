package snp

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math"
	"strconv"
)

// ErrEvidence is what ParseEvidenceJSON's errors wrap.
var ErrEvidence = errors.New("invalid SNP evidence")

// maxEvidence bounds the JSON of evidence; a real one has about 25 KB.
const maxEvidence = 1 << 20

// kind is the JSON form of a member of attestation_report.
type kind int

const (
	number  kind = iota // an unsigned integer, little endian in the report
	octets              // an array of numbers, one for each byte
	tcb                 // an object of five numbers; fmc is null before Turin
	version             // {"major","minor","build"}
	cpuid               // a number, null in version 2
	vector              // a number, absent before version 5
)

type member struct {
	name      string
	kind      kind
	off, size int
}

// members lists attestation_report in the order in which virtee/sev writes it.
// signature, which is nested, follows.
func members() []member {
	return []member{
		{"version", number, 0x00, 4},
		{"guest_svn", number, 0x04, 4},
		{"policy", number, 0x08, 8},
		{"family_id", octets, 0x10, 16},
		{"image_id", octets, 0x20, 16},
		{"vmpl", number, 0x30, 4},
		{"sig_algo", number, 0x34, 4},
		{"current_tcb", tcb, 0x38, 8},
		{"plat_info", number, 0x40, 8},
		{"key_info", number, 0x48, 4},
		{"report_data", octets, 0x50, 64},
		{"measurement", octets, 0x90, 48},
		{"host_data", octets, 0xc0, 32},
		{"id_key_digest", octets, 0xe0, 48},
		{"author_key_digest", octets, 0x110, 48},
		{"report_id", octets, 0x140, 32},
		{"report_id_ma", octets, 0x160, 32},
		{"reported_tcb", tcb, 0x180, 8},
		{"cpuid_fam_id", cpuid, 0x188, 1},
		{"cpuid_mod_id", cpuid, 0x189, 1},
		{"cpuid_step", cpuid, 0x18a, 1},
		{"chip_id", octets, 0x1a0, 64},
		{"committed_tcb", tcb, 0x1e0, 8},
		{"current", version, 0x1e8, 3},
		{"committed", version, 0x1ec, 3},
		{"launch_tcb", tcb, 0x1f0, 8},
		{"launch_mit_vector", vector, 0x1f8, 8},
		{"current_mit_vector", vector, 0x200, 8},
	}
}

func signatureMembers() []member {
	return []member{{"r", octets, 0x2a0, 72}, {"s", octets, 0x2e8, 72}}
}

// part names a byte within a TCB or version; off < 0 stands for null.
type part struct {
	name string
	off  int
}

func versionParts() []part { return []part{{"major", 2}, {"minor", 1}, {"build", 0}} }

func tcbParts(turin bool) []part {
	i := tcbOffsets(turin)
	return []part{{"fmc", i.fmc}, {"bootloader", i.bootloader}, {"tee", i.tee}, {"snp", i.snp}, {"microcode", i.microcode}}
}

// form is what decides between the JSON forms of a report.
type form struct {
	version uint32
	turin   bool
}

func formOf(report []byte) form {
	v := binary.LittleEndian.Uint32(report)
	return form{v, turinLayout(v, report[0x188])}
}

func (f form) has(k kind) bool {
	switch k {
	case cpuid:
		return f.version >= 3
	case vector:
		return f.version >= 5
	}
	return true
}

// EvidenceJSON returns Trustee's primary_evidence for a report of ReportSize
// bytes and the certificates that came with it. Without a VCEK or VLEK among
// them cert_chain is null, and the key broker gets the VCEK from AMD.
//
// The form carries only the fields it knows. A report in which other bytes are
// set could not be verified at the other end and is refused here.
func EvidenceJSON(report []byte, certs []Cert) (json.RawMessage, error) {
	if _, err := ParseReport(report); err != nil {
		return nil, err
	}
	f := formOf(report)
	var carried [ReportSize]byte
	b := []byte(`{"attestation_report":{`)
	for _, m := range members() {
		if !f.has(m.kind) && m.kind == vector {
			continue
		}
		b = append(appendMember(b, m, f, report, &carried), ',')
	}
	b = append(b, `"signature":{`...)
	for _, m := range signatureMembers() {
		b = append(appendMember(b, m, f, report, &carried), ',')
	}
	b[len(b)-1] = '}'
	b = append(b, `},"cert_chain":`...)
	for i := range SignedSize {
		if carried[i] == 0 && report[i] != 0 {
			return nil, fmt.Errorf("%w: byte %#x of this version %d report is set, and Trustee's evidence format has no field for it", ErrEvidence, i, f.version)
		}
	}
	return append(appendCerts(b, certs), '}'), nil
}

// appendMember appends "name":value and marks the bytes that value carries.
func appendMember(b []byte, m member, f form, report []byte, carried *[ReportSize]byte) []byte {
	b = append(strconv.AppendQuote(b, m.name), ':')
	field := report[m.off : m.off+m.size]
	parts := []part(nil)
	switch m.kind {
	case tcb:
		parts = tcbParts(f.turin)
	case version:
		parts = versionParts()
	default:
		if !f.has(m.kind) {
			return append(b, "null"...)
		}
		for i := range field {
			carried[m.off+i] = 1
		}
		if m.kind == octets {
			return appendOctets(b, field)
		}
		return strconv.AppendUint(b, littleEndian(field), 10)
	}
	sep := byte('{')
	for _, p := range parts {
		b = append(strconv.AppendQuote(append(b, sep), p.name), ':')
		if p.off < 0 {
			b = append(b, "null"...)
		} else {
			b = strconv.AppendUint(b, uint64(field[p.off]), 10)
			carried[m.off+p.off] = 1
		}
		sep = ','
	}
	return append(b, '}')
}

func appendOctets(b, octets []byte) []byte {
	b = append(b, '[')
	for i, v := range octets {
		if i > 0 {
			b = append(b, ',')
		}
		b = strconv.AppendUint(b, uint64(v), 10)
	}
	return append(b, ']')
}

func littleEndian(b []byte) uint64 {
	var v [8]byte
	copy(v[:], b)
	return binary.LittleEndian.Uint64(v[:])
}

func appendCerts(b []byte, certs []Cert) []byte {
	hasVEK := false
	for _, c := range certs {
		hasVEK = hasVEK || (c.Type == VCEK || c.Type == VLEK) && len(c.Data) >= minCertSize
	}
	if !hasVEK {
		return append(b, "null"...)
	}
	sep := byte('[')
	for _, c := range certs {
		if len(c.Data) < minCertSize {
			continue
		}
		b = strconv.AppendQuote(append(append(b, sep), `{"cert_type":`...), string(c.Type))
		b = append(appendOctets(append(b, `,"data":`...), c.Data), '}')
		sep = ','
	}
	return append(b, ']')
}

// ParseEvidenceJSON is the inverse of EvidenceJSON and as strict as Trustee:
// member names are case-sensitive, all members but the optional ones are
// required, arrays have their exact length, and an unknown member is ignored.
// The report has ReportSize bytes, zero where the form carries nothing.
// Certificates given as PEM come back as DER; those of other kinds than ours
// are dropped.
func ParseEvidenceJSON(raw json.RawMessage) (report []byte, certs []Cert, err error) {
	if report, certs, err = parseEvidence(raw); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrEvidence, err)
	}
	return report, certs, nil
}

func parseEvidence(raw []byte) (report []byte, certs []Cert, err error) {
	if len(raw) > maxEvidence {
		return nil, nil, fmt.Errorf("%d bytes, at most %d", len(raw), maxEvidence)
	}
	// Decoding into maps keeps names case-sensitive, which structs do not.
	top, err := object(raw)
	if err != nil {
		return nil, nil, err
	}
	fields, err := object(top["attestation_report"])
	if err != nil {
		return nil, nil, fmt.Errorf("attestation_report: %w", err)
	}
	f, err := formOfJSON(fields)
	if err != nil {
		return nil, nil, err
	}
	report = make([]byte, ReportSize)
	for _, m := range members() {
		if err := m.parse(fields, f, report); err != nil {
			return nil, nil, err
		}
	}
	signature, err := object(fields["signature"])
	if err != nil {
		return nil, nil, fmt.Errorf("signature: %w", err)
	}
	for _, m := range signatureMembers() {
		if err := m.parse(signature, f, report); err != nil {
			return nil, nil, fmt.Errorf("signature: %w", err)
		}
	}
	certs, err = parseCerts(top["cert_chain"])
	return report, certs, err
}

func formOfJSON(fields map[string]json.RawMessage) (form, error) {
	v, err := uintOf(fields["version"], math.MaxUint32)
	if err != nil {
		return form{}, fmt.Errorf("version: %w", err)
	}
	f := form{version: uint32(v)}
	if f.version < MinVersion || f.version > MaxVersion {
		return f, fmt.Errorf("%w: %d, want %d to %d", ErrReportVersion, v, MinVersion, MaxVersion)
	}
	if f.has(cpuid) {
		family, err := uintOf(fields["cpuid_fam_id"], math.MaxUint8)
		if err != nil {
			return f, fmt.Errorf("cpuid_fam_id: %w", err)
		}
		f.turin = turinLayout(f.version, uint8(family))
	}
	return f, nil
}

// parse reads the member from an object into its place in the report.
func (m member) parse(object map[string]json.RawMessage, f form, report []byte) error {
	if !f.has(m.kind) {
		return nil
	}
	raw, field := object[m.name], report[m.off:m.off+m.size]
	var err error
	switch m.kind {
	case octets:
		err = parseOctets(raw, field)
	case tcb:
		err = parseParts(raw, tcbParts(f.turin), field)
	case version:
		err = parseParts(raw, versionParts(), field)
	default:
		var v uint64
		v, err = uintOf(raw, math.MaxUint64>>(64-8*m.size))
		var le [8]byte
		binary.LittleEndian.PutUint64(le[:], v)
		copy(field, le[:])
	}
	if err != nil {
		return fmt.Errorf("%s: %w", m.name, err)
	}
	return nil
}

func parseParts(raw json.RawMessage, parts []part, field []byte) error {
	o, err := object(raw)
	if err != nil {
		return err
	}
	for _, p := range parts {
		if p.off < 0 {
			continue
		}
		v, err := uintOf(o[p.name], math.MaxUint8)
		if err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
		field[p.off] = uint8(v)
	}
	return nil
}

func parseOctets(raw json.RawMessage, field []byte) error {
	b, err := octetsOf(raw)
	if err != nil {
		return err
	}
	if len(b) != len(field) {
		return fmt.Errorf("array of %d bytes, want %d", len(b), len(field))
	}
	copy(field, b)
	return nil
}

func parseCerts(raw json.RawMessage) ([]Cert, error) {
	if absent(raw) {
		return nil, nil
	}
	var entries []struct {
		Type json.RawMessage `json:"cert_type"`
		Data json.RawMessage `json:"data"`
	}
	if err := json.Unmarshal(raw, &entries); err != nil {
		return nil, fmt.Errorf("cert_chain: %w", err)
	}
	if len(entries) > maxEntries {
		return nil, fmt.Errorf("cert_chain: %d certificates, at most %d", len(entries), maxEntries)
	}
	var certs []Cert
	hasVEK := false
	for i, e := range entries {
		if bytes.HasPrefix(e.Type, []byte("{")) { // {"OTHER": uuid}
			continue
		}
		var t CertType
		if err := json.Unmarshal(e.Type, &t); err != nil {
			return nil, fmt.Errorf("cert_chain[%d]: cert_type: %w", i, err)
		}
		if _, ok := certGUIDs()[t]; !ok {
			if t == "Empty" {
				continue
			}
			return nil, fmt.Errorf("cert_chain[%d]: unknown cert_type %q", i, t)
		}
		data, err := octetsOf(e.Data)
		if err == nil && len(data) < minCertSize {
			err = fmt.Errorf("%d bytes are no certificate", len(data))
		}
		if err == nil {
			data, err = der(data)
		}
		if err != nil {
			return nil, fmt.Errorf("cert_chain[%d] %s: %w", i, t, err)
		}
		certs = append(certs, Cert{t, data})
		hasVEK = hasVEK || t == VCEK || t == VLEK
	}
	if !hasVEK {
		return nil, errors.New("cert_chain: holds neither a VCEK nor a VLEK; it must be null then")
	}
	return certs, nil
}

// der unwraps data if it is PEM.
func der(data []byte) ([]byte, error) {
	if !bytes.HasPrefix(data, []byte("-----BEGIN")) {
		return data, nil
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, errors.New("broken PEM")
	}
	return block.Bytes, nil
}

func absent(raw json.RawMessage) bool { return len(raw) == 0 || bytes.Equal(raw, []byte("null")) }

func object(raw json.RawMessage) (map[string]json.RawMessage, error) {
	if absent(raw) {
		return nil, errors.New("missing")
	}
	var o map[string]json.RawMessage
	err := json.Unmarshal(raw, &o)
	return o, err
}

func uintOf(raw json.RawMessage, max uint64) (uint64, error) {
	if absent(raw) {
		return 0, errors.New("missing")
	}
	v, err := strconv.ParseUint(string(raw), 10, 64)
	if err != nil || v > max {
		return 0, fmt.Errorf("%.30q is not a number from 0 to %d", raw, max)
	}
	return v, nil
}

// octetsOf reads an array of numbers from 0 to 255.
func octetsOf(raw json.RawMessage) ([]byte, error) {
	if absent(raw) {
		return nil, errors.New("missing")
	}
	// encoding/json would also take a base64 string, and null for a byte of 0.
	if raw[0] != '[' || bytes.Contains(raw, []byte("null")) {
		return nil, errors.New("not an array of bytes")
	}
	var b []byte
	err := json.Unmarshal(raw, &b)
	return b, err
}
