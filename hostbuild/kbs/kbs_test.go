package kbs

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// rig is a server over TLS on loopback.
type rig struct {
	t      testing.TB
	dir    string
	url    string
	server *Server
	client *http.Client
	admin  ed25519.PrivateKey
	log    *lines
	clock  *clock
}

// lines collects the audit.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// last returns the last line as JSON.
func (l *lines) last(t testing.TB) map[string]any {
	t.Helper()
	all := strings.Split(strings.TrimSpace(l.String()), "\n")
	var m map[string]any
	if err := json.Unmarshal([]byte(all[len(all)-1]), &m); err != nil {
		t.Fatal(err)
	}
	return m
}

// reason fails the test unless the last decision was refused for that reason.
func (r *rig) reason(want string) {
	r.t.Helper()
	l := r.log.last(r.t)
	if got, _ := l["reason"].(string); got == "" || !strings.Contains(got, want) || l["msg"] != refused && l["msg"] != denied {
		r.t.Errorf("audit line %v, want the reason %q", l, want)
	}
}

// clock is a time that tests move.
type clock struct {
	mu  sync.Mutex
	off time.Duration
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Add(c.off)
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.off += d
}

func newRig(t testing.TB, o Options) *rig {
	t.Helper()
	r := &rig{t: t, dir: filepath.Join(t.TempDir(), "kbs"), log: new(lines), clock: new(clock)}
	if err := Init(r.dir, Options{Hosts: []string{"127.0.0.1", "kbs.example"}}); err != nil {
		t.Fatal(err)
	}
	r.admin = readKey(t, filepath.Join(r.dir, adminKeyFile)).(ed25519.PrivateKey)
	o.Dir, o.Now, o.Logger = r.dir, r.clock.now, slog.New(slog.NewJSONHandler(r.log, nil))
	var err error
	if r.server, err = New(o); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r.url = "https://" + ln.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- r.server.Serve(ctx, ln) }()
	ca, err := os.ReadFile(filepath.Join(r.dir, caCertFile))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	r.client = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, ExpectContinueTimeout: 10 * time.Second}, Timeout: 30 * time.Second}
	t.Cleanup(func() {
		r.client.CloseIdleConnections()
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return r
}

func readKey(t testing.TB, file string) any {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// answer is a response, read.
type answer struct {
	status int
	header http.Header
	body   []byte
}

// errType is the last element of an error's type.
func (a answer) errType() string {
	var e struct{ Type, Detail string }
	if json.Unmarshal(a.body, &e) != nil {
		return ""
	}
	return strings.TrimPrefix(e.Type, errorBase)
}

func (a answer) detail() string {
	var e struct{ Type, Detail string }
	json.Unmarshal(a.body, &e)
	return e.Detail
}

func (r *rig) do(method, path string, body []byte, header ...string) answer {
	r.t.Helper()
	req, err := http.NewRequest(method, r.url+path, bytes.NewReader(body))
	if err != nil {
		r.t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := r.client.Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	return answer{resp.StatusCode, resp.Header, b}
}

// token signs an admin token.
func adminToken(t testing.TB, alg jose.SignatureAlgorithm, key any, claims map[string]any) string {
	t.Helper()
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		t.Fatal(err)
	}
	tok, err := jwt.Signed(s).Claims(claims).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

func (r *rig) adminHeader() string {
	now := r.clock.now().Unix()
	return "Bearer " + adminToken(r.t, jose.EdDSA, r.admin, map[string]any{"iat": now, "nbf": now, "exp": now + 60, "role": "admin", "iss": "x", "aud": "kbs"})
}

func (r *rig) asAdmin(method, path string, body []byte) answer {
	r.t.Helper()
	return r.do(method, path, body, "Authorization", r.adminHeader())
}

func (r *rig) mustAdmin(method, path string, body []byte) answer {
	r.t.Helper()
	a := r.asAdmin(method, path, body)
	if a.status != 200 {
		r.t.Fatalf("%s %s: %d %s", method, path, a.status, a.body)
	}
	return a
}

func policyBody(text string) []byte {
	return []byte(`{"policy":"` + base64.RawURLEncoding.EncodeToString([]byte(text)) + `"}`)
}

func (r *rig) setPolicy(text string) {
	r.t.Helper()
	r.mustAdmin("POST", "/kbs/v0/resource-policy", policyBody(text))
}

const (
	allowAll = "package policy\ndefault allow = true\n"
	secret   = "luks-key-0123456789abcdef"
	keyPath  = "keys/root/one"
)

// guest is one client: a key, and a session after auth.
type guest struct {
	*rig
	tee    string
	key    *ecdsa.PrivateKey
	jwk    map[string]string
	cookie string
	nonce  string
}

func (r *rig) guest(tee string) *guest {
	r.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		r.t.Fatal(err)
	}
	b, err := key.PublicKey.Bytes()
	if err != nil {
		r.t.Fatal(err)
	}
	return &guest{rig: r, tee: tee, key: key, jwk: map[string]string{"kty": "EC", "crv": "P-256", "alg": algECDH,
		"x": b64.EncodeToString(b[1:33]), "y": b64.EncodeToString(b[33:])}}
}

func (g *guest) auth() *guest {
	g.t.Helper()
	a := g.do("POST", "/kbs/v0/auth", []byte(`{"version":"0.4.0","tee":"`+g.tee+`","extra-params":{}}`))
	var c struct{ Nonce string }
	if err := json.Unmarshal(a.body, &c); err != nil || a.status != 200 {
		g.t.Fatalf("auth: %d %s", a.status, a.body)
	}
	g.nonce = c.Nonce
	g.cookie, _, _ = strings.Cut(a.header.Get("Set-Cookie"), ";")
	return g
}

// digest is computed here a second time, as a client would.
func (g *guest) digest() [48]byte {
	return bound{nonce: g.nonce, key: g.jwk}.digest()
}

func sampleEvidence(d [48]byte) json.RawMessage {
	return json.RawMessage(`{"svn":"1","report_data":"` + base64.StdEncoding.EncodeToString(d[:]) + `"}`)
}

func (g *guest) attestBody(primary json.RawMessage, additional string) []byte {
	g.t.Helper()
	b, err := json.Marshal(map[string]any{
		"init-data":    nil,
		"runtime-data": map[string]any{"nonce": g.nonce, "tee-pubkey": g.jwk},
		"tee-evidence": map[string]any{"primary_evidence": primary, "additional_evidence": additional},
	})
	if err != nil {
		g.t.Fatal(err)
	}
	return b
}

func (g *guest) attest(body []byte) answer {
	g.t.Helper()
	return g.do("POST", "/kbs/v0/attest", body, "Cookie", g.cookie)
}

// attested does auth and attest with sample evidence and returns the token.
func (g *guest) attested() string {
	g.t.Helper()
	g.auth()
	a := g.attest(g.attestBody(sampleEvidence(g.digest()), ""))
	if a.status != 200 {
		g.t.Fatalf("attest: %d %s\n%s", a.status, a.body, g.log)
	}
	return tokenIn(g.t, a)
}

func tokenIn(t testing.TB, a answer) string {
	t.Helper()
	var m struct{ Token string }
	if err := json.Unmarshal(a.body, &m); err != nil || m.Token == "" {
		t.Fatalf("no token in %s", a.body)
	}
	return m.Token
}

func (g *guest) get(path string) answer {
	g.t.Helper()
	return g.do("GET", "/kbs/v0/resource/"+path, nil, "Cookie", g.cookie)
}

func decrypt(t testing.TB, body []byte, key any) string {
	t.Helper()
	obj, err := jose.ParseEncryptedJSON(string(body), []jose.KeyAlgorithm{jose.ECDH_ES_A256KW, jose.RSA_OAEP_256}, []jose.ContentEncryption{jose.A256GCM})
	if err != nil {
		t.Fatalf("%v in %s", err, body)
	}
	plain, err := obj.Decrypt(key)
	if err != nil {
		t.Fatal(err)
	}
	return string(plain)
}

func dialects(t *testing.T, f func(t *testing.T, d Dialect)) {
	for _, d := range []Dialect{DialectT, DialectH} {
		t.Run(string(d), func(t *testing.T) { f(t, d) })
	}
}

// ready is a rig with one resource and a policy that allows everything.
func ready(t testing.TB, d Dialect) *rig {
	t.Helper()
	r := newRig(t, Options{Dialect: d, AllowSimulated: true})
	r.mustAdmin("POST", "/kbs/v0/resource/"+keyPath, []byte(secret))
	r.setPolicy(allowAll)
	return r
}

func TestSampleFlow(t *testing.T) {
	dialects(t, func(t *testing.T, d Dialect) {
		r := newRig(t, Options{Dialect: d, AllowSimulated: true})
		r.mustAdmin("POST", "/kbs/v0/resource/"+keyPath, []byte(secret))
		g := r.guest("sample")
		token := g.attested()
		if a := g.get(keyPath); a.status != 401 || a.errType() != "PolicyDeny" {
			t.Errorf("under the first policy: %d %s, want PolicyDeny", a.status, a.body)
		}
		r.setPolicy(allowAll)
		a := g.get(keyPath)
		if a.status != 200 || decrypt(t, a.body, g.key) != secret {
			t.Fatalf("get: %d %s", a.status, a.body)
		}
		l := r.log.last(t)
		if l["msg"] != "released" || l["path"] != keyPath || l["tee"] != "sample" || l["simulated"] != true || l["action"] != "release" {
			t.Errorf("audit line %v", l)
		}
		a = r.do("GET", "/kbs/v0/resource/"+keyPath, nil, "Authorization", "Bearer "+token)
		if a.status != 200 || decrypt(t, a.body, g.key) != secret {
			t.Errorf("get by bearer token: %d %s", a.status, a.body)
		}
		if strings.Contains(r.log.String(), secret) || strings.Contains(r.log.String(), token) {
			t.Error("the audit holds a secret")
		}
		if !strings.Contains(r.log.String(), "SIMULATED evidence is accepted") {
			t.Error("no startup line says that simulated evidence is accepted")
		}
	})
}

// TestSampleNeedsPermission: without the flag sample evidence gets nowhere.
func TestSampleNeedsPermission(t *testing.T) {
	r := newRig(t, Options{})
	g := r.guest("sample").auth()
	if a := g.attest(g.attestBody(sampleEvidence(g.digest()), "")); a.status != 401 || a.errType() != "AttestationError" {
		t.Errorf("attest: %d %s", a.status, a.body)
	}
	if l := r.log.last(t); !strings.Contains(fmt.Sprint(l["reason"]), "not allowed") {
		t.Errorf("audit line %v", l)
	}
}

func TestAttestRefuses(t *testing.T) {
	r := ready(t, DialectT)
	other := r.guest("sample").auth()
	tests := []struct {
		name   string
		body   func(g *guest) []byte
		reason string
	}{
		{"not JSON", func(*guest) []byte { return []byte("{") }, "EOF"},
		{"empty object", func(*guest) []byte { return []byte("{}") }, "runtime-data"},
		{"something behind", func(g *guest) []byte { return append(g.attestBody(sampleEvidence(g.digest()), ""), "{}"...) }, "behind"},
		{"nonce of another session", func(g *guest) []byte {
			g.nonce = other.nonce
			return g.attestBody(sampleEvidence(g.digest()), "")
		}, "nonce"},
		{"evidence for another key", func(g *guest) []byte { return g.attestBody(sampleEvidence(other.digest()), "") }, "report_data"},
		{"padded report_data", func(g *guest) []byte {
			d := g.digest()
			return g.attestBody(json.RawMessage(`{"svn":"1","report_data":"`+base64.StdEncoding.EncodeToString(append(d[:], make([]byte, 16)...))+`"}`), "")
		}, "report_data"},
		{"evidence as a string", func(g *guest) []byte { return g.attestBody(json.RawMessage(`"{}"`), "") }, "not a JSON object"},
		{"device evidence", func(g *guest) []byte { return g.attestBody(sampleEvidence(g.digest()), `{"nvidia":{}}`) }, "additional (device) evidence"},
		{"additional_evidence null", func(g *guest) []byte {
			return bytes.Replace(g.attestBody(sampleEvidence(g.digest()), ""), []byte(`"additional_evidence":""`), []byte(`"additional_evidence":null`), 1)
		}, "additional_evidence"},
		{"member twice", func(g *guest) []byte {
			return bytes.Replace(g.attestBody(sampleEvidence(g.digest()), ""), []byte(`"nonce":`), []byte(`"nonce":"x","nonce":`), 1)
		}, "twice"},
		{"other case", func(g *guest) []byte {
			return bytes.Replace(g.attestBody(sampleEvidence(g.digest()), ""), []byte(`"runtime-data"`), []byte(`"Runtime-Data"`), 1)
		}, "runtime-data"},
		{"init-data", func(g *guest) []byte {
			return bytes.Replace(g.attestBody(sampleEvidence(g.digest()), ""), []byte(`"init-data":null`), []byte(`"init-data":{"format":"toml","body":""}`), 1)
		}, "init-data"},
		{"no kty", func(g *guest) []byte {
			delete(g.jwk, "kty")
			return g.attestBody(sampleEvidence(g.digest()), "")
		}, "kty"},
		{"key with other members", func(g *guest) []byte {
			g.jwk["kty"] = "RSA"
			return g.attestBody(sampleEvidence(g.digest()), "")
		}, `"n" is missing`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := r.guest("sample").auth()
			nonce, jwk := g.nonce, map[string]string{}
			for k, v := range g.jwk {
				jwk[k] = v
			}
			a := g.attest(tt.body(g))
			if a.status != 401 || a.errType() != "AttestationError" || a.detail() != "Attestation error: RCAR handshake Attest failed" {
				t.Errorf("answer %d %s", a.status, a.body)
			}
			if l := r.log.last(t); l["msg"] != "refused" || !strings.Contains(fmt.Sprint(l["reason"]), tt.reason) {
				t.Errorf("audit line %v, want the reason %q", l, tt.reason)
			}
			if a := g.get(keyPath); a.errType() != "TokenNotFound" {
				t.Errorf("get after it: %d %s, want TokenNotFound", a.status, a.body)
			}
			// A refused attempt does not use up the nonce.
			g.nonce, g.jwk = nonce, jwk
			if a := g.attest(g.attestBody(sampleEvidence(g.digest()), "")); a.status != 200 {
				t.Errorf("a good attempt after it: %d %s", a.status, a.body)
			}
		})
	}
}

func TestAttestReplay(t *testing.T) {
	dialects(t, func(t *testing.T, d Dialect) {
		r := ready(t, d)
		g := r.guest("sample").auth()
		body := g.attestBody(sampleEvidence(g.digest()), "")
		first := tokenIn(t, g.attest(body))
		if again := tokenIn(t, g.attest(body)); again != first {
			t.Error("an attested session gives another token")
		}
		if a := r.do("POST", "/kbs/v0/attest", body, "Cookie", r.guest("sample").auth().cookie); a.status != 401 {
			t.Errorf("the same body in another session: %d", a.status)
		}
		r.reason("the nonce is not this session's")
		for _, cookie := range []string{"", cookieName + "=" + strings.Repeat("0", 32), "x=y"} {
			if a := r.do("POST", "/kbs/v0/attest", body, "Cookie", cookie); a.status != 401 || a.errType() != "AttestationError" {
				t.Errorf("cookie %q: %d %s", cookie, a.status, a.body)
			}
			r.reason("no cookie of a live session")
		}
		// The session's five minutes are not extended.
		r.clock.add(sessionLife - time.Second)
		if a := g.get(keyPath); a.status != 200 {
			t.Errorf("before the session's end: %d %s", a.status, a.body)
		}
		r.clock.add(time.Second)
		if a := g.get(keyPath); a.errType() != "TokenNotFound" {
			t.Errorf("after the session's end: %d %s", a.status, a.body)
		}
		if a := g.attest(body); a.status != 401 {
			t.Errorf("attest after the session's end: %d", a.status)
		}
		// The token has a minute of leeway, and then ends, too.
		if a := r.do("GET", "/kbs/v0/resource/"+keyPath, nil, "Authorization", "Bearer "+first); a.status != 200 {
			t.Errorf("bearer token within the leeway: %d %s", a.status, a.body)
		}
		r.clock.add(tokenLeeway + time.Second)
		if a := r.do("GET", "/kbs/v0/resource/"+keyPath, nil, "Authorization", "Bearer "+first); a.errType() != "TokenVerifierError" {
			t.Errorf("expired bearer token: %d %s", a.status, a.body)
		}
		r.reason("the token has expired")
	})
}

func TestOtherSessionsCookie(t *testing.T) {
	r := ready(t, DialectT)
	a, b := r.guest("sample"), r.guest("sample")
	a.attested()
	b.auth()
	b.cookie = a.cookie // b takes a's cookie: what it gets is sealed to a's key
	got := b.get(keyPath)
	obj, err := jose.ParseEncryptedJSON(string(got.body), []jose.KeyAlgorithm{jose.ECDH_ES_A256KW}, []jose.ContentEncryption{jose.A256GCM})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := obj.Decrypt(b.key); err == nil {
		t.Error("the thief of a cookie can read the resource")
	}
}

// TestForgedToken: a token with a key of one's own in its header counts nothing.
func TestForgedToken(t *testing.T) {
	r := ready(t, DialectT)
	g := r.guest("sample")
	good := g.attested()
	key, err := newP256()
	if err != nil {
		t.Fatal(err)
	}
	x, y, _ := coordinates(&key.PublicKey)
	header, _ := json.Marshal(map[string]any{"typ": "JWT", "alg": "ES256", "jwk": map[string]any{
		"alg": "ES256", "kty": "EC", "crv": "P-256", "x": b64.EncodeToString(x), "y": b64.EncodeToString(y)}})
	forger := &signer{key: key, dialect: DialectT, header: b64.EncodeToString(header)}
	forged, err := forger.issue(map[string]any{"runtime_data_claims": map[string]any{"tee-pubkey": g.jwk}, "snp": map[string]any{"measurement": "x"}}, appraisal{}, nil, false, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	parts := strings.Split(good, ".")
	none := b64.EncodeToString([]byte(`{"alg":"none"}`))
	for _, tt := range []struct{ name, token, reason string }{
		{"self-signed", forged, "the signature is not this server's"},
		{"no signature", parts[0] + "." + parts[1] + ".", "not a token"},
		{"alg none", none + "." + parts[1] + ".", "not a token"},
		{"alg none, signed", none + "." + parts[1] + "." + parts[2], "not an ES256 token"},
		{"other payload", parts[0] + "." + strings.Split(forged, ".")[1] + "." + parts[2], "the signature is not this server's"},
		{"two parts", parts[0] + "." + parts[2], "not a token"},
		{"garbage", "garbage", "not a token"},
		{"admin token", strings.TrimPrefix(r.adminHeader(), "Bearer "), "not an ES256 token"},
	} {
		a := r.do("GET", "/kbs/v0/resource/"+keyPath, nil, "Authorization", "Bearer "+tt.token)
		if a.status != 401 || a.errType() != "TokenVerifierError" {
			t.Errorf("%s: %d %s, want TokenVerifierError", tt.name, a.status, a.body)
		}
		r.reason(tt.reason)
	}
	for name, h := range map[string]string{"basic": "Basic YTpi", "lower case": "bearer " + good, "empty": "Bearer "} {
		if a := r.do("GET", "/kbs/v0/resource/"+keyPath, nil, "Authorization", h); a.errType() != "TokenNotFound" {
			t.Errorf("%s: %d %s, want TokenNotFound", name, a.status, a.body)
		}
		r.reason(errTokenNotFound.Error())
	}
}

func TestTokenForms(t *testing.T) {
	dialects(t, func(t *testing.T, d Dialect) {
		r := ready(t, d)
		token := r.guest("sample").attested()
		parts := strings.Split(token, ".")
		header, _ := b64.DecodeString(parts[0])
		var h map[string]any
		if err := json.Unmarshal(header, &h); err != nil {
			t.Fatal(err)
		}
		if got, want := keysOf(h), "{alg,jwk{alg,crv,kty,x,x5c,y},typ}"; got != want {
			t.Errorf("header members %s, want %s", got, want)
		}
		if !strings.HasPrefix(string(header), `{"typ":"JWT","alg":"ES256","jwk":{"alg":"ES256","x5c":["`) {
			t.Errorf("header %s", header)
		}
		// Anyone with the CA can verify the token by its x5c.
		x5c := h["jwk"].(map[string]any)["x5c"].([]any)[0].(string)
		enc := base64.StdEncoding
		if d == DialectT {
			enc = base64.RawURLEncoding
		}
		der, err := enc.DecodeString(x5c)
		if err != nil {
			t.Fatalf("x5c: %v", err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		ca, _ := os.ReadFile(filepath.Join(r.dir, caCertFile))
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(ca)
		if _, err := cert.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
			t.Error(err)
		}
		if err := cert.VerifyHostname("127.0.0.1"); err == nil {
			t.Error("the token signer's certificate serves TLS")
		}
		// By hand: go-jose, rightly, does not read T's x5c.
		sig, _ := b64.DecodeString(parts[2])
		digest := sha256.Sum256([]byte(parts[0] + "." + parts[1]))
		if !ecdsa.Verify(cert.PublicKey.(*ecdsa.PublicKey), digest[:], new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:])) {
			t.Error("the signature is not that of the certificate's key")
		}
		payload, _ := b64.DecodeString(parts[1])
		var claims map[string]any
		if err := json.Unmarshal(payload, &claims); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(fmt.Sprint(claims["ear.verifier-id"]), "simulated") {
			t.Error("the token does not say simulated")
		}
		if evidenceOf(claims)["simulated"] != true {
			t.Error("the evidence has no mark")
		}
	})
}

func TestEncryptToKeys(t *testing.T) {
	r := ready(t, DialectT)
	g := r.guest("sample")
	g.jwk = rsaJWK(t)
	g.attested()
	a := g.get(keyPath)
	if got := decrypt(t, a.body, rsaKey(t)); got != secret {
		t.Errorf("RSA: %q", got)
	}
	tests := map[string]func(g *guest){
		"alg":       func(g *guest) { g.jwk["alg"] = "ECDH-ES" },
		"crv":       func(g *guest) { g.jwk["crv"] = "P-384" },
		"short x":   func(g *guest) { g.jwk["x"] = "AAAA" },
		"padded x":  func(g *guest) { g.jwk["x"] += "=" },
		"off curve": func(g *guest) { g.jwk["y"] = g.jwk["x"] },
		"RSA as EC": func(g *guest) { g.jwk["alg"] = "RSA-OAEP-256" },
		"RSA1_5":    func(g *guest) { g.jwk = rsaJWK(t); g.jwk["alg"] = "RSA1_5" },
		"RSA 1024": func(g *guest) {
			g.jwk["kty"], g.jwk["alg"], g.jwk["n"], g.jwk["e"] = "RSA", algRSA, strings.Repeat("zz", 85), "AQAB"
		},
		"RSA huge": func(g *guest) {
			g.jwk["kty"], g.jwk["alg"], g.jwk["n"], g.jwk["e"] = "RSA", algRSA, strings.Repeat("zzzz", 20000), "AQAB"
		},
		"RSA even": func(g *guest) {
			g.jwk["kty"], g.jwk["alg"], g.jwk["n"], g.jwk["e"] = "RSA", algRSA, strings.Repeat("zzzz", 100), "Ag"
		},
		"RSA e zero":   func(g *guest) { g.jwk = rsaJWK(t); g.jwk["e"] = "AA" },
		"RSA big e":    func(g *guest) { g.jwk = rsaJWK(t); g.jwk["e"] = "_____w" },
		"RSA n padded": func(g *guest) { g.jwk = rsaJWK(t); g.jwk["n"] += "==" },
	}
	for name, edit := range tests {
		t.Run(name, func(t *testing.T) {
			g := r.guest("sample")
			edit(g)
			if g.jwk["kty"] == "RSA" {
				delete(g.jwk, "crv")
				delete(g.jwk, "x")
				delete(g.jwk, "y")
			}
			g.attested()
			if a := g.get(keyPath); a.status != 401 || a.errType() != "JweError" {
				t.Errorf("get: %d %s, want JweError", a.status, a.body)
			}
		})
	}
}

func TestAdminToken(t *testing.T) {
	_, wrong, _ := ed25519.GenerateKey(rand.Reader)
	dialects(t, func(t *testing.T, d Dialect) {
		r := newRig(t, Options{Dialect: d})
		now := time.Now().Unix()
		claims := func(edit map[string]any) map[string]any {
			m := map[string]any{"iat": now, "nbf": now, "exp": now + 7200, "role": "admin"}
			for k, v := range edit {
				if m[k] = v; v == nil {
					delete(m, k)
				}
			}
			return m
		}
		sign := func(edit map[string]any) string { return "Bearer " + adminToken(t, jose.EdDSA, r.admin, claims(edit)) }
		onlyT := d == DialectT
		pub, _ := os.ReadFile(filepath.Join(r.dir, adminPubFile))
		tests := []struct {
			name, header string
			ok           bool
			reason       string
		}{
			{"good", sign(nil), true, ""},
			{"only exp and role", sign(map[string]any{"iat": nil, "nbf": nil}), true, ""},
			{"exp a little past", sign(map[string]any{"exp": now - 30}), true, ""},
			{"exp past", sign(map[string]any{"exp": now - 70}), false, "the token has expired"},
			{"no exp", sign(map[string]any{"exp": nil}), false, "the token has no exp"},
			{"exp null", sign(map[string]any{"exp": json.RawMessage("null")}), false, "the token has no exp"},
			{"float times", sign(map[string]any{"exp": float64(now) + 60.5}), true, ""},
			{"nbf ahead", sign(map[string]any{"nbf": now + 90}), false, "not valid yet"},
			{"iat ahead", sign(map[string]any{"iat": now + 90}), false, "from the future"},
			{"nbf a little ahead", sign(map[string]any{"nbf": now + 30}), true, ""},
			{"no role", sign(map[string]any{"role": nil}), onlyT, "missing the claim"},
			{"other role", sign(map[string]any{"role": "user"}), onlyT, "role \"user\" is not allowed"},
			{"wrong key", "Bearer " + adminToken(t, jose.EdDSA, wrong, claims(nil)), false, "error in cryptographic primitive"},
			{"HS256 with the public key", "Bearer " + adminToken(t, jose.HS256, bytes.Repeat(pub, 2), claims(nil)), false, "signature algorithm"},
			{"alg none", "Bearer " + b64.EncodeToString([]byte(`{"alg":"none"}`)) + "." + b64.EncodeToString([]byte(`{"exp":9999999999,"role":"admin"}`)) + ".", false, "signature algorithm"},
			{"none", "", false, "Failed to parse HTTP Auth Bearer header"},
			{"basic", "Basic YTpi", false, "Failed to parse HTTP Auth Bearer header"},
			{"lower case", "b" + sign(nil)[1:], false, "Failed to parse HTTP Auth Bearer header"},
			{"garbage", "Bearer abc", false, "compact JWS"},
			{"too long", "Bearer " + strings.Repeat("a", maxAdminToken+1), false, "too long"},
		}
		for _, tt := range tests {
			t.Run(tt.name, func(t *testing.T) {
				a := r.do("POST", "/kbs/v0/resource/a/b/c", []byte("x"), "Authorization", tt.header)
				want := map[Dialect]string{DialectT: "AdminAuth", DialectH: "AdminAuthInitialization"}[d]
				if tt.ok && a.status != 200 || !tt.ok && (a.status != 401 || a.errType() != want) {
					t.Errorf("%d %s, want ok %v", a.status, a.body, tt.ok)
				}
				if !tt.ok {
					r.reason(tt.reason)
				}
			})
		}
		// Every administrative route asks, attestation-policy too.
		for _, route := range []string{"POST resource/a/b/c", "POST resource-policy", "GET resource-policy", "POST attestation-policy", "GET reference-value", "POST reference-value", "DELETE resource/a/b/c"} {
			method, path, _ := strings.Cut(route, " ")
			if method == "DELETE" && onlyT {
				continue
			}
			for _, header := range []string{"", "Bearer " + adminToken(t, jose.EdDSA, wrong, claims(nil))} {
				a := r.do(method, "/kbs/v0/"+path, []byte("{}"), "Authorization", header)
				if a.status != 401 || !strings.HasPrefix(a.errType(), "AdminAuth") {
					t.Errorf("%s without admin: %d %s", route, a.status, a.body)
				}
			}
		}
	})
}

func TestResourcePaths(t *testing.T) {
	dialects(t, func(t *testing.T, d Dialect) {
		r := ready(t, d)
		g := r.guest("sample")
		g.attested()
		outside := filepath.Join(r.dir, repositoryDir, "..", "outside")
		for _, p := range []string{"a/b", "a/b/c/d", ".a/b/c", "a/b/.c", "a/../c", "../../token.key", "a//c", "/a/b", "a/b/", "a/b/c/", "", "..%2f..%2fx/b/c",
			"a/b/c%20d", "a/b/c%00", "a/b/%2e%2e", "%2e%2e/b/c", "a/b/c%0a", "a/b/ü", "a/b/" + strings.Repeat("x", 300), "nvflare%2Fsite/rootfs", "a/b/c%2500"} {
			a := g.get(p)
			if a.status != 401 || a.errType() != "PluginInternalError" && !(d == DialectT && a.errType() == "PolicyEngine") {
				t.Errorf("GET %q: %d %s", p, a.status, a.body)
			}
			switch {
			case a.errType() == "PolicyEngine":
				r.reason("illegal character")
			case !strings.Contains(p, "xxx"): // too long a name is the file system's word
				r.reason("is not <repository>/<type>/<tag>")
			}
			if a := r.asAdmin("POST", "/kbs/v0/resource/"+p, []byte("x")); a.status != 401 || a.errType() != "PluginInternalError" {
				t.Errorf("POST %q: %d %s", p, a.status, a.body)
			}
			if !strings.Contains(p, "xxx") {
				r.reason("is not <repository>/<type>/<tag>")
			}
		}
		if _, err := os.Lstat(outside); err == nil {
			t.Error("a file stands outside of the repository")
		}
		if a := g.get("keys/root/nothere"); a.errType() != "PluginInternalError" {
			t.Errorf("missing resource: %d %s", a.status, a.body)
		}
		r.reason("no such file")
		if a := g.get("keys/root/on%65?x=1"); a.status != 200 {
			t.Errorf("escaped letter and query: %d %s", a.status, a.body)
		}
		// A symbolic link out of the folder is not followed.
		if err := os.MkdirAll(filepath.Join(r.dir, repositoryDir, "l", "l"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("/etc/hostname", filepath.Join(r.dir, repositoryDir, "l", "l", "l")); err != nil {
			t.Fatal(err)
		}
		if a := g.get("l/l/l"); a.errType() != "PluginInternalError" {
			t.Errorf("link out of the folder: %d %s", a.status, a.body)
		}
	})
}

func TestResourceStore(t *testing.T) {
	dialects(t, func(t *testing.T, d Dialect) {
		r := ready(t, d)
		g := r.guest("sample")
		g.attested()
		for name, data := range map[string]string{"empty": "", "binary": "\x00\xff\xfe", "newline": "x\n", "big": strings.Repeat("A", maxBody)} {
			a := r.mustAdmin("POST", "/kbs/v0/resource/a/b/"+name, []byte(data))
			if ct := a.header.Get("Content-Type"); ct != "text/xml" || len(a.body) != 0 {
				t.Errorf("POST: type %q, body %q", ct, a.body)
			}
			if a := g.get("a/b/" + name); a.status != 200 || decrypt(t, a.body, g.key) != data {
				t.Errorf("%s: %d", name, a.status)
			}
		}
		r.mustAdmin("POST", "/kbs/v0/resource/a/b/empty", []byte("two"))
		if got := decrypt(t, g.get("a/b/empty").body, g.key); got != "two" {
			t.Errorf("overwritten: %q", got)
		}
		err := filepath.Walk(r.dir, func(p string, fi os.FileInfo, err error) error {
			want := os.FileMode(0o600)
			if fi.IsDir() {
				want = 0o700
			}
			if fi.Mode().Perm() != want || strings.Contains(fi.Name(), ".new") {
				t.Errorf("%s has mode %v", p, fi.Mode())
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		a := r.asAdmin("DELETE", "/kbs/v0/resource/"+keyPath, nil)
		if d == DialectT {
			if a.status != 405 || a.header.Get("Allow") != "GET, POST" {
				t.Errorf("DELETE at T: %d %v", a.status, a.header)
			}
			return
		}
		if a.status != 200 || g.get(keyPath).errType() != "PluginInternalError" {
			t.Errorf("DELETE: %d %s", a.status, a.body)
		}
		if a := r.asAdmin("DELETE", "/kbs/v0/resource/"+keyPath, nil); a.errType() != "PluginInternalError" {
			t.Errorf("DELETE again: %d %s", a.status, a.body)
		}
	})
}

func TestOversize(t *testing.T) {
	r := newRig(t, Options{})
	for _, header := range []string{"", r.adminHeader()} {
		a := r.do("POST", "/kbs/v0/resource/a/b/c", make([]byte, maxBody+1), "Authorization", header)
		if a.status != 413 || string(a.body) != "payload reached size limit" || a.header.Get("Content-Type") != "text/plain; charset=utf-8" {
			t.Errorf("body of 2 MiB + 1: %d %q %v", a.status, a.body, a.header)
		}
	}
	if a := r.do("POST", "/kbs/v0/auth", bytes.Repeat([]byte("A"), maxBody)); a.errType() != "AttestationError" {
		t.Errorf("auth with 2 MiB: %d %s", a.status, a.body)
	}
	if a := r.do("GET", "/kbs/v0/resource/a/b/c", nil, "X-Big", strings.Repeat("a", maxHeader+8192)); a.status != 431 {
		t.Errorf("head of 136 KiB: %d", a.status)
	}
}

func TestInitAndNew(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "kbs")
	if err := Init(dir, Options{}); err == nil || !strings.Contains(err.Error(), "no host") {
		t.Errorf("Init without hosts: %v", err)
	}
	if err := Init(dir, Options{Hosts: []string{"10.0.0.1", "::1", "kbs.example"}}); err != nil {
		t.Fatal(err)
	}
	key, _ := os.ReadFile(filepath.Join(dir, adminKeyFile))
	if err := Init(dir, Options{Hosts: []string{"x"}}); err == nil || !strings.Contains(err.Error(), "not empty") {
		t.Errorf("second Init: %v", err)
	}
	if again, _ := os.ReadFile(filepath.Join(dir, adminKeyFile)); !bytes.Equal(key, again) {
		t.Error("a second Init changed the keys")
	}
	if entries, _ := os.ReadDir(filepath.Dir(dir)); len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
	b, _ := os.ReadFile(filepath.Join(dir, serverCertFile))
	block, _ := pem.Decode(b)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{"10.0.0.1", "::1", "kbs.example"} {
		if err := cert.VerifyHostname(host); err != nil {
			t.Error(err)
		}
	}
	if _, err := New(Options{Dir: dir, SimulatedRoots: []byte("x")}); err == nil || !strings.Contains(err.Error(), "not allowed") {
		t.Errorf("simulated roots without the flag: %v", err)
	}
	if _, err := New(Options{Dir: dir, Dialect: "X"}); err == nil {
		t.Error("dialect X is accepted")
	}
	if err := os.Chmod(filepath.Join(dir, tokenKeyFile), 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := New(Options{Dir: dir}); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("token key readable by others: %v", err)
	}
	if _, err := New(Options{Dir: t.TempDir()}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("empty folder: %v", err)
	}
}

// TestSignerWithLeadingZero: older Trustee refuses every token of such a key.
func TestSignerWithLeadingZero(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "kbs")
	if err := Init(dir, Options{Hosts: []string{"127.0.0.1"}}); err != nil {
		t.Fatal(err)
	}
	var key *ecdsa.PrivateKey
	for {
		var err error
		if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			t.Fatal(err)
		}
		if x, y, _ := coordinates(&key.PublicKey); x[0] == 0 || y[0] == 0 {
			break
		}
	}
	cert := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	keyPEM, err := privatePEM(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{tokenKeyFile: keyPEM, tokenCertFile: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := New(Options{Dir: dir}); err == nil || !strings.Contains(err.Error(), "zero byte") {
		t.Errorf("New: %v, want the zero byte named", err)
	}
}

func TestSessionsAreBounded(t *testing.T) {
	c := new(clock)
	ss := newSessions(make([]byte, 32), []string{"snp"}, c.now)
	ss.max = 3
	kept := ss.open("snp")
	ss.keep(kept)
	var last *session
	for range 10 {
		last = ss.open("snp")
	}
	if len(ss.byID) != 4 || ss.get(kept.id) == nil || ss.get(last.id) == nil {
		t.Errorf("%d sessions, attested one there %v, newest there %v", len(ss.byID), ss.get(kept.id) != nil, ss.get(last.id) != nil)
	}
	// Many attested sessions push out the oldest of their kind, not those that wait.
	waits := ss.open("snp")
	for range 5 {
		ss.keep(ss.open("snp"))
	}
	if ss.attested.Len() != 3 || ss.get(kept.id) == kept || ss.get(waits.id) != waits {
		t.Errorf("%d attested sessions, oldest there %v, waiting one there %v", ss.attested.Len(), ss.get(kept.id) == kept, ss.get(waits.id) == waits)
	}
	kept = waits
	c.add(sessionLife)
	if ss.get(kept.id) != nil {
		t.Error("a session outlives its five minutes")
	}
	ss.open("snp")
	if len(ss.byID) != 1 {
		t.Errorf("%d sessions after all but one expired", len(ss.byID))
	}
}

// keysOf names the members of a JSON object, and of those inside it.
func keysOf(v any) string {
	m, ok := v.(map[string]any)
	if !ok {
		return fmt.Sprintf("%T", v)
	}
	var out []string
	for k := range m {
		s := k
		if _, ok := m[k].(map[string]any); ok {
			s += keysOf(m[k])
		}
		out = append(out, s)
	}
	slices.Sort(out)
	return "{" + strings.Join(out, ",") + "}"
}

var rsa2048 = sync.OnceValues(func() (*rsa.PrivateKey, error) { return rsa.GenerateKey(rand.Reader, 2048) })

func rsaKey(t testing.TB) *rsa.PrivateKey {
	t.Helper()
	k, err := rsa2048()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func rsaJWK(t testing.TB) map[string]string {
	t.Helper()
	k := rsaKey(t)
	return map[string]string{"kty": "RSA", "alg": algRSA, "n": b64.EncodeToString(k.N.Bytes()), "e": b64.EncodeToString(big.NewInt(int64(k.E)).Bytes())}
}

// TestRestart: a handshake that began before a restart of the server goes on
// after it, and a session's token counts after it.
func TestRestart(t *testing.T) {
	dialects(t, func(t *testing.T, d Dialect) {
		r := ready(t, d)
		attested := r.guest("sample")
		token := attested.attested()
		waits := r.guest("sample").auth()
		stale := r.guest("sample").auth()

		again, err := New(Options{Dir: r.dir, Dialect: d, AllowSimulated: true, Logger: slog.New(slog.NewJSONHandler(r.log, nil)), Now: r.clock.now})
		if err != nil {
			t.Fatal(err)
		}
		r.server.sessions = again.sessions // as a new process has them: none
		if a := waits.attest(waits.attestBody(sampleEvidence(waits.digest()), "")); a.status != 200 {
			t.Errorf("attest after the restart: %d %s\n%v", a.status, a.body, r.log.last(t))
		}
		if a := waits.get(keyPath); a.status != 200 {
			t.Errorf("get after the restart: %d %s", a.status, a.body)
		}
		if a := attested.get(keyPath); a.errType() != "TokenNotFound" {
			t.Errorf("attested session after the restart: %d %s", a.status, a.body)
		}
		if a := r.do("GET", "/kbs/v0/resource/"+keyPath, nil, "Authorization", "Bearer "+token); a.status != 200 {
			t.Errorf("its token after the restart: %d %s", a.status, a.body)
		}
		forged := stale.cookie[:len(stale.cookie)-1] + "0"
		if forged == stale.cookie {
			forged = stale.cookie[:len(stale.cookie)-1] + "1"
		}
		if a := r.do("POST", "/kbs/v0/attest", stale.attestBody(sampleEvidence(stale.digest()), ""), "Cookie", forged); a.errType() != "AttestationError" {
			t.Errorf("another id: %d %s", a.status, a.body)
		}
		r.clock.add(sessionLife)
		if a := stale.attest(stale.attestBody(sampleEvidence(stale.digest()), "")); a.errType() != "AttestationError" {
			t.Errorf("after its five minutes: %d %s", a.status, a.body)
		}
	})
}

func TestParallelAttests(t *testing.T) {
	r := ready(t, DialectH)
	g := r.guest("sample").auth()
	body := g.attestBody(sampleEvidence(g.digest()), "")
	tokens := make([]string, 8)
	var wg sync.WaitGroup
	for i := range tokens {
		wg.Go(func() {
			req, _ := http.NewRequest("POST", r.url+"/kbs/v0/attest", bytes.NewReader(body))
			req.Header.Set("Cookie", g.cookie)
			resp, err := r.client.Do(req)
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			b, _ := io.ReadAll(resp.Body)
			tokens[i] = string(b)
		})
	}
	wg.Wait()
	if !strings.HasPrefix(tokens[0], `{"token":"`) || len(slices.Compact(tokens)) != 1 {
		t.Errorf("different answers: %.80s", tokens)
	}
}

// TestConcurrentWrites: of writes at the same time one wins whole, and reference
// values lose none.
func TestConcurrentWrites(t *testing.T) {
	r := ready(t, DialectT)
	g := r.guest("sample")
	g.attested()
	const writers, rounds = 8, 5
	text := func(writer int) string { return strings.Repeat(fmt.Sprint(writer), 10000) }
	rego := func(writer int) string { return allowAll + "# " + text(writer) + "\n" }
	whole := func(what, got string, of func(int) string) {
		for writer := range writers {
			if got == of(writer) {
				return
			}
		}
		t.Errorf("%s is none of what was written: %.80q", what, got)
	}
	r.setPolicy(rego(0))
	r.mustAdmin("POST", "/kbs/v0/resource/a/b/c", []byte(text(0)))
	admin := r.adminHeader()
	var wg sync.WaitGroup
	for writer := range writers {
		wg.Go(func() {
			for round := range rounds {
				for path, body := range map[string][]byte{
					"resource/a/b/c":  []byte(text(writer)),
					"resource-policy": policyBody(rego(writer)),
					"reference-value": []byte(`{"version":"0.1.0","type":"sample","payload":"` +
						base64.StdEncoding.EncodeToString(fmt.Appendf(nil, `{"of-%d-%d":true}`, writer, round)) + `"}`),
				} {
					if a := r.do("POST", "/kbs/v0/"+path, body, "Authorization", admin); a.status != 200 {
						t.Errorf("%s: %d %s", path, a.status, a.body)
					}
				}
				a := g.get("a/b/c")
				if a.status != 200 {
					t.Errorf("read among writes: %d %s", a.status, a.body)
					continue
				}
				whole("the resource", decrypt(t, a.body, g.key), text)
			}
		})
	}
	wg.Wait()
	policy, err := b64.DecodeString(string(r.mustAdmin("GET", "/kbs/v0/resource-policy", nil).body))
	if err != nil {
		t.Fatal(err)
	}
	whole("the policy", string(policy), rego)
	var values map[string]any
	if err := json.Unmarshal(r.mustAdmin("GET", "/kbs/v0/reference-value", nil).body, &values); err != nil || len(values) != writers*rounds {
		t.Errorf("%d reference values, %v; want %d", len(values), err, writers*rounds)
	}
}

// TestStop: the end of the context lets a request in progress finish.
func TestStop(t *testing.T) {
	r := newRig(t, Options{AllowSimulated: true})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- r.server.Serve(ctx, ln) }()
	pr, pw := io.Pipe()
	status := make(chan int, 1)
	go func() {
		req, _ := http.NewRequest("POST", "https://"+ln.Addr().String()+"/kbs/v0/auth", pr)
		req.Header.Set("Expect", "100-continue") // the body begins when the server reads it
		resp, err := r.client.Do(req)
		if err != nil {
			t.Error(err)
			status <- 0
			return
		}
		resp.Body.Close()
		status <- resp.StatusCode
	}()
	fmt.Fprint(pw, `{"version":"0.4.0","tee":"snp",`)
	cancel()
	fmt.Fprint(pw, `"extra-params":""}`)
	pw.Close()
	if got := <-status; got != 200 {
		t.Errorf("request in progress: %d", got)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
	if _, err := net.Dial("tcp", ln.Addr().String()); err == nil {
		t.Error("the listener is still open")
	}
	// A listener that fails is an error.
	if err := r.server.Serve(context.Background(), ln); err == nil {
		t.Error("serving a closed listener is no error")
	}
}

func TestLogIsBounded(t *testing.T) {
	r := newRig(t, Options{})
	r.do("GET", "/kbs/v0/resource/"+strings.Repeat("x", 50000)+"%0a{}", nil)
	if l := r.log.last(t); len(fmt.Sprint(l["path"])) > 600 || l["reason"] == nil {
		t.Errorf("audit line %v", l)
	}
	if strings.Count(r.log.String(), "\n") != 2 { // serving, denied
		t.Errorf("lines: %s", r.log)
	}
}

func FuzzAuth(f *testing.F) {
	f.Add([]byte(`{"version":"0.4.0","tee":"snp","extra-params":""}`))
	f.Add([]byte(`{"version":"0.4.0+a-b","tee":"sample","extra-params":{"a":[1]}} `))
	f.Fuzz(func(t *testing.T, b []byte) {
		if tee, err := parseAuth(b, DialectT); err == nil && (tee == "" || !json.Valid(b)) {
			t.Errorf("accepted: %q", b)
		}
	})
}

func FuzzAttestation(f *testing.F) {
	raw, err := os.ReadFile(filepath.Join("testdata", "vectors.json"))
	if err != nil {
		f.Fatal(err)
	}
	var v struct {
		P struct {
			Body json.RawMessage `json:"sample_attest_body"`
		} `json:"primary_no_devices"`
	}
	if err := json.Unmarshal(raw, &v); err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(v.P.Body))
	f.Add([]byte(`{"runtime-data":{"nonce":"\u0000","tee-pubkey":{"kty":"RSA","alg":"","n":"","e":""}},"tee-evidence":{"primary_evidence":null,"additional_evidence":""}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := parseAttestation(b)
		if err != nil {
			return
		}
		bd, err := a.parse()
		if err != nil {
			return
		}
		bd.digest()
		if !json.Valid([]byte(canonical(bd.nonce))) {
			t.Errorf("canonical form of %q is no JSON", bd.nonce)
		}
		k := teeKey{KTY: bd.key["kty"], ALG: bd.key["alg"], CRV: bd.key["crv"], X: bd.key["x"], Y: bd.key["y"], N: bd.key["n"], E: bd.key["e"]}
		if out, err := k.encrypt([]byte("x")); err == nil && !json.Valid(out) {
			t.Errorf("sealed to %v: %s", k, out)
		}
	})
}

func FuzzAdminToken(f *testing.F) {
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	good := adminToken(f, jose.EdDSA, key, map[string]any{"exp": 1, "role": "admin"})
	f.Add("Bearer " + good)
	f.Add("Bearer a.b.c")
	f.Fuzz(func(t *testing.T, header string) {
		// No one but the key's holder makes a token that counts; the seed's has expired.
		if err := (adminVerifier{key: pub}).check(header, DialectT, time.Now()); err == nil {
			t.Errorf("accepted: %q", header)
		}
	})
}

func FuzzBearerToken(f *testing.F) {
	key, err := newP256()
	if err != nil {
		f.Fatal(err)
	}
	s := &signer{key: key, dialect: DialectT, header: b64.EncodeToString([]byte(`{"alg":"ES256"}`))}
	tok, err := s.issue(map[string]any{}, appraisal{}, nil, false, time.Unix(0, 0))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(tok)
	f.Add("..")
	f.Fuzz(func(t *testing.T, tok string) {
		if _, err := s.verify(tok, time.Now()); err == nil {
			t.Errorf("accepted: %q", tok)
		}
	})
}

func FuzzReferences(f *testing.F) {
	f.Add([]byte(`{"version":"0.1.0","type":"sample","payload":"eyJzdm4iOlsiMSJdfQ=="}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if values, err := parseReferences(b); err == nil {
			for name := range values {
				matches(values, name, "x")
			}
		}
	})
}
