// Package qcow2 writes and reads qcow2 images of version 3, and reads those of
// version 2, without a backing file, encryption, compression or snapshots.
// The format is QEMU's docs/interop/qcow2.txt.
//
// The Writer gives a cluster its place when it is first allocated or written to,
// so that what comes in order lies in order; the tables follow behind the data
// when Finish is called. What was never written stays unallocated and reads as zero.
// The Reader is strict: the images it reads come back from hosts that are not
// trusted.
package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
)

const (
	magic       = 0x514649fb // "QFI\xfb"
	clusterBits = 16
	clusterSize = 1 << clusterBits
	perL2       = clusterSize / 8 // entries of an L2 table
	perRefcount = clusterSize / 2 // entries of a refcount block
	headerSize  = 104
	copied      = 1 << 63 // the cluster has one reference and may be written in place
)

// maxSize bounds the virtual size of images, in bytes.
const maxSize = 16 << 40

// Writer makes an image. Allocate and WriteAt may be called concurrently.
type Writer struct {
	f    io.WriterAt
	size int64

	mu  sync.Mutex
	l2  [][]int64 // by L2 table, then cluster: place in the file; 0 is unallocated
	end int64     // of the clusters in use
}

// NewWriter starts an image of size virtual bytes in f, an empty file.
func NewWriter(f io.WriterAt, size int64) (*Writer, error) {
	if size <= 0 || size > maxSize {
		return nil, fmt.Errorf("qcow2: size %d is out of range", size)
	}
	tables := ceil(ceil(size, clusterSize), perL2)
	return &Writer{f: f, size: size, l2: make([][]int64, tables), end: clusterSize}, nil
}

// Allocate gives the clusters of n bytes at off their places, so that these do
// not depend on the order of the writing.
func (w *Writer) Allocate(off int64, n int) error {
	if off < 0 || off > w.size || int64(n) > w.size-off {
		return w.outside(off, n)
	}
	for c := off / clusterSize; c*clusterSize < off+int64(n); c++ {
		w.place(c * clusterSize)
	}
	return nil
}

func (w *Writer) outside(off int64, n int) error {
	return fmt.Errorf("qcow2: %d bytes at %d lie outside the disk of %d", n, off, w.size)
}

// WriteAt writes into the virtual disk. A cluster's bytes that are not written
// read as zero.
func (w *Writer) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off > w.size || int64(len(p)) > w.size-off {
		return 0, w.outside(off, len(p))
	}
	done := 0
	for done < len(p) {
		// One write per run of clusters that are neighbours in the file too.
		at := w.place(off+int64(done)) + (off+int64(done))%clusterSize
		n := min(len(p)-done, clusterSize-int(at%clusterSize))
		for done+n < len(p) && w.place(off+int64(done+n)) == at+int64(n) {
			n = min(len(p)-done, n+clusterSize)
		}
		if _, err := w.f.WriteAt(p[done:done+n], at); err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// place returns where the cluster of virtual offset off lies, allocating it.
func (w *Writer) place(off int64) int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	c := off / clusterSize
	t := &w.l2[c/perL2]
	if *t == nil {
		*t = make([]int64, perL2)
	}
	at := &(*t)[c%perL2]
	if *at == 0 {
		*at = w.end
		w.end += clusterSize
	}
	return *at
}

// Finish writes the tables and the header, and returns the size that the file
// must have: a last cluster may be partly written. The Writer is spent then.
func (w *Writer) Finish() (int64, error) {
	l1 := make([]byte, 8*len(w.l2))
	for i, t := range w.l2 {
		if t == nil {
			continue
		}
		b := make([]byte, clusterSize)
		for j, at := range t {
			if at != 0 {
				binary.BigEndian.PutUint64(b[8*j:], uint64(at)|copied)
			}
		}
		at, err := w.appendTable(b)
		if err != nil {
			return 0, err
		}
		binary.BigEndian.PutUint64(l1[8*i:], uint64(at)|copied)
	}
	l1At, err := w.appendTable(l1)
	if err != nil {
		return 0, err
	}

	// The refcounts count their own clusters too: grow until all are covered.
	used := w.end / clusterSize
	blocks, table := int64(0), int64(0)
	for {
		b := ceil(used+blocks+table, perRefcount)
		t := ceil(b*8, clusterSize)
		if b == blocks && t == table {
			break
		}
		blocks, table = b, t
	}
	total := used + blocks + table
	refs := make([]byte, clusterSize)
	for i := range perRefcount {
		binary.BigEndian.PutUint16(refs[2*i:], 1)
	}
	refTable := make([]byte, 8*blocks)
	for i := range blocks {
		binary.BigEndian.PutUint64(refTable[8*i:], uint64(w.end))
		if i == blocks-1 {
			clear(refs[2*(total-i*perRefcount):])
		}
		if _, err := w.appendTable(refs); err != nil {
			return 0, err
		}
	}
	refTableAt, err := w.appendTable(refTable)
	if err != nil {
		return 0, err
	}
	if w.end/clusterSize != total {
		return 0, errors.New("qcow2: internal error: refcounts do not cover the file")
	}

	h := make([]byte, headerSize)
	binary.BigEndian.PutUint32(h[0:], magic)
	binary.BigEndian.PutUint32(h[4:], 3)
	binary.BigEndian.PutUint32(h[20:], clusterBits)
	binary.BigEndian.PutUint64(h[24:], uint64(w.size))
	binary.BigEndian.PutUint32(h[36:], uint32(len(w.l2)))
	binary.BigEndian.PutUint64(h[40:], uint64(l1At))
	binary.BigEndian.PutUint64(h[48:], uint64(refTableAt))
	binary.BigEndian.PutUint32(h[56:], uint32(table))
	binary.BigEndian.PutUint32(h[96:], 4) // refcounts of 16 bits
	binary.BigEndian.PutUint32(h[100:], headerSize)
	if _, err := w.f.WriteAt(h, 0); err != nil {
		return 0, err
	}
	return w.end, nil
}

// appendTable writes b behind all clusters and returns its place.
func (w *Writer) appendTable(b []byte) (int64, error) {
	at := w.end
	w.end += ceil(int64(len(b)), clusterSize) * clusterSize
	_, err := w.f.WriteAt(b, at)
	return at, err
}

func ceil(n, unit int64) int64 { return (n + unit - 1) / unit }

var _ io.WriterAt = (*Writer)(nil)
