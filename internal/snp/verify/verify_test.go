package verify

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-sev-guest/kds"
	sgtest "github.com/google/go-sev-guest/testing"
	sgverify "github.com/google/go-sev-guest/verify"
	"github.com/google/go-sev-guest/verify/testdata"

	"coffer/internal/snp"
	"coffer/test/simsnp"
)

// launch is a chip, a report of it and options that accept it.
type launch struct {
	chip   *simsnp.Chip
	report *snp.Report
	certs  []snp.Cert
	o      Options
}

func newLaunch(t *testing.T, p simsnp.Params) *launch {
	t.Helper()
	chip, err := simsnp.New(p)
	if err != nil {
		t.Fatal(err)
	}
	roots, err := LoadRoots(chip.RootsPEM())
	if err != nil {
		t.Fatal(err)
	}
	data := [64]byte{1, 2, 3}
	report, err := chip.Report([48]byte{4, 5, 6}, data, 0)
	if err != nil {
		t.Fatal(err)
	}
	return &launch{chip, report, chip.Certs(), Options{
		Roots:      roots,
		Now:        time.Now(),
		ReportData: &data,
		MinTCB:     map[string]snp.TCB{chip.Product: chip.TCB},
	}}
}

func TestVerifyAccepts(t *testing.T) {
	for _, p := range []simsnp.Params{{Product: "Milan"}, {Product: "Genoa"}, {Product: "Turin"}} {
		l := newLaunch(t, p)
		got, err := Verify(l.report, l.certs, l.o)
		if err != nil {
			t.Errorf("%s: %v", p.Product, err)
			continue
		}
		if want := (Result{p.Product, snp.VCEK, true}); *got != want {
			t.Errorf("%s: %+v, want %+v", p.Product, *got, want)
		}
	}

	l := newLaunch(t, simsnp.Params{VLEK: true})
	l.o.AllowVLEK = true
	if got, err := Verify(l.report, l.certs, l.o); err != nil || got.Signer != snp.VLEK {
		t.Errorf("VLEK: %+v, %v", got, err)
	}
}

// Every check fails for its own reason. In each case the change is the only one
// from what TestVerifyAccepts accepts.
func TestVerifyRefuses(t *testing.T) {
	other := newLaunch(t, simsnp.Params{})
	changed := func(change func(r *snp.Report)) func(*testing.T, *launch) { // and signed again
		return func(t *testing.T, l *launch) {
			change(l.report)
			if err := l.chip.Sign(l.report); err != nil {
				t.Fatal(err)
			}
		}
	}
	forged := func(change func(r *snp.Report)) func(*testing.T, *launch) {
		return func(_ *testing.T, l *launch) { change(l.report) }
	}
	options := func(change func(o *Options)) func(*testing.T, *launch) {
		return func(_ *testing.T, l *launch) { change(&l.o) }
	}
	lower := snp.TCB{Bootloader: 10, SNP: 22, Microcode: 84}
	for _, tc := range []struct {
		name   string
		params simsnp.Params
		change func(*testing.T, *launch)
		want   error
	}{
		{"no time", simsnp.Params{}, options(func(o *Options) { o.Now = time.Time{} }), ErrOptions},
		{"version 2", simsnp.Params{}, changed(func(r *snp.Report) { r.Version = 2 }), ErrVersion},
		{"version above the configured", simsnp.Params{}, options(func(o *Options) { o.MinVersion, o.MaxVersion = 2, 2 }), ErrVersion},
		{"unknown CPU", simsnp.Params{}, changed(func(r *snp.Report) { r.CPUFamily = 0x18 }), snp.ErrUnknownProduct},
		{"other signature algorithm", simsnp.Params{}, changed(func(r *snp.Report) { r.SigAlgo = 2 }), ErrSigAlgo},
		{"masked key", simsnp.Params{}, changed(func(r *snp.Report) { r.KeyInfo |= 2 }), ErrMaskedKey},
		{"signing key none", simsnp.Params{}, changed(func(r *snp.Report) { r.KeyInfo = snp.SigningKeyNone << 2 }), ErrSigningKey},
		{"VLEK where not allowed", simsnp.Params{VLEK: true}, options(func(*Options) {}), ErrSigningKey},

		{"no certificate", simsnp.Params{}, func(_ *testing.T, l *launch) { l.certs = nil }, ErrNoVEK},
		{"only CA certificates", simsnp.Params{}, func(_ *testing.T, l *launch) { l.certs = l.certs[1:] }, ErrNoVEK},
		{"certificate is garbage", simsnp.Params{}, func(_ *testing.T, l *launch) { l.certs[0].Data = []byte("x") }, ErrVEK},
		{"ASK in the VCEK's place", simsnp.Params{}, func(_ *testing.T, l *launch) { l.certs[0].Data = l.certs[1].Data }, ErrVEK},
		{"no roots", simsnp.Params{}, options(func(o *Options) { o.Roots = nil }), ErrNoRoots},
		{"roots of another product", simsnp.Params{}, options(func(o *Options) { o.Roots[0].Product = "Milan" }), ErrNoRoots},
		{"AMD's roots only", simsnp.Params{}, options(func(o *Options) { o.Roots = AMDRoots() }), ErrChain},
		{"another chip's roots", simsnp.Params{}, options(func(o *Options) { o.Roots = other.o.Roots }), ErrChain},
		{"ASK of another chip", simsnp.Params{}, options(func(o *Options) { o.Roots[0].ASK = other.o.Roots[0].ASK }), ErrChain},
		{"before the certificate", simsnp.Params{}, options(func(o *Options) { o.Now = o.Now.AddDate(-1, 0, 0) }), ErrExpired},
		{"after the certificate", simsnp.Params{}, options(func(o *Options) { o.Now = o.Now.AddDate(8, 0, 0) }), ErrExpired},

		{"changed measurement", simsnp.Params{}, forged(func(r *snp.Report) { r.Measurement[0] ^= 1 }), ErrSignature},
		{"changed signature", simsnp.Params{}, forged(func(r *snp.Report) { r.SignatureS[0] ^= 1 }), ErrSignature},
		{"no signature", simsnp.Params{}, forged(func(r *snp.Report) { r.SignatureR, r.SignatureS = [72]byte{}, [72]byte{} }), ErrSignature},
		{"signed by another chip of these roots", simsnp.Params{}, func(t *testing.T, l *launch) {
			if err := other.chip.Sign(l.report); err != nil {
				t.Fatal(err)
			}
		}, ErrSignature},

		{"reported TCB of another certificate", simsnp.Params{}, changed(func(r *snp.Report) { r.ReportedTCB.Microcode-- }), ErrCertTCB},
		{"fmc of another certificate", simsnp.Params{Product: "Turin"}, changed(func(r *snp.Report) { *r.ReportedTCB.FMC = 0 }), ErrCertTCB},
		{"another chip id", simsnp.Params{}, changed(func(r *snp.Report) { r.ChipID[63] ^= 1 }), ErrChipID},
		{"chip id behind a Turin's 8 bytes", simsnp.Params{Product: "Turin"}, changed(func(r *snp.Report) { r.ChipID[8] = 1 }), ErrChipID},
		{"masked chip id", simsnp.Params{}, changed(func(r *snp.Report) { r.ChipID = [64]byte{} }), ErrChipID},

		{"reported above current", simsnp.Params{}, changed(func(r *snp.Report) { r.CurrentTCB = lower }), ErrTCBOrder},
		{"no minimum", simsnp.Params{}, options(func(o *Options) { o.MinTCB = nil }), ErrNoMinimum},
		{"Milan with the default minimum", simsnp.Params{Product: "Milan"}, options(func(o *Options) { o.MinTCB = DefaultMinTCB() }), ErrNoMinimum},
		{"reported below minimum", simsnp.Params{TCB: &lower}, options(func(o *Options) { o.MinTCB = DefaultMinTCB() }), ErrReportedTCB},
		{"committed below minimum", simsnp.Params{}, changed(func(r *snp.Report) { r.CommittedTCB = lower }), ErrCommittedTCB},
		{"launched below minimum", simsnp.Params{}, changed(func(r *snp.Report) { r.LaunchTCB = lower }), ErrLaunchTCB},

		{"policy bit 17", simsnp.Params{}, changed(func(r *snp.Report) { r.Policy &^= snp.PolicyAlwaysOne }), ErrPolicyInvalid},
		{"debug", simsnp.Params{}, changed(func(r *snp.Report) { r.Policy |= snp.PolicyDebug }), ErrDebug},
		{"migration agent", simsnp.Params{}, changed(func(r *snp.Report) { r.Policy |= snp.PolicyMigrateMA }), ErrMigrateMA},
		{"required policy", simsnp.Params{}, options(func(o *Options) { o.RequirePolicy = snp.PolicySingleSocket }), ErrPolicy},
		{"forbidden policy", simsnp.Params{}, options(func(o *Options) { o.ForbidPolicy = snp.PolicySMT }), ErrPolicy},
		{"no alias check", simsnp.Params{}, changed(func(r *snp.Report) { r.PlatformInfo &^= snp.PlatformAliasCheck }), ErrAliasCheck},
		{"required platform", simsnp.Params{}, options(func(o *Options) { o.RequirePlatform = 1 << 4 }), ErrPlatform},
		{"forbidden platform", simsnp.Params{}, options(func(o *Options) { o.ForbidPlatform = snp.PlatformSMT }), ErrPlatform},
		{"VMPL 1", simsnp.Params{}, changed(func(r *snp.Report) { r.VMPL = 1 }), ErrVMPL},
		{"other report data", simsnp.Params{}, changed(func(r *snp.Report) { r.ReportData[63] ^= 1 }), ErrReportData},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := newLaunch(t, tc.params)
			tc.change(t, l)
			if got, err := Verify(l.report, l.certs, l.o); !errors.Is(err, tc.want) || got != nil {
				t.Errorf("Verify = %+v, %v, want %v", got, err, tc.want)
			}
		})
	}
}

// What an option allows is refused above.
func TestOptionsAllow(t *testing.T) {
	for name, change := range map[string]func(*snp.Report, *Options){
		"masked chip id":  func(r *snp.Report, o *Options) { r.ChipID = [64]byte{}; o.AllowMaskedChipID = true },
		"unchecked alias": func(r *snp.Report, o *Options) { r.PlatformInfo = 0; o.AllowUncheckedAliases = true },
		"VMPL 1":          func(r *snp.Report, o *Options) { r.VMPL = 1; o.MaxVMPL = 1 },
		"any TCB":         func(r *snp.Report, o *Options) { r.LaunchTCB = snp.TCB{}; o.MinTCB = map[string]snp.TCB{"Genoa": {}} },
		"any report data": func(r *snp.Report, o *Options) { r.ReportData[0] ^= 1; o.ReportData = nil },
		"reserved bits": func(r *snp.Report, o *Options) {
			b := r.Marshal()
			b[0x29f] = 1
			parsed, _ := snp.ParseReport(b)
			*r = *parsed
		},
		"version 5":        func(r *snp.Report, o *Options) { r.Version, r.LaunchMitVector, r.CurrentMitVector = 5, 1, 1 },
		"Bergamo":          func(r *snp.Report, o *Options) { r.CPUModel = 0xa0 },
		"more trust roots": func(r *snp.Report, o *Options) { o.Roots = append(AMDRoots(), o.Roots...) },
	} {
		t.Run(name, func(t *testing.T) {
			l := newLaunch(t, simsnp.Params{})
			change(l.report, &l.o)
			if err := l.chip.Sign(l.report); err != nil {
				t.Fatal(err)
			}
			if _, err := Verify(l.report, l.certs, l.o); err != nil {
				t.Error(err)
			}
		})
	}
}

// A bit that no field knows is signed too.
func TestVerifyCoversReservedBits(t *testing.T) {
	l := newLaunch(t, simsnp.Params{})
	b := l.report.Marshal()
	b[0x29f] ^= 1
	r, err := snp.ParseReport(b)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Verify(r, l.certs, l.o); !errors.Is(err, ErrSignature) {
		t.Errorf("Verify = %v, want %v", err, ErrSignature)
	}
}

func TestAMDRoots(t *testing.T) {
	var products []string
	for _, r := range AMDRoots() {
		products = append(products, r.Product)
		if r.Simulated {
			t.Errorf("%s: AMD's roots are said to be simulated", r.Product)
		}
		for _, c := range []*x509.Certificate{r.ARK, r.ASK, r.ASVK} {
			if c == nil || !slices.Equal(c.Subject.Organization, []string{"Advanced Micro Devices"}) {
				t.Errorf("%s: a certificate is missing or not AMD's", r.Product)
			}
		}
	}
	if !slices.Equal(products, []string{"Milan", "Genoa", "Turin"}) {
		t.Errorf("products = %v", products)
	}
}

// A report and a VCEK of a real Milan chip: its guest is one for debugging and
// the report of a version that Verify refuses, so the two checks that AMD's
// signatures decide are made alone.
func TestRealMilan(t *testing.T) {
	r, err := snp.ParseReport(testdata.AttestationBytes)
	if err != nil {
		t.Fatal(err)
	}
	vek, err := findVEK([]snp.Cert{{Type: snp.VCEK, Data: testdata.VcekBytes}}, snp.VCEK)
	if err != nil {
		t.Fatal(err)
	}
	o := Options{Roots: AMDRoots(), Now: vek.NotBefore.Add(time.Hour)}
	if _, err := checkChain(vek, snp.VCEK, "Milan", o); err != nil {
		t.Error(err)
	}
	if _, err := checkChain(vek, snp.VCEK, "Genoa", o); !errors.Is(err, ErrChain) {
		t.Errorf("Genoa's roots accept a Milan: %v", err)
	}
	if err := Signature(r, vek); err != nil {
		t.Error(err)
	}
	if err := checkCertTCB(r, vek, "Milan"); err != nil {
		t.Error(err)
	}
	if err := checkChipID(r, vek, snp.VCEK, o); err != nil {
		t.Error(err)
	}
	if _, err := Verify(r, []snp.Cert{{Type: snp.VCEK, Data: testdata.VcekBytes}}, o); !errors.Is(err, ErrVersion) {
		t.Errorf("Verify = %v, want %v", err, ErrVersion)
	}
}

// go-sev-guest's made-up chips, with RSA-PSS chains like AMD's, pass too.
func TestGoSevGuestChain(t *testing.T) {
	for _, product := range []string{"Milan", "Genoa"} {
		t.Run(product, func(t *testing.T) {
			l := newLaunch(t, simsnp.Params{Product: product})
			tcb := l.chip.TCB
			now := time.Now()
			signer, err := (&sgtest.AmdSignerBuilder{
				Keys: sgtest.DefaultAmdKeys(), ProductName: product + "-B0",
				ArkCreationTime: now, AskCreationTime: now, AsvkCreationTime: now, VcekCreationTime: now, VlekCreationTime: now,
				HWID: l.chip.ChipID,
				VcekCustom: sgtest.CertOverride{Extensions: sgtest.CustomExtensions(kds.TCBParts{
					BlSpl: tcb.Bootloader, TeeSpl: tcb.TEE, SnpSpl: tcb.SNP, UcodeSpl: tcb.Microcode,
				}, l.chip.ChipID[:], "", product+"-B0")},
			}).TestOnlyCertChain()
			if err != nil {
				t.Fatal(err)
			}
			R, S, err := signer.Sign(l.report.Marshal()[:snp.SignedSize])
			if err != nil {
				t.Fatal(err)
			}
			R.FillBytes(l.report.SignatureR[:])
			S.FillBytes(l.report.SignatureS[:])
			slices.Reverse(l.report.SignatureR[:])
			slices.Reverse(l.report.SignatureS[:])
			l.o.Now = now.Add(time.Hour)
			l.o.Roots = []Roots{{Product: product, ARK: signer.Ark, ASK: signer.Ask}}
			if _, err := Verify(l.report, []snp.Cert{{Type: snp.VCEK, Data: signer.Vcek.Raw}}, l.o); err != nil {
				t.Error(err)
			}
		})
	}
}

// And go-sev-guest accepts the signature and the VCEK of ours.
func TestSimulatedChipAgainstGoSevGuest(t *testing.T) {
	l := newLaunch(t, simsnp.Params{})
	vcek, err := x509.ParseCertificate(l.certs[0].Data)
	if err != nil {
		t.Fatal(err)
	}
	if err := sgverify.SnpReportSignature(l.report.Marshal(), vcek); err != nil {
		t.Error(err)
	}
	ext, err := kds.VcekCertificateExtensions(vcek)
	if err != nil {
		t.Fatal(err)
	}
	if parts := kds.DecomposeTCBVersion(ext.TCBVersion); parts.SnpSpl != l.chip.TCB.SNP || parts.BlSpl != l.chip.TCB.Bootloader || parts.UcodeSpl != l.chip.TCB.Microcode {
		t.Errorf("TCB = %+v, want %v", parts, l.chip.TCB)
	}
	if !slices.Equal(ext.HWID, l.chip.ChipID[:]) {
		t.Error("it reads another hardware id")
	}
}

func TestLoadRoots(t *testing.T) {
	a, b := newLaunch(t, simsnp.Params{}).chip.RootsPEM(), newLaunch(t, simsnp.Params{Product: "Turin"}).chip.RootsPEM()
	roots, err := LoadRoots(slices.Concat(a, b))
	if err != nil {
		t.Fatal(err)
	}
	if len(roots) != 2 || roots[0].Product != "Genoa" || roots[1].Product != "Turin" || !roots[0].Simulated || !roots[1].Simulated {
		t.Errorf("roots of two chips: %+v", roots)
	}
	if roots, err := LoadRoots(amdPEM); err != nil || !roots[0].Simulated {
		t.Errorf("AMD's roots from a file are not marked as simulated: %v", err)
	}

	_, ark := pem.Decode(a) // the ASK stands first
	ask := []byte(strings.TrimSuffix(string(a), string(ark)))
	for name, text := range map[string][]byte{
		"empty":       nil,
		"no PEM":      []byte("hello"),
		"only ARK":    ark,
		"only ASK":    ask,
		"foreign ASK": slices.Concat(ask, b),
		"a key":       slices.Concat(a, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte{1}})),
		"garbage":     pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte{1}}),
	} {
		if _, err := LoadRoots(text); !errors.Is(err, ErrRoots) {
			t.Errorf("%s: %v, want %v", name, err, ErrRoots)
		}
	}
}
