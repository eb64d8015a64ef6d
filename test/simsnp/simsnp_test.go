package simsnp

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"coffer/internal/snp"
	"coffer/internal/snp/verify"
)

func TestSaveAndLoad(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "chip")
	made, err := New(Params{Product: "Turin"})
	if err != nil {
		t.Fatal(err)
	}
	if err := made.Save(dir); err != nil {
		t.Fatal(err)
	}
	loaded, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	if loaded.ChipID != made.ChipID || !loaded.TCB.Equal(made.TCB) || loaded.Product != "Turin" {
		t.Errorf("loaded %+v, want %+v", loaded, made)
	}
	rootsPEM, err := os.ReadFile(filepath.Join(dir, RootsFile))
	if err != nil {
		t.Fatal(err)
	}
	roots, err := verify.LoadRoots(rootsPEM)
	if err != nil {
		t.Fatal(err)
	}
	report, err := loaded.Report([48]byte{1}, [64]byte{2}, 0)
	if err != nil {
		t.Fatal(err)
	}
	o := verify.Options{Roots: roots, Now: time.Now(), MinTCB: map[string]snp.TCB{"Turin": {}}}
	if _, err := verify.Verify(report, loaded.Certs(), o); err != nil {
		t.Errorf("the saved roots do not verify a report of the loaded chip: %v", err)
	}

	if err := made.Save(dir); !errors.Is(err, os.ErrExist) {
		t.Errorf("Save over a chip: %v, want that it exists", err)
	}
	info, err := os.Stat(filepath.Join(dir, vcekFile))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode of %s: %v, %v, want 0600", vcekFile, info.Mode(), err)
	}
}

func TestLoadRefuses(t *testing.T) {
	for name, breakIt := range map[string]func(dir string) error{
		"no chip": func(dir string) error { return os.RemoveAll(dir) },
		"no key": func(dir string) error {
			return os.WriteFile(filepath.Join(dir, vcekFile), nil, 0o600)
		},
		"another chip's key": func(dir string) error {
			other, err := New(Params{})
			if err != nil {
				return err
			}
			otherDir := filepath.Join(dir, "other")
			if err := other.Save(otherDir); err != nil {
				return err
			}
			a, err := os.ReadFile(filepath.Join(dir, vcekFile))
			if err != nil {
				return err
			}
			b, err := os.ReadFile(filepath.Join(otherDir, vcekFile))
			if err != nil {
				return err
			}
			marker := []byte("-----BEGIN PRIVATE KEY")
			cert, otherKey := a[:bytes.Index(a, marker)], b[bytes.Index(b, marker):]
			return os.WriteFile(filepath.Join(dir, vcekFile), append(cert, otherKey...), 0o600)
		},
		"bad chip id": func(dir string) error {
			return os.WriteFile(filepath.Join(dir, chipFile), []byte(`{"chip_id":"0011"}`), 0o600)
		},
	} {
		dir := filepath.Join(t.TempDir(), "chip")
		chip, err := New(Params{})
		if err != nil {
			t.Fatal(err)
		}
		if err := chip.Save(dir); err != nil {
			t.Fatal(err)
		}
		if err := breakIt(dir); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(dir); err == nil {
			t.Errorf("%s: loaded", name)
		}
	}
}
