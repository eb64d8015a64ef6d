package main

import (
	"os"
	"os/signal"
	"slices"
	"syscall"
	"testing"
)

// A terminal that is closed ends a command as Ctrl-C does, and one under nohup not.
func TestEnds(t *testing.T) {
	signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP) // whatever runs the test may ignore it
	ctx, stop := signal.NotifyContext(t.Context(), ends()...)
	defer stop()
	if err := syscall.Kill(syscall.Getpid(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	<-ctx.Done()
	signal.Ignore(syscall.SIGHUP)
	if slices.Contains(ends(), os.Signal(syscall.SIGHUP)) {
		t.Error("SIGHUP ends a command that was told to ignore it")
	}
}
