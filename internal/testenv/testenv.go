// Package testenv decides what happens to a test that cannot run here: it fails
// where the environment variable CI is set, so that nothing is silently left
// out, and is skipped with the reason elsewhere.
package testenv

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// Need stops the test with the reason unless ok.
func Need(t testing.TB, ok bool, reason string) {
	t.Helper()
	switch {
	case ok:
	case os.Getenv("CI") != "":
		t.Fatalf("this test cannot run, and CI is set: %s", reason)
	default:
		t.Skip(reason)
	}
}

// LookTool returns the path of a program in PATH, /usr/sbin or /sbin, and stops
// the test where it is in none of them.
func LookTool(t testing.TB, name string) string {
	t.Helper()
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path
		}
	}
	Need(t, false, "program "+name+" is not installed")
	return ""
}

// Root stops the test unless it runs as root.
func Root(t testing.TB) {
	t.Helper()
	Need(t, os.Geteuid() == 0, "needs root")
}
