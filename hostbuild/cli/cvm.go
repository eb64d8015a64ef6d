package cli

import (
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"coffer/hostbuild/config"
	"coffer/hostbuild/cvm"
	"coffer/hostbuild/yamlcheck"
)

func (a *App) cvm() *cobra.Command {
	var sample bool
	var idKey string
	c := &cobra.Command{
		Use:   "cvm CONFIG.yaml",
		Short: "Build a bundle and register it at the KBS",
		Long: `Builds the bundle that CONFIG.yaml describes, gives its key and its rule to the KBS,
and ends with the line "CVM Bundle <path>.tgz is ready" on standard output.

The bundle's time is $SOURCE_DATE_EPOCH, where it is set.

NVFlare's OnPremPackager calls this as build_image_cmd: give it the path of
cvm_build, which is this verb under a name of its own.`,
		Example: "  hostbuild cvm CONFIG.yaml\n  cvm_build CONFIG.yaml",
		Args:    usage(cobra.ExactArgs(1)),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return []string{"yaml", "yml"}, cobra.ShellCompDirectiveFilterFileExt
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.joinOutputs(); err != nil {
				return err
			}
			conf, err := config.Read(args[0])
			if conf != nil {
				a.warn(conf.Warnings)
			}
			if err != nil {
				return err
			}
			s, err := a.settings()
			if err != nil {
				return err
			}
			if idKey != "" {
				if s.IDKey, err = yamlcheck.Expand(idKey); err != nil {
					return err
				}
			}
			tee := "snp"
			if sample {
				tee = "sample"
			}
			now, err := sourceDate(os.Getenv("SOURCE_DATE_EPOCH"))
			if err != nil {
				return err
			}
			p := cvm.Params{Config: conf, Settings: s, TEE: tee, Progress: a.progress(), Warn: a.warnOfPolicy(s), Now: now}
			res, err := cvm.Build(cmd.Context(), p)
			if a.Terminal {
				fmt.Fprint(a.Stderr, "\r\x1b[K")
			}
			if err != nil {
				return err
			}
			a.warn(res.Warnings)
			for _, d := range res.Manifest.LaunchDigests {
				fmt.Fprintf(a.Stdout, "launch digest %s, %d vCPU: %s\n", d.CPU, d.VCPUs, d.Digest)
			}
			fmt.Fprintf(a.Stdout, "CVM Bundle %s is ready\n", res.Path)
			return nil
		},
	}
	c.Flags().BoolVar(&sample, "sample", false, "attest with Trustee's `sample` evidence instead of reports; simulated base only")
	c.Flags().StringVar(&idKey, "id-key", "", "PEM file of a P-384 key that signs an ID block for each launch digest (default: id_key of the settings)")
	return c
}

// sourceDate is the time of what is made: now, or the given seconds.
func sourceDate(epoch string) (time.Time, error) {
	if epoch == "" {
		return time.Now(), nil
	}
	n, err := strconv.ParseInt(epoch, 10, 64)
	if err != nil || n < 0 || n > 1<<40 {
		return time.Time{}, fmt.Errorf("SOURCE_DATE_EPOCH %q is no number of seconds", epoch)
	}
	return time.Unix(n, 0), nil
}
