package cli

import (
	"fmt"
	"maps"
	"slices"

	"github.com/spf13/cobra"

	"coffer/hostbuild/bundle"
	"coffer/hostbuild/policy"
	"coffer/hostbuild/register"
	"coffer/hostbuild/settings"
)

func (a *App) registrar() (*register.Registrar, error) {
	s, err := a.settings()
	if err != nil {
		return nil, err
	}
	r, err := register.Open(s)
	if err != nil {
		return nil, err
	}
	r.Warn = a.warnOfPolicy(s)
	return r, nil
}

// warnOfPolicy prints what is doubtful in the master copy.
func (a *App) warnOfPolicy(s *settings.Settings) func(policy.Finding) {
	return func(f policy.Finding) { a.warn([]string{fmt.Sprintf("%s/policy.rego, %s", s.PolicyDir, f)}) }
}

// completeCVM offers the CVMs that have a rule.
func (a *App) completeCVM(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	s, err := a.readSettings()
	if err != nil || len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	rules, err := register.Rules(s.PolicyDir)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var ids []string
	for _, r := range rules {
		ids = append(ids, r.CVMID)
	}
	return ids, cobra.ShellCompDirectiveNoFileComp
}

func (a *App) policy() *cobra.Command {
	add := &cobra.Command{
		Use:   "add BUNDLE",
		Short: "Add the rule of an unpacked bundle, or replace it",
		Long: `Adds the rule of an unpacked bundle, or replaces it: the launch digests of its
manifest.json may have its key. Unpack the archive that was built here; a folder that
comes back from a site has the digests that its host wrote.`,
		Example: "  hostbuild policy add ./cvm_0123456789ab",
		Args:    usage(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			m, err := bundle.ReadManifest(args[0])
			if err != nil {
				return err
			}
			r, err := a.registrar()
			if err != nil {
				return err
			}
			rule, err := r.RuleOf(m)
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
		Example:           "  hostbuild policy remove cvm_0123456789ab",
		Args:              usage(cobra.ExactArgs(1)),
		ValidArgsFunction: a.completeCVM,
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
		Short:   "List the CVMs that have a rule, with each launch digest that gets their key",
		Example: "  hostbuild policy list",
		Args:    usage(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			s, err := a.settings()
			if err != nil {
				return err
			}
			rules, err := register.Rules(s.PolicyDir)
			if err != nil {
				return err
			}
			for _, rule := range rules {
				for _, d := range rule.Digests {
					fmt.Fprintf(a.Stdout, "%s %x\n", rule.CVMID, d)
				}
				if rule.TEE == policy.TEESample {
					fmt.Fprintf(a.Stdout, "%s sample evidence: anybody\n", rule.CVMID)
				}
			}
			return nil
		},
	}
	show := &cobra.Command{
		Use:   "show [CVM_ID]",
		Short: "Print the master copy of the policy, or what one CVM's rule says",
		Long: `Prints policy.rego of the policy folder, byte for byte, or one rule of it. What is
doubtful in the text is printed as warnings on standard error.`,
		Example:           "  hostbuild policy show\n  hostbuild policy show cvm_0123456789ab",
		Args:              usage(cobra.MaximumNArgs(1)),
		ValidArgsFunction: a.completeCVM,
		RunE: func(_ *cobra.Command, args []string) error {
			s, err := a.settings()
			if err != nil {
				return err
			}
			if len(args) == 1 {
				return a.showRule(s, args[0])
			}
			text, findings, err := register.Text(s.PolicyDir)
			if err != nil {
				return err
			}
			for _, f := range findings {
				a.warnOfPolicy(s)(f)
			}
			_, err = a.Stdout.Write(text)
			return err
		},
	}
	apply := &cobra.Command{
		Use:   "apply",
		Short: "Check the master copy and give it to the KBS as it stands",
		Long: `For text that people wrote into policy.rego, and for a KBS that lost its policy. A
text that a KBS would read as a release to everyone is refused.`,
		Example: "  hostbuild policy apply",
		Args:    usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := a.registrar()
			if err != nil {
				return err
			}
			if err := r.Apply(cmd.Context()); err != nil {
				return err
			}
			fmt.Fprintln(a.Stdout, "the KBS has the policy")
			return nil
		},
	}
	return group("policy", "The KBS's rules: one key for one CVM", add, remove, list, show, apply)
}

// showRule prints a rule, one fact a line.
func (a *App) showRule(s *settings.Settings, cvmID string) error {
	rules, err := register.Rules(s.PolicyDir)
	if err != nil {
		return err
	}
	rule, ok := rules.Get(cvmID)
	if !ok {
		return fmt.Errorf("%s has no rule; `hostbuild policy list` shows those that have", cvmID)
	}
	fmt.Fprintf(a.Stdout, "cvm %s\nevidence %s\n", rule.CVMID, rule.TEE)
	if rule.Simulated {
		fmt.Fprintln(a.Stdout, "evidence of a simulated chip too")
	}
	for _, p := range rule.Paths {
		fmt.Fprintln(a.Stdout, "resource", p)
	}
	for _, d := range rule.Digests {
		fmt.Fprintf(a.Stdout, "launch digest %x\n", d)
	}
	for _, product := range slices.Sorted(maps.Keys(rule.MinTCB)) {
		t := rule.MinTCB[product]
		fmt.Fprintf(a.Stdout, "minimum TCB %s: bootloader %d, tee %d, snp %d, microcode %d\n", product, t.Bootloader, t.TEE, t.SNP, t.Microcode)
	}
	return nil
}
