package disk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"coffer/internal/testenv"
)

func newDrive(t *testing.T) string {
	t.Helper()
	p := DriveParams{Out: filepath.Join(t.TempDir(), "d.qcow2"), Size: 16 << 20, Label: "user_data", Time: testTime,
		Files: []File{{Path: "/dir/old", Mode: 0o100644, Data: []byte("old\n")}, {Path: "/link", Mode: 0o120777, Link: "dir/old"}}}
	if err := BuildDrive(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	return p.Out
}

func cat(t *testing.T, drive, name string) string {
	t.Helper()
	var b bytes.Buffer
	if err := ReadDrive(t.Context(), drive, &b, name); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// fsck checks the drive with the tools of others.
func fsck(t *testing.T, drive string) {
	t.Helper()
	raw := filepath.Join(t.TempDir(), "raw")
	if out := output(t, testenv.LookTool(t, "qemu-img"), "check", drive); !strings.Contains(out, "No errors") {
		t.Errorf("qemu-img: %s", out)
	}
	output(t, testenv.LookTool(t, "qemu-img"), "convert", "-O", "raw", drive, raw)
	output(t, testenv.LookTool(t, "e2fsck"), "-fn", raw)
}

func TestPutAndGet(t *testing.T) {
	drive, src := newDrive(t), t.TempDir()
	write := func(name, data string, mode os.FileMode) {
		t.Helper()
		path := filepath.Join(src, name)
		os.MkdirAll(filepath.Dir(path), 0o750)
		if err := os.WriteFile(path, []byte(data), mode); err != nil {
			t.Fatal(err)
		}
		os.Chmod(path, mode)
	}
	write("tree/a", "1\n", 0o640)
	write("tree/b c/d", strings.Repeat("2", 100000), 0o755)
	put := func(from, to string) error {
		return PutDrive(t.Context(), drive, filepath.Join(src, from), to, testTime)
	}
	for _, p := range [][2]string{{"tree/a", "/new/deep/a"}, {"tree", "/dir"}, {"tree/a", "/dir/old"}, {"tree", "/other"}} {
		if err := put(p[0], p[1]); err != nil {
			t.Fatal(err)
		}
	}
	write("tree/a", "changed\n", 0o600)
	if err := put("tree", "/dir"); err != nil { // replaces what is there
		t.Fatal(err)
	}
	fsck(t, drive)
	for name, want := range map[string]string{
		"/new/deep/a": "1\n", "/dir/tree/a": "changed\n", "/dir/tree/b c/d": strings.Repeat("2", 100000), "/dir/old": "1\n", "/other/a": "1\n",
	} {
		if got := cat(t, drive, name); got != want {
			t.Errorf("%s: %.20q", name, got)
		}
	}
	entries, err := ListDrive(t.Context(), drive, "/dir/tree")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []DriveEntry{{Name: "a", Mode: 0o100600, Size: 8}, {Name: "b c", Mode: 0o40750}} {
		if !slices.Contains(entries, want) {
			t.Errorf("no %+v in %+v", want, entries)
		}
	}
	if err := put("tree", "/dir/old"); !errors.Is(err, ErrBadFile) {
		t.Errorf("a folder over a file: %v", err)
	}
	if err := put("none", "/x"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("nothing to put: %v", err)
	}
	write("huge", string(randomBytes(1, 20<<20)), 0o644)
	before, _ := os.ReadFile(drive)
	if err := put("huge", "/"); !errors.Is(err, ErrTooSmall) || !strings.Contains(err.Error(), "resize") {
		t.Errorf("too large: %v", err)
	}
	if after, _ := os.ReadFile(drive); !bytes.Equal(before, after) {
		t.Error("a failed put has changed the drive")
	}

	dest := filepath.Join(t.TempDir(), "out")
	skipped, err := GetDrive(t.Context(), drive, "/", dest)
	if err != nil || !slices.Equal(skipped, []string{"/link"}) {
		t.Fatalf("skipped %v, %v", skipped, err)
	}
	if b, err := os.ReadFile(filepath.Join(dest, "dir/tree/b c/d")); err != nil || len(b) != 100000 {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	if _, err := GetDrive(t.Context(), drive, "/", dest); !errors.Is(err, fs.ErrExist) {
		t.Errorf("over what is there: %v", err)
	}
	if _, err := GetDrive(t.Context(), drive, "/none", dest+"2"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what is not there: %v", err)
	}
}

// What comes out of a drive takes no more room than the drive's file, whatever
// its file system claims.
func TestGetIsBounded(t *testing.T) {
	debugfs := testenv.LookTool(t, "debugfs")
	data, big := filepath.Join(t.TempDir(), "data"), filepath.Join(t.TempDir(), "sparse")
	if err := os.WriteFile(data, randomBytes(1, 3<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(big, []byte("head"), 0o600), os.Truncate(big, 100<<20+1)); err != nil {
		t.Fatal(err)
	}
	deep, dir := "", "" // 2^14 folders, by 14
	for range 14 {
		deep += fmt.Sprintf("mkdir %[1]sx\nln %[1]sx %[1]sy\n", dir)
		dir += "x/"
	}
	for name, tt := range map[string]struct {
		commands string
		want     error
		get      string // what comes out nevertheless
	}{
		"a sparse file":             {"write " + big + " big", nil, "/big"},
		"a file with many names":    {"write " + data + " a\nln a b\nln a c\nln a d\nln a e\nln a f", ErrTooMuch, "/f"},
		"a folder in itself":        {"mkdir d\nln d d/x", ErrBadFile, ""},
		"folders by two names each": {deep, ErrTooMuch, ""},
	} {
		t.Run(name, func(t *testing.T) {
			raw, drive := filepath.Join(t.TempDir(), "raw"), newDrive(t)
			output(t, testenv.LookTool(t, "qemu-img"), "convert", "-O", "raw", drive, raw)
			script := filepath.Join(t.TempDir(), "script")
			if err := os.WriteFile(script, []byte(tt.commands+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			output(t, debugfs, "-w", "-f", script, raw)
			output(t, testenv.LookTool(t, "qemu-img"), "convert", "-O", "qcow2", raw, drive)
			st, err := os.Stat(drive)
			if err != nil {
				t.Fatal(err)
			}
			dest := filepath.Join(t.TempDir(), "out")
			if _, err := GetDrive(t.Context(), drive, "/", dest); !errors.Is(err, tt.want) {
				t.Errorf("error %v, want %v", err, tt.want)
			}
			if n := allocated(t, dest); n > st.Size()+1<<20 {
				t.Errorf("%d bytes on the disk, the drive's file has %d", n, st.Size())
			}
			if tt.get == "" {
				return
			}
			one := filepath.Join(t.TempDir(), "one")
			if _, err := GetDrive(t.Context(), drive, tt.get, one); err != nil {
				t.Fatal(err)
			}
			original := data
			if tt.want == nil {
				original = big
			}
			output(t, "cmp", original, one)
		})
	}
}

// allocated is how many bytes the files and folders at dir occupy.
func allocated(t *testing.T, dir string) (n int64) {
	t.Helper()
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err == nil {
			n += fi.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	return n
}

func TestResize(t *testing.T) {
	drive := newDrive(t)
	for _, size := range []int64{300 << 20, 24 << 20} {
		if err := ResizeDrive(t.Context(), drive, size); err != nil {
			t.Fatal(err)
		}
		fsck(t, drive)
		if got := cat(t, drive, "/dir/old"); got != "old\n" {
			t.Errorf("after resizing: %q", got)
		}
		if out := output(t, testenv.LookTool(t, "qemu-img"), "info", drive); !strings.Contains(out, fmt.Sprintf("(%d bytes)", size)) {
			t.Errorf("qemu-img info: %s", out)
		}
	}
	nothingElse(t, drive)
	if err := ResizeDrive(t.Context(), drive, 1<<20); !errors.Is(err, ErrTooSmall) {
		t.Errorf("error %v", err)
	}
}

func nothingElse(t *testing.T, file string) {
	t.Helper()
	list, err := os.ReadDir(filepath.Dir(file))
	if err != nil || len(list) != 1 {
		t.Errorf("left beside the drive: %v, %v", list, err)
	}
}

// A drive with a lock of QEMU's kind is not touched; a damaged one is named so.
func TestEditRefused(t *testing.T) {
	drive := newDrive(t)
	f, err := os.OpenFile(drive, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	lock := unix.Flock_t{Type: unix.F_RDLCK, Start: 100, Len: 1}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lock); err != nil {
		t.Fatal(err)
	}
	if err := ResizeDrive(t.Context(), drive, 32<<20); !errors.Is(err, ErrInUse) {
		t.Errorf("in use: %v", err)
	}
	f.Close()
	if err := ResizeDrive(t.Context(), drive, 32<<20); err != nil {
		t.Errorf("free again: %v", err)
	}
	noFS := writeFile(t, "empty.qcow2", nil)
	out, err := os.OpenFile(noFS, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	raw, err := os.Create(filepath.Join(t.TempDir(), "raw"))
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	raw.Truncate(8 << 20)
	if err := packRaw(raw, 8<<20, out); err != nil {
		t.Fatal(err)
	}
	if err := PutDrive(context.Background(), noFS, drive, "/x", testTime); err == nil || !strings.Contains(err.Error(), noFS) {
		t.Errorf("no file system: %v", err)
	}
}
