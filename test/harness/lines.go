package harness

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"regexp"
	"strings"
	"sync"
)

// Lines collects a program's output line by line and lets a test wait for one.
type Lines struct {
	tee io.Writer // may be nil

	mu      sync.Mutex
	partial []byte
	lines   []string
	changed chan struct{} // closed and replaced at each new line
	closed  bool
}

// NewLines makes an empty collection that copies what it gets to tee.
func NewLines(tee io.Writer) *Lines {
	return &Lines{tee: tee, changed: make(chan struct{})}
}

// Write never fails: a test's output must not stop the program under test.
func (l *Lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.tee != nil {
		l.tee.Write(p)
	}
	l.partial = append(l.partial, p...)
	for {
		i := bytes.IndexByte(l.partial, '\n')
		if i < 0 {
			return len(p), nil
		}
		l.add(string(l.partial[:i]))
		l.partial = l.partial[i+1:]
	}
}

func (l *Lines) add(s string) {
	l.lines = append(l.lines, strings.TrimRight(s, "\r"))
	close(l.changed)
	l.changed = make(chan struct{})
}

// Close ends the output: a waiting Expect gives up.
func (l *Lines) Close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	l.closed = true
	if len(l.partial) > 0 {
		l.add(string(l.partial))
		l.partial = nil
		return
	}
	close(l.changed)
	l.changed = make(chan struct{})
}

// All returns the lines so far.
func (l *Lines) All() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]string(nil), l.lines...)
}

// Text returns the output so far.
func (l *Lines) Text() string { return strings.Join(l.All(), "\n") }

// Expect waits for a line at or after index from that matches, and returns the
// line's submatches and the index behind it.
func (l *Lines) Expect(ctx context.Context, from int, re string) ([]string, int, error) {
	r, err := regexp.Compile(re)
	if err != nil {
		return nil, from, err
	}
	for {
		l.mu.Lock()
		lines, changed, closed := l.lines, l.changed, l.closed
		l.mu.Unlock()
		for ; from < len(lines); from++ {
			if m := r.FindStringSubmatch(lines[from]); m != nil {
				return m, from + 1, nil
			}
		}
		if closed {
			return nil, from, fmt.Errorf("the output ended without a line that matches %q; its last lines:\n%s", re, tail(lines, 15))
		}
		select {
		case <-ctx.Done():
			return nil, from, fmt.Errorf("no line that matches %q: %w; the last lines:\n%s", re, ctx.Err(), tail(lines, 15))
		case <-changed:
		}
	}
}

func tail(lines []string, n int) string {
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return strings.Join(lines, "\n")
}
