package kbs

import (
	"bytes"
	"crypto/aes"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	josecipher "github.com/go-jose/go-jose/v4/cipher"
)

type digestVector struct {
	Canonical, SHA384 string
	Additional        string          `json:"additional_evidence"`
	Body              json.RawMessage `json:"sample_attest_body"`
}

func TestVectors(t *testing.T) {
	raw, err := os.ReadFile(filepath.Join("testdata", "vectors.json"))
	if err != nil {
		t.Fatal(err)
	}
	var v struct {
		Plain  digestVector `json:"primary_no_devices"`
		Device digestVector `json:"primary_with_sampledevice"`
		JWE    struct {
			Protected string `json:"protected_json"`
			Z, KEK    string
			CEK       string
			Response  flattened
			Plaintext string
		}
	}
	if err := json.Unmarshal(raw, &v); err != nil {
		t.Fatal(err)
	}
	a, err := parseAttestation(v.Plain.Body)
	if err != nil {
		t.Fatal(err)
	}
	b, err := a.parse()
	if err != nil {
		t.Fatal(err)
	}
	if d := b.digest(); hex.EncodeToString(d[:]) != v.Plain.SHA384 {
		t.Errorf("digest %x, want %s", d, v.Plain.SHA384)
	}
	b.additional = v.Device.Additional
	if d := b.digest(); hex.EncodeToString(d[:]) != v.Device.SHA384 {
		t.Errorf("digest with a device %x, want %s", d, v.Device.SHA384)
	}
	unhex := func(s string) []byte {
		b, err := hex.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	kek := deriveKEK(unhex(v.JWE.Z))
	if !bytes.Equal(kek, unhex(v.JWE.KEK)) {
		t.Errorf("KEK %x, want %s", kek, v.JWE.KEK)
	}
	block, err := aes.NewCipher(kek)
	if err != nil {
		t.Fatal(err)
	}
	wrapped, err := josecipher.KeyWrap(block, unhex(v.JWE.CEK))
	if err != nil {
		t.Fatal(err)
	}
	iv, _ := b64.DecodeString(v.JWE.Response.IV)
	body, err := seal(v.JWE.Protected, wrapped, unhex(v.JWE.CEK), iv, []byte(v.JWE.Plaintext))
	if err != nil {
		t.Fatal(err)
	}
	want, _ := json.Marshal(v.JWE.Response)
	if !bytes.Equal(body, want) {
		t.Errorf("JWE %s, want %s", body, want)
	}
}

// TestProtectedHeader: Trustee's client decrypts only with this order.
func TestProtectedHeader(t *testing.T) {
	r := ready(t, DialectT)
	g := r.guest("sample")
	g.attested()
	var f flattened
	if err := json.Unmarshal(g.get(keyPath).body, &f); err != nil {
		t.Fatal(err)
	}
	header, err := b64.DecodeString(f.Protected)
	if err != nil {
		t.Fatal(err)
	}
	var h struct {
		EPK struct{ X, Y string }
	}
	if err := json.Unmarshal(header, &h); err != nil {
		t.Fatal(err)
	}
	want := `{"alg":"ECDH-ES+A256KW","enc":"A256GCM","epk":{"crv":"P-256","kty":"EC","x":"` + h.EPK.X + `","y":"` + h.EPK.Y + `"}}`
	if string(header) != want || len(h.EPK.X) != 43 || len(h.EPK.Y) != 43 {
		t.Errorf("header %s, want %s", header, want)
	}
}

func TestCanonicalString(t *testing.T) {
	for in, want := range map[string]string{
		"": `""`, "a/b<>&": `"a/b<>&"`, "\"\\\b\f\n\r\t\x0f\x7f": "\"\\\"\\\\\\b\\f\\n\\r\\t\\u000f\x7f\"", "\u2028ü€😀": "\"\u2028ü€😀\"",
	} {
		if got := canonical(in); got != want {
			t.Errorf("canonical(%q) = %s, want %s", in, got, want)
		}
	}
}
