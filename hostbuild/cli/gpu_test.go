package cli_test

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"coffer/hostbuild/cli"
	"coffer/internal/gpu"
	"coffer/test/gpusim"
)

func run(t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	var out, errs bytes.Buffer
	app := &cli.App{Stdout: &out, Stderr: &errs}
	code = app.Run(t.Context(), append([]string{"hostbuild"}, args...))
	return out.String(), errs.String(), code
}

func write(t *testing.T, dir, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestRIMAndGPU fetches RIMs from a service, lists and verifies them, and verifies
// a device with them.
func TestRIMAndGPU(t *testing.T) {
	w := gpusim.NewWorld()
	d := w.NewDevice(gpu.Hopper)
	nonce := [32]byte{9}
	evidence := d.Evidence(nonce)
	rims := w.NewRIMs(d)
	service := httptest.NewServer(rims)
	defer service.Close()
	dir, files := t.TempDir(), t.TempDir()
	rimRoot := write(t, files, "rim-root.pem", gpusim.PEM([]*gpusim.Authority{w.RIMRoot}))
	deviceRoot := write(t, files, "device-root.pem", gpusim.PEM([]*gpusim.Authority{w.DeviceRoot}))
	report := write(t, files, "report.bin", evidence.Report)
	text := write(t, files, "report.txt", []byte(hex.EncodeToString(evidence.Report)+"\n"))
	chain := write(t, files, "chain.pem", evidence.Chain)
	driver, vbios := d.DriverRIM(), d.VBIOSRIM()

	fetch := []string{"rim", "fetch", "--dir", dir, "--url", service.URL, "--rim-root", rimRoot, driver.ID, vbios.ID}
	out, errs, code := run(t, fetch...)
	if code != 0 || strings.Count(out, "kept ") != 2 || !strings.Contains(out, driver.ID+".xml") {
		t.Fatalf("fetch: %d\n%s%s", code, out, errs)
	}
	if out, _, code = run(t, fetch...); code != 0 || strings.Count(out, "had ") != 2 {
		t.Errorf("fetch again: %d\n%s", code, out)
	}
	rims[driver.ID] = nil
	rims.Add(w.RIMChain, driver) // re-issued: the signature differs
	if out, _, code = run(t, fetch...); code != 0 || !strings.Contains(out, "kept  "+filepath.Join(dir, driver.ID+".2.xml")) {
		t.Errorf("fetch of a re-issued one: %d\n%s", code, out)
	}
	if _, errs, code = run(t, "rim", "fetch", "--dir", dir, "--url", service.URL, driver.ID); code != 1 || !strings.Contains(errs, "not kept") {
		t.Errorf("fetch under NVIDIA's root: %d\n%s", code, errs)
	}
	if out, _, code = run(t, "rim", "list", "--dir", dir, "--rim-root", rimRoot); code != 0 || strings.Count(out, "good ") != 3 {
		t.Errorf("list: %d\n%s", code, out)
	}
	if out, _, code = run(t, "rim", "list", "--remote", "--url", service.URL); code != 0 || !strings.Contains(out, vbios.ID) {
		t.Errorf("list --remote: %d\n%s", code, out)
	}
	out, _, code = run(t, "rim", "verify", "--json", "--rim-root", rimRoot, "--time", "2099-06-01T00:00:00Z", filepath.Join(dir, driver.ID+".xml"))
	var info map[string]any
	if err := json.Unmarshal([]byte(out), &info); code != 1 || err != nil || info["state"] != "bad" || info["version"] != d.Driver {
		t.Errorf("verify after the end: %d %v\n%s", code, err, out)
	}

	at := gpusim.Now.Format("2006-01-02T15:04:05Z")
	verify := func(more ...string) (string, string, int) {
		return run(t, append([]string{"gpu", "verify", "--certs", chain, "--rim-dir", dir, "--device-root", deviceRoot, "--rim-root", rimRoot}, more...)...)
	}
	for _, m := range []struct {
		name string
		args []string
		code int
		want string // in what is printed
	}{
		{"bytes", []string{"--report", report, "--time", at}, 0, "verified"},
		{"hex", []string{"--report", text, "--time", at}, 0, "verified"},
		{"nonce", []string{"--report", text, "--time", at, "--nonce", hex.EncodeToString(nonce[:])}, 0, "verified"},
		{"other nonce", []string{"--report", text, "--time", at, "--nonce", strings.Repeat("00", 32)}, 1, "[report-nonce]"},
		{"no nonce", []string{"--report", text, "--time", at, "--nonce", "00"}, 2, "64 hex digits"},
		{"no time", []string{"--report", text, "--time", "today"}, 2, "--time"},
		{"other mode of OCSP", []string{"--report", text, "--ocsp", "maybe"}, 2, "--ocsp"},
		{"kept answers without a folder", []string{"--report", text, "--ocsp", "allow_cached"}, 2, "--ocsp-dir"},
		{"expired", []string{"--report", text, "--time", "2099-06-01T00:00:00Z"}, 1, "[driver-rim-expired]"},
		{"expired, allowed", []string{"--report", text, "--time", "2099-06-01T00:00:00Z", "--allow-expired-rim"}, 0, "verified"},
		{"no report", []string{"--report", chain, "--time", at}, 1, "[report-format]"},
		{"no file", []string{"--report", "/does/not/exist", "--time", at}, 1, "no such file"},
		{"driver", []string{"--report", report, "--time", at, "--driver", "1.2"}, 1, "[driver-not-allowed]"},
	} {
		out, errs, code := verify(m.args...)
		if code != m.code || !strings.Contains(out+errs, m.want) {
			t.Errorf("%s: exit code %d, want %d and %q\n%s%s", m.name, code, m.code, m.want, out, errs)
		}
	}
	out, _, code = verify("--report", report, "--time", at, "--json")
	var verdict struct {
		Verified bool
		Claims   map[string]any
	}
	if err := json.Unmarshal([]byte(out), &verdict); code != 0 || err != nil || !verdict.Verified || verdict.Claims["measres"] != "success" {
		t.Errorf("--json: %d %v\n%s", code, err, out)
	}
	if _, errs, code = run(t, "gpu", "verify", "--report", report, "--certs", chain, "--rim-dir", dir, "--time", at); code != 1 || !strings.Contains(errs, "[chain-root]") {
		t.Errorf("under NVIDIA's roots: %d\n%s", code, errs)
	}
}
