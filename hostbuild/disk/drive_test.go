package disk

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"coffer/internal/testenv"
)

// odd names are those that need care in debugfs's command language.
var oddNames = []string{"plain", "with blank", `dou"ble`, `""`, `back\slash`, "'single'", "<12>", "#hash", "-w", "ünï", "{a,b}*?"}

func oddTree(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for i, name := range oddNames {
		if err := os.Mkdir(filepath.Join(dir, name), 0o750); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name, name), randomBytes(byte(i), 1000*i), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("../"+name, filepath.Join(dir, name, "link to "+name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(filepath.Join(dir, "plain", "plain"), 0o4751|os.ModeSetuid); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestBuildDrive(t *testing.T) {
	dir := oddTree(t)
	file := writeFile(t, "single", []byte("one file"))
	p := DriveParams{
		Out: filepath.Join(t.TempDir(), "user_data.qcow2"), Size: 100 << 20, Label: "user_data", Time: testTime,
		Trees: map[string]string{"tree": dir, "deep/er": file},
		Files: []File{
			{Path: "/conf/app.json", Mode: 0o100640, Data: []byte(`{"a":1}`)},
			{Path: "/conf", Mode: 0o040700},
			{Path: "/conf/here", Mode: 0o120777, Link: "app.json"},
		},
	}
	if err := BuildDrive(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if out := output(t, testenv.LookTool(t, "qemu-img"), "check", p.Out); !strings.Contains(out, "No errors were found") {
		t.Errorf("qemu-img check: %s", out)
	}
	if st, _ := os.Stat(p.Out); st.Mode() != 0o600 {
		t.Errorf("mode %v", st.Mode())
	} else if st.Sys().(*syscall.Stat_t).Blocks*512 > 20<<20 {
		t.Errorf("it takes %d bytes: not sparse", st.Sys().(*syscall.Stat_t).Blocks*512)
	}
	raw := filepath.Join(t.TempDir(), "raw")
	output(t, testenv.LookTool(t, "qemu-img"), "convert", "-O", "raw", p.Out, raw)
	output(t, testenv.LookTool(t, "e2fsck"), "-fn", raw)

	for i, name := range oddNames {
		var b bytes.Buffer
		if err := ReadDrive(t.Context(), p.Out, &b, "/tree/"+name+"/"+name); err != nil {
			t.Errorf("%q: %v", name, err)
		} else if !bytes.Equal(b.Bytes(), randomBytes(byte(i), 1000*i)) {
			t.Errorf("%q: other contents", name)
		}
	}
	list, err := ListDrive(t.Context(), p.Out, "tree/plain")
	if err != nil {
		t.Fatal(err)
	}
	want := []DriveEntry{{Name: "link to plain", Mode: 0o120777, Size: 8}, {Name: "plain", Mode: 0o104751}}
	if !slices.Equal(list, want) {
		t.Errorf("list %v, want %v", list, want)
	}
	list, err = ListDrive(t.Context(), p.Out, "/")
	if err != nil {
		t.Fatal(err)
	}
	if i := slices.IndexFunc(list, func(e DriveEntry) bool { return e.Name == "conf" }); i < 0 || list[i].Mode != 0o040700 {
		t.Errorf("root lists %v", list)
	}

	testenv.Root(t)
	mnt := mountImage(t, raw, "ext4", "ro,loop")
	diff := output(t, "diff", "-r", "--no-dereference", dir, filepath.Join(mnt, "tree"))
	if diff != "" {
		t.Error(diff)
	}
	if got, _ := os.ReadFile(filepath.Join(mnt, "deep/er")); string(got) != "one file" {
		t.Errorf("deep/er holds %q", got)
	}
	filepath.WalkDir(mnt, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			t.Fatal(err)
		}
		info, _ := d.Info()
		if st := info.Sys().(*syscall.Stat_t); st.Uid != 0 || st.Gid != 0 {
			t.Errorf("%s belongs to %d:%d", name, st.Uid, st.Gid)
		}
		return nil
	})
}

func TestBuildDriveRefuses(t *testing.T) {
	fifo, socket := t.TempDir(), t.TempDir()
	if err := syscall.Mkfifo(filepath.Join(fifo, "f"), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(socket, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	newline := t.TempDir()
	if err := os.WriteFile(filepath.Join(newline, "a\nquit"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(*DriveParams)
		want   error
		words  string
	}{
		"pipe":          {func(p *DriveParams) { p.Trees = map[string]string{"t": fifo} }, ErrBadFile, "pipe"},
		"socket":        {func(p *DriveParams) { p.Trees = map[string]string{"t": socket} }, ErrBadFile, "socket"},
		"newline":       {func(p *DriveParams) { p.Trees = map[string]string{"t": newline} }, nil, "control characters"},
		"missing":       {func(p *DriveParams) { p.Trees = map[string]string{"t": "/no/such"} }, fs.ErrNotExist, "/no/such"},
		"twice":         {func(p *DriveParams) { p.Files = append(p.Files, p.Files[0]) }, ErrBadFile, "twice"},
		"small":         {func(p *DriveParams) { p.Size = 4096 }, ErrTooSmall, "4096"},
		"full":          {func(p *DriveParams) { p.Files[0].Data = randomBytes(1, 9<<20) }, ErrTooSmall, "9437184"},
		"nearly full":   {func(p *DriveParams) { p.Files[0].Data = randomBytes(1, 8<<20-1000) }, ErrTooSmall, "bytes of files"},
		"no such place": {func(p *DriveParams) { p.Out = "/no/such/drive" }, fs.ErrNotExist, "/no/such/drive"},
	} {
		t.Run(name, func(t *testing.T) {
			p := DriveParams{Out: filepath.Join(t.TempDir(), "d.qcow2"), Size: 8 << 20, Time: testTime, Files: []File{{Path: "/f", Mode: 0o100644}}}
			c.change(&p)
			err := BuildDrive(t.Context(), p)
			if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.words) {
				t.Errorf("error %v", err)
			}
			nothingLeft(t, p.Out)
		})
	}
}

// nothingLeft checks that a failed build leaves neither the drive nor a
// temporary file beside it.
func nothingLeft(t *testing.T, out string) {
	t.Helper()
	names, _ := filepath.Glob(filepath.Join(filepath.Dir(out), "*"))
	hidden, _ := filepath.Glob(filepath.Join(filepath.Dir(out), ".*"))
	if left := append(names, hidden...); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestReadDriveErrors(t *testing.T) {
	p := DriveParams{Out: filepath.Join(t.TempDir(), "d.qcow2"), Size: 8 << 20, Time: testTime}
	if err := BuildDrive(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if err := ReadDrive(t.Context(), p.Out, new(bytes.Buffer), "/none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
	if _, err := ListDrive(t.Context(), p.Out, "/none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a directory that is not there: %v", err)
	}
	if _, err := ListDrive(t.Context(), writeFile(t, "junk", randomBytes(1, 10000)), "/"); err == nil {
		t.Error("junk was listed")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := ListDrive(ctx, p.Out, "/"); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}
