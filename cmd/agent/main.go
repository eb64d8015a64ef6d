// Agent is what a guest's PID 1 runs in the verity root. See package agent for
// what it does.
// It takes no arguments and reads no environment.
package main

import (
	"fmt"
	"os"
	"sync"
	"time"

	"coffer/agent"
	"coffer/agent/applog"
	"coffer/internal/boot"
	"coffer/internal/evidence"
	"coffer/internal/guestconfig"
)

// Bounds of what waits for the console, in bytes; then lines are dropped.
const (
	logQueue      = 256 << 10
	workloadQueue = 64 << 10
	flushTime     = 2 * time.Second
)

func main() {
	if os.Getppid() != 1 {
		fmt.Fprintln(os.Stderr, "agent: runs in a Coffer guest only, as PID 1's child")
		os.Exit(2)
	}
	if err := boot.ReportCrashes(); err != nil {
		fmt.Fprintln(os.Stderr, "agent: console:", err)
		os.Exit(1)
	}
	// The host decides how fast the console is read, if at all. The agent's own
	// lines and the workload's have a queue each.
	console := &console{}
	own := applog.NewAsync(console, logQueue, applog.LineNotice)
	tee := applog.NewTee(own)
	agent.Run(agent.System(func() { own.Close(flushTime) }), agent.Output{
		Log:      boot.NewLog(tee, evidence.Platform == guestconfig.PlatformSimulated, boot.SinceKernelStart),
		Tee:      tee,
		Workload: applog.NewAsync(console, workloadQueue, agent.WorkloadNotice),
	})
}

// console keeps the lines of its writers apart.
type console struct{ mu sync.Mutex }

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return os.Stdout.Write(p)
}
