// Package reaper collects the orphans that PID 1 inherits, without taking the
// exit status of PID 1's own children from whoever waits for them.
package reaper

import (
	"errors"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Reaper knows the children that are waited for. Every child of the process has
// to be started through it.
type Reaper struct {
	mu      sync.Mutex
	managed map[int]bool
}

// New returns a Reaper without children.
func New() *Reaper { return &Reaper{managed: map[int]bool{}} }

// Start starts cmd as a child that its owner waits for by calling wait once.
func (r *Reaper) Start(cmd *exec.Cmd) (wait func() error, err error) {
	// The lock keeps the reaper away from a child that ends before it is noted.
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	pid := cmd.Process.Pid
	r.managed[pid] = true
	return func() error {
		err := cmd.Wait()
		r.mu.Lock()
		delete(r.managed, pid)
		r.mu.Unlock()
		return err
	}, nil
}

// Run reaps until stop is closed. One Run per process.
func (r *Reaper) Run(stop <-chan struct{}) {
	chld := make(chan os.Signal, 1)
	signal.Notify(chld, unix.SIGCHLD)
	defer signal.Stop(chld)
	// A signal may be merged with another or come before its child can be
	// reaped; the ticker bounds how long a zombie can stay.
	ticker := time.NewTicker(5 * time.Second)
	defer ticker.Stop()
	for {
		for r.reapOne() {
		}
		select {
		case <-chld:
		case <-ticker.C:
		case <-stop:
			return
		}
	}
}

// reapOne reaps one orphan. It reports whether another look is worth while.
func (r *Reaper) reapOne() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	pid, err := peek()
	if err != nil || pid == 0 {
		return errors.Is(err, unix.EINTR)
	}
	if r.managed[pid] {
		// Its owner is about to wait for it, and its status hides those behind it.
		r.mu.Unlock()
		time.Sleep(10 * time.Millisecond)
		r.mu.Lock()
		return true
	}
	_, err = unix.Wait4(pid, nil, unix.WNOHANG, nil)
	return err == nil
}

// peek returns the id of an ended child without reaping it, 0 when there is none.
func peek() (int, error) {
	// siginfo_t is 128 bytes; si_pid stands at byte 16 on 64-bit Linux.
	var info [32]int32
	_, _, errno := unix.Syscall6(unix.SYS_WAITID, unix.P_ALL, 0, uintptr(unsafe.Pointer(&info)),
		unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(info[4]), nil
}
