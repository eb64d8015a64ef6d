package agent_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"coffer/agent"
	"coffer/agent/agenttest"
	"coffer/agent/applog"
	"coffer/agent/drives"
	"coffer/agent/workload"
	"coffer/internal/boot"
	"coffer/internal/evidence"
	"coffer/internal/firewall"
	"coffer/internal/guestconfig"
	"coffer/internal/netup"
	"coffer/internal/testenv"
	"coffer/internal/treedigest"
	"coffer/kbsclient"
)

// guest is an agent on a machine whose kernel parts are fakes; containerd, its
// container and the logs are real.
type guest struct {
	t       testing.TB
	deps    agent.Deps
	cfg     guestconfig.Config
	dir     string
	console *agenttest.Buffer
	stop    chan string
	kbs     *fakeKBS

	mu    sync.Mutex
	rules []firewall.Rules
	off   chan struct{}
}

type fakeSource struct{}

func (fakeSource) TEE() string     { return "sample" }
func (fakeSource) Simulated() bool { return true }
func (fakeSource) Report(context.Context, [64]byte, int) ([]byte, []byte, error) {
	return nil, nil, evidence.ErrNoReport
}
func (fakeSource) Evidence(context.Context, [48]byte) (json.RawMessage, error) {
	return json.RawMessage(`{}`), nil
}

// fakeKBS answers each round by the verdict of its number; the last one holds on.
type fakeKBS struct {
	mu       sync.Mutex
	verdicts []error
	rounds   int
	ahead    time.Duration // of its clock, by each round but the first; 0: it has none
	dial     agent.Dial
}

func (k *fakeKBS) LastAnswer() kbsclient.Answered {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.ahead == 0 {
		return kbsclient.Answered{}
	}
	now := time.Now()
	return kbsclient.Answered{Date: now.Add(time.Duration(k.rounds-1) * k.ahead), Sent: now, Came: now}
}

func (k *fakeKBS) Fetch(ctx context.Context, a kbsclient.Attester, path string) ([]byte, string, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if path == "site/keys/model" {
		return []byte("model key"), "", nil
	}
	if path != "keys/canary/cvm_0123456789ab" {
		return nil, "", fmt.Errorf("asked for %s", path)
	}
	if _, err := a.Evidence(ctx, [48]byte{}); err != nil {
		return nil, "", err
	}
	i := min(k.rounds, len(k.verdicts)-1)
	k.rounds++
	if i < 0 {
		return nil, "token", nil
	}
	return nil, "token", k.verdicts[i]
}

var errDenied = &kbsclient.Error{Status: 401, Type: "PolicyDeny", Detail: "Access denied by policy", Op: "resource"}

// newGuest makes a guest that runs a shell script.
func newGuest(t testing.TB, script string) *guest {
	t.Helper()
	testenv.Root(t)
	src := agenttest.Image(t, `{"Entrypoint":["/bin/sh","-c"],"Env":["PATH=/bin"]}`)
	g := configured(t, script, src)
	g.deps.Paths.Bin = agenttest.Programs(t)
	return g
}

// configured needs neither root nor containerd.
func configured(t testing.TB, script string, src workload.ImageSource) *guest {
	t.Helper()
	dir := agenttest.Dir(t)
	g := &guest{t: t, dir: dir, console: &agenttest.Buffer{}, stop: make(chan string, 1), kbs: &fakeKBS{}, off: make(chan struct{}, 8)}
	for _, d := range []string{"run/coffer", "applog", "user_config", "user_data", "scratch"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	p := agent.Paths{
		Bin: "/nonexistent", Run: dir + "/run", Applog: dir + "/applog", UserConfig: dir + "/user_config", UserData: dir + "/user_data",
		Scratch: dir + "/scratch", CgroupRoot: "/sys/fs/cgroup", Cgroup: fmt.Sprintf("/coffer-agent-test-%d/workload", os.Getpid()), ImageMeta: src.Meta, Layers: src.Layers,
		ResolvConf: dir + "/run/coffer/resolv.conf", Hosts: dir + "/run/coffer/hosts",
	}
	for _, f := range []string{p.ResolvConf, p.Hosts} {
		if err := os.WriteFile(f, []byte("# of the guest\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	hex64 := strings.Repeat("ab", 32)
	digest := src.Digest
	if digest == "" {
		digest = "sha256:" + hex64
	}
	g.cfg = guestconfig.Config{
		Version: 1, CVMID: "cvm_0123456789ab", Platform: "simulated", TEE: "sample", BuildTime: 1,
		KBS: guestconfig.KBS{URL: "https://kbs.example:8999", CA: "-----BEGIN CERTIFICATE-----", KeyPath: "keys/root/cvm_0123456789ab", CanaryPath: "keys/canary/cvm_0123456789ab"},
		Disk: guestconfig.Disk{Serial: "crypt_root", HeaderSHA256: hex64, DataOffset: 16 << 20, PayloadSize: 1 << 30,
			Verity:  guestconfig.Verity{RootHash: hex64, Salt: hex64, DataBlocks: 100, HashStartBlock: 101},
			Scratch: guestconfig.Scratch{Offset: 1 << 20, Size: 1 << 20}},
		Network: guestconfig.Network{Static: &guestconfig.Static{Address: "10.0.2.15/24", Gateway: "10.0.2.2"},
			AllowedPorts: []guestconfig.Port{{Port: 8002, Proto: "tcp"}}, AllowedOutPorts: []guestconfig.Port{{Port: 443, Proto: "tcp"}}},
		Attestation: guestconfig.Attestation{CheckFrequency: 1, MaxStaleness: 60, FailureAction: guestconfig.ActionStopJob},
		Workload:    guestconfig.Workload{ImageName: "test", ImageDigest: digest, Args: []string{script}, PidsMax: 64, TmpMiB: 8},
		UserConfig:  guestconfig.UserConfig{Integrity: guestconfig.IntegrityOff},
	}
	g.deps = agent.Deps{
		Paths: p,
		Mount: func() error { return nil },
		Stay:  func(context.Context) error { return nil },
		Handover: func() ([]byte, error) {
			raw, err := g.cfg.Marshal()
			if err != nil {
				return nil, err
			}
			return json.Marshal(guestconfig.Handover{Config: raw, ScratchDevice: "/dev/dm-2", LaunchDigest: "d1ge57", Interface: "eth0",
				DNS: []string{"10.0.2.3"}, BootLog: []string{"phase=mounts status=start t=0.10", "launch_digest=d1ge57"}})
		},
		Hostname: func(name string) error { return nil },
		Firewall: func(r firewall.Rules) error {
			g.mu.Lock()
			defer g.mu.Unlock()
			g.rules = append(g.rules, r)
			return nil
		},
		Network: func(context.Context, *guestconfig.Static) (*netup.Network, error) { return nil, errors.New("static") },
		Lookup: func(_ context.Context, host string) ([]netip.Addr, error) {
			if host != "kbs.example" {
				return nil, fmt.Errorf("no such host %s", host)
			}
			return []netip.Addr{netip.MustParseAddr("192.0.2.7")}, nil
		},
		Attach:   func(context.Context, drives.Mount) error { return nil },
		Detach:   func(string) error { return nil },
		Overlay:  drives.Overlay,
		Evidence: func(string, string) (evidence.Source, error) { return fakeSource{}, nil },
		KBS:      func(_ guestconfig.KBS, dial agent.Dial) (agent.KBS, error) { g.kbs.dial = dial; return g.kbs, nil },
		Now:      func() func() time.Duration { b := time.Now(); return func() time.Duration { return time.Since(b) } }(),
		Stop:     g.stop,
		PowerOff: func() { g.off <- struct{}{} },
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("console:\n%s", g.console.String())
			b, _ := os.ReadFile(dir + "/applog/containerd.log")
			t.Logf("containerd:\n%s", b)
		}
		agenttest.RemoveCgroups(p.Cgroup)
	})
	return g
}

// start runs the agent beside the test.
func (g *guest) start() <-chan struct{} {
	g.t.Helper()
	tee := applog.NewTee(g.console)
	out := agent.Output{
		Log:      boot.NewLog(tee, true, g.deps.Now),
		Tee:      tee,
		Workload: applog.NewAsync(g.console, 1<<20, agent.WorkloadNotice),
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		agent.Run(g.deps, out)
	}()
	g.t.Cleanup(func() {
		select {
		case g.stop <- "end of the test":
		default:
		}
		<-ended
	})
	return ended
}

// end waits for the guest's end and returns the console's lines.
func (g *guest) end(ended <-chan struct{}) []string {
	g.t.Helper()
	select {
	case <-ended:
	case <-time.After(time.Minute):
		g.t.Fatal("the guest does not end")
	}
	select {
	case <-g.off:
	default:
		g.t.Error("the power is still on")
	}
	return strings.Split(strings.TrimSpace(g.console.String()), "\n")
}

func (g *guest) last(lines []string, want string) {
	g.t.Helper()
	if got := lines[len(lines)-1]; !strings.HasPrefix(got, want) {
		g.t.Errorf("last line is %q, want %q", got, want)
	}
}

func (g *guest) file(name string) string {
	g.t.Helper()
	b, err := os.ReadFile(filepath.Join(g.dir, name))
	if err != nil {
		g.t.Error(err)
	}
	return string(b)
}

func TestLife(t *testing.T) {
	g := newGuest(t, `echo hello; echo "coffer: FAILED phase=fake"; printf 'no end'; touch /vault/kept /dropped; ls /vault; exit 7`)
	if err := os.MkdirAll(g.dir+"/scratch/upper/old", 0o755); err != nil {
		t.Fatal(err)
	}
	g.cfg.API.KDS = "https://kds.example"
	lines := g.end(g.start())
	g.last(lines, `coffer: power off reason="workload exited code=7" platform=simulated`)

	var phases []string
	for _, l := range lines {
		if name, ok := strings.CutPrefix(l, "phase="); ok && strings.Contains(l, "status=ok") {
			phases = append(phases, strings.Fields(name)[0])
		}
	}
	if want := strings.Fields("system handover ports drives user_config api containerd image attest workload"); !slices.Equal(phases, want) {
		t.Errorf("phases %v, want %v", phases, want)
	}
	for _, want := range []string{
		"coffer: allowed ports in=8002/tcp out=443/tcp platform=simulated",
		"coffer: the guest's own ports out=kbs:kbs.example:8999/tcp,dns:10.0.2.3:53/udp+tcp,kds:https://kds.example platform=simulated",
		`attestation round=1 verdict=pass reason="" platform=simulated`,
		"workload: hello", "workload: coffer: FAILED phase=fake", "workload: no endkept",
	} {
		if !slices.Contains(lines, want) {
			t.Errorf("console lacks %q", want)
		}
	}
	if out := g.file("applog/workload.log"); out != "hello\ncoffer: FAILED phase=fake\nno endkept\n" {
		t.Errorf("workload.log holds %q", out)
	}
	log := g.file("applog/coffer.log")
	if !strings.HasPrefix(log, "phase=mounts status=start t=0.10\nlaunch_digest=d1ge57\nphase=system status=start") {
		t.Errorf("coffer.log does not begin with init's lines: %.200q", log)
	}
	if !strings.Contains(log, "coffer: power off reason=") {
		t.Error("coffer.log lacks the last line")
	}
	first, _, _ := strings.Cut(g.file("applog/attestation.jsonl"), "\n")
	var rec map[string]any
	if err := json.Unmarshal([]byte(first), &rec); err != nil {
		t.Fatalf("attestation.jsonl: %v: %q", err, first)
	}
	if rec["seq"] != 1.0 || rec["verdict"] != "pass" || rec["launch_digest"] != "d1ge57" || rec["simulated"] != true {
		t.Errorf("attestation.jsonl: %v", rec)
	}

	// The ports are open before the KBS's address is known, and stay.
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.rules) != 2 {
		t.Fatalf("firewall was set %d times: %v", len(g.rules), g.rules)
	}
	r := g.rules[1]
	if r.DHCP || len(r.In) != 1 || len(r.Out) != 1 || fmt.Sprint(r.DNS) != "[10.0.2.3]" || fmt.Sprint(r.KBS) != "[192.0.2.7:8999]" {
		t.Errorf("rules are %+v", r)
	}
	if _, err := os.Stat(g.dir + "/scratch/vault/kept"); err != nil {
		t.Errorf("/vault does not keep: %v", err)
	}
	if _, err := os.Stat(g.dir + "/scratch/upper/old"); err == nil {
		t.Error("the writable layer of the last boot is still there")
	}
}

// The container has snpguest, in two places, and the agent's socket.
func TestServices(t *testing.T) {
	g := newGuest(t, `snpguest -V; /host/bin/snpguest --version; /usr/local/bin/snpguest -V
		echo "PATH=$PATH"; ls -l /host/run/coffer.sock; touch /host/run/x || echo run is read-only
		rm -f /host/run/coffer.sock || echo the socket stays
		echo y >/tmp/short; snpguest report /tmp/r /tmp/short; echo code=$?
		dd if=/dev/zero of=/tmp/req bs=64 count=1 2>/dev/null; snpguest report /tmp/r /tmp/req -v 0; echo code=$?
		snpguest report /tmp/r /tmp/req; echo code=$?
		ls -ld /opt/certs; touch /opt/certs/mine && echo certs are writable
		ls /dev`)
	g.cfg.Workload.Profile = guestconfig.Profile{Name: "test", Writable: []string{"/opt/certs"}, Certs: "/opt/certs"}
	lines := strings.Join(g.end(g.start()), "\n")
	for _, want := range []string{
		"PATH=/bin:/host/bin", "srw-rw-rw-", "run is read-only", "the socket stays",
		"unable to read 64 bytes from REQUEST_FILE", "VMPL 0 is Coffer's agent's own", "the agent answers 501: this CVM runs on sample evidence",
		"drwxrwxrwx", "certs are writable",
	} {
		if !strings.Contains(lines, want) {
			t.Errorf("the console lacks %q", want)
		}
	}
	if n := strings.Count(lines, "workload: snpguest 0.9.2"); n != 3 { // other lines may stand between them
		t.Errorf("snpguest was found %d times", n)
	}
	if n := strings.Count(lines, "workload: code=1"); n != 3 {
		t.Errorf("%d refusals", n)
	}
	for _, device := range []string{"sev-guest", "vport", "mem", "kmsg", "vda", "mapper"} {
		if strings.Contains(lines, "workload: "+device) {
			t.Errorf("the container has /dev/%s", device)
		}
	}
}

// exports is an NFS client of the kernel's.
type exports struct{ mounted chan string }

func (e exports) Mount(drive, source, data string) error {
	e.mounted <- source + " at " + drive
	return nil
}
func (e exports) Check(string) error   { return nil }
func (e exports) Unmount(string) error { e.mounted <- "unmounted"; return nil }

func TestNFS(t *testing.T) {
	for _, tc := range []struct {
		name, file string
		ports      []guestconfig.Port
		want       string
	}{
		{"no file", "", nil, ""},
		{"a bad file", "nas\n", nil, `user_data/ext_mount.conf is not used: "nas" is not server:/export`},
		{"not allowed", "192.0.2.9:/x\n", nil, "user_data/ext_mount.conf is not used: 2049 is not in allowed_out_ports"},
		{"allowed", "kbs.example:/x\n", []guestconfig.Port{{Port: 2049, Proto: "tcp"}}, "nfs kbs.example:/x is mounted at"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g := newGuest(t, `[ -e /user_data/mnt ] && ls /user_data/mnt; exit 0`)
			e := exports{make(chan string, 8)}
			g.deps.NFS, g.deps.Share = e, func(string) error { return nil }
			if tc.ports != nil {
				g.cfg.Network.AllowedOutPorts = tc.ports
			}
			if tc.file != "" {
				if err := os.WriteFile(g.dir+"/user_data/ext_mount.conf", []byte(tc.file), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			lines := g.end(g.start())
			g.last(lines, `coffer: power off reason="workload exited code=0"`)
			if !strings.Contains(strings.Join(lines, "\n"), tc.want) {
				t.Errorf("the console lacks %q", tc.want)
			}
			close(e.mounted)
			var did []string
			for m := range e.mounted {
				did = append(did, m)
			}
			want := []string{"192.0.2.7:/x at " + g.dir + "/user_data", "unmounted"}
			if tc.ports == nil {
				want = nil
			}
			if !slices.Equal(did, want) {
				t.Errorf("did %v, want %v", did, want)
			}
		})
	}
}

func TestRestartPolicyAndProfile(t *testing.T) {
	g := newGuest(t, `n=$(ls /vault | grep -c run); touch /vault/run$n; ls /vault/ws; echo run $n
		[ $n = 0 ] && { mkdir -p /vault/ws; echo 1 >/vault/ws/daemon_pid.fl; exit 0; }
		while [ ! -e /vault/ws/stop ]; do sleep 0.1; done; echo asked; exit 0`)
	g.cfg.Workload.Restart = guestconfig.RestartOnFailure
	g.cfg.Workload.Profile = guestconfig.Profile{Name: "test", Lasting: true, Remove: []string{"*/daemon_pid.fl"}, StopFile: "ws/stop", StopSeconds: 20}
	ended := g.start()
	g.console.Await(t, "workload: run 1")
	g.stop <- "power button"
	text := strings.Join(g.end(ended), "\n")
	for _, want := range []string{
		"workload exited code=0 seconds=", " early=true restart=1 in=1s", `workload profile=test removed "/vault/ws/daemon_pid.fl"`,
		"workload: asked\n", `coffer: power off reason="power button"`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the console lacks %q", want)
		}
	}
	if strings.Contains(text, "workload: daemon_pid.fl") {
		t.Error("a stale file was there at the second start")
	}
}

// pin pins files of user_config, all of them where none is named.
func (g *guest) pin(required ...string) {
	g.t.Helper()
	g.cfg.UserConfig.Integrity = guestconfig.IntegrityPinned
	if len(required) > 0 {
		g.cfg.UserConfig.Integrity = guestconfig.IntegrityRequired
	}
	tree, err := treedigest.Scan(map[string]string{"kit": g.dir + "/user_config/kit"}, required...)
	if err != nil {
		g.t.Fatal(err)
	}
	g.cfg.UserConfig.Files = tree
}

// A host that rewrites the drive, before the boot or behind the guest's back,
// changes nothing that is pinned.
func TestUserConfigIsPinned(t *testing.T) {
	const script = `trap "exit 0" TERM; cat /user_config/kit/a; cat /user_config/kit/b; touch /user_config/kit/c && echo writable; echo ready; while :; do sleep 1 & wait $!; done`
	kit := func(g *guest, name, text string) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(g.dir+"/user_config/kit", 0o755), os.WriteFile(g.dir+"/user_config/kit/"+name, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	start := func(t *testing.T, required ...string) *guest {
		g := newGuest(t, script)
		g.deps.Detach = func(target string) error {
			if strings.HasSuffix(target, "/merged") {
				return unix.Unmount(target, unix.MNT_DETACH)
			}
			return nil
		}
		kit(g, "a", "A as built\n")
		kit(g, "b", "B as built\n")
		g.pin(required...)
		return g
	}
	// The first round comes after the drive was read, and before the workload.
	rewriteAfterwards := func(g *guest) {
		lookup := g.deps.Lookup
		g.deps.Lookup = func(ctx context.Context, host string) ([]netip.Addr, error) {
			kit(g, "a", "A of the host\n")
			return lookup(ctx, host)
		}
	}
	t.Run("pinned", func(t *testing.T) {
		g := start(t)
		rewriteAfterwards(g)
		ended := g.start()
		g.console.Await(t, "workload: ready")
		g.stop <- "test"
		text := strings.Join(g.end(ended), "\n")
		for _, want := range []string{"user_config integrity=pinned entries=3 digest=" + g.cfg.UserConfig.Files.Digest(), "workload: A as built", "workload: B as built"} {
			if !strings.Contains(text, want) {
				t.Errorf("console lacks %q", want)
			}
		}
		if strings.Contains(text, "workload: writable") {
			t.Error("/user_config is writable")
		}
	})
	t.Run("required", func(t *testing.T) {
		g := start(t, "kit/a")
		kit(g, "b", "B of the site\n")
		rewriteAfterwards(g)
		ended := g.start()
		g.console.Await(t, "workload: ready")
		g.stop <- "test"
		text := strings.Join(g.end(ended), "\n")
		for _, want := range []string{"user_config integrity=required entries=2 digest=", "workload: A as built", "workload: B of the site"} {
			if !strings.Contains(text, want) {
				t.Errorf("console lacks %q", want)
			}
		}
	})
	for _, tc := range []struct {
		name     string
		required []string
		change   func(g *guest)
		want     string
	}{
		{"changed", nil, func(g *guest) { kit(g, "a", "A of the host\n") }, `user_config (integrity pinned): \"kit/a\" has more than its 11 bytes`},
		{"removed", nil, func(g *guest) { os.Remove(g.dir + "/user_config/kit/b") }, `user_config (integrity pinned): \"kit/b\" was removed`},
		{"added", nil, func(g *guest) { kit(g, "local.json", "{}") }, `user_config (integrity pinned): \"kit/local.json\" was added`},
		{"required removed", []string{"kit/a"}, func(g *guest) { os.Remove(g.dir + "/user_config/kit/a") }, `user_config (integrity required): \"kit/a\" was removed`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g := configured(t, script, workload.ImageSource{})
			kit(g, "a", "A as built\n")
			kit(g, "b", "B as built\n")
			g.pin(tc.required...)
			tc.change(g)
			g.last(g.end(g.start()), `coffer: FAILED phase=user_config code=E_USER_CONFIG detail="`+tc.want)
		})
	}
}

func TestDeniedWhileRunning(t *testing.T) {
	g := newGuest(t, `trap "echo got TERM" TERM; echo ready; while :; do sleep 1 & wait $!; done`)
	g.kbs.verdicts = []error{nil, nil, errDenied}
	lines := g.end(g.start())
	g.last(lines, `coffer: FAILED phase=run code=E_ATTESTATION detail="round 3 was negative: resource: the KBS's policy denies access`)
	text := strings.Join(lines, "\n")
	if !strings.Contains(text, `attestation round=3 verdict=negative reason="resource: the KBS's policy denies access: Access denied by policy (PolicyDeny, HTTP 401)" code=E_KBS_DENIED`) ||
		!strings.Contains(text, "workload exited code=137 signal=9") {
		t.Error("the console does not tell what happened")
	}
	if strings.Contains(text, "got TERM") {
		t.Error("the workload was given a chance")
	}
}

// The KBS's clock goes 20 s ahead with each round: the guest's own was stopped.
func TestClockStopped(t *testing.T) {
	g := newGuest(t, `echo ready; sleep 1000`)
	g.kbs.ahead = 20 * time.Second
	g.start()
	g.console.Await(t, `attestation round=1 verdict=pass`)
	g.console.Await(t, `attestation clock stopped or slowed: the KBS counted 2`)
	g.console.Await(t, `attestation round=2 verdict=pass`)
	g.console.Await(t, `attestation round=3 verdict=pass`)
	rounds := strings.Split(g.file("applog/attestation.jsonl"), "\n")
	var rec struct {
		Clock *struct {
			KBS   float64 `json:"kbs_s"`
			Guest float64 `json:"guest_s"`
		}
	}
	if err := json.Unmarshal([]byte(rounds[1]), &rec); err != nil || rec.Clock == nil || rec.Clock.KBS-rec.Clock.Guest < 19 || rec.Clock.KBS-rec.Clock.Guest > 21 {
		t.Errorf("attestation.jsonl: %v: %q", err, rounds[1])
	}
	if strings.Contains(rounds[0], `"clock"`) {
		t.Errorf("the first round compares with nothing: %q", rounds[0])
	}
}

func TestRestartOnRecovery(t *testing.T) {
	g := newGuest(t, `trap "exit 0" TERM; echo run >>/user_data/runs; while :; do sleep 1 & wait $!; done`)
	g.cfg.Attestation.RestartOnRecovery = true
	g.kbs.verdicts = []error{nil, errDenied, nil}
	ended := g.start()
	g.console.Await(t, `attestation action=start_job reason="a round passed"`)
	for end := time.Now().Add(10 * time.Second); g.file("user_data/runs") != "run\nrun\n" && time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
	}
	g.stop <- "signal terminated"
	g.last(g.end(ended), `coffer: power off reason="signal terminated"`)
	if got := g.file("user_data/runs"); got != "run\nrun\n" {
		t.Errorf("the workload ran %q", got)
	}
}

func TestOrderlyStop(t *testing.T) {
	g := newGuest(t, `trap "echo bye; exit 0" TERM; echo ready; while :; do sleep 1 & wait $!; done`)
	ended := g.start()
	g.console.Await(t, "workload: ready")
	g.stop <- "power button"
	lines := g.end(ended)
	g.last(lines, `coffer: power off reason="power button"`)
	for _, want := range []string{"workload: bye", "workload exited code=0"} {
		if !strings.Contains(strings.Join(lines, "\n"), want) {
			t.Errorf("console lacks %q", want)
		}
	}
}

func TestBootFailures(t *testing.T) {
	type change func(*guest)
	for _, tc := range []struct {
		name   string
		change change
		last   string
	}{
		{"kernel file systems", func(g *guest) { g.deps.Mount = func() error { return errors.New("no cgroup2") } },
			`coffer: FAILED phase=system code=E_INTERNAL detail="no cgroup2"`},
		{"panic", func(g *guest) { g.deps.Mount = func() error { panic("oops") } },
			`coffer: FAILED phase=system code=E_INTERNAL detail="panic: oops"`},
		{"no handover", func(g *guest) { g.deps.Handover = func() ([]byte, error) { return nil, os.ErrNotExist } },
			`coffer: FAILED phase=handover code=E_CONFIG`},
		{"handover of another shape", func(g *guest) {
			g.deps.Handover = func() ([]byte, error) { return []byte(`{"config":{},"more":1}`), nil }
		}, `coffer: FAILED phase=handover code=E_CONFIG`},
		{"wrong platform", func(g *guest) {
			g.deps.Evidence = func(string, string) (evidence.Source, error) { return nil, evidence.ErrPlatform }
		}, `coffer: FAILED phase=handover code=E_EVIDENCE`},
		{"firewall", func(g *guest) { g.deps.Firewall = func(firewall.Rules) error { return errors.New("no nftables") } },
			`coffer: FAILED phase=ports code=E_FIREWALL`},
		{"drive", func(g *guest) {
			g.deps.Attach = func(_ context.Context, m drives.Mount) error {
				if m.Serial == "user_data" {
					return drives.ErrMissing
				}
				return nil
			}
		}, `coffer: FAILED phase=drives code=E_DRIVE`},
		{"containerd", func(*guest) {}, `coffer: FAILED phase=containerd code=E_CONTAINERD`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g := configured(t, "exit 0", workload.ImageSource{})
			tc.change(g)
			g.last(g.end(g.start()), tc.last)
		})
	}
}

func TestFirstRoundDenied(t *testing.T) {
	g := newGuest(t, `echo must not run`)
	g.cfg.Attestation.FailureAction = guestconfig.ActionLog
	g.kbs.verdicts = []error{errDenied}
	lines := g.end(g.start())
	g.last(lines, `coffer: FAILED phase=attest code=E_ATTESTATION`)
	if strings.Contains(strings.Join(lines, "\n"), "must not run") {
		t.Error("the workload ran")
	}
}

func TestStopWhileWaitingForTheKBS(t *testing.T) {
	g := newGuest(t, `echo must not run`)
	g.kbs.verdicts = []error{kbsclient.ErrUnreachable}
	ended := g.start()
	g.console.Await(t, "verdict=unknown")
	g.stop <- "power button"
	g.last(g.end(ended), `coffer: power off reason="power button"`)
}
