package cli

import (
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"coffer/hostbuild/rim"
	"coffer/internal/gpu/certs"
	gpurim "coffer/internal/gpu/rim"
)

// rimTimeout is for one answer of the RIM service.
const rimTimeout = 30 * time.Second

func (a *App) rim() *cobra.Command {
	return group("rim", "Keep NVIDIA's reference manifests (RIMs) of GPU drivers and VBIOSes", a.rimFetch(), a.rimList(), a.rimVerify())
}

func (a *App) rimFetch() *cobra.Command {
	var dir, url, keyFile, rootFile string
	c := &cobra.Command{
		Use:   "fetch ID...",
		Short: "Fetch RIMs from NVIDIA's service, verify them and keep them",
		Long: `Fetch RIMs from NVIDIA's service, verify them and keep them in a folder as ID.xml.

Ids name driver and VBIOS versions: NV_GPU_DRIVER_GH100_570.124.06 (Hopper),
NV_GPU_CC_DRIVER_GB100_580.95.05 (Blackwell), NV_GPU_VBIOS_1010_0200_882_96009F0001.
"hostbuild gpu verify" says which a report needs. NVIDIA re-issues ids with other
content; the new file is then added as ID.2.xml. Signatures last two years.`,
		Example: "  hostbuild rim fetch --dir /srv/rims NV_GPU_DRIVER_GH100_570.124.06 NV_GPU_VBIOS_1010_0200_882_96009F0001",
		Args:    usage(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, ids []string) error {
			root, err := rootCertificate(rootFile, certs.RIMRoot)
			if err != nil {
				return err
			}
			service, err := rimService(url, keyFile)
			if err != nil {
				return err
			}
			var failed []error
			for _, id := range ids {
				info, added, err := rim.Fetch(cmd.Context(), service, dir, id, root, time.Now())
				if err != nil {
					failed = append(failed, err)
					continue
				}
				word := "kept"
				if !added {
					word = "had"
				}
				fmt.Fprintf(a.Stdout, "%-5s %s  sha256 %s  version %s  valid until %s\n", word, info.File, info.SHA256, info.Version, info.Until.Format(time.DateOnly))
			}
			return errors.Join(failed...)
		},
	}
	f := c.Flags()
	f.StringVar(&dir, "dir", ".", "the folder")
	f.StringVar(&url, "url", gpurim.ServiceURL, "the RIM service")
	f.StringVar(&keyFile, "service-key-file", "", "file with NVIDIA's service key, where one is needed")
	f.StringVar(&rootFile, "rim-root", "", "PEM of another root than NVIDIA's, for simulated devices")
	return c
}

func (a *App) rimList() *cobra.Command {
	var dir, url, keyFile, rootFile string
	var remote, asJSON bool
	c := &cobra.Command{
		Use:     "list",
		Short:   "List the RIMs of a folder, or with --remote the ids that the service knows",
		Example: "  hostbuild rim list --dir /srv/rims",
		Args:    usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if remote {
				service, err := rimService(url, keyFile)
				if err != nil {
					return err
				}
				ids, err := service.IDs(cmd.Context())
				for _, id := range ids {
					fmt.Fprintln(a.Stdout, id)
				}
				return err
			}
			root, err := rootCertificate(rootFile, certs.RIMRoot)
			if err != nil {
				return err
			}
			list, err := rim.List(dir, root, time.Now())
			if err != nil {
				return err
			}
			return a.printRIMs(list, asJSON)
		},
	}
	f := c.Flags()
	f.StringVar(&dir, "dir", ".", "the folder")
	f.BoolVar(&remote, "remote", false, "ask the service instead")
	f.StringVar(&url, "url", gpurim.ServiceURL, "the RIM service")
	f.StringVar(&keyFile, "service-key-file", "", "file with NVIDIA's service key, where one is needed")
	f.StringVar(&rootFile, "rim-root", "", "PEM of another root than NVIDIA's, for simulated devices")
	f.BoolVar(&asJSON, "json", false, "print an object a line")
	return c
}

func (a *App) rimVerify() *cobra.Command {
	var rootFile, at string
	var asJSON bool
	c := &cobra.Command{
		Use:     "verify FILE...",
		Short:   "Verify RIM files",
		Example: "  hostbuild rim verify /srv/rims/*.xml",
		Args:    usage(cobra.MinimumNArgs(1)),
		RunE: func(_ *cobra.Command, files []string) error {
			root, err := rootCertificate(rootFile, certs.RIMRoot)
			if err != nil {
				return err
			}
			now, err := timeFlag(at)
			if err != nil {
				return err
			}
			var list []rim.Info
			var failed []error
			for _, file := range files {
				info := rim.Inspect(file, root, now)
				if list = append(list, info); info.Err != nil {
					failed = append(failed, fmt.Errorf("%s: %w", file, info.Err))
				}
			}
			return errors.Join(append([]error{a.printRIMs(list, asJSON)}, failed...)...)
		},
	}
	f := c.Flags()
	f.StringVar(&rootFile, "rim-root", "", "PEM of another root than NVIDIA's, for simulated devices")
	f.StringVar(&at, "time", "", "judge at this time (RFC 3339) instead of now")
	f.BoolVar(&asJSON, "json", false, "print an object a line")
	return c
}

func (a *App) printRIMs(list []rim.Info, asJSON bool) error {
	enc := json.NewEncoder(a.Stdout)
	for _, i := range list {
		state, text := "good", ""
		if i.Err != nil {
			state, text = "bad", i.Err.Error()
		}
		if asJSON {
			if err := enc.Encode(struct {
				rim.Info
				State string `json:"state"`
				Error string `json:"error,omitempty"`
			}{i, state, text}); err != nil {
				return err
			}
			continue
		}
		fmt.Fprintf(a.Stdout, "%-4s  %s  %s %s  version %s  %d measurements  valid until %s  sha256 %s\n", state, i.File, i.Edition, i.Product, i.Version, i.Active, i.Until.Format(time.DateOnly), i.SHA256)
	}
	return nil
}

func rimService(url, keyFile string) (gpurim.Service, error) {
	s := gpurim.Service{URL: url, Client: &http.Client{Timeout: rimTimeout}}
	if keyFile != "" {
		key, err := os.ReadFile(keyFile)
		if err != nil {
			return s, fmt.Errorf("service key: %w", err)
		}
		s.Key = strings.TrimSpace(string(key))
	}
	return s, nil
}

// rootCertificate reads the root of a file, or returns the built-in one.
func rootCertificate(file string, builtIn func() *x509.Certificate) (*x509.Certificate, error) {
	if file == "" {
		return builtIn(), nil
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("root: %w", err)
	}
	chain, err := certs.ParsePEM(text)
	if err == nil && len(chain) != 1 {
		err = fmt.Errorf("%d certificates, want one", len(chain))
	}
	if err != nil {
		return nil, fmt.Errorf("root %s: %w", file, err)
	}
	return chain[0], nil
}

func timeFlag(text string) (time.Time, error) {
	if text == "" {
		return time.Now(), nil
	}
	t, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return t, fmt.Errorf("%w: --time %q is not like 2026-11-22T10:00:00Z", errUsage, text)
	}
	return t, nil
}
