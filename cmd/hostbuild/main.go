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
	ctx, stop := signal.NotifyContext(context.Background(), ends()...)
	code := cli.Main(ctx, version, os.Args)
	stop()
	os.Exit(code)
}

// ends are the signals that end a command in good order. A terminal's end is one
// unless nohup has had it ignored: set-policy.sh runs in a session of its own, and
// would go on without its time limit, and upload a policy that is no longer the last.
func ends() []os.Signal {
	all := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) {
		all = append(all, syscall.SIGHUP)
	}
	return all
}
