package agent

import (
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"coffer/agent/applog"
)

// logs are the files in /applog. Each has a queue of its own, so that a flood in
// one of them drops nothing of another; together they take less than half of
// the drive.
type logs struct {
	dir         *os.Root
	boot        *applog.Async // coffer.log: the console's lines, init's included
	workload    *applog.Async // workload.log: the container's output, as it came
	containerd  *applog.Async // containerd.log
	attestation *applog.Async // attestation.jsonl: one line a round
	files       []*applog.File
	queues      []*applog.Async
	lines       []*applog.Lines
}

const (
	queueBytes = 1 << 20
	flushTime  = 5 * time.Second
)

// workloadPrefix begins the workload's lines on the console.
const workloadPrefix = "workload: "

// WorkloadNotice tells on the console that it lacks a part of the workload's
// output; workload.log may have it.
const WorkloadNotice applog.Notice = workloadPrefix + "(%d bytes are not shown here)\n"

func openLogs(path string) (*logs, error) {
	dir, err := os.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		dir.Close()
		return nil, fmt.Errorf("size of %s: %w", path, err)
	}
	// A sixteenth of the drive is one file's share.
	share := int64(fs.Blocks) / 16 * int64(fs.Bsize)
	l := &logs{dir: dir}
	open := func(name string, most int64, keep int, notice applog.Notice) *applog.Async {
		f := applog.NewFile(dir, name, min(max(share, 64<<10), most), keep, notice)
		q := applog.NewAsync(f, queueBytes, notice)
		l.files, l.queues = append(l.files, f), append(l.queues, q)
		return q
	}
	l.workload = open("workload.log", 64<<20, 3, applog.TextNotice)
	l.attestation = open("attestation.jsonl", 8<<20, 1, applog.JSONNotice)
	l.boot = open("coffer.log", 1<<20, 1, applog.LineNotice)
	l.containerd = open("containerd.log", 1<<20, 1, applog.TextNotice)
	return l, nil
}

// stream is one output of the workload: into its log, and line by line to the
// console. first is called before the first byte.
func (l *logs) stream(console io.Writer, first func()) io.Writer {
	lines := applog.NewLines(console, workloadPrefix)
	l.lines = append(l.lines, lines)
	return both{l.workload, lines, first}
}

// both writes to two writers that never fail.
type both struct {
	a, b  io.Writer
	first func()
}

func (w both) Write(p []byte) (int, error) {
	w.first()
	w.a.Write(p)
	w.b.Write(p)
	return len(p), nil
}

// flushLines writes what the workload has left without a line's end.
func (l *logs) flushLines() {
	for _, lines := range l.lines {
		lines.Flush()
	}
}

// close flushes, with a limit.
func (l *logs) close() {
	within(flushTime, func() {
		for _, q := range l.queues {
			q.Close(flushTime)
		}
		for _, f := range l.files {
			f.Close()
		}
		l.dir.Close()
	})
}
