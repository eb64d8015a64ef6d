package kbsclient

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"net/http"
	"testing"

	"github.com/go-jose/go-jose/v4"
)

func pemOf(t *testing.T, typ string, der []byte, err error) []byte {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der})
}

func pkcs8(t *testing.T, key any) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	return pemOf(t, "PRIVATE KEY", der, err)
}

func generate[K any](t *testing.T, key K, err error) K {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// A session's token and key serve again in another process, for both kinds of key.
func TestResume(t *testing.T) {
	ec, errEC := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	rs, errRSA := rsa.GenerateKey(rand.Reader, 2048)
	if err := errors.Join(errEC, errRSA); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		pem    []byte
		public any
		alg    jose.KeyAlgorithm
	}{
		"P-256": {pkcs8(t, ec), &ec.PublicKey, jose.ECDH_ES_A256KW},
		"RSA":   {pemOf(t, "RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(rs), nil), &rs.PublicKey, jose.RSA_OAEP_256},
	} {
		t.Run(name, func(t *testing.T) {
			key, err := ParseTEEKey(tc.pem)
			if err != nil {
				t.Fatal(err)
			}
			token := fakeToken("n")
			kbs := newFakeKBS(t)
			kbs.override[resourceRoute] = func(w http.ResponseWriter, r *http.Request) {
				if r.Header.Get("Authorization") != "Bearer "+token || r.Header.Get("Cookie") != "" {
					t.Errorf("header %v", r.Header)
				}
				_, _ = io.WriteString(w, encrypt(t, tc.public, tc.alg, jose.A256GCM, nil, []byte("secret")))
			}
			s, err := serve(t, kbs, nil).Resume(token, key)
			if err != nil {
				t.Fatal(err)
			}
			got, err := s.Resource(context.Background(), "keys/root/x")
			if err != nil || string(got) != "secret" {
				t.Errorf("%q, %v", got, err)
			}
			s.Close()
			if _, err := s.Resource(context.Background(), "keys/root/x"); err != nil {
				t.Errorf("Close wiped the caller's key: %v", err)
			}
		})
	}
}

// The algorithm is bound to the key: RSA-OAEP-256 to an RSA key only, and no
// other RSA algorithm.
func TestRSAAlgorithm(t *testing.T) {
	rs, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for alg, ok := range map[jose.KeyAlgorithm]bool{jose.RSA_OAEP_256: true, jose.RSA_OAEP: false, jose.RSA1_5: false} {
		_, err := decryptJWE([]byte(encrypt(t, &rs.PublicKey, alg, jose.A256GCM, nil, nil)), rsaKey{rs})
		if (err == nil) != ok {
			t.Errorf("%s: %v", alg, err)
		}
	}
}

func TestHandshakeWithGivenKey(t *testing.T) {
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	key, err2 := ParseTEEKey(pkcs8(t, generate(t, ec, err)))
	s := attest(t, serve(t, newFakeKBS(t), nil), WithTEEKey(generate(t, key, err2)))
	got, err := s.Resource(context.Background(), "keys/root/x")
	if err != nil || len(got) == 0 {
		t.Errorf("%q, %v", got, err)
	}
}

func TestParseTEEKeyRefuses(t *testing.T) {
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	ed = generate(t, ed, err)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	p384 = generate(t, p384, err)
	sec1, err := x509.MarshalECPrivateKey(p384)
	for name, text := range map[string][]byte{
		"nothing":     nil,
		"Ed25519":     pkcs8(t, ed),
		"P-384":       pkcs8(t, p384),
		"SEC 1":       pemOf(t, "EC PRIVATE KEY", sec1, err),
		"RSA broken":  pemOf(t, "RSA PRIVATE KEY", []byte{1}, nil),
		"EC broken":   pemOf(t, "PRIVATE KEY", []byte{1}, nil),
		"certificate": pemOf(t, "CERTIFICATE", []byte{1}, nil),
	} {
		if _, err := ParseTEEKey(text); err == nil {
			t.Errorf("%s accepted", name)
		}
	}
}
