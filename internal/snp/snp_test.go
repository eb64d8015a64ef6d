package snp

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/google/go-sev-guest/abi"
)

func read(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func readHex(t testing.TB, name string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(string(read(t, name))), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestParseReportFields(t *testing.T) {
	genoa, err := ParseReport(read(t, "genoa-v3.bin"))
	if err != nil {
		t.Fatal(err)
	}
	// Expectations as snpguest displays this report (its golden text).
	if genoa.Version != 3 || genoa.Policy != 0x30000 || genoa.PlatformInfo != 37 || genoa.VMPL != 0 || genoa.SigAlgo != 1 {
		t.Errorf("header fields wrong: %+v", genoa)
	}
	if want := (TCB{Bootloader: 9, SNP: 23, Microcode: 72}); !genoa.CurrentTCB.Equal(want) {
		t.Errorf("current TCB = %v, want %v", genoa.CurrentTCB, want)
	}
	if genoa.Measurement[0] != 0xaa || genoa.Measurement[1] != 0x11 || genoa.ReportData[0] != 0x51 || genoa.ReportData[63] != 0x6f {
		t.Error("measurement or report data read from the wrong place")
	}

	turin, err := ParseReport(readHex(t, "snp-report-turin-v5.hex"))
	if err != nil {
		t.Fatal(err)
	}
	one := uint8(1)
	if want := (TCB{FMC: &one, Bootloader: 10, TEE: 2, SNP: 23, Microcode: 84}); !turin.ReportedTCB.Equal(want) {
		t.Errorf("Turin reported TCB = %v, want %v", turin.ReportedTCB, want)
	}
	if turin.LaunchMitVector != 72623859790382856 || turin.CurrentMitVector != 1230066625199609624 {
		t.Errorf("mitigation vectors = %d, %d", turin.LaunchMitVector, turin.CurrentMitVector)
	}
	if want := (FirmwareVersion{1, 55, 39}); turin.Committed != want {
		t.Errorf("committed = %v, want %v", turin.Committed, want)
	}
}

func TestReportRoundTrip(t *testing.T) {
	reports := map[string][]byte{
		"genoa v3":      read(t, "genoa-v3.bin"),
		"turin v5":      read(t, "turin-v5.bin"),
		"kbs v3":        readHex(t, "snp-report-v3.hex"),
		"kbs turin v5":  readHex(t, "snp-report-turin-v5.hex"),
		"reserved bits": bytes.Repeat([]byte{0xa5}, ReportSize),
	}
	copy(reports["reserved bits"], []byte{4, 0, 0, 0})
	for name, b := range reports {
		t.Run(name, func(t *testing.T) {
			r, err := ParseReport(b)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(r.Marshal(), b) {
				t.Error("Marshal does not give back the parsed bytes")
			}
			r.Measurement[0] ^= 1
			if bytes.Equal(r.Marshal(), b) {
				t.Error("Marshal ignores a changed field")
			}
		})
	}
}

func TestParseReportRefuses(t *testing.T) {
	good := read(t, "genoa-v3.bin")
	version := func(v byte) []byte { b := bytes.Clone(good); b[0] = v; return b }
	for _, tc := range []struct {
		name string
		b    []byte
		want error
	}{
		{"empty", nil, ErrReportSize},
		{"short", good[:ReportSize-1], ErrReportSize},
		{"long", append(bytes.Clone(good), 0), ErrReportSize},
		{"version 1", version(1), ErrReportVersion},
		{"version 6", version(6), ErrReportVersion},
	} {
		if _, err := ParseReport(tc.b); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, err, tc.want)
		}
	}
}

func TestProduct(t *testing.T) {
	for _, tc := range []struct {
		version       uint32
		family, model uint8
		want          string
	}{
		{3, 0x19, 0x01, "Milan"}, {3, 0x19, 0x0f, "Milan"},
		{3, 0x19, 0x10, "Genoa"}, {3, 0x19, 0x11, "Genoa"}, {4, 0x19, 0xa0, "Genoa"}, {5, 0x19, 0xaf, "Genoa"},
		{5, 0x1a, 0x00, "Turin"}, {5, 0x1a, 0x11, "Turin"},
		{3, 0x19, 0x20, ""}, {3, 0x1a, 0x12, ""}, {3, 0x17, 0x01, ""}, {2, 0x19, 0x01, ""},
	} {
		r := Report{Version: tc.version, CPUFamily: tc.family, CPUModel: tc.model}
		got, err := r.Product()
		if got != tc.want || (tc.want == "") != errors.Is(err, ErrUnknownProduct) {
			t.Errorf("v%d %#x/%#x: %q, %v, want %q", tc.version, tc.family, tc.model, got, err, tc.want)
		}
	}
}

func TestVCEKPath(t *testing.T) {
	one := uint8(1)
	var id [64]byte
	id[0], id[63] = 0xab, 0xcd
	long, short := "ab"+strings.Repeat("00", 62)+"cd", "ab"+strings.Repeat("00", 7)
	for want, r := range map[string]Report{
		"/vcek/v1/Genoa/" + long + "?blSPL=10&teeSPL=00&snpSPL=23&ucodeSPL=84":            {CPUFamily: 0x19, CPUModel: 0x11, ReportedTCB: TCB{Bootloader: 10, SNP: 23, Microcode: 84}},
		"/vcek/v1/Milan/" + long + "?blSPL=04&teeSPL=00&snpSPL=24&ucodeSPL=219":           {CPUFamily: 0x19, CPUModel: 0x01, ReportedTCB: TCB{Bootloader: 4, SNP: 24, Microcode: 219}},
		"/vcek/v1/Turin/" + short + "?fmcSPL=01&blSPL=01&teeSPL=01&snpSPL=04&ucodeSPL=71": {CPUFamily: 0x1a, ReportedTCB: TCB{FMC: &one, Bootloader: 1, TEE: 1, SNP: 4, Microcode: 71}},
	} {
		r.Version, r.ChipID = MaxVersion, id
		if got, err := r.VCEKPath(); got != want || err != nil {
			t.Errorf("%s, %v, want %s", got, err, want)
		}
		r.ChipID = [64]byte{}
		if got, err := r.VCEKPath(); err == nil || !strings.Contains(err.Error(), "masks the chip id") {
			t.Errorf("masked chip id: %s, %v", got, err)
		}
	}
}

func TestTCBOrder(t *testing.T) {
	min := TCB{Bootloader: 10, SNP: 23, Microcode: 84}
	for _, tc := range []struct {
		tcb  TCB
		want bool
	}{
		{TCB{Bootloader: 10, SNP: 23, Microcode: 84}, true},
		{TCB{Bootloader: 11, TEE: 1, SNP: 24, Microcode: 85}, true},
		{TCB{Bootloader: 9, TEE: 9, SNP: 99, Microcode: 99}, false},
		{TCB{Bootloader: 10, SNP: 22, Microcode: 84}, false},
		{TCB{Bootloader: 10, SNP: 23, Microcode: 83}, false},
	} {
		if got := tc.tcb.AtLeast(min); got != tc.want {
			t.Errorf("%v at least %v: %v", tc.tcb, min, got)
		}
	}
	zero := uint8(0)
	if (TCB{}).Equal(TCB{FMC: &zero}) {
		t.Error("a TCB without FMC equals one with FMC 0")
	}
}

func someCerts() []Cert {
	return []Cert{
		{VCEK, bytes.Repeat([]byte{0x30, 1}, 400)},
		{ASK, bytes.Repeat([]byte{0x30, 2}, 300)},
		{ARK, bytes.Repeat([]byte{0x30, 3}, 14)},
	}
}

func equalCerts(a, b []Cert) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i].Type != b[i].Type || !bytes.Equal(a[i].Data, b[i].Data) {
			return false
		}
	}
	return true
}

// The other implementation reads what ours writes and the reverse.
func TestCertTableAgainstGoSevGuest(t *testing.T) {
	table := MarshalCertTable(someCerts())
	var other abi.CertTable
	if err := other.Unmarshal(table); err != nil {
		t.Fatal(err)
	}
	vcek, err := other.GetByGUIDString(abi.VcekGUID)
	if err != nil || !bytes.Equal(vcek, someCerts()[0].Data) {
		t.Errorf("go-sev-guest reads another VCEK: %v", err)
	}
	certs, err := ParseCertTable(other.Marshal())
	if err != nil || !equalCerts(certs, someCerts()) {
		t.Errorf("its table reads as %v, %v", certs, err)
	}
}

func TestParseCertTable(t *testing.T) {
	good := MarshalCertTable(someCerts())
	patch := func(off int, v ...byte) []byte { b := bytes.Clone(good); copy(b[off:], v); return b }
	for _, tc := range []struct {
		name string
		b    []byte
		want int // certificates; -1 for an error
	}{
		{"none", nil, 0},
		{"only the end", make([]byte, entrySize), 0},
		{"good", good, 3},
		{"unknown GUID", patch(0, 0xff), 2},
		{"shorter than a certificate", patch(20, 26, 0), 2},
		{"empty entry", patch(20, 0, 0), 2},
		{"length beyond the table", patch(20, 0xff, 0xff), -1},
		{"offset beyond the table", patch(16, 0xff, 0xff, 0xff, 0xff), -1},
		{"offset and length overflow", patch(16, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff), -1},
		{"cut within the entries", good[:2*entrySize+5], -1},
		{"no end", bytes.Repeat([]byte{1, 0, 0, 0}, 6*maxEntries), -1},
	} {
		certs, err := ParseCertTable(tc.b)
		switch {
		case tc.want < 0 && !errors.Is(err, ErrCertTable):
			t.Errorf("%s: %v, want %v", tc.name, err, ErrCertTable)
		case tc.want >= 0 && (err != nil || len(certs) != tc.want):
			t.Errorf("%s: %d certificates, %v, want %d", tc.name, len(certs), err, tc.want)
		}
	}
}

func compact(t testing.TB, b []byte) string {
	t.Helper()
	var out bytes.Buffer
	if err := json.Compact(&out, b); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// golden returns the vector's evidence with certificates of a length that does
// not kill a real Trustee, and the certificates themselves.
func golden(t testing.TB) (string, []Cert) {
	var e struct {
		Report json.RawMessage `json:"attestation_report"`
	}
	if err := json.Unmarshal(read(t, "snp-evidence-v3.json"), &e); err != nil {
		t.Fatal(err)
	}
	certs := []Cert{{VCEK, bytes.Repeat([]byte{7}, 27)}, {ASK, bytes.Repeat([]byte{8}, 28)}}
	sevens := strings.TrimSuffix(strings.Repeat("7,", 27), ",")
	eights := strings.TrimSuffix(strings.Repeat("8,", 28), ",")
	return `{"attestation_report":` + compact(t, e.Report) +
		`,"cert_chain":[{"cert_type":"VCEK","data":[` + sevens + `]},{"cert_type":"ASK","data":[` + eights + `]}]}`, certs
}

func TestEvidenceGolden(t *testing.T) {
	v3, certs := golden(t)
	for _, tc := range []struct {
		name   string
		report []byte
		certs  []Cert
		want   string
	}{
		{"v3 with certificates", readHex(t, "snp-report-v3.hex"), certs, v3},
		{"turin v5 without", readHex(t, "snp-report-turin-v5.hex"), nil, compact(t, read(t, "snp-evidence-turin-v5.json"))},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := EvidenceJSON(tc.report, tc.certs)
			if err != nil {
				t.Fatal(err)
			}
			if string(got) != tc.want {
				t.Errorf("got  %s\nwant %s", got, tc.want)
			}
			report, certs, err := ParseEvidenceJSON(got)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(report, tc.report) || !equalCerts(certs, tc.certs) {
				t.Error("parsing it does not give back report and certificates")
			}
		})
	}
}

func TestEvidenceWithoutVEKHasNullChain(t *testing.T) {
	for name, certs := range map[string][]Cert{
		"none":       nil,
		"only ASK":   {{ASK, make([]byte, 100)}},
		"short VCEK": {{VCEK, make([]byte, 26)}},
	} {
		got, err := EvidenceJSON(read(t, "genoa-v3.bin"), certs)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(string(got), `,"cert_chain":null}`) {
			t.Errorf("%s: cert_chain is not null", name)
		}
	}
}

func TestEvidenceRefusesWhatTrusteeWouldLose(t *testing.T) {
	for _, off := range []int{0x4c, 0x18b, 0x1eb, 0x1f8, 0x29f, 0x182} {
		report := read(t, "genoa-v3.bin")
		report[off] = 1
		if _, err := EvidenceJSON(report, nil); !errors.Is(err, ErrEvidence) {
			t.Errorf("byte %#x set: %v, want %v", off, err, ErrEvidence)
		}
	}
}

func TestParseEvidence(t *testing.T) {
	good, _ := golden(t)
	repl := func(old, new string) string {
		t.Helper()
		if strings.Count(good, old) != 1 {
			t.Fatalf("%q stands %d times in the evidence", old, strings.Count(good, old))
		}
		return strings.Replace(good, old, new, 1)
	}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: make([]byte, 40)})
	cert := func(s string) string { return good[:strings.Index(good, `"cert_chain"`)] + `"cert_chain":` + s + "}" }
	turin := compact(t, read(t, "snp-evidence-turin-v5.json"))
	for _, tc := range []struct {
		name string
		json string
		ok   bool
	}{
		{"good", good, true},
		{"unknown member", repl(`"guest_svn":7`, `"guest_svn":7,"new":1`), true},
		{"fmc absent before Turin", strings.ReplaceAll(good, `"fmc":null,`, ``), true},
		{"cert_chain null", cert(`null`), true},
		{"cert_chain absent", good[:strings.Index(good, `,"cert_chain"`)] + "}", true},
		{"other entries", repl(`"cert_chain":[`, `"cert_chain":[{"cert_type":{"OTHER":"00112233-4455-6677-8899-aabbccddeeff"},"data":[1]},{"cert_type":"Empty","data":[]},`), true},
		{"certificate as PEM", cert(`[{"cert_type":"VCEK","data":` + string(appendOctets(nil, certPEM)) + `}]`), true},

		{"not JSON", `{`, false},
		{"no report", `{"cert_chain":null}`, false},
		{"version 6", repl(`"version":3`, `"version":6`), false},
		{"version negative", repl(`"version":3`, `"version":-3`), false},
		{"version a string", repl(`"version":3`, `"version":"3"`), false},
		{"guest_svn absent", repl(`"guest_svn":7,`, ``), false},
		{"guest_svn null", repl(`"guest_svn":7`, `"guest_svn":null`), false},
		{"name in other case", repl(`"guest_svn"`, `"Guest_SVN"`), false},
		{"policy an object", repl(`"policy":196608`, `"policy":{}`), false},
		{"vmpl beyond u32", repl(`"vmpl":0`, `"vmpl":4294967296`), false},
		{"cpuid absent", repl(`"cpuid_fam_id":25,`, ``), false},
		{"cpuid null", repl(`"cpuid_mod_id":17`, `"cpuid_mod_id":null`), false},
		{"array too short", repl(`"family_id":[16,`, `"family_id":[`), false},
		{"array too long", repl(`"family_id":[16,`, `"family_id":[16,16,`), false},
		{"array with null", repl(`"family_id":[16,`, `"family_id":[null,`), false},
		{"array with 256", repl(`"family_id":[16,`, `"family_id":[256,`), false},
		{"base64", repl(`"family_id":[16,16,16,16,16,16,16,16,16,16,16,16,16,16,16,16]`, `"family_id":"EBAQEBAQEBAQEBAQEBAQEA=="`), false},
		{"signature absent", strings.Replace(good, `"signature"`, `"sig"`, 1), false},
		{"Turin without fmc", strings.ReplaceAll(turin, `"fmc":1,`, ``), false},
		{"v5 without vectors", strings.ReplaceAll(turin, `"launch_mit_vector"`, `"x"`), false},
		{"cert_chain empty", cert(`[]`), false},
		{"cert_chain without VEK", cert(`[{"cert_type":"ASK","data":` + string(appendOctets(nil, make([]byte, 40))) + `}]`), false},
		{"cert_type in lower case", repl(`"VCEK"`, `"vcek"`), false},
		{"cert_type absent", repl(`"cert_type":"VCEK",`, ``), false},
		{"certificate of 26 bytes", repl(`"data":[7,`, `"data":[`), false},
	} {
		_, certs, err := ParseEvidenceJSON(json.RawMessage(tc.json))
		switch {
		case tc.ok && err != nil:
			t.Errorf("%s: %v", tc.name, err)
		case !tc.ok && !errors.Is(err, ErrEvidence):
			t.Errorf("%s: %v, want %v", tc.name, err, ErrEvidence)
		case tc.name == "certificate as PEM" && !equalCerts(certs, []Cert{{VCEK, make([]byte, 40)}}):
			t.Errorf("%s: read as %v", tc.name, certs)
		}
	}
}

func FuzzParseReport(f *testing.F) {
	f.Add(read(f, "genoa-v3.bin"))
	f.Add(read(f, "turin-v5.bin"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ParseReport(b)
		if err != nil {
			return
		}
		if !bytes.Equal(r.Marshal(), b) {
			t.Error("parse and marshal change the report")
		}
		r.Product()
	})
}

func FuzzParseCertTable(f *testing.F) {
	f.Add(MarshalCertTable(someCerts()))
	f.Fuzz(func(t *testing.T, b []byte) {
		certs, err := ParseCertTable(b)
		if err != nil {
			return
		}
		again, err := ParseCertTable(MarshalCertTable(certs))
		if err != nil || !equalCerts(certs, again) {
			t.Errorf("round trip: %v", err)
		}
	})
}

func FuzzParseEvidenceJSON(f *testing.F) {
	v3, _ := golden(f)
	f.Add([]byte(v3))
	f.Add(read(f, "snp-evidence-turin-v5.json"))
	f.Fuzz(func(t *testing.T, b []byte) {
		report, certs, err := ParseEvidenceJSON(b)
		if err != nil {
			return
		}
		again, err := EvidenceJSON(report, certs)
		if err != nil {
			t.Fatalf("what was parsed cannot be written: %v", err)
		}
		report2, _, err := ParseEvidenceJSON(again)
		if err != nil || !bytes.Equal(report, report2) {
			t.Errorf("round trip: %v", err)
		}
	})
}
