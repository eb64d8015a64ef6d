// Package agent is what a guest does after its init, as the one child of PID 1.
// It mounts what the workload needs, opens exactly the ports of the guest
// config, runs the image's container, and attests: once before the workload
// starts, then again and again for as long as it runs.
//
// It promises: the workload runs only while the KBS has wanted this guest no
// longer than max_staleness ago (failure_action log excepted); nothing that the
// host controls, neither a drive nor the console nor the network, holds up an
// attestation round or the workload's end; whatever goes wrong ends in one
// FAILED line and the machine powered off.
//
// A workload that exits by itself starts again where its restart policy says so;
// else it ends the guest in order, whatever its exit code. A workload that a
// verdict stopped starts again after a pass where restart_on_recovery is set;
// else the guest ends.
//
// What is done to the machine goes through Deps; System is the real one. The
// package knows nothing of the builder, of LUKS or of launch digests.
package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"coffer/agent/applog"
	"coffer/agent/attest"
	"coffer/agent/daemon"
	"coffer/agent/drives"
	"coffer/agent/gpus"
	"coffer/agent/nfs"
	"coffer/agent/nvidia"
	"coffer/agent/profile"
	"coffer/agent/workload"
	"coffer/internal/boot"
	"coffer/internal/evidence"
	"coffer/internal/firewall"
	"coffer/internal/guestconfig"
	"coffer/internal/netup"
	"coffer/kbsclient"
)

// Paths are the places of the verity root.
type Paths struct {
	Bin                  string // containerd, its shim, runc
	Run                  string // tmpfs
	Applog               string
	UserConfig, UserData string
	Scratch              string
	CgroupRoot, Cgroup   string // cgroup v2, and the workload's group below it
	ImageMeta, Layers    string
	ResolvConf, Hosts    string
}

// Deps is the machine as the agent sees it.
type Deps struct {
	Paths     Paths
	Mount     func() error                // kernel file systems, cgroups, sysctls
	Stay      func(context.Context) error // returns once this program needs no disk to go on
	Handover  func() ([]byte, error)
	Hostname  func(string) error
	Firewall  func(firewall.Rules) error
	Network   func(context.Context, *guestconfig.Static) (*netup.Network, error)
	Lookup    func(ctx context.Context, host string) ([]netip.Addr, error) // not more than the firewall should let through
	Attach    func(context.Context, drives.Mount) error
	Detach    func(target string) error
	Share     func(drive string) error // mounts below it show up in containers
	NFS       nfs.Sys
	Overlay   func(target string, layers ...string) error
	OpenVault func(dir string, key []byte) error // a folder that has a key of its own
	Evidence  func(platform, tee string) (evidence.Source, error)
	KBS       func(cfg guestconfig.KBS, dial Dial) (KBS, error)
	GPUs      func(c *guestconfig.GPU, run string, printf func(string, ...any)) (*gpus.Guard, error)
	NVIDIA    nvidia.Driver        // the GPUs' kernel driver; the zero value is none
	Now       func() time.Duration // since the kernel's start, suspended time included
	Stop      <-chan string        // someone asks for an orderly stop, and why
	// PowerOff powers the machine off at once. It does not return.
	PowerOff func()
}

// KBS is the verifier.
type KBS interface {
	// Fetch makes a handshake with fresh nonce, key and evidence and fetches the
	// resource, which the caller wipes. The token comes without the key.
	Fetch(ctx context.Context, a kbsclient.Attester, path string) (resource []byte, token string, err error)
	// LastAnswer is what the KBS's clock showed last.
	LastAnswer() kbsclient.Answered
}

// agent is what the phases have made so far.
type agent struct {
	Deps
	log     *boot.Log
	console *applog.Tee
	output  *applog.Async // the console, for the workload's lines
	logs    *logs

	handover *guestconfig.Handover
	cfg      *guestconfig.Config
	net      *network
	verifier *verifier
	daemon   *daemon.Daemon
	services *services
	nfsDone  <-chan struct{} // closed when the export is unmounted; nil: no NFS
	job      *workload.Supervisor
	loop     *attest.Loop
	cpu      int64 // processor time at the last round's end

	configSource string // what the workload sees as /user_config
}

// phases is the agent's part of the boot.
func (a *agent) phases() []boot.Phase {
	const s = time.Second
	return []boot.Phase{
		{Name: "system", Deadline: 10 * s, Code: boot.CodeInternal, Run: a.system},
		{Name: "handover", Deadline: 5 * s, Code: boot.CodeConfig, Run: a.takeOver},
		{Name: "ports", Deadline: 10 * s, Code: boot.CodeFirewall, Run: a.ports},
		{Name: "drives", Deadline: 60 * s, Code: boot.CodeDrive, Run: a.drives},
		{Name: "user_config", Deadline: 60 * s, Code: boot.CodeUserConfig, Run: a.userConfig},
		{Name: "api", Deadline: 10 * s, Code: boot.CodeInternal, Run: a.serve},
		{Name: "gpu", Deadline: gpuTime(0) + 5*s, Code: boot.CodeGPU, Run: a.gpuDevices, If: func() bool { return a.verifier.gpus != nil }},
		{Name: "containerd", Deadline: 40 * s, Code: boot.CodeContainerd, Run: a.containerd},
		{Name: "image", Deadline: 60 * s, Code: boot.CodeImage, Run: a.container},
		{Name: "attest", Deadline: firstWithin + roundTime + gpuTime(0) + 10*s, Code: boot.CodeAttestation, Run: a.attest},
		{Name: "workload", Deadline: startTime + 30*s, Code: boot.CodeWorkload, Run: a.workload},
	}
}

// Times of the loop and of the guest's end.
const (
	firstAtLeast = time.Minute // the first pass may take max_staleness, within these two
	firstWithin  = 5 * time.Minute
	roundTime    = 90 * time.Second
	startTime    = 60 * time.Second
	stopTime     = 15 * time.Second // to kill the workload after a bad verdict
	graceTime    = 20 * time.Second // between the stop signal and the kill in an orderly stop
	endTime      = 90 * time.Second // the guest's end in all; then the plug is pulled
)

// Output is where lines go.
type Output struct {
	Log      *boot.Log
	Tee      *applog.Tee   // what Log writes to
	Workload *applog.Async // the console, for the workload's output
}

// stopRequest ends the loop in order.
type stopRequest struct{ why string }

func (s stopRequest) Error() string { return s.why }

// workloadExit is the workload's own end.
type workloadExit struct {
	exit  workload.Exit
	early bool // a workload that does not end by itself has ended well
}

func (e workloadExit) Error() string {
	if e.early {
		return "workload exited " + e.exit.String() + " though nobody asked it to end"
	}
	return "workload exited " + e.exit.String()
}

// Run boots, attests until the guest has to end, and ends it.
func Run(d Deps, out Output) {
	a := &agent{Deps: d, log: out.Log, console: out.Tee, output: out.Workload}
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	go func() {
		if why, ok := <-d.Stop; ok {
			cancel(stopRequest{why})
		}
	}()
	phase, err := a.live(ctx, cancel)
	cancel(nil) // nobody adds to the log any more
	a.end(phase, err)
}

// live returns when the guest has to end, and why.
func (a *agent) live(ctx context.Context, cancel context.CancelCauseFunc) (phase string, err error) {
	phase = "run"
	defer func() {
		if r := recover(); r != nil {
			err = &boot.Error{Code: boot.CodeInternal, Err: fmt.Errorf("panic: %v", r)}
		}
	}()
	if err := boot.Run(ctx, a.log, a.phases()); err != nil {
		var pe *boot.PhaseError
		if errors.As(err, &pe) {
			phase, err = pe.Phase, pe.Err
		}
		if ctx.Err() != nil { // the phase failed because of the stop
			err = context.Cause(ctx)
		}
		return phase, err
	}
	go func() {
		<-a.daemon.Done()
		if err := a.daemon.Err(); err != nil {
			cancel(boot.Fail(boot.CodeContainerd, fmt.Errorf("containerd %w", err)))
		}
	}()
	go a.keepNetwork(ctx)
	return phase, a.loop.Run(ctx)
}

// end stops the workload, flushes and unmounts, and powers the machine off.
func (a *agent) end(phase string, err error) {
	limit := time.AfterFunc(endTime, a.PowerOff)
	defer limit.Stop()
	defer a.PowerOff()
	defer func() { _ = recover() }() // the power-off must come

	var stop stopRequest
	var exit workloadExit
	orderly := errors.As(err, &stop) || errors.As(err, &exit) && exit.exit.Err == nil
	if a.job != nil {
		a.stopWorkload(errors.As(err, &stop))
	}
	if a.services != nil {
		a.services.api.Close()
		a.stopNFS()
	}
	if a.daemon != nil {
		a.daemon.Stop()
	}
	if a.logs != nil {
		a.logs.flushLines()
	}
	a.output.Close(flushTime)
	if orderly {
		a.log.Printf("coffer: power off reason=%q", err)
	} else {
		a.log.Failed(phase, err)
	}
	if a.logs != nil {
		a.logs.close()
	}
	for _, target := range []string{a.mergedConfig(), a.Paths.UserData, a.Paths.UserConfig, a.Paths.Applog, a.Paths.Scratch} {
		within(unmountTime, func() { _ = a.Detach(target) })
	}
}

const unmountTime = 5 * time.Second

// stopWorkload gives the workload time only where somebody asked for the stop,
// and no more than its last pass carries: nobody attests any more.
func (a *agent) stopWorkload(polite bool) {
	grace := graceTime
	if p := a.cfg.Workload.Profile; p.StopFile != "" {
		grace = time.Duration(p.StopSeconds) * time.Second
	}
	ctx, cancel := context.WithTimeout(context.Background(), grace+stopTime)
	defer cancel()
	var err error
	if polite && a.loop != nil {
		err = a.job.Stop(ctx, min(grace, a.loop.Left()))
	} else {
		err = a.job.Kill(ctx)
	}
	if err != nil {
		a.log.Printf("coffer: %v", err)
	}
}

// within returns when f has, or after d.
func within(d time.Duration, f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-time.After(d):
	}
}

func (a *agent) system(context.Context) error { return a.Mount() }

// takeOver reads what init left.
func (a *agent) takeOver(context.Context) error {
	text, err := a.Handover()
	if err != nil {
		return err
	}
	if a.handover, err = guestconfig.ParseHandover(text); err != nil {
		return fmt.Errorf("handover: %w", err)
	}
	if a.cfg, err = guestconfig.Parse(a.handover.Config); err != nil {
		return err
	}
	if a.net, err = newNetwork(a.Deps, a.cfg, a.handover.DNS); err != nil {
		return err
	}
	source, err := a.Evidence(a.cfg.Platform, a.cfg.TEE)
	if err == nil {
		err = evidence.Carry(source, a.cfg.VCEKs)
	}
	if err != nil {
		return boot.Fail(boot.CodeEvidence, err)
	}
	kbs, err := a.KBS(a.cfg.KBS, a.net.dial)
	if err != nil {
		return err
	}
	a.verifier = &verifier{kbs: kbs, net: a.net, source: source, canary: a.cfg.KBS.CanaryPath, release: a.openVault}
	if a.cfg.GPU != nil {
		a.verifier.vaultKey = a.cfg.GPU.VaultKeyPath
		if a.verifier.gpus, err = a.GPUs(a.cfg.GPU, a.Paths.Run, a.log.Printf); err != nil {
			return boot.Fail(boot.CodeGPU, err)
		}
	}
	return a.Hostname(a.cfg.CVMID)
}

// ports opens the workload's ports. Until here only the KBS was reachable.
func (a *agent) ports(context.Context) error {
	a.log.Printf("coffer: allowed ports in=%s out=%s", portList(a.cfg.Network.AllowedPorts), portList(a.cfg.Network.AllowedOutPorts))
	a.log.Printf("coffer: the guest's own ports out=%s", strings.Join(a.net.own(), ","))
	return a.net.apply()
}

func portList(ports []guestconfig.Port) string {
	if len(ports) == 0 {
		return "none"
	}
	var s string
	for i, p := range ports {
		if i > 0 {
			s += ","
		}
		s += fmt.Sprintf("%d/%s", p.Port, p.Proto)
	}
	return s
}

func (a *agent) drives(ctx context.Context) error {
	for _, m := range append(drives.Host(), drives.Scratch(a.handover.ScratchDevice)) {
		m.Target = a.target(m.Target)
		if err := a.Attach(ctx, m); err != nil {
			return err
		}
	}
	var err error
	if a.logs, err = openLogs(a.Paths.Applog); err != nil {
		return err
	}
	for _, line := range a.handover.BootLog {
		fmt.Fprintln(a.logs.boot, line)
	}
	a.console.Attach(a.logs.boot)

	// The writable layer is new at every boot, /vault stays. Removing a large
	// layer takes its time; nothing waits for it.
	trash := filepath.Join(a.Paths.Scratch, "trash")
	if err := os.MkdirAll(trash, 0o700); err != nil {
		return err
	}
	old := filepath.Join(trash, fmt.Sprint(time.Now().UnixNano()))
	if err := os.Rename(a.upper(), old); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := os.Rename(a.writable(), old+"w"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	go os.RemoveAll(trash)
	if err := os.Mkdir(a.writable(), 0o755); err != nil {
		return err
	}
	if g := a.cfg.GPU; g != nil && g.VaultKeyPath != "" {
		return nil // see openVault
	}
	// Only the container sees it; which of its users may is its own business.
	if err := os.Mkdir(a.vault(), 0o700); err == nil {
		return os.Chmod(a.vault(), 0o1777)
	} else if !errors.Is(err, os.ErrExist) {
		return err
	}
	return nil
}

// target is where a drive of the table goes, the paths of Deps respected.
func (a *agent) target(name string) string {
	switch name {
	case "/applog":
		return a.Paths.Applog
	case "/user_config":
		return a.Paths.UserConfig
	case "/user_data":
		return a.Paths.UserData
	}
	return a.Paths.Scratch
}

func (a *agent) upper() string { return filepath.Join(a.Paths.Scratch, "upper") }

// writable holds the folders that the profile makes writable.
func (a *agent) writable() string { return filepath.Join(a.Paths.Scratch, "writable") }
func (a *agent) vault() string    { return filepath.Join(a.Paths.Scratch, "vault") }

func (a *agent) containerd(ctx context.Context) error {
	var err error
	a.daemon, err = daemon.Start(ctx, daemon.Config{
		Binary:    filepath.Join(a.Paths.Bin, "containerd"),
		Path:      a.Paths.Bin,
		Root:      filepath.Join(a.Paths.Run, "containerd-root"),
		State:     filepath.Join(a.Paths.Run, "containerd"),
		Snapshots: a.upper(),
		Layers:    a.Paths.Layers,
		Log:       a.logs.containerd,
		Printf:    a.log.Printf,
	})
	return err
}

// container imports the image and makes the container, which does not run yet.
func (a *agent) container(ctx context.Context) error {
	w := a.cfg.Workload
	p := a.Paths
	first := sync.OnceFunc(func() { a.log.Printf("workload first line t=%.2f", a.Now().Seconds()) })
	image, err := workload.Import(ctx, a.daemon.Client(), workload.ImageSource{
		Meta: p.ImageMeta, Layers: p.Layers, Digest: w.ImageDigest,
	})
	if err != nil {
		return err
	}
	program := filepath.Join(p.Bin, "snpguest")
	binds := []workload.Bind{
		{Source: a.configSource, Target: "/user_config", ReadOnly: true}, // startup scripts run from there
		{Source: p.UserData, Target: "/user_data", Follow: a.nfsDone != nil},
		{Source: p.Applog, Target: "/applog", NoExec: true},
		{Source: a.vault(), Target: "/vault"},
		{Source: p.Hosts, Target: "/etc/hosts", ReadOnly: true},
		{Source: p.ResolvConf, Target: "/etc/resolv.conf", ReadOnly: true},
		{Source: a.hostDir(), Target: "/host/run", ReadOnly: true, NoExec: true},
		{Source: program, Target: "/host/bin/snpguest", ReadOnly: true},
		{Source: program, Target: "/usr/local/bin/snpguest", ReadOnly: true}, // NVFlare takes it from PATH
	}
	for _, target := range w.Profile.Writable {
		dir, err := profile.Folder(a.writable(), target)
		if err != nil {
			return err
		}
		binds = append(binds, workload.Bind{Source: dir, Target: target})
	}
	runner, err := workload.Create(ctx, a.daemon.Client(), image, workload.Config{
		ID:         "workload",
		Hostname:   a.cfg.CVMID,
		Cgroup:     p.Cgroup,
		CgroupRoot: p.CgroupRoot,
		Args:       w.Args,
		Env:        w.Env,
		MemoryMiB:  w.MemoryMiB,
		CPUPercent: w.CPUPercent,
		PidsMax:    w.PidsMax,
		TmpMiB:     w.TmpMiB,
		Binds:      binds,
		Path:       "/host/bin",
		TaskDir:    a.daemon.TaskDir("workload"),
		FIFODir:    filepath.Join(p.Run, "coffer", "fifo"),
		RuncRoot:   filepath.Join(p.Run, "runc"),
		Stdout:     a.logs.stream(a.output, first),
		Stderr:     a.logs.stream(a.output, first),
		Devices:    a.gpuAccess(),
	})
	if err != nil {
		return boot.Fail(boot.CodeWorkload, err)
	}
	a.job = &workload.Supervisor{
		Job: runner, Restart: w.Restart, Printf: a.log.Printf, Now: a.Now, Before: a.beforeStart,
		Failed: func(e workload.Exit) bool { return e.Err != nil || profile.Failed(w.Profile, e.Code) },
	}
	if w.Profile.StopFile != "" {
		a.job.Ask = func() error { return profile.Ask(w.Profile, a.vault()) }
	}
	return nil
}

// beforeStart is done before each start of the workload.
func (a *agent) beforeStart() {
	removed, err := profile.Prepare(a.cfg.Workload.Profile, a.vault())
	for _, name := range removed {
		a.log.Printf("workload profile=%s removed %q", a.cfg.Workload.Profile.Name, name)
	}
	if err != nil {
		a.log.Printf("workload profile=%s: %v", a.cfg.Workload.Profile.Name, err)
	}
}

// attest waits for the first pass; then the container is started.
func (a *agent) attest(ctx context.Context) error {
	if err := a.Stay(ctx); err != nil {
		return boot.Fail(boot.CodeRoot, err)
	}
	c := a.cfg.Attestation
	stale := time.Duration(c.MaxStaleness) * time.Second
	a.loop = &attest.Loop{
		Policy: attest.Policy{
			Every:        time.Duration(c.CheckFrequency) * time.Second,
			MaxStaleness: stale,
			FirstWithin:  min(max(stale, firstAtLeast), firstWithin),
			Action:       c.FailureAction,
			Restart:      c.RestartOnRecovery,
		},
		Round:     a.verifier.round,
		Classify:  classify,
		Clock:     a.kbsClock,
		Report:    a.report,
		Printf:    a.log.Printf,
		Start:     a.startWorkload,
		Stop:      func(ctx context.Context) error { return a.job.Kill(ctx) },
		Disable:   a.disableGPUs,
		Now:       a.Now,
		RoundTime: a.roundTime(), StartTime: startTime, StopTime: stopTime,
	}
	return a.loop.First(ctx)
}

// roundTime is how long a round may take.
func (a *agent) roundTime() time.Duration {
	if a.cfg.GPU == nil {
		return roundTime
	}
	return roundTime + gpuTime(a.cfg.GPU.Count)
}

func (a *agent) workload(ctx context.Context) error { return a.loop.Started(ctx) }

// startWorkload starts the container for the loop.
func (a *agent) startWorkload(ctx context.Context) (<-chan error, error) {
	a.awaitChip(ctx)
	last, err := a.job.Start(ctx)
	if err != nil {
		return nil, err
	}
	a.log.Printf("workload started image=%s", a.cfg.Workload.ImageDigest)
	exited := make(chan error, 1)
	go func() {
		exit := <-last
		exited <- workloadExit{exit, exit.Err == nil && exit.Code == 0 && a.cfg.Workload.Profile.Lasting}
	}()
	return exited, nil
}
