package applog

import (
	"io"
	"sync"
)

// Lines puts a prefix before each line of a stream and removes control
// characters, so that the stream can neither pass for another's lines nor drive
// a terminal. Long lines are cut in pieces. w gets one whole line at a time.
type Lines struct {
	w      io.Writer
	prefix string

	mu   sync.Mutex
	line []byte
}

// maxLine bounds a piece of a line, without the prefix.
const maxLine = 512

// NewLines writes to w, which must never fail.
func NewLines(w io.Writer, prefix string) *Lines { return &Lines{w: w, prefix: prefix} }

// Write always takes all of p.
func (l *Lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, b := range p {
		if b == '\n' || len(l.line) >= maxLine {
			l.flush()
		}
		switch {
		case b == '\n' || b == '\r':
		case b == '\t':
			l.line = append(l.line, ' ')
		case b < ' ' || b >= 0x7f: // C1 controls hide in bytes above 0x7f
			l.line = append(l.line, '?')
		default:
			l.line = append(l.line, b)
		}
	}
	return len(p), nil
}

// Flush writes a last line that has no end.
func (l *Lines) Flush() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.line) > 0 {
		l.flush()
	}
}

func (l *Lines) flush() {
	out := make([]byte, 0, len(l.prefix)+len(l.line)+1)
	out = append(append(append(out, l.prefix...), l.line...), '\n')
	l.w.Write(out)
	l.line = l.line[:0]
}
