// Package stages is what a guest's init does, from the kernel's hand-over to the
// verity root's agent: one table of phases, read from top to bottom.
//
// It promises: nothing outside the measured initrd and command line steers it;
// every phase has a deadline; the first failure ends the boot with one FAILED
// line and the machine powered off, without a shell, a prompt or a second way;
// the launch measurement is printed on every boot on which the platform gives a
// report, also on a failing one; the disk's key is held only between the phases
// key and luks, is wiped, and is in no line and no error.
//
// What the phases do to the machine goes through Deps, so that order, failure
// path and decisions are tested without privileges. System is the real one.
package stages

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"time"

	"coffer/initramfs/watch"
	"coffer/internal/boot"
	"coffer/internal/evidence"
	"coffer/internal/firewall"
	"coffer/internal/guestconfig"
	"coffer/internal/netup"
	"coffer/internal/snp"
	"coffer/kbsclient"
)

// Deps is the machine as the phases see it. Paths are absolute.
type Deps struct {
	Mount      func() error // the file systems that everything else needs
	ReadFile   func(path string, limit int64) ([]byte, error)
	WriteFile  func(path string, data []byte, perm fs.FileMode) error // makes the folder
	Now        func() time.Time
	SetClock   func(time.Time) error
	ACPITables func() ([]ACPITable, error)
	LoadModule func(path, params string) error
	MountTSM   func() error // needs the module configfs
	Sysctl     func(name, value string) error
	// Lockdown locks the kernel down (integrity) where that is not done yet, and
	// returns the mode in force.
	Lockdown  func() (mode string, err error)
	KernelLog func() (string, error)
	Evidence  func(platform, tee string) (evidence.Source, error)
	Firewall  func(firewall.Rules) error
	Network   func(context.Context, *guestconfig.Static) (*netup.Network, error)
	Lookup    func(ctx context.Context, host string) ([]netip.Addr, error) // not more than the firewall should let through
	// FetchKey returns the resource at kbs.KeyPath. It connects to peers only.
	FetchKey func(ctx context.Context, kbs guestconfig.KBS, peers []netip.AddrPort, a kbsclient.Attester) ([]byte, error)
	// OpenDisk returns the device of the decrypted payload.
	OpenDisk   func(ctx context.Context, d guestconfig.Disk, passphrase []byte) (dev string, err error)
	OpenVerity func(ctx context.Context, dev string, v guestconfig.Verity) (root string, err error)
	MountRoot  func(root string) error
	// Linear maps a part of dev to a device of its own.
	Linear func(name, dev string, offset, size int64) (string, error)
	// SwitchRoot makes the mounted root the root and runs the program in this
	// one's place. It does not return but with an error.
	SwitchRoot func(program string) error
	// PowerOff flushes the console and powers the machine off.
	PowerOff func()
}

// guest is what the phases have found out so far.
type guest struct {
	Deps
	log *boot.Log

	raw     []byte // the guest config's text
	cfg     *guestconfig.Config
	source  evidence.Source
	digest  string // launch measurement, hex
	net     *netup.Network
	key     []byte // the disk's passphrase
	payload string // device of the decrypted payload
	scratch string // device of the writable part
}

// phases is the boot.
func (g *guest) phases() []boot.Phase {
	const s = time.Second
	return []boot.Phase{
		{Name: "mounts", Deadline: 10 * s, Code: boot.CodeInternal, Run: g.mounts},
		{Name: "config", Deadline: 10 * s, Code: boot.CodeConfig, Run: g.config},
		{Name: "acpi", Deadline: 10 * s, Code: boot.CodeACPI, Run: g.acpi},
		{Name: "modules", Deadline: 120 * s, Code: boot.CodeModules, Run: g.modules},
		{Name: "evidence", Deadline: 30 * s, Code: boot.CodeEvidence, Run: g.evidence},
		{Name: "firewall", Deadline: 10 * s, Code: boot.CodeFirewall, Run: g.firewall},
		{Name: "network", Deadline: 60 * s, Code: boot.CodeNetwork, Run: g.network},
		{Name: "key", Deadline: 120 * s, Code: boot.CodeKBSProtocol, Run: g.fetchKey},
		{Name: "luks", Deadline: 60 * s, Code: boot.CodeLUKSHeader, Run: g.luks},
		{Name: "verity", Deadline: 30 * s, Code: boot.CodeVerity, Run: g.verity},
		{Name: "driver", Deadline: 60 * s, Code: boot.CodeGPU, Run: g.driver, If: func() bool { return g.wants(guestconfig.FeatureGPU) }},
		{Name: lastPhase, Deadline: 30 * s, Code: boot.CodeRoot, Run: g.root},
	}
}

const lastPhase = "root"

// Boot runs the phases and then the agent's watcher, in this process's place. Where it
// returns, the boot has failed and Deps.PowerOff has been called.
func Boot(ctx context.Context, log *boot.Log, d Deps) {
	log.Keep() // for the agent's coffer.log
	g := &guest{Deps: d, log: log}
	phase := "init"
	defer g.PowerOff()
	defer func() {
		if r := recover(); r != nil {
			log.Failed(phase, fmt.Errorf("panic: %v", r))
		}
	}()

	err := boot.Run(ctx, log, g.phases())
	if err == nil {
		phase = lastPhase
		err = boot.Fail(boot.CodeRoot, g.enter())
	}
	var pe *boot.PhaseError
	if errors.As(err, &pe) {
		phase, err = pe.Phase, pe.Err
	}
	g.lastMeasurement(ctx, phase)
	log.Failed(phase, err)
}

func (g *guest) mounts(context.Context) error { return g.Mount() }

// Places in the initrd, and the kernel's own.
const (
	configPath   = "/" + guestconfig.InitrdPath
	cmdlinePath  = "/proc/cmdline"
	loadListPath = "/lib/modules/load"
)

func (g *guest) config(context.Context) error {
	var err error
	if g.raw, err = g.ReadFile(configPath, guestconfig.MaxSize); err != nil {
		return err
	}
	if g.cfg, err = guestconfig.Parse(g.raw); err != nil {
		return fmt.Errorf("%s: %w", configPath, err)
	}
	cmdline, err := g.ReadFile(cmdlinePath, 64<<10)
	if err != nil {
		return err
	}
	id, err := vmID(string(cmdline))
	if err != nil {
		return fmt.Errorf("kernel command line: %w", err)
	}
	if id != g.cfg.CVMID {
		return fmt.Errorf("kernel command line: vm_id is %q, this initrd is of %s", id, g.cfg.CVMID)
	}
	g.log.Printf("coffer: cvm_id=%s tee=%s kbs=%s", g.cfg.CVMID, g.cfg.TEE, g.cfg.KBS.URL)

	// The host sets the clock; it cannot be earlier than the guest was built.
	floor := time.Unix(g.cfg.BuildTime, 0)
	if now := g.Now(); now.Before(floor) {
		if err := g.SetClock(floor); err != nil {
			return boot.Fail(boot.CodeClock, fmt.Errorf("set the clock from %s to the build time: %w", now.UTC().Format(time.RFC3339), err))
		}
		g.log.Printf("coffer: clock stood at %s, set to the build time %s", now.UTC().Format(time.RFC3339), floor.UTC().Format(time.RFC3339))
	}
	return nil
}

// evidence takes one report, to print the measurement and to see that this is a
// guest worth asking a key for. The KBS judges; this only fails early.
func (g *guest) evidence(ctx context.Context) error {
	var err error
	if g.source, err = g.Evidence(g.cfg.Platform, g.cfg.TEE); err != nil {
		return err
	}
	if err := evidence.Carry(g.source, g.cfg.VCEKs); err != nil {
		return err
	}
	if g.cfg.TEE == evidence.TEESample {
		return nil
	}
	report, err := g.measure(ctx, g.source)
	if err != nil {
		return err
	}
	return checkReport(report)
}

func (g *guest) measure(ctx context.Context, s evidence.Source) (*snp.Report, error) {
	raw, _, err := s.Report(ctx, [64]byte{}, 0)
	if err != nil {
		return nil, err
	}
	report, err := snp.ParseReport(raw)
	if err != nil {
		return nil, err
	}
	g.digest = hex.EncodeToString(report.Measurement[:])
	g.log.Printf("launch_digest=%s", g.digest)
	return report, nil
}

// policyDebug lets the host read the guest's memory.
const policyDebug = 1 << 19

func checkReport(r *snp.Report) error {
	switch {
	case r.VMPL != 0:
		return fmt.Errorf("the report is of VMPL %d, not 0", r.VMPL)
	case r.Policy&policyDebug != 0:
		return fmt.Errorf("the guest policy %#x allows debugging: the host can read this guest", r.Policy)
	case r.Measurement == [48]byte{}:
		return errors.New("the launch measurement is zero")
	}
	return nil
}

// lastMeasurement prints the measurement of a boot that failed before the phase
// evidence, if it can be had: it is what an operator compares first.
func (g *guest) lastMeasurement(ctx context.Context, failed string) {
	if failed != "config" && failed != "acpi" && failed != "modules" {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() { _ = recover() }() // the boot's own failure is what counts
		if failed != "modules" && g.modules(ctx) != nil {
			return
		}
		if s, err := g.Evidence(evidence.Platform, evidence.TEESNP); err == nil {
			_, _ = g.measure(ctx, s)
		}
	}()
	select {
	case <-done:
	case <-ctx.Done():
	}
}

func (g *guest) firewall(context.Context) error {
	return g.Firewall(firewall.Rules{DHCP: g.dhcp()})
}

func (g *guest) dhcp() bool { return g.cfg.Network.Static == nil }

func (g *guest) network(ctx context.Context) error {
	var err error
	if g.net, err = g.Network(ctx, g.cfg.Network.Static); err != nil {
		return err
	}
	for _, f := range []struct {
		path string
		data []byte
	}{
		{guestconfig.ResolvConfPath, netup.ResolvConf(g.net.DNS)},
		{guestconfig.HostsPath, netup.Hosts(g.cfg.Network.Hosts)},
	} {
		if err := g.WriteFile(f.path, f.data, 0o644); err != nil {
			return err
		}
	}
	g.log.Printf("coffer: network %s %s gateway %s resolvers %v", g.net.Interface, g.net.Address, g.net.Gateway, g.net.DNS)
	return g.Firewall(firewall.Rules{DHCP: g.dhcp(), DNS: g.net.DNS})
}

// luks opens the disk and forgets the key, whatever happens.
func (g *guest) luks(ctx context.Context) error {
	defer func() { clear(g.key); g.key = nil }()
	var err error
	g.payload, err = g.OpenDisk(ctx, g.cfg.Disk, g.key)
	return err
}

func (g *guest) verity(ctx context.Context) error {
	root, err := g.OpenVerity(ctx, g.payload, g.cfg.Disk.Verity)
	if err != nil {
		return err
	}
	return g.MountRoot(root)
}

func (g *guest) root(context.Context) error {
	s := g.cfg.Disk.Scratch
	var err error
	g.scratch, err = g.Linear("scratch", g.payload, s.Offset, s.Size)
	return err
}

// enter leaves what the agent needs to know and becomes its watcher.
func (g *guest) enter() error {
	dns := make([]string, 0, len(g.net.DNS))
	for _, a := range g.net.DNS {
		dns = append(dns, a.String())
	}
	handover, err := json.Marshal(guestconfig.Handover{
		Config:        g.raw,
		ScratchDevice: g.scratch,
		LaunchDigest:  g.digest,
		Interface:     g.net.Interface,
		DNS:           dns,
		BootLog:       g.log.Lines(),
	})
	if err != nil {
		return fmt.Errorf("handover: %w", err)
	}
	if err := g.WriteFile(guestconfig.HandoverPath, handover, 0o600); err != nil {
		return err
	}
	return g.SwitchRoot(watch.Self)
}
