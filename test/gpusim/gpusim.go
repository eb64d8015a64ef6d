// Package gpusim makes up NVIDIA devices for tests: roots, certificate chains,
// signed attestation reports, and the manifests (RIMs), RIM service and OCSP
// responder that go with them. Its roots are its own, so that nothing it signs
// passes where NVIDIA's are trusted.
//
// It shares no code with what it tests but the numbers of report fields: it
// writes XML in canonical form to begin with instead of canonicalising it, and
// its own DER.
package gpusim

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"encoding/pem"
	"fmt"
	"math/big"
	"strings"
	"time"

	"coffer/internal/gpu"
	"coffer/internal/gpu/spdm"
)

// When the chains are valid.
var (
	Begin   = time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)
	Now     = time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)
	RIMEnd  = time.Date(2099, 1, 1, 0, 0, 0, 0, time.UTC)
	Forever = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)
)

// Authority is a certificate and its key.
type Authority struct {
	Cert *x509.Certificate
	Key  *ecdsa.PrivateKey
}

// NewRoot makes a self-signed root.
func NewRoot(name string) *Authority {
	return issue(nil, template(name, true, Forever))
}

// Issue makes a certificate below a. edit may change the template; nil leaves it.
func (a *Authority) Issue(name string, ca bool, until time.Time, edit func(*x509.Certificate)) *Authority {
	t := template(name, ca, until)
	if edit != nil {
		edit(t)
	}
	return issue(a, t)
}

func template(name string, ca bool, until time.Time) *x509.Certificate {
	t := &x509.Certificate{
		SerialNumber: must(rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 150))),
		Subject:      pkix.Name{CommonName: name, Organization: []string{"Simulated"}},
		NotBefore:    Begin, NotAfter: until,
		BasicConstraintsValid: true, IsCA: ca, KeyUsage: x509.KeyUsageDigitalSignature,
	}
	if ca {
		t.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	}
	return t
}

func issue(by *Authority, t *x509.Certificate) *Authority {
	a := &Authority{Key: must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))}
	parent, key := t, a.Key
	if by != nil {
		parent, key = by.Cert, by.Key
	}
	a.Cert = must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, t, parent, &a.Key.PublicKey, key))))
	return a
}

// World is a set of roots that devices and RIMs are made under.
type World struct {
	DeviceRoot, RIMRoot *Authority
	RIMChain            []*Authority // signer, L3, CA, root
}

// NewWorld makes roots and a signer of RIMs.
func NewWorld() *World {
	w := &World{DeviceRoot: NewRoot("Simulated Device Identity CA"), RIMRoot: NewRoot("Simulated CoRIM signing Root CA")}
	ca := w.RIMRoot.Issue("Simulated Reference Value CA", true, Forever, nil)
	l3 := ca.Issue("Simulated Reference Value L3", true, Forever, func(t *x509.Certificate) { t.MaxPathLenZero = true })
	w.RIMChain = []*Authority{l3.Issue("Simulated RIM L4 Signer", false, RIMEnd, nil), l3, ca, w.RIMRoot}
	return w
}

// Device is a made-up device. Its fields may be changed before a report is made.
type Device struct {
	Arch, Chip, Driver, VBIOS string
	FWID                      [48]byte
	Mode                      byte         // 0 single GPU, 1 NVLink encryption, 2 protected PCIe
	Chain                     []*Authority // attestation key, identity, provisioner, family, root
	Measurements              [][]byte
}

// NewDevice makes a device of gpu.Hopper, gpu.Blackwell or gpu.LS10.
func (w *World) NewDevice(arch string) *Device {
	d := &Device{Arch: arch}
	blocks, prefix, part := 64, "GH100", "GSP"
	switch arch {
	case gpu.Hopper:
		d.Chip, d.Driver, d.VBIOS = "GH100", "570.124.06", "96.00.9F.00.01"
	case gpu.Blackwell:
		d.Chip, d.Driver, d.VBIOS = "GB100", "580.95.05", "97.00.88.00.0F"
	case gpu.LS10:
		d.Chip, d.VBIOS = "LS10", "96.10.55.00.01"
	}
	if prefix = d.Chip; arch == gpu.LS10 {
		blocks, prefix, part = 31, "LS_10", "FSP"
	}
	must(rand.Read(d.FWID[:]))
	for range blocks {
		m := make([]byte, 48)
		must(rand.Read(m))
		d.Measurements = append(d.Measurements, m)
	}
	family := w.DeviceRoot.Issue("Simulated "+d.Chip+" Identity", true, Forever, nil)
	provisioner := family.Issue("Simulated "+d.Chip+" Provisioner ICA 1", true, Forever, nil)
	identity := provisioner.Issue(prefix+" A01 "+part+" BROM", true, Forever, nil)
	leaf := identity.Issue(prefix+" A01 "+part+" FMC LF", false, Forever, func(t *x509.Certificate) {
		t.ExtraExtensions = []pkix.Extension{d.FWIDExtension()}
	})
	d.Chain = []*Authority{leaf, identity, provisioner, family, w.DeviceRoot}
	return d
}

var oidSHA384 = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 2}

// FWIDExtension is the DICE extension of the leaf: CompositeDeviceID, or for
// Blackwell DiceTcbInfo with a second, empty digest.
func (d *Device) FWIDExtension() pkix.Extension {
	type fwid struct {
		Algorithm asn1.ObjectIdentifier
		Digest    []byte
	}
	if d.Arch != gpu.Blackwell {
		return pkix.Extension{Id: asn1.ObjectIdentifier{2, 23, 133, 5, 4, 1}, Value: must(asn1.Marshal(struct {
			Version int
			Key     asn1.RawValue
			FWID    fwid
		}{1, asn1.RawValue{FullBytes: must(asn1.Marshal([]int{1, 2}))}, fwid{oidSHA384, d.FWID[:]}}))}
	}
	list := append(must(asn1.Marshal(fwid{oidSHA384, d.FWID[:]})), must(asn1.Marshal(fwid{oidSHA384, make([]byte, 48)}))...)
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 23, 133, 5, 4, 1, 1}, Value: must(asn1.Marshal([]asn1.RawValue{
		{Class: asn1.ClassContextSpecific, Tag: 0, Bytes: []byte("NVIDIA")},
		{Class: asn1.ClassContextSpecific, Tag: 3, Bytes: []byte{1}},
		{Class: asn1.ClassContextSpecific, Tag: 6, IsCompound: true, Bytes: list},
		{Class: asn1.ClassContextSpecific, Tag: 7, Bytes: []byte{0, 0x80, 0, 0, 1}},
	}))}
}

// PEM returns a chain as NVML returns it.
func PEM(chain []*Authority) []byte {
	var b bytes.Buffer
	for _, a := range chain {
		b.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Cert.Raw}))
	}
	return b.Bytes()
}

// Report is a report before it is signed.
type Report struct {
	Request        []byte // 37 bytes
	Header         []byte // 4 bytes of the response
	Blocks         [][]byte
	ResponderNonce []byte
	Opaque         []spdm.Field
	Tail           []byte // follows the signature
}

// NewReport returns what the device says when asked with nonce.
func (d *Device) NewReport(nonce [32]byte) *Report {
	r := &Report{
		Request:        append(append([]byte{0x11, 0xE0, 0x01, 0xFF}, nonce[:]...), 0),
		Header:         []byte{0x11, 0x60, 0, 0},
		ResponderNonce: make([]byte, 32),
	}
	must(rand.Read(r.ResponderNonce))
	for i, m := range d.Measurements {
		r.Blocks = append(r.Blocks, append([]byte{byte(i + 1), 1, 51, 0, 1, 48, 0}, m...))
	}
	if d.Arch == gpu.LS10 {
		r.Opaque = []spdm.Field{{Type: spdm.VBIOSVersion, Value: []byte(d.VBIOS)}, {Type: spdm.SwitchPDI, Value: []byte{8, 0, 0xed, 0xd9, 0x1a, 0xb3, 0x3e, 0x20}}}
		return r
	}
	var v [5]byte
	fmt.Sscanf(d.VBIOS, "%02X.%02X.%02X.%02X.%02X", &v[0], &v[1], &v[2], &v[3], &v[4])
	board := [3]string{"1010", "0200", "882"}
	if d.Arch == gpu.Blackwell {
		board = [3]string{"g525", "0220", "886"}
	}
	text := func(s string) []byte { return append([]byte(s), 0) }
	r.Opaque = []spdm.Field{
		{Type: spdm.VBIOSVersion, Value: []byte{v[3], v[2], v[1], v[0], v[4], 0, 0, 0}},
		{Type: spdm.ChipSKU, Value: text(board[2])},
		{Type: spdm.Project, Value: text(board[0])},
		{Type: spdm.ProjectSKU, Value: text(board[1])},
		{Type: spdm.DriverVersion, Value: text(d.Driver)},
		{Type: spdm.NVDEC0Status, Value: []byte{spdm.Disabled}},
		{Type: spdm.FWID, Value: d.FWID[:]},
		{Type: spdm.PPCIEStatus, Value: []byte{spdm.Disabled}},
		{Type: spdm.OpaqueVersion, Value: []byte{1, 0}},
		{Type: spdm.FeatureFlag, Value: []byte{d.Mode, 0}},
	}
	return r
}

// Set changes a field of the opaque data; a nil value takes it out.
func (r *Report) Set(t spdm.FieldType, value []byte) {
	for i, f := range r.Opaque {
		switch {
		case f.Type != t:
		case value == nil:
			r.Opaque = append(r.Opaque[:i:i], r.Opaque[i+1:]...)
			return
		default:
			r.Opaque[i].Value = value
			return
		}
	}
	r.Opaque = append(r.Opaque, spdm.Field{Type: t, Value: value})
}

// Sign returns the report's bytes.
func (r *Report) Sign(key *ecdsa.PrivateKey) []byte {
	b := append(append(bytes.Clone(r.Request), r.Header...), byte(len(r.Blocks)))
	record := bytes.Join(r.Blocks, nil)
	b = append(b, byte(len(record)), byte(len(record)>>8), byte(len(record)>>16))
	b = append(append(b, record...), r.ResponderNonce...)
	var opaque []byte
	for _, f := range r.Opaque {
		opaque = binary.LittleEndian.AppendUint16(opaque, uint16(f.Type))
		opaque = binary.LittleEndian.AppendUint16(opaque, uint16(len(f.Value)))
		opaque = append(opaque, f.Value...)
	}
	b = append(binary.LittleEndian.AppendUint16(b, uint16(len(opaque))), opaque...)
	return append(append(b, rawSignature(key, b)...), r.Tail...)
}

// Evidence asks the device.
func (d *Device) Evidence(nonce [32]byte) gpu.Evidence {
	return gpu.Evidence{
		Arch: d.Arch, UUID: "GPU-" + d.Chain[0].Cert.SerialNumber.Text(16), Driver: d.Driver, VBIOS: d.VBIOS,
		Report: d.NewReport(nonce).Sign(d.Chain[0].Key), Chain: PEM(d.Chain),
	}
}

// rawSignature is r||s over SHA-384.
func rawSignature(key *ecdsa.PrivateKey, data []byte) []byte {
	digest := sha512.Sum384(data)
	r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
	if err != nil {
		panic(err)
	}
	return append(r.FillBytes(make([]byte, 48)), s.FillBytes(make([]byte, 48))...)
}

// must is for what cannot fail in a test's own world.
func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// vbiosID returns the id of the device's VBIOS RIM.
func (d *Device) vbiosID() string {
	plain := strings.ReplaceAll(d.VBIOS, ".", "")
	switch d.Arch {
	case gpu.LS10:
		return "NV_SWITCH_BIOS_5612_0002_890_" + plain
	case gpu.Blackwell:
		return "NV_GPU_VBIOS_G525_0220_886_" + plain
	}
	return "NV_GPU_VBIOS_1010_0200_882_" + plain
}

func (d *Device) driverID() string {
	if d.Arch == gpu.Blackwell {
		return "NV_GPU_CC_DRIVER_GB100_" + d.Driver
	}
	return "NV_GPU_DRIVER_GH100_" + d.Driver
}
