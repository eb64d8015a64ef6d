// Package applog writes the logs of a guest to places that the host controls: a
// drive that may be full, slow, broken or stuck, and a console that may never
// be read. Whoever logs is never blocked and never sees an error; what could not
// be written is counted, and the count is written when writing works again.
//
// The workload can write to the same drive as root. So files are opened within
// their folder only, and only regular files are written to.
package applog

import (
	"fmt"
	"io"
	"sync"
	"time"
)

// Notice is the format, with one %d, of what a log says about bytes that it lost.
type Notice string

// Notices.
const (
	// TextNotice begins a line of its own: the log may end in the middle of one.
	TextNotice Notice = "\ncoffer: %d bytes of this log were dropped\n"
	// LineNotice is for logs that are written in whole lines.
	LineNotice Notice = "coffer: %d bytes of this log were dropped\n"
	// JSONNotice is for logs that are written in whole lines of JSON.
	JSONNotice Notice = `{"dropped_bytes":%d}` + "\n"
)

// Async is a bounded queue in front of a writer. Write copies and returns at
// once; a chunk that does not fit is dropped whole.
type Async struct {
	w      io.Writer
	max    int
	notice Notice

	mu      sync.Mutex
	news    sync.Cond // queue or closed has changed
	queue   []byte
	pending int // dropped bytes that no notice has named yet
	dropped int64
	closed  bool
	done    chan struct{} // closed when all is written after Close
}

// NewAsync writes to w from a goroutine of its own and holds at most max bytes.
// w gets whole chunks, several at a time.
func NewAsync(w io.Writer, max int, notice Notice) *Async {
	a := &Async{w: w, max: max, notice: notice, done: make(chan struct{})}
	a.news.L = &a.mu
	go a.run()
	return a
}

// Write always takes all of p and never fails.
func (a *Async) Write(p []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.closed || len(a.queue)+len(p) > a.max:
		a.pending += len(p)
		a.dropped += int64(len(p))
	default:
		if a.pending > 0 {
			a.queue = fmt.Appendf(a.queue, string(a.notice), a.pending)
			a.pending = 0
		}
		a.queue = append(a.queue, p...)
	}
	a.news.Signal()
	return len(p), nil
}

// Dropped is the number of bytes that did not fit so far.
func (a *Async) Dropped() int64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.dropped
}

// Close takes nothing more and gives what is queued limit to be written. It
// reports whether all of it was.
func (a *Async) Close(limit time.Duration) bool {
	a.mu.Lock()
	a.closed = true
	a.news.Signal()
	a.mu.Unlock()
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case <-a.done:
		return true
	case <-t.C:
		return false
	}
}

func (a *Async) run() {
	defer close(a.done)
	var spare []byte
	for {
		a.mu.Lock()
		for len(a.queue) == 0 && !a.closed {
			a.news.Wait()
		}
		batch := a.queue
		a.queue = spare[:0]
		a.mu.Unlock()
		if len(batch) == 0 {
			return
		}
		a.w.Write(batch) // an error is the writer's own to count
		spare = batch
	}
}
