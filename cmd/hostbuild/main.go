// Command hostbuild builds, registers and inspects confidential-VM bundles.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"coffer/hostbuild/cli"
)

var version = "development" // set by the linker

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	app := &cli.App{
		Version: version, Stdout: os.Stdout, Stderr: os.Stderr, Terminal: term.IsTerminal(2),
		JoinOutputs: func() error {
			if term.IsTerminal(1) || term.IsTerminal(2) {
				return nil
			}
			return unix.Dup2(1, 2)
		},
	}
	code := app.Run(ctx, os.Args)
	stop()
	os.Exit(code)
}
