package kbs

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"coffer/internal/gpu"
	"coffer/internal/gpu/ocsp"
	"coffer/kbsclient"
	"coffer/test/gpusim"
)

// gpus is a guest's GPUs beside its sample evidence, as kbsclient asks them.
type gpus struct {
	attester
	devices []*gpusim.Device
	edit    func([]gpu.Evidence) []gpu.Evidence
}

func (g gpus) AdditionalEvidence(_ context.Context, digest [48]byte) (string, error) {
	var list []gpu.Evidence
	for _, d := range g.devices {
		list = append(list, d.Evidence(gpu.DeviceNonce(digest)))
	}
	if g.edit != nil {
		list = g.edit(list)
	}
	return gpu.MarshalEvidence(list)
}

// TestDevices releases a resource to evidence with verified GPUs only, over the
// wire and with the client of the guest.
func TestDevices(t *testing.T) {
	w := gpusim.NewWorld()
	one, two := w.NewDevice(gpu.Hopper), w.NewDevice(gpu.Hopper)
	two.Measurements = one.Measurements
	other := gpusim.NewWorld().NewDevice(gpu.Hopper)
	replayed := one.Evidence([32]byte{1})
	verifier := &gpu.Verifier{
		DeviceRoot: w.DeviceRoot.Cert, RIMRoot: w.RIMRoot.Cert, RIMs: w.NewRIMs(one),
		Policy: gpu.Policy{OCSP: gpu.OCSPOff}, Now: func() time.Time { return gpusim.Now },
	}
	if _, err := New(Options{Devices: verifier, SimulatedDevices: true}); err == nil || !strings.Contains(err.Error(), "--allow-simulated") {
		t.Errorf("simulated GPUs without permission: %v", err)
	}
	r := newRig(t, Options{Dialect: DialectH, AllowSimulated: true, Devices: verifier, SimulatedDevices: true})
	r.mustAdmin("POST", "/kbs/v0/resource/"+keyPath, []byte(secret))
	r.setPolicy(`package policy
import rego.v1
default allow = false
allow if {
	data["resource-path"] == ["keys", "root", "one"]
	device := input.submods.gpu0
	device["ear.status"] == "affirming"
	device["ear.veraison.annotated-evidence"].nvidia.measres == "success"
	device["ear.veraison.annotated-evidence"].nvidia["x-nvidia-gpu-driver-version"] == "570.124.06"
}
`)
	ca := must(os.ReadFile(filepath.Join(r.dir, caCertFile)))
	client, err := kbsclient.New(kbsclient.Config{URL: r.url, RootCAs: ca, Now: r.clock.now})
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range []struct {
		name    string
		gpus    kbsclient.Attester
		devices int    // in the token; -1: refused
		reason  string // in the log
		release bool
	}{
		{"no GPU", attester{}, 0, "", false},
		{"one", gpus{devices: []*gpusim.Device{one}}, 1, "", true},
		{"two", gpus{devices: []*gpusim.Device{one, two}}, 2, "", true},
		{"one twice", gpus{devices: []*gpusim.Device{one, one}}, -1, "device-duplicate", false},
		{"of another root", gpus{devices: []*gpusim.Device{other}}, -1, "chain-root", false},
		{"the second of another root", gpus{devices: []*gpusim.Device{one, other}}, -1, "chain-root", false},
		{"replayed", gpus{devices: []*gpusim.Device{one}, edit: func([]gpu.Evidence) []gpu.Evidence { return []gpu.Evidence{replayed} }}, -1, "report-nonce", false},
		{"a list of none", gpus{}, -1, "no list of 1 to 16", false},
	} {
		t.Run(m.name, func(t *testing.T) {
			s, err := client.Attest(t.Context(), m.gpus)
			if (err != nil) != (m.devices < 0) {
				t.Fatalf("attest: %v\n%s", err, r.log)
			}
			if err != nil {
				if !strings.Contains(r.log.String(), m.reason) {
					t.Errorf("the log does not say %q:\n%s", m.reason, r.log)
				}
				return
			}
			defer s.Close()
			_, payload, _ := strings.Cut(s.Token(), ".")
			payload, _, _ = strings.Cut(payload, ".")
			var claims struct {
				Submods map[string]struct {
					Evidence map[string]any `json:"ear.veraison.annotated-evidence"`
				}
			}
			b, err := base64.RawURLEncoding.DecodeString(payload)
			if err == nil {
				err = json.Unmarshal(b, &claims)
			}
			if err != nil || len(claims.Submods) != 1+m.devices || m.devices > 0 && claims.Submods["gpu0"].Evidence["simulated"] != true {
				t.Errorf("token %s: %v", b, err)
			}
			secretGot, err := s.Resource(t.Context(), keyPath)
			if (err == nil) != m.release || m.release && string(secretGot) != secret {
				t.Errorf("resource: %q, %v", secretGot, err)
			}
		})
	}
}

// TestDevicesWithoutAVerdict: while NVIDIA's services do not answer, guests are not
// refused: their agents would stop the workload.
func TestDevicesWithoutAVerdict(t *testing.T) {
	w := gpusim.NewWorld()
	d := w.NewDevice(gpu.Hopper)
	away := httptest.NewServer(nil)
	away.Close()
	verifier := &gpu.Verifier{
		DeviceRoot: w.DeviceRoot.Cert, RIMRoot: w.RIMRoot.Cert, RIMs: w.NewRIMs(d), Now: func() time.Time { return gpusim.Now },
		Policy: gpu.Policy{OCSP: gpu.OCSPRequire}, OCSP: &ocsp.Client{URL: away.URL, HTTP: away.Client(), Now: time.Now, Rand: rand.Reader},
	}
	r := newRig(t, Options{Dialect: DialectH, AllowSimulated: true, Devices: verifier, SimulatedDevices: true})
	ca := must(os.ReadFile(filepath.Join(r.dir, caCertFile)))
	client, err := kbsclient.New(kbsclient.Config{URL: r.url, RootCAs: ca, Now: r.clock.now})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Attest(t.Context(), gpus{devices: []*gpusim.Device{d}}); !errors.Is(err, kbsclient.ErrUnreachable) || errors.Is(err, kbsclient.ErrAttestationRefused) {
		t.Errorf("attest: %v\n%s", err, r.log)
	}
	r.reason("ocsp-unreachable")
}

// TestDevicesAreCovered: evidence of the CPU covers that of the GPUs.
func TestDevicesAreCovered(t *testing.T) {
	w := gpusim.NewWorld()
	d := w.NewDevice(gpu.Hopper)
	verifier := &gpu.Verifier{
		DeviceRoot: w.DeviceRoot.Cert, RIMRoot: w.RIMRoot.Cert, RIMs: w.NewRIMs(d),
		Policy: gpu.Policy{OCSP: gpu.OCSPOff}, Now: func() time.Time { return gpusim.Now },
	}
	r := newRig(t, Options{Dialect: DialectH, AllowSimulated: true, Devices: verifier, SimulatedDevices: true})
	g := r.guest(teeSample).auth()
	text, err := gpu.MarshalEvidence([]gpu.Evidence{d.Evidence(gpu.DeviceNonce(bound{nonce: g.nonce, key: g.jwk}.deviceDigest()))})
	if err != nil {
		t.Fatal(err)
	}
	if a := g.attest(g.attestBody(sampleEvidence(g.digest()), text)); a.status == 200 {
		t.Error("GPUs were added to evidence that does not know of them")
	}
	g = r.guest(teeSample).auth()
	text, err = gpu.MarshalEvidence([]gpu.Evidence{d.Evidence(gpu.DeviceNonce(bound{nonce: g.nonce, key: g.jwk}.deviceDigest()))})
	if err != nil {
		t.Fatal(err)
	}
	if a := g.attest(g.attestBody(sampleEvidence(bound{nonce: g.nonce, key: g.jwk, additional: text}.digest()), text)); a.status != 200 {
		t.Errorf("%d %s\n%s", a.status, a.body, r.log)
	}
}

// TestDevicesStayAwayFromT: what the guest's client sends this KBS is what it would
// send Trustee of that generation.
func TestDevicesStayAwayFromT(t *testing.T) {
	r := newRig(t, Options{Dialect: DialectT})
	client, err := kbsclient.New(kbsclient.Config{URL: r.url, RootCAs: must(os.ReadFile(filepath.Join(r.dir, caCertFile))), Now: r.clock.now})
	if err != nil {
		t.Fatal(err)
	}
	_, err = client.Attest(t.Context(), gpus{devices: []*gpusim.Device{gpusim.NewWorld().NewDevice(gpu.Hopper)}})
	if !errors.Is(err, kbsclient.ErrOldKBS) || strings.Contains(r.log.String(), "action=attest") {
		t.Errorf("%v\n%s", err, r.log)
	}
}
