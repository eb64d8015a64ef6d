package agent

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
)

// usage is what the guest itself costs: this process, containerd and its shims.
type usage struct {
	rss map[string]int64 // resident memory by name, KiB
	cpu int64            // processor time of all since their starts, milliseconds
}

// tick is the unit of processor time in /proc, in milliseconds (USER_HZ is 100).
const tick = 10

// readUsage leaves out a process that is not there. procfs is where /proc is.
func readUsage(procfs string) usage {
	u := usage{rss: map[string]int64{}}
	names := map[string]string{"containerd": "containerd", "containerd-shim": "shim"} // the kernel keeps 15 bytes of a name
	dirs, err := filepath.Glob(filepath.Join(procfs, "[0-9]*"))
	if err != nil {
		return u
	}
	self := strconv.Itoa(os.Getpid())
	for _, dir := range dirs {
		comm, err := os.ReadFile(filepath.Join(dir, "comm"))
		if err != nil {
			continue // it has ended
		}
		name := names[string(bytes.TrimSpace(comm))]
		if filepath.Base(dir) == self {
			name = "agent"
		}
		if name == "" {
			continue
		}
		status, _ := os.ReadFile(filepath.Join(dir, "status"))
		_, rest, _ := bytes.Cut(status, []byte("\nVmRSS:"))
		if f := bytes.Fields(rest); len(f) > 0 {
			u.rss[name] += number(f[0])
		}
		// proc(5): utime and stime are fields 14 and 15; the name, field 2, may hold anything.
		stat, _ := os.ReadFile(filepath.Join(dir, "stat"))
		if f := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:]); len(f) > 12 {
			u.cpu += (number(f[11]) + number(f[12])) * tick
		}
	}
	return u
}

func number(b []byte) int64 {
	n, _ := strconv.ParseInt(string(b), 10, 64)
	return n
}
