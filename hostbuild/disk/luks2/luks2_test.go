package luks2

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"coffer/internal/testenv"
)

var passphrase = []byte(strings.Repeat("0123456789abcdef", 8))

func params(seed byte) Params {
	return Params{Passphrase: passphrase, Label: "crypt_root", Rand: rand.NewChaCha8([32]byte{seed})}
}

// The oracle is cryptsetup: it reads the header, opens it with the passphrase
// and no other, and finds the volume key that Format gave.
func TestAgainstCryptsetup(t *testing.T) {
	cryptsetup := testenv.LookTool(t, "cryptsetup")
	header, key, err := Format(params(1))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	disk := file("disk", append(bytes.Clone(header), make([]byte, 1<<20)...))
	pass, wrong := file("pass", passphrase), file("wrong", append([]byte("x"), passphrase[1:]...))

	out, err := exec.Command(cryptsetup, "luksDump", disk).CombinedOutput()
	if err != nil {
		t.Fatalf("luksDump: %v\n%s", err, out)
	}
	for _, want := range []string{"Version:       \t2", "Label:         \tcrypt_root", "offset: 1048576 [bytes]", "cipher: aes-xts-plain64", "sector: 4096 [bytes]", "PBKDF:      pbkdf2", "Iterations: 1000"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("luksDump lacks %q:\n%s", want, out)
		}
	}
	if out, err := exec.Command(cryptsetup, "open", "--test-passphrase", "--key-file", pass, disk).CombinedOutput(); err != nil {
		t.Errorf("the passphrase does not open it: %v\n%s", err, out)
	}
	var exit *exec.ExitError
	if err := exec.Command(cryptsetup, "open", "--test-passphrase", "--key-file", wrong, disk).Run(); !errors.As(err, &exit) || exit.ExitCode() != 2 {
		t.Errorf("another passphrase: %v, want exit status 2", err)
	}
	keyFile := filepath.Join(dir, "key")
	if out, err := exec.Command(cryptsetup, "luksDump", "--batch-mode", "--dump-volume-key", "--volume-key-file", keyFile, "--key-file", pass, disk).CombinedOutput(); err != nil {
		t.Fatalf("dump of the volume key: %v\n%s", err, out)
	}
	if b, _ := os.ReadFile(keyFile); !bytes.Equal(b, key) {
		t.Error("cryptsetup finds another volume key")
	}
	// The second copy must serve alone.
	for i := range binarySize {
		header[i] = 0
	}
	disk = file("second", append(header, make([]byte, 1<<20)...))
	if out, err := exec.Command(cryptsetup, "open", "--test-passphrase", "--key-file", pass, disk).CombinedOutput(); err != nil {
		t.Errorf("the second copy alone: %v\n%s", err, out)
	}
}

func TestDeterministic(t *testing.T) {
	a, keyA, err := Format(params(1))
	if err != nil {
		t.Fatal(err)
	}
	b, keyB, _ := Format(params(1))
	c, keyC, _ := Format(params(2))
	if !bytes.Equal(a, b) || !bytes.Equal(keyA, keyB) {
		t.Error("the same randomness gives another header")
	}
	if bytes.Equal(a, c) || bytes.Equal(keyA, keyC) {
		t.Error("other randomness gives the same header")
	}
	if len(a) != DataOffset || len(keyA) != KeySize {
		t.Errorf("header of %d bytes, key of %d", len(a), len(keyA))
	}
	sum := sha256.Sum256(a)
	if got := hex.EncodeToString(sum[:]); got != "e965441432731fb2ec70cb7752a2a20d8d31b1dd9d64ff0506cd1d07246ab945" {
		t.Errorf("SHA-256 of the header %s", got)
	}
	if bytes.Contains(a, keyA[:16]) || bytes.Contains(a, passphrase[:16]) {
		t.Error("a secret stands in the header")
	}
}

func TestRefused(t *testing.T) {
	for name, change := range map[string]func(*Params){
		"short passphrase": func(p *Params) { p.Passphrase = []byte("secret") },
		"long label":       func(p *Params) { p.Label = strings.Repeat("x", 48) },
		"no randomness":    func(p *Params) { p.Rand = bytes.NewReader(nil) },
		"little of it":     func(p *Params) { p.Rand = io.LimitReader(p.Rand, 1000) },
		"constant":         func(p *Params) { p.Rand = zero{} },
	} {
		p := params(1)
		change(&p)
		if _, _, err := Format(p); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

type zero struct{}

func (zero) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestUUID(t *testing.T) {
	if got := UUID([16]byte{0xff, 15: 1, 6: 0xff, 8: 0xff}); got != "ff000000-0000-4f00-bf00-000000000001" {
		t.Error(got)
	}
}
