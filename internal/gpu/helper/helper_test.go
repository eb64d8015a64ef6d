package helper_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"coffer/internal/gpu"
	"coffer/internal/gpu/helper"
	"coffer/test/gpusim"
	"coffer/test/gpusim/gpusimtest"
)

func TestMain(m *testing.M) { os.Exit(gpusimtest.Main(m)) }

// TestRound goes through what an agent does: settings, evidence of all GPUs over a
// fresh nonce, verification, ready.
func TestRound(t *testing.T) {
	w := gpusim.NewWorld()
	one := w.NewDevice(gpu.Hopper)
	var devices []*gpusim.Device
	for range 8 {
		d := w.NewDevice(gpu.Hopper)
		d.Measurements = one.Measurements
		devices = append(devices, d)
	}
	driver := gpusim.NewDriver(devices...)
	h := gpusimtest.Helper(t, driver)
	v := &gpu.Verifier{
		DeviceRoot: w.DeviceRoot.Cert, RIMRoot: w.RIMRoot.Cert, RIMs: w.NewRIMs(one),
		Policy: gpu.Policy{OCSP: gpu.OCSPOff, Count: 8}, Now: func() time.Time { return gpusim.Now },
	}
	settings, err := h.Settings(t.Context())
	if err != nil || settings != driver.Settings {
		t.Fatalf("settings %+v, %v", settings, err)
	}
	list, err := h.Devices(t.Context())
	if err != nil || len(list) != 8 || list[7].Arch != gpu.Hopper || list[7].Driver != one.Driver || list[7].VBIOS != one.VBIOS || list[7].UUID == list[6].UUID {
		t.Fatalf("devices %+v, %v", list, err)
	}
	if err := h.KeepInitialised(t.Context()); err != nil || driver.Calls('P') != 8 {
		t.Errorf("persistence of %d GPUs: %v", driver.Calls('P'), err)
	}
	for i := range byte(2) {
		nonce := [32]byte{i, 7}
		evidence, err := h.Collect(t.Context(), nonce)
		if err != nil {
			t.Fatal(err)
		}
		results, err := v.VerifyAll(t.Context(), evidence, nonce)
		if err != nil || len(results) != 8 {
			t.Fatalf("round %d: %v", i, err)
		}
	}
	for _, ready := range []bool{true, false} {
		if err := h.SetReady(t.Context(), ready); err != nil {
			t.Fatal(err)
		}
		if got, err := h.Ready(t.Context()); err != nil || got != ready {
			t.Errorf("ready is %t, want %t: %v", got, ready, err)
		}
	}
	var p *helper.Problem
	if err := h.SetReady(t.Context(), true); !errors.As(err, &p) || p.Return != 2 || gpu.CodeOf(err) != helper.CodeNVML {
		t.Errorf("ready came again after it was taken back: %v", err)
	}
}

// TestBad has what a driver, a library or the program can do wrong.
func TestBad(t *testing.T) {
	w := gpusim.NewWorld()
	d := w.NewDevice(gpu.Hopper)
	nonce := [32]byte{1}
	old := d.NewReport([32]byte{9}).Sign(d.Chain[0].Key)
	for _, m := range []struct {
		name string
		code gpu.Code
		want string // part of the error
		do   func(*gpusim.Driver, *helper.Helper)
	}{
		{"good", "", "", func(*gpusim.Driver, *helper.Helper) {}},
		{"driver not loaded", "nvml", "nvmlInit", func(d *gpusim.Driver, _ *helper.Helper) { d.Returns['I'] = 9 }},
		{"GPU is lost", "nvml", "nvmlDeviceGetConfComputeGpuAttestationReport of GPU 0", func(d *gpusim.Driver, _ *helper.Helper) { d.Returns['R'] = 15 }},
		{"not supported", "nvml", "GpuCertificate of GPU 0", func(d *gpusim.Driver, _ *helper.Helper) { d.Returns['C'] = 3 }},
		{"count fails", "nvml", "nvmlDeviceGetCount", func(d *gpusim.Driver, _ *helper.Helper) { d.Returns['N'] = 999 }},
		{"library crashes", "helper-crash", "SIGABRT", func(d *gpusim.Driver, _ *helper.Helper) { d.Returns['R'] = gpusim.Crash }},
		{"library hangs", "helper-timeout", "in time", func(d *gpusim.Driver, h *helper.Helper) {
			d.Returns['R'] = gpusim.Hang
			h.Timeout = func(string, int) time.Duration { return 500 * time.Millisecond }
		}},
		{"library is not there", "nvml", "nvmlInit", func(_ *gpusim.Driver, h *helper.Helper) { h.Library = "/does/not/exist" }},
		{"library path is not absolute", "helper-crash", "not an absolute path", func(_ *gpusim.Driver, h *helper.Helper) { h.Library = "libnvidia-ml.so.1" }},
		{"program is not there", "helper-start", "no such file", func(_ *gpusim.Driver, h *helper.Helper) { h.Path = "/does/not/exist" }},
		{"program says nothing", "helper-answer", "not one line", func(_ *gpusim.Driver, h *helper.Helper) { h.Path = "/bin/true" }},
		{"program fails", "helper-crash", "exit status 1", func(_ *gpusim.Driver, h *helper.Helper) { h.Path = "/bin/false" }},
		{"report too large for its buffer", "nvml", "do not fit", func(d *gpusim.Driver, _ *helper.Helper) { d.Size = 9000 }},
		{"report cut", "report-format", "malformed", func(d *gpusim.Driver, _ *helper.Helper) { d.Size = 100 }},
		{"report too long", "report-format", "follow the signature", func(d *gpusim.Driver, _ *helper.Helper) { d.Size = 8000 }},
		{"wrong nonce", "report-nonce", "nonce", func(d *gpusim.Driver, _ *helper.Helper) { d.Nonce = &[32]byte{2} }},
		{"replayed report", "report-nonce", "nonce", func(d *gpusim.Driver, _ *helper.Helper) { d.Replay = old }},
		{"measurement at 21", "measurement-mismatch", "driver 21", func(d *gpusim.Driver, _ *helper.Helper) { d.Bad[0] = 21 }},
		{"second GPU appears", "device-count", "2 GPUs", func(d *gpusim.Driver, _ *helper.Helper) { d.Devices = append(d.Devices, w.NewDevice(gpu.Hopper)) }},
		{"second GPU is not started", "device-not-started", "nvmlDeviceGetHandleByIndex of GPU 1", func(d *gpusim.Driver, _ *helper.Helper) {
			d.Devices, d.Absent[1] = append(d.Devices, w.NewDevice(gpu.Hopper)), 999
		}},
		{"second GPU is lost", "nvml", "nvmlDeviceGetHandleByIndex of GPU 1", func(d *gpusim.Driver, _ *helper.Helper) {
			d.Devices, d.Absent[1] = append(d.Devices, w.NewDevice(gpu.Hopper)), 15
		}},
		{"no GPU", "helper-answer", "none to it", func(d *gpusim.Driver, _ *helper.Helper) { d.Devices = nil }},
	} {
		t.Run(m.name, func(t *testing.T) {
			driver := gpusim.NewDriver(d)
			h := gpusimtest.Helper(t, driver)
			driver.Edit(func(d *gpusim.Driver) { m.do(d, h) })
			v := &gpu.Verifier{
				DeviceRoot: w.DeviceRoot.Cert, RIMRoot: w.RIMRoot.Cert, RIMs: w.NewRIMs(d),
				Policy: gpu.Policy{OCSP: gpu.OCSPOff, Count: 1}, Now: func() time.Time { return gpusim.Now },
			}
			evidence, err := h.Collect(t.Context(), nonce)
			if err == nil {
				_, err = v.VerifyAll(t.Context(), evidence, nonce)
			}
			if got := gpu.CodeOf(err); got != m.code || err != nil && !strings.Contains(err.Error(), m.want) {
				t.Errorf("code %q, want %q and %q: %v", got, m.code, m.want, err)
			}
		})
	}
}

// TestOldLibrary has a library that lacks what newer ones have: a call of a symbol
// that is not there would end the process.
func TestOldLibrary(t *testing.T) {
	driver := gpusim.NewDriver(gpusim.NewWorld().NewDevice(gpu.Hopper))
	h := gpusimtest.Helper(t, driver)
	h.Library = gpusimtest.OldLibrary(t)
	if s, err := h.Settings(t.Context()); err != nil || s != driver.Settings {
		t.Errorf("settings %+v, %v", s, err)
	}
	var p *helper.Problem
	if err := h.SetReady(t.Context(), true); !errors.As(err, &p) || p.Call != "nvmlSystemSetConfComputeGpusReadyState" || !strings.Contains(err.Error(), "lacks it") {
		t.Errorf("set_ready: %v", err)
	}
}

// TestEnvironment: what decides which library is spoken to does not come from ours.
func TestEnvironment(t *testing.T) {
	t.Setenv("LD_BIND_NOW", "1") // would end the program at its start
	t.Setenv("LD_PRELOAD", "/does/not/exist")
	h := gpusimtest.Helper(t, gpusim.NewDriver(gpusim.NewWorld().NewDevice(gpu.Hopper)))
	if _, err := h.Devices(t.Context()); err != nil {
		t.Error(err)
	}
	h.Env = append(h.Env, "LD_BIND_NOW=1")
	if _, err := h.Devices(t.Context()); gpu.CodeOf(err) != helper.CodeCrash {
		t.Errorf("with LD_BIND_NOW: %v", err)
	}
}

// TestOutput bounds what the program writes, and ends what it leaves behind.
func TestOutput(t *testing.T) {
	for name, m := range map[string]struct {
		script string
		code   gpu.Code
	}{
		"endless":           {"while :; do echo aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa; done", helper.CodeTimeout},
		"too much":          {"head -c 1000000 /dev/zero", helper.CodeAnswer},
		"no JSON":           {"echo hello", helper.CodeAnswer},
		"two lines":         {"echo '{\"done\":true}'; echo", helper.CodeAnswer},
		"two objects":       {"echo '{\"done\":true}{}'", helper.CodeAnswer},
		"another's answer":  {"echo '{\"ready\":true}'", helper.CodeAnswer},
		"a process is left": {"sleep 1000 & echo '{\"done\":true}'; sleep 1000", helper.CodeTimeout},
		"good":              {"echo '{\"done\":true}'", ""},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "helper")
			if err := os.WriteFile(path, []byte("#!/bin/sh\nPATH=/usr/bin:/bin\n"+m.script+"\n"), 0o700); err != nil {
				t.Fatal(err)
			}
			h := &helper.Helper{Path: path, Library: "/x", Timeout: func(string, int) time.Duration { return time.Second }}
			if m.code != helper.CodeTimeout {
				h.Timeout = nil
			}
			if err := h.SetReady(context.Background(), true); gpu.CodeOf(err) != m.code {
				t.Errorf("code %q, want %q: %v", gpu.CodeOf(err), m.code, err)
			}
		})
	}
}

func TestDefaultTimeout(t *testing.T) {
	for _, m := range []struct {
		op   string
		n    int
		want time.Duration
	}{{helper.OpCollect, 1, 21 * time.Second}, {helper.OpCollect, 8, 63 * time.Second}, {helper.OpPersistence, 8, 63 * time.Second}, {helper.OpReady, 8, 15 * time.Second}} {
		if got := helper.DefaultTimeout(m.op, m.n); got != m.want {
			t.Errorf("%s of %d: %s, want %s", m.op, m.n, got, m.want)
		}
	}
}

func BenchmarkCollect8(b *testing.B) {
	w := gpusim.NewWorld()
	var devices []*gpusim.Device
	for range 8 {
		devices = append(devices, w.NewDevice(gpu.Hopper))
	}
	h := gpusimtest.Helper(b, gpusim.NewDriver(devices...))
	for b.Loop() {
		if _, err := h.Collect(context.Background(), [32]byte{}); err != nil {
			b.Fatal(err)
		}
	}
	var children syscall.Rusage // the largest of them
	if err := syscall.Getrusage(syscall.RUSAGE_CHILDREN, &children); err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(children.Maxrss)/1024, "RSS-MiB")
}
