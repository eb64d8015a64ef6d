// Package gpusimtest runs the real gpu-helper against the fake libnvidia-ml.so.1 of
// test/fakenvml, with a driver of test/gpusim behind it.
package gpusimtest

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"coffer/internal/gpu/helper"
	"coffer/internal/testenv"
	"coffer/test/gpusim"
)

// built is what is compiled, once a process.
type built struct{ dir, helper, library, old string }

var build = sync.OnceValues(func() (built, error) {
	dir, err := os.MkdirTemp("", "gpusim-")
	if err != nil {
		return built{}, err
	}
	b := built{dir, filepath.Join(dir, "gpu-helper"), filepath.Join(dir, "libnvidia-ml.so.1"), filepath.Join(dir, "old.so")}
	where, err := exec.Command("go", "list", "-f", "{{.Module.Dir}}", "coffer/test/gpusim").Output()
	if err != nil {
		return b, fmt.Errorf("find the fake library: %w", err)
	}
	source := filepath.Join(string(where[:len(where)-1]), "test", "fakenvml", "fakenvml.c")
	for _, args := range [][]string{
		{"gcc", "-Wall", "-Werror", "-shared", "-fPIC", "-o", b.library, source},
		{"gcc", "-Wall", "-Werror", "-shared", "-fPIC", "-DOLD", "-o", b.old, source},
		{"go", "build", "-o", b.helper, "coffer/cmd/gpu-helper"},
	} {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=1", "CGO_CFLAGS=-O1 -Wno-deprecated-declarations")
		if out, err := cmd.CombinedOutput(); err != nil {
			return b, errors.Join(err, errors.New(string(out)))
		}
	}
	return b, nil
})

// Main is for TestMain: it runs the tests and removes what was compiled for them.
func Main(m *testing.M) int {
	code := m.Run()
	if b, _ := build(); b.dir != "" {
		os.RemoveAll(b.dir)
	}
	return code
}

// Helper returns a helper whose library asks driver.
func Helper(t testing.TB, driver *gpusim.Driver) *helper.Helper {
	t.Helper()
	testenv.LookTool(t, "gcc")
	b, err := build()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "") // t.TempDir can be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- driver.Serve(l) }()
	t.Cleanup(func() {
		l.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return &helper.Helper{Path: b.helper, Library: b.library, Env: []string{"FAKENVML_SOCKET=" + socket}}
}

// OldLibrary is the path of a library that lacks what newer ones have.
func OldLibrary(t testing.TB) string {
	t.Helper()
	b, err := build()
	if err != nil {
		t.Fatal(err)
	}
	return b.old
}
