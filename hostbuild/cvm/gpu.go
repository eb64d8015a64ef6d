package cvm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"

	"golang.org/x/sys/unix"

	"coffer/hostbuild/base"
	"coffer/hostbuild/config"
	"coffer/hostbuild/disk"
	"coffer/hostbuild/policy"
	"coffer/hostbuild/register"
	"coffer/internal/gpu/rim"
	"coffer/internal/guestconfig"
)

// gpuInputs is what goes into the bundle of what the section gpu names.
type gpuInputs struct {
	files []disk.File
	pins  []string // SHA-256 of the manifests
}

// checkGPU reads the folders of the section gpu. Manifests are pinned by their
// digest; OCSP answers are signed and dated, and need no pin.
func checkGPU(c *config.Config) (in gpuInputs, err error) {
	if c.GPU == nil {
		return in, nil
	}
	put := func(dir, target, pattern string, take func(name string) error) error {
		if dir == "" {
			return nil
		}
		in.files = append(in.files, disk.File{Path: target, Mode: unix.S_IFDIR | 0o755})
		entries, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		n := 0
		for _, e := range entries {
			name := filepath.Join(dir, e.Name())
			if ok, _ := filepath.Match(pattern, e.Name()); !ok || !e.Type().IsRegular() {
				continue
			}
			if err := take(name); err != nil {
				return err
			}
			in.files = append(in.files, disk.File{Path: path.Join(target, e.Name()), Mode: unix.S_IFREG | 0o644, Source: name})
			n++
		}
		if n == 0 {
			return fmt.Errorf("%s holds no file %s", dir, pattern)
		}
		return nil
	}
	err = errors.Join(
		explainGPU("rims", "hostbuild rim fetch --dir %s ID...", c.GPU.RIMs, put(c.GPU.RIMs, guestconfig.GPURIMPath, "*.xml", func(name string) error {
			f, err := rim.ReadFile(name)
			if err == nil {
				_, err = rim.Parse(f.Data)
			}
			in.pins = append(in.pins, f.SHA256)
			return err
		})),
		explainGPU("ocsp_answers", "hostbuild gpu verify --ocsp allow_cached --ocsp-dir %s ...", c.GPU.OCSPAnswers,
			put(c.GPU.OCSPAnswers, guestconfig.GPUOCSPPath, "*.ocsp", func(string) error { return nil })),
	)
	if len(in.files) > 0 {
		in.files = append([]disk.File{{Path: path.Dir(guestconfig.GPURIMPath), Mode: unix.S_IFDIR | 0o755}}, in.files...)
	}
	return in, err
}

func explainGPU(key, cure, dir string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("gpu.%s: %w; "+cure+" fills it", key, err, dir)
}

// checkGPUBase fails where the base's guests can have no GPU.
func checkGPUBase(c *config.Config, b *base.Base) error {
	if c.GPU != nil && b.GPU == nil {
		return fmt.Errorf("CONFIG.yaml asks for GPUs, and guest base %s (image %s) has no driver for any: build a base of the image nvidia (hostbuild base build --image nvidia), or remove gpu and cc_gpu_mechanism", b.Dir, b.Image)
	}
	return nil
}

// gpuGuard is the section gpu of the guest config.
func gpuGuard(c *config.Config, id string, pins []string, b *base.Base) *guestconfig.GPU {
	if c.GPU == nil {
		return nil
	}
	g := c.GPU.GPU
	g.RIMs, g.DeviceRoot, g.RIMRoot = pins, b.GPU.DeviceRoot, b.GPU.RIMRoot
	if c.GPU.Required {
		g.VaultKeyPath = policy.VaultKeyPath(id)
	}
	return &g
}

// checkGPUKBS asks whether the KBS can judge GPUs, where it has to.
func checkGPUKBS(ctx context.Context, c *config.Config, reg *register.Registrar) error {
	if c.GPU == nil || !c.GPU.Trustee() {
		return nil
	}
	if err := reg.CheckGPU(ctx); err != nil {
		return fmt.Errorf("gpu.mode %s: %w", c.GPU.Mode, err)
	}
	return nil
}
