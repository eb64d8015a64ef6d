package disk

import (
	"cmp"
	"fmt"
	"io"
	"runtime"
	"sync"

	"coffer/hostbuild/disk/luks2"
	"coffer/hostbuild/disk/qcow2"
	"coffer/hostbuild/disk/verity"
	"coffer/hostbuild/disk/xts"
)

const (
	blockSize  = 4096
	bufferSize = 1 << 20
	maxWorkers = 8
)

// sealer encrypts whole blocks of the payload into the drive.
type sealer struct {
	drive  *qcow2.Writer
	cipher *xts.Cipher
	size   int64 // of the payload
}

// most is what is counted to tell how large the drive must be; one that is smaller
// by far is not worth the whole count.
func (s *sealer) most() int64 { return s.size * 16 }

func (s *sealer) farTooSmall() error {
	return fmt.Errorf("%w: what it must hold is more than %d bytes", ErrTooSmall, s.most())
}

// allocate gives n bytes at off their places in the drive's file.
func (s *sealer) allocate(off int64, n int) error {
	return s.drive.Allocate(luks2.DataOffset+off, n)
}

// seal writes blocks at off of the payload. It overwrites b.
func (s *sealer) seal(b []byte, off int64) error {
	s.cipher.Encrypt(b, off, luks2.SectorSize)
	_, err := s.drive.WriteAt(b, luks2.DataOffset+off)
	return err
}

// payload takes the root file system as it is made: bytes in order, and single
// blocks that are put into place later. Workers hash the blocks for verity,
// encrypt and write them, while their places are given out in order: the same
// bytes make the same drive. What does not fit is only counted, so that the user
// can be told how large the drive must be.
type payload struct {
	sealer *sealer
	salt   []byte
	leaves io.WriterAt // the blocks' hashes, in order

	off  int64  // bytes so far
	cur  []byte // the last of them, not yet on their way
	puts []piece
	full chan piece
	free chan []byte
	done sync.WaitGroup
	quit chan struct{} // closed when a worker has failed
	once sync.Once
	err  error // of that worker; to be read after quit or done

	failed error // ends all writing
}

// piece is whole blocks on their way.
type piece struct {
	data []byte
	off  int64
}

func newPayload(s *sealer, salt []byte, leaves io.WriterAt) *payload {
	workers := min(runtime.GOMAXPROCS(0)+2, maxWorkers) // some wait for the disk
	p := &payload{
		sealer: s, salt: salt, leaves: leaves,
		full: make(chan piece, workers), free: make(chan []byte, 2*workers+1), quit: make(chan struct{}),
	}
	for range cap(p.free) {
		p.free <- make([]byte, 0, bufferSize)
	}
	p.cur = <-p.free
	for range workers {
		p.done.Go(p.run)
	}
	return p
}

func (p *payload) run() {
	hasher := verity.NewHasher(p.salt)
	var hashes []byte
	for c := range p.full {
		select {
		case <-p.quit:
		default:
			var err error
			if hashes, err = p.seal(c, hasher, hashes); err != nil {
				p.once.Do(func() { p.err = err; close(p.quit) })
			}
		}
		p.free <- c.data[:0]
	}
}

// seal hashes, encrypts and writes a piece.
func (p *payload) seal(c piece, h *verity.Hasher, buf []byte) ([]byte, error) {
	buf = h.Append(buf[:0], c.data)
	if _, err := p.leaves.WriteAt(buf, c.off/blockSize*verity.HashSize); err != nil {
		return buf, err
	}
	return buf, p.sealer.seal(c.data, c.off)
}

// Write appends bytes.
func (p *payload) Write(b []byte) (int, error) {
	n := len(b)
	for len(b) > 0 {
		m := min(len(b), bufferSize-len(p.cur))
		p.cur = append(p.cur, b[:m]...)
		b = b[m:]
		if err := p.grown(m); err != nil {
			return 0, err
		}
	}
	return n, nil
}

// ReadFrom appends what r gives, without a copy in between.
func (p *payload) ReadFrom(r io.Reader) (total int64, err error) {
	for {
		n, err := r.Read(p.cur[len(p.cur):bufferSize])
		p.cur = p.cur[:len(p.cur)+n]
		total += int64(n)
		if gerr := p.grown(n); gerr != nil {
			return total, gerr
		}
		if err == io.EOF {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

// grown counts bytes that cur has got, and sends it on its way when it is full.
func (p *payload) grown(n int) error {
	p.off += int64(n)
	if len(p.cur) < bufferSize {
		return p.failed
	}
	return p.flush()
}

// align appends zeros up to a multiple of unit.
func (p *payload) align(unit int64) error {
	_, err := p.Write(make([]byte, (unit-p.off%unit)%unit))
	return err
}

// put replaces the blocks at off, which were written before: when all else is done.
func (p *payload) put(off int64, blocks []byte) {
	p.puts = append(p.puts, piece{blocks, off})
}

// flush sends cur, which holds whole blocks, on its way.
func (p *payload) flush() error {
	off := p.off - int64(len(p.cur))
	switch {
	case p.failed != nil:
		return p.failed
	case p.off > p.sealer.most():
		p.failed = p.sealer.farTooSmall()
		return p.failed
	case p.off > p.sealer.size:
		p.cur = p.cur[:0]
		return nil
	}
	if p.failed = p.sealer.allocate(off, len(p.cur)); p.failed != nil {
		return p.failed
	}
	p.full <- piece{p.cur, off}
	p.cur = <-p.free
	select {
	case <-p.quit:
		p.failed = p.err
	default:
	}
	return p.failed
}

// close ends the workers. Without err, all that fits is written then, and the
// error is the one that ended the writing, if there was one. With err, what is
// left is dropped.
func (p *payload) close(err error) error {
	p.failed = cmp.Or(p.failed, err)
	p.flush()
	close(p.full)
	p.done.Wait()
	if err := cmp.Or(err, p.failed, p.err); err != nil || p.off > p.sealer.size {
		return err
	}
	h := verity.NewHasher(p.salt)
	for _, c := range p.puts {
		if _, err := p.seal(c, h, nil); err != nil {
			return err
		}
	}
	return nil
}
