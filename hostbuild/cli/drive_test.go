package cli

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"coffer/hostbuild/disk/qcow2"
	"coffer/internal/testenv"
)

// TestNamesOfAHost: a drive comes back from a host, whose names go to a terminal.
func TestNamesOfAHost(t *testing.T) {
	dir := t.TempDir()
	tree := filepath.Join(dir, "tree")
	if err := os.Mkdir(tree, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tree, "a\x1b]0;title\x07\u202eb"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	const size = 16 << 20
	raw, err := os.Create(filepath.Join(dir, "raw"))
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	if err := raw.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(testenv.LookTool(t, "mke2fs"), "-q", "-F", "-d", tree, raw.Name()).CombinedOutput(); err != nil {
		t.Fatalf("mke2fs: %v\n%s", err, out)
	}
	drive, err := os.Create(filepath.Join(dir, "drive.qcow2"))
	if err != nil {
		t.Fatal(err)
	}
	defer drive.Close()
	w, err := qcow2.NewWriter(drive, size)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.NewOffsetWriter(w, 0), raw); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	a := &App{Stdout: &out, Stderr: &errs}
	if code := a.Run(t.Context(), []string{"hostbuild", "drive", "ls", drive.Name()}); code != 0 {
		t.Fatalf("exit %d: %s", code, &errs)
	}
	if !strings.Contains(out.String(), "a?]0;title??b\n") {
		t.Errorf("listing %q", &out)
	}
	if code := a.Run(t.Context(), []string{"hostbuild", "drive", "cat", "\x1b[31m.qcow2", "/x"}); code != 1 || !strings.Contains(errs.String(), "?[31m.qcow2: no such file") {
		t.Errorf("exit %d: %q", code, &errs)
	}
}
