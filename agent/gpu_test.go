package agent

import (
	"cmp"
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"coffer/agent/attest"
	"coffer/agent/gpus"
	"coffer/internal/firewall"
	"coffer/internal/gpu"
	"coffer/internal/gpu/helper"
	"coffer/internal/guestconfig"
	"coffer/kbsclient"
	"coffer/test/gpusim"
)

// device is one GPU without gpu-helper.
type device struct {
	*gpusim.Device
	lost  bool
	ready []bool // as it was set
}

func (d *device) Settings(context.Context) (gpu.Settings, error) {
	return gpu.Settings{CPU: gpu.CPUSEVSNP, Environment: gpu.EnvironmentOn, Feature: 1}, nil
}

func (d *device) Collect(_ context.Context, nonce [32]byte) ([]gpu.Evidence, error) {
	if d.lost {
		return nil, &gpu.Error{Code: "nvml", Err: errors.New("GPU is lost")}
	}
	return []gpu.Evidence{d.Evidence(nonce)}, nil
}

func (d *device) SetReady(_ context.Context, ready bool) error {
	d.ready = append(d.ready, ready)
	return nil
}

func (d *device) KeepInitialised(context.Context) error { return nil }

// TestGPURound: the KBS's answer alone lets the GPUs work, a GPU that fails ends
// that, and the CPU's evidence is asked for after theirs.
func TestGPURound(t *testing.T) {
	w := gpusim.NewWorld()
	d := &device{Device: w.NewDevice(gpu.Hopper)}
	var denied error
	k := &countingKBS{f: func(_ int, a kbsclient.Attester) error {
		text, err := a.(kbsclient.DeviceAttester).AdditionalEvidence(context.Background(), [48]byte{1})
		if err != nil {
			return err
		}
		if devices, err := gpu.ParseEvidence(text); err != nil || len(devices) != 1 {
			t.Errorf("evidence %q: %v", text, err)
		}
		return denied
	}}
	addrs := []netip.Addr{netip.MustParseAddr("192.0.2.1")}
	var rules []firewall.Rules
	v := &verifier{kbs: k, net: testNetwork(t, "https://kbs", &addrs, &rules), source: &source{}, canary: "a/b/c",
		gpus: &gpus.Guard{Source: d, Send: true, Printf: t.Logf}}
	denied = kbsError("PolicyDeny")
	if err := v.round(t.Context()); !errors.Is(err, kbsclient.ErrPolicyDenied) || len(d.ready) != 0 {
		t.Errorf("denied: %v, ready set %v", err, d.ready)
	}
	denied = nil
	if err := v.round(t.Context()); err != nil || len(d.ready) != 1 || !d.ready[0] {
		t.Errorf("passed: %v, ready set %v", err, d.ready)
	}
	if f := v.found; len(f.Devices) != 1 || f.Devices[0].Serial == "" || f.Devices[0].Driver != d.Driver || f.Code != "" {
		t.Errorf("record: %+v", f)
	}
	d.lost = true
	if err := v.round(t.Context()); gpu.CodeOf(err) != "nvml" || len(d.ready) != 2 || d.ready[1] {
		t.Errorf("lost: %v, ready set %v", err, d.ready)
	}
	if f := v.found; len(f.Devices) != 0 || f.Code != "nvml" {
		t.Errorf("record: %+v", f)
	}
	// A guest without GPUs sends none.
	if text, err := (attester{Source: &source{}}).AdditionalEvidence(t.Context(), [48]byte{}); text != "" || err != nil {
		t.Errorf("without GPUs: %q, %v", text, err)
	}
}

// vaultKBS has resources, which are for evidence with GPUs where it says so.
type vaultKBS struct {
	asked []string
	err   map[string]error
}

func (k *vaultKBS) Fetch(ctx context.Context, a kbsclient.Attester, path string) ([]byte, string, error) {
	k.asked = append(k.asked, path)
	text, err := a.(kbsclient.DeviceAttester).AdditionalEvidence(ctx, [48]byte{byte(len(k.asked))})
	if err == nil && text == "" {
		err = errors.New("no evidence of GPUs")
	}
	return []byte("the key of " + path), "", errors.Join(err, k.err[path])
}

func (k *vaultKBS) LastAnswer() kbsclient.Answered { return kbsclient.Answered{} }

// TestVaultKey: /vault is opened once, after a round that passed and before the
// GPUs may work; what the KBS says of its key is the round's verdict.
func TestVaultKey(t *testing.T) {
	w := gpusim.NewWorld()
	d := &device{Device: w.NewDevice(gpu.Hopper)}
	k := &vaultKBS{err: map[string]error{"a/b/c": kbsError("PolicyDeny")}}
	addrs := []netip.Addr{netip.MustParseAddr("192.0.2.1")}
	var rules []firewall.Rules
	var opened []string
	var fails error
	v := &verifier{kbs: k, net: testNetwork(t, "https://kbs", &addrs, &rules), source: &source{}, canary: "a/b/c", vaultKey: "keys/vault/one",
		gpus: &gpus.Guard{Source: d, Send: true, Printf: t.Logf},
		release: func(key []byte) error {
			if len(d.ready) > 0 {
				t.Error("the GPUs may work before /vault is open")
			}
			opened = append(opened, string(key))
			return fails
		}}
	round := func(want error, fetched string) {
		t.Helper()
		k.asked = nil
		if err := v.round(t.Context()); !errors.Is(err, want) || strings.Join(k.asked, " ") != fetched {
			t.Errorf("round: %v, asked for %q; want %v, %q", err, k.asked, want, fetched)
		}
	}
	round(kbsclient.ErrPolicyDenied, "a/b/c")
	k.err = map[string]error{"keys/vault/one": kbsError("PolicyDeny")}
	round(kbsclient.ErrPolicyDenied, "a/b/c keys/vault/one")
	if len(opened) != 0 || len(d.ready) != 0 {
		t.Errorf("opened %q, ready %v", opened, d.ready)
	}
	k.err, fails = nil, errors.New("another key")
	round(errVault, "a/b/c keys/vault/one")
	if verdict, code, _ := classify(errVault); verdict != attest.Negative || code != "E_VAULT" {
		t.Errorf("a key that does not open it: %v %s", verdict, code)
	}
	fails = nil
	round(nil, "a/b/c keys/vault/one")
	round(nil, "a/b/c")
	if len(opened) != 2 || opened[1] != "the key of keys/vault/one" || len(d.ready) != 1 || !d.ready[0] {
		t.Errorf("opened %q, ready %v", opened, d.ready)
	}
}

// TestGPUTime: no phase and no round ends before gpu-helper's own limit, which
// grows with the GPUs.
func TestGPUTime(t *testing.T) {
	for _, p := range (&agent{}).phases() {
		if limit := helper.DefaultTimeout(helper.OpPersistence, gpu.MaxDevices); p.Name == "gpu" && p.Deadline <= limit {
			t.Errorf("phase gpu has %s, gpu-helper %s", p.Deadline, limit)
		}
	}
	for _, n := range []int{0, 1, 8, gpu.MaxDevices} {
		a := &agent{cfg: &guestconfig.Config{GPU: &guestconfig.GPU{Count: n}}}
		if limit := helper.DefaultTimeout(helper.OpCollect, cmp.Or(n, gpu.MaxDevices)); a.roundTime() != roundTime+limit {
			t.Errorf("a round of %d GPUs has %s, gpu-helper %s", n, a.roundTime(), limit)
		}
	}
}

// TestNewGPUs makes guards as the guest config asks.
func TestNewGPUs(t *testing.T) {
	pem := string(gpusim.PEM([]*gpusim.Authority{gpusim.NewRoot("x")}))
	for _, m := range []struct {
		name   string
		cfg    guestconfig.GPU
		judges int
		send   bool
		bad    bool
	}{
		{"local", guestconfig.GPU{Mode: guestconfig.GPULocal, OCSP: "require"}, 1, false, false},
		{"trustee", guestconfig.GPU{Mode: guestconfig.GPUTrustee, OCSP: "off"}, 0, true, false},
		{"NRAS", guestconfig.GPU{Mode: guestconfig.GPUNRAS, OCSP: "off"}, 1, false, false},
		{"local and NRAS", guestconfig.GPU{Mode: guestconfig.GPULocalNRAS, OCSP: "off"}, 2, false, false},
		{"both", guestconfig.GPU{Mode: guestconfig.GPULocalTrustee, OCSP: "off"}, 1, true, false},
		{"cached", guestconfig.GPU{Mode: guestconfig.GPULocal, OCSP: "allow_cached", OCSPMaxAge: 60}, 1, false, false},
		{"roots", guestconfig.GPU{Mode: guestconfig.GPULocal, OCSP: "off", DeviceRoot: pem, RIMRoot: pem}, 1, false, false},
		{"no root", guestconfig.GPU{Mode: guestconfig.GPULocal, OCSP: "off", DeviceRoot: "x"}, 0, false, true},
		{"two roots", guestconfig.GPU{Mode: guestconfig.GPULocal, OCSP: "off", RIMRoot: pem + pem}, 0, false, true},
	} {
		t.Run(m.name, func(t *testing.T) {
			run := t.TempDir()
			g, err := newGPUs(&m.cfg, run, t.Logf)
			if (err != nil) != m.bad {
				t.Fatal(err)
			}
			if err != nil {
				return
			}
			if len(g.Judges) != m.judges || g.Send != m.send {
				t.Errorf("%d judges, send %t", len(g.Judges), g.Send)
			}
			_, err = os.Stat(filepath.Join(run, "coffer", "ocsp"))
			if (err == nil) != (m.cfg.OCSP == "allow_cached") {
				t.Errorf("folder of kept answers: %v", err)
			}
		})
	}
}
