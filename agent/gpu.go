package agent

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/pkg/oci"

	"coffer/agent/gpus"
	"coffer/agent/vault"
	"coffer/internal/gpu"
	"coffer/internal/gpu/certs"
	"coffer/internal/gpu/helper"
	"coffer/internal/gpu/nras"
	"coffer/internal/gpu/ocsp"
	"coffer/internal/gpu/rim"
	"coffer/internal/guestconfig"
)

const (
	gpuServiceTime = 20 * time.Second // an answer of a RIM or OCSP service
	rimTTL         = 24 * time.Hour
)

// newGPUs makes the guard of the guest's GPUs out of the verity root's files. run
// is a tmpfs.
func newGPUs(c *guestconfig.GPU, run string, printf func(string, ...any)) (*gpus.Guard, error) {
	program := &helper.Helper{Path: guestconfig.GPUHelperPath, Library: guestconfig.NVMLPath, Count: c.Count}
	policy := gpu.Policy{
		Drivers: c.Drivers, VBIOSes: c.VBIOSes, OCSP: gpu.OCSP(c.OCSP), AllowHold: c.AllowHold, AllowExpiredRIM: c.AllowExpiredRIM, Count: c.Count,
	}
	g := &gpus.Guard{Source: program, Policy: policy, Count: c.Count, Send: c.Trustee(), Printf: printf}
	client := &http.Client{Timeout: gpuServiceTime}
	if c.Local() {
		v, err := newVerifier(c, policy, run, client)
		if err != nil {
			return nil, err
		}
		g.Judges = append(g.Judges, v)
	}
	if c.NRAS() {
		g.Judges = append(g.Judges, &nras.Client{URL: cmp.Or(c.NRASURL, nras.URL), AllowHold: c.AllowHold, HTTP: client, Now: time.Now})
	}
	return g, nil
}

func newVerifier(c *guestconfig.GPU, policy gpu.Policy, run string, client *http.Client) (*gpu.Verifier, error) {
	v := &gpu.Verifier{
		Policy: policy, Now: time.Now,
		OCSP: &ocsp.Client{URL: ocsp.URL, HTTP: client, Now: time.Now, Rand: rand.Reader, MaxAge: time.Duration(c.OCSPMaxAge) * time.Second},
	}
	var err error
	if v.DeviceRoot, err = gpuRoot(c.DeviceRoot, certs.DeviceRoot); err != nil {
		return nil, err
	}
	if v.RIMRoot, err = gpuRoot(c.RIMRoot, certs.RIMRoot); err != nil {
		return nil, err
	}
	pins := c.RIMs
	if pins == nil {
		pins = []string{} // a file that is not pinned is not used
	}
	v.RIMs = rim.Dir{Path: guestconfig.GPURIMPath, Pins: pins}
	if c.RIMService != "" {
		service := &rim.Cache{Source: rim.Service{URL: c.RIMService, Client: client}, TTL: rimTTL, Now: time.Now}
		v.RIMs = rim.First{v.RIMs, service}
	}
	if policy.OCSP == gpu.OCSPAllowCached {
		kept := filepath.Join(run, "coffer", "ocsp")
		if err := os.CopyFS(kept, os.DirFS(guestconfig.GPUOCSPPath)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("OCSP answers of the bundle: %w", err)
		}
		if err := os.MkdirAll(kept, 0o700); err != nil {
			return nil, err
		}
		v.OCSP.Cache = ocsp.Dir(kept)
	}
	return v, nil
}

func gpuRoot(text string, builtIn func() *x509.Certificate) (*x509.Certificate, error) {
	if text == "" {
		return builtIn(), nil
	}
	list, err := certs.ParsePEM([]byte(text))
	if err == nil && len(list) != 1 {
		err = fmt.Errorf("%d certificates, want one", len(list))
	}
	if err != nil {
		return nil, fmt.Errorf("root of simulated GPUs: %w", err)
	}
	return list[0], nil
}

// gpuTime is what the GPUs may add to a round's time: n of them, 0 for as many as
// there can be.
func gpuTime(n int) time.Duration {
	if n == 0 {
		n = gpu.MaxDevices
	}
	return helper.DefaultTimeout(helper.OpCollect, n)
}

// gpuDevices makes the GPUs ready to be asked.
func (a *agent) gpuDevices(ctx context.Context) error {
	if err := a.NVIDIA.MakeNodes(); err != nil {
		return err
	}
	a.verifier.gpus.Prepare(ctx)
	return nil
}

// gpuAccess gives the container GPUs where the guest has any.
func (a *agent) gpuAccess() oci.SpecOpts {
	if a.verifier.gpus == nil {
		return nil
	}
	return a.NVIDIA.Inject
}

// disableGPUs is the failure action of that name.
func (a *agent) disableGPUs(ctx context.Context, why error) {
	if a.verifier.gpus != nil {
		a.verifier.gpus.Disable(ctx, why)
	}
}

// openVault opens /vault with the key that the KBS gives to evidence with verified
// GPUs. There is nothing in its place before.
func (a *agent) openVault(text []byte) error {
	key, err := vault.Key(text)
	if err != nil {
		return err
	}
	defer clear(key)
	if err := a.OpenVault(a.vault(), key); err != nil {
		return err
	}
	a.log.Printf("gpu: /vault is open")
	return nil
}

// AdditionalEvidence is that of the GPUs, where the guest has any.
func (a attester) AdditionalEvidence(ctx context.Context, digest [48]byte) (string, error) {
	if a.gpus == nil {
		return "", nil
	}
	if a.found == nil {
		return a.gpus.AttestForWorkload(ctx, digest)
	}
	text, found, err := a.gpus.Attest(ctx, digest)
	*a.found = found
	return text, err
}
