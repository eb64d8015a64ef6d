package kbs

import (
	"bytes"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"coffer/internal/snp"
	"coffer/test/simsnp"
)

func derOf(c *simsnp.Chip) []byte {
	for _, cert := range c.Certs() {
		if cert.Type == snp.VCEK {
			return cert.Data
		}
	}
	return nil
}

// attestWithout attests with a report and no certificates.
func (r *rig) attestWithout(chip *simsnp.Chip) answer {
	r.t.Helper()
	g := r.guest("snp").auth()
	return g.attest(g.attestBody(g.evidence(chip, nil, nil), ""))
}

func TestKDS(t *testing.T) {
	for product, query := range map[string]string{
		"Genoa": "blSPL=10&teeSPL=00&snpSPL=23&ucodeSPL=84",
		"Turin": "fmcSPL=01&blSPL=01&teeSPL=01&snpSPL=04&ucodeSPL=71",
	} {
		t.Run(product, func(t *testing.T) {
			chip := newChip(t, simsnp.Params{Product: product})
			id := chip.ChipID[:]
			if product == "Turin" {
				id = id[:8]
			}
			var asked atomic.Int32
			var answer atomic.Pointer[[]byte] // nil: 429
			mirror := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
				asked.Add(1)
				if want := "/mirror/vcek/v1/" + product + "/" + hex.EncodeToString(id) + "?" + query; q.URL.RequestURI() != want {
					t.Errorf("asked for %s, want %s", q.URL.RequestURI(), want)
				}
				if b := answer.Load(); b != nil {
					w.Write(*b)
					return
				}
				w.WriteHeader(http.StatusTooManyRequests)
			}))
			defer mirror.Close()
			r := newRig(t, Options{AllowSimulated: true, SimulatedRoots: chip.RootsPEM(), MinTCB: map[string]snp.TCB{product: {}}, KDS: mirror.URL + "/mirror/"})
			expect := func(what string, status int, asks int32, reason string) {
				t.Helper()
				asked.Store(0)
				a := r.attestWithout(chip)
				if a.status != status || asked.Load() != asks || !strings.Contains(fmt.Sprint(r.log.last(t)["reason"]), reason) {
					t.Errorf("%s: %d, asked %d times, %v; want %d, %d times, %q", what, a.status, asked.Load(), r.log.last(t)["reason"], status, asks, reason)
				}
			}
			expect("mirror that refuses", 401, 1, "HTTP 429")
			expect("right after a failure", 401, 0, "failed a moment ago")
			r.clock.add(kdsAgain)
			big := bytes.Repeat([]byte{1}, kdsMaxBody+1)
			answer.Store(&big)
			expect("endless answer", 401, 1, "larger than")
			r.clock.add(kdsAgain)
			other := derOf(newChip(t, simsnp.Params{Product: product}))
			answer.Store(&other)
			expect("another chip's certificate", 401, 1, "chain")
			files, _ := filepath.Glob(filepath.Join(r.dir, vcekDir, "*", "*"))
			if len(files) != 0 {
				t.Errorf("kept what did not verify: %v", files)
			}
			der := derOf(chip)
			answer.Store(&der)
			expect("good mirror", 200, 1, "")
			expect("kept certificate", 200, 0, "")
		})
	}
	if _, err := newKDS("ftp://kds.example", time.Now); err == nil {
		t.Error("an ftp address was accepted")
	}
	chip := newChip(t, simsnp.Params{})
	masked, err := chip.Report(measurement, [64]byte{}, 0)
	if err != nil {
		t.Fatal(err)
	}
	masked.ChipID = [64]byte{}
	if _, err := kdsPath(masked); err == nil || !strings.Contains(err.Error(), "masks") {
		t.Errorf("masked chip id: %v", err)
	}
}

// TestGenerations: each product and version, in both dialects.
func TestGenerations(t *testing.T) {
	for _, p := range []struct {
		name, product string
		family, model uint8
	}{{"Milan", "Milan", 0x19, 0x01}, {"Genoa", "Genoa", 0x19, 0x11}, {"Bergamo and Siena", "Genoa", 0x19, 0xa0}, {"Turin", "Turin", 0x1a, 0x02}} {
		t.Run(p.name, func(t *testing.T) {
			chip := newChip(t, simsnp.Params{Product: p.product})
			dialects(t, func(t *testing.T, d Dialect) {
				r := newRig(t, Options{Dialect: d, AllowSimulated: true, SimulatedRoots: chip.RootsPEM(), MinTCB: map[string]snp.TCB{p.product: chip.TCB}})
				for version := uint32(3); version <= 5; version++ {
					g := r.guest("snp").auth()
					raw := g.evidence(chip, chip.Certs(), func(r *snp.Report) { r.Version, r.CPUFamily, r.CPUModel = version, p.family, p.model })
					a := g.attest(g.attestBody(raw, ""))
					want := 200
					if version == 5 && d == DialectT {
						want = 401
					}
					if a.status != want {
						t.Errorf("version %d: %d, want %d\n%v", version, a.status, want, r.log.last(t))
					}
					if a.status != 200 {
						continue
					}
					claims, err := r.server.tokens.verify(tokenIn(t, a), time.Now())
					if err != nil || evidenceOf(claims)["product"] != p.product {
						t.Errorf("version %d: product %v (%v), want %s", version, evidenceOf(claims)["product"], err, p.product)
					}
				}
			})
		})
	}
}

func TestMinTCB(t *testing.T) {
	chip := newChip(t, simsnp.Params{})
	for _, tt := range []struct {
		name   string
		min    map[string]snp.TCB
		status int
		reason string
	}{
		{"default", nil, 200, ""},
		{"reached", map[string]snp.TCB{"Genoa": chip.TCB}, 200, ""},
		{"above", map[string]snp.TCB{"Genoa": {Bootloader: 10, SNP: 24, Microcode: 84}}, 401, "TCB"},
		{"other product only", map[string]snp.TCB{"Turin": {}}, 401, "no minimum"},
	} {
		r := newRig(t, Options{AllowSimulated: true, SimulatedRoots: chip.RootsPEM(), MinTCB: tt.min})
		g := r.guest("snp").auth()
		a := g.attest(g.attestBody(g.evidence(chip, chip.Certs(), nil), ""))
		if l := r.log.last(t); a.status != tt.status || !strings.Contains(fmt.Sprint(l["reason"]), tt.reason) {
			t.Errorf("%s: %d %v, want %d %q", tt.name, a.status, l["reason"], tt.status, tt.reason)
		}
	}
}

func TestInitData(t *testing.T) {
	chip := newChip(t, simsnp.Params{})
	const body = "version = \"0.1.0\"\nalgorithm = \"sha384\"\n[data]\n\"site\" = \"one\"\n"
	sum := sha512.Sum384([]byte(body))
	text, _ := json.Marshal(body)
	good := `{"format":"toml","body":` + string(text) + `}`
	r := newRig(t, Options{AllowSimulated: true, SimulatedRoots: chip.RootsPEM()})
	for _, tt := range []struct {
		name, init string
		hostData   []byte
		status     int
		reason     string
	}{
		{"bound", good, sum[:32], 200, ""},
		{"not bound", good, nil, 401, "HOST_DATA"},
		{"bound to other text", good, bytes.Repeat([]byte{1}, 32), 401, "HOST_DATA"},
		{"host data without text", "null", sum[:32], 200, ""},
		{"other format", `{"format":"json","body":"{}"}`, nil, 401, "must be toml"},
		{"no TOML", `{"format":"toml","body":"="}`, nil, 401, "init-data"},
		{"no table", `{"format":"toml","body":"version=\"1\"\nalgorithm=\"sha256\""}`, nil, 401, "missing"},
		{"other algorithm", `{"format":"toml","body":"version=\"1\"\nalgorithm=\"md5\"\n[data]\n"}`, nil, 401, "algorithm"},
		{"values that are no strings", `{"format":"toml","body":"version=\"1\"\nalgorithm=\"sha256\"\n[data]\nx=1\n"}`, nil, 401, "init-data"},
	} {
		g := r.guest("snp").auth()
		raw := g.evidence(chip, chip.Certs(), func(r *snp.Report) { copy(r.HostData[:], tt.hostData) })
		a := g.attest(bytes.Replace(g.attestBody(raw, ""), []byte(`"init-data":null`), []byte(`"init-data":`+tt.init), 1))
		if l := r.log.last(t); a.status != tt.status || !strings.Contains(fmt.Sprint(l["reason"]), tt.reason) {
			t.Errorf("%s: %d %v, want %d %q", tt.name, a.status, l["reason"], tt.status, tt.reason)
		}
		if tt.name == "bound" {
			claims, err := r.server.tokens.verify(tokenIn(t, a), time.Now())
			if got := keysOf(evidenceOf(claims)["init_data_claims"].(map[string]any)); err != nil || got != "{site}" {
				t.Errorf("init_data_claims %s, %v", got, err)
			}
		}
	}
}

func TestMetrics(t *testing.T) {
	r := ready(t, DialectT)
	g := r.guest("sample")
	g.attested()
	g.get(keyPath)
	bad := r.guest("sample").auth()
	bad.attest(bad.attestBody(sampleEvidence([48]byte{}), ""))
	r.do("POST", "/kbs/v0/attest", []byte("x"))
	text := string(r.do("GET", "/metrics", nil).body)
	for _, want := range []string{
		"# TYPE auth_requests_total counter\nauth_requests_total 2\n",
		"auth_successes_total 2\n",
		"attestation_requests_total 3\n",
		"attestation_successes_total{tee_type=\"sample\"} 1\n",
		"attestation_failures_total{tee_type=\"sample\"} 1\n",
		"attestation_errors_total 1\n",
		"kbs_policy_approvals_total 1\n",
		"kbs_policy_violations_total 0\n",
		"resource_reads_total 1\n",
		"resource_writes_total 1\n",
		"# TYPE http_request_duration_seconds histogram\n",
		"http_request_duration_seconds_bucket{le=\"+Inf\"} 8\n",
		"http_request_duration_seconds_count 8\n",
		"http_requests_total 8\n",
		"http_response_size_bytes_bucket{le=\"128\"} ",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	if strings.Contains(text, "keys/root") {
		t.Error("a resource's path is told to everybody")
	}
}

func TestRate(t *testing.T) {
	r := newRig(t, Options{AllowSimulated: true, Rate: 2})
	for i := range 2 * burstSeconds {
		if a := r.do("GET", "/healthz", nil); a.status != 200 {
			t.Fatalf("request %d: %d", i, a.status)
		}
	}
	// The requests took a moment, too; a second of it is worth two more.
	status := 200
	for range 2 * burstSeconds {
		if status = r.do("GET", "/healthz", nil).status; status == 429 {
			break
		}
	}
	if status != 429 {
		t.Errorf("beyond the rate: %d, want 429", status)
	}
	r.clock.add(time.Second)
	if a := r.do("GET", "/healthz", nil); a.status != 200 {
		t.Errorf("a second later: %d", a.status)
	}

	now := time.Now()
	l := limiter{rate: 1, now: func() time.Time { return now }, buckets: map[string]*bucket{}}
	for i := range maxBuckets + 10 {
		l.allow(fmt.Sprintf("10.%d.%d.%d:1", i>>16, i>>8&255, i&255))
	}
	if len(l.buckets) > maxBuckets {
		t.Errorf("%d addresses remembered", len(l.buckets))
	}
	for i := range burstSeconds + 1 {
		if got := l.allow(fmt.Sprintf("[2001:db8::%d]:1", i+1)); got != (i < burstSeconds) {
			t.Errorf("request %d of a /64: %v", i, got)
		}
	}
}

func TestAdminIssuer(t *testing.T) {
	dialects(t, func(t *testing.T, d Dialect) {
		r := newRig(t, Options{Dialect: d, AdminIssuer: "x", AdminAudience: "kbs"})
		if a := r.asAdmin("POST", "/kbs/v0/resource/a/b/c", []byte("x")); a.status != 200 { // iss x, aud kbs
			t.Errorf("right issuer: %d %s", a.status, a.body)
		}
		r.server.admin.issuer = "nvflare"
		if a := r.asAdmin("POST", "/kbs/v0/resource/a/b/c", []byte("x")); (a.status == 200) != (d == DialectT) {
			t.Errorf("other issuer: %d %s", a.status, a.body)
		}
		r.server.admin.issuer, r.server.admin.audience = "x", "other"
		if a := r.asAdmin("POST", "/kbs/v0/resource/a/b/c", []byte("x")); (a.status == 200) != (d == DialectT) {
			t.Errorf("other audience: %d %s", a.status, a.body)
		}
	})
}

// TestFilesArePrivate: what the server writes, nobody else can read.
func TestFilesArePrivate(t *testing.T) {
	r := ready(t, DialectT)
	err := filepath.Walk(r.dir, func(path string, fi os.FileInfo, err error) error {
		if err == nil && fi.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", path, fi.Mode().Perm())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func FuzzInitData(f *testing.F) {
	f.Add([]byte(`{"format":"toml","body":"version=\"1\"\nalgorithm=\"sha256\"\n[data]\nx=\"y\"\n"}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if d, err := parseInitData(b); err == nil && d != nil && d.hostData == [32]byte{} {
			t.Error("accepted without a digest")
		}
	})
}
