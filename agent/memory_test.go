package agent

import (
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"testing"
)

func TestResident(t *testing.T) {
	proc := t.TempDir()
	for pid, p := range map[string][2]string{
		strconv.Itoa(os.Getpid()): {"anything", "Name:\tx\nVmRSS:\t   20480 kB\nThreads:\t9\n"},
		"1000001":                 {"containerd", "Name:\tx\nVmRSS:\t   30000 kB\n"},
		"1000002":                 {"containerd-shim", "Name:\tx\nVmRSS:\t    9000 kB\n"},
		"1000003":                 {"containerd-shim", "Name:\tx\nVmRSS:\t    1000 kB\n"},
		"1000004":                 {"workload", "Name:\tx\nVmRSS:\t    7 kB\n"},
		"1000005":                 {"containerd", "Name:\tzombie\n"},
	} {
		dir := filepath.Join(proc, pid)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for i, name := range []string{"comm", "status"} {
			body := p[i]
			if name == "comm" {
				body += "\n"
			}
			if err := os.WriteFile(filepath.Join(dir, name), []byte(body), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	want := map[string]int64{"agent": 20480, "containerd": 30000, "shim": 10000}
	if got := resident(proc); !maps.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}
