package kbsclient

import "testing"

func TestParseToken(t *testing.T) {
	enc := func(s string) string { return b64url.EncodeToString([]byte(s)) }
	jwt := func(payload string) string { return enc(`{"alg":"ES256"}`) + "." + enc(payload) + "." + enc("sig") }
	for _, tc := range []struct {
		name, token string
		ok          bool
	}{
		{"good", fakeToken("n"), true},
		{"no claims", jwt(`{}`), true}, // T's "Simple" tokens have others
		{"empty", "", false},
		{"two parts", "a.b", false},
		{"four parts", fakeToken("n") + ".x", false},
		{"no signature", enc("{}") + "." + enc("{}") + ".", false},
		{"payload no base64", enc("{}") + ".***." + enc("s"), false},
		{"header no base64", "***." + enc("{}") + "." + enc("s"), false},
		{"payload no JSON", jwt("x"), false},
		{"payload an array", jwt("[]"), false},
		{"exp a text", jwt(`{"exp":"soon"}`), false},
		{"submods a list", jwt(`{"submods":[]}`), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := ParseToken(tc.token)
			if (err == nil) != tc.ok {
				t.Fatalf("%+v, %v", c, err)
			}
		})
	}
	c, err := ParseToken(jwt(`{"submods":{"cpu0":{"ear.status":"affirming"},"gpu0":{"ear.status":"warning"}}}`))
	if err != nil || len(c.Submods) != 2 || c.Submods["cpu0"].Status != "affirming" || c.Submods["gpu0"].Status != "warning" {
		t.Errorf("%+v, %v", c, err)
	}
	if !c.Expires.IsZero() || !c.Issued.IsZero() {
		t.Errorf("times out of nothing: %+v", c)
	}
}
