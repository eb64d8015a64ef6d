package cli

import (
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"

	"github.com/spf13/cobra"

	"coffer/hostbuild/kbs"
	"coffer/hostbuild/yamlcheck"
	"coffer/internal/snp/verify"
)

func (a *App) kbs() *cobra.Command {
	return group("kbs", "The embedded KBS, for people who run no Trustee", a.kbsInit(), a.kbsServe())
}

func (a *App) kbsInit() *cobra.Command {
	var hosts []string
	c := &cobra.Command{
		Use:   "init FOLDER",
		Short: "Make the keys, certificates and stores of a new KBS",
		Long: `Makes a folder with a CA (ca.pem), a server certificate, the admin key (admin.key), the
token signer and empty stores. A build host needs ca.pem, admin.key and the folder policy.`,
		Example: "  hostbuild kbs init /srv/kbs --host kbs.example --host 192.0.2.7",
		Args:    usage(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			dir, err := yamlcheck.Expand(args[0])
			if err != nil {
				return err
			}
			if err := kbs.Init(dir, kbs.Options{Hosts: hosts}); err != nil {
				return err
			}
			if err := os.Mkdir(filepath.Join(dir, "policy"), 0o755); err != nil {
				return err
			}
			fmt.Fprintf(a.Stdout, "%s is ready\nnext: hostbuild kbs serve --dir %s --listen 0.0.0.0:8999\non the build host: hostbuild init --kbs-url https://%s --kbs-dir %s\n",
				dir, dir, net.JoinHostPort(hosts[0], "8999"), dir)
			return nil
		},
	}
	c.Flags().StringArrayVar(&hosts, "host", nil, "name or address of the server, for its certificate; may be repeated")
	c.MarkFlagRequired("host")
	return c
}

func (a *App) kbsServe() *cobra.Command {
	var o kbs.Options
	var gpus kbsGPUs
	var listen, dialect, roots string
	var minTCB []string
	c := &cobra.Command{
		Use:   "serve",
		Short: "Serve keys over HTTPS",
		Long: `Serves the protocol of Trustee's KBS. Each decision is one line on standard error;
figures are at /metrics, and /healthz answers while it serves. It stops in order on SIGTERM.

--min-tcb is bootloader/tee/snp/microcode, the lowest firmware that a product's reports
may show. Genoa has a default, 10/0/23/84. Turin and Milan are refused until they are
given one; Milan's reports can be forged (docs/security.md).`,
		Example: `  hostbuild kbs serve --dir /srv/kbs --listen 0.0.0.0:8999
  hostbuild kbs serve --dir /srv/kbs --min-tcb Turin=1/1/1/4/71 --kds https://kdsintf.amd.com`,
		Args: usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if o.Dir, err = yamlcheck.Expand(o.Dir); err != nil {
				return err
			}
			if roots != "" {
				if o.SimulatedRoots, err = os.ReadFile(roots); err != nil {
					return err
				}
			}
			o.MinTCB = verify.DefaultMinTCB()
			for _, m := range minTCB {
				product, min, err := parseMinTCB(m)
				if err != nil {
					return err
				}
				o.MinTCB[product] = min
			}
			o.Dialect = kbs.Dialect(dialect)
			if o.Devices, o.SimulatedDevices, err = gpus.devices(); err != nil {
				return err
			}
			o.Logger = slog.New(slog.NewTextHandler(a.Stderr, nil))
			server, err := kbs.New(o)
			if err != nil {
				return err
			}
			l, err := (&net.ListenConfig{}).Listen(cmd.Context(), "tcp", listen)
			if err != nil {
				return err
			}
			if os.Getenv("GOGC") == "" {
				debug.SetGCPercent(400) // of a heap of 20 MiB: what waits for a collection is a guest's boot
			}
			return server.Serve(cmd.Context(), l)
		},
	}
	f := c.Flags()
	f.StringVar(&o.Dir, "dir", "", "the folder that `kbs init` made")
	f.StringVar(&listen, "listen", "127.0.0.1:8999", "address to listen at")
	f.StringVar(&dialect, "dialect", string(kbs.DialectH), "T (2025-07, as NVFlare pins it) or H (2026-08)")
	f.StringArrayVar(&minTCB, "min-tcb", nil, "`PRODUCT=bootloader/tee/snp/microcode`, Turin with its fmc first; may be repeated (default: Genoa alone)")
	f.StringVar(&o.KDS, "kds", "", "URL of AMD's KDS or of a mirror, for VCEKs that evidence lacks (default: none is asked)")
	f.Float64Var(&o.Rate, "rate", 200, "requests a second of one address; 0: any number")
	f.StringVar(&o.AdminIssuer, "admin-issuer", "", "iss that admin tokens must name (dialect H; default any)")
	f.StringVar(&o.AdminAudience, "admin-audience", "", "aud that admin tokens must name (dialect H; default any)")
	f.StringVar(&roots, "simulated-roots", "", "PEM file of simulated chips' roots; needs --allow-simulated")
	gpus.flags(f)
	f.BoolVar(&o.AllowSimulated, "allow-simulated", false, "accept simulated evidence: for tests, never for real secrets")
	c.MarkFlagRequired("dir")
	return c
}
