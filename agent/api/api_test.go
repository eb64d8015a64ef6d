package api_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"gopkg.in/yaml.v3"

	"coffer/agent/api"
	"coffer/agent/certs"
	"coffer/internal/evidence"
	"coffer/internal/guestconfig"
	"coffer/internal/snp"
	"coffer/internal/snp/verify"
	"coffer/internal/snpguest"
	"coffer/kbsclient"
	"coffer/test/simsnp"
)

// guest is an API over a simulated chip and a made-up KBS.
type guest struct {
	*api.Server
	chip   *simsnp.Chip
	socket string
	kbs    *fakeKBS
	cfg    *guestconfig.Config

	mu    sync.Mutex
	clock time.Duration
	vmpls []int
}

func (g *guest) TEE() string     { return g.cfg.TEE }
func (g *guest) Simulated() bool { return true }
func (g *guest) Report(_ context.Context, data [64]byte, vmpl int) ([]byte, []byte, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.vmpls = append(g.vmpls, vmpl)
	r, err := g.chip.Report([48]byte{7}, data, uint32(vmpl))
	if err != nil {
		return nil, nil, err
	}
	return r.Marshal(), snp.MarshalCertTable(g.chip.Certs()), nil
}

func (g *guest) DeriveKey(_ context.Context, q evidence.KeyRequest) ([]byte, error) {
	if q.Mitigation != nil {
		return nil, evidence.ErrNoKey
	}
	return bytes.Repeat([]byte{byte(q.VMPL)}, 32), nil
}

func (g *guest) now() time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.clock
}

func (g *guest) pass(d time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.clock += d
}

type fakeKBS struct {
	asked []string
	err   error
}

func (k *fakeKBS) Fetch(_ context.Context, path string) ([]byte, string, error) {
	k.asked = append(k.asked, path)
	return []byte("secret of " + path), token(time.Now().Add(5 * time.Minute)), k.err
}

func token(expires time.Time) string {
	b64 := base64.RawURLEncoding.EncodeToString
	return b64([]byte(`{"alg":"ES256"}`)) + "." + b64(fmt.Appendf(nil, `{"exp":%d}`, expires.Unix())) + ".c2ln"
}

func newGuest(t *testing.T) *guest {
	t.Helper()
	chip, err := simsnp.New(simsnp.Params{})
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "api") // short: a socket's name has 107 bytes at most
	if err != nil {
		t.Fatal(err)
	}
	g := &guest{chip: chip, socket: filepath.Join(dir, "coffer.sock"), kbs: &fakeKBS{}}
	g.cfg = &guestconfig.Config{CVMID: "cvm_0123456789ab", Platform: "simulated", TEE: "snp",
		KBS:         guestconfig.KBS{URL: "https://kbs.example", CA: "the CA", KeyPath: "keys/root/cvm_0123456789ab", CanaryPath: "keys/canary/cvm_0123456789ab"},
		Attestation: guestconfig.Attestation{CheckFrequency: 60, MaxStaleness: 180, FailureAction: "stop_job"},
		API:         guestconfig.API{Resources: []string{"site/keys/model"}}}
	store := certs.New(certs.Config{Roots: roots(t, chip), Now: time.Now})
	g.Server = api.New(api.Config{Guest: g.cfg, LaunchDigest: "07", Source: g, KBS: g.kbs,
		Chips: func() api.Chips { return store }, Now: g.now, Wall: time.Now})
	// What the agent does with its own report.
	b, table, err := g.Report(t.Context(), [64]byte{}, 1)
	if err != nil {
		t.Fatal(err)
	}
	r, _ := snp.ParseReport(b)
	fromHost, _ := snp.ParseCertTable(table)
	if err := store.Add(r, fromHost); err != nil {
		t.Fatal(err)
	}
	g.vmpls = nil
	l, err := net.Listen("unix", g.socket)
	if err != nil {
		t.Fatal(err)
	}
	go g.Serve(l, g.Handler())
	t.Cleanup(func() {
		g.Close()
		os.RemoveAll(dir)
	})
	return g
}

func roots(t *testing.T, c *simsnp.Chip) []verify.Roots {
	t.Helper()
	r, err := verify.LoadRoots(c.RootsPEM())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// call asks over the socket.
func (g *guest) call(t *testing.T, method, path string, body []byte) (int, []byte) {
	t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		Dial: func(string, string) (net.Conn, error) { return net.Dial("unix", g.socket) }}}
	req, err := http.NewRequest(method, "http://coffer"+path, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, b
}

func (g *guest) json(t *testing.T, method, path string, body []byte) map[string]any {
	t.Helper()
	status, b := g.call(t, method, path, body)
	var v map[string]any
	if err := json.Unmarshal(b, &v); err != nil || status != http.StatusOK {
		t.Fatalf("%s %s: %d %s", method, path, status, b)
	}
	return v
}

func (g *guest) refused(t *testing.T, want int, text, method, path string, body []byte) {
	t.Helper()
	status, b := g.call(t, method, path, body)
	if status != want || !strings.Contains(string(b), text) {
		t.Errorf("%s %s: %d %.300s; want %d with %q", method, path, status, b, want, text)
	}
}

func TestReport(t *testing.T) {
	g := newGuest(t)
	data := bytes.Repeat([]byte{5}, 64)
	for _, query := range []string{"", "?vmpl=1", "?vmpl=3"} {
		status, b := g.call(t, "POST", "/v1/snp/report"+query, data)
		r, err := snp.ParseReport(b)
		if status != 200 || err != nil || !bytes.Equal(r.ReportData[:], data) {
			t.Errorf("%s: %d, %v", query, status, err)
		}
	}
	if !slices.Equal(g.vmpls, []int{1, 1, 3}) {
		t.Errorf("the chip was asked at %v", g.vmpls)
	}
	g.vmpls = nil
	g.refused(t, 403, "VMPL 0 is the agent's own", "POST", "/v1/snp/report?vmpl=0", data)
	g.refused(t, 403, "VMPL 0 is the agent's own", "POST", "/v1/snp/report?vmpl=00", data)
	g.refused(t, 403, "VMPL 0 is the agent's own", "POST", "/v1/snp/report?vmpl=-0", data)
	g.refused(t, 403, "VMPL 0", "POST", "/v1/evidence", []byte(`{"nonce":"AA==","vmpl":0}`))
	g.refused(t, 403, "VMPL 0", "POST", "/v1/snp/key", []byte(`{"root":"vcek","vmpl":0}`))
	g.refused(t, 403, "VMPL 0", "POST", "/v1/snp/key", []byte(`{"root":"vcek"}`))
	g.refused(t, 400, "VMPL 4", "POST", "/v1/snp/report?vmpl=4", data)
	g.refused(t, 400, "VMPL -1", "POST", "/v1/snp/report?vmpl=-1", data)
	g.refused(t, 400, "no number", "POST", "/v1/snp/report?vmpl=one", data)
	g.refused(t, 400, "63 bytes", "POST", "/v1/snp/report", data[:63])
	g.refused(t, 413, "too large", "POST", "/v1/snp/report", make([]byte, 1<<20))
	g.refused(t, 405, "", "GET", "/v1/snp/report", nil)
	g.refused(t, 400, "1 to 64", "POST", "/v1/evidence", []byte(`{"nonce":""}`))
	g.refused(t, 400, "unknown field", "POST", "/v1/evidence", []byte(`{"nonce":"AA==","more":1}`))
	g.refused(t, 400, "after the object", "POST", "/v1/evidence", []byte(`{"nonce":"AA=="}{}`))
	if len(g.vmpls) != 0 {
		t.Errorf("a refused request reached the chip: %v", g.vmpls)
	}
}

// A caller can verify what it got with nothing else than the roots it trusts.
func TestEvidence(t *testing.T) {
	g := newGuest(t)
	v := g.json(t, "POST", "/v1/evidence", []byte(`{"nonce":"`+base64.StdEncoding.EncodeToString([]byte("my nonce"))+`","vmpl":2}`))
	report, err := base64.StdEncoding.DecodeString(v["report"].(string))
	if err != nil {
		t.Fatal(err)
	}
	r, err := snp.ParseReport(report)
	if err != nil || string(bytes.TrimRight(r.ReportData[:], "\x00")) != "my nonce" || r.VMPL != 2 || v["simulated"] != true {
		t.Errorf("report %v, %v", r, err)
	}
	var chain []snp.Cert
	for _, c := range v["certificates"].([]any) {
		block, _ := pem.Decode([]byte(c.(map[string]any)["pem"].(string)))
		chain = append(chain, snp.Cert{Type: snp.CertType(c.(map[string]any)["type"].(string)), Data: block.Bytes})
	}
	if len(chain) != 3 {
		t.Errorf("%d certificates", len(chain))
	}
	if _, err := verify.Verify(r, chain, verify.Options{Roots: roots(t, g.chip), Now: time.Now(), MaxVMPL: 3, MinTCB: verify.DefaultMinTCB()}); err != nil {
		t.Error(err)
	}
	raw, _ := json.Marshal(v["evidence"])
	if b, certs, err := snp.ParseEvidenceJSON(raw); err != nil || !bytes.Equal(b, report) || len(certs) != 3 {
		t.Errorf("Trustee's form: %d certificates, %v", len(certs), err)
	}
}

func TestStatusAndKeys(t *testing.T) {
	g := newGuest(t)
	g.refused(t, 503, "no attestation round", "GET", "/v1/status", nil)
	g.SetRound(json.RawMessage(`{"seq":1,"verdict":"pass"}`), "pass", token(time.Now().Add(time.Hour)), 0)
	g.pass(5 * time.Second)
	g.SetRound(json.RawMessage(`{"seq":2,"verdict":"unknown"}`), "unknown", "", 90*time.Second)
	g.pass(2 * time.Second)
	s := g.json(t, "GET", "/v1/status", nil)
	if s["last_round"].(map[string]any)["seq"] != 2.0 || s["last_round_seconds_ago"] != 2.0 || s["last_pass_seconds_ago"] != 7.0 || s["check_frequency"] != 60.0 {
		t.Errorf("status %v", s)
	}
	_, metrics := g.call(t, "GET", "/v1/metrics", nil)
	for _, want := range []string{`coffer_attestation_rounds_total{verdict="pass"} 1`, `coffer_attestation_rounds_total{verdict="negative"} 0`,
		`coffer_attestation_rounds_total{verdict="unknown"} 1`, "coffer_attestation_clock_lost_seconds_total 90\n", "coffer_attestation_pass_age_seconds 7\n"} {
		if !strings.Contains(string(metrics), want) {
			t.Errorf("the metrics lack %q:\n%s", want, metrics)
		}
	}
	info := g.json(t, "GET", "/v1/info", nil)
	if info["cvm_id"] != "cvm_0123456789ab" || info["launch_digest"] != "07" || info["simulated"] != true || info["sev_status"] != 7.0 {
		t.Errorf("info %v", info)
	}
	keys := g.json(t, "GET", "/v1/keys", nil)
	if keys["kbs_ca"] != "the CA" || len(keys["snp_roots"].([]any)) != 1 {
		t.Errorf("keys %v", keys)
	}
}

func TestToken(t *testing.T) {
	g := newGuest(t)
	lasting := token(time.Now().Add(time.Hour))
	g.SetRound(json.RawMessage(`{}`), "pass", lasting, 0)
	for _, path := range []string{"/v1/token", "/aa/token?token_type=kbs"} {
		v := g.json(t, "GET", path, nil)
		if v["token"] != lasting || len(v) != 1 { // no tee_keypair: with it the disk's key could be fetched
			t.Errorf("%s: %v", path, v)
		}
	}
	if len(g.kbs.asked) != 0 {
		t.Errorf("the KBS was asked for %v", g.kbs.asked)
	}
	g.SetRound(json.RawMessage(`{}`), "pass", token(time.Now().Add(10*time.Second)), 0)
	if v := g.json(t, "GET", "/v1/token", nil); v["token"] == lasting || v["token"] == "" {
		t.Errorf("%v", v)
	}
	if !slices.Equal(g.kbs.asked, []string{g.cfg.KBS.CanaryPath}) {
		t.Errorf("the KBS was asked for %v", g.kbs.asked)
	}
	g.SetRound(json.RawMessage(`{}`), "unknown", "", 0)
	g.kbs.err = &kbsclient.Error{Status: 401, Type: "PolicyDeny"}
	g.refused(t, 403, "", "GET", "/v1/token", nil)
	g.refused(t, 400, "only kbs", "GET", "/aa/token?token_type=coco_as", nil)
}

func TestResource(t *testing.T) {
	g := newGuest(t)
	for _, prefix := range []string{"/v1/resource/", "/cdh/resource/"} {
		if status, b := g.call(t, "GET", prefix+"site/keys/model", nil); status != 200 || string(b) != "secret of site/keys/model" {
			t.Errorf("%d %s", status, b)
		}
	}
	g.kbs.asked = nil
	// The configuration's own mistake does not open the disk's key.
	g.cfg.API.Resources = append(g.cfg.API.Resources, g.cfg.KBS.KeyPath, g.cfg.KBS.CanaryPath)
	for _, path := range []string{"site/keys/other", g.cfg.KBS.KeyPath, g.cfg.KBS.CanaryPath, "keys/root/cvm_000000000000",
		"site/keys%2fmodel/x", "site/keys/../../" + g.cfg.KBS.KeyPath, "site%2f..%2fkeys/root/" + g.cfg.CVMID} {
		for _, prefix := range []string{"/v1/resource/", "/cdh/resource/"} {
			if status, b := g.call(t, "GET", prefix+path, nil); status == 200 {
				t.Errorf("%s gave %s", path, b)
			}
		}
	}
	if len(g.kbs.asked) != 0 {
		t.Errorf("the KBS was asked for %v", g.kbs.asked)
	}
	g.kbs.err = kbsclient.ErrUnreachable
	g.refused(t, 502, "", "GET", "/cdh/resource/site/keys/model", nil)
}

func TestCoCoEvidence(t *testing.T) {
	g := newGuest(t)
	_, raw := g.call(t, "GET", "/aa/evidence?runtime_data=xxxx", nil)
	b, _, err := snp.ParseEvidenceJSON(raw)
	if err != nil {
		t.Fatal(err)
	}
	if r, _ := snp.ParseReport(b); string(bytes.TrimRight(r.ReportData[:], "\x00")) != "xxxx" || r.VMPL != 1 {
		t.Errorf("%x at VMPL %d", r.ReportData, r.VMPL)
	}
	g.refused(t, 400, "", "GET", "/aa/evidence", nil)
	g.refused(t, 400, "", "GET", "/aa/evidence?runtime_data="+strings.Repeat("x", 65), nil)
}

// The loopback port serves the CoCo part alone, and only to who calls it by its name.
func TestLoopback(t *testing.T) {
	g := newGuest(t)
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go g.Serve(l, g.Loopback())
	get := func(host, path string) int {
		t.Helper()
		req, _ := http.NewRequest("GET", "http://"+l.Addr().String()+path, nil)
		req.Host = host
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	for _, tc := range []struct {
		host, path string
		want       int
	}{
		{"127.0.0.1:8006", "/aa/evidence?runtime_data=x", 200},
		{"localhost", "/cdh/resource/site/keys/model", 200},
		{"evil.example", "/cdh/resource/site/keys/model", 403},
		{"10.0.0.1", "/cdh/resource/site/keys/model", 403},
		{"127.0.0.1", "/v1/snp/report", 404},
		{"127.0.0.1", "/v1/status", 404},
	} {
		if got := get(tc.host, tc.path); got != tc.want {
			t.Errorf("%s to %s: %d, want %d", tc.path, tc.host, got, tc.want)
		}
	}
}

func TestRateLimit(t *testing.T) {
	g := newGuest(t)
	data := make([]byte, 64)
	n := 0
	for ; n < 200; n++ {
		if status, _ := g.call(t, "POST", "/v1/snp/report", data); status == http.StatusTooManyRequests {
			break
		}
	}
	if n != 20 {
		t.Errorf("%d reports at once", n)
	}
	g.pass(time.Second)
	for want := range 3 {
		status, _ := g.call(t, "POST", "/v1/snp/report", data)
		if ok := status == 200; ok != (want < 2) {
			t.Errorf("request %d after a second: %d", want, status)
		}
	}
	// What asks nobody is not limited, nor does it wait.
	if status, _ := g.call(t, "GET", "/v1/info", nil); status != 200 {
		t.Error(status)
	}
}

func TestSampleEvidence(t *testing.T) {
	g := newGuest(t)
	g.cfg.TEE = "sample"
	g.refused(t, 501, "sample evidence", "POST", "/v1/snp/report", make([]byte, 64))
}

// Our snpguest and the API fit together: what NVFlare calls, in its order.
func TestSnpguest(t *testing.T) {
	g := newGuest(t)
	t.Chdir(t.TempDir())
	run := func(args ...string) (int, string, string) {
		var out, errs bytes.Buffer
		began := time.Now()
		code := snpguest.Run(args, snpguest.Env{Stdout: &out, Stderr: &errs, Socket: g.socket, Now: time.Now(), Roots: roots(t, g.chip)})
		t.Logf("%v: %s", args, time.Since(began))
		return code, out.String(), errs.String()
	}
	must := func(args ...string) string {
		t.Helper()
		code, out, errs := run(args...)
		if code != 0 {
			t.Fatalf("%v: code %d, %s", args, code, errs)
		}
		return out
	}
	nonce := bytes.Repeat([]byte{0xab}, 64)
	if err := os.WriteFile("request.bin", nonce, 0o600); err != nil {
		t.Fatal(err)
	}
	must("report", "report.bin", "request.bin")
	must("fetch", "ca", "pem", "certs", "milan")
	must("fetch", "vcek", "pem", "certs", "report.bin")
	if out := must("verify", "certs", "certs"); strings.Count(out, "\n") != 3 {
		t.Error(out)
	}
	if out := must("verify", "attestation", "certs", "report.bin"); !strings.HasSuffix(out, "VEK signed the Attestation Report!\n") {
		t.Error(out)
	}
	if out := must("display", "report", "report.bin"); !strings.Contains(out, "\nVMPL:                         1\n") || !strings.Contains(out, "AB AB AB") {
		t.Error(out)
	}
	must("report", "-r", "-v", "3", "random.bin", "data.bin")
	b, _ := os.ReadFile("random.bin")
	data, _ := os.ReadFile("data.bin")
	if r, err := snp.ParseReport(b); err != nil || !bytes.Equal(r.ReportData[:], data) || r.VMPL != 3 {
		t.Errorf("random: %v", err)
	}
	must("certificates", "der", "host")
	for _, name := range []string{"ark", "ask", "vcek"} {
		b, err := os.ReadFile("host/" + name + ".der")
		if err == nil {
			_, err = x509.ParseCertificate(b)
		}
		if err != nil {
			t.Error(err)
		}
	}
	must("key", "derived", "vcek", "-v", "2", "-g", "000001")
	if b, _ := os.ReadFile("derived"); !bytes.Equal(b, bytes.Repeat([]byte{2}, 32)) {
		t.Errorf("derived key is %x", b)
	}
	if out := must("ok"); strings.Count(out, "PASS") != 17 || !strings.Contains(out, "- SNP: ENABLED\n") || !strings.Contains(out, "  - VTOM: DISABLED\n") {
		t.Error(out)
	}
	before := len(g.vmpls)
	for _, args := range [][]string{
		{"report", "no.bin", "request.bin", "-v", "0"},
		{"key", "no.bin", "vcek", "--vmpl=0"},
		{"report", "no.bin", "request.bin", "-v", "9"},
		{"fetch", "crl", "pem", "certs", "genoa"}, // no KDS
	} {
		if code, _, errs := run(args...); code != 1 || errs == "" {
			t.Errorf("%v: code %d, %q", args, code, errs)
		}
	}
	if _, err := os.Stat("no.bin"); !errors.Is(err, os.ErrNotExist) || len(g.vmpls) != before {
		t.Errorf("a refused request left a file or reached the chip: %v, %v", err, g.vmpls[before:])
	}
	// Garbage of a peer is refused and leaves the good certificate alone.
	good, _ := os.ReadFile("certs/vcek.pem")
	r, _ := snp.ParseReport(b)
	r.ChipID[0]++
	if err := os.WriteFile("peer.bin", r.Marshal(), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, _ := run("fetch", "vcek", "pem", "certs", "peer.bin"); code != 1 {
		t.Error("a certificate was given for another chip")
	}
	if now, _ := os.ReadFile("certs/vcek.pem"); !bytes.Equal(now, good) {
		t.Error("vcek.pem was overwritten")
	}
	g.cfg.Peers.Measurements = []string{strings.Repeat("00", 48)}
	if code, _, errs := run("verify", "attestation", "certs", "report.bin"); code != 1 || !strings.Contains(errs, "none of the 1") {
		t.Errorf("a measurement that is not listed: code %d, %s", code, errs)
	}
}

// docs/api.yaml names what is served, and nothing else.
func TestDocument(t *testing.T) {
	text, err := os.ReadFile("../../docs/api.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var doc struct {
		OpenAPI string                    `yaml:"openapi"`
		Paths   map[string]map[string]any `yaml:"paths"`
	}
	if err := yaml.Unmarshal(text, &doc); err != nil || !strings.HasPrefix(doc.OpenAPI, "3.") {
		t.Fatalf("%q, %v", doc.OpenAPI, err)
	}
	var got []string
	for path, methods := range doc.Paths {
		for m := range methods {
			got = append(got, strings.ToUpper(m)+" "+path)
		}
	}
	slices.Sort(got)
	if want := api.Routes(); !slices.Equal(got, want) {
		t.Errorf("the document has\n%s\nserved is\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}
