package scenarios

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"coffer/internal/guestconfig"
	"coffer/internal/testenv"
	"coffer/test/dockersave"
)

// driverDeadline is for building the driver's modules; they take minutes.
const driverDeadline = 40 * time.Minute

// TestNVIDIA (`make test-nvidia`): NVIDIA's modules, built from Debian's packages,
// load in a guest without a GPU as far as such a guest lets them.
func TestNVIDIA(t *testing.T) {
	if os.Getenv("COFFER_TEST_NVIDIA") == "" {
		t.Skip("downloads 190 MB and builds kernel modules: make test-nvidia")
	}
	env := newEnv(t)
	ctx, cancel := context.WithTimeout(t.Context(), driverDeadline)
	defer cancel()
	base := filepath.Join(env.Base, "../nvidia-simulated")
	args := []string{"base", "build", "--image", "nvidia", "--platform", "simulated", "--programs", env.Bin, "--out", base, "--cache", filepath.Join(env.Base, "../../cache")}
	if lock := filepath.Join(base, "base.lock"); exists(lock) {
		args = append(args, "--locked", lock)
	}
	if _, err := env.Run(ctx, "hostbuild", args...); err != nil {
		testenv.Need(t, !strings.Contains(err.Error(), "no Debian mirror") && !strings.Contains(err.Error(), "apt-get"), fmt.Sprintf("the driver's packages cannot be had: %v", err))
		t.Fatal(err)
	}
	env.Base = base
	l := startKBS(t, env)

	layer, err := dockersave.Layer(dockersave.Entry{Name: "workload", Mode: 0o755, Body: []byte("none")})
	if err != nil {
		t.Fatal(err)
	}
	image := dockersave.Image{Tag: "scenario:nvidia", Entrypoint: []string{"/workload"}, Layers: [][]byte{layer}}
	archive := filepath.Join(env.Dir, "image.tar.gz")
	if err := image.SaveLegacy(archive); err != nil {
		t.Fatal(err)
	}
	yaml := filepath.Join(env.Dir, "CONFIG.yaml")
	write(t, yaml, fmt.Appendf(nil, `root_drive_size: 1
docker_archive: %s
memory_mib: 1024
allowed_out_ports: [443]
cc_gpu_mechanism: nvidia_cc
gpu:
  count: 1
  ocsp: off
  rim_service: https://rim.example.org
`, archive))
	b, err := env.Build(ctx, l.settings, yaml)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Unpack(ctx, filepath.Join(env.Dir, "site")); err != nil {
		t.Fatal(err)
	}
	t.Run("ModulesLoad", func(t *testing.T) {
		g := boot(t, b)
		g.expect(`phase=driver status=start`)
		g.expect(`coffer: kernel: NVRM: No NVIDIA GPU found`)
		g.refused("driver", "E_GPU", "the VM has no NVIDIA GPU")
	})
	t.Run("HelperFindsNVML", func(t *testing.T) { helperFindsNVML(t, base) })
}

// helperFindsNVML runs gpu-helper with nothing but the guest's /usr: the real library
// is found and loaded, and says that the kernel has no driver.
func helperFindsNVML(t *testing.T, base string) {
	testenv.Root(t)
	root := t.TempDir()
	if out, err := exec.Command(testenv.LookTool(t, "fsck.erofs"), "--extract="+filepath.Join(root, "usr"), filepath.Join(base, "nvidia.erofs")).CombinedOutput(); err != nil {
		t.Fatalf("fsck.erofs: %v\n%s", err, out)
	}
	program, err := os.ReadFile(filepath.Join(base, "bin/gpu-helper"))
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(root, "gpu-helper"), program)
	if err := errors.Join(os.Chmod(filepath.Join(root, "gpu-helper"), 0o755), os.Symlink("usr/lib", filepath.Join(root, "lib")), os.Symlink("usr/lib64", filepath.Join(root, "lib64"))); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/gpu-helper", "--library", guestconfig.NVMLPath)
	cmd.SysProcAttr, cmd.Dir, cmd.Env = &syscall.SysProcAttr{Chroot: root}, "/", []string{}
	cmd.Stdin = strings.NewReader(`{"op":"settings"}` + "\n")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), `"call":"nvmlInit"`) || !strings.Contains(string(out), `"return":9`) { // NVML_ERROR_DRIVER_NOT_LOADED
		t.Errorf("gpu-helper: %v\n%s", err, out)
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
