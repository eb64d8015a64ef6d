package kbs

import (
	"crypto/rand"
	"crypto/rsa"
	"math/big"
	"strings"
	"sync"
	"testing"
)

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
