package strict

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestReadFile(t *testing.T) {
	name := filepath.Join(t.TempDir(), "four")
	if err := os.WriteFile(name, []byte("1234"), 0o600); err != nil {
		t.Fatal(err)
	}
	if b, err := ReadFile(name, 4); err != nil || string(b) != "1234" {
		t.Errorf("up to the limit: %q, %v", b, err)
	}
	if b, err := ReadFile(name, 3); !errors.Is(err, ErrTooLarge) || !strings.Contains(err.Error(), name) || b != nil {
		t.Errorf("one byte more: %q, %v", b, err)
	}
	if _, err := ReadFile(name+"x", 4); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

func TestJSON(t *testing.T) {
	for text, want := range map[string]string{
		`{"a":1}`:         "",
		" {\"a\":1}\n":    "",
		`{"a":1,"b":2}`:   "unknown field",
		`{"a":1}{"a":1}`:  "after the document",
		`{"a":1}}`:        "after the document",
		`{"a":1}]`:        "after the document",
		`{"a":1} garbage`: "after the document",
		`{"a":`:           "unexpected EOF",
		``:                "EOF",
	} {
		var v struct{ A int }
		err := JSON([]byte(text), &v)
		if want == "" && (err != nil || v.A != 1) || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}
