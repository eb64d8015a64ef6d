package kbsclient

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha512"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// fakeKBS answers like T: it binds `sample` evidence to the handshake, keeps
// sessions by cookie and encrypts with go-jose, which shares no code with the
// client's decryption but the key wrap. A test overrides single routes.
type fakeKBS struct {
	t        testing.TB
	override map[string]http.HandlerFunc // by "METHOD /path behind /kbs/v0"
	resource map[string][]byte
	refuse   string   // error type for every GET of a resource
	tees     []string // that it knows

	mu       sync.Mutex
	calls    map[string]int
	sessions map[string]*fakeSession
}

type fakeSession struct {
	nonce string
	key   *jose.JSONWebKey
}

func newFakeKBS(t testing.TB) *fakeKBS {
	return &fakeKBS{
		t:        t,
		tees:     []string{"sample"},
		override: map[string]http.HandlerFunc{},
		resource: map[string][]byte{"keys/root/x": []byte("luks-key-0123456789abcdef")},
		calls:    map[string]int{},
		sessions: map[string]*fakeSession{},
	}
}

func (f *fakeKBS) count(route string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[route]
}

func fail(w http.ResponseWriter, typ, detail string) {
	w.Header()["Content-Type"] = nil // Trustee sends none
	w.WriteHeader(http.StatusUnauthorized)
	fmt.Fprintf(w, `{"type":"https://github.com/confidential-containers/kbs/errors/%s","detail":%q}`, typ, detail)
}

func (f *fakeKBS) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	route := r.Method + " " + r.URL.Path[min(len("/kbs/v0"), len(r.URL.Path)):]
	f.mu.Lock()
	f.calls[route]++
	f.mu.Unlock()
	if h := f.override[route]; h != nil {
		h(w, r)
		return
	}
	f.serve(w, r, route)
}

func (f *fakeKBS) serve(w http.ResponseWriter, r *http.Request, route string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	cookie, _ := r.Cookie("kbs-session-id")
	var s *fakeSession
	if cookie != nil {
		s = f.sessions[cookie.Value]
	}
	switch {
	case route == "POST /auth":
		var req struct {
			Version, TEE string
			Extra        json.RawMessage `json:"extra-params"`
		}
		if json.NewDecoder(r.Body).Decode(&req) != nil || req.Version != "0.4.0" || !slices.Contains(f.tees, req.TEE) || req.Extra == nil {
			fail(w, "AttestationError", "Attestation error: RCAR handshake Auth failed: deserialize Request")
			return
		}
		var random [32]byte
		_, _ = rand.Read(random[:])
		id := fmt.Sprintf("%x", random[:16])
		nonce := base64.StdEncoding.EncodeToString(random[:])
		f.sessions[id] = &fakeSession{nonce: nonce}
		// The clock of this KBS is far behind: the cookie looks expired.
		w.Header().Set("Set-Cookie", "kbs-session-id="+id+"; Expires=Tue, 24 Nov 2020 08:36:26 GMT")
		fmt.Fprintf(w, `{"nonce":%q,"extra-params":""}`, nonce)
	case route == "POST /attest":
		var req struct {
			RuntimeData struct {
				Nonce string            `json:"nonce"`
				Key   map[string]string `json:"tee-pubkey"`
			} `json:"runtime-data"`
			Evidence struct {
				Primary struct {
					ReportData []byte `json:"report_data"`
				} `json:"primary_evidence"`
				Additional *string `json:"additional_evidence"`
			} `json:"tee-evidence"`
		}
		if s == nil || json.NewDecoder(r.Body).Decode(&req) != nil || req.Evidence.Additional == nil || req.RuntimeData.Nonce != s.nonce {
			fail(w, "AttestationError", "Attestation error: RCAR handshake Attest failed")
			return
		}
		k := req.RuntimeData.Key
		additional := strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(*req.Evidence.Additional)
		sum := sha512.Sum384(fmt.Appendf(nil,
			`{"additional-evidence":"%s","nonce":"%s","tee-pubkey":{"alg":"%s","crv":"%s","kty":"%s","x":"%s","y":"%s"}}`,
			additional, s.nonce, k["alg"], k["crv"], k["kty"], k["x"], k["y"]))
		if string(sum[:]) != string(req.Evidence.Primary.ReportData) {
			fail(w, "AttestationError", "Attestation error: RCAR handshake Attest failed")
			return
		}
		text, _ := json.Marshal(k)
		s.key = &jose.JSONWebKey{}
		if err := s.key.UnmarshalJSON(text); err != nil {
			f.t.Errorf("tee-pubkey: %v", err)
		}
		fmt.Fprintf(w, `{"token":%q}`, fakeToken(s.nonce))
	case r.Method == http.MethodGet && len(route) > 14 && route[:14] == "GET /resource/":
		if r.Header.Get("Authorization") != "" {
			f.t.Error("a bearer token beside the cookie")
		}
		data, ok := f.resource[route[14:]]
		switch {
		case s == nil || s.key == nil:
			fail(w, "TokenNotFound", "Attestation Token not found")
		case f.refuse != "":
			fail(w, f.refuse, "refused by the test")
		case !ok:
			fail(w, "PluginInternalError", "Plugin internal error")
		default:
			w.Header().Set("Content-Type", "application/json")
			_, _ = io.WriteString(w, encrypt(f.t, s.key, jose.ECDH_ES_A256KW, jose.A256GCM, nil, data))
		}
	default:
		w.WriteHeader(http.StatusNotFound)
	}
}

func fakeToken(nonce string) string {
	payload := fmt.Sprintf(`{"iat":1795509086,"exp":1795509386,"submods":{"cpu0":{"ear.status":"contraindicated","ear.veraison.annotated-evidence":{"runtime_data_claims":{"nonce":%q}}}}}`, nonce)
	return b64url.EncodeToString([]byte(`{"alg":"ES256"}`)) + "." + b64url.EncodeToString([]byte(payload)) + "." + b64url.EncodeToString([]byte("signature"))
}

// encrypt makes a flattened JWE with go-jose.
func encrypt(t testing.TB, key any, alg jose.KeyAlgorithm, enc jose.ContentEncryption, opts *jose.EncrypterOptions, data []byte) string {
	t.Helper()
	e, err := jose.NewEncrypter(enc, jose.Recipient{Algorithm: alg, Key: key}, opts)
	if err != nil {
		t.Fatal(err)
	}
	m, err := e.Encrypt(data)
	if err != nil {
		t.Fatal(err)
	}
	return m.FullSerialize()
}

// sample is Trustee's test attester.
type sample struct{}

func (sample) TEE() string { return "sample" }
func (sample) Evidence(_ context.Context, digest [48]byte) (json.RawMessage, error) {
	return json.Marshal(map[string]any{"svn": "1", "report_data": digest[:]})
}

// ca issues certificates for tests.
type ca struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

// epoch is the clients' time, far from any machine's.
var epoch = time.Date(2061, 11, 24, 12, 0, 0, 0, time.UTC)

func newCA(t testing.TB, from, to time.Time) *ca {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Test CA"},
		NotBefore: from, NotAfter: to,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &ca{t, cert, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
}

// leaf is a server certificate for 127.0.0.1.
func (c *ca) leaf(from, to time.Time) tls.Certificate {
	c.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		c.t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "kbs"},
		NotBefore: from, NotAfter: to,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, c.cert, &key.PublicKey, c.key)
	if err != nil {
		c.t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// serve starts h behind TLS and gives a client for it whose clock stands at
// epoch. change may alter the server's TLS and the client's configuration.
func serve(t testing.TB, h http.Handler, change func(*tls.Config, *Config)) *Client {
	t.Helper()
	authority := newCA(t, epoch.AddDate(0, 0, -1), epoch.AddDate(0, 0, 1))
	server := httptest.NewUnstartedServer(h)
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.TLS = &tls.Config{
		Certificates: []tls.Certificate{authority.leaf(epoch.AddDate(0, 0, -1), epoch.AddDate(0, 0, 1))},
		Time:         func() time.Time { return epoch },
	}
	cfg := Config{RootCAs: authority.pem, Now: func() time.Time { return epoch }}
	if change != nil {
		change(server.TLS, &cfg)
	}
	server.StartTLS()
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	cfg.URL = server.URL
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	c.backoff = time.Millisecond
	t.Cleanup(c.transport.CloseIdleConnections)
	return c
}
