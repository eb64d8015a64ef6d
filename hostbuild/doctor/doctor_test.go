package doctor

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"coffer/hostbuild/kbs"
	"coffer/hostbuild/settings"
)

// tree is a host that has the named programs and files.
func tree(t *testing.T, files ...string) Host {
	t.Helper()
	root := t.TempDir()
	for _, f := range files {
		name, text, _ := strings.Cut(f, "=")
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o755)); err != nil {
			t.Fatal(err)
		}
	}
	return Host{Root: root, Path: []string{"/usr/bin", "/usr/sbin"}, Now: time.Now()}
}

func noSettings() (*settings.Settings, error) { return nil, settings.ErrNotFound }

func find(fs []Finding, name string) Finding {
	for _, f := range fs {
		if f.Name == name && f.Status != OK {
			return f
		}
	}
	for _, f := range fs {
		if f.Name == name {
			return f
		}
	}
	return Finding{}
}

func TestPrograms(t *testing.T) {
	whole := []string{
		"usr/sbin/mke2fs", "usr/sbin/debugfs", "usr/sbin/e2fsck", "usr/sbin/resize2fs", "usr/bin/mkfs.erofs", "usr/bin/apt-get", "usr/bin/dpkg-deb",
		"usr/share/keyrings/debian-archive-keyring.gpg", "usr/bin/qemu-system-x86_64", "etc/os-release=NAME=x\nID=debian\n",
	}
	fs := tree(t, whole...).Check(context.Background(), noSettings)
	for _, f := range fs {
		if f.Name == "settings" != (f.Status == Missing) || f.Status == Note {
			t.Errorf("on a whole host: %+v", f)
		}
	}
	for _, tc := range []struct {
		without, name string
		want          Status
		pkg, text     string
	}{
		{"usr/sbin/resize2fs", "e2fsprogs", Missing, "e2fsprogs", "resize2fs: not installed"},
		{"usr/bin/mkfs.erofs", "erofs-utils", Note, "erofs-utils", "to make a guest base"},
		{"usr/share/keyrings", "debian-archive-keyring", Note, "debian-archive-keyring", "not installed"},
		{"usr/bin/qemu", "qemu-system-x86", Note, "qemu-system-x86", "which a build does not"},
		{"usr/bin/apt-get", "apt", Note, "", "to make a guest base"},
		{"etc/", "mirror", Note, "", "no Debian archive"},
	} {
		var left []string
		for _, f := range whole {
			if !strings.HasPrefix(f, tc.without) {
				left = append(left, f)
			}
		}
		f := find(tree(t, left...).Check(context.Background(), noSettings), tc.name)
		if f.Status != tc.want || f.Package != tc.pkg || !strings.Contains(f.Text, tc.text) || f.Do == "" {
			t.Errorf("without %s: %+v", tc.without, f)
		}
	}
	plain := tree(t, whole...)
	if err := os.Chmod(filepath.Join(plain.Root, "usr/sbin/mke2fs"), 0o644); err != nil {
		t.Fatal(err)
	}
	if f := find(plain.Check(context.Background(), noSettings), "e2fsprogs"); f.Status != Missing {
		t.Errorf("a file that cannot be run: %+v", f)
	}
	ubuntu := append([]string{"etc/os-release=ID=\"ubuntu\"\n"}, whole[:len(whole)-1]...)
	if f := find(tree(t, ubuntu...).Check(context.Background(), noSettings), "mirror"); f.Status != Note || !strings.Contains(f.Do, "--mirror") {
		t.Errorf("on Ubuntu: %+v", f)
	}
}

// serve starts an embedded KBS and returns settings for it.
func serve(t *testing.T) *settings.Settings {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "kbs")
	if err := kbs.Init(dir, kbs.Options{Hosts: []string{"127.0.0.1"}}); err != nil {
		t.Fatal(err)
	}
	server, err := kbs.New(kbs.Options{Dir: dir, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- server.Serve(ctx, l) }()
	t.Cleanup(func() { cancel(); <-served })
	url := "https://" + l.Addr().String()
	return &settings.Settings{File: "hostbuild.yaml", KBSURL: url, KBSGuestURL: url, KBSCA: filepath.Join(dir, "ca.pem"), AdminKey: filepath.Join(dir, "admin.key"), PolicyDir: dir}
}

func TestKBS(t *testing.T) {
	whole := serve(t)
	fs := Host{Now: time.Now()}.KBS(context.Background(), whole)
	if len(fs) != 3 || find(fs, "kbs.ca").Status != OK || find(fs, "kbs.url").Status != OK || find(fs, "kbs.admin_key").Status != OK {
		t.Fatalf("a good KBS: %+v", fs)
	}
	other := serve(t)
	for _, tc := range []struct {
		name   string
		change func(*settings.Settings)
		in     time.Duration
		want   Finding
	}{
		{"another CA", func(s *settings.Settings) { s.KBSCA = other.KBSCA }, 0, Finding{Name: "kbs.url", Status: Missing, Text: "unknown authority", Do: "kbs.ca"}},
		{"no CA", func(s *settings.Settings) { s.KBSCA = "/nothing.pem" }, 0, Finding{Name: "kbs.ca", Status: Missing, Text: "no such file", Do: "kbs init"}},
		{"CA without a certificate", func(s *settings.Settings) { s.KBSCA = s.AdminKey }, 0, Finding{Name: "kbs.ca", Status: Missing, Text: "no PEM certificate", Do: "kbs init"}},
		{"nobody there", func(s *settings.Settings) { s.KBSURL = "https://127.0.0.1:1" }, 0, Finding{Name: "kbs.url", Status: Missing, Text: "refused", Do: "kbs serve"}},
		{"plain HTTP", func(s *settings.Settings) { s.KBSURL = strings.Replace(s.KBSURL, "https", "http", 1) }, 0, Finding{Name: "kbs.url", Status: Missing, Text: "no https address", Do: "kbs.url"}},
		{"a name it has not", func(s *settings.Settings) { s.KBSURL = strings.Replace(s.KBSURL, "127.0.0.1", "localhost", 1) }, 0, Finding{Name: "kbs.url", Status: Missing, Text: "localhost", Do: "kbs.url: a name"}},
		{"another admin", func(s *settings.Settings) { s.AdminKey = other.AdminKey }, 0, Finding{Name: "kbs.admin_key", Status: Missing, Text: "admin", Do: "public half"}},
		{"guests by a name it has not", func(s *settings.Settings) { s.KBSGuestURL = "https://kbs.example:8999" }, 0, Finding{Name: "kbs.guest_url", Status: Note, Text: "E_KBS_TLS", Do: "both names"}},
		{"soon over", func(*settings.Settings) {}, 720 * 24 * time.Hour, Finding{Name: "kbs.url", Status: Note, Text: "ends in", Do: "renew"}},
		{"over", func(*settings.Settings) {}, 740 * 24 * time.Hour, Finding{Name: "kbs.url", Status: Missing, Text: "expired", Do: "clock"}},
	} {
		s := *whole
		tc.change(&s)
		fs := Host{Now: time.Now().Add(tc.in)}.KBS(context.Background(), &s)
		f := find(fs, tc.want.Name)
		if f.Status != tc.want.Status || !strings.Contains(f.Text, tc.want.Text) || !strings.Contains(f.Do, tc.want.Do) {
			t.Errorf("%s: %+v, want %+v", tc.name, f, tc.want)
		}
		if Healthy(fs) == (tc.want.Status == Missing) {
			t.Errorf("%s: healthy is %v", tc.name, Healthy(fs))
		}
	}
	if err := os.Chmod(whole.AdminKey, 0o644); err != nil {
		t.Fatal(err)
	}
	if f := find(Host{Now: time.Now()}.KBS(context.Background(), whole), "kbs.admin_key"); f.Status != Note || f.Do != "chmod 600 "+whole.AdminKey {
		t.Errorf("a key that all may read: %+v", f)
	}
}
