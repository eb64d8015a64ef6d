package vault

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"coffer/internal/testenv"
)

func TestKey(t *testing.T) {
	for text, want := range map[string]string{
		strings.Repeat("0a", 64):        "",
		strings.Repeat("0a", 63):        "126 characters",
		strings.Repeat("0a", 64) + "\n": "129 characters",
		strings.Repeat("xx", 64):        "not hexadecimal",
		"":                              "0 characters",
	} {
		key, err := Key([]byte(text))
		if want == "" && (err != nil || !bytes.Equal(key, bytes.Repeat([]byte{10}, KeySize))) || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%.10q: %x, %v, want %q", text, key, err, want)
		}
		if err != nil && len(text) > 4 && strings.Contains(err.Error(), text[:4]) {
			t.Errorf("the error tells the key: %v", err)
		}
	}
}

// TestOpen has a file system of its own. It is skipped where the kernel cannot; the
// scenarios do it in a guest.
func TestOpen(t *testing.T) {
	testenv.Root(t)
	image, at := filepath.Join(t.TempDir(), "image"), t.TempDir()
	f, err := os.Create(image)
	if err == nil {
		err = errors.Join(f.Truncate(64<<20), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(testenv.LookTool(t, "mke2fs"), "-q", "-t", "ext4", "-b", "4096", "-O", "encrypt", image).CombinedOutput(); err != nil {
		t.Fatalf("mke2fs: %v\n%s", err, out)
	}
	mount := func() {
		t.Helper()
		if out, err := exec.Command("mount", "-o", "loop", image, at).CombinedOutput(); err != nil {
			t.Skipf("mount: %v: %s", err, out)
		}
	}
	mount()
	mounted := true
	defer func() {
		if mounted {
			exec.Command("umount", at).Run()
		}
	}()
	key, other := bytes.Repeat([]byte{1}, KeySize), bytes.Repeat([]byte{2}, KeySize)
	dir := filepath.Join(at, "vault")
	if err := Open(dir, key); errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOTTY) {
		t.Skip("this kernel has no fscrypt")
	} else if err != nil {
		t.Fatal(err)
	}
	secret := []byte("a secret of the workload")
	if err := os.WriteFile(filepath.Join(dir, "name-of-a-file"), secret, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Open(dir, key); err != nil {
		t.Errorf("a second time: %v", err)
	}
	if err := Open(dir, other); !errors.Is(err, ErrOther) {
		t.Errorf("with another key: %v", err)
	}
	plain := filepath.Join(at, "plain")
	if err := errors.Join(os.Mkdir(plain, 0o700), os.WriteFile(plain+"/x", nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := Open(plain, key); !errors.Is(err, ErrOther) {
		t.Errorf("a folder with files and no key: %v", err)
	}
	unmount := func() {
		t.Helper()
		if out, err := exec.Command("umount", at).CombinedOutput(); err != nil {
			t.Fatalf("umount: %v\n%s", err, out)
		}
		mounted = false
	}
	unmount()
	raw, err := os.ReadFile(image)
	if err != nil || bytes.Contains(raw, secret) || bytes.Contains(raw, []byte("name-of-a-file")) {
		t.Errorf("content or name lie open: %v", err)
	}
	mount()
	mounted = true
	if b, err := os.ReadFile(filepath.Join(dir, "name-of-a-file")); err == nil {
		t.Errorf("read without the key: %q", b)
	}
	if err := Open(dir, key); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "name-of-a-file")); err != nil || !bytes.Equal(b, secret) {
		t.Errorf("with the key: %q, %v", b, err)
	}
}
