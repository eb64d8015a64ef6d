package testenv

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// outcome stands in for a test and keeps what became of it.
type outcome struct {
	testing.TB
	failed, skipped string
}

func (o *outcome) Helper()                        {}
func (o *outcome) Fatalf(format string, a ...any) { o.failed = fmt.Sprintf(format, a...) }
func (o *outcome) Skip(a ...any)                  { o.skipped = fmt.Sprint(a...) }

func TestNeed(t *testing.T) {
	for _, tc := range []struct {
		ci              string
		ok              bool
		failed, skipped string
	}{
		{"", true, "", ""},
		{"true", true, "", ""},
		{"", false, "", "no such thing"},
		{"true", false, "this test cannot run, and CI is set: no such thing", ""},
	} {
		t.Setenv("CI", tc.ci)
		var o outcome
		Need(&o, tc.ok, "no such thing")
		if o.failed != tc.failed || o.skipped != tc.skipped {
			t.Errorf("CI=%q ok=%v: failed %q, skipped %q", tc.ci, tc.ok, o.failed, o.skipped)
		}
	}
}

func TestLookTool(t *testing.T) {
	t.Setenv("CI", "")
	dir := t.TempDir()
	want := filepath.Join(dir, "tool-of-this-test")
	if err := os.WriteFile(want, nil, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir)
	var o outcome
	if got := LookTool(&o, "tool-of-this-test"); got != want || o.skipped != "" {
		t.Errorf("LookTool = %q, skipped %q, want %q", got, o.skipped, want)
	}
	if LookTool(&o, "no-tool-of-this-name"); o.skipped == "" {
		t.Error("a missing tool does not skip the test")
	}
}
