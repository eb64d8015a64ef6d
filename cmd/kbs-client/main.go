// Command kbs-client talks to a Trustee KBS: it stores resources and policies,
// and attests with Trustee's `sample` evidence to try them out. Package
// kbsclient/cli has its contract.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"coffer/kbsclient/cli"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := cli.Main(ctx, os.Args[1:], os.LookupEnv, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}
