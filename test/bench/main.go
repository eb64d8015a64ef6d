// Command bench prints Coffer's figures, one a line, each with a floor that was
// measured in the same run:
//
//	bench <name> value=<v> unit=<u> floor=<f> ratio=<r>
//
// The floor is what the same machine needs for the part that nobody can avoid:
// decompressing and hashing the archive, booting the kernel, a TLS round trip.
// build_memory's is the limit that was set.
//
// BENCH_ARCHIVE in the environment is the size in MiB of the archive that is built
// from, 2048 without it.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/u-root/mkuimage/cpio"

	"coffer/hostbuild/bundle"
	"coffer/test/debimage"
	"coffer/test/harness"
	"coffer/test/kbsbench"
)

func main() {
	bin := flag.String("bin", "bin", "folder of the built programs")
	base := flag.String("base", "build/base/simulated", "a simulated guest base")
	runs := flag.Int("runs", 3, "runs of each figure; the median counts")
	only := flag.String("only", "", "figures of one part: kbs or build")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *bin, *base, *runs, *only); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func figure(name string, value float64, unit string, floor float64) {
	fmt.Printf("bench %s value=%.4g unit=%s floor=%.4g ratio=%.3g\n", name, value, unit, floor, value/floor)
}

func run(ctx context.Context, bin, base string, runs int, only string) error {
	bin, err := filepath.Abs(bin)
	if err != nil {
		return err
	}
	if base, err = filepath.Abs(base); err != nil {
		return err
	}
	if err := os.MkdirAll("build", 0o755); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("build", "bench-") // /tmp may be memory, and bundles are large
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	env := &harness.Env{Bin: bin, Base: base, Dir: dir, Log: io.Discard}
	if only != "build" {
		if err := kbsbench.Run(ctx, env, figure); err != nil || only == "kbs" {
			return err
		}
	}
	images, err := filepath.Abs("build/images")
	if err != nil {
		return err
	}
	archive, err := debimage.Build(ctx, images)
	if err != nil {
		return err
	}
	kbs, err := env.StartKBS(ctx, "kbs")
	if err != nil {
		return err
	}
	defer kbs.Stop()
	settings, err := kbs.Settings()
	if err != nil {
		return err
	}
	b := &bench{env: env, kbs: kbs, settings: settings, archive: archive, runs: runs}
	figures := []func(context.Context) error{b.build, b.sizes, b.boot}
	if only == "build" {
		figures = figures[:2]
	}
	for _, f := range figures {
		if err := f(ctx); err != nil {
			return err
		}
	}
	return nil
}

type bench struct {
	env      *harness.Env
	kbs      *harness.KBS
	settings string
	archive  string
	runs     int

	bundle  *harness.Bundle // of the last build
	idleRSS float64         // KiB
}

func median(s []float64) float64 {
	s = slices.Clone(s)
	slices.Sort(s)
	return s[len(s)/2]
}

// build makes bundles of a large archive, without and with its layers in the
// cache, and compares with decompressing and hashing the archive. Then it makes
// the small one that the other figures are about.
func (b *bench) build(ctx context.Context) error {
	size := int64(2 << 30)
	if v := os.Getenv("BENCH_ARCHIVE"); v != "" {
		mib, err := strconv.ParseInt(v, 10, 32)
		if err != nil || mib < 1 {
			return fmt.Errorf("BENCH_ARCHIVE %q is no number of MiB", v)
		}
		size = mib << 20
	}
	large, err := largeArchive(ctx, filepath.Dir(b.archive), b.archive, size)
	if err != nil {
		return fmt.Errorf("make the large archive: %w", err)
	}
	yaml := filepath.Join(b.env.Dir, "large.yaml")
	if err := os.WriteFile(yaml, fmt.Appendf(nil, "root_drive_size: %d\ndocker_archive: %s\n", 2+size>>28, large), 0o644); err != nil {
		return err
	}
	var first, second, floors []float64
	var rss int64
	for range b.runs {
		if err := os.RemoveAll(b.kbs.Cache()); err != nil {
			return err
		}
		t := time.Now()
		if err := exec.CommandContext(ctx, "sh", "-c", `gunzip -c "$1" | sha256sum >/dev/null`, "sh", large).Run(); err != nil {
			return fmt.Errorf("gunzip | sha256sum: %w", err)
		}
		floors = append(floors, time.Since(t).Seconds())
		for _, times := range []*[]float64{&first, &second} {
			cmd := exec.CommandContext(ctx, filepath.Join(b.env.Bin, "hostbuild"), "--settings", b.settings, "cvm", yaml)
			t = time.Now()
			out, err := cmd.CombinedOutput()
			if err != nil {
				return fmt.Errorf("hostbuild cvm: %w\n%s", err, out)
			}
			*times = append(*times, time.Since(t).Seconds())
			rss = max(rss, cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss)
			if err := os.RemoveAll(b.kbs.Bundles()); err != nil {
				return err
			}
		}
	}
	figure("build", median(first), "s", median(floors))
	figure("build_second", median(second), "s", median(floors))
	figure("build_memory", float64(rss)/1024, "MiB", 256)
	if err := os.RemoveAll(b.kbs.Cache()); err != nil {
		return err
	}
	return b.small(ctx)
}

// small makes the bundle that the other figures are about.
func (b *bench) small(ctx context.Context) error {
	config := filepath.Join(b.env.Dir, "config")
	if err := os.MkdirAll(config, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(config, "message.txt"), []byte("bench\n"), 0o644); err != nil {
		return err
	}
	yaml := filepath.Join(b.env.Dir, "CONFIG.yaml")
	err := os.WriteFile(yaml, fmt.Appendf(nil, "root_drive_size: 4\ndocker_archive: %s\nuser_config:\n  web: %s\nallowed_ports: [%d]\ncc_attestation:\n  check_frequency: 2\n",
		b.archive, config, debimage.Port), 0o644)
	if err != nil {
		return err
	}
	if b.bundle, err = b.env.Build(ctx, b.settings, yaml); err != nil {
		return err
	}
	return b.bundle.Unpack(ctx, filepath.Join(b.env.Dir, "site"))
}

// sizes compares with what goes in: the base initrd, the archive.
func (b *bench) sizes(context.Context) error {
	size := func(path string) (float64, error) {
		st, err := os.Stat(path)
		if err != nil {
			return 0, err
		}
		return float64(st.Size()), nil
	}
	const mb = 1e6
	for _, f := range []struct{ name, path, floor string }{
		{"initrd_size", b.bundle.File(bundle.Initrd), filepath.Join(b.env.Base, "vmlinuz")},
		{"bundle_size", b.bundle.Tgz, b.archive},
	} {
		v, err := size(f.path)
		if err != nil {
			return err
		}
		floor, err := size(f.floor)
		if err != nil {
			return err
		}
		figure(f.name, v/mb, "MB", floor/mb)
	}
	return nil
}

// boot compares the workload's first line with an init that does nothing, both in
// the guest's own time since the kernel's start, and reads the agent's memory
// from its attestation log.
func (b *bench) boot(ctx context.Context) error {
	idle, err := b.idleInitrd()
	if err != nil {
		return err
	}
	var boots, floors []float64
	for range b.runs {
		out, err := exec.CommandContext(ctx, "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg,thread=single", "-cpu", "max,-erms",
			"-smp", "2", "-m", "2048", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-vga", "none",
			"-kernel", b.bundle.File(bundle.Kernel), "-initrd", idle, "-append", "console=ttyS0 loglevel=4 panic=-1 clearcpuid=cx16", "-serial", "stdio").Output()
		if err != nil {
			return fmt.Errorf("QEMU: %w", err)
		}
		var t, rss float64
		_, idleLine, _ := strings.Cut(string(out), "idle init ")
		if _, err := fmt.Sscanf(idleLine, "t=%f rss_kib=%f", &t, &rss); err != nil {
			return fmt.Errorf("the idle init printed no figures: %w\n%s", err, out)
		}
		floors = append(floors, t)
		b.idleRSS = rss

		vm, err := b.bundle.Boot("--forward", "127.0.0.1:0:"+strconv.Itoa(debimage.Port))
		if err != nil {
			return err
		}
		bctx, cancel := context.WithTimeout(ctx, 4*time.Minute)
		m, err := vm.Expect(bctx, `workload first line t=([0-9.]+)`)
		for i := 0; err == nil && i < 3; i++ { // the log's last line then tells of a working guest
			_, err = vm.Expect(bctx, `attestation round=\d+ verdict=pass`)
		}
		cancel()
		if err == nil { // in order: the drive must be whole, and QEMU must let go of it
			vm.Stop()
			wctx, done := context.WithTimeout(ctx, 2*time.Minute)
			err = vm.Wait(wctx)
			done()
		}
		vm.Kill()
		if err != nil {
			return err
		}
		first, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			return err
		}
		boots = append(boots, first)
	}
	figure("boot_to_workload", median(boots), "s", median(floors))
	return b.memory(ctx)
}

// memory compares with the idle init, a static Go program that does nothing.
func (b *bench) memory(ctx context.Context) error {
	out, err := b.env.Run(ctx, "hostbuild", "drive", "cat", b.bundle.File(bundle.Applog), "/attestation.jsonl")
	if err != nil {
		return err
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	var round struct {
		RSS map[string]float64 `json:"rss_kib"`
	}
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &round); err != nil {
		return err
	}
	for _, name := range []string{"agent", "containerd", "shim"} {
		figure("rss_"+name, round.RSS[name]/1024, "MiB", b.idleRSS/1024)
	}
	return nil
}

func (b *bench) idleInitrd() (string, error) {
	program, err := os.ReadFile(filepath.Join(b.env.Bin, "bench-idle"))
	if err != nil {
		return "", err
	}
	path := filepath.Join(b.env.Dir, "idle.img")
	f, err := os.Create(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	w := cpio.Newc.Writer(f)
	for _, r := range []cpio.Record{
		cpio.Directory("dev", 0o755), cpio.Directory("proc", 0o755), cpio.CharDev("dev/console", 0o600, 5, 1),
		cpio.StaticRecord(program, cpio.Info{Name: "init", Mode: cpio.S_IFREG | 0o755}),
	} {
		if err := w.WriteRecord(r); err != nil {
			return "", err
		}
	}
	return path, cpio.WriteTrailer(w)
}
