package boot

import (
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// flushTime bounds what PowerOff waits for: a host that does not drain the
// console or write its disks must not keep the machine up.
const flushTime = 5 * time.Second

// PowerOff drains the console and the disks, silences the kernel, so that the
// last line of the console is ours, and powers the machine off. It is for PID 1.
func PowerOff() {
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

// SinceKernelStart counts the time that the machine was suspended, too.
func SinceKernelStart() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		return 0
	}
	return time.Duration(t.Nano())
}
