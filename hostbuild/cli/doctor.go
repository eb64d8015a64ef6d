package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"coffer/hostbuild/doctor"
)

// thisHost is the build host itself. Users' PATHs often lack sbin.
func thisHost() doctor.Host {
	return doctor.Host{Root: "/", Path: append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/sbin"), Now: time.Now()}
}

func (a *App) doctor() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "doctor",
		Short: "Tell what this build host lacks, and what to do about it",
		Long: `Looks at programs, settings, guest base, folders and the KBS. Each line says ok, note or
MISSING; below it stands what to do. The exit code is 1 where something is missing that
a build needs. On the host that runs a bundle, ./launch_vm.sh --check does the same.`,
		Example: "  hostbuild doctor\n  hostbuild doctor --json",
		Args:    usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			fs := thisHost().Check(cmd.Context(), a.readSettings)
			ok := doctor.Healthy(fs)
			if asJSON {
				e := json.NewEncoder(a.Stdout)
				e.SetEscapeHTML(false)
				e.SetIndent("", "  ")
				if err := e.Encode(struct {
					Version  string           `json:"version"`
					OK       bool             `json:"ok"`
					Findings []doctor.Finding `json:"findings"`
				}{a.Version, ok, fs}); err != nil {
					return err
				}
			} else {
				a.findings(fs)
			}
			if !ok {
				return errors.New("something is missing that a build needs")
			}
			return nil
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print an object: version, ok, and findings with name, status, text, do, package")
	return c
}

// findings prints what was found, and one command for all packages.
func (a *App) findings(fs []doctor.Finding) {
	var packages []string
	for _, f := range fs {
		word := string(f.Status)
		if f.Status == doctor.Missing {
			word = "MISSING"
			if f.Package != "" {
				packages = append(packages, f.Package)
			}
		}
		fmt.Fprintf(a.Stdout, "%-8s %s: %s\n", word, f.Name, strings.ReplaceAll(f.Text, "\n", "\n         "))
		if f.Status != doctor.OK && f.Do != "" {
			fmt.Fprintf(a.Stdout, "         do: %s\n", f.Do)
		}
	}
	if slices.Sort(packages); len(packages) > 0 {
		fmt.Fprintf(a.Stdout, "all at once: apt-get install %s\n", strings.Join(packages, " "))
	}
}
