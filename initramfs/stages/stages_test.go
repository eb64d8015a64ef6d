package stages

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"coffer/internal/boot"
	"coffer/internal/evidence"
	"coffer/internal/firewall"
	"coffer/internal/guestconfig"
	"coffer/internal/netup"
	"coffer/internal/snp"
	"coffer/kbsclient"
)

const testID = "cvm_0123456789ab"

func testConfig() *guestconfig.Config {
	h := strings.Repeat("ab", 32)
	return &guestconfig.Config{
		Version: guestconfig.Version, CVMID: testID, Platform: evidence.Platform, TEE: evidence.TEESNP, BuildTime: 1_700_000_000,
		KBS: guestconfig.KBS{URL: "https://kbs.example:8999", CA: "-----BEGIN CERTIFICATE-----", KeyPath: "keys/root/" + testID, CanaryPath: "keys/canary/" + testID},
		Disk: guestconfig.Disk{
			Serial: "crypt_root", HeaderSHA256: h, DataOffset: 1 << 20, PayloadSize: 1 << 30,
			Verity:  guestconfig.Verity{RootHash: h, Salt: h, DataBlocks: 1000, HashStartBlock: 1001},
			Scratch: guestconfig.Scratch{Offset: 8 << 20, Size: 16 << 20},
		},
		Network:     guestconfig.Network{Hosts: map[string]string{"kbs.example": "192.0.2.1"}},
		Attestation: guestconfig.Attestation{CheckFrequency: 60, MaxStaleness: 600, FailureAction: guestconfig.ActionStopJob},
		Workload:    guestconfig.Workload{ImageName: "x", ImageDigest: "sha256:" + h, PidsMax: 100, TmpMiB: 16},
		UserConfig:  guestconfig.UserConfig{Integrity: guestconfig.IntegrityPinned},
	}
}

// fakeSource gives one report.
type fakeSource struct {
	tee    string
	report snp.Report
	err    error // of Report

	evidenceErr error
}

func (s *fakeSource) TEE() string     { return s.tee }
func (s *fakeSource) Simulated() bool { return false }
func (s *fakeSource) Report(context.Context, [64]byte, int) ([]byte, []byte, error) {
	return s.report.Marshal(), nil, s.err
}
func (s *fakeSource) Evidence(context.Context, [48]byte) (json.RawMessage, error) {
	return json.RawMessage("{}"), s.evidenceErr
}

// machine is a fake: it notes what is done to it, fails where it is told to, and
// keeps what was written.
type machine struct {
	cfg     *guestconfig.Config
	source  *fakeSource
	cmdline string
	load    string
	driver  string // the load list of the verity root; "": it has none
	now     time.Time
	key     []byte // given out by FetchKey
	acpi    []ACPITable
	mode    string // the kernel's lockdown
	fail    map[string]error

	mu      sync.Mutex
	calls   []string
	console bytes.Buffer
	files   map[string]string
	rules   []firewall.Rules
	opened  string // the passphrase as OpenDisk saw it
}

func newMachine() *machine {
	m := &machine{
		cfg:     testConfig(),
		source:  &fakeSource{tee: evidence.TEESNP, report: snp.Report{Version: 3, Policy: 0x30000}},
		cmdline: "console=ttyS0 vm_id=" + testID + "\n",
		load:    "/lib/modules/6.12/kernel/dm_mod.ko\n-/lib/modules/6.12/kernel/sev_guest.ko\n",
		now:     time.Unix(1_800_000_000, 0),
		key:     append(bytes.Clone(testPassphrase), '\n'),
		acpi:    []ACPITable{{Name: "APIC"}, {Name: "DSDT", Data: []byte("bytecode")}, {Name: "FACP"}},
		mode:    "integrity",
		fail:    map[string]error{},
		files:   map[string]string{},
	}
	m.source.report.Measurement[0] = 0xd1
	return m
}

func (m *machine) call(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.calls = append(m.calls, name)
	return m.fail[name]
}

func (m *machine) deps() Deps {
	return Deps{
		Mount: func() error { return m.call("Mount") },
		ReadFile: func(path string, _ int64) ([]byte, error) {
			if err := m.call("ReadFile " + path); err != nil {
				return nil, err
			}
			switch path {
			case configPath:
				return m.cfg.Marshal()
			case cmdlinePath:
				return []byte(m.cmdline), nil
			case loadListPath:
				return []byte(m.load), nil
			case newRoot + loadListPath:
				if m.driver != "" {
					return []byte(m.driver), nil
				}
			}
			return nil, fs.ErrNotExist
		},
		WriteFile: func(path string, data []byte, perm fs.FileMode) error {
			m.files[path] = fmt.Sprintf("%04o %s", perm, data)
			return m.call("WriteFile " + path)
		},
		Now:        func() time.Time { return m.now },
		SetClock:   func(t time.Time) error { return m.call(fmt.Sprint("SetClock ", t.Unix())) },
		ACPITables: func() ([]ACPITable, error) { return m.acpi, m.call("ACPITables") },
		LoadModule: func(path, params string) error { return m.call(strings.TrimSpace("LoadModule " + path + " " + params)) },
		MountTSM:   func() error { return m.call("MountTSM") },
		Sysctl:     func(name, value string) error { return m.call("Sysctl " + name + "=" + strings.TrimSpace(value)) },
		Lockdown:   func() (string, error) { return m.mode, m.call("Lockdown") },
		KernelLog: func() (string, error) {
			return "<6>[    1.0] NET: up\n<4>[    9.1] NVRM: loading\n" + strings.Repeat("<4>[    9.1] NVRM: again\n", 10) + "<4>[    9.2] NVRM: No NVIDIA GPU found.\n", nil
		},
		Evidence: func(platform, tee string) (evidence.Source, error) {
			return m.source, m.call("Evidence " + platform + " " + tee)
		},
		Firewall: func(r firewall.Rules) error { m.rules = append(m.rules, r); return m.call("Firewall") },
		Network: func(context.Context, *guestconfig.Static) (*netup.Network, error) {
			return &netup.Network{
				Interface: "eth0", Address: netip.MustParsePrefix("192.0.2.9/24"), DNS: []netip.Addr{netip.MustParseAddr("192.0.2.3")},
			}, m.call("Network")
		},
		Lookup: func(_ context.Context, host string) ([]netip.Addr, error) {
			return []netip.Addr{netip.MustParseAddr("::ffff:192.0.2.1")}, m.call("Lookup " + host)
		},
		FetchKey: func(ctx context.Context, kbs guestconfig.KBS, peers []netip.AddrPort, a kbsclient.Attester) ([]byte, error) {
			if err := m.call(fmt.Sprint("FetchKey ", kbs.KeyPath, " ", peers)); err != nil {
				return nil, err
			}
			if _, err := a.Evidence(ctx, [48]byte{}); err != nil {
				return nil, fmt.Errorf("evidence: %w", err)
			}
			return m.key, nil
		},
		OpenDisk: func(_ context.Context, _ guestconfig.Disk, key []byte) (string, error) {
			m.opened = string(key)
			return "/dev/dm-0", m.call("OpenDisk")
		},
		OpenVerity: func(_ context.Context, dev string, _ guestconfig.Verity) (string, error) {
			return "/dev/dm-1", m.call("OpenVerity " + dev)
		},
		MountRoot: func(root string) error { return m.call("MountRoot " + root) },
		Linear: func(name, dev string, offset, size int64) (string, error) {
			return "/dev/dm-2", m.call(fmt.Sprint("Linear ", name, " ", dev, " ", offset, " ", size))
		},
		SwitchRoot: func(program string) error {
			if err := m.call("SwitchRoot " + program); err != nil {
				return err
			}
			return errRunning
		},
		PowerOff: func() { _ = m.call("PowerOff") },
	}
}

// errRunning stands for an exec that worked.
var errRunning = errors.New("the agent runs")

func (m *machine) boot(ctx context.Context) {
	Boot(ctx, boot.NewLog(&m.console, false, func() time.Duration { return 0 }), m.deps())
}

func (m *machine) lastLine() string {
	lines := strings.Split(strings.TrimSpace(m.console.String()), "\n")
	return lines[len(lines)-1]
}

func (m *machine) did(prefix string) bool {
	return slices.ContainsFunc(m.calls, func(c string) bool { return strings.HasPrefix(c, prefix) })
}

const digestLine = "launch_digest=d1"

// What a guest does not use is not loaded.
func TestFeatureModules(t *testing.T) {
	const nfs = "LoadModule /lib/modules/6.12/kernel/nfsv4.ko"
	for _, port := range []uint16{443, 2049} {
		m := newMachine()
		m.load += "nfs:/lib/modules/6.12/kernel/nfsv4.ko\nother:/lib/modules/6.12/kernel/other.ko\n"
		m.cfg.Network.AllowedOutPorts = []guestconfig.Port{{Port: port, Proto: "tcp"}}
		m.boot(t.Context())
		if m.did(nfs) != (port == 2049) || m.did("LoadModule /lib/modules/6.12/kernel/other.ko") || !m.did("SwitchRoot") {
			t.Errorf("port %d: %v", port, m.calls)
		}
	}
}

// The GPUs' driver lies in the verity root; nothing unsigned follows it.
func TestDriver(t *testing.T) {
	const (
		nvidia = "LoadModule /newroot/lib/modules/6.12/nvidia.ko"
		uvm    = "LoadModule /newroot/lib/modules/6.12/nvidia-uvm.ko"
		last   = "Sysctl kernel/modules_disabled=1"
	)
	guest := func(count int) *machine {
		m := newMachine()
		m.cfg.GPU = &guestconfig.GPU{Mode: guestconfig.GPULocal, OCSP: "off", Count: count}
		m.load += "gpu:/lib/modules/6.12/kernel/ecdh_generic.ko\n"
		m.driver = "/lib/modules/6.12/nvidia.ko\n/lib/modules/6.12/nvidia-uvm.ko\n"
		return m
	}
	for _, c := range []struct {
		name  string
		spoil func(*machine)
		want  []string
	}{
		{"several GPUs", func(*machine) {}, []string{"LoadModule /lib/modules/6.12/kernel/ecdh_generic.ko", "MountRoot /dev/dm-1", nvidia, uvm, "Lockdown", last, "SwitchRoot /proc/self/exe"}},
		{"one GPU", func(m *machine) { m.cfg.GPU.Count = 1 }, []string{nvidia + " NVreg_NvLinkDisable=1", uvm, "Lockdown", last}},
		{"made-up GPUs", func(m *machine) { m.driver = "" }, []string{"MountRoot /dev/dm-1", "Lockdown", last, "SwitchRoot /proc/self/exe"}},
	} {
		m := guest(8)
		c.spoil(m)
		m.boot(t.Context())
		at := -1
		for _, call := range c.want {
			i := slices.Index(m.calls, call)
			if i <= at {
				t.Errorf("%s: %q is not where it belongs in %q", c.name, call, m.calls)
			}
			at = i
		}
		if c.name == "made-up GPUs" && m.did(nvidia) {
			t.Errorf("%s: a module out of nowhere", c.name)
		}
	}

	m := guest(1)
	m.fail[nvidia+" NVreg_NvLinkDisable=1"] = syscall.ENODEV
	m.boot(t.Context())
	if text := m.console.String(); !strings.Contains(text, "coffer: kernel: NVRM: No NVIDIA GPU found.\n") || strings.Contains(text, "NVRM: loading") || strings.Contains(text, "NET") {
		t.Errorf("what the driver said last is not on the console alone:\n%s", text)
	}

	m = newMachine()
	m.driver = "/lib/modules/6.12/nvidia.ko\n"
	m.boot(t.Context())
	if m.did(nvidia) || !m.did("SwitchRoot") {
		t.Errorf("a guest without GPUs: %q", m.calls)
	}
}

func TestBoot(t *testing.T) {
	m := newMachine()
	m.boot(t.Context())
	want := []string{
		"Mount",
		"ReadFile /etc/coffer/guest.json", "ReadFile /proc/cmdline", "ACPITables",
		"ReadFile /lib/modules/load", "LoadModule /lib/modules/6.12/kernel/dm_mod.ko", "LoadModule /lib/modules/6.12/kernel/sev_guest.ko", "MountTSM",
		"Sysctl kernel/modprobe=", "Sysctl kernel/kexec_load_disabled=1", "Sysctl kernel/sysrq=0", "Sysctl kernel/dmesg_restrict=1",
		"Sysctl kernel/kptr_restrict=2", "Sysctl kernel/unprivileged_bpf_disabled=1", "Sysctl kernel/yama/ptrace_scope=2", "Lockdown", "Sysctl kernel/modules_disabled=1",
		"Evidence " + evidence.Platform + " snp",
		"Firewall",
		"Network", "WriteFile /run/coffer/resolv.conf", "WriteFile /run/coffer/hosts", "Firewall",
		"Lookup kbs.example", "Firewall", "FetchKey keys/root/" + testID + " [192.0.2.1:8999]",
		"OpenDisk",
		"OpenVerity /dev/dm-0", "MountRoot /dev/dm-1",
		"Linear scratch /dev/dm-0 8388608 16777216",
		"WriteFile /run/coffer/handover.json", "SwitchRoot /proc/self/exe",
		"PowerOff",
	}
	if !slices.Equal(m.calls, want) {
		t.Errorf("calls:\n%s\nwant:\n%s", strings.Join(m.calls, "\n"), strings.Join(want, "\n"))
	}
	if m.opened != string(testPassphrase) {
		t.Errorf("the disk was opened with %d bytes, want the key without its newline", len(m.opened))
	}
	if bytes.ContainsAny(m.key, "0123456789abcdef") {
		t.Error("the key was not wiped")
	}
	for _, secret := range []string{m.console.String(), m.files[guestconfig.HandoverPath]} {
		if strings.Contains(secret, m.opened) {
			t.Error("the key stands in the console or the handover")
		}
	}
	text := m.console.String()
	for _, phase := range []string{"mounts", "config", "acpi", "modules", "evidence", "firewall", "network", "key", "luks", "verity", "root"} {
		for _, status := range []string{"start", "ok"} {
			_, rest, found := strings.Cut(text, "phase="+phase+" status="+status+" t=0.00\n")
			if !found {
				t.Fatalf("phase=%s status=%s is missing, or comes too early:\n%s", phase, status, m.console.String())
			}
			text = rest
		}
	}
	// The digest of "bytecode".
	if want := "coffer: acpi tables=APIC,DSDT,FACP dsdt_sha256=8e896187127726aa"; !strings.Contains(m.console.String(), want) {
		t.Errorf("no line %q:\n%s", want, m.console.String())
	}
	if !strings.Contains(m.console.String(), digestLine) {
		t.Error("the launch measurement is not printed")
	}

	perm, doc, _ := strings.Cut(m.files[guestconfig.HandoverPath], " ")
	h, err := guestconfig.ParseHandover([]byte(doc))
	if err != nil || perm != "0600" {
		t.Fatalf("handover %s: %v", perm, err)
	}
	if h.ScratchDevice != "/dev/dm-2" || h.Interface != "eth0" || !slices.Equal(h.DNS, []string{"192.0.2.3"}) || !strings.HasPrefix(h.LaunchDigest, "d1") || len(h.BootLog) < 20 {
		t.Errorf("handover: %+v", h)
	}
	if cfg, err := guestconfig.Parse(h.Config); err != nil || cfg.CVMID != testID {
		t.Errorf("handover's config: %v", err)
	}
}

// The firewall opens one step after the other, and never more than needed.
func TestFirewallSteps(t *testing.T) {
	m := newMachine()
	m.boot(t.Context())
	dns := []netip.Addr{netip.MustParseAddr("192.0.2.3")}
	want := []firewall.Rules{{DHCP: true}, {DHCP: true, DNS: dns}, {DHCP: true, DNS: dns, KBS: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:8999")}}}
	if fmt.Sprint(m.rules) != fmt.Sprint(want) {
		t.Errorf("rules %+v, want %+v", m.rules, want)
	}
	static := newMachine()
	static.cfg.Network.Static = &guestconfig.Static{Address: "192.0.2.9/24", Gateway: "192.0.2.1"}
	static.boot(t.Context())
	for _, r := range static.rules {
		if r.DHCP {
			t.Errorf("DHCP is open beside a static address: %+v", r)
		}
	}
}

func TestFailures(t *testing.T) {
	errFake := errors.New("no luck")
	fetch := "FetchKey keys/root/" + testID + " [192.0.2.1:8999]"
	for _, c := range []struct {
		name   string
		spoil  func(*machine)
		phase  string
		code   boot.Code
		detail string // a part of the line
		notDid string // what must not have happened
	}{
		{"mounts", func(m *machine) { m.fail["Mount"] = errFake }, "mounts", boot.CodeInternal, "no luck", "ReadFile"},
		{"no config", func(m *machine) {
			m.load += "nfs:/lib/modules/6.12/kernel/nfsv4.ko\n"
			m.fail["ReadFile "+configPath] = fs.ErrNotExist
		}, "config", boot.CodeConfig, "not exist", "Network"},
		{"invalid config", func(m *machine) { m.cfg.CVMID = "x" }, "config", boot.CodeConfig, "cvm_id", "Network"},
		{"vm_id of another", func(m *machine) { m.cmdline = "vm_id=cvm_ffffffffffff" }, "config", boot.CodeConfig, "cvm_ffffffffffff", "Network"},
		{"vm_id missing", func(m *machine) { m.cmdline = "quiet" }, "config", boot.CodeConfig, "vm_id is missing", "Network"},
		{"vm_id twice", func(m *machine) { m.cmdline += " vm_id=" + testID }, "config", boot.CodeConfig, "2 times", "Network"},
		{"clock", func(m *machine) { m.now = time.Unix(5, 0); m.fail["SetClock 1700000000"] = errFake }, "config", boot.CodeClock, "1970-01-01", "Network"},
		{"ACPI table", func(m *machine) { m.acpi = append(m.acpi, ACPITable{Name: "SSDT2"}) }, "acpi", boot.CodeACPI, "not expected: SSDT2;", "Firewall"},
		{"ACPI table of bytecode", func(m *machine) {
			m.cfg.ACPITables = []string{"SSDT"}
			m.acpi = append(m.acpi, ACPITable{Name: "dynamic/SSDT1"})
		}, "acpi", boot.CodeACPI, "dynamic/SSDT1", "Firewall"},
		{"no ACPI tables", func(m *machine) { m.fail["ACPITables"] = errFake }, "acpi", boot.CodeACPI, "no luck", "Firewall"},
		{"no lockdown", func(m *machine) { m.mode = "none" }, "modules", boot.CodeModules, "kernel's lockdown is", "Firewall"},
		{"module", func(m *machine) { m.fail["LoadModule /lib/modules/6.12/kernel/dm_mod.ko"] = errFake }, "modules", boot.CodeModules, "dm_mod.ko: no luck", "Network"},
		{"load list", func(m *machine) { m.load = "/bin/sh\n" }, "modules", boot.CodeModules, "/bin/sh", "LoadModule"},
		{"sysctl", func(m *machine) { m.fail["Sysctl kernel/modules_disabled=1"] = errFake }, "modules", boot.CodeModules, "no luck", "Network"},
		{"no GPU", func(m *machine) {
			m.cfg.GPU = &guestconfig.GPU{Mode: guestconfig.GPULocal, OCSP: "off"}
			m.driver = "/lib/modules/6.12/nvidia.ko\n"
			m.fail["LoadModule /newroot/lib/modules/6.12/nvidia.ko"] = syscall.ENODEV
		}, "driver", boot.CodeGPU, "the VM has no NVIDIA GPU", "SwitchRoot"},
		{"no lockdown", func(m *machine) {
			m.cfg.GPU = &guestconfig.GPU{Mode: guestconfig.GPULocal, OCSP: "off"}
			m.fail["Lockdown"] = errFake
		}, "driver", boot.CodeGPU, "no luck", "SwitchRoot"},
		{"no platform", func(m *machine) { m.fail["Evidence "+evidence.Platform+" snp"] = evidence.ErrPlatform }, "evidence", boot.CodeEvidence, "platform", "Firewall"},
		{"no report", func(m *machine) { m.source.err = errFake }, "evidence", boot.CodeEvidence, "no luck", "Firewall"},
		{"debug policy", func(m *machine) { m.source.report.Policy |= 1 << 19 }, "evidence", boot.CodeEvidence, "debug", "Firewall"},
		{"VMPL 1", func(m *machine) { m.source.report.VMPL = 1 }, "evidence", boot.CodeEvidence, "VMPL 1", "Firewall"},
		{"no measurement", func(m *machine) { m.source.report.Measurement = [48]byte{} }, "evidence", boot.CodeEvidence, "zero", "Firewall"},
		{"firewall", func(m *machine) { m.fail["Firewall"] = errFake }, "firewall", boot.CodeFirewall, "no luck", "Network"},
		{"network", func(m *machine) { m.fail["Network"] = errFake }, "network", boot.CodeNetwork, "no luck", "FetchKey"},
		{"TLS", func(m *machine) { m.fail[fetch] = fmt.Errorf("x: %w", kbsclient.ErrTLS) }, "key", boot.CodeKBSTLS, "TLS", "OpenDisk"},
		{"clock and certificate", func(m *machine) { m.fail[fetch] = &kbsclient.ClockError{} }, "key", boot.CodeClock, "certificate", "OpenDisk"},
		{"refused", func(m *machine) { m.fail[fetch] = &kbsclient.Error{Status: 401, Type: "AttestationError"} }, "key", boot.CodeKBSRefused, "refused", "OpenDisk"},
		{"denied", func(m *machine) { m.fail[fetch] = &kbsclient.Error{Status: 401, Type: "PolicyDeny"} }, "key", boot.CodeKBSDenied, "denies", "OpenDisk"},
		{"no key", func(m *machine) { m.fail[fetch] = &kbsclient.Error{Status: 401, Type: "PluginInternalError"} }, "key", boot.CodeKBSNoKey, "no such resource", "OpenDisk"},
		{"strange answer", func(m *machine) { m.fail[fetch] = kbsclient.ErrTooLarge }, "key", boot.CodeKBSProtocol, "too large", "OpenDisk"},
		{"short key", func(m *machine) { m.key = m.key[:100] }, "key", boot.CodeKBSProtocol, "100 bytes", "OpenDisk"},
		{"evidence for the KBS", func(m *machine) {
			m.source.evidenceErr = errFake
		}, "key", boot.CodeEvidence, "no luck", "OpenDisk"},
		{"luks", func(m *machine) { m.fail["OpenDisk"] = boot.Fail(boot.CodeLUKSKey, errFake) }, "luks", boot.CodeLUKSKey, "no luck", "OpenVerity"},
		{"verity", func(m *machine) { m.fail["OpenVerity /dev/dm-0"] = errFake }, "verity", boot.CodeVerity, "no luck", "MountRoot"},
		{"mount root", func(m *machine) { m.fail["MountRoot /dev/dm-1"] = errFake }, "verity", boot.CodeVerity, "no luck", "Linear"},
		{"scratch", func(m *machine) { m.fail["Linear scratch /dev/dm-0 8388608 16777216"] = errFake }, "root", boot.CodeRoot, "no luck", "SwitchRoot"},
		{"handover", func(m *machine) { m.fail["WriteFile /run/coffer/handover.json"] = errFake }, "root", boot.CodeRoot, "no luck", "SwitchRoot"},
		{"switch", func(m *machine) { m.fail["SwitchRoot /proc/self/exe"] = errFake }, "root", boot.CodeRoot, "no luck", "nothing"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMachine()
			c.spoil(m)
			m.boot(t.Context())
			last := m.lastLine()
			if !strings.HasPrefix(last, fmt.Sprintf("coffer: FAILED phase=%s code=%s detail=", c.phase, c.code)) || !strings.Contains(last, c.detail) {
				t.Errorf("last line %s\nwant phase=%s code=%s and %q", last, c.phase, c.code, c.detail)
			}
			if m.did(c.notDid) {
				t.Errorf("went on to %s: %v", c.notDid, m.calls)
			}
			if n := len(m.calls); m.calls[n-1] != "PowerOff" || slices.Index(m.calls, "PowerOff") != n-1 {
				t.Errorf("want one PowerOff at the end: %v", m.calls)
			}
			if bytes.Contains(m.console.Bytes(), testPassphrase[:64]) {
				t.Error("the key stands on the console")
			}
			// A report can be had unless the mounts or the platform failed.
			noReport := c.phase == "mounts" || c.name == "no platform" || c.name == "no report"
			if strings.Contains(m.console.String(), "launch_digest=") == noReport && c.name != "module" && c.name != "load list" && c.name != "sysctl" {
				t.Errorf("launch measurement printed: %v\n%s", !noReport, m.console.String())
			}
		})
	}
}

func TestOptionalModule(t *testing.T) {
	m := newMachine()
	m.fail["LoadModule /lib/modules/6.12/kernel/sev_guest.ko"] = errors.New("no such device")
	m.boot(t.Context())
	if !m.did("SwitchRoot") || !strings.Contains(m.console.String(), "sev_guest.ko not loaded") {
		t.Errorf("an optional module stopped the boot:\n%s", m.console.String())
	}
}

func TestClockFloor(t *testing.T) {
	m := newMachine()
	m.now = time.Unix(0, 0)
	m.boot(t.Context())
	if !m.did("SetClock 1700000000") || !m.did("SwitchRoot") {
		t.Errorf("the clock was not set to the build time: %v", m.calls)
	}
}

func TestPanicPowersOff(t *testing.T) {
	m := newMachine()
	d := m.deps()
	d.OpenDisk = func(context.Context, guestconfig.Disk, []byte) (string, error) { panic("boom") }
	Boot(t.Context(), boot.NewLog(&m.console, false, func() time.Duration { return 0 }), d)
	if !strings.HasPrefix(m.lastLine(), "coffer: FAILED phase=luks code=E_INTERNAL") || !m.did("PowerOff") {
		t.Errorf("last line %s, calls %v", m.lastLine(), m.calls)
	}
}

func TestPanicInThePathOfFailure(t *testing.T) {
	m := newMachine()
	d := m.deps()
	d.SwitchRoot = func(string) error { panic("boom") }
	Boot(t.Context(), boot.NewLog(&m.console, false, func() time.Duration { return 0 }), d)
	if !strings.HasPrefix(m.lastLine(), "coffer: FAILED phase=root code=E_INTERNAL") || !m.did("PowerOff") {
		t.Errorf("last line %s, calls %v", m.lastLine(), m.calls)
	}
}

// A KBS that does not answer is asked for a minute, and one that comes up in
// that time is good enough.
func TestUnreachableKBS(t *testing.T) {
	for _, c := range []struct {
		name    string
		upAfter time.Duration
		up      bool
	}{
		{"comes up", 40 * time.Second, true},
		{"stays away", 1000 * time.Hour, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := newMachine()
				d := m.deps()
				start := time.Now()
				d.FetchKey = func(context.Context, guestconfig.KBS, []netip.AddrPort, kbsclient.Attester) ([]byte, error) {
					if time.Since(start) < c.upAfter {
						return nil, fmt.Errorf("connect: %w", kbsclient.ErrUnreachable)
					}
					return m.key, nil
				}
				Boot(t.Context(), boot.NewLog(&m.console, false, func() time.Duration { return 0 }), d)
				if m.did("SwitchRoot") != c.up {
					t.Errorf("went on: %v\n%s", !c.up, m.console.String())
				}
				if took := time.Since(start); !c.up && (took < keyPatience || took > keyPatience+5*time.Second) {
					t.Errorf("gave up after %s, want %s", took, keyPatience)
				}
				if !c.up && !strings.Contains(m.lastLine(), "phase=key code=E_KBS_UNREACHABLE") {
					t.Errorf("last line %s", m.lastLine())
				}
			})
		})
	}
}

// A phase that hangs in the kernel ends at its deadline.
func TestHang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine()
		d := m.deps()
		release := make(chan struct{})
		d.OpenVerity = func(context.Context, string, guestconfig.Verity) (string, error) { <-release; return "", nil }
		Boot(t.Context(), boot.NewLog(&m.console, false, func() time.Duration { return 0 }), d)
		if !strings.Contains(m.lastLine(), "phase=verity code=E_TIMEOUT") || !m.did("PowerOff") {
			t.Errorf("last line %s, calls %v", m.lastLine(), m.calls)
		}
		close(release)
	})
}

func TestPassphrase(t *testing.T) {
	good := string(testPassphrase)
	for _, c := range []struct {
		name, resource string
		ok             bool
	}{
		{"as it is", good, true},
		{"one newline", good + "\n", true},
		{"two newlines", good + "\n\n", false},
		{"carriage return", good + "\r\n", false},
		{"upper case", strings.ToUpper(good), false},
		{"a blank in front", " " + good[1:], false},
		{"too long", good + "0", false},
		{"too short", good[1:], false},
		{"empty", "", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			resource := []byte(c.resource)
			key, err := passphrase(resource)
			if (err == nil) != c.ok || c.ok && string(key) != good {
				t.Errorf("%q, %v", key, err)
			}
			if err != nil && len(bytes.Trim(resource, "\x00")) > 0 {
				t.Error("a refused resource was not wiped")
			}
		})
	}
}

func TestVMID(t *testing.T) {
	for _, c := range []struct{ name, line, id string }{
		{"plain", "console=ttyS0 quiet vm_id=cvm_1 panic=10", "cvm_1"},
		{"last, with newline", "quiet vm_id=cvm_1\n", "cvm_1"},
		{"absent", "quiet xvm_id=cvm_1", ""},
		{"twice the same", "vm_id=cvm_1 vm_id=cvm_1", ""},
		{"a dash is the same to the kernel", "vm_id=cvm_1 vm-id=cvm_2", ""},
		{"inside quotes", `foo="a vm_id=cvm_2" vm_id=cvm_1`, ""},
		{"quoted as a whole", `"vm_id=cvm_2" vm_id=cvm_1`, ""},
		{"without a value", "vm_id vm_id=cvm_1", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			id, err := vmID(c.line)
			if id != c.id || (err == nil) != (c.id != "") {
				t.Errorf("%q, %v; want %q", id, err, c.id)
			}
		})
	}
}

func FuzzVMID(f *testing.F) {
	f.Add("console=ttyS0 vm_id=cvm_0123456789ab")
	f.Add(`a="vm_id=x y" vm-id=`)
	f.Fuzz(func(t *testing.T, line string) {
		if id, err := vmID(line); err == nil && strings.ContainsAny(id, " \t\n") {
			t.Errorf("%q", id)
		}
	})
}

func FuzzLoadList(f *testing.F) {
	f.Add("/lib/modules/a.ko\n-/lib/modules/b.ko\n")
	f.Add("/lib/modules/../../etc/passwd\n")
	f.Fuzz(func(t *testing.T, text string) {
		list, err := loadList(text)
		for _, m := range list {
			if err == nil && (!strings.HasPrefix(m.path, "/lib/modules/") || strings.Contains(m.path, "/../")) {
				t.Errorf("%+v", m)
			}
		}
	})
}
