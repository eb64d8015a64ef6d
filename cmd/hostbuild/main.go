// Command hostbuild builds, registers and inspects confidential-VM bundles.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"coffer/hostbuild/cli"
)

var version = "development" // set by the linker

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := cli.Main(ctx, version, os.Args)
	stop()
	os.Exit(code)
}
