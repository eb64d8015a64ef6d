package kbs

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

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
