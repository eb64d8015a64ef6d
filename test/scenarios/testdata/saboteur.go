package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// The agent of a scenario kills, as a defect would, the program that the workload
// names in /applog/kill.
func init() {
	const order = "/applog/kill"
	go func() {
		for ; ; time.Sleep(20 * time.Millisecond) {
			name, err := os.ReadFile(order)
			if err != nil {
				continue
			}
			os.Remove(order)
			processes, _ := filepath.Glob("/proc/[0-9]*/comm")
			for _, comm := range processes {
				if is, err := os.ReadFile(comm); err == nil && string(bytes.TrimSpace(is)) == string(name) {
					pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(comm)))
					syscall.Kill(pid, syscall.SIGKILL)
				}
			}
		}
	}()
}
