package applog

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"coffer/internal/testenv"
)

func openRoot(t *testing.T, dir string) *os.Root {
	t.Helper()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	return root
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func write(t *testing.T, w io.Writer, text string) {
	t.Helper()
	if n, err := io.WriteString(w, text); n != len(text) || err != nil {
		t.Fatalf("Write gave %d, %v for %d bytes", n, err, len(text))
	}
}

func TestFileRotates(t *testing.T) {
	dir := t.TempDir()
	f := NewFile(openRoot(t, dir), "log", 100, 2, TextNotice)
	var all string
	for i := range 30 { // 300 bytes: three files
		line := fmt.Sprintf("line %04d\n", i)
		all += line
		write(t, f, line)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	got := read(t, dir+"/log.2") + read(t, dir+"/log.1") + read(t, dir+"/log")
	if got != all {
		t.Errorf("files hold %q, want %q", got, all)
	}
	// One more file's worth pushes the oldest out.
	for i := range 10 {
		write(t, f, fmt.Sprintf("more %04d\n", i))
	}
	f.Close()
	if got := read(t, dir+"/log.2"); !strings.HasPrefix(got, "line 0010") {
		t.Errorf("oldest backup begins %.20q", got)
	}
	if names, _ := filepath.Glob(dir + "/*"); len(names) != 3 {
		t.Errorf("files: %v", names)
	}
	if f.Dropped() != 0 {
		t.Errorf("dropped %d", f.Dropped())
	}
}

func TestFileCutsAtLines(t *testing.T) {
	dir := t.TempDir()
	f := NewFile(openRoot(t, dir), "log", 100, 9, TextNotice)
	write(t, f, strings.Repeat("0123456789\n", 50)) // one chunk of many lines
	write(t, f, strings.Repeat("x", 250))           // and one without any
	f.Close()
	var size int
	for i := 9; i >= 0; i-- {
		name := dir + "/log"
		if i > 0 {
			name = fmt.Sprintf("%s.%d", name, i)
		}
		b, err := os.ReadFile(name)
		if err != nil {
			continue
		}
		if len(b) > 100 {
			t.Errorf("%s has %d bytes", name, len(b))
		}
		size += len(b)
	}
	if size != 50*11+250 {
		t.Errorf("the files hold %d bytes, want %d", size, 50*11+250)
	}
}

func TestFileAppendsAfterReboot(t *testing.T) {
	dir := t.TempDir()
	for range 2 {
		f := NewFile(openRoot(t, dir), "log", 100, 1, TextNotice)
		write(t, f, "boot\n")
		f.Close()
	}
	if got := read(t, dir+"/log"); got != "boot\nboot\n" {
		t.Errorf("got %q", got)
	}
}

// What the workload or the host puts in the log's place is not written through.
func TestFileHostileNames(t *testing.T) {
	for name, plant := range map[string]func(dir, victim string) error{
		"symlink out": func(dir, victim string) error { return os.Symlink(victim, dir+"/log") },
		"symlink within": func(dir, _ string) error {
			if err := os.WriteFile(dir+"/other", []byte("other"), 0o644); err != nil {
				return err
			}
			return os.Symlink("other", dir+"/log")
		},
		"fifo":      func(dir, _ string) error { return unix.Mkfifo(dir+"/log", 0o600) },
		"directory": func(dir, _ string) error { return os.MkdirAll(dir+"/log/sub", 0o755) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			victim := filepath.Join(t.TempDir(), "victim")
			if err := os.WriteFile(victim, []byte("victim"), 0o644); err != nil {
				t.Fatal(err)
			}
			if err := plant(dir, victim); err != nil {
				t.Fatal(err)
			}
			f := NewFile(openRoot(t, dir), "log", 1000, 1, TextNotice)
			write(t, f, "hello\n")
			f.Close()
			if got := read(t, dir+"/log"); got != "hello\n" {
				t.Errorf("log holds %q", got)
			}
			if fi, _ := os.Lstat(dir + "/log"); !fi.Mode().IsRegular() {
				t.Errorf("log is %v", fi.Mode())
			}
			if got := read(t, victim); got != "victim" {
				t.Errorf("the file outside holds %q", got)
			}
			if b, err := os.ReadFile(dir + "/other"); err == nil && string(b) != "other" {
				t.Errorf("the other file holds %q", b)
			}
		})
	}
}

func TestFileOnFullDrive(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"); err != nil {
		testenv.Need(t, false, "cannot mount tmpfs: "+err.Error())
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	f := NewFile(openRoot(t, dir), "log", 64<<10, 8, TextNotice) // wants more than the drive has
	line := strings.Repeat("x", 99) + "\n"
	for range 5000 { // 500 KB
		write(t, f, line)
	}
	if f.Dropped() != 0 {
		t.Errorf("%d bytes dropped though there were backups to give up", f.Dropped())
	}

	// The workload fills the rest: nothing can be written.
	ballast := dir + "/ballast"
	out, err := os.Create(ballast)
	if err != nil {
		t.Fatal(err)
	}
	for _, err = out.Write(make([]byte, 4096)); err == nil; _, err = out.Write(make([]byte, 4096)) {
	}
	for range 9 { // no backup is left to give up
		f.removeOldest()
		for _, err = out.Write(make([]byte, 4096)); err == nil; _, err = out.Write(make([]byte, 4096)) {
		}
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	out.Close()
	for range 1000 {
		write(t, f, line)
	}
	if f.Dropped() < 50_000 {
		t.Errorf("only %d bytes dropped on a full drive", f.Dropped())
	}

	dropped := f.Dropped()
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	write(t, f, "room again\n")
	f.Close()
	got := read(t, dir+"/log")
	if !strings.HasSuffix(got, fmt.Sprintf("\ncoffer: %d bytes of this log were dropped\nroom again\n", dropped)) {
		t.Errorf("the log ends %q", got[max(0, len(got)-120):])
	}
}

// gate is a writer that blocks until it is opened.
type gate struct {
	open chan struct{}
	mu   sync.Mutex
	got  bytes.Buffer
}

func (g *gate) Write(p []byte) (int, error) {
	<-g.open
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.got.Write(p)
}

func TestAsyncNeverBlocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gate{open: make(chan struct{})}
		a := NewAsync(g, 1000, TextNotice)
		for i := range 1000 { // 10 000 bytes into a stuck writer
			write(t, a, fmt.Sprintf("line %04d\n", i))
		}
		dropped := a.Dropped()
		if dropped < 7000 || dropped > 9000 {
			t.Errorf("dropped %d of 10000 with room for 1000 and one batch under way", dropped)
		}
		if a.Close(time.Second) {
			t.Error("Close says that all was written")
		}
		close(g.open)
		synctest.Wait()
		if got := 10*int64(strings.Count(g.got.String(), "line ")) + dropped; got != 10_000 {
			t.Errorf("%d bytes written or dropped, want 10000", got)
		}
		if !a.Close(time.Second) {
			t.Error("Close again: not done")
		}
		write(t, a, "late\n") // no panic, no block
	})
}

func TestAsyncTellsOfDrops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gate{open: make(chan struct{}, 10)}
		a := NewAsync(g, 20, TextNotice)
		write(t, a, "first\n")
		synctest.Wait() // under way
		write(t, a, "0123456789012345678\n")
		write(t, a, "lost\n")
		g.open <- struct{}{}
		g.open <- struct{}{}
		synctest.Wait()
		write(t, a, "last\n")
		g.open <- struct{}{}
		if !a.Close(time.Second) {
			t.Error("not flushed")
		}
		want := "first\n0123456789012345678\n\ncoffer: 5 bytes of this log were dropped\nlast\n"
		if got := g.got.String(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	})
}

func TestLines(t *testing.T) {
	for _, tc := range []struct{ name, in, want string }{
		{"plain", "a\nb\n", "w: a\nw: b\n"},
		{"no end", "a\nb", "w: a\nw: b\n"},
		{"empty line", "\n\n", "w: \nw: \n"},
		{"carriage returns", "10%\r20%\r\n", "w: 10%20%\n"},
		{"terminal codes", "\x1b[2J\x1b]0;x\x07\x9b2J\n", "w: ?[2J?]0;x??2J\n"},
		{"tab", "a\tb\n", "w: a b\n"},
		{"another's line", "x\ncoffer: FAILED phase=run\n", "w: x\nw: coffer: FAILED phase=run\n"},
		{"long", strings.Repeat("y", 1030) + "\n", "w: " + strings.Repeat("y", 512) + "\nw: " + strings.Repeat("y", 512) + "\nw: yyyyyy\n"},
		{"exactly as long", strings.Repeat("y", 512) + "\n", "w: " + strings.Repeat("y", 512) + "\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, step := range []int{len(tc.in), 1, 7} {
				var out bytes.Buffer
				l := NewLines(&out, "w: ")
				for rest := tc.in; rest != ""; {
					n := min(step, len(rest))
					write(t, l, rest[:n])
					rest = rest[n:]
				}
				l.Flush()
				if out.String() != tc.want {
					t.Errorf("in steps of %d: got %q, want %q", step, out.String(), tc.want)
				}
			}
		})
	}
}

func TestTee(t *testing.T) {
	var console, file bytes.Buffer
	tee := NewTee(&console)
	write(t, tee, "early\n")
	tee.Attach(&file)
	write(t, tee, "late\n")
	for name, b := range map[string]*bytes.Buffer{"console": &console, "file": &file} {
		if b.String() != "early\nlate\n" {
			t.Errorf("%s has %q", name, b.String())
		}
	}
}

// Whatever the workload writes, each line on the console is short, printable
// and marked as the workload's.
func FuzzLines(f *testing.F) {
	f.Add([]byte("hello\nworld"), 3)
	f.Add([]byte("\x1b[2J\r\n\x00\xff\n"), 1)
	f.Add(bytes.Repeat([]byte("x"), 2000), 700)
	f.Fuzz(func(t *testing.T, in []byte, step int) {
		step = max(1, min(step, 4096))
		var out bytes.Buffer
		l := NewLines(&out, "w: ")
		for rest := in; len(rest) > 0; {
			n := min(step, len(rest))
			if k, err := l.Write(rest[:n]); k != n || err != nil {
				t.Fatalf("Write gave %d, %v", k, err)
			}
			rest = rest[n:]
		}
		l.Flush()
		for line := range strings.Lines(out.String()) {
			text, ok := strings.CutPrefix(line, "w: ")
			if !ok || len(text) > maxLine+1 || !strings.HasSuffix(text, "\n") {
				t.Fatalf("line %q", line)
			}
			for _, c := range []byte(strings.TrimSuffix(text, "\n")) {
				if c < ' ' || c >= 0x7f {
					t.Fatalf("line %q holds byte %#x", line, c)
				}
			}
		}
	})
}
