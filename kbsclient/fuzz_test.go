package kbsclient

import (
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"
)

// seeds are the bodies of real answers.
func seeds(f *testing.F) {
	for _, name := range []string{"answers-T.txt", "answers-H.txt"} {
		for _, tr := range readTranscripts(f, name) {
			f.Add(tr.body)
		}
	}
}

func FuzzErrorInformation(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, body []byte) {
		typ, detail := parseErrorInformation(body)
		if strings.ContainsAny(typ+detail, "\n\r\x00\x1b\x7f") || len(detail) > maxDetail+3 || !utf8.ValidString(detail) {
			t.Errorf("type %q, detail %q", typ, detail)
		}
	})
}

func FuzzChallenge(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, body []byte) {
		nonce, err := parseChallenge(body)
		if err != nil {
			return
		}
		// What is accepted can be hashed as it is.
		b, err := appendString(nil, nonce)
		if err != nil || string(b) != `"`+nonce+`"` {
			t.Errorf("nonce %q", nonce)
		}
	})
}

func FuzzToken(f *testing.F) {
	seeds(f)
	f.Add([]byte(fakeToken("n")))
	f.Fuzz(func(t *testing.T, body []byte) {
		var a struct{ Token string }
		if json.Unmarshal(body, &a) != nil {
			a.Token = string(body)
		}
		if c, err := ParseToken(a.Token); (c == nil) == (err == nil) {
			t.Errorf("claims %v, error %v", c, err)
		}
	})
}

func FuzzJWE(f *testing.F) {
	v := loadVectors(f)
	seeds(f)
	f.Add([]byte(v.JWE.Response))
	key := v.key(f)
	f.Fuzz(func(t *testing.T, body []byte) {
		plain, err := decryptJWE(body, key)
		if err == nil && string(plain) != v.JWE.Plaintext {
			t.Errorf("%q decrypts to %q", body, plain)
		}
	})
}

// The canonical form of a string is a JSON string that reads back as itself.
func FuzzCanonicalString(f *testing.F) {
	for _, s := range []string{"", "a", "\x00\b\t\n\f\r\x1f\x7f\"\\/<>&", "é\u2028\u2029😀", "\xff"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		b, err := appendString(nil, s)
		if (err != nil) != !utf8.ValidString(s) {
			t.Fatalf("error %v", err)
		}
		var got string
		if err == nil && (json.Unmarshal(b, &got) != nil || got != s) {
			t.Errorf("%q -> %s -> %q", s, b, got)
		}
	})
}
