package cli

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"coffer/hostbuild/config"
	"coffer/hostbuild/cvm"
)

// errDiffers is the cause of a verification that went through and found something.
var errDiffers = errors.New("the bundle is not what it should be")

func (a *App) verify() *cobra.Command {
	var conf string
	c := &cobra.Command{
		Use:   "verify BUNDLE",
		Short: "Recompute every digest of a bundle",
		Long: `Recomputes every digest of the manifest of a bundle, packed or unpacked: of its files,
of the LUKS2 header that the guest pins, and the launch digests; and compares the guest
config in the initrd with the manifest.

With --config it also makes the bundle again from its inputs (the archive, the base of
the settings, the KBS's CA) and compares all of it: root hash, initrd, drives, launch
digests. Only the digest of crypt_root.qcow2 cannot be made again: its keys are random.
Neither a key nor a KBS is needed.`,
		Example: "  hostbuild verify cvm_0123456789ab.tgz\n  hostbuild verify ./cvm_0123456789ab --config CONFIG.yaml",
		Args:    usage(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			v := cvm.VerifyParams{Bundle: args[0], Progress: a.progress()}
			if conf != "" {
				read, err := config.Read(conf)
				if read != nil {
					a.warn(read.Warnings)
				}
				if err != nil {
					return err
				}
				v.Config = read
				if v.Settings, err = a.settings(); err != nil {
					return err
				}
			}
			m, checks, err := cvm.Verify(cmd.Context(), v)
			if a.Terminal {
				fmt.Fprint(a.Stderr, "\r\x1b[K")
			}
			if err != nil {
				return err
			}
			failed := false
			for _, c := range checks {
				if c.Err == nil {
					fmt.Fprintf(a.Stdout, "%-15s as they should be\n", c.Subject)
					continue
				}
				failed = true
				for _, line := range strings.Split(c.Err.Error(), "\n") {
					fmt.Fprintf(a.Stdout, "%-15s DIFFERS: %s\n", c.Subject, line)
				}
			}
			if failed {
				return fmt.Errorf("%s: %w", m.CVMID, errDiffers)
			}
			for _, d := range m.LaunchDigests {
				fmt.Fprintf(a.Stdout, "launch digest %s, %d vCPU: %s\n", d.CPU, d.VCPUs, d.Digest)
			}
			return nil
		},
	}
	c.Flags().StringVar(&conf, "config", "", "the CONFIG.yaml that the bundle was made from")
	return c
}
