package disk

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"sync"

	"coffer/hostbuild/disk/luks2"
	"coffer/hostbuild/disk/qcow2"
	"coffer/hostbuild/disk/verity"
	"coffer/hostbuild/disk/xts"
)

const (
	blockSize  = 4096
	bufferSize = 1 << 20
	buffers    = 4
)

// sealer encrypts whole blocks of the payload into the drive.
type sealer struct {
	drive  *qcow2.Writer
	cipher *xts.Cipher
	size   int64 // of the payload
}

// seal writes blocks at off of the payload. It overwrites b.
func (s *sealer) seal(b []byte, off int64) error {
	s.cipher.Encrypt(b, off, luks2.SectorSize)
	_, err := s.drive.WriteAt(b, luks2.DataOffset+off)
	return err
}

// payload takes the root file system as it is made: bytes in order, and single
// blocks that are put into place later. A goroutine of its own hashes the blocks
// for verity, encrypts and writes them. What does not fit is only counted, so
// that the user can be told how large the drive must be.
type payload struct {
	sealer *sealer
	hasher *verity.Hasher
	leaves io.WriterAt // the blocks' hashes, in order

	off  int64  // bytes so far
	cur  []byte // the last of them, not yet on their way
	full chan piece
	free chan []byte
	done sync.WaitGroup
	quit chan struct{} // closed when the goroutine has failed
	err  error         // of the goroutine; to be read after quit or done

	failed error // ends all writing
}

// piece is whole blocks on their way.
type piece struct {
	data   []byte
	off    int64
	pooled bool // data goes back to free
}

func newPayload(s *sealer, salt []byte, leaves io.WriterAt) *payload {
	p := &payload{
		sealer: s, hasher: verity.NewHasher(salt), leaves: leaves,
		full: make(chan piece, buffers), free: make(chan []byte, buffers), quit: make(chan struct{}),
	}
	for range buffers {
		p.free <- make([]byte, 0, bufferSize)
	}
	p.cur = <-p.free
	p.done.Go(p.run)
	return p
}

func (p *payload) run() {
	var hashes []byte
	for c := range p.full {
		if p.err == nil {
			hashes = p.hasher.Append(hashes[:0], c.data)
			_, p.err = p.leaves.WriteAt(hashes, c.off/blockSize*verity.HashSize)
			if p.err == nil {
				p.err = p.sealer.seal(c.data, c.off)
			}
			if p.err != nil {
				close(p.quit)
			}
		}
		if c.pooled {
			p.free <- c.data[:0]
		}
	}
}

// Write appends bytes.
func (p *payload) Write(b []byte) (int, error) {
	n := len(b)
	for len(b) > 0 {
		m := min(len(b), bufferSize-len(p.cur))
		p.cur = append(p.cur, b[:m]...)
		p.off += int64(m)
		b = b[m:]
		if len(p.cur) == bufferSize {
			if err := p.flush(); err != nil {
				return 0, err
			}
		}
	}
	return n, nil
}

// align appends zeros up to a multiple of unit.
func (p *payload) align(unit int64) error {
	_, err := p.Write(make([]byte, (unit-p.off%unit)%unit))
	return err
}

// put replaces the blocks at off, which were written before.
func (p *payload) put(off int64, blocks []byte) error {
	if start := p.off - int64(len(p.cur)); off >= start {
		copy(p.cur[off-start:], blocks)
		return nil
	}
	return p.send(piece{data: bytes.Clone(blocks), off: off})
}

// flush sends cur, which holds whole blocks, on its way.
func (p *payload) flush() error {
	if err := p.send(piece{p.cur, p.off - int64(len(p.cur)), true}); err != nil {
		return err
	}
	p.cur = <-p.free
	return nil
}

func (p *payload) send(c piece) error {
	switch most := p.sealer.size * 16; {
	case p.failed != nil:
		return p.failed
	case p.off > most: // a drive that is far too small is not worth the whole count
		p.failed = fmt.Errorf("%w: what it must hold is more than %d bytes", ErrTooSmall, most)
		return p.failed
	case c.off+int64(len(c.data)) > p.sealer.size:
		if c.pooled {
			p.free <- c.data[:0]
		}
		return nil
	}
	p.full <- c
	select {
	case <-p.quit:
		p.failed = p.err
	default:
	}
	return p.failed
}

// close ends the goroutine. Without err, all that fits is written then, and the
// error is the one that ended the writing, if there was one. With err, what is
// left is dropped.
func (p *payload) close(err error) error {
	p.failed = cmp.Or(p.failed, err)
	p.flush()
	close(p.full)
	p.done.Wait()
	return cmp.Or(err, p.failed, p.err)
}
