package agent_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

// BenchmarkIdle tells what agent, containerd and shim take of one processor between
// two rounds, while the workload does nothing: no more than 0.5 %.
//
//	go test -run '^$' -bench Idle -benchtime 1x ./agent
func BenchmarkIdle(b *testing.B) {
	const settle, measured = 5 * time.Second, 30 * time.Second
	g := newGuest(b, `echo ready; sleep 1000`)
	g.cfg.Attestation.CheckFrequency, g.cfg.Attestation.MaxStaleness = 3600, 7200
	g.start()
	g.console.Await(b, "workload: ready")
	for b.Loop() {
		time.Sleep(settle)
		before := processorTime(b, g.dir)
		time.Sleep(measured)
		b.ReportMetric(100*float64(processorTime(b, g.dir)-before)/float64(measured), "%cpu")
	}
}

// processorTime is that of this process and of those whose command line names dir.
func processorTime(b *testing.B, dir string) (sum time.Duration) {
	b.Helper()
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		b.Fatal(err)
	}
	counted := 0
	for _, p := range processes {
		cmdline, _ := os.ReadFile(filepath.Join(p, "cmdline"))
		if filepath.Base(p) != strconv.Itoa(os.Getpid()) && !bytes.Contains(cmdline, []byte(dir)) {
			continue
		}
		counted++
		threads, _ := filepath.Glob(filepath.Join(p, "task/*/schedstat"))
		for _, file := range threads {
			var ran time.Duration // nanoseconds on a processor
			text, _ := os.ReadFile(file)
			fmt.Sscan(string(text), (*int64)(&ran))
			sum += ran
		}
	}
	if counted != 3 {
		b.Fatalf("%d processes, want this one, containerd and the shim", counted)
	}
	return sum
}
