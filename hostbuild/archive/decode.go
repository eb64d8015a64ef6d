package archive

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// kind is how a stream is compressed.
type kind string

const (
	plain  kind = "none"
	gzipd  kind = "gzip"
	zstdd  kind = "zstd"
	bzip2d kind = "bzip2"
	xzd    kind = "xz"
)

func kindOf(head []byte) kind {
	for _, k := range []struct {
		kind  kind
		magic string
	}{{gzipd, "\x1f\x8b\x08"}, {zstdd, "\x28\xb5\x2f\xfd"}, {bzip2d, "BZh"}, {xzd, "\xfd7zXZ\x00"}} {
		if bytes.HasPrefix(head, []byte(k.magic)) {
			return k.kind
		}
	}
	return plain
}

// Memory of the decoding: buffers on their way to the reader, and zstd's window.
const (
	bufferSize = 1 << 20
	buffers    = 4
	maxWindow  = 128 << 20
)

// decode decodes r in a goroutine of its own. Close ends it and waits for it.
func decode(ctx context.Context, r io.Reader, k kind) (io.ReadCloser, error) {
	switch k {
	case plain:
		return readAhead(ctx, r, func() {}), nil
	case gzipd:
		z, err := gzip.NewReader(bufio.NewReaderSize(r, bufferSize))
		if err != nil {
			return nil, decodeError(err)
		}
		return readAhead(ctx, decoder{z}, func() { z.Close() }), nil
	case zstdd:
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, decodeError(err)
		}
		return readAhead(ctx, decoder{z}, z.Close), nil
	}
	return nil, fmt.Errorf("%w: compressed with %s; unpack it first, or use gzip or zstd", ErrNotArchive, k)
}

// decoder tells a decoder's errors from those of what is made of its output.
type decoder struct{ r io.Reader }

func (d decoder) Read(p []byte) (int, error) {
	n, err := d.r.Read(p)
	if err != nil {
		err = decodeError(err)
	}
	return n, err
}

// ahead hands over what another goroutine reads, in large pieces.
type ahead struct {
	full   chan []byte
	free   chan []byte
	cancel context.CancelFunc
	done   sync.WaitGroup
	cur    []byte // what is left of buf
	buf    []byte
	err    error // of the source, valid once full is closed
}

func readAhead(ctx context.Context, r io.Reader, closeSource func()) *ahead {
	ctx, cancel := context.WithCancel(ctx)
	a := &ahead{full: make(chan []byte, buffers), free: make(chan []byte, buffers), cancel: cancel}
	for range buffers {
		a.free <- make([]byte, bufferSize)
	}
	a.done.Go(func() {
		defer close(a.full)
		defer closeSource()
		for {
			var b []byte
			select {
			case b = <-a.free:
			case <-ctx.Done():
				a.err = ctx.Err()
				return
			}
			b = b[:bufferSize]
			n, err := 0, error(nil)
			for n < len(b) && err == nil {
				var m int
				m, err = r.Read(b[n:])
				n += m
			}
			if n > 0 {
				a.full <- b[:n] // there are no more buffers than room
			}
			if err != nil {
				a.err = err
				return
			}
		}
	})
	return a
}

func (a *ahead) Read(p []byte) (int, error) {
	for len(a.cur) == 0 {
		if a.buf != nil {
			a.free <- a.buf
			a.buf = nil
		}
		b, ok := <-a.full
		if !ok {
			return 0, a.err
		}
		a.buf, a.cur = b, b
	}
	n := copy(p, a.cur)
	a.cur = a.cur[n:]
	return n, nil
}

func (a *ahead) Close() error {
	a.cancel()
	a.done.Wait()
	return nil
}

// decodeError puts the decoders' errors into this package's words. Those of the
// file below them and of a context stay as they are.
func decodeError(err error) error {
	var file *fs.PathError
	switch {
	case err == io.EOF, errors.As(err, &file), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded),
		errors.Is(err, ErrTruncated), errors.Is(err, ErrDamaged):
		return err
	case errors.Is(err, io.ErrUnexpectedEOF):
		return truncated(err)
	}
	return damaged(err)
}

// tarError does the same for archive/tar's errors, and leaves all others alone.
func tarError(err error) error {
	switch {
	case errors.Is(err, ErrTruncated), errors.Is(err, ErrDamaged):
		return err
	case errors.Is(err, io.ErrUnexpectedEOF):
		return truncated(err)
	case errors.Is(err, tar.ErrHeader), errors.Is(err, tar.ErrFieldTooLong):
		return damaged(err)
	}
	return err
}

func truncated(err error) error {
	return fmt.Errorf("%w (%w): the copy is incomplete; `docker save` or copy it again", ErrTruncated, err)
}

func damaged(err error) error {
	return fmt.Errorf("%w (%w): `docker save` or copy it again", ErrDamaged, err)
}
