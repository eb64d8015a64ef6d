package cli

import (
	"crypto/rand"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/pflag"

	"coffer/hostbuild/kbs"
	"coffer/internal/gpu"
	"coffer/internal/gpu/certs"
	"coffer/internal/gpu/ocsp"
	gpurim "coffer/internal/gpu/rim"
)

// kbsGPUs is what of `hostbuild kbs serve` is about GPUs.
type kbsGPUs struct {
	rimDir, ocsp, deviceRoot, rimRoot string
	fetch, allowExpired               bool
	drivers                           []string
}

func (g *kbsGPUs) flags(f *pflag.FlagSet) {
	f.StringVar(&g.rimDir, "gpu-rim-dir", "", "folder of RIMs (hostbuild rim fetch): accept evidence of GPUs beside the CPU's (dialect H)")
	f.BoolVar(&g.fetch, "gpu-rim-fetch", false, "ask NVIDIA's service for RIMs that the folder lacks, and anew each day")
	f.BoolVar(&g.allowExpired, "gpu-allow-expired-rim", false, "accept RIMs that lie in the folder now, after their signature has expired")
	f.StringVar(&g.ocsp, "gpu-ocsp", string(gpu.OCSPAllowCached), "revocation of GPUs: require asks each time, allow_cached once in a day, off")
	f.StringSliceVar(&g.drivers, "gpu-driver", nil, "accept these driver versions alone")
	f.StringVar(&g.deviceRoot, "gpu-device-root", "", "PEM of simulated GPUs' root; needs --allow-simulated")
	f.StringVar(&g.rimRoot, "gpu-rim-root", "", "PEM of the root of simulated GPUs' RIMs; needs --allow-simulated")
}

// gpuFresh is how long answers about RIMs and revocation are used again.
const gpuFresh = 24 * time.Hour

// devices returns what judges GPUs, nil where nothing is to.
func (g *kbsGPUs) devices() (devices kbs.Devices, simulated bool, err error) {
	if g.rimDir == "" {
		return nil, false, nil
	}
	if _, err := os.ReadDir(g.rimDir); err != nil {
		return nil, false, fmt.Errorf("--gpu-rim-dir: %w", err)
	}
	client := &http.Client{Timeout: rimTimeout}
	v := &gpu.Verifier{
		Policy: gpu.Policy{OCSP: gpu.OCSP(g.ocsp), AllowExpiredRIM: g.allowExpired, Drivers: g.drivers}, Now: time.Now,
		OCSP: &ocsp.Client{URL: ocsp.URL, HTTP: client, Now: time.Now, Rand: rand.Reader, MaxAge: gpuFresh},
	}
	switch v.Policy.OCSP {
	case gpu.OCSPAllowCached:
		dir := filepath.Join(g.rimDir, "ocsp")
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, false, fmt.Errorf("kept OCSP answers: %w", err)
		}
		v.OCSP.Cache = ocsp.Dir(dir)
	case gpu.OCSPRequire, gpu.OCSPOff:
	default:
		return nil, false, fmt.Errorf("%w: --gpu-ocsp %q is none of require, allow_cached and off", errUsage, g.ocsp)
	}
	if v.DeviceRoot, err = rootCertificate(g.deviceRoot, certs.DeviceRoot); err != nil {
		return nil, false, err
	}
	if v.RIMRoot, err = rootCertificate(g.rimRoot, certs.RIMRoot); err != nil {
		return nil, false, err
	}
	dir := gpurim.Dir{Path: g.rimDir}
	if g.allowExpired {
		if dir.Pins, err = pins(g.rimDir); err != nil {
			return nil, false, err
		}
	}
	v.RIMs = dir
	if g.fetch {
		service := gpurim.Service{URL: gpurim.ServiceURL, Client: client}
		v.RIMs = gpurim.First{dir, &gpurim.Cache{Source: service, TTL: gpuFresh, Now: time.Now}}
	}
	return v, g.deviceRoot != "" || g.rimRoot != "", nil
}
