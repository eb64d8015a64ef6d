package scenarios

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"coffer/internal/testenv"
	"coffer/test/dockersave"
	"coffer/test/harness"
)

// The scenarios of the running guest (`make test-guest`): a workload that tries
// to get out, a host that gives the guest what it should not have, and a KBS that
// comes and goes. Each boot checks several things, since a boot is what takes time.

// probeBundle builds a bundle whose workload is the probe. config is the rest of
// CONFIG.yaml.
func (l *line) probeBundle(t *testing.T, config string, args ...string) *harness.Bundle {
	t.Helper()
	program := filepath.Join(l.env.Dir, "probe")
	if _, err := os.Stat(program); err != nil {
		cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", program, "./probe")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build the probe: %v\n%s", err, out)
		}
	}
	body, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	layer, err := dockersave.Layer(dockersave.Entry{Name: "probe", Mode: 0o755, Body: body},
		dockersave.Entry{Name: "etc/"}, dockersave.Entry{Name: "etc/secret", Body: []byte("the container's own")})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	archive := filepath.Join(dir, "image.tar.gz")
	image := dockersave.Image{Tag: "probe:1", Entrypoint: append([]string{"/probe"}, args...), Layers: [][]byte{layer}}
	if err := image.SaveLegacy(archive); err != nil {
		t.Fatal(err)
	}
	yaml := filepath.Join(dir, "CONFIG.yaml")
	write(t, yaml, fmt.Appendf(nil, "root_drive_size: 1\ndocker_archive: %s\nvcpus: [1]\nmemory_mib: 1024\n%s", archive, config))
	ctx, cancel := context.WithTimeout(t.Context(), buildDeadline)
	defer cancel()
	b, err := l.env.Build(ctx, l.settings, yaml)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Unpack(ctx, filepath.Join(dir, "site")); err != nil {
		t.Fatal(err)
	}
	return b
}

// bootLong boots a guest whose scenario has minutes of waiting in it.
func bootLong(t *testing.T, b *harness.Bundle, args ...string) *guest {
	t.Helper()
	g := boot(t, b, args...)
	ctx, cancel := context.WithTimeout(t.Context(), 4*bootDeadline)
	t.Cleanup(cancel)
	g.ctx = ctx
	return g
}

// hostileQEMU makes launch_vm.sh start a QEMU with more in it: netdev is appended
// to the options of the user network, args to the command line.
func hostileQEMU(t *testing.T, netdev string, args ...string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "qemu-system-x86_64")
	write(t, path, fmt.Appendf(nil, `#!/bin/sh
for a; do
	shift
	case $a in user,id=*) a="$a%s" ;; esac
	set -- "$@" "$a"
done
exec %s "$@" %s
`, netdev, testenv.LookTool(t, "qemu-system-x86_64"), strings.Join(args, " ")))
	if err := os.Chmod(path, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("QEMU", path)
}

// plantDrive replaces a drive of the bundle by an ext4 of the host's own making;
// commands are debugfs's.
func plantDrive(t *testing.T, drive string, mib int, files map[string]string, commands ...string) {
	t.Helper()
	dir := t.TempDir()
	tree, raw := filepath.Join(dir, "tree"), filepath.Join(dir, "raw")
	for name, from := range files {
		body, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(tree, 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(tree, name), body)
		if err := os.Chmod(filepath.Join(tree, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	run := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.Command(testenv.LookTool(t, name), args...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", name, err, out)
		}
	}
	if err := os.MkdirAll(tree, 0o755); err != nil {
		t.Fatal(err)
	}
	run("mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, raw, strconv.Itoa(mib)+"M")
	for _, c := range commands {
		run("debugfs", "-w", "-R", c, raw)
	}
	run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, drive)
}

// echo serves what it is sent on loopback, TCP and UDP, IPv4 and IPv6, and
// returns the ports.
func echo(t *testing.T) (tcp, udp int) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	u, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	tcp, udp = l.Addr().(*net.TCPAddr).Port, u.LocalAddr().(*net.UDPAddr).Port
	listeners, packets := []net.Listener{l}, []net.PacketConn{u}
	if l6, err := net.Listen("tcp", fmt.Sprintf("[::1]:%d", tcp)); err == nil {
		listeners = append(listeners, l6)
	}
	if u6, err := net.ListenPacket("udp", fmt.Sprintf("[::1]:%d", udp)); err == nil {
		packets = append(packets, u6)
	}
	for _, l := range listeners {
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() { defer c.Close(); io.Copy(c, c) }()
			}
		}()
	}
	for _, p := range packets {
		t.Cleanup(func() { p.Close() })
		go func() {
			b := make([]byte, 2048)
			for {
				n, from, err := p.ReadFrom(b)
				if err != nil {
					return
				}
				p.WriteTo(b[:n], from)
			}
		}()
	}
	return tcp, udp
}

func freePorts(t *testing.T, n int) []int {
	t.Helper()
	var ports []int
	for range n {
		p, err := harness.FreePort()
		if err != nil {
			t.Fatal(err)
		}
		ports = append(ports, p)
	}
	return ports
}

// answers reports whether an echo comes back from an address.
func answers(network, addr string) bool {
	c, err := net.DialTimeout(network, addr, 5*time.Second)
	if err != nil {
		return false
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.Write([]byte("hello")); err != nil {
		return false
	}
	n, err := c.Read(make([]byte, 16))
	return err == nil && n == 5
}

// probed is the status of each of the probe's attempts.
func probed(g *guest) map[string]string {
	found := map[string]string{}
	for _, m := range regexp.MustCompile(`workload: probe: (\S+) (\S+)`).FindAllStringSubmatch(g.Console.Text(), -1) {
		found[m[1]] = m[2]
	}
	return found
}

// confined: a workload that tries everything, on a host that hands the guest an old
// clock, a random device, a search domain and a drive with traps.
func TestGuestConfinement(t *testing.T) {
	l := setupKBS(t)
	allowedTCP, allowedUDP := echo(t)
	deniedTCP, deniedUDP := echo(t)
	in := freePorts(t, 4)
	b := l.probeBundle(t, fmt.Sprintf("allowed_ports: [8002, 8002/udp]\nallowed_out_ports: [%d, %d/udp]\ncc_attestation:\n  check_frequency: 5\n"+
		"hosts_entries:\n  peer.example: 192.0.2.7\nworkload:\n  cpu_percent: 90\n  memory_mib: 512\n", allowedTCP, allowedUDP),
		"all", strconv.Itoa(allowedTCP), strconv.Itoa(allowedUDP), strconv.Itoa(deniedTCP), strconv.Itoa(deniedUDP))
	plantDrive(t, b.File("user_data.qcow2"), 16, map[string]string{"setuid": filepath.Join(l.env.Dir, "probe")},
		"set_inode_field setuid mode 0104755", "mknod device c 1 1", "set_inode_field device mode 020666",
		"symlink link /etc/secret", "symlink ext_mount.conf /etc/passwd")
	if _, err := l.env.Run(t.Context(), "hostbuild", "drive", "resize", b.File("user_data.qcow2"), "2"); err != nil { // as a site's operator does
		t.Fatal(err)
	}
	hostileQEMU(t, fmt.Sprintf(",dnssearch=evil.example,hostname=evil,domainname=evil.example,hostfwd=tcp:127.0.0.1:%d-:8003,hostfwd=udp:127.0.0.1:%d-:8003", in[2], in[3]),
		"-rtc", "base=2001-02-03T04:05:06", "-device", "virtio-rng-pci")
	g := bootLong(t, b, "--stop-timeout", "90", "--forward", fmt.Sprintf("127.0.0.1:%d:8002", in[0]), "--forward", fmt.Sprintf("127.0.0.1:%d:8002/udp", in[1]))

	g.expect(`coffer: clock stood at 2001-02-03T\S+, set to the build time 20[2-9]\d-`)
	g.expect(`coffer: acpi tables=APIC,DSDT,FACP,FACS,\S+ dsdt_sha256=[0-9a-f]{64}`)
	g.expect(`modules_disabled=1 lockdown=integrity`)
	g.expect(fmt.Sprintf(`coffer: allowed ports in=8002/tcp,8002/udp out=%d/tcp,%d/udp`, allowedTCP, allowedUDP))
	g.expect(`coffer: the guest's own ports out=kbs:10.0.2.2:\d+/tcp,dns:10.0.2.3:53/udp\+tcp,dhcp:67/udp`)
	g.expect(`workload: probe: listening ok`)
	for _, c := range []struct {
		network string
		port    int
		want    bool
	}{{"tcp", in[0], true}, {"udp", in[1], true}, {"tcp", in[2], false}, {"udp", in[3], false}} {
		if got := answers(c.network, fmt.Sprintf("127.0.0.1:%d", c.port)); got != c.want {
			t.Errorf("%s port %d of the host is answered by the guest: %v, want %v", c.network, slices.Index(in, c.port), got, c.want)
		}
	}
	g.expect(`workload: probe: done ok`)

	status := probed(g)
	for _, name := range []string{"tcp-out-allowed", "udp-out-allowed", "tcp6-out-allowed", "udp6-out-allowed", "loopback"} {
		if status[name] != "ok" {
			t.Errorf("%s: %q", name, status[name])
		}
	}
	for _, name := range []string{
		"tcp-out", "udp-out", "dns-out", "tcp6-out", "udp6-out", "packet-socket", "packet-dgram-socket", "raw-socket", "raw6-socket", "ping-socket", "ping6-socket",
		"vsock", "interface-flags", "user-namespace", "mount", "mknod", "set-time", "load-module", "kexec", "reboot", "kernel-log", "bpf", "swap",
		"open-dev-sev-guest", "open-dev-mem", "open-dev-kmsg", "open-dev-port", "open-sys-kernel-config-tsm", "open-proc-kcore", "sysrq", "host-random",
		"open-sys-firmware-acpi-tables-DSDT", "disks", "host-device", "host-setuid", "write-kernel/core_pattern",
	} {
		if status[name] != "refused" {
			t.Errorf("%s: %q, want refused", name, status[name])
		}
	}
	text := g.Console.Text()
	for _, want := range []string{
		`sysctl ok kernel/modules_disabled="1"`, `sysctl ok kernel/kexec_load_disabled="1"`, `sysctl ok kernel/dmesg_restrict="1"`, `sysctl ok kernel/kptr_restrict="2"`,
		`sysctl ok kernel/yama/ptrace_scope="2"`, `sysctl ok kernel/unprivileged_bpf_disabled="1"`, `sysctl ok kernel/sysrq="0"`,
		`sysctl ok kernel/core_pattern="/dev/null"`, `sysctl ok user/max_user_namespaces="0"`, `sysctl ok kernel/modprobe=""`, "swaps ok 0",
		`host-symlink ok "the container's own"`, // it leads into the container, not out of it
		"mounted ok /user_data rw,nosuid,nodev", "mounted ok /user_config ro,nosuid,nodev", "mounted ok /applog rw,nosuid,nodev,noexec", "mounted ok /vault rw,nosuid,nodev",
		"resolv.conf ok nameserver 10.0.2.3;options timeout:2 attempts:2;",
		"user_data/ext_mount.conf is not used", "user_data ok 2 GB", "hosts ok 192.0.2.7 peer.example",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the console lacks %q", want)
		}
	}
	if strings.Contains(text, "clock ok 2001") || strings.Contains(text, "evil") {
		t.Error("the host's clock or its names got through")
	}

	// The workload ignores the polite signal; launch_vm.sh would kill the guest that
	// takes more than its 90 s.
	g.expect(`attestation round=\d+ verdict=pass`)
	g.Stop()
	g.expect(`workload exited code=137 signal=9`)
	g.expect(`coffer: power off reason="power button"`)
	g.off()
	if out, err := l.env.Run(t.Context(), "hostbuild", "drive", "cat", b.File("applog.qcow2"), "/workload.log"); err != nil || !strings.Contains(out, "probe: done ok") {
		t.Errorf("workload.log of a guest that stopped in order: %v\n%s", err, out)
	}
	if t.Failed() {
		t.Log(text)
	}
}

// Boots that a host's doing must end, each with its own code. The clock is among
// them, and not among what a host does to a running guest: the kernel reads the
// host's clock once, at its start.
func TestGuestRefusesTheHost(t *testing.T) {
	l := setupKBS(t)
	b := l.probeBundle(t, "", "tick")
	aml := filepath.Join(t.TempDir(), "aml")
	write(t, aml, []byte{0x70, 0x01, 0x60}) // Store(One, Local0)
	for _, c := range []struct {
		name                string
		args                []string
		phase, code, detail string
	}{
		// The kernel ignores an SSDT, and loads what is called otherwise.
		{"ACPI tables added", []string{"-acpitable", "sig=SSDT,data=" + aml, "-acpitable", "sig=PSDT,data=" + aml, "-acpitable", "sig=OSDT,data=" + aml},
			"acpi", "E_ACPI", "not expected: OSDT, PSDT, SSDT(ignored)"},
		{"clock far ahead", []string{"-rtc", "base=2090-01-01"}, "key", "E_CLOCK", "2090"},
	} {
		t.Run(c.name, func(t *testing.T) {
			hostileQEMU(t, "", c.args...)
			g := boot(t, l.copyOf(t, b))
			g.refused(c.phase, c.code, c.detail)
			if !strings.Contains(g.Console.Text(), "launch_digest=") {
				t.Error("the launch measurement is not printed")
			}
		})
	}
}

// A killed containerd stops neither the workload nor its output; a killed agent
// ends in the FAILED line and the power off.
func TestGuestKilledPrograms(t *testing.T) {
	l := setupKBS(t)
	l.baseWithSaboteur(t)
	const end = 14
	g := bootLong(t, l.probeBundle(t, "cc_attestation:\n  check_frequency: 2\n", "tick", "3", "containerd", "7", "containerd", strconv.Itoa(end), "agent"))
	for _, c := range []struct{ tick, restart int }{{3, 1}, {7, 2}} {
		g.expect(fmt.Sprintf(`workload: probe: tick ok %d `, c.tick))
		g.expect(fmt.Sprintf(`containerd ended reason="signal: killed" restart=%d`, c.restart))
		g.expect(`attestation round=\d+ verdict=pass`)
	}
	g.expect(fmt.Sprintf(`workload: probe: tick ok %d `, end))
	g.off()
	var ticks []string
	for _, m := range regexp.MustCompile(`workload: probe: tick ok (\d+)`).FindAllStringSubmatch(g.Console.Text(), -1) {
		ticks = append(ticks, m[1])
	}
	for i, tick := range ticks {
		if tick != strconv.Itoa(i+1) {
			t.Fatalf("the workload's output has gaps or was started anew: %v", ticks)
		}
	}
	g.failed("run", "E_INTERNAL", "/bin/agent ended: signal 9, killed")
}

// A host that stops the console, for which a Ctrl-S is enough, keeps no workload
// running whose agent is dead: neither the line about it nor the flush is waited for.
func TestGuestConsoleStopped(t *testing.T) {
	l := setupKBS(t)
	l.baseWithSaboteur(t)
	keyboard := filepath.Join(t.TempDir(), "keyboard")
	if err := syscall.Mkfifo(keyboard, 0o600); err != nil {
		t.Fatal(err)
	}
	hostileQEMU(t, "", "<>"+keyboard) // a redirection of the shell's
	g := bootLong(t, l.probeBundle(t, "", "tick", "4", "flood", "6", "agent"))
	g.expect(`workload: probe: tick ok 1 `)
	const controlS = "\x13"
	write(t, keyboard, []byte(controlS))
	g.off()
	if text := g.Console.Text(); strings.Count(text, "probe: flood") == 64 || strings.Contains(text, "coffer: FAILED") {
		t.Errorf("the console was not stopped:\n%s", text)
	}
}

// A host that stops the disk of the guest's own programs, together with the KBS,
// gains nothing: what ends the workload is in memory before the workload starts.
func TestGuestDiskStopped(t *testing.T) {
	l := setupKBS(t)
	monitor := filepath.Join(t.TempDir(), "monitor")
	hostileQEMU(t, "", "-monitor", "unix:"+monitor+",server=on,wait=off")
	g := bootLong(t, l.probeBundle(t, "cc_attestation:\n  check_frequency: 2\n  max_staleness: 15\n", "tick"))
	g.expect(`workload: probe: tick ok 1 `)
	m, err := net.Dial("unix", monitor)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if _, err := io.WriteString(m, "block_set_io_throttle crypt_root 1 0 0 0 0 0\n"); err != nil { // a byte a second
		t.Fatal(err)
	}
	l.kbs.Stop()
	g.expect(`attestation action=stop_job reason="no pass within 15s`)
	g.off()
	_, after, _ := strings.Cut(g.Console.Text(), "attestation action=stop_job")
	if strings.Contains(after, "workload: probe: tick") {
		t.Errorf("the workload ran on:\n%s", after)
	}
}

// baseWithSaboteur has bundles built with an agent that kills what the workload
// names, itself included.
func (l *line) baseWithSaboteur(t *testing.T) {
	t.Helper()
	programs, base, root := filepath.Join(l.env.Dir, "programs"), filepath.Join(l.env.Dir, "base"), filepath.Dir(l.env.Bin)
	if out, err := exec.Command("cp", "-r", l.env.Bin, programs).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v\n%s", err, out)
	}
	overlay := filepath.Join(t.TempDir(), "overlay.json")
	write(t, overlay, fmt.Appendf(nil, `{"Replace": {%q: %q}}`, filepath.Join(root, "cmd/agent/saboteur.go"), filepath.Join(root, "test/scenarios/testdata/saboteur.go")))
	build := exec.Command("go", "build", "-tags", "simulated", "-overlay", overlay, "-o", filepath.Join(programs, "agent-simulated"), "./cmd/agent")
	build.Dir = root
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	if _, err := l.env.Run(t.Context(), "hostbuild", "base", "build", "--platform", "simulated", "--programs", programs, "--out", base,
		"--cache", filepath.Join(root, "build/cache"), "--locked", filepath.Join(l.env.Base, "base.lock")); err != nil {
		t.Fatal(err)
	}
	l.env.Base = base
	var err error
	if l.settings, err = l.kbs.Settings(); err != nil {
		t.Fatal(err)
	}
}

// A workload that ends again and again is started again and again, ever slower,
// and what it does is told.
func TestGuestCrashLoop(t *testing.T) {
	l := setupKBS(t)
	b := l.probeBundle(t, "workload:\n  restart: on-failure\ncc_attestation:\n  check_frequency: 2\n", "exit", "7")
	g := bootLong(t, b)
	for range 3 {
		g.expect(`workload: probe: exit ok 7`)
		g.expect(`workload exited code=7`)
	}
	g.expect(`attestation round=\d+ verdict=pass`) // the guest's own work goes on
}

// throttle stands between guest and KBS and can be cut, or let a few bytes a second through.
type throttle struct {
	listener net.Listener
	to       string

	mu    sync.Mutex
	slow  bool
	conns []net.Conn
}

func newThrottle(t *testing.T, to string) *throttle {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &throttle{listener: l, to: to}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go p.serve(c)
		}
	}()
	return p
}

func (p *throttle) serve(c net.Conn) {
	defer c.Close()
	up, err := net.Dial("tcp", p.to)
	if err != nil {
		return
	}
	defer up.Close()
	p.mu.Lock()
	p.conns = append(p.conns, c)
	p.mu.Unlock()
	go func() {
		defer up.Close()
		io.Copy(up, c)
	}()
	b := make([]byte, 4096)
	for {
		p.mu.Lock()
		slow := p.slow
		p.mu.Unlock()
		size := len(b)
		if slow {
			size = 1
			time.Sleep(time.Second)
		}
		n, err := up.Read(b[:size])
		if err != nil {
			return
		}
		if _, err := c.Write(b[:n]); err != nil {
			return
		}
	}
}

// trickle lets one byte a second through from now on, or everything again.
func (p *throttle) trickle(on bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.slow = on
	for _, c := range p.conns {
		c.Close()
	}
	p.conns = nil
}

// outage: the KBS is away for less than max_staleness, trickles, and is away for
// longer, while the workload fills /applog and floods its log.
func TestGuestKBSOutage(t *testing.T) {
	t.Parallel()
	l := setupKBS(t)
	// The guest asks the throttle, on the port that its settings name.
	p := newThrottle(t, l.kbs.Listen)
	text, err := os.ReadFile(l.settings)
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(p.listener.Addr().String())
	write(t, l.settings, regexp.MustCompile(`guest_url: .*`).ReplaceAll(text, []byte("guest_url: https://10.0.2.2:"+port)))
	const stale = 45 * time.Second
	b := l.probeBundle(t, "cc_attestation:\n  check_frequency: 2\n  max_staleness: 45\n  failure_action: stop_job\n  restart_on_recovery: true\n", "applog")
	plantDrive(t, b.File("applog.qcow2"), 16, nil)

	g := bootLong(t, b)
	g.expect(`workload: probe: fill refused .*no space left`)
	g.expect(`workload: \([1-9]\d* bytes are not shown here\)`) // what was dropped is counted
	g.expect(`workload: probe: flood ok`)
	g.expect(`workload: probe: alive ok`)
	g.expect(`attestation round=\d+ verdict=pass`)

	// Down for less than max_staleness: unknown, and nothing is stopped.
	l.kbs.Stop()
	g.expect(`attestation round=\d+ verdict=unknown.*code=E_KBS_UNREACHABLE`)
	g.expect(`attestation round=\d+ verdict=unknown`)
	if err := l.kbs.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	g.expect(`attestation round=\d+ verdict=pass`)
	g.expect(`workload: probe: alive ok`)
	if strings.Contains(g.Console.Text(), "action=stop_job") {
		t.Error("an outage of less than max_staleness stopped the workload")
	}

	// A KBS that trickles is one that does not answer: after max_staleness the
	// workload is stopped, though no round has been refused.
	began := time.Now()
	p.trickle(true)
	g.expect(`attestation round=\d+ verdict=unknown`)
	g.expect(`attestation action=stop_job`)
	if took := time.Since(began); took < stale/2 {
		t.Errorf("the workload was stopped after %s, max_staleness is %s", took, stale)
	}
	g.expect(`workload exited code=137 signal=9`)
	stopped := len(g.Console.All())
	g.expect(`attestation round=\d+ verdict=unknown`)
	for _, line := range g.Console.All()[stopped:] {
		if strings.Contains(line, "workload: probe:") {
			t.Errorf("the stopped workload writes %q", line)
		}
	}

	// It comes back with the KBS.
	p.trickle(false)
	g.expect(`attestation round=\d+ verdict=pass`)
	g.expect(`attestation action=start_job`)
	g.expect(`workload: probe: alive ok`)

	// A refusal is acted on at once, and is as little for good.
	l.policyRemove(t, b.ID)
	g.expect(`attestation action=stop_job reason="round \d+ was negative: `)
	g.expect(`workload exited code=137 signal=9`)
	l.policyAdd(t, b.Dir)
	g.expect(`attestation action=start_job reason="a round passed"`)
	g.expect(`workload: probe: alive ok`)

	// A chip that does not answer any more carries the workload no longer than a
	// KBS that does not.
	killSimplatform(t, b)
	g.expect(`attestation action=stop_job`)
	g.expect(`workload exited code=137 signal=9`)
}

// A rule that is removed ends a guest whose failure_action is shutdown; one whose
// failure_action is log goes on, and tells each round.
func TestGuestFailureAction(t *testing.T) {
	t.Parallel()
	l := setupKBS(t)
	begin := func(action string) *guest {
		return bootLong(t, l.probeBundle(t, "cc_attestation:\n  check_frequency: 2\n  failure_action: "+action+"\n", "tick"), "--stop-timeout", "90")
	}
	ends, goesOn := begin("shutdown"), begin("log")
	for _, g := range []*guest{ends, goesOn} {
		g.expect(`workload: probe: tick ok 1 `)
	}
	for _, g := range []*guest{ends, goesOn} {
		l.policyRemove(t, g.b.ID)
	}

	ends.expect(`attestation round=\d+ verdict=negative.*code=E_KBS_DENIED`)
	ends.expect(`attestation action=stop_job reason="round \d+ was negative: `)
	ends.expect(`workload exited code=137 signal=9`)
	ends.off()
	_, after, _ := strings.Cut(ends.failed("run", "E_ATTESTATION", " was negative: "), "attestation action=stop_job")
	if strings.Contains(after, "workload: probe: tick") {
		t.Errorf("the workload ran on:\n%s", after)
	}

	goesOn.expect(`attestation action=log reason="round \d+ was negative: `)
	for range 2 {
		goesOn.expect(`workload: probe: tick ok \d+ `)
		goesOn.expect(`attestation round=\d+ verdict=negative.*code=E_KBS_DENIED`)
	}
	l.policyAdd(t, goesOn.b.Dir)
	goesOn.expect(`attestation round=\d+ verdict=pass`)
	goesOn.expect(`workload: probe: tick ok \d+ `)
	goesOn.Stop()
	goesOn.expect(`coffer: power off reason="power button"`)
	goesOn.off()
	text := goesOn.Console.Text()
	if n := strings.Count(text, "attestation action="); n != 1 {
		t.Errorf("the outage is told %d times besides its rounds", n)
	}
	var told []round
	for _, m := range regexp.MustCompile(`attestation round=\d+ verdict=(\w+) reason="[^"]*"(?: code=(\w+))?`).FindAllStringSubmatch(text, -1) {
		told = append(told, round{m[1], m[2]})
	}
	if logged := l.rounds(t, goesOn.b); !slices.Equal(logged, told) {
		t.Errorf("rounds in applog: %v, on the console: %v", logged, told)
	}
	if t.Failed() {
		t.Log(text)
	}
}

// A KBS that refuses connections for longer than max_staleness ends the guest: that
// is what failure_action says, and why.
func TestGuestKBSGone(t *testing.T) {
	l := setupKBS(t)
	b := l.probeBundle(t, "cc_attestation:\n  check_frequency: 2\n  max_staleness: 20\n  failure_action: shutdown\n", "tick")
	g := bootLong(t, b)
	g.expect(`workload: probe: tick ok 1 `)
	l.kbs.Stop()
	g.expect(`attestation round=\d+ verdict=unknown .*connection refused.* code=E_KBS_UNREACHABLE`)
	g.expect(`attestation action=stop_job reason="no pass within 20s; round \d+ was unknown: .*connection refused`)
	g.expect(`workload exited code=137 signal=9`)
	g.off()
	g.failed("run", "E_ATTESTATION", "no pass within 20s; round ")
}

// A VM that its host has let stand still attests at once: its time has jumped. The
// next round would come in an hour.
func TestGuestPaused(t *testing.T) {
	l := setupKBS(t)
	g := bootLong(t, l.probeBundle(t, "cc_attestation:\n  check_frequency: 3600\n  max_staleness: 7200\n", "tick"))
	g.expect(`workload: probe: tick ok 1 `)
	pause(t, g, 15*time.Second) // what the guest must notice
	g.expect(`attestation round=2 verdict=pass`)
	g.expect(`workload: probe: tick ok \d+ `)
}

// A host that stops the guest's clock together with the VM, or slows it, is found out
// by the KBS's; so is one that lets the clock run on. Who stands still for longer than
// max_staleness stops its workload first.
func TestGuestClockStopped(t *testing.T) {
	l := setupKBS(t)
	socket := filepath.Join(t.TempDir(), "qmp")
	hostileQEMU(t, "", "-qmp unix:"+socket+",server=on,wait=off")
	const stale = 45 * time.Second
	g := bootLong(t, l.probeBundle(t, "cc_attestation:\n  check_frequency: 10\n  max_staleness: 45\n  failure_action: stop_job\n  restart_on_recovery: true\n", "tick"))
	g.expect(`workload: probe: tick ok 1 `)
	g.expect(`attestation round=2 verdict=pass`)
	vm := dialQMP(t, socket)

	// Stopped: a round at once after the one that found it out.
	vm.standStill(12 * time.Second)
	g.expect(`attestation clock stopped or slowed: the KBS counted \d+s, the guest at most \d+s`)
	first, _ := strconv.Atoi(g.expect(`attestation round=(\d+) verdict=pass`)[1])
	second, _ := strconv.Atoi(g.expect(`attestation round=(\d+) verdict=pass`)[1])
	_, between, _ := strings.Cut(g.Console.Text(), fmt.Sprintf("attestation round=%d ", first))
	between, _, _ = strings.Cut(between, fmt.Sprintf("attestation round=%d ", second))
	ticks := strings.Count(between, "probe: tick ")
	if second != first+1 || ticks > 5 {
		t.Errorf("round %d came %d seconds of the guest's after round %d", second, ticks, first)
	}

	// Slowed to a third.
	for range 12 {
		vm.standStill(time.Second)
		time.Sleep(time.Second / 2)
	}
	g.expect(`attestation clock stopped or slowed: the KBS counted \d+s, the guest at most \d+s`)
	g.expect(`attestation round=\d+ verdict=pass`)
	if strings.Contains(g.Console.Text(), "action=stop_job") {
		t.Error("less than max_staleness stopped the workload")
	}

	// Stopped for longer than max_staleness, and the clock with it.
	g.expect(`attestation round=\d+ verdict=pass`)
	vm.standStill(stale)
	g.expect(`attestation action=stop_job reason="no pass within 45s: the clock was stopped or slowed, the KBS counted \d+s, the guest at most \d+s`)
	g.expect(`workload exited code=137 signal=9`)
	g.expect(`attestation action=start_job reason="a round passed"`)
	g.expect(`workload: probe: tick ok 1 `)

	// As long, and the clock runs on.
	g.expect(`attestation round=\d+ verdict=pass`)
	pause(t, g, stale)
	g.expect(`attestation action=stop_job reason="no pass within 45s"`)
	g.expect(`workload exited code=137 signal=9`)
	g.expect(`attestation action=start_job reason="a round passed"`)
}

// pause stops the process that a guest runs in; the guest's clock runs on.
func pause(t *testing.T, g *guest, d time.Duration) {
	t.Helper()
	pid := hostProcess(t, g.b, "qemu-system-x86_64")
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	time.Sleep(d)
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
}

// qmp is a QEMU's control socket.
type qmp struct {
	t    *testing.T
	conn net.Conn
	in   *json.Decoder
}

func dialQMP(t *testing.T, socket string) *qmp {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	q := &qmp{t, conn, json.NewDecoder(conn)}
	q.execute("qmp_capabilities")
	return q
}

func (q *qmp) execute(command string) {
	q.t.Helper()
	fmt.Fprintf(q.conn, `{"execute":%q}`, command)
	for {
		var answer map[string]json.RawMessage
		err := q.in.Decode(&answer)
		if err != nil || answer["error"] != nil {
			q.t.Fatalf("QMP %s: %v %s", command, err, answer["error"])
		}
		if answer["return"] != nil {
			return
		}
	}
}

// standStill stops the VM; under emulation its clock stops, too.
func (q *qmp) standStill(d time.Duration) {
	q.t.Helper()
	q.execute("stop")
	time.Sleep(d)
	q.execute("cont")
}

// killSimplatform ends the simulated platform of a bundle that runs.
func killSimplatform(t *testing.T, b *harness.Bundle) {
	t.Helper()
	if err := syscall.Kill(hostProcess(t, b, "simplatform"), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// hostProcess is the program that runs in a bundle's folder.
func hostProcess(t *testing.T, b *harness.Bundle, program string) (pid int) {
	t.Helper()
	procs, err := filepath.Glob("/proc/[0-9]*/cwd")
	if err != nil {
		t.Fatal(err)
	}
	for _, cwd := range procs {
		dir, err := os.Readlink(cwd)
		if err != nil || dir != b.Dir {
			continue
		}
		cmdline, err := os.ReadFile(filepath.Join(filepath.Dir(cwd), "cmdline"))
		if err != nil || filepath.Base(strings.Split(string(cmdline), "\x00")[0]) != program {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(cwd)))
		if err != nil {
			t.Fatal(err)
		}
		return pid
	}
	t.Fatalf("no %s runs in the bundle's folder", program)
	return 0
}
