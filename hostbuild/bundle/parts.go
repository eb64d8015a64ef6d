package bundle

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"runtime"
	"sync"
)

// partSize is what crypt_root is hashed in, in bytes: of a file of many gigabytes
// one SHA-256 alone would keep one core busy long after all others are done.
const partSize = 1 << 20

// sumParts returns what `split -b 1M --filter=sha256sum FILE | sha256sum` prints for
// a file of size bytes. read gives n bytes from off on, in buf or elsewhere, in order and
// from one goroutine; write puts what it gave into a hash.
func sumParts(size int64, buffer int, read func(buf []byte, off, n int64) ([]byte, error), write func(h hash.Hash, b []byte)) (string, error) {
	type part struct {
		sum  *[sha256.Size]byte
		data []byte
	}
	workers := min(runtime.GOMAXPROCS(0), 8)
	sums := make([][sha256.Size]byte, (size+partSize-1)/partSize)
	full, free := make(chan part), make(chan []byte, 2*workers)
	for range cap(free) {
		free <- make([]byte, buffer)
	}
	var done sync.WaitGroup
	for range workers {
		done.Go(func() {
			h := sha256.New()
			for p := range full {
				h.Reset()
				write(h, p.data)
				h.Sum(p.sum[:0])
				free <- p.data[:buffer]
			}
		})
	}
	var err error
	for i := range sums {
		off := int64(i) * partSize
		var b []byte
		if b, err = read(<-free, off, min(partSize, size-off)); err != nil {
			break
		}
		full <- part{&sums[i], b}
	}
	close(full)
	done.Wait()
	if err != nil {
		return "", err
	}
	all := sha256.New()
	for _, s := range sums {
		fmt.Fprintf(all, "%x  -\n", s)
	}
	return hex.EncodeToString(all.Sum(nil)), nil
}
