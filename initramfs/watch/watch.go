// Package watch is what PID 1 does once the root is open: it runs the agent and
// sees to it that the machine does not outlive it.
//
// Init becomes the watcher by running its own program anew, so that nothing of
// what it held in memory, the disk's key above all, is left. The watcher is the
// one parent of every orphan, hands the wish to stop on to the agent, and when
// the agent ends, whatever the reason, says so in a FAILED line and powers off.
// An agent that powers off by itself never returns to it.
package watch

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"coffer/internal/boot"
)

// Self is the running program's own file, which is there even when the initrd is
// gone. A program that is started by this name is the watcher.
const Self = "/proc/self/exe"

// Run starts program and returns when the machine has to go: powerOff has been
// called then. It reaps every child of the process, so nothing else may.
func Run(log *boot.Log, program string, powerOff func()) {
	defer powerOff()
	log.Failed("run", run(program))
}

func run(program string) error {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGPWR)
	defer signal.Stop(signals)
	pid, err := syscall.ForkExec(program, []string{program}, &syscall.ProcAttr{Files: []uintptr{0, 1, 2}})
	if err != nil {
		return boot.Fail(boot.CodeRoot, fmt.Errorf("start %s: %w", program, err))
	}
	// Out of memory is the workload's trouble.
	_ = os.WriteFile("/proc/"+strconv.Itoa(pid)+"/oom_score_adj", []byte("-1000"), 0)
	go func() {
		for s := range signals {
			_ = unix.Kill(pid, s.(syscall.Signal))
		}
	}()
	for {
		var status unix.WaitStatus
		ended, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("wait for %s: %w", program, err)
		case ended == pid:
			return fmt.Errorf("%s ended: %s", program, describe(status))
		}
	}
}

func describe(s unix.WaitStatus) string {
	if s.Signaled() {
		return "signal " + strconv.Itoa(int(s.Signal())) + ", " + s.Signal().String()
	}
	return "exit status " + strconv.Itoa(s.ExitStatus())
}
