// Command idle is the floor of the boot figure: an init that prints how long the
// kernel took to reach it and powers off.
package main

import (
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	var now unix.Timespec
	unix.ClockGettime(unix.CLOCK_BOOTTIME, &now)
	fmt.Fprintf(os.Stdout, "idle init t=%.2f\n", time.Duration(now.Nano()).Seconds())
	syscall.Reboot(syscall.LINUX_REBOOT_CMD_POWER_OFF)
}
