package cli

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"coffer/internal/gpu"
	"coffer/internal/gpu/certs"
	"coffer/internal/gpu/ocsp"
	gpurim "coffer/internal/gpu/rim"
	"coffer/internal/gpu/spdm"
)

func (a *App) gpu() *cobra.Command {
	return group("gpu", "Judge attestation evidence of NVIDIA GPUs and switches", a.gpuVerify())
}

// gpuFlags is the command line of `hostbuild gpu verify`.
type gpuFlags struct {
	gpuTrust
	report, certs, nonce, at, ocspDir string
	json                              bool
}

// gpuTrust is what devices are judged by.
type gpuTrust struct {
	rimDir              string // folder of RIMs
	fetch               bool   // those that it lacks are NVIDIA's service's
	deviceRoot, rimRoot string // PEM files; "" for NVIDIA's own
	policy              gpu.Policy
}

func (a *App) gpuVerify() *cobra.Command {
	var o gpuFlags
	c := &cobra.Command{
		Use:   "verify",
		Short: "Verify a device's report against RIMs",
		Long: `Verify a device's report: certificate chain, firmware identity, signature, nonce,
and every measurement against the RIMs of its driver and VBIOS. The report is the
bytes that NVML gives, or hex of them. Without --nonce any nonce passes: that tells
what the device was, not when.`,
		Example: "  hostbuild gpu verify --report report.bin --certs chain.pem --rim-dir /srv/rims --nonce 931d...dfcb",
		Args:    usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			evidence, nonce, err := o.evidence()
			if err != nil {
				return err
			}
			if o.nonce == "" {
				a.warn([]string{"no --nonce: whether the report is fresh is not checked"})
			}
			now, err := timeFlag(o.at)
			if err != nil {
				return err
			}
			verifier, err := o.verifier("--ocsp", o.ocspDir, func() time.Time { return now })
			if err != nil {
				return err
			}
			result, err := verifier.Verify(cmd.Context(), evidence, nonce)
			if printErr := a.printVerdict(result, err, o.json); printErr != nil {
				return printErr
			}
			return err
		},
	}
	f := c.Flags()
	f.StringVar(&o.report, "report", "", "the report, bytes or hex")
	f.StringVar(&o.certs, "certs", "", "the device's certificate chain, PEM")
	f.StringVar(&o.rimDir, "rim-dir", ".", "folder of RIMs, see hostbuild rim fetch")
	f.BoolVar(&o.fetch, "fetch", false, "ask NVIDIA's service for RIMs that the folder lacks")
	f.StringVar(&o.nonce, "nonce", "", "the nonce that was asked with, 64 hex digits")
	f.StringVar(&o.at, "time", "", "judge at this time (RFC 3339) instead of now")
	f.StringVar((*string)(&o.policy.OCSP), "ocsp", string(gpu.OCSPOff), "require: ask NVIDIA's responder about revocation; allow_cached: use an answer of a day; off")
	f.StringVar(&o.ocspDir, "ocsp-dir", "", "folder of kept answers, for allow_cached; a bundle can carry it")
	f.StringSliceVar(&o.policy.Drivers, "driver", nil, "allowed driver versions")
	f.StringSliceVar(&o.policy.VBIOSes, "vbios", nil, "allowed VBIOS versions")
	f.BoolVar(&o.policy.AllowMissingFWID, "allow-missing-fwid", false, "accept reports of drivers 535 and 545, which do not name their firmware")
	f.BoolVar(&o.policy.AllowPPCIE, "allow-ppcie", false, "accept protected-PCIe mode; its switches are to be verified one by one")
	f.BoolVar(&o.policy.AllowHold, "allow-cert-hold", false, "accept certificates on hold")
	f.BoolVar(&o.policy.AllowExpiredRIM, "allow-expired-rim", false, "accept RIMs of the folder whose signature has expired")
	f.StringVar(&o.deviceRoot, "device-root", "", "PEM of another root than NVIDIA's, for simulated devices")
	f.StringVar(&o.rimRoot, "rim-root", "", "PEM of another root than NVIDIA's, for simulated devices")
	f.BoolVar(&o.json, "json", false, "print an object with NVIDIA's claims")
	c.MarkFlagRequired("report")
	c.MarkFlagRequired("certs")
	return c
}

// evidence reads the files, and the nonce that the report must have.
func (o *gpuFlags) evidence() (e gpu.Evidence, nonce [32]byte, err error) {
	if e.Report, err = readGPUReport(o.report); err != nil {
		return e, nonce, err
	}
	if e.Chain, err = os.ReadFile(o.certs); err != nil {
		return e, nonce, fmt.Errorf("certificate chain: %w", err)
	}
	if o.nonce == "" {
		if r, err := spdm.Parse(e.Report); err == nil {
			nonce = r.Nonce
		}
		return e, nonce, nil // Verify tells what is wrong with the report
	}
	b, err := hex.DecodeString(o.nonce)
	if err != nil || len(b) != len(nonce) {
		return e, nonce, fmt.Errorf("%w: --nonce is not %d hex digits", errUsage, 2*len(nonce))
	}
	return e, [32]byte(b), nil
}

func readGPUReport(path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("report: %w", err)
	}
	// A report begins with SPDM's version, 0x11, which is no character of a text.
	if text := strings.Join(strings.Fields(string(b)), ""); len(b) > 0 && b[0] != 0x11 {
		if raw, err := hex.DecodeString(text); err == nil {
			return raw, nil
		}
	}
	return b, nil
}

// gpuFresh is how long answers about RIMs and revocation are used again.
const gpuFresh = 24 * time.Hour

// verifier makes a verifier whose answers about revocation are kept in ocspDir.
// ocspFlag is the flag that Policy.OCSP comes from.
func (t *gpuTrust) verifier(ocspFlag, ocspDir string, now func() time.Time) (*gpu.Verifier, error) {
	client := &http.Client{Timeout: rimTimeout}
	v := &gpu.Verifier{
		OCSP:   &ocsp.Client{URL: ocsp.URL, HTTP: client, Now: time.Now, Rand: rand.Reader},
		Policy: t.policy, Now: now,
	}
	switch t.policy.OCSP {
	case gpu.OCSPRequire, gpu.OCSPOff:
	case gpu.OCSPAllowCached:
		if ocspDir == "" {
			return nil, fmt.Errorf("%w: %s allow_cached needs %[2]s-dir", errUsage, ocspFlag)
		}
		v.OCSP.Cache, v.OCSP.MaxAge = ocsp.Dir(ocspDir), gpuFresh
	default:
		return nil, fmt.Errorf("%w: %s %q is none of require, allow_cached and off", errUsage, ocspFlag, t.policy.OCSP)
	}
	var err error
	if v.DeviceRoot, err = rootCertificate(t.deviceRoot, certs.DeviceRoot); err != nil {
		return nil, err
	}
	if v.RIMRoot, err = rootCertificate(t.rimRoot, certs.RIMRoot); err != nil {
		return nil, err
	}
	dir := gpurim.Dir{Path: t.rimDir}
	if t.policy.AllowExpiredRIM {
		// Who allows this vouches for the files of the folder.
		if dir.Pins, err = pins(t.rimDir); err != nil {
			return nil, err
		}
	}
	v.RIMs = dir
	if t.fetch {
		service := gpurim.Service{URL: gpurim.ServiceURL, Client: client}
		v.RIMs = gpurim.First{dir, &gpurim.Cache{Source: service, TTL: gpuFresh, Now: time.Now}}
	}
	return v, nil
}

// pins returns the digests of all RIMs of a folder.
func pins(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("folder of RIMs: %w", err)
	}
	list := []string{}
	for _, e := range entries {
		if _, ok := gpurim.FileID(e.Name()); !ok || !e.Type().IsRegular() {
			continue
		}
		file, err := gpurim.ReadFile(dir + "/" + e.Name())
		if err != nil {
			return nil, err
		}
		list = append(list, file.SHA256)
	}
	return list, nil
}

func (a *App) printVerdict(r *gpu.Result, verdict error, asJSON bool) error {
	if asJSON {
		out := struct {
			Verified bool           `json:"verified"`
			Code     gpu.Code       `json:"code,omitempty"`
			Error    string         `json:"error,omitempty"`
			Claims   map[string]any `json:"claims"`
		}{Verified: r.Verified, Code: gpu.CodeOf(verdict), Claims: r.Claims()}
		if verdict != nil {
			out.Error = verdict.Error()
		}
		enc := json.NewEncoder(a.Stdout)
		enc.SetEscapeHTML(false)
		return enc.Encode(out)
	}
	for _, line := range []struct{ name, value string }{
		{"device", strings.TrimSpace(r.Arch + " " + r.Model)}, {"serial", r.Serial}, {"nonce", r.Nonce},
		{"driver", r.Driver}, {"VBIOS", r.VBIOS}, {"driver RIM", rimLine(r.DriverRIM)}, {"VBIOS RIM", rimLine(r.VBIOSRIM)},
	} {
		if line.value != "" {
			fmt.Fprintf(a.Stdout, "%-11s %s\n", line.name, line.value)
		}
	}
	for _, m := range r.Mismatches {
		fmt.Fprintf(a.Stdout, "differs     index %d (%s): is %s, want %s\n", m.Index, m.Source, m.RuntimeValue, m.GoldenValue)
	}
	a.warn(r.Warnings)
	if r.Verified {
		fmt.Fprintln(a.Stdout, "verified")
	}
	return nil
}

func rimLine(s gpu.RIMState) string {
	if s.File == "" {
		return s.ID
	}
	return s.ID + "  " + s.File
}
