package boot

import (
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// flushTime bounds what PowerOff waits for, and a line on the Console: a host
// that does not drain the console or write its disks must not keep the machine up.
const flushTime = 5 * time.Second

// PowerOff kills every other process, drains the console and the disks, silences
// the kernel, so that the last line of the console is ours, and powers the machine
// off. It is for PID 1 and its child, the agent.
//
// The kill comes first, because the kernel leaves processes running while it waits
// for the host's devices to shut down, for as long as the host likes.
func PowerOff() {
	killAll()
	flushed := make(chan struct{})
	go func() {
		_ = unix.IoctlSetInt(int(os.Stdout.Fd()), unix.TCSBRK, 1) // tcdrain
		unix.Sync()
		_ = os.WriteFile("/proc/sys/kernel/printk", []byte("0"), 0) // "reboot: Power down"
		close(flushed)
	}()
	select {
	case <-flushed:
	case <-time.After(flushTime):
	}
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	os.Exit(1) // the kernel panics: a power-off that failed must not go on
}

// killAll kills all processes but this one and PID 1.
func killAll() { _ = unix.Kill(-1, unix.SIGKILL) }

// Console is the console as a log may use it: a write that the host does not take
// within flushTime is given up.
type Console struct {
	f     *os.File
	limit time.Duration
}

// OpenConsole opens the console anew, because who else has it open may wait for it.
func OpenConsole() (*Console, error) {
	f, err := os.OpenFile("/dev/console", os.O_WRONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	return newConsole(f, flushTime)
}

func newConsole(f *os.File, limit time.Duration) (*Console, error) {
	return &Console{f, limit}, f.SetWriteDeadline(time.Time{}) // an error where it takes none
}

// Write writes what the host takes of p in time.
func (c *Console) Write(p []byte) (int, error) {
	if err := c.f.SetWriteDeadline(time.Now().Add(c.limit)); err != nil {
		return 0, err
	}
	return c.f.Write(p)
}

// ReportCrashes has standard error, where the Go runtime reports a crash while
// all else of the program stands still, wait for nobody: a crash must end.
func ReportCrashes() error {
	fd, err := unix.Open("/dev/console", unix.O_WRONLY|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return errors.Join(unix.Dup3(fd, 2, 0), unix.Close(fd))
}

// SinceKernelStart counts the time that the machine was suspended, too.
func SinceKernelStart() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		return 0
	}
	return time.Duration(t.Nano())
}
