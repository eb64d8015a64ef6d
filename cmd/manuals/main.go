// Command manuals writes hostbuild's man pages and shell completions, and
// kbs-client's man pages, below a folder, as PREFIX/share has them. $SOURCE_DATE_EPOCH dates the pages.
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"coffer/hostbuild/cli"
	kbsclient "coffer/kbsclient/cli"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: manuals FOLDER VERSION")
		os.Exit(2)
	}
	if err := write(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "manuals:", err)
		os.Exit(1)
	}
}

func write(share, version string) error {
	root := (&cli.App{Version: version}).Command()
	man := filepath.Join(share, "man/man1")
	if err := os.MkdirAll(man, 0o755); err != nil {
		return err
	}
	for _, c := range []*cobra.Command{root, kbsclient.Command()} {
		c.DisableAutoGenTag = true
		plain(c)
		if err := doc.GenManTree(c, &doc.GenManHeader{Section: "1", Source: "Coffer " + version, Manual: "Coffer"}, man); err != nil {
			return err
		}
	}
	bash, zsh, fish := "bash-completion/completions/hostbuild", "zsh/site-functions/_hostbuild", "fish/vendor_completions.d/hostbuild.fish"
	for _, name := range []string{bash, zsh, fish} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(share, name)), 0o755); err != nil {
			return err
		}
	}
	return errors.Join(
		root.GenBashCompletionFileV2(filepath.Join(share, bash), true),
		root.GenZshCompletionFile(filepath.Join(share, zsh)),
		root.GenFishCompletionFile(filepath.Join(share, fish), true),
	)
}

// plain keeps what stands in angle brackets, which a man page is made of, as HTML
// would not.
func plain(c *cobra.Command) {
	c.Long = strings.ReplaceAll(c.Long, "<", `\<`)
	for _, sub := range c.Commands() {
		plain(sub)
	}
}
