package nfs

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

func TestParse(t *testing.T) {
	for text, want := range map[string]string{
		"nas.example:/export/data\n":        "nas.example:/export/data",
		"# ours\n\n  192.0.2.7:/srv \r\n":   "192.0.2.7:/srv",
		"[2001:db8::1]:/srv/":               "[2001:db8::1]:/srv",
		"nas:/":                             "nas:/",
		"":                                  "0 lines",
		"# only this\n":                     "0 lines",
		"a:/b\nc:/d\n":                      "2 lines",
		"nas.example/export":                "is not server:/export",
		"nas:export":                        "is not server:/export",
		":/export":                          "is not a server's name",
		"-o:/export":                        "is not a server's name",
		"a b:/export":                       "is not a server's name",
		"nas:/export,addr=10.0.0.1":         "is not the clean path",
		"nas:/a b":                          "is not the clean path",
		"nas:/a/../b":                       "is not the clean path",
		"nas://b":                           "is not the clean path",
		"nas:/a\x00b":                       "is not the clean path",
		"[192.0.2.7]:/x":                    "is not an IPv6 address",
		"[fe80::1%eth0]:/x":                 "is not an IPv6 address",
		"[::1:/x":                           "is not an IPv6 address",
		"nas:/" + strings.Repeat("a", 1100): "is not the clean path",
		strings.Repeat("# much\n", 1000) + "a:/b": "more than 4096 bytes",
	} {
		e, err := Parse([]byte(text))
		if got := fmt.Sprint(e, err); err == nil && e.String() != want || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: %s, want %s", text, got, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("nas.example:/export\n"))
	f.Add([]byte("[::1]:/x"))
	f.Fuzz(func(t *testing.T, text []byte) {
		e, err := Parse(text)
		if err != nil {
			return
		}
		again, err := Parse([]byte(e.String()))
		if err != nil || *again != *e {
			t.Errorf("%q gives %v, which gives %v, %v", text, e, again, err)
		}
		if strings.ContainsAny(e.Host+e.Path, ", \n\x00") {
			t.Errorf("%q gives %q", text, e)
		}
	})
}

// The file is the host's to make.
func TestReadHostile(t *testing.T) {
	for name, lay := range map[string]func(string) error{
		"link": func(p string) error { return os.Symlink("/etc/passwd", p) },
		"link within": func(p string) error {
			return errors.Join(os.WriteFile(p+".other", []byte("nas:/x\n"), 0o644), os.Symlink(File+".other", p))
		},
		"pipe":   func(p string) error { return unix.Mkfifo(p, 0o644) },
		"folder": func(p string) error { return os.Mkdir(p, 0o755) },
		"huge":   func(p string) error { return os.WriteFile(p, make([]byte, 1<<20), 0o644) },
	} {
		dir := t.TempDir()
		if err := lay(filepath.Join(dir, File)); err != nil {
			t.Fatal(err)
		}
		if e, err := Read(dir); err == nil {
			t.Errorf("%s: %v", name, e)
		}
	}
	if e, err := Read(t.TempDir()); e != nil || err != nil {
		t.Errorf("no file: %v, %v", e, err)
	}
	dir := t.TempDir()
	os.WriteFile(filepath.Join(dir, File), []byte("nas:/x\n"), 0o644)
	if e, err := Read(dir); err != nil || e.String() != "nas:/x" {
		t.Errorf("%v, %v", e, err)
	}
}

func TestTarget(t *testing.T) {
	dir := t.TempDir()
	f, err := target(dir)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if fi, err := os.Lstat(filepath.Join(dir, Dir)); err != nil || !fi.IsDir() {
		t.Error("no folder was made")
	}
	dir = t.TempDir()
	if err := os.Symlink("/etc", filepath.Join(dir, Dir)); err != nil {
		t.Fatal(err)
	}
	if _, err := target(dir); !errors.Is(err, errTarget) {
		t.Errorf("a link: %v", err)
	}
}

// server is an NFS server as the kernel's client sees it.
type server struct {
	oldest  string // highest version that it speaks
	mountd  error  // of its mount protocol
	away    bool
	stale   bool
	mounted string
	tried   []string
	mounts  int
}

func (s *server) Mount(_, source, data string) error {
	s.tried = append(s.tried, source+" "+data)
	switch {
	case s.away:
		return unix.ECONNREFUSED
	case !strings.Contains(data, "vers="+s.oldest+","):
		return unix.EPROTONOSUPPORT
	case s.mountd != nil:
		return s.mountd
	}
	s.mounted, s.stale = data, false
	s.mounts++
	return nil
}

func (s *server) Check(string) error {
	for s.away {
		time.Sleep(time.Second) // a hard mount
	}
	if s.stale {
		return unix.ESTALE
	}
	return nil
}

func (s *server) Unmount(string) error { s.mounted = ""; return nil }

func keep(t *testing.T, s *server, f func(lines func() string)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		var lines []string
		k := &Keeper{Export: Export{"nas.example", "/x"}, Drive: "/user_data", Sys: s,
			Lookup: func(context.Context, string) ([]netip.Addr, error) {
				return []netip.Addr{netip.MustParseAddr("192.0.2.7")}, nil
			},
			Printf: func(format string, a ...any) { lines = append(lines, fmt.Sprintf(format, a...)) }}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); k.Run(ctx) }()
		f(func() string { synctest.Wait(); return strings.Join(lines, "\n") })
		s.away = false
		cancel()
		<-done
		if s.mounted != "" {
			t.Error("still mounted at the end")
		}
		time.Sleep(time.Minute) // what hung ends
	})
}

func TestVersions(t *testing.T) {
	for _, version := range []string{"4.2", "4.1", "4.0", "3"} {
		s := &server{oldest: version}
		keep(t, s, func(lines func() string) {
			if !strings.Contains(lines(), "nfs nas.example:/x is mounted at /user_data/mnt") || !strings.Contains(s.mounted, "vers="+version+",addr=192.0.2.7,") {
				t.Errorf("%s: %s", version, lines())
			}
		})
		if !strings.HasPrefix(s.tried[0], "192.0.2.7:/x vers=4.2,") {
			t.Errorf("tried first %q", s.tried[0])
		}
	}
}

// What keeps a server of version 3 from being mounted is told, not only that it
// knows no newer one.
func TestMountProtocolClosed(t *testing.T) {
	s := &server{oldest: "3", mountd: unix.ECONNREFUSED}
	keep(t, s, func(lines func() string) {
		if want := "is not mounted: NFS 4: protocol not supported; NFS 3, its mount protocol at port 2049 or where port 111 says: connection refused"; !strings.Contains(lines(), want) {
			t.Errorf("%s\nwant %s", lines(), want)
		}
		s.mountd = nil
		time.Sleep(retryMax)
		if !strings.Contains(lines(), "is mounted at") {
			t.Error(lines())
		}
	})
}

// A server that is not there at first is waited for; the log tells it once.
func TestLateServer(t *testing.T) {
	s := &server{oldest: "4.2", away: true}
	keep(t, s, func(lines func() string) {
		time.Sleep(10 * time.Minute)
		if n := strings.Count(lines(), "is not mounted: connection refused"); n != 1 {
			t.Errorf("told %d times:\n%s", n, lines())
		}
		if n := len(s.tried); n < 10 || n > 20 {
			t.Errorf("%d tries in ten minutes", n)
		}
		s.away = false
		time.Sleep(retryMax + time.Second)
		if !strings.Contains(lines(), "is mounted at") {
			t.Error(lines())
		}
	})
}

// An outage is waited out; a server that has forgotten us is mounted anew.
func TestOutage(t *testing.T) {
	s := &server{oldest: "4.2"}
	keep(t, s, func(lines func() string) {
		time.Sleep(checkEvery)
		s.away = true
		time.Sleep(10 * time.Minute)
		s.away = false
		time.Sleep(checkEvery + 2*time.Second)
		if s.mounts != 1 || !strings.Contains(lines(), "has not answered for 2m0s") {
			t.Errorf("%d mounts:\n%s", s.mounts, lines())
		}
		s.stale = true
		time.Sleep(2*checkEvery + 2*time.Second)
		if s.mounts != 2 || !strings.Contains(lines(), "is lost: stale file handle") {
			t.Errorf("%d mounts:\n%s", s.mounts, lines())
		}
	})
}
