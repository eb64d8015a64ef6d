package kbs

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

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
