package kbsclient

import (
	"encoding/json"
	"strings"
	"testing"
)

// A message that differs from the good one in one place must not decrypt.
func TestJWEManipulated(t *testing.T) {
	v := loadVectors(t)
	var good map[string]string
	if err := json.Unmarshal(v.JWE.Response, &good); err != nil {
		t.Fatal(err)
	}
	header := func(old, new string) func(map[string]string) {
		return func(m map[string]string) {
			text := strings.Replace(v.JWE.ProtectedJSON, old, new, 1)
			if text == v.JWE.ProtectedJSON {
				panic("nothing replaced: " + old)
			}
			m["protected"] = b64url.EncodeToString([]byte(text))
		}
	}
	flip := func(member string) func(map[string]string) {
		return func(m map[string]string) {
			b, err := b64url.DecodeString(m[member])
			if err != nil {
				panic(err)
			}
			b[0] ^= 1
			m[member] = b64url.EncodeToString(b)
		}
	}
	for _, tc := range []struct {
		name   string
		change func(map[string]string)
		reason string
	}{
		{"alg dir", header("ECDH-ES+A256KW", "dir"), `alg "dir"`},
		{"alg RSA1_5", header("ECDH-ES+A256KW", "RSA1_5"), `alg "RSA1_5"`},
		{"enc", header("A256GCM", "A128GCM"), `enc "A128GCM"`},
		{"white space in the header", header(`","enc`, `", "enc`), "authentication"},
		{"header member added", header(`"enc"`, `"cty":"x","enc"`), "authentication"},
		{"crit", header(`"enc"`, `"crit":["x"],"enc"`), "crit"},
		{"zip", header(`"enc"`, `"zip":"DEF","enc"`), "zip"},
		{"apu", header(`"enc"`, `"apu":"AA","enc"`), "apu"},
		{"epk other curve", header("P-256", "P-384"), "epk"},
		{"epk off the curve", header("SP1u", "SP1v"), "epk"},
		{"epk short", header("SP1u", ""), "epk"},
		{"header no JSON", func(m map[string]string) { m["protected"] = "AAAA" }, "protected header"},
		{"header padded", func(m map[string]string) { m["protected"] += "=" }, "protected header"},
		{"encrypted_key", flip("encrypted_key"), "unwrap"},
		{"encrypted_key empty", func(m map[string]string) { m["encrypted_key"] = "" }, "too short"},
		{"encrypted_key odd", func(m map[string]string) { m["encrypted_key"] = "AAAAAAAAAAAAAAAAAAAAAAAAAAAA" }, "8 byte"},
		{"iv", flip("iv"), "authentication"},
		{"iv short", func(m map[string]string) { m["iv"] = "AAAA" }, "iv"},
		{"ciphertext", flip("ciphertext"), "authentication"},
		{"tag", flip("tag"), "authentication"},
		{"tag short", func(m map[string]string) { m["tag"] = m["tag"][:16] }, "tag"},
		{"unprotected header", func(m map[string]string) { m["header"] = "x" }, "unknown field"},
		{"aad", func(m map[string]string) { m["aad"] = "x" }, "unknown field"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := map[string]string{}
			for k, v := range good {
				m[k] = v
			}
			tc.change(m)
			body, err := json.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			_, err = decryptJWE(body, v.key(t))
			if err == nil || !strings.Contains(err.Error(), tc.reason) {
				t.Errorf("error %v, want one about %q", err, tc.reason)
			}
		})
	}
	for _, behind := range []byte("{}]") {
		if _, err := decryptJWE(append(v.JWE.Response[:len(v.JWE.Response):len(v.JWE.Response)], behind), v.key(t)); err == nil {
			t.Errorf("accepted with a %q behind", behind)
		}
	}
}

// The KBS hashes x and y as they are sent: a coordinate with a leading zero
// byte must keep it.
func TestKeyCoordinatesArePadded(t *testing.T) {
	scalar := make([]byte, 32)
	for n := range 100000 {
		scalar[28], scalar[29], scalar[30], scalar[31] = byte(n>>24), byte(n>>16), byte(n>>8), byte(n+1)
		k, err := newECKey(scalar)
		if err != nil {
			continue
		}
		if k.x[0] != 0 {
			continue
		}
		if x := k.public()["x"].(string); len(x) != 43 || x[0] != 'A' {
			t.Errorf("x %q of scalar %x", x, scalar)
		}
		return
	}
	t.Fatal("no key with a leading zero byte found")
}
