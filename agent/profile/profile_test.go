package profile_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"coffer/agent/profile"
	"coffer/internal/guestconfig"
)

var nvflare = guestconfig.Profile{
	Name: "nvflare", Remove: []string{"workspace/*/daemon_pid.fl", "workspace/*/pid.fl"},
	StopFile: "workspace/nvflare/shutdown.fl", StopSeconds: 15, Lasting: true,
}

func touch(t *testing.T, dir string, names ...string) {
	t.Helper()
	for _, n := range names {
		p := filepath.Join(dir, n)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte("1\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func tree(t *testing.T, dir string) (names []string) {
	t.Helper()
	if err := filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			name, _ := filepath.Rel(dir, p)
			names = append(names, name)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return names
}

func TestPrepare(t *testing.T) {
	vault := t.TempDir()
	touch(t, vault, "workspace/nvflare/daemon_pid.fl", "workspace/nvflare/pid.fl", "workspace/nvflare/shutdown.fl", "workspace/other/pid.fl",
		"workspace/nvflare/kit/pid.fl", "workspace/nvflare/model.pt", "pid.fl")
	removed, err := profile.Prepare(nvflare, vault)
	if err != nil {
		t.Fatal(err)
	}
	if len(removed) != 4 || !slices.Contains(removed, "/vault/workspace/nvflare/daemon_pid.fl") {
		t.Errorf("removed %v", removed)
	}
	if got := strings.Join(tree(t, vault), " "); got != "pid.fl workspace/nvflare/kit/pid.fl workspace/nvflare/model.pt" {
		t.Errorf("left: %s", got)
	}
	if removed, err := profile.Prepare(nvflare, t.TempDir()); err != nil || len(removed) != 0 {
		t.Errorf("an empty vault: %v, %v", removed, err)
	}
	if removed, err := profile.Prepare(guestconfig.Profile{}, "/nonexistent"); err != nil || len(removed) != 0 {
		t.Errorf("no profile: %v, %v", removed, err)
	}
}

// What an earlier run has left must neither lead out of /vault nor block.
func TestHostileVault(t *testing.T) {
	outside := t.TempDir()
	touch(t, outside, "nvflare/pid.fl", "nvflare/shutdown.fl")
	for name, lay := range map[string]func(vault string) error{
		"workspace is a link": func(v string) error { return os.Symlink(outside, v+"/workspace") },
		"below it is a link": func(v string) error {
			os.Mkdir(v+"/workspace", 0o755)
			return os.Symlink(outside+"/nvflare", v+"/workspace/nvflare")
		},
		"workspace is a pipe": func(v string) error { return syscall.Mkfifo(v+"/workspace", 0o644) },
		"a relative link": func(v string) error {
			os.Mkdir(v+"/workspace", 0o755)
			return os.Symlink("../../"+filepath.Base(outside)+"/nvflare", v+"/workspace/nvflare")
		},
		"the stop file is a pipe": func(v string) error {
			os.MkdirAll(v+"/workspace/nvflare", 0o755)
			return syscall.Mkfifo(v+"/workspace/nvflare/shutdown.fl", 0o644)
		},
		"the stop file is a folder": func(v string) error { return os.MkdirAll(v+"/workspace/nvflare/shutdown.fl/x", 0o755) },
		"the stop file is a link": func(v string) error {
			os.MkdirAll(v+"/workspace/nvflare", 0o755)
			return os.Symlink(outside+"/new", v+"/workspace/nvflare/shutdown.fl")
		},
	} {
		t.Run(name, func(t *testing.T) {
			vault := t.TempDir()
			if err := lay(vault); err != nil {
				t.Fatal(err)
			}
			profile.Ask(nvflare, vault)
			profile.Prepare(nvflare, vault)
			if got := strings.Join(tree(t, outside), " "); got != "nvflare/pid.fl nvflare/shutdown.fl" {
				t.Errorf("outside of the vault is now: %s", got)
			}
		})
	}
}

func TestAsk(t *testing.T) {
	vault := t.TempDir()
	touch(t, vault, "workspace/nvflare/x")
	if err := profile.Ask(nvflare, vault); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(vault + "/workspace/nvflare/shutdown.fl"); err != nil {
		t.Error(err)
	}
	if err := profile.Ask(nvflare, t.TempDir()); err == nil {
		t.Error("asked a workload that has not made its workspace")
	}
}

func TestFailed(t *testing.T) {
	if profile.Failed(guestconfig.Profile{}, 0) || !profile.Failed(guestconfig.Profile{}, 1) || !profile.Failed(nvflare, 0) {
		t.Error("wrong")
	}
}
