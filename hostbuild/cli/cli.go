// Package cli is the command line of hostbuild: one file a verb, each thin.
//
// What it promises to the programs that call it: standard output carries results
// only, the last line of a failure is its cause, the exit code is 0 for success,
// 1 for failure and 2 for a command line that cannot be read.
package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"unicode"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"coffer/hostbuild/settings"
)

// App is the program.
type App struct {
	Version        string
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Terminal       bool // Stderr is a terminal: progress may be shown
	Asks           bool // Stdin is one too: questions may be asked

	Size func() (width, height int) // of the terminal that Stdout is; nil: it is none

	settingsFile string
}

// Main runs the program on this process's outputs and returns the exit code.
func Main(ctx context.Context, version string, args []string) int {
	a := &App{Version: version, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Terminal: term.IsTerminal(2), Asks: term.IsTerminal(0) && term.IsTerminal(2)}
	if term.IsTerminal(1) {
		a.Size = func() (int, int) {
			if w, h, err := term.GetSize(1); err == nil && w > 0 && h > 0 {
				return w, h
			}
			return 80, 24
		}
	}
	return a.Run(ctx, args)
}

// joinOutputs makes standard error the same pipe as standard output where neither
// is a terminal: NVFlare's packager reads a line of either in turn, and dead-locks
// once one of them fills.
func (a *App) joinOutputs() error {
	if a.Stderr != os.Stderr || term.IsTerminal(1) || term.IsTerminal(2) {
		return nil
	}
	return unix.Dup2(1, 2)
}

// errUsage marks a command line that cannot be read.
var errUsage = errors.New("usage")

// Run runs args (args[0] is the program's name) and returns the exit code.
// Called as cvm_build, or with a YAML file in the place of a verb, it is
// `hostbuild cvm`: NVFlare can give no verb.
func (a *App) Run(ctx context.Context, args []string) int {
	rest := args[1:]
	if strings.HasPrefix(filepath.Base(args[0]), "cvm_build") || len(rest) == 1 && isYAML(rest[0]) {
		rest = append([]string{"cvm"}, rest...)
	}
	root := a.Command()
	root.SetArgs(rest)
	root.SetOut(a.Stdout)
	root.SetErr(a.Stderr)
	if err := root.ExecuteContext(ctx); err != nil {
		a.say("hostbuild", err.Error())
		if errors.Is(err, errUsage) || strings.HasPrefix(err.Error(), "unknown command ") { // the latter is cobra's, for root
			return 2
		}
		return 1
	}
	return 0
}

func isYAML(name string) bool {
	ext := filepath.Ext(name)
	return ext == ".yaml" || ext == ".yml"
}

// say writes a text to standard error, each of its lines under the same heading.
// What is not UTF-8 in it, from a file's name, would end NVFlare's reader.
func (a *App) say(heading, text string) {
	for line := range strings.SplitSeq(strings.ToValidUTF8(text, "\uFFFD"), "\n") {
		fmt.Fprintf(a.Stderr, "%s: %s\n", heading, visible(line))
	}
}

// visible is a text, whoever wrote it, as a terminal may have it.
func visible(text string) string {
	return strings.Map(func(r rune) rune {
		if r != '\t' && !unicode.IsGraphic(r) {
			return '?'
		}
		return r
	}, text)
}

// Command is the whole command line, for those who describe it.
func (a *App) Command() *cobra.Command {
	root := &cobra.Command{
		Use:   "hostbuild",
		Short: "Build, register and inspect confidential VM bundles",
		Long: `hostbuild makes a confidential-VM bundle out of a docker archive and a YAML file,
gives its key and its rule to a Trustee KBS, and can be that KBS itself.`,
		Example: `  hostbuild kbs init /srv/kbs --host kbs.example
  hostbuild cvm CONFIG.yaml
  hostbuild policy remove cvm_0123456789ab`,
		Version:       a.Version,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	root.PersistentFlags().StringVar(&a.settingsFile, "settings", "", "settings of this build host (default $COFFER_SETTINGS, ~/.config/coffer/hostbuild.yaml, /etc/coffer/hostbuild.yaml)")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return fmt.Errorf("%w: %w", errUsage, err) })
	root.AddCommand(a.init(), a.doctor(), a.cvm(), a.watch(), a.verify(), a.cache(), a.base(), a.kbs(), a.policy(), a.drive(), a.measure(), a.report(), a.rim(), a.gpu())
	return root
}

// group makes a verb that only has verbs below it.
func group(use, short string, cmds ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, Args: usage(cobra.NoArgs), RunE: func(c *cobra.Command, _ []string) error { return c.Help() }}
	c.AddCommand(cmds...)
	return c
}

// usage turns a wrong number of arguments, and a required flag that is missing, into errUsage.
func usage(p cobra.PositionalArgs) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if err := cmp.Or(p(c, args), c.ValidateRequiredFlags()); err != nil {
			return fmt.Errorf("%w: %w; see %s --help", errUsage, err, c.CommandPath())
		}
		return nil
	}
}

func (a *App) settings() (*settings.Settings, error) {
	s, err := a.readSettings()
	if err != nil {
		return nil, err
	}
	a.warn(s.Warnings)
	return s, nil
}

func (a *App) readSettings() (*settings.Settings, error) {
	path, err := settings.Find(a.settingsFile, os.Getenv)
	if err != nil {
		return nil, err
	}
	return settings.Read(path)
}

func (a *App) warn(ws []string) {
	for _, w := range ws {
		a.say("warning", w)
	}
}

// progress shows one line that is rewritten, on a terminal alone: NVFlare's
// packager dead-locks on a flood of lines.
func (a *App) progress() func(stage string, done, total int64) {
	if !a.Terminal {
		return nil
	}
	return func(stage string, done, total int64) {
		fmt.Fprintf(a.Stderr, "\r\x1b[K%s", stage)
		if total > 0 {
			fmt.Fprintf(a.Stderr, " %d%%", done*100/total)
		}
	}
}
