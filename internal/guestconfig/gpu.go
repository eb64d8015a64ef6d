package guestconfig

import (
	"encoding/hex"
	"fmt"
	"net/url"
	"slices"
	"strings"
)

// Places of the GPU stack in the verity root.
const (
	GPUHelperPath = "/bin/gpu-helper"
	NVMLPath      = "/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1"
	GPURIMPath    = "/gpu/rims"
	GPUOCSPPath   = "/gpu/ocsp" // answers that the bundle carries
)

// Who judges GPUs.
const (
	GPULocal        = "local"         // the agent, by RIMs
	GPUNRAS         = "nras"          // NVIDIA's service
	GPUTrustee      = "trustee"       // the KBS; never one of 2025-07, which GPU evidence ends
	GPULocalNRAS    = "local+nras"    // both must agree
	GPULocalTrustee = "local+trustee" // both must agree
)

var gpuModes = []string{GPULocal, GPUNRAS, GPUTrustee, GPULocalNRAS, GPULocalTrustee}

// Local, NRAS and Trustee report who judges.
func (g *GPU) Local() bool   { return strings.HasPrefix(g.Mode, GPULocal) }
func (g *GPU) NRAS() bool    { return strings.HasSuffix(g.Mode, GPUNRAS) }
func (g *GPU) Trustee() bool { return strings.HasSuffix(g.Mode, GPUTrustee) }

// GPU says how NVIDIA GPUs are attested. Without it the guest has none.
type GPU struct {
	Mode    string   `json:"mode"`
	Count   int      `json:"count,omitempty"`   // 0: as many as the first round has
	Drivers []string `json:"drivers,omitempty"` // none: any
	VBIOSes []string `json:"vbioses,omitempty"` // none: any

	RIMs            []string `json:"rims,omitempty"`        // SHA-256 of the files in GPURIMPath
	RIMService      string   `json:"rim_service,omitempty"` // https://host for ids that they lack; "": none is asked
	AllowExpiredRIM bool     `json:"allow_expired_rim,omitempty"`
	OCSP            string   `json:"ocsp"`                   // "require", "allow_cached" or "off"
	OCSPMaxAge      int      `json:"ocsp_max_age,omitempty"` // seconds, of a kept answer
	AllowHold       bool     `json:"allow_hold,omitempty"`   // certificates on hold
	NRASURL         string   `json:"nras_url,omitempty"`     // https://host; "": NVIDIA's

	// VaultKeyPath is the resource that opens /vault, which the KBS gives to
	// evidence with verified GPUs alone; "": /vault is as safe as the root.
	VaultKeyPath string `json:"vault_key_path,omitempty"`

	// Roots of simulated devices, PEM; on the simulated platform alone.
	DeviceRoot string `json:"device_root,omitempty"`
	RIMRoot    string `json:"rim_root,omitempty"`
}

// ValidService reports whether text is the address of a service: https://host, with
// a port or a path where need be.
func ValidService(text string) bool {
	u, err := url.Parse(text)
	return err == nil && u.Scheme == "https" && u.Hostname() != "" && u.User == nil && u.RawQuery == "" && u.Fragment == ""
}

// MaxGPUs of a guest.
const MaxGPUs = 16

// faults are what is wrong with it.
func (g *GPU) faults(platform string) (faults []string) {
	if g == nil {
		return nil
	}
	fault := func(ok bool, format string, a ...any) {
		if !ok {
			faults = append(faults, fmt.Sprintf(format, a...))
		}
	}
	fault(slices.Contains(gpuModes, g.Mode), "mode %q is none of %s", g.Mode, strings.Join(gpuModes, ", "))
	fault(g.Count >= 0 && g.Count <= MaxGPUs, "count %d is not 0..%d", g.Count, MaxGPUs)
	for _, sum := range g.RIMs {
		b, err := hex.DecodeString(sum)
		fault(err == nil && len(b) == 32 && sum == strings.ToLower(sum), "rims: %q is not 64 hex characters", sum)
	}
	for name, text := range map[string]string{"rim_service": g.RIMService, "nras_url": g.NRASURL} {
		fault(text == "" || ValidService(text), "%s %q is not https://host", name, text)
	}
	fault(slices.Contains([]string{"require", "allow_cached", "off"}, g.OCSP), "ocsp %q is not require, allow_cached or off", g.OCSP)
	fault((g.OCSP == "allow_cached") == (g.OCSPMaxAge > 0), "ocsp_max_age %d: more than 0 with allow_cached, else 0", g.OCSPMaxAge)
	fault(g.VaultKeyPath == "" || ValidResourcePath(g.VaultKeyPath) && g.Trustee(), "vault_key_path %q with mode %s: want repository/type/tag, and the KBS to judge", g.VaultKeyPath, g.Mode)
	fault(platform == PlatformSimulated || g.DeviceRoot == "" && g.RIMRoot == "", "device_root and rim_root are for the simulated platform")
	return faults
}
