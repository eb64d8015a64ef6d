package drives

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"coffer/internal/testenv"
)

func sysBlock(t *testing.T, serials map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for disk, serial := range serials {
		if err := os.MkdirAll(filepath.Join(dir, disk), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, disk, "serial"), []byte(serial), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestFind(t *testing.T) {
	for _, tc := range []struct {
		name    string
		serials map[string]string
		want    string
		err     string
	}{
		{"plain", map[string]string{"vda": "crypt_root", "vdb": "applog"}, "/dev/vdb", ""},
		{"newline and padding", map[string]string{"vdb": "applog\x00\x00\n"}, "/dev/vdb", ""},
		{"longer name", map[string]string{"vdb": "applog2"}, "", "no such drive"},
		{"other kind of disk", map[string]string{"sda": "applog"}, "", "no such drive"},
		{"twice", map[string]string{"vdb": "applog", "vdc": "applog"}, "", "2 disks have this serial"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
			defer cancel()
			got, err := Find(ctx, sysBlock(t, tc.serials), "/dev", "applog")
			if got != tc.want || (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
				t.Errorf("got %q, %v; want %q, error with %q", got, err, tc.want, tc.err)
			}
		})
	}
}

func TestFindWaits(t *testing.T) {
	dir := sysBlock(t, nil)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	go func() {
		os.MkdirAll(filepath.Join(dir, "vdc"), 0o755)
		os.WriteFile(filepath.Join(dir, "vdc", "serial"), []byte("applog"), 0o644)
	}()
	if got, err := Find(ctx, dir, "/dev", "applog"); got != "/dev/vdc" {
		t.Errorf("got %q, %v", got, err)
	}
}

// The flags of the table hold in the kernel, and a file system that is not ext4
// is refused.
func TestAttach(t *testing.T) {
	testenv.Root(t)
	mkfs := testenv.LookTool(t, "mke2fs")
	losetup := testenv.LookTool(t, "losetup")
	device := func(fstype string) string {
		t.Helper()
		img := filepath.Join(t.TempDir(), "img")
		if err := os.WriteFile(img, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(img, 8<<20); err != nil {
			t.Fatal(err)
		}
		if fstype != "" {
			if out, err := exec.Command(mkfs, "-q", "-t", fstype, "-e", "panic", img).CombinedOutput(); err != nil {
				t.Fatalf("mke2fs: %v: %s", err, out)
			}
		}
		out, err := exec.Command(losetup, "--find", "--show", img).Output()
		testenv.Need(t, err == nil, "no loop device")
		dev := strings.TrimSpace(string(out))
		t.Cleanup(func() { exec.Command(losetup, "-d", dev).Run() })
		return dev
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for _, m := range append(Host(), Scratch("")) {
		t.Run(m.Target, func(t *testing.T) {
			m.Device, m.Target = device("ext4"), t.TempDir()
			if err := Attach(ctx, m); err != nil {
				t.Fatal(err)
			}
			defer unix.Unmount(m.Target, unix.MNT_DETACH)
			var st unix.Statfs_t
			if err := unix.Statfs(m.Target, &st); err != nil {
				t.Fatal(err)
			}
			const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_RDONLY // the same bits as ST_*
			if got, want := uintptr(st.Flags)&flags, m.Flags&flags; got != want {
				t.Errorf("mounted with flags %#x, want %#x", got, want)
			}
			if m.Flags&unix.MS_NOSUID == 0 || m.Flags&unix.MS_NODEV == 0 {
				t.Error("setuid files or device nodes work on it")
			}
			mounts, err := os.ReadFile("/proc/self/mounts")
			if err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(string(mounts)) {
				if strings.Contains(line, m.Target) && strings.Contains(line, "errors=panic") && m.Device != "" && m.Flags&unix.MS_NOATIME == 0 {
					t.Errorf("the host's superblock decides: %s", line)
				}
			}
		})
	}
	t.Run("not a file system", func(t *testing.T) {
		m := Mount{Device: device(""), Target: t.TempDir()}
		if err := Attach(ctx, m); !errors.Is(err, unix.EINVAL) {
			t.Errorf("got %v, want EINVAL", err)
		}
	})
}
