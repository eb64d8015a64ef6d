// Package verify judges an SEV-SNP attestation report: whether an AMD chip
// signed it, and whether the platform and the guest's policy are fit to hold
// secrets. It has AMD's roots built in, pinned by product, asks nobody over the
// network and takes the time from its caller.
//
// It checks everything that does not depend on which guest is meant. It does
// not compare MEASUREMENT, HOST_DATA or the ID block: whoever releases
// something does, and must. It does not read AMD's revocation lists.
package verify

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"time"

	"coffer/internal/snp"
)

// Each check that fails has its own error; test with errors.Is. A CPU that no
// roots belong to is snp.ErrUnknownProduct.
var (
	ErrOptions       = errors.New("verification options are incomplete")
	ErrVersion       = errors.New("report version is not accepted")
	ErrSigAlgo       = errors.New("report is not signed with ECDSA P-384 and SHA-384")
	ErrMaskedKey     = errors.New("host has report signing turned off (MASK_CHIP_KEY)")
	ErrSigningKey    = errors.New("report is signed with a kind of key that is not accepted")
	ErrNoVEK         = errors.New("no certificate of the key that signed the report")
	ErrVEK           = errors.New("chip certificate is malformed")
	ErrNoRoots       = errors.New("no trusted roots for this product")
	ErrChain         = errors.New("chip certificate does not chain to a trusted root")
	ErrExpired       = errors.New("chip certificate or its chain is not valid at this time")
	ErrSignature     = errors.New("report signature is wrong")
	ErrCertTCB       = errors.New("reported TCB is not the chip certificate's")
	ErrChipID        = errors.New("chip id is not the chip certificate's")
	ErrTCBOrder      = errors.New("reported TCB is above the current TCB")
	ErrNoMinimum     = errors.New("no minimum TCB is set for this product")
	ErrReportedTCB   = errors.New("reported TCB is below the minimum")
	ErrCommittedTCB  = errors.New("committed TCB is below the minimum")
	ErrLaunchTCB     = errors.New("launch TCB is below the minimum")
	ErrPolicyInvalid = errors.New("guest policy lacks the bit that is always one")
	ErrDebug         = errors.New("guest policy allows debugging")
	ErrMigrateMA     = errors.New("guest policy allows a migration agent")
	ErrPolicy        = errors.New("guest policy is not the required one")
	ErrAliasCheck    = errors.New("platform did not check its memory for aliases")
	ErrPlatform      = errors.New("platform is not configured as required")
	ErrVMPL          = errors.New("report comes from a VMPL that is not accepted")
	ErrReportData    = errors.New("report data is not the expected one")
)

// Options says what to accept. The zero value of every field but Roots and Now
// is the strict one.
type Options struct {
	Roots []Roots   // AMDRoots, and LoadRoots' where simulated chips are trusted
	Now   time.Time // for the certificates' validity; must be set

	ReportData *[64]byte // nil: not compared
	MaxVMPL    uint32    // 0: reports of VMPL 0 only

	MinVersion, MaxVersion uint32 // 0: versions 3 and 5

	// MinTCB is what reported, committed and launch TCB must reach, by product.
	// A product that it lacks is refused; an empty TCB accepts any.
	MinTCB map[string]snp.TCB

	AllowVLEK             bool   // keys that AMD lends to cloud providers; they name no chip
	AllowMaskedChipID     bool   // an all-zero chip id
	AllowUncheckedAliases bool   // firmware from before the answer to BadRAM
	RequirePolicy         uint64 // bits of snp.Report.Policy that must be 1
	ForbidPolicy          uint64 // bits that must be 0, besides debug and migration agent
	RequirePlatform       uint64 // bits of snp.Report.PlatformInfo that must be 1
	ForbidPlatform        uint64 // bits that must be 0
}

// DefaultMinTCB returns the minimum for Genoa with the answers to EntrySign and
// BadRAM. Milan is left out on purpose: the seed of its chips' keys can be read
// by software, so a host can forge its reports at any TCB. Who trusts the hosts
// that far sets a minimum (bootloader 4, tee 0, snp 24, microcode 219). Turin's
// is up to the site.
func DefaultMinTCB() map[string]snp.TCB {
	return map[string]snp.TCB{"Genoa": {Bootloader: 10, TEE: 0, SNP: 23, Microcode: 84}}
}

// Result tells what was found.
type Result struct {
	Product   string       // "Milan", "Genoa" or "Turin"
	Signer    snp.CertType // snp.VCEK or snp.VLEK
	Simulated bool         // a simulated chip signed the report, not AMD's
}

// Verify judges a report. Of certs it uses the VCEK or VLEK only; ASK and ARK
// are the pinned ones.
func Verify(r *snp.Report, certs []snp.Cert, o Options) (*Result, error) {
	if o.Now.IsZero() {
		return nil, fmt.Errorf("%w: Now is not set", ErrOptions)
	}
	lowest, highest := or(o.MinVersion, 3), or(o.MaxVersion, snp.MaxVersion)
	if r.Version < lowest || r.Version > highest {
		return nil, fmt.Errorf("%w: %d, want %d to %d", ErrVersion, r.Version, lowest, highest)
	}
	product, err := r.Product()
	if err != nil {
		return nil, err
	}
	signer, err := signingKey(r, o)
	if err != nil {
		return nil, err
	}
	vek, err := findVEK(certs, signer)
	if err != nil {
		return nil, err
	}
	root, err := checkChain(vek, signer, product, o)
	if err != nil {
		return nil, err
	}
	if err := Signature(r, vek); err != nil {
		return nil, err
	}
	for _, check := range []func() error{
		func() error { return checkCertTCB(r, vek, product) },
		func() error { return checkChipID(r, vek, signer, o) },
		func() error { return checkTCB(r, product, o) },
		func() error { return checkPolicy(r.Policy, o) },
		func() error { return checkPlatform(r.PlatformInfo, o) },
	} {
		if err := check(); err != nil {
			return nil, err
		}
	}
	if r.VMPL > o.MaxVMPL {
		return nil, fmt.Errorf("%w: %d, want at most %d", ErrVMPL, r.VMPL, o.MaxVMPL)
	}
	if o.ReportData != nil && r.ReportData != *o.ReportData {
		return nil, ErrReportData
	}
	return &Result{Product: product, Signer: signer, Simulated: root.Simulated}, nil
}

// CheckVEK judges a chip certificate for a report: that it chains to the roots of
// the report's product, that its key signed the report, and that chip id and TCB
// are its own. It does not judge the report.
func CheckVEK(r *snp.Report, der []byte, o Options) error {
	product, err := r.Product()
	if err != nil {
		return err
	}
	signer, err := signingKey(r, o)
	if err != nil {
		return err
	}
	vek, err := findVEK([]snp.Cert{{Type: signer, Data: der}}, signer)
	if err != nil {
		return err
	}
	if _, err := checkChain(vek, signer, product, o); err != nil {
		return err
	}
	return errors.Join(Signature(r, vek), checkCertTCB(r, vek, product), checkChipID(r, vek, signer, o))
}

func or(v, fallback uint32) uint32 {
	if v == 0 {
		return fallback
	}
	return v
}

func signingKey(r *snp.Report, o Options) (snp.CertType, error) {
	switch {
	case r.SigAlgo != snp.SigAlgoECDSAP384SHA384:
		return "", fmt.Errorf("%w: algorithm %d", ErrSigAlgo, r.SigAlgo)
	case r.MaskChipKey():
		return "", ErrMaskedKey
	case r.SigningKey() == snp.SigningKeyVCEK:
		return snp.VCEK, nil
	case r.SigningKey() == snp.SigningKeyVLEK && o.AllowVLEK:
		return snp.VLEK, nil
	}
	return "", fmt.Errorf("%w: %d (0 is VCEK, 1 is VLEK)", ErrSigningKey, r.SigningKey())
}

func findVEK(certs []snp.Cert, signer snp.CertType) (*x509.Certificate, error) {
	i := slices.IndexFunc(certs, func(c snp.Cert) bool { return c.Type == signer })
	if i < 0 {
		return nil, fmt.Errorf("%w: a %s is needed", ErrNoVEK, signer)
	}
	vek, err := x509.ParseCertificate(certs[i].Data)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrVEK, err)
	}
	if name := vek.Subject.CommonName; name != "SEV-"+string(signer) {
		return nil, fmt.Errorf("%w: its name is %q, want SEV-%s", ErrVEK, name, signer)
	}
	if key, ok := vek.PublicKey.(*ecdsa.PublicKey); !ok || key.Curve != elliptic.P384() {
		return nil, fmt.Errorf("%w: its key is not on P-384", ErrVEK)
	}
	return vek, nil
}

// checkChain returns the roots of the product that vek chains to.
func checkChain(vek *x509.Certificate, signer snp.CertType, product string, o Options) (*Roots, error) {
	err := fmt.Errorf("%w: %s", ErrNoRoots, product)
	for _, r := range o.Roots {
		intermediate := r.ASK
		if signer == snp.VLEK {
			intermediate = r.ASVK
		}
		if r.Product != product || r.ARK == nil || intermediate == nil {
			continue
		}
		v := x509.VerifyOptions{
			Roots:         x509.NewCertPool(),
			Intermediates: x509.NewCertPool(),
			CurrentTime:   o.Now,
			KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
		}
		v.Roots.AddCert(r.ARK)
		v.Intermediates.AddCert(intermediate)
		_, chainErr := vek.Verify(v)
		if chainErr == nil {
			return &r, nil
		}
		sentinel := ErrChain
		if invalid := (x509.CertificateInvalidError{}); errors.As(chainErr, &invalid) && invalid.Reason == x509.Expired {
			sentinel = ErrExpired
		}
		err = fmt.Errorf("%w (%s): %w", sentinel, product, chainErr)
	}
	return nil, err
}

// Signature checks the signature over the report's signed part, and nothing else.
func Signature(r *snp.Report, vek *x509.Certificate) error {
	if !r.SignedBy(vek) {
		return ErrSignature
	}
	return nil
}

// extension returns the value of AMD's extension 1.3.6.1.4.1.3704.1.<arcs>.
func extension(c *x509.Certificate, arcs ...int) ([]byte, bool) {
	id := slices.Concat(asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 3704, 1}, arcs)
	for _, e := range c.Extensions {
		if e.Id.Equal(id) {
			return e.Value, true
		}
	}
	return nil, false
}

// CertTCB reads the TCB that a chip certificate stands for. FMC is nil where the
// certificate has none.
func CertTCB(vek *x509.Certificate) (snp.TCB, error) {
	var t snp.TCB
	for _, p := range []struct {
		name string
		arc  int
		into *uint8
	}{{"bootloader", 1, &t.Bootloader}, {"tee", 2, &t.TEE}, {"snp", 3, &t.SNP}, {"microcode", 8, &t.Microcode}, {"fmc", 9, nil}} {
		value, ok := extension(vek, 3, p.arc)
		if !ok && p.into == nil {
			continue
		}
		if !ok {
			return t, fmt.Errorf("%w: the certificate has no %s", ErrCertTCB, p.name)
		}
		var v int
		if rest, err := asn1.Unmarshal(value, &v); err != nil || len(rest) > 0 || v < 0 || v > 255 {
			return t, fmt.Errorf("%w: the certificate's %s is no INTEGER of a byte", ErrCertTCB, p.name)
		}
		if p.into == nil {
			t.FMC = new(uint8)
			p.into = t.FMC
		}
		*p.into = uint8(v)
	}
	return t, nil
}

// checkCertTCB compares the reported TCB with the one that the key stands for.
func checkCertTCB(r *snp.Report, vek *x509.Certificate, product string) error {
	want, err := CertTCB(vek)
	if err != nil {
		return err
	}
	if product != "Turin" {
		want.FMC = nil
	}
	if !r.ReportedTCB.Equal(want) {
		return fmt.Errorf("%w: %s, the certificate's %s", ErrCertTCB, r.ReportedTCB, want)
	}
	return nil
}

// checkChipID compares the chip id with the certificate's hardware id: 64 bytes,
// or 8 on a Turin, where zeros follow in the report.
func checkChipID(r *snp.Report, vek *x509.Certificate, signer snp.CertType, o Options) error {
	if signer == snp.VLEK {
		return nil // stands for a provider's chips, not for one
	}
	if r.ChipID == [64]byte{} {
		if o.AllowMaskedChipID {
			return nil
		}
		return fmt.Errorf("%w: the host masks it (MASK_CHIP_ID)", ErrChipID)
	}
	id, _ := extension(vek, 4)
	if len(id) == 2+64 || len(id) == 2+8 { // wrapped in an OCTET STRING
		asn1.Unmarshal(id, &id) // leaves id as it is where it is none
	}
	if len(id) != 64 && len(id) != 8 {
		return fmt.Errorf("%w: the certificate has no hardware id", ErrChipID)
	}
	var want [64]byte
	copy(want[:], id)
	if r.ChipID != want {
		return fmt.Errorf("%w: %x, the certificate's %x", ErrChipID, r.ChipID, id)
	}
	return nil
}

func checkTCB(r *snp.Report, product string, o Options) error {
	if !r.CurrentTCB.AtLeast(r.ReportedTCB) {
		return fmt.Errorf("%w: %s, current %s", ErrTCBOrder, r.ReportedTCB, r.CurrentTCB)
	}
	min, ok := o.MinTCB[product]
	if !ok {
		return fmt.Errorf("%w: %s", ErrNoMinimum, product)
	}
	for _, c := range []struct {
		tcb snp.TCB
		err error
	}{
		{r.ReportedTCB, ErrReportedTCB},
		{r.CommittedTCB, ErrCommittedTCB}, // what the host cannot roll back below
		{r.LaunchTCB, ErrLaunchTCB},
	} {
		if !c.tcb.AtLeast(min) {
			return fmt.Errorf("%w (%s): %s, want %s", c.err, product, c.tcb, min)
		}
	}
	return nil
}

func checkPolicy(policy uint64, o Options) error {
	switch {
	case policy&snp.PolicyAlwaysOne == 0:
		return fmt.Errorf("%w: %#x", ErrPolicyInvalid, policy)
	case policy&snp.PolicyDebug != 0:
		return fmt.Errorf("%w: %#x", ErrDebug, policy)
	case policy&snp.PolicyMigrateMA != 0:
		return fmt.Errorf("%w: %#x", ErrMigrateMA, policy)
	case policy&o.RequirePolicy != o.RequirePolicy || policy&o.ForbidPolicy != 0:
		return fmt.Errorf("%w: %#x, want %#x set and %#x not", ErrPolicy, policy, o.RequirePolicy, o.ForbidPolicy)
	}
	return nil
}

func checkPlatform(info uint64, o Options) error {
	switch {
	case info&snp.PlatformAliasCheck == 0 && !o.AllowUncheckedAliases:
		return fmt.Errorf("%w: platform info %#x", ErrAliasCheck, info)
	case info&o.RequirePlatform != o.RequirePlatform || info&o.ForbidPlatform != 0:
		return fmt.Errorf("%w: platform info %#x, want %#x set and %#x not", ErrPlatform, info, o.RequirePlatform, o.ForbidPlatform)
	}
	return nil
}
