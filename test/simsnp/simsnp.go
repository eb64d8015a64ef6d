// Package simsnp is a made-up AMD chip: an ARK, ASK and VCEK chain with the
// names and extensions of AMD's, and a signer of SNP reports. Nobody trusts it
// but a verifier that is given its roots file; every certificate says in its
// subject that it is simulated. It is for tests and the simulated platform and
// is never part of a guest.
package simsnp

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"time"

	"coffer/internal/snp"
)

// Files of a chip's folder.
const (
	RootsFile = "roots.pem" // ASK and ARK, what a verifier is given
	vcekFile  = "vcek.pem"  // the VCEK and its private key
	chipFile  = "chip.json"
)

// Params says what chip to make. The zero value makes a current Genoa.
type Params struct {
	Product   string    // "Milan", "Genoa" (default) or "Turin"
	TCB       *snp.TCB  // default: the usual minimum of the product
	ChipID    [64]byte  // default: random, 8 bytes and zeros on a Turin
	NotBefore time.Time // default: a day ago
	NotAfter  time.Time // default: in seven years
	VLEK      bool      // sign with a VLEK instead of a VCEK
}

// Chip signs reports. It is safe for concurrent use.
type Chip struct {
	Product string
	TCB     snp.TCB
	ChipID  [64]byte

	ark, ask, vek *x509.Certificate
	vlek          bool
	key           *ecdsa.PrivateKey
}

// New makes a chip with fresh keys.
func New(p Params) (*Chip, error) {
	c := &Chip{Product: p.Product, ChipID: p.ChipID, vlek: p.VLEK}
	if c.Product == "" {
		c.Product = "Genoa"
	}
	idSize := 64
	switch c.Product {
	case "Milan":
		c.TCB = snp.TCB{Bootloader: 4, SNP: 24, Microcode: 219}
	case "Genoa":
		c.TCB = snp.TCB{Bootloader: 10, SNP: 23, Microcode: 84}
	case "Turin":
		fmc := uint8(1)
		c.TCB = snp.TCB{FMC: &fmc, Bootloader: 1, TEE: 1, SNP: 4, Microcode: 71}
		idSize = 8
	default:
		return nil, fmt.Errorf("no simulated chip of product %q", c.Product)
	}
	if p.TCB != nil {
		c.TCB = *p.TCB
	}
	if c.ChipID == [64]byte{} {
		rand.Read(c.ChipID[:idSize])
	}
	if p.NotBefore.IsZero() {
		p.NotBefore = time.Now().Add(-24 * time.Hour)
	}
	if p.NotAfter.IsZero() {
		p.NotAfter = p.NotBefore.AddDate(7, 0, 1)
	}

	askName, vekName := "SEV-", "SEV-VCEK"
	if p.VLEK {
		askName, vekName = "SEV-VLEK-", "SEV-VLEK"
	}
	ca := issuer{notBefore: p.NotBefore, notAfter: p.NotAfter}
	var arkKey, askKey *ecdsa.PrivateKey
	var err error
	if c.ark, arkKey, err = ca.issue("ARK-"+c.Product, nil, nil, nil); err != nil {
		return nil, err
	}
	if c.ask, askKey, err = ca.issue(askName+c.Product, c.ark, arkKey, nil); err != nil {
		return nil, err
	}
	extensions, err := c.extensions(idSize)
	if err != nil {
		return nil, err
	}
	if c.vek, c.key, err = ca.issue(vekName, c.ask, askKey, extensions); err != nil {
		return nil, err
	}
	return c, nil
}

type issuer struct{ notBefore, notAfter time.Time }

// issue makes a CA certificate, or one of a chip where it gets extensions.
// Without a parent it is self-signed.
func (i issuer) issue(name string, parent *x509.Certificate, parentKey *ecdsa.PrivateKey, extensions []pkix.Extension) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 64))
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		SerialNumber:       serial,
		Subject:            pkix.Name{CommonName: name, Organization: []string{"Coffer simulated platform, not AMD"}},
		NotBefore:          i.notBefore,
		NotAfter:           i.notAfter,
		SignatureAlgorithm: x509.ECDSAWithSHA384,
		ExtraExtensions:    extensions,
	}
	if extensions == nil {
		template.IsCA, template.BasicConstraintsValid, template.KeyUsage = true, true, x509.KeyUsageCertSign
	}
	if parent == nil {
		parent, parentKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), parentKey)
	if err != nil {
		return nil, nil, fmt.Errorf("issue %s: %w", name, err)
	}
	cert, err := x509.ParseCertificate(der)
	return cert, key, err
}

// extensions are those of AMD's "Versioned Chip Endorsement Key (VCEK)
// Certificate and KDS Interface Specification" (57230).
func (c *Chip) extensions(idSize int) ([]pkix.Extension, error) {
	oid := func(arcs ...int) asn1.ObjectIdentifier {
		return slices.Concat(asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 3704, 1}, asn1.ObjectIdentifier(arcs))
	}
	structVersion, product := 0, c.Product+"-B1"
	if c.Product == "Turin" {
		structVersion, product = 1, "Turin"
	}
	name, err := asn1.MarshalWithParams(product, "ia5")
	if err != nil {
		return nil, err
	}
	extensions := []pkix.Extension{{Id: oid(2), Value: name}}
	integer := func(v int, id asn1.ObjectIdentifier) {
		b, marshalErr := asn1.Marshal(v)
		err = errors.Join(err, marshalErr)
		extensions = append(extensions, pkix.Extension{Id: id, Value: b})
	}
	integer(structVersion, oid(1))
	integer(int(c.TCB.Bootloader), oid(3, 1))
	integer(int(c.TCB.TEE), oid(3, 2))
	integer(int(c.TCB.SNP), oid(3, 3))
	for reserved := 4; reserved <= 7; reserved++ {
		integer(0, oid(3, reserved))
	}
	integer(int(c.TCB.Microcode), oid(3, 8))
	if c.TCB.FMC != nil {
		integer(int(*c.TCB.FMC), oid(3, 9))
	}
	if !c.vlek { // the hardware id stands there as it is, in no ASN.1
		extensions = append(extensions, pkix.Extension{Id: oid(4), Value: c.ChipID[:idSize]})
	}
	return extensions, err
}

// Report signs a report as the firmware of this chip would give it to a guest
// that was started with policy 0x30000.
func (c *Chip) Report(measurement [48]byte, reportData [64]byte, vmpl uint32) (*snp.Report, error) {
	r := &snp.Report{
		Version:      3,
		Policy:       snp.PolicyAlwaysOne | snp.PolicySMT,
		VMPL:         vmpl,
		SigAlgo:      snp.SigAlgoECDSAP384SHA384,
		CurrentTCB:   c.TCB,
		PlatformInfo: snp.PlatformSMT | snp.PlatformECC | snp.PlatformAliasCheck,
		ReportData:   reportData,
		Measurement:  measurement,
		ReportedTCB:  c.TCB,
		ChipID:       c.ChipID,
		CommittedTCB: c.TCB,
		Current:      snp.FirmwareVersion{Major: 1, Minor: 55, Build: 40},
		Committed:    snp.FirmwareVersion{Major: 1, Minor: 55, Build: 40},
		LaunchTCB:    c.TCB,
		CPUStepping:  1,
	}
	switch c.Product {
	case "Milan":
		r.CPUFamily, r.CPUModel = 0x19, 0x01
	case "Genoa":
		r.CPUFamily, r.CPUModel = 0x19, 0x11
	case "Turin":
		r.CPUFamily, r.CPUModel = 0x1a, 0x02
	}
	if c.vlek {
		r.KeyInfo = snp.SigningKeyVLEK << 2
	}
	rand.Read(r.ReportID[:])
	for i := range r.ReportIDMA {
		r.ReportIDMA[i] = 0xff
	}
	return r, c.Sign(r)
}

// Sign signs a report anew, whatever it says.
func (c *Chip) Sign(r *snp.Report) error {
	digest := sha512.Sum384(r.Marshal()[:snp.SignedSize])
	R, S, err := ecdsa.Sign(rand.Reader, c.key, digest[:])
	if err != nil {
		return fmt.Errorf("sign report: %w", err)
	}
	for field, v := range map[*[72]byte]*big.Int{&r.SignatureR: R, &r.SignatureS: S} {
		v.FillBytes(field[:])
		slices.Reverse(field[:])
	}
	return nil
}

// Certs returns the chip's certificates as a host would pass them on.
func (c *Chip) Certs() []snp.Cert {
	t := snp.VCEK
	if c.vlek {
		t = snp.VLEK
	}
	return []snp.Cert{{Type: t, Data: c.vek.Raw}, {Type: snp.ASK, Data: c.ask.Raw}, {Type: snp.ARK, Data: c.ark.Raw}}
}

// RootsPEM returns the certificates that a verifier must be given.
func (c *Chip) RootsPEM() []byte { return append(certPEM(c.ask), certPEM(c.ark)...) }

func certPEM(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

// chipJSON tells a person what a chip's folder holds.
type chipJSON struct {
	Note    string  `json:"note"`
	Product string  `json:"product"`
	ChipID  string  `json:"chip_id"` // hex
	TCB     snp.TCB `json:"tcb"`
}

// Save writes the chip into a folder, which it makes. It does not overwrite a
// chip. The keys of ARK and ASK are not kept.
func (c *Chip) Save(dir string) error {
	if c.vlek {
		return errors.New("a simulated chip with a VLEK cannot be saved")
	}
	key, err := x509.MarshalPKCS8PrivateKey(c.key)
	if err != nil {
		return err
	}
	about, err := json.MarshalIndent(chipJSON{"a simulated chip: trust it in tests only", c.Product, hex.EncodeToString(c.ChipID[:]), c.TCB}, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for _, f := range []struct {
		name string
		data []byte
		perm os.FileMode
	}{
		{vcekFile, append(certPEM(c.vek), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})...), 0o600},
		{RootsFile, c.RootsPEM(), 0o644},
		{chipFile, append(about, '\n'), 0o644},
	} {
		if err := writeNew(filepath.Join(dir, f.name), f.data, f.perm); err != nil {
			return fmt.Errorf("save simulated chip: %w", err)
		}
	}
	return nil
}

func writeNew(path string, data []byte, perm os.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Close())
}

// Load reads a chip that Save wrote.
func Load(dir string) (*Chip, error) {
	c, err := load(dir)
	if err != nil {
		return nil, fmt.Errorf("load simulated chip: %w", err)
	}
	return c, nil
}

func load(dir string) (*Chip, error) {
	about, err := os.ReadFile(filepath.Join(dir, chipFile))
	if err != nil {
		return nil, err
	}
	var j chipJSON
	if err := json.Unmarshal(about, &j); err != nil {
		return nil, fmt.Errorf("%s: %w", chipFile, err)
	}
	c := &Chip{Product: j.Product, TCB: j.TCB}
	id, err := hex.DecodeString(j.ChipID)
	if err != nil || len(id) != len(c.ChipID) {
		return nil, fmt.Errorf("%s: chip_id is not %d bytes of hex", chipFile, len(c.ChipID))
	}
	c.ChipID = [64]byte(id)
	roots, _, err := readPEM(filepath.Join(dir, RootsFile), 2)
	if err != nil {
		return nil, err
	}
	vek, key, err := readPEM(filepath.Join(dir, vcekFile), 1)
	if err != nil {
		return nil, err
	}
	if key == nil || !key.PublicKey.Equal(vek[0].PublicKey) {
		return nil, fmt.Errorf("%s: the key is not the certificate's", vcekFile)
	}
	c.ask, c.ark, c.vek, c.key = roots[0], roots[1], vek[0], key
	return c, nil
}

// readPEM reads n certificates and the private key, if one is there.
func readPEM(path string, n int) (certs []*x509.Certificate, key *ecdsa.PrivateKey, err error) {
	rest, err := os.ReadFile(path)
	if err != nil {
		return nil, nil, err
	}
	for block := (*pem.Block)(nil); err == nil; {
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		switch block.Type {
		case "CERTIFICATE":
			var c *x509.Certificate
			c, err = x509.ParseCertificate(block.Bytes)
			certs = append(certs, c)
		case "PRIVATE KEY":
			var k any
			k, err = x509.ParsePKCS8PrivateKey(block.Bytes)
			key, _ = k.(*ecdsa.PrivateKey)
		}
	}
	if err == nil && len(certs) != n {
		err = fmt.Errorf("%d certificates, want %d", len(certs), n)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", path, err)
	}
	return certs, key, nil
}
