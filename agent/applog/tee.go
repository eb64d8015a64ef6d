package applog

import (
	"io"
	"sync"
)

// Tee writes to a console and, once it is attached, to a file as well. The file
// gets what came before, too. Both must be writers that never block.
type Tee struct {
	console io.Writer

	mu    sync.Mutex
	early []byte
	file  io.Writer
}

// maxEarly bounds what is kept for a file that is not there yet.
const maxEarly = 256 << 10

// NewTee writes to console only.
func NewTee(console io.Writer) *Tee { return &Tee{console: console} }

// Write always takes all of p.
func (t *Tee) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.console.Write(p)
	switch {
	case t.file != nil:
		t.file.Write(p)
	case len(t.early)+len(p) <= maxEarly:
		t.early = append(t.early, p...)
	}
	return len(p), nil
}

// Attach adds the file.
func (t *Tee) Attach(file io.Writer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	file.Write(t.early)
	t.file, t.early = file, nil
}
