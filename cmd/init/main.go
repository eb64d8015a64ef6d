// Init is the first program of a guest: /init of its initrd. See package stages
// for what it does, and package watch for what it becomes. It takes no arguments
// and reads no environment.
package main

import (
	"context"
	"fmt"
	"os"

	"coffer/initramfs/stages"
	"coffer/initramfs/watch"
	"coffer/internal/boot"
	"coffer/internal/evidence"
	"coffer/internal/guestconfig"
)

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "init: runs as the first program of a Coffer guest only")
		os.Exit(2)
	}
	console, err := boot.OpenConsole()
	if err != nil {
		fmt.Fprintln(os.Stderr, "init: console:", err)
		os.Exit(1) // the kernel panics
	}
	log := boot.NewLog(console, evidence.Platform == guestconfig.PlatformSimulated, boot.SinceKernelStart)
	if os.Args[0] == watch.Self {
		watch.Run(log, guestconfig.AgentPath, boot.PowerOff)
	} else {
		stages.Boot(context.Background(), log, stages.System())
	}
	os.Exit(1) // the kernel panics: a power-off that failed must not go on
}
