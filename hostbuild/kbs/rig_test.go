package kbs

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
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
