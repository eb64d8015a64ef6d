package scenarios

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"coffer/agent/gpus"
	"coffer/internal/gpu"
	"coffer/internal/gpu/helper"
	"coffer/internal/gpu/ocsp"
	"coffer/internal/testenv"
	"coffer/test/dockersave"
	"coffer/test/gpusim"
	"coffer/test/harness"
)

// gpuLine is a line whose guests have made-up GPUs: gpu-helper and NVIDIA's library
// in the guest are real but for the library's end, which asks a driver here.
type gpuLine struct {
	*line
	world *gpusim.World
	kind  *gpusim.Device // all GPUs have its measurements
	rims  string
	vceks string // the host gives no certificate of its chip
	ocsp  string // answers about all devices that there may be
	all   []*gpusim.Device
}

// maxGPUs of a guest, and one more.
const maxGPUs = 9

func setupGPUs(t *testing.T) *gpuLine {
	t.Helper()
	l := &gpuLine{line: &line{}, world: gpusim.NewWorld(), rims: t.TempDir(), vceks: t.TempDir(), ocsp: t.TempDir()}
	l.kind = l.world.NewDevice(gpu.Hopper)
	for range maxGPUs {
		d := l.world.NewDevice(gpu.Hopper)
		d.Measurements = l.kind.Measurements
		l.all = append(l.all, d)
	}
	if err := l.world.NewRIMs(l.kind).Write(l.rims); err != nil {
		t.Fatal(err)
	}
	l.keepAnswers(t)
	env := newEnv(t)
	env.Base = l.buildBase(t, env)
	env.KBSFlags = []string{"--dialect", "H", "--gpu-rim-dir", l.rims, "--gpu-ocsp", "off",
		"--gpu-device-root", filepath.Join(env.Dir, "gpu/device-root.pem"), "--gpu-rim-root", filepath.Join(env.Dir, "gpu/rim-root.pem")}
	l.line = startKBS(t, env)
	vcek, err := os.ReadFile(filepath.Join(env.Dir, "chip/vcek.pem"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(vcek)
	write(t, filepath.Join(l.vceks, "one.der"), block.Bytes)
	return l
}

// keepAnswers asks a responder about every certificate, as a site with a network
// does for one without.
func (l *gpuLine) keepAnswers(t *testing.T) {
	t.Helper()
	responder := l.world.NewResponder(l.all...)
	responder.Now = time.Now()
	server := httptest.NewServer(responder)
	defer server.Close()
	v := &gpu.Verifier{
		DeviceRoot: l.world.DeviceRoot.Cert, RIMRoot: l.world.RIMRoot.Cert, RIMs: l.world.NewRIMs(l.kind), Now: time.Now,
		Policy: gpu.Policy{OCSP: gpu.OCSPAllowCached},
		OCSP:   &ocsp.Client{URL: server.URL, HTTP: server.Client(), Now: time.Now, Rand: rand.Reader, Cache: ocsp.Dir(l.ocsp), MaxAge: time.Hour},
	}
	for _, d := range l.all {
		nonce := [32]byte{1}
		if _, err := v.Verify(t.Context(), d.Evidence(nonce), nonce); err != nil {
			t.Fatal(err)
		}
	}
}

// buildBase makes a base whose guests find a fake libnvidia-ml.so.1 and glibc.
func (l *gpuLine) buildBase(t *testing.T, env *harness.Env) string {
	t.Helper()
	gcc := testenv.LookTool(t, "gcc")
	from, simulated := filepath.Join(env.Dir, "gpu"), env.Base
	lib := filepath.Join(from, "root/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1")
	for _, dir := range []string{filepath.Dir(lib), filepath.Join(from, "root/lib64"), filepath.Join(from, "root/lib/x86_64-linux-gnu")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command(gcc, "-Wall", "-Werror", "-O2", "-shared", "-fPIC", "-o", lib, "../fakenvml/fakenvml.c").CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	for _, name := range []string{"lib64/ld-linux-x86-64.so.2", "lib/x86_64-linux-gnu/libc.so.6"} {
		b, err := os.ReadFile("/" + name)
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(from, "root", name), b)
	}
	write(t, filepath.Join(from, "device-root.pem"), gpusim.PEM([]*gpusim.Authority{l.world.DeviceRoot}))
	write(t, filepath.Join(from, "rim-root.pem"), gpusim.PEM([]*gpusim.Authority{l.world.RIMRoot}))
	base := filepath.Join(env.Dir, "base")
	if _, err := env.Run(t.Context(), "hostbuild", "base", "build", "--platform", "simulated", "--programs", env.Bin, "--out", base,
		"--cache", filepath.Join(simulated, "../../cache"), "--locked", filepath.Join(simulated, "base.lock"), "--simulated-gpu", from); err != nil {
		t.Fatal(err)
	}
	return base
}

// counting is a workload that counts its starts in /vault.
const counting = `n=$(cat /vault/starts 2>/dev/null || echo 0); echo "workload: starts so far $n"; echo $((n + 1)) >/vault/starts; sync
while :; do sleep 1; done`

func (l *gpuLine) build(t *testing.T, name, settings string) *harness.Bundle {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), buildDeadline)
	defer cancel()
	busybox, err := os.ReadFile(testenv.LookTool(t, "busybox"))
	if err != nil {
		t.Fatal(err)
	}
	layer, err := dockersave.Layer(dockersave.Entry{Name: "bin/"}, dockersave.Entry{Name: "bin/sh", Mode: 0o755, Body: busybox})
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(l.env.Dir, "in-"+name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	image := dockersave.Image{Tag: "scenario:" + name, Entrypoint: []string{"/bin/sh", "-c", counting}, Layers: [][]byte{layer}}
	archive := filepath.Join(dir, "image.tar.gz")
	if err := image.SaveLegacy(archive); err != nil {
		t.Fatal(err)
	}
	yaml := filepath.Join(dir, "CONFIG.yaml")
	write(t, yaml, fmt.Appendf(nil, `root_drive_size: 1
docker_archive: %s
memory_mib: 1024
vceks: %s
cc_gpu_mechanism: nvidia_cc
cc_attestation:
  check_frequency: 2
  max_staleness: 600
gpu:
  rims: %s
%s`, archive, l.vceks, l.rims, settings))
	b, err := l.env.Build(ctx, l.settings, yaml)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Unpack(ctx, filepath.Join(l.env.Dir, "site-"+name)); err != nil {
		t.Fatal(err)
	}
	return b
}

// bootGPUs boots a bundle with n GPUs.
func (l *gpuLine) bootGPUs(t *testing.T, b *harness.Bundle, n int) (*guest, *gpusim.Driver) {
	t.Helper()
	driver := gpusim.NewDriver(l.all[:n]...)
	dir, err := os.MkdirTemp("", "") // t.TempDir can be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "s")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	go driver.Serve(listener)
	t.Cleanup(func() { listener.Close() })
	l.env.BootEnv = []string{"COFFER_SIM_GPUS=" + socket, "COFFER_SIM_NO_VCEK=yes"}
	return boot(t, b), driver
}

// TestGPUs (`make test-gpu`): what the bundle carries (manifests, OCSP answers, the
// CPU's certificate) is all that attestation needs, and the guest reaches nothing but the KBS. /vault opens to verified
// GPUs alone, and stays. Whatever a GPU or its driver does wrong ends the workload
// and the GPUs' leave within a round.
func TestGPUs(t *testing.T) {
	l := setupGPUs(t)
	required := l.build(t, "required", "  required: true\n  count: 1\n  ocsp: allow_cached\n  ocsp_answers: "+l.ocsp+"\n")
	any := l.build(t, "any", "  mode: local\n  ocsp: off\n") // many signatures, which take their time without hardware
	t.Run("Vault", func(t *testing.T) { l.vault(t, required) })
	judged := l.build(t, "judged", "  required: true\n  mode: trustee\n  ocsp: off\n") // by the KBS alone
	t.Run("VaultWithoutGPUs", func(t *testing.T) { l.refusedVault(t, judged) })
	old := l.all[0].NewReport([32]byte{9}).Sign(l.all[0].Chain[0].Key)
	for _, c := range []struct {
		name   string
		gpus   int
		reason string
		wrong  func(*gpusim.Driver)
	}{
		{"OneOfEightTurnsBad", 8, `GPU 5: .*vbios 3 \[measurement-mismatch\]`, func(d *gpusim.Driver) { d.Bad[5] = 3 }},
		{"NinthGPU", 8, `further: \d+; missing: none \[device-changed\]`, func(d *gpusim.Driver) { d.Devices = l.all[:9] }},
		{"OneOfTwoIsReplaced", 2, `further: \d+; missing: \d+ \[device-changed\]`, func(d *gpusim.Driver) { d.Devices = l.all[1:3] }},
		{"Lost", 2, `is lost|error of the fake NVML \(15\) \[nvml\]`, func(d *gpusim.Driver) { d.Returns['R'] = 15 }},
		{"WrongNonce", 1, `\[report-nonce\]`, func(d *gpusim.Driver) { d.Nonce = &[32]byte{2} }},
		{"Replayed", 1, `\[report-nonce\]`, func(d *gpusim.Driver) { d.Replay = old }},
		{"Crash", 1, `\[helper-crash\]`, func(d *gpusim.Driver) { d.Returns['R'] = gpusim.Crash }},
		{"Hang", 1, `\[helper-timeout\]`, func(d *gpusim.Driver) { d.Returns['R'] = gpusim.Hang }},
	} {
		t.Run(c.name, func(t *testing.T) { l.turnsBad(t, any, c.gpus, c.reason, c.wrong) })
	}
	nvlink := l.world.NewDevice(gpu.Hopper)
	nvlink.Measurements, nvlink.Mode = l.kind.Measurements, 1
	for _, c := range []struct {
		name  string
		gpus  int
		code  gpu.Code
		asked int // reports of GPUs
		set   func(*gpusim.Driver)
	}{
		{"CCOff", 1, gpu.CodeCCOff, 0, func(d *gpusim.Driver) { d.Settings.Feature = 0 }},
		{"DevTools", 1, gpu.CodeDevTools, 0, func(d *gpusim.Driver) { d.Settings.DevTools = 1 }},
		{"PPCIEWithoutSwitches", 2, gpu.CodePPCIE, 0, func(d *gpusim.Driver) { d.Settings.MultiGPU, d.Settings.Feature = gpu.MultiGPUPPCIE, 0 }},
		{"OneOfTwoIsOff", 2, helper.CodeNotStarted, 1, func(d *gpusim.Driver) { d.Absent[1] = 999 }}, // as the driver does with it
		{"TwoModes", 2, gpu.CodeMixed, 2, func(d *gpusim.Driver) { d.Devices = []*gpusim.Device{l.all[0], nvlink} }},
	} {
		t.Run(c.name, func(t *testing.T) { l.wrongMode(t, any, c.gpus, c.code, c.asked, c.set) })
	}
}

// wrongMode boots with GPUs that are set up otherwise than for production: they are
// refused with the code before a workload starts, and those whose settings tell are
// not asked for a report.
func (l *gpuLine) wrongMode(t *testing.T, b *harness.Bundle, n int, code gpu.Code, asked int, set func(*gpusim.Driver)) {
	g, driver := l.bootGPUs(t, b, n)
	driver.Edit(set)
	g.refused("attest", "E_ATTESTATION", "round 1 was negative")
	g.expect(`attestation round=1 verdict=negative.*\[` + string(code) + `\].*code=E_GPU`)
	if reports, ready := driver.Calls('R'), driver.Calls('w'); reports != asked || ready != 0 {
		t.Errorf("%d reports, want %d; ready was set %d times", reports, asked, ready)
	}
}

// turnsBad boots with good GPUs, has them do something wrong between two rounds, and
// expects the next to be negative.
func (l *gpuLine) turnsBad(t *testing.T, b *harness.Bundle, n int, reason string, wrong func(*gpusim.Driver)) {
	g, driver := l.bootGPUs(t, b, n)
	g.expect(fmt.Sprintf(`gpu: %d attested`, n))
	g.expect(`gpu: ready`)
	g.expect(`workload: starts so far`)
	g.expect(`attestation round=\d+ verdict=pass`)
	driver.Edit(func(d *gpusim.Driver) { wrong(d) })
	changed := len(g.Console.All())
	g.expect(`gpu: ready taken back`)
	g.expect(`attestation round=\d+ verdict=negative.*` + reason + `.*code=E_GPU`)
	g.expect(`workload exited code=137 signal=9`)
	g.off()
	l.recorded(t, b, n)
	passes := 0 // a round that was under way may still pass
	for _, line := range g.Console.All()[changed:] {
		if strings.Contains(line, "verdict=pass") {
			passes++
		}
	}
	if passes > 1 {
		t.Errorf("%d rounds passed after the change", passes)
	}
	driver.Edit(func(d *gpusim.Driver) {
		if d.Ready != 0 || !d.Failed {
			t.Errorf("ready is %d, taken back: %t", d.Ready, d.Failed)
		}
	})
}

// recorded expects the last round of attestation.jsonl to be negative, and a line
// before it with n GPUs that had all passed.
func (l *gpuLine) recorded(t *testing.T, b *harness.Bundle, n int) {
	t.Helper()
	out, err := l.env.Run(t.Context(), "hostbuild", "drive", "cat", b.File("applog.qcow2"), "/attestation.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	var code gpu.Code
	good := false
	for line := range strings.Lines(out) {
		var r struct {
			Verdict string
			GPU     gpus.Found
		}
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		passed := 0
		for i, d := range r.GPU.Devices {
			if d.Verdict == "pass" && d.Driver == l.kind.Driver && d.VBIOS == l.kind.VBIOS && d.Serial == l.all[i].Chain[0].Cert.SerialNumber.String() {
				passed++
			}
		}
		good = good || r.Verdict == "pass" && passed == n
		code = r.GPU.Code
	}
	if !good || code == "" {
		t.Errorf("attestation.jsonl: %d GPUs passed in a round: %t; code of the last %q:\n%s", n, good, code, out)
	}
}

// refusedVault has a GPU of another maker: the KBS gives the root's key, and for
// evidence with that GPU nothing.
func (l *gpuLine) refusedVault(t *testing.T, b *harness.Bundle) {
	g, driver := l.bootGPUs(t, b, 1)
	driver.Edit(func(d *gpusim.Driver) { d.Devices = []*gpusim.Device{gpusim.NewWorld().NewDevice(gpu.Hopper)} })
	seen := len(l.kbs.Log.All())
	g.refused("attest", "E_ATTESTATION", "round 1 was negative")
	var released []string
	judged := false
	for _, line := range l.kbs.Log.All()[seen:] {
		judged = judged || strings.Contains(line, "[chain-root]")
		if strings.Contains(line, "verdict=released") {
			released = append(released, line)
		}
	}
	if !judged {
		t.Errorf("the KBS says nothing of the GPU:\n%s", l.kbs.Log.Text())
	}
	if len(released) != 1 || !strings.Contains(released[0], "keys/root/"+b.ID) {
		t.Errorf("released: %q", released)
	}
	driver.Edit(func(d *gpusim.Driver) {
		if d.Ready != 0 {
			t.Error("the GPUs may work")
		}
	})
}

func (l *gpuLine) vault(t *testing.T, b *harness.Bundle) {
	g, driver := l.bootGPUs(t, b, 1)
	g.expect(`coffer: allowed ports in=none out=none`)
	g.expect(`coffer: the guest's own ports out=kbs:\S+,dns:[0-9.]+:53/udp\+tcp,dhcp:67/udp(?: |$)`) // and nobody else
	g.expect(`certificate of this chip from="host"`)                                                 // the bundle's, in the host's place
	g.expect(`gpu: 1 attested`)
	if n := driver.Calls('P'); n != 1 {
		t.Errorf("the GPU was initialised for good %d times", n)
	}
	g.expect(`gpu: /vault is open`)
	g.expect(`gpu: ready`)
	g.expect(`attestation round=1 verdict=pass`)
	g.expect(`workload: starts so far 0`)
	g.expect(`attestation round=[2-9] verdict=pass`)
	driver.Edit(func(d *gpusim.Driver) { d.Bad[0] = 21 })
	g.expect(`gpu: ready taken back`)
	g.expect(`attestation round=\d+ verdict=negative.*measurement-mismatch.*code=E_GPU`)
	g.expect(`workload exited code=137 signal=9`)
	g.off()
	driver.Edit(func(d *gpusim.Driver) {
		if d.Ready != 0 || !d.Failed {
			t.Errorf("ready is %d, taken back: %t", d.Ready, d.Failed)
		}
	})
	// The next boot has good GPUs again.
	g, _ = l.bootGPUs(t, b, 1)
	g.expect(`workload: starts so far 1`)
	g.Kill()
	if strings.Contains(l.kbs.Log.Text(), "panic") {
		t.Error("the KBS panicked")
	}
}
