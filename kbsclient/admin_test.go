package kbsclient

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// adminKBS records admin requests and answers with a fixed text.
type adminKBS struct {
	status             int
	answer             string
	date               time.Time
	method, path, auth string
	header             http.Header
	body               []byte
}

func (a *adminKBS) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.method, a.path, a.auth, a.header = r.Method, r.URL.Path, r.Header.Get("Authorization"), r.Header
	a.body, _ = io.ReadAll(r.Body)
	w.Header()["Content-Type"] = nil
	if !a.date.IsZero() {
		w.Header().Set("Date", a.date.UTC().Format(http.TimeFormat))
	}
	w.WriteHeader(a.status)
	_, _ = io.WriteString(w, a.answer)
}

func serveAdmin(t *testing.T, kbs *adminKBS) (*Admin, ed25519.PublicKey) {
	t.Helper()
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a, err := serve(t, kbs, func(_ *tls.Config, cfg *Config) { cfg.AdminIssuer = "nvflare" }).admin(key)
	if err != nil {
		t.Fatal(err)
	}
	return a, pub
}

// One token for both: T wants EdDSA and sane times, H exp, iss, aud and role.
func TestAdminToken(t *testing.T) {
	kbs := &adminKBS{status: 200}
	a, pub := serveAdmin(t, kbs)
	if err := a.SetResource(context.Background(), "keys/root/x", []byte("secret")); err != nil {
		t.Fatal(err)
	}
	token, ok := strings.CutPrefix(kbs.auth, "Bearer ")
	if !ok {
		t.Fatalf("Authorization %q", kbs.auth)
	}
	jws, err := jose.ParseSigned(token, []jose.SignatureAlgorithm{jose.EdDSA})
	if err != nil {
		t.Fatal(err)
	}
	payload, err := jws.Verify(pub)
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf(`{"iat":%d,"exp":%d,"nbf":%d,"iss":"nvflare","aud":"kbs","role":"admin"}`,
		epoch.Unix(), epoch.Unix()+600, epoch.Unix())
	if string(payload) != want {
		t.Errorf("claims %s, want %s", payload, want)
	}
}

func TestAdminCalls(t *testing.T) {
	ctx := context.Background()
	const rego = "package policy\nimport rego.v1\ndefault allow := false\n"
	b64 := b64url.EncodeToString([]byte(rego))
	for _, tc := range []struct {
		name, answer       string
		do                 func(*Admin) error
		method, path, body string
		contentType        string
	}{
		{"set resource", "", func(a *Admin) error { return a.SetResource(ctx, "keys/root/x", []byte{0, 255}) },
			"POST", "/resource/keys/root/x", "\x00\xff", "application/octet-stream"},
		{"delete resource", "", func(a *Admin) error { return a.DeleteResource(ctx, "keys/root/x") },
			"DELETE", "/resource/keys/root/x", "", ""},
		{"set resource policy", "", func(a *Admin) error { return a.SetResourcePolicy(ctx, []byte(rego)) },
			"POST", "/resource-policy", `{"policy":"` + b64 + `"}`, "application/json"},
		{"get resource policy", b64, func(a *Admin) error {
			got, err := a.ResourcePolicy(ctx)
			if err == nil && string(got) != rego {
				err = fmt.Errorf("policy %q", got)
			}
			return err
		}, "GET", "/resource-policy", "", ""},
		{"set attestation policy", "", func(a *Admin) error { return a.SetAttestationPolicy(ctx, "default_cpu", []byte(rego)) },
			"POST", "/attestation-policy", `{"policy":"` + b64 + `","policy_id":"default_cpu","type":"rego"}`, "application/json"},
		{"set reference value", "", func(a *Admin) error { return a.SetReferenceValue(ctx, "svn", []int{1}) },
			"POST", "/reference-value", `{"version":"0.1.0","type":"sample","payload":"eyJzdm4iOlsxXX0="}`, "application/json"},
		{"reference values", `{"svn":[1]}`, func(a *Admin) error {
			got, err := a.ReferenceValues(ctx)
			if err == nil && string(got) != `{"svn":[1]}` {
				err = fmt.Errorf("values %s", got)
			}
			return err
		}, "GET", "/reference-value", "", ""},
		{"reference value", `[1]`, func(a *Admin) error { _, err := a.ReferenceValue(ctx, "svn"); return err },
			"GET", "/reference-value/svn", "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			kbs := &adminKBS{status: 200, answer: tc.answer}
			a, _ := serveAdmin(t, kbs)
			if err := tc.do(a); err != nil {
				t.Fatal(err)
			}
			if kbs.method != tc.method || kbs.path != "/kbs/v0"+tc.path || string(kbs.body) != tc.body {
				t.Errorf("sent %s %s %q", kbs.method, kbs.path, kbs.body)
			}
			if got := kbs.header.Get("Content-Type"); got != tc.contentType {
				t.Errorf("Content-Type %q", got)
			}
			if kbs.auth == "" {
				t.Error("no token sent")
			}
		})
	}
}

func TestAdminRefusals(t *testing.T) {
	ctx := context.Background()
	info := func(typ string) string {
		return `{"type":"https://github.com/confidential-containers/kbs/errors/` + typ + `","detail":"d"}`
	}
	set := func(a *Admin) error { return a.SetResource(ctx, "a/b/c", nil) }
	for _, tc := range []struct {
		name   string
		status int
		answer string
		do     func(*Admin) error
		want   error
	}{
		{"token at T", 401, info("AdminAuth"), set, ErrAdminAuth},
		{"token at H, resource", 401, info("AdminAuthInitialization"), set, ErrAdminAuth},
		{"token at H, policy", 401, info("AdminAuthAccess"), func(a *Admin) error { return a.SetResourcePolicy(ctx, nil) }, ErrAdminAuth},
		{"resource policy", 401, info("PolicyEngine"), func(a *Admin) error { return a.SetResourcePolicy(ctx, nil) }, ErrPolicyEngine},
		{"attestation policy", 401, info("AttestationError"), func(a *Admin) error { return a.SetAttestationPolicy(ctx, "x", nil) }, ErrPolicyEngine},
		{"reference value", 401, info("RvpsError"), func(a *Admin) error { return a.SetReferenceValue(ctx, "x", 1) }, ErrReferenceValue},
		{"delete at T", 405, "", func(a *Admin) error { return a.DeleteResource(ctx, "a/b/c") }, ErrNotSupported},
		{"policies listed by H", 200, `["resource-policy"]`, func(a *Admin) error { _, err := a.ResourcePolicy(ctx); return err }, ErrNotSupported},
		{"policy no base64", 200, `***`, func(a *Admin) error { _, err := a.ResourcePolicy(ctx); return err }, ErrProtocol},
		{"values no JSON", 200, `<html>`, func(a *Admin) error { _, err := a.ReferenceValues(ctx); return err }, ErrProtocol},
		{"storage", 401, info("PluginInternalError"), set, ErrNoResource},
		{"too large", 413, "payload reached size limit", set, ErrTooLarge},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a, _ := serveAdmin(t, &adminKBS{status: tc.status, answer: tc.answer})
			is(t, tc.do(a), tc.want)
		})
	}
}

// A refused token and clocks that disagree: the text says so.
func TestAdminClockHint(t *testing.T) {
	answer := `{"type":"https://github.com/confidential-containers/kbs/errors/AdminAuth","detail":"d"}`
	for skew, hint := range map[time.Duration]bool{0: false, time.Hour: true, -time.Hour: true} {
		a, _ := serveAdmin(t, &adminKBS{status: 401, answer: answer, date: epoch.Add(skew)})
		err := a.SetResource(context.Background(), "a/b/c", nil)
		is(t, err, ErrAdminAuth)
		if strings.Contains(err.Error(), "1h0m0s off") != hint {
			t.Errorf("skew %s: %q", skew, err)
		}
	}
}

func TestGivenAdminToken(t *testing.T) {
	kbs := &adminKBS{status: 200}
	c := serve(t, kbs, nil)
	for token, want := range map[string]string{"abc": "Bearer abc", "": ""} {
		a, err := NewAdminToken(c.cfg, token)
		if err != nil {
			t.Fatal(err)
		}
		if err := a.SetResource(context.Background(), "a/b/c", nil); err != nil {
			t.Fatal(err)
		}
		if kbs.auth != want {
			t.Errorf("Authorization %q, want %q", kbs.auth, want)
		}
		a.c.transport.CloseIdleConnections()
	}
}

func TestParseAdminKey(t *testing.T) {
	encode := func(key any) []byte {
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseAdminKey(encode(ed))
	if err != nil || !got.Equal(ed) {
		t.Errorf("key not read: %v", err)
	}
	for name, text := range map[string][]byte{
		"empty":  nil,
		"P-256":  encode(ec),
		"public": bytes.ReplaceAll(encode(ed), []byte("PRIVATE"), []byte("PUBLIC")),
		"broken": []byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"),
		"no PEM": []byte("AAAA"),
	} {
		if _, err := ParseAdminKey(text); err == nil {
			t.Errorf("%s accepted", name)
		}
	}
	if _, err := NewAdmin(Config{URL: "https://kbs"}, ed25519.PrivateKey{1}); err == nil {
		t.Error("a short key was accepted")
	}
}

// No error text carries what must stay secret.
func TestErrorsCarryNoSecret(t *testing.T) {
	kbs := &adminKBS{status: 401, answer: "no"}
	a, _ := serveAdmin(t, kbs)
	err := a.SetResource(context.Background(), "a/b/c", []byte("luks-key-0123456789abcdef"))
	text := fmt.Sprintf("%v %+v %#v", err, err, err)
	token := strings.TrimPrefix(kbs.auth, "Bearer ")
	if strings.Contains(text, token) || strings.Contains(text, "luks-key") {
		t.Errorf("%q", text)
	}
	if _, err := json.Marshal(err); err != nil {
		t.Error(err)
	}
}
