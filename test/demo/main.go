// Command demo shows the whole line on a machine without special hardware: a
// KBS, a bundle, a guest in QEMU that gets its key, a workload, two attestation
// rounds and a revocation. It ends with "demo: OK" and the time of each step, or
// with the reason and the places of the logs.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"coffer/test/dockersave"
	"coffer/test/harness"
)

func main() {
	bin := flag.String("bin", "bin", "folder of the built programs")
	base := flag.String("base", "build/base/simulated", "a simulated guest base")
	dir := flag.String("dir", "build/demo", "work folder; emptied first")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *bin, *base, *dir); err != nil {
		fmt.Printf("\ndemo: FAILED: %v\n", err)
		fmt.Printf("logs: %s (KBS, hostbuild), %s (guest)\n", filepath.Join(*dir, "host.log"), filepath.Join(*dir, "site/cvm_*/console.log"))
		os.Exit(1)
	}
}

type step struct {
	name string
	took time.Duration
}

func run(ctx context.Context, bin, base, dir string) error {
	for _, p := range []*string{&bin, &base, &dir} {
		abs, err := filepath.Abs(*p)
		if err != nil {
			return err
		}
		*p = abs
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(dir, "host.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	d := &demo{env: &harness.Env{Bin: bin, Base: base, Dir: dir, Log: log}}
	defer d.close()

	var done []step
	for _, s := range []struct {
		name     string
		deadline time.Duration
		run      func(context.Context) error
	}{
		{"1. a KBS comes up", time.Minute, d.kbsUp},
		{"2. hostbuild cvm builds the bundle", 5 * time.Minute, d.build},
		{"3. launch_vm.sh boots it, the KBS releases its key", 5 * time.Minute, d.boot},
		{"4. the workload works", 2 * time.Minute, d.workload},
		{"5. two attestation rounds pass, then the rule is removed", 3 * time.Minute, d.revoke},
		{"6. the guest powers off", 2 * time.Minute, d.powerOff},
	} {
		fmt.Printf("\n== %s\n", s.name)
		t := time.Now()
		sctx, cancel := context.WithTimeout(ctx, s.deadline)
		err := s.run(sctx)
		cancel()
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		done = append(done, step{s.name, time.Since(t)})
	}
	fmt.Println("\ndemo: OK")
	for _, s := range done {
		fmt.Printf("  %6.1f s  %s\n", s.took.Seconds(), s.name)
	}
	return nil
}

type demo struct {
	env      *harness.Env
	kbs      *harness.KBS
	settings string
	bundle   *harness.Bundle
	vm       *harness.VM
}

func (d *demo) close() {
	if d.vm != nil {
		d.vm.Kill()
	}
	if d.kbs != nil {
		d.kbs.Stop()
	}
}

func say(format string, a ...any) { fmt.Printf("   "+format+"\n", a...) }

func (d *demo) kbsUp(ctx context.Context) (err error) {
	if d.kbs, err = d.env.StartKBS(ctx, "kbs"); err != nil {
		return err
	}
	if d.settings, err = d.kbs.Settings(); err != nil {
		return err
	}
	say("https://%s, admin key %s", d.kbs.Listen, filepath.Join(d.kbs.Dir, "admin.key"))
	return nil
}

func (d *demo) build(ctx context.Context) error {
	dir := d.env.Dir
	program, err := os.ReadFile(filepath.Join(d.env.Bin, "demo-workload"))
	if err != nil {
		return err
	}
	layer, err := dockersave.Layer(dockersave.Entry{Name: "workload", Mode: 0o755, Body: program}, dockersave.Entry{Name: "etc/"})
	if err != nil {
		return err
	}
	image := dockersave.Image{Tag: "coffer-demo:1", Entrypoint: []string{"/workload"}, Layers: [][]byte{layer}}
	archive := filepath.Join(dir, "demo.tar.gz")
	if err := image.SaveLegacy(archive); err != nil {
		return err
	}
	config := filepath.Join(dir, "config")
	if err := os.MkdirAll(config, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(config, "greeting.txt"), []byte("good morning\n"), 0o644); err != nil {
		return err
	}
	yaml := filepath.Join(dir, "CONFIG.yaml")
	if err := os.WriteFile(yaml, fmt.Appendf(nil, `compute_env: onprem_cvm
cc_cpu_mechanism: amd_sev_snp
root_drive_size: 2
docker_archive: %s
user_config:
  demo: %s
vcpus: 2
memory_mib: 1024
cc_attestation:
  check_frequency: 5
  failure_action: stop_job
`, archive, config), 0o644); err != nil {
		return err
	}
	if d.bundle, err = d.env.Build(ctx, d.settings, yaml); err != nil {
		return err
	}
	say("CVM Bundle %s is ready", d.bundle.Tgz)
	return d.bundle.Unpack(ctx, filepath.Join(dir, "site"))
}

func (d *demo) boot(ctx context.Context) (err error) {
	if d.vm, err = d.bundle.Boot(); err != nil {
		return err
	}
	go show(d.vm, os.Stdout)
	if _, err := d.vm.Expect(ctx, `phase=key status=ok|coffer: FAILED`); err != nil {
		return err
	}
	m, _, err := d.kbs.Log.Expect(ctx, 0, `.*action=release.*keys/root/`+d.bundle.ID+`.*`)
	if err != nil {
		return fmt.Errorf("KBS: %w", err)
	}
	say("KBS: %s", m[0])
	_, err = d.vm.Expect(ctx, `phase=root status=ok`)
	return err
}

// show prints the console lines that tell the story.
func show(vm *harness.VM, w io.Writer) {
	next := 0
	for {
		m, n, err := vm.Console.Expect(context.Background(), next, `.*(status=ok|launch_digest=|workload:|attestation|FAILED|coffer:).*`)
		if err != nil {
			return
		}
		next = n
		fmt.Fprintf(w, "   | %s\n", m[0])
	}
}

func (d *demo) workload(ctx context.Context) error {
	if _, err := d.vm.Expect(ctx, `workload: hello from the workload: good morning`); err != nil {
		return err
	}
	return nil
}

func (d *demo) revoke(ctx context.Context) error {
	for range 2 {
		if _, err := d.vm.Expect(ctx, `attestation round=\d+ verdict=pass`); err != nil {
			return err
		}
	}
	out, err := d.env.Run(ctx, "hostbuild", "--settings", d.settings, "policy", "remove", d.bundle.ID)
	if err != nil {
		return err
	}
	say("%s", strings.TrimSpace(out))
	if _, err := d.vm.Expect(ctx, `attestation round=\d+ verdict=negative`); err != nil {
		return err
	}
	_, err = d.vm.Expect(ctx, `workload exited code=137 signal=9`)
	return err
}

func (d *demo) powerOff(ctx context.Context) error {
	if err := d.vm.Wait(ctx); err != nil {
		return err
	}
	for file, want := range map[string]string{"/workload.log": "hello from the workload: good morning", "/demo.txt": "written by the workload", "/attestation.jsonl": `"verdict":"negative"`} {
		out, err := d.env.Run(ctx, "hostbuild", "drive", "cat", d.bundle.File("applog.qcow2"), file)
		if err != nil {
			return err
		}
		if !strings.Contains(out, want) {
			return fmt.Errorf("applog.qcow2: %s does not hold %q:\n%s", file, want, out)
		}
		say("applog.qcow2 %s: %q found, read without root", file, want)
	}
	return nil
}
