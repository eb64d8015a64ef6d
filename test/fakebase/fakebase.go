// Package fakebase is a guest base for tests: small, whole for base.Open, with a
// firmware that can be measured, and nothing that runs. Bundles are built from it
// in a second.
package fakebase

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
)

//go:embed ovmf.fd.gz
var zipped []byte

// OVMF is the synthetic firmware of package measure's vectors.
func OVMF(t testing.TB) []byte {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(zipped))
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Write makes a base for SNP in dir.
func Write(t testing.TB, dir string) {
	t.Helper()
	type file struct {
		Path   string `json:"path"`
		Size   int    `json:"size"`
		SHA256 string `json:"sha256"`
	}
	var files []file
	put := func(name string, data []byte) {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, data, 0o644)); err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(data)
		files = append(files, file{name, len(data), hex.EncodeToString(sum[:])})
	}
	put("OVMF.amdsev.fd", OVMF(t))
	put("programs.erofs", bytes.Repeat([]byte("programs"), 10000))
	for _, name := range []string{"vmlinuz", "initrd-base.img", "ca-certificates.crt", "bin/agent", "bin/containerd", "bin/containerd-shim-runc-v2", "bin/runc", "bin/snpguest"} {
		put(name, []byte(name+"\n"))
	}
	doc, err := json.Marshal(map[string]any{"version": 1, "platform": "snp", "kernel_version": "6.12.1", "files": files})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "base.json"), doc, 0o644); err != nil {
		t.Fatal(err)
	}
}
