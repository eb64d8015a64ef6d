package gpus_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"coffer/agent/gpus"
	"coffer/internal/gpu"
	"coffer/internal/gpu/helper"
	"coffer/internal/gpu/rim"
	"coffer/test/gpusim"
	"coffer/test/gpusim/gpusimtest"
)

func TestMain(m *testing.M) { os.Exit(gpusimtest.Main(m)) }

// guest is a guard over GPUs, by way of the real gpu-helper.
type guest struct {
	*gpus.Guard
	world    *gpusim.World
	driver   *gpusim.Driver
	verifier *gpu.Verifier
	lines    []string
	round    byte
	found    gpus.Found // by next
}

func newGuest(t *testing.T, n int) *guest {
	t.Helper()
	g := &guest{world: gpusim.NewWorld()}
	first := g.world.NewDevice(gpu.Hopper)
	devices := []*gpusim.Device{first}
	for len(devices) < n {
		d := g.world.NewDevice(gpu.Hopper)
		d.Measurements = first.Measurements
		devices = append(devices, d)
	}
	g.driver = gpusim.NewDriver(devices...)
	source := gpusimtest.Helper(t, g.driver)
	source.Timeout = func(string, int) time.Duration { return 20 * time.Second }
	g.verifier = &gpu.Verifier{
		DeviceRoot: g.world.DeviceRoot.Cert, RIMRoot: g.world.RIMRoot.Cert, RIMs: g.world.NewRIMs(first),
		Policy: gpu.Policy{OCSP: gpu.OCSPOff}, Now: func() time.Time { return gpusim.Now },
	}
	g.Guard = &gpus.Guard{Source: source, Judges: []gpus.Judge{g.verifier}, Printf: func(format string, a ...any) {
		g.lines = append(g.lines, fmt.Sprintf(format, a...))
	}}
	return g
}

// next makes a round with a fresh digest, and lets the GPUs work after a pass.
func (g *guest) next(ctx context.Context) (string, error) {
	g.round++
	text, found, err := g.Attest(ctx, [48]byte{g.round, 47: 1})
	g.found = found
	if err == nil {
		err = g.Accept(ctx)
	}
	return text, err
}

func (g *guest) serial(i int) string { return g.driver.Devices[i].Chain[0].Cert.SerialNumber.String() }

func (g *guest) ready() (ready uint32) {
	g.driver.Edit(func(d *gpusim.Driver) { ready = d.Ready })
	return ready
}

// TestRounds has 1, 2 and 8 GPUs: they work after the first pass; then one turns
// bad, which the very next round finds, and they never work again.
func TestRounds(t *testing.T) {
	for _, n := range []int{1, 2, 8} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			g := newGuest(t, n)
			for range 2 {
				if text, err := g.next(t.Context()); err != nil || text != "" || g.ready() != 1 {
					t.Fatalf("round %d: %q, %v, ready %d", g.round, text, err, g.ready())
				}
			}
			if g.driver.Calls('w') != 1 {
				t.Errorf("ready was set %d times", g.driver.Calls('w'))
			}
			g.driver.Edit(func(d *gpusim.Driver) { d.Bad[n-1] = 36 })
			_, err := g.next(t.Context())
			if gpu.CodeOf(err) != gpu.CodeMeasurement || !strings.Contains(err.Error(), fmt.Sprintf("GPU %d: ", n-1)) || g.ready() != 0 {
				t.Errorf("a bad GPU: %v, ready %d", err, g.ready())
			}
			for i, d := range g.found.Devices {
				want := gpus.Device{Serial: g.serial(i), Driver: "570.124.06", VBIOS: g.driver.Devices[i].VBIOS, Verdict: "pass"}
				if i == n-1 {
					want.Verdict, want.Code = "negative", gpu.CodeMeasurement
				}
				if d != want {
					t.Errorf("record of GPU %d: %+v, want %+v", i, d, want)
				}
			}
			if len(g.found.Devices) != n || g.found.Code != gpu.CodeMeasurement {
				t.Errorf("record: %+v", g.found)
			}
			g.driver.Edit(func(d *gpusim.Driver) { clear(d.Bad) })
			if _, err := g.next(t.Context()); gpu.CodeOf(err) != gpu.CodeMeasurement || !strings.Contains(err.Error(), "until the VM is restarted") || g.ready() != 0 {
				t.Errorf("after a bad GPU: %v, ready %d", err, g.ready())
			}
		})
	}
}

// TestFailures has what can happen to GPUs that work.
func TestFailures(t *testing.T) {
	for _, m := range []struct {
		name    string
		code    gpu.Code
		ready   uint32 // afterwards
		devices string // verdicts in the record
		do      func(*guest, *gpusim.Driver)
	}{
		{"nothing", "", 1, "pass", func(*guest, *gpusim.Driver) {}},
		{"GPU is lost", "nvml", 0, "", func(_ *guest, d *gpusim.Driver) { d.Returns['R'] = 15 }},
		{"helper crashes", "helper-crash", 0, "", func(_ *guest, d *gpusim.Driver) { d.Returns['C'] = gpusim.Crash }},
		{"wrong nonce", "report-nonce", 0, "negative", func(_ *guest, d *gpusim.Driver) { d.Nonce = &[32]byte{} }},
		{"a further GPU", "device-changed", 0, "pass negative", func(g *guest, d *gpusim.Driver) {
			further := g.world.NewDevice(gpu.Hopper)
			further.Measurements = d.Devices[0].Measurements
			d.Devices = append(d.Devices, further)
		}},
		{"a further GPU in another mode", "device-mixed", 0, "pass negative", func(g *guest, d *gpusim.Driver) {
			further := g.world.NewDevice(gpu.Hopper)
			further.Measurements, further.Mode = d.Devices[0].Measurements, 1
			d.Devices = append(d.Devices, further)
		}},
		{"a further GPU that is not started", "device-not-started", 0, "", func(g *guest, d *gpusim.Driver) {
			d.Devices, d.Absent[1] = append(d.Devices, g.world.NewDevice(gpu.Hopper)), 999
		}},
		{"another GPU in its place", "device-changed", 0, "negative", func(g *guest, d *gpusim.Driver) {
			other := g.world.NewDevice(gpu.Hopper)
			other.Measurements = d.Devices[0].Measurements
			d.Devices = []*gpusim.Device{other}
		}},
		{"GPUs are gone", "helper-answer", 0, "", func(_ *guest, d *gpusim.Driver) { d.Devices = nil }},
		{"not as many as there must be", "device-count", 0, "unjudged", func(g *guest, _ *gpusim.Driver) { g.Count = 2 }},
		{"DevTools", "settings-devtools", 0, "", func(_ *guest, d *gpusim.Driver) { d.Settings.DevTools = 1 }},
		{"CC off", "settings-cc-off", 0, "", func(_ *guest, d *gpusim.Driver) { d.Settings.Feature = 0 }},
		{"protected PCIe", "settings-ppcie", 0, "", func(_ *guest, d *gpusim.Driver) { d.Settings.MultiGPU, d.Settings.Feature = 1, 0 }},
		{"no RIM any more", "driver-rim-missing", 0, "negative", func(g *guest, _ *gpusim.Driver) { g.verifier.RIMs = gpusim.RIMs{} }},
		{"RIM service cannot be reached", "driver-rim-fetch", 1, "unknown", func(g *guest, _ *gpusim.Driver) {
			g.verifier.RIMs = rim.Service{URL: "http://127.0.0.1:1", Client: http.DefaultClient}
		}},
	} {
		t.Run(m.name, func(t *testing.T) {
			g := newGuest(t, 1)
			if _, err := g.next(t.Context()); err != nil || g.ready() != 1 {
				t.Fatal(err)
			}
			g.driver.Edit(func(d *gpusim.Driver) { m.do(g, d) })
			_, err := g.next(t.Context())
			if got := gpu.CodeOf(err); got != m.code || g.ready() != m.ready {
				t.Errorf("code %q, want %q; ready %d, want %d: %v", got, m.code, g.ready(), m.ready, err)
			}
			var verdicts []string
			for _, d := range g.found.Devices {
				verdicts = append(verdicts, d.Verdict)
			}
			if got := strings.Join(verdicts, " "); g.found.Code != m.code || got != m.devices {
				t.Errorf("record: code %q of GPUs %q, want %q of %q", g.found.Code, got, m.code, m.devices)
			}
		})
	}
}

// TestHang: the helper is killed at its limit, and the round fails.
func TestHang(t *testing.T) {
	g := newGuest(t, 1)
	if _, err := g.next(t.Context()); err != nil {
		t.Fatal(err)
	}
	g.Source.(*helper.Helper).Timeout = func(op string, _ int) time.Duration {
		if op == helper.OpCollect {
			return time.Second
		}
		return 20 * time.Second
	}
	g.driver.Edit(func(d *gpusim.Driver) { d.Returns['R'] = gpusim.Hang })
	if _, err := g.next(t.Context()); gpu.CodeOf(err) != "helper-timeout" || g.ready() != 0 {
		t.Errorf("%v, ready %d", err, g.ready())
	}
}

// TestNotReady: GPUs that fail at first are never let to work, and nothing is taken
// back that was not given.
func TestNotReady(t *testing.T) {
	g := newGuest(t, 1)
	if err := g.Accept(t.Context()); err == nil {
		t.Error("GPUs were let to work without a round")
	}
	g.driver.Edit(func(d *gpusim.Driver) { d.Bad[0] = 21 })
	if _, err := g.next(t.Context()); gpu.CodeOf(err) != gpu.CodeMeasurement {
		t.Error(err)
	}
	if err := g.Accept(t.Context()); err == nil || g.ready() != 0 || g.driver.Calls('w') != 0 {
		t.Errorf("%v, ready %d, set %d times", err, g.ready(), g.driver.Calls('w'))
	}
}

// TestSend: the KBS gets evidence over the handshake's nonce, also where it alone
// judges.
func TestSend(t *testing.T) {
	g := newGuest(t, 2)
	g.Send, g.Judges = true, nil
	text, found, err := g.Attest(t.Context(), [48]byte{7, 47: 1})
	if err != nil {
		t.Fatal(err)
	}
	if len(found.Devices) != 2 || found.Devices[1].Verdict != "unjudged" {
		t.Errorf("record: %+v", found)
	}
	devices, err := gpu.ParseEvidence(text)
	if err != nil {
		t.Fatal(err)
	}
	if results, err := g.verifier.VerifyAll(t.Context(), devices, [32]byte{7}); err != nil || len(results) != 2 {
		t.Error(err)
	}
}

// TestDisable is the failure action for what is no GPU's fault.
func TestDisable(t *testing.T) {
	g := newGuest(t, 1)
	if _, err := g.next(t.Context()); err != nil {
		t.Fatal(err)
	}
	g.Disable(t.Context(), fmt.Errorf("the KBS denies"))
	if _, err := g.next(t.Context()); err == nil || !strings.Contains(err.Error(), "the KBS denies") || g.ready() != 0 {
		t.Errorf("%v, ready %d", err, g.ready())
	}
}

// patient is a GPU that answers when it is told to.
type patient struct {
	gpus.Source
	device *gpusim.Device
	asked  chan byte // first byte of the nonce
	answer chan struct{}
	open   *atomic.Int32 // questions
}

func (p patient) Settings(context.Context) (gpu.Settings, error) {
	return gpu.Settings{CPU: gpu.CPUSEVSNP, Environment: gpu.EnvironmentOn, Feature: 1}, nil
}

func (p patient) Collect(ctx context.Context, nonce [32]byte) ([]gpu.Evidence, error) {
	defer p.open.Add(-1)
	if p.open.Add(1) > 1 {
		return nil, fmt.Errorf("question %d while another is under way", nonce[0])
	}
	p.asked <- nonce[0]
	for range 1000 {
		runtime.Gosched() // for others to come in
	}
	select {
	case <-p.answer:
		return []gpu.Evidence{p.device.Evidence(nonce)}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// TestRoundsGoFirst: a workload with many requests holds up a round by the one that
// is under way, which is not broken off when the workload hangs up.
func TestRoundsGoFirst(t *testing.T) {
	g := newGuest(t, 1)
	p := patient{g.Source, g.driver.Devices[0], make(chan byte), make(chan struct{}), new(atomic.Int32)}
	g.Source, g.Judges, g.Send = p, nil, true
	errs := make(chan error)
	answer := func() {
		select {
		case p.answer <- struct{}{}:
		case err := <-errs:
			t.Fatalf("ended without an answer: %v", err)
		}
	}
	request := func(ctx context.Context, n byte) {
		text, err := g.AttestForWorkload(ctx, [48]byte{n})
		if err == nil && text == "" {
			err = fmt.Errorf("request %d got no evidence", n)
		}
		errs <- err
	}
	ctx, hangUp := context.WithCancel(t.Context())
	go request(ctx, 1)
	<-p.asked
	for n := range byte(5) {
		go request(t.Context(), 10+n)
	}
	go func() {
		_, _, err := g.Attest(t.Context(), [48]byte{2})
		errs <- err
	}()
	for !g.RoundWaits() {
		select {
		case err := <-errs:
			t.Fatal(err)
		default:
			runtime.Gosched()
		}
	}
	hangUp()
	answer()
	if n := <-p.asked; n != 2 {
		t.Errorf("request %d comes before the round", n)
	}
	for ended := 0; ended < 7; {
		select {
		case p.answer <- struct{}{}:
		case <-p.asked:
		case err := <-errs:
			if ended++; err != nil {
				t.Error(err)
			}
		}
	}
	go request(ctx, 1) // nobody waits for it
	if err := <-errs; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
