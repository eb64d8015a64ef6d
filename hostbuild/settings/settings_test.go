package settings

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const good = `kbs:
  url: https://kbs.example:8999
  ca: /srv/kbs/ca.pem
  admin_key: ~/admin.key
policy_dir: /srv/policy
base_dir: /srv/base
output_dir: /srv/bundles
`

func read(t *testing.T, text string) (*Settings, error) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "hostbuild.yaml")
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return Read(file)
}

func TestRead(t *testing.T) {
	t.Setenv("HOME", "/home/admin")
	s, err := read(t, good)
	if err != nil {
		t.Fatal(err)
	}
	if s.KBSGuestURL != s.KBSURL || s.AdminKey != "/home/admin/admin.key" || s.OutputDir != "/srv/bundles" {
		t.Errorf("%+v", s)
	}
	if s, err = read(t, strings.Replace(good, "output_dir: /srv/bundles\n", "", 1)); err != nil || s.OutputDir != "/home/admin/.local/share/coffer/bundles" {
		t.Errorf("the default of output_dir: %+v, %v", s, err)
	}
}

func TestFaults(t *testing.T) {
	for _, tc := range []struct{ name, from, to, want string }{
		{"blank", "/srv/bundles", "/srv/my bundles", `7:13: output_dir: "/srv/my bundles" holds a blank`},
		{"relative", "/srv/base", "build/base/snp", `6:11: base_dir: "build/base/snp" must begin with / or ~/`},
		{"relative firmware", "base_dir: /srv/base", "ovmf: OVMF.fd", `6:7: ovmf: "OVMF.fd" must begin with / or ~/`},
		{"relative key", "base_dir: /srv/base", "id_key: id.pem", `6:9: id_key: "id.pem" must begin with / or ~/`},
		{"misspelt", "policy_dir", "policy_dri", "5:1: unknown key policy_dri: did you mean policy_dir?"},
		{"no CA", "  ca: /srv/kbs/ca.pem\n", "", "2:3: kbs.ca is missing"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := read(t, strings.Replace(good, tc.from, tc.to, 1)); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want %q", err, tc.want)
			}
		})
	}
	_, err := read(t, "role: server\n")
	if n := strings.Count(err.Error(), "hostbuild.yaml:1:1: "); n != 4 {
		t.Errorf("%d of 4 missing keys are told: %v", n, err)
	}
}

func TestFind(t *testing.T) {
	home := t.TempDir()
	t.Setenv("HOME", home)
	env := func(v string) func(string) string { return func(string) string { return v } }
	if f, err := Find("a.yaml", env("b.yaml")); f != "a.yaml" || err != nil {
		t.Errorf("the command line does not come first: %s, %v", f, err)
	}
	if f, err := Find("", env("b.yaml")); f != "b.yaml" || err != nil {
		t.Errorf("the environment does not come second: %s, %v", f, err)
	}
	mine := filepath.Join(home, ".config/coffer/hostbuild.yaml")
	if f, err := Find("", env("")); err == nil && f != "/etc/coffer/hostbuild.yaml" || err != nil && !errors.Is(err, ErrNotFound) {
		t.Errorf("without a file of the user's: %s, %v", f, err)
	}
	if err := errors.Join(os.MkdirAll(filepath.Dir(mine), 0o755), os.WriteFile(mine, nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	if f, err := Find("", env("")); f != mine || err != nil {
		t.Errorf("the user's file: %s, %v", f, err)
	}
}

func TestInstalledBase(t *testing.T) {
	prefix := t.TempDir()
	program := filepath.Join(prefix, "bin/hostbuild")
	if dir := baseOf(program); dir != "" {
		t.Errorf("without a base: %s", dir)
	}
	want := filepath.Join(prefix, "lib/coffer/base/snp")
	if err := os.MkdirAll(want, 0o755); err != nil {
		t.Fatal(err)
	}
	if dir := baseOf(program); dir != want {
		t.Errorf("the base beside the program: %q, want %q", dir, want)
	}
}
