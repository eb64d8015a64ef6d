package agent

import (
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"testing"
)

func TestReadUsage(t *testing.T) {
	proc := t.TempDir()
	stat := func(utime, stime string) string {
		return "7 (a) name) S 1 7 7 0 -1 4194560 100 0 0 0 " + utime + " " + stime + " 9 9 20 0 9 0 100 1 1\n"
	}
	for pid, p := range map[string][3]string{
		strconv.Itoa(os.Getpid()): {"anything", "Name:\tx\nVmRSS:\t   20480 kB\nThreads:\t9\n", stat("10", "5")},
		"1000001":                 {"containerd", "Name:\tx\nVmRSS:\t   30000 kB\n", stat("0", "1")},
		"1000002":                 {"containerd-shim", "Name:\tx\nVmRSS:\t    9000 kB\n", stat("2", "2")},
		"1000003":                 {"containerd-shim", "Name:\tx\nVmRSS:\t    1000 kB\n", stat("3", "0")},
		"1000004":                 {"workload", "Name:\tx\nVmRSS:\t    7 kB\n", stat("1000", "1000")},
		"1000005":                 {"containerd", "Name:\tzombie\n", "1000005 (containerd) Z"},
	} {
		dir := filepath.Join(proc, pid)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for i, name := range []string{"comm", "status", "stat"} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(p[i]), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	u := readUsage(proc)
	if want := map[string]int64{"agent": 20480, "containerd": 30000, "shim": 10000}; !maps.Equal(u.rss, want) {
		t.Errorf("memory %v, want %v", u.rss, want)
	}
	if u.cpu != 230 {
		t.Errorf("processor time %d ms, want 230", u.cpu)
	}
}
