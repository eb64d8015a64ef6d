package cli

import (
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"coffer/internal/snp"
	"coffer/test/simsnp"
)

func TestReportShow(t *testing.T) {
	for _, name := range []string{"genoa-v3", "turin-v5"} {
		want, err := os.ReadFile("../../internal/snp/testdata/" + name + ".txt")
		if err != nil {
			t.Fatal(err)
		}
		code, out, errOut := run(t, "report", "show", "../../internal/snp/testdata/"+name+".bin")
		if code != 0 || out != string(want) {
			t.Errorf("%s: exit %d, %d bytes, want %d; %s", name, code, len(out), len(want), errOut)
		}
	}
	if code, _, errOut := run(t, "report", "show", "../../internal/snp/testdata/README.md"); code != 1 || !strings.Contains(errOut, "README.md: not the size of an SNP report") {
		t.Errorf("exit %d, %s", code, errOut)
	}
}

func TestReportVerify(t *testing.T) {
	dir := t.TempDir()
	chip, err := simsnp.New(simsnp.Params{})
	if err != nil {
		t.Fatal(err)
	}
	r, err := chip.Report([48]byte{7}, [64]byte{8}, 0)
	if err != nil {
		t.Fatal(err)
	}
	forged := r.Marshal()
	forged[0x90] ^= 1
	evidence, err := snp.EvidenceJSON(r.Marshal(), chip.Certs())
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{
		"roots.pem": chip.RootsPEM(), "report.bin": r.Marshal(), "forged.bin": forged, "evidence.json": evidence,
		"table.bin": snp.MarshalCertTable(chip.Certs()),
	}
	for _, c := range chip.Certs() {
		if c.Type == snp.VCEK {
			files["vcek.der"] = c.Data
			files["vcek-as.pem"] = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Data})
		}
	}
	writeFiles(t, dir, files)
	path := func(name string) string { return filepath.Join(dir, name) }
	args := func(file string, more ...string) []string {
		return append([]string{"report", "verify", path(file), "--roots", path("roots.pem"), "--json"}, more...)
	}
	measurement := hex.EncodeToString(append([]byte{7}, make([]byte, 47)...))
	data := hex.EncodeToString(append([]byte{8}, make([]byte, 63)...))

	for name, a := range map[string][]string{
		"evidence":         args("evidence.json"),
		"folder":           args("report.bin", "--certs", dir),
		"DER":              args("report.bin", "--certs", path("vcek.der")),
		"PEM":              args("report.bin", "--certs", path("vcek-as.pem")),
		"table":            args("report.bin", "--certs", path("table.bin")),
		"expected content": args("evidence.json", "--measurement", measurement, "--report-data", data),
	} {
		code, out, errOut := run(t, a...)
		var v verdict
		if err := json.Unmarshal([]byte(out), &v); err != nil {
			t.Errorf("%s: %v: %s", name, err, errOut)
		} else if code != 0 || !v.Verified || !v.Simulated || v.Product != "Genoa" || v.Signer != "VCEK" || v.Measurement != measurement {
			t.Errorf("%s: exit %d, %+v, %s", name, code, v, errOut)
		}
	}
	code, out, _ := run(t, "report", "verify", path("evidence.json"), "--roots", path("roots.pem"))
	if code != 0 || !strings.HasPrefix(out, "SIMULATED") || !strings.Contains(out, measurement) {
		t.Errorf("text: exit %d, %s", code, out)
	}

	for name, tc := range map[string]struct {
		args []string
		want string
	}{
		"roots not given":   {[]string{"report", "verify", path("evidence.json"), "--json"}, "does not chain to a trusted root"},
		"forged":            {args("forged.bin", "--certs", dir), "signature is wrong"},
		"no certificate":    {args("report.bin"), "https://kdsintf.amd.com/vcek/v1/Genoa/" + hex.EncodeToString(r.ChipID[:]) + "?blSPL=10&teeSPL=00&snpSPL=23&ucodeSPL=84"},
		"other measurement": {args("evidence.json", "--measurement", strings.Repeat("0", 96)), "hostbuild measure --explain"},
		"other report data": {args("evidence.json", "--report-data", strings.Repeat("0", 128)), "report data"},
		"higher minimum":    {args("evidence.json", "--min-tcb", "Genoa=10/0/24/84"), "below the minimum"},
	} {
		code, out, errOut := run(t, tc.args...)
		var v verdict
		if err := json.Unmarshal([]byte(out), &v); err != nil {
			t.Errorf("%s: %v", name, err)
		} else if code != 1 || v.Verified || !strings.Contains(v.Reason, tc.want) || !strings.Contains(errOut, tc.want) {
			t.Errorf("%s: exit %d, %+v, %s; want %q", name, code, v, errOut, tc.want)
		}
	}
	for name, a := range map[string][]string{
		"report data": args("report.bin", "--report-data", "00"),
		"minimum":     args("report.bin", "--min-tcb", "Genoa=1"),
		"product":     args("report.bin", "--min-tcb", "Rome=1/2/3/4"),
		"too large":   args("report.bin", "--min-tcb", "Genoa=1/2/3/256"),
	} {
		if code, _, errOut := run(t, a...); code != 2 {
			t.Errorf("%s: exit %d, %s", name, code, errOut)
		}
	}
	if code, _, errOut := run(t, args("report.bin", "--certs", t.TempDir())...); code != 1 || !strings.Contains(errOut, "holds no vcek.pem") {
		t.Errorf("empty folder: exit %d, %s", code, errOut)
	}
}

func TestMinTCB(t *testing.T) {
	product, min, err := parseMinTCB("Turin=1/2/3/4/79")
	if err != nil || product != "Turin" || min.FMC == nil || *min.FMC != 1 || min.Bootloader != 2 || min.Microcode != 79 {
		t.Errorf("%s %v %v", product, min, err)
	}
}
