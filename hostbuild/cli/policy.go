package cli

import (
	"fmt"

	"github.com/spf13/cobra"

	"coffer/hostbuild/bundle"
	"coffer/hostbuild/register"
)

func (a *App) registrar() (*register.Registrar, error) {
	s, err := a.settings()
	if err != nil {
		return nil, err
	}
	return register.Open(s)
}

func (a *App) policy() *cobra.Command {
	add := &cobra.Command{
		Use:     "add BUNDLE",
		Short:   "Add the rule of an unpacked bundle, or replace it",
		Example: "  hostbuild policy add ./cvm_0123456789ab",
		Args:    usage(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			m, err := bundle.ReadManifest(args[0])
			if err != nil {
				return err
			}
			rule, err := register.RuleOf(m)
			if err != nil {
				return err
			}
			r, err := a.registrar()
			if err != nil {
				return err
			}
			if err := r.AddRule(cmd.Context(), rule); err != nil {
				return err
			}
			fmt.Fprintf(a.Stdout, "%s may have its key again\n", m.CVMID)
			return nil
		},
	}
	remove := &cobra.Command{
		Use:   "remove CVM_ID",
		Short: "Remove the rule of a CVM: it gets no key any more",
		Long: `Removes the rule of a CVM. A running guest feels it at its next attestation round;
its next boot gets no key. The key itself stays at the KBS: "policy add" undoes this.`,
		Example: "  hostbuild policy remove cvm_0123456789ab",
		Args:    usage(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := a.registrar()
			if err != nil {
				return err
			}
			found, err := r.RemoveRule(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if !found {
				return fmt.Errorf("%s has no rule; `hostbuild policy list` shows those that have", args[0])
			}
			fmt.Fprintf(a.Stdout, "the rule of %s is removed\n", args[0])
			return nil
		},
	}
	list := &cobra.Command{
		Use:     "list",
		Short:   "List the CVMs that have a rule",
		Example: "  hostbuild policy list",
		Args:    usage(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			r, err := a.registrar()
			if err != nil {
				return err
			}
			rules, err := r.Rules()
			if err != nil {
				return err
			}
			for _, rule := range rules {
				for _, d := range rule.Digests {
					fmt.Fprintf(a.Stdout, "%s %x\n", rule.CVMID, d)
				}
			}
			return nil
		},
	}
	return group("policy", "The KBS's rules: one key for one CVM", add, remove, list)
}
