package cli

import (
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/pflag"

	"coffer/hostbuild/kbs"
	"coffer/internal/gpu"
)

// kbsGPUs is what of `hostbuild kbs serve` is about GPUs.
type kbsGPUs struct{ gpuTrust }

func (g *kbsGPUs) flags(f *pflag.FlagSet) {
	f.StringVar(&g.rimDir, "gpu-rim-dir", "", "folder of RIMs (hostbuild rim fetch): accept evidence of GPUs beside the CPU's (dialect H)")
	f.BoolVar(&g.fetch, "gpu-rim-fetch", false, "ask NVIDIA's service for RIMs that the folder lacks, and anew each day")
	f.BoolVar(&g.policy.AllowExpiredRIM, "gpu-allow-expired-rim", false, "accept RIMs that lie in the folder now, after their signature has expired")
	f.StringVar((*string)(&g.policy.OCSP), "gpu-ocsp", string(gpu.OCSPAllowCached), "revocation of GPUs: require asks each time, allow_cached once in a day, off")
	f.StringSliceVar(&g.policy.Drivers, "gpu-driver", nil, "accept these driver versions alone")
	f.StringVar(&g.deviceRoot, "gpu-device-root", "", "PEM of simulated GPUs' root; needs --allow-simulated")
	f.StringVar(&g.rimRoot, "gpu-rim-root", "", "PEM of the root of simulated GPUs' RIMs; needs --allow-simulated")
}

// devices returns what judges GPUs, nil where nothing is to.
func (g *kbsGPUs) devices() (devices kbs.Devices, simulated bool, err error) {
	if g.rimDir == "" {
		return nil, false, nil
	}
	if _, err := os.ReadDir(g.rimDir); err != nil {
		return nil, false, fmt.Errorf("--gpu-rim-dir: %w", err)
	}
	ocspDir := filepath.Join(g.rimDir, "ocsp")
	if g.policy.OCSP == gpu.OCSPAllowCached {
		if err := os.MkdirAll(ocspDir, 0o700); err != nil {
			return nil, false, fmt.Errorf("kept OCSP answers: %w", err)
		}
	}
	v, err := g.verifier("--gpu-ocsp", ocspDir, time.Now)
	if err != nil {
		return nil, false, err
	}
	return v, g.deviceRoot != "" || g.rimRoot != "", nil
}
