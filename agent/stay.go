package agent

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// stay keeps this program's code and data in memory for good. They lie on
// crypt_root, and its host need not answer a read: what has not run yet, the end
// of a workload above all, must not need one.
func stay() error {
	program, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return err
	}
	kept := false
	for line := range strings.Lines(string(maps)) {
		f := strings.Fields(line) // proc(5): addresses, permissions, offset, device, inode, path
		if len(f) != 6 || f[5] != program {
			continue
		}
		var from, to uintptr
		if _, err := fmt.Sscanf(f[0], "%x-%x", &from, &to); err != nil {
			return fmt.Errorf("/proc/self/maps: %q: %w", f[0], err)
		}
		if _, _, errno := unix.Syscall(unix.SYS_MLOCK, from, to-from, 0); errno != 0 {
			return fmt.Errorf("keep %s in memory: %w", program, errno)
		}
		kept = true
	}
	if !kept {
		return errors.New("/proc/self/maps: this program is not in it")
	}
	return nil
}
