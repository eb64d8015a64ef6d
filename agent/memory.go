package agent

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
)

// resident returns the resident memory of this process and of containerd and its
// shims, in KiB by name: what the guest itself costs. A process that is not there
// is left out. procfs is where /proc is.
func resident(procfs string) map[string]int64 {
	kib := map[string]int64{}
	names := map[string]string{"containerd": "containerd", "containerd-shim": "shim"} // the kernel keeps 15 bytes of a name
	dirs, err := filepath.Glob(filepath.Join(procfs, "[0-9]*"))
	if err != nil {
		return kib
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
		status, err := os.ReadFile(filepath.Join(dir, "status"))
		if err != nil {
			continue
		}
		_, rest, _ := bytes.Cut(status, []byte("\nVmRSS:"))
		if f := bytes.Fields(rest); len(f) > 0 {
			n, _ := strconv.ParseInt(string(f[0]), 10, 64)
			kib[name] += n
		}
	}
	return kib
}
