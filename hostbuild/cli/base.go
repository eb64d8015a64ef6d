package cli

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"coffer/hostbuild/base"
	"coffer/hostbuild/yamlcheck"
)

func (a *App) base() *cobra.Command {
	var p base.Params
	var programs string
	build := &cobra.Command{
		Use:   "build",
		Short: "Make a guest base: kernel, firmware, base initrd and guest programs",
		Long: `Fetches the kernel, the firmware and the CA certificates as Debian packages through
an apt configuration of its own (the machine's sources stay as they are), and packs
them with the guest's programs. A base is made once and used for many bundles.

The image nvidia adds NVIDIA's driver: its kernel modules are built with the kernel's
own compiler, which is unpacked and not installed.`,
		Example: "  hostbuild base build --platform snp --programs bin --out build/base/snp\n" +
			"  hostbuild base build --image nvidia --nvidia-driver NVIDIA-Linux-x86_64-580.95.05.run --out build/base/nvidia",
		Args: usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			suffix := ""
			if p.Platform == base.PlatformSimulated {
				suffix = "-simulated"
			}
			p.Init = filepath.Join(programs, "init"+suffix)
			p.Programs = map[string]string{"agent": filepath.Join(programs, "agent"+suffix), "snpguest": filepath.Join(programs, "snpguest"+suffix)}
			for _, name := range []string{"containerd", "containerd-shim-runc-v2", "runc"} {
				p.Programs[name] = filepath.Join(programs, name)
			}
			if p.Image == "nvidia" || p.SimulatedGPU != "" {
				p.Programs["gpu-helper"] = filepath.Join(programs, "gpu-helper")
			}
			if p.Cache == "" {
				dir, err := os.UserCacheDir()
				if err != nil {
					return fmt.Errorf("--cache is not given: %w", err)
				}
				p.Cache = filepath.Join(dir, "coffer")
			}
			var err error
			if p.Out, err = yamlcheck.Expand(p.Out); err != nil {
				return err
			}
			p.Log = func(format string, args ...any) { fmt.Fprintf(a.Stderr, format+"\n", args...) }
			b, err := base.Build(cmd.Context(), p)
			if err != nil {
				return err
			}
			fmt.Fprintf(a.Stdout, "base %s (%s, kernel %s) is ready in %s\n", b.ID, b.Platform, b.KernelVersion, b.Dir)
			return nil
		},
	}
	f := build.Flags()
	f.StringVar(&p.Out, "out", "", "folder to make")
	f.StringVar(&p.Platform, "platform", base.PlatformSNP, "snp, or simulated for tests")
	f.StringVar(&p.Image, "image", "cpu", "cpu, or nvidia for guests with GPUs")
	f.StringVar(&p.NVIDIADriver, "nvidia-driver", "", "NVIDIA's .run file, or a folder of its .deb files, in place of Debian's driver; with --image nvidia")
	f.StringVar(&programs, "programs", "bin", "folder of the built guest programs")
	f.StringVar(&p.OVMF, "ovmf", "", "a firmware file in place of Debian's ovmf-amdsev (which is fallen back on where it is installed and no archive has it)")
	f.StringVar(&p.SimulatedGPU, "simulated-gpu", "", "folder of a fake NVIDIA library and its roots, for tests; with --platform simulated alone")
	f.StringVar(&p.Cache, "cache", "", "folder that keeps downloaded packages (default: the user's cache folder)")
	f.StringVar(&p.Mirror.Main, "mirror", "", "address of a Debian archive (default: the one of this machine's apt sources)")
	f.StringVar(&p.Mirror.Security, "security-mirror", "", "address of the Debian security archive")
	f.StringVar(&p.Locked, "locked", "", "a base.lock: take exactly its packages")
	build.MarkFlagRequired("out")
	return group("base", "Guest bases", build)
}
