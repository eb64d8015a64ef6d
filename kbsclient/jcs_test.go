package kbsclient

import "testing"

// The string rules of RFC 8785, 3.2.2.2.
func TestCanonicalString(t *testing.T) {
	for in, want := range map[string]string{
		"€$\x0f\nA'B\"\\\\\"/": "\"€$\\u000f\\nA'B\\\"\\\\\\\\\\\"/\"", // the RFC's own example
		"\b\t\n\f\r":           `"\b\t\n\f\r"`,
		"\x00\x1f\x7f":         "\"\\u0000\\u001f\x7f\"",
		"<>&/":                 `"<>&/"`,
		"\u2028\u2029é😀":       "\"\u2028\u2029é😀\"",
		"":                     `""`,
	} {
		got, err := appendString(nil, in)
		if err != nil || string(got) != want {
			t.Errorf("%q: %s, %v; want %s", in, got, err, want)
		}
	}
	if _, err := appendCanonical(nil, object{"a": "\xff"}); err == nil {
		t.Error("invalid UTF-8 accepted")
	}
	got, err := appendCanonical(nil, object{"b": "2", "a": object{"z": "", "y": "1"}, "": "0"})
	if want := `{"":"0","a":{"y":"1","z":""},"b":"2"}`; err != nil || string(got) != want {
		t.Errorf("%s, %v; want %s", got, err, want)
	}
}
