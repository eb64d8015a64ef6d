// Command bench prints Coffer's figures, one a line, each with a floor that was
// measured in the same run:
//
//	bench <name> value=<v> unit=<u> floor=<f> ratio=<r>
//
// The floor is what the same machine needs for the part that nobody can avoid:
// decompressing and hashing the archive, booting the kernel, a TLS round trip.
// build_memory's and those of processor time are the limits that were set.
//
// BENCH_ARCHIVE in the environment is the size in MiB of the archive that is built
// from, 2048 without it.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
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
	only := flag.String("only", "", "figures of one part: kbs, gpu, build or guest")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	if flag.Arg(0) == kbsbench.ClientArg {
		err = kbsbench.Client(ctx, flag.Args()[1:], figure)
	} else {
		err = run(ctx, *bin, *base, *runs, *only)
	}
	if err != nil {
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
	if only == "" || only == "gpu" {
		if err := gpuFigures(env); err != nil || only == "gpu" {
			return err
		}
	}
	if only == "" || only == "kbs" {
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
	if only != "guest" {
		if err := b.build(ctx); err != nil {
			return err
		}
	}
	if b.bundle, err = b.small(ctx, 60); err != nil {
		return err
	}
	if err := b.sizes(ctx); err != nil || only == "build" {
		return err
	}
	if err := b.boot(ctx); err != nil {
		return err
	}
	return b.memory(ctx)
}

type bench struct {
	env      *harness.Env
	kbs      *harness.KBS
	settings string
	archive  string
	runs     int

	bundle  *harness.Bundle // with a round a minute
	idleRSS float64         // KiB
}

func median(s []float64) float64 {
	s = slices.Clone(s)
	slices.Sort(s)
	return s[len(s)/2]
}

// build makes bundles of a large archive, without and with its layers in the
// cache, and compares with decompressing and hashing the archive.
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
	var memory float64
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
			peak, err := runMeasured(cmd)
			if err != nil {
				return fmt.Errorf("hostbuild cvm: %w", err)
			}
			*times = append(*times, time.Since(t).Seconds())
			memory = max(memory, peak)
			if err := os.RemoveAll(b.kbs.Bundles()); err != nil {
				return err
			}
		}
	}
	figure("build", median(first), "s", median(floors))
	figure("build_second", median(second), "s", median(floors))
	figure("build_memory", memory/1024, "MiB", 256)
	return os.RemoveAll(b.kbs.Cache())
}

// runMeasured runs a program and returns its largest resident set in KiB, up to its
// last hundredth of a second. What wait4 tells of a child begins with the memory of
// the process that it was forked from: this one's, which is larger.
func runMeasured(cmd *exec.Cmd) (kib float64, err error) {
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	ended := make(chan error)
	go func() { ended <- cmd.Wait() }()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case err := <-ended:
			if err == nil && kib == 0 {
				err = errors.New("no VmHWM in /proc")
			}
			if err != nil {
				err = fmt.Errorf("%w\n%s", err, out.Bytes())
			}
			return kib, err
		case <-tick.C:
			status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
			_, line, found := strings.Cut(string(status), "\nVmHWM:")
			if err == nil && found { // else it has just ended
				fmt.Sscan(line, &kib)
			}
		}
	}
}

// small makes a bundle of the small image, which the other figures are about.
// every is the time between two attestation rounds, in seconds.
func (b *bench) small(ctx context.Context, every int) (*harness.Bundle, error) {
	config := filepath.Join(b.env.Dir, "config")
	if err := os.MkdirAll(config, 0o755); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(config, "message.txt"), []byte("bench\n"), 0o644); err != nil {
		return nil, err
	}
	yaml := filepath.Join(b.env.Dir, "CONFIG.yaml")
	err := os.WriteFile(yaml, fmt.Appendf(nil, "root_drive_size: 4\ndocker_archive: %s\nuser_config:\n  web: %s\nallowed_ports: [%d]\ncc_attestation:\n  check_frequency: %d\n  max_staleness: 600\n",
		b.archive, config, debimage.Port, every), 0o644)
	if err != nil {
		return nil, err
	}
	bundle, err := b.env.Build(ctx, b.settings, yaml)
	if err != nil {
		return nil, err
	}
	return bundle, bundle.Unpack(ctx, filepath.Join(b.env.Dir, "site"))
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

// Rounds that a guest stays for once its workload runs: a minute apart, for what
// it takes when nothing happens; and a second apart, as many as of an hour.
const (
	idleRounds = 2
	fewRounds  = 3
	manyRounds = 60
)

// boot compares the workload's start, and its first line, with an init that does
// nothing, all in the guest's own time since the kernel's start. Between the two,
// python starts, imports its web server and reads a file. The last guest stays for
// what idle tells.
func (b *bench) boot(ctx context.Context) error {
	idle, err := b.idleInitrd()
	if err != nil {
		return err
	}
	var started, boots, floors []float64
	for i := range b.runs {
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

		rounds := 0
		if i == b.runs-1 {
			rounds = idleRounds
		}
		start, first, err := b.guest(ctx, b.bundle, rounds)
		if err != nil {
			return err
		}
		started, boots = append(started, start), append(boots, first)
	}
	figure("boot_to_workload_start", median(started), "s", median(floors))
	figure("boot_to_workload", median(boots), "s", median(floors))
	return b.idle(ctx)
}

// guest boots a bundle, leaves its workload running for so many rounds and stops it
// in order, so that its drives are whole. It returns when the workload was started
// and when its first line came.
func (b *bench) guest(ctx context.Context, bundle *harness.Bundle, rounds int) (started, first float64, err error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Minute)
	defer cancel()
	vm, err := bundle.Boot("--stop-timeout", "90", "--forward", "127.0.0.1:0:"+strconv.Itoa(debimage.Port))
	if err != nil {
		return 0, 0, err
	}
	defer vm.Kill()
	begun, err := vm.Expect(ctx, `phase=workload status=ok t=([0-9.]+)`)
	if err != nil {
		return 0, 0, err
	}
	m, err := vm.Expect(ctx, `workload first line t=([0-9.]+)`)
	if err != nil {
		return 0, 0, err
	}
	for range rounds {
		if _, err := vm.Expect(ctx, `attestation round=\d+ verdict=pass`); err != nil {
			return 0, 0, err
		}
	}
	vm.Stop()
	if err := vm.Wait(ctx); err != nil {
		return 0, 0, err
	}
	if started, err = strconv.ParseFloat(begun[1], 64); err != nil {
		return 0, 0, err
	}
	first, err = strconv.ParseFloat(m[1], 64)
	return started, first, err
}

// round is what the agent writes of one.
type round struct {
	Time     time.Time
	Duration float64            `json:"duration_ms"`
	RSS      map[string]float64 `json:"rss_kib"`
	RoundCPU float64            `json:"round_cpu_ms"`
	IdleCPU  float64            `json:"idle_cpu_ms"`
}

// rounds reads the records of a guest that is off: those of its last n rounds.
func (b *bench) rounds(ctx context.Context, bundle *harness.Bundle, n int) ([]round, error) {
	out, err := b.env.Run(ctx, "hostbuild", "drive", "cat", bundle.File("applog.qcow2"), "/attestation.jsonl")
	if err != nil {
		return nil, err
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if len(lines) < n {
		return nil, fmt.Errorf("attestation.jsonl holds %d rounds, want %d", len(lines), n)
	}
	rounds := make([]round, n)
	for i, line := range lines[len(lines)-n:] {
		if err := json.Unmarshal([]byte(line), &rounds[i]); err != nil {
			return nil, err
		}
	}
	return rounds, nil
}

func sum(m map[string]float64) (s float64) {
	for _, v := range m {
		s += v
	}
	return s
}

// memory compares what the first rounds of the running workload found with the idle
// init, a static Go program that does nothing, and the last round's with those.
func (b *bench) memory(ctx context.Context) error {
	bundle, err := b.small(ctx, 1)
	if err != nil {
		return err
	}
	if _, _, err := b.guest(ctx, bundle, manyRounds); err != nil {
		return err
	}
	r, err := b.rounds(ctx, bundle, manyRounds)
	if err != nil {
		return err
	}
	first, last := r[fewRounds].RSS, r[len(r)-1].RSS
	for _, name := range []string{"agent", "containerd", "shim"} {
		figure("rss_"+name, first[name]/1024, "MiB", b.idleRSS/1024)
		figure(fmt.Sprintf("rss_%s_after_%d_rounds", name, manyRounds), last[name]/1024, "MiB", first[name]/1024)
	}
	figure(fmt.Sprintf("rss_all_after_%d_rounds", manyRounds), sum(last)/1024, "MiB", sum(first)/1024)
	return nil
}

// idle is the processor time of agent, containerd and shim in the last guest's last
// round and in the minute before it, the latter in percent of one vCPU. It is that of an emulated
// processor on a machine that may have other work: an upper bound. The floors are
// the goals.
func (b *bench) idle(ctx context.Context) error {
	r, err := b.rounds(ctx, b.bundle, idleRounds)
	if err != nil {
		return err
	}
	between := float64(r[1].Time.Sub(r[0].Time).Milliseconds()) - r[1].Duration
	figure("idle_cpu_tcg", 100*r[1].IdleCPU/between, "%", 0.5)
	figure("attestation_round_cpu_tcg", r[1].RoundCPU, "ms", 50)
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
