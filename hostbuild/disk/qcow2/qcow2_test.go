package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"coffer/internal/testenv"
)

// write makes an image of size bytes with the given pieces.
func write(t testing.TB, size int64, pieces map[int64][]byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w, err := NewWriter(f, size)
	if err != nil {
		t.Fatal(err)
	}
	for off, p := range pieces {
		if _, err := w.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	end, err := w.Finish()
	if err == nil {
		err = f.Truncate(end)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(n)}).Read(b)
	return b
}

var images = map[string]struct {
	size   int64
	pieces map[int64][]byte
}{
	"empty":                {1 << 20, nil},
	"one sector":           {512, map[int64][]byte{0: random(512)}},
	"last cluster partial": {clusterSize + 4096, map[int64][]byte{clusterSize: random(4096)}},
	"scattered":            {3 << 30, map[int64][]byte{4096: random(4096), 1 << 30: random(3 << 20), 3<<30 - 512: random(512)}},
	"unaligned":            {1 << 30, map[int64][]byte{clusterSize - 100: random(3*clusterSize + 200)}},
}

// The oracle is qemu-img: it finds no fault, and converts to the same bytes.
func TestWriterAgainstQEMU(t *testing.T) {
	qemu := testenv.LookTool(t, "qemu-img")
	for name, c := range images {
		t.Run(name, func(t *testing.T) {
			path := write(t, c.size, c.pieces)
			if out, err := exec.Command(qemu, "check", path).CombinedOutput(); err != nil || !strings.Contains(string(out), "No errors were found") {
				t.Fatalf("qemu-img check: %v\n%s", err, out)
			}
			raw := filepath.Join(filepath.Dir(path), "raw")
			if out, err := exec.Command(qemu, "convert", "-O", "raw", path, raw).CombinedOutput(); err != nil {
				t.Fatalf("qemu-img convert: %v\n%s", err, out)
			}
			compare(t, raw, c.size, c.pieces)
		})
	}
}

// More clusters than one refcount block and one L2 table count.
func TestManyClusters(t *testing.T) {
	qemu := testenv.LookTool(t, "qemu-img")
	f, err := os.Create(filepath.Join(t.TempDir(), "disk.qcow2"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const n = 2*perRefcount + 100
	w, err := NewWriter(f, n*clusterSize)
	if err != nil {
		t.Fatal(err)
	}
	for i := range int64(n) {
		if _, err := w.WriteAt([]byte{1}, i*clusterSize); err != nil {
			t.Fatal(err)
		}
	}
	end, err := w.Finish()
	if err == nil {
		err = f.Truncate(end)
	}
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(qemu, "check", f.Name()).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "No errors were found") || !strings.Contains(string(out), "65636/65636 = 100.00% allocated") {
		t.Fatalf("qemu-img check: %v\n%s", err, out)
	}
}

func TestReaderReadsOwnImages(t *testing.T) {
	for name, c := range images {
		t.Run(name, func(t *testing.T) {
			compare(t, convert(t, write(t, c.size, c.pieces)), c.size, c.pieces)
		})
	}
}

func TestReaderReadsQEMUsImages(t *testing.T) {
	qemu := testenv.LookTool(t, "qemu-img")
	dir := t.TempDir()
	raw := filepath.Join(dir, "raw")
	pieces := map[int64][]byte{8192: random(100000), 5 << 20: random(70000)}
	f, _ := os.Create(raw)
	f.Truncate(8 << 20)
	for off, p := range pieces {
		f.WriteAt(p, off)
	}
	f.Close()
	for _, opts := range []string{"compat=1.1", "compat=0.10", "cluster_size=512", "cluster_size=2M", "lazy_refcounts=on", "preallocation=full"} {
		t.Run(opts, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "q")
			if out, err := exec.Command(qemu, "convert", "-O", "qcow2", "-o", opts, raw, path).CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			compare(t, convert(t, path), 8<<20, pieces)
		})
	}
	t.Run("refuses compressed", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "q")
		if out, err := exec.Command(qemu, "convert", "-c", "-O", "qcow2", raw, path).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		f, _ := os.Open(path)
		defer f.Close()
		st, _ := f.Stat()
		if _, err := NewReader(f, st.Size()); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "compressed") {
			t.Errorf("error %v", err)
		}
	})
}

// convert is the Reader's raw view of the image at path.
func convert(t testing.TB, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, _ := f.Stat()
	r, err := NewReader(f, st.Size())
	if err != nil {
		t.Fatal(err)
	}
	raw := path + ".raw"
	out, err := os.Create(raw)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	out.Truncate(r.Size())
	if err := r.CopyTo(out); err != nil {
		t.Fatal(err)
	}
	return raw
}

// compare checks a raw image against the pieces; all else must be zero.
func compare(t testing.TB, raw string, size int64, pieces map[int64][]byte) {
	t.Helper()
	f, err := os.Open(raw)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, _ := f.Stat()
	if st.Size() != size {
		t.Fatalf("raw size %d, want %d", st.Size(), size)
	}
	want, got := make([]byte, 1<<20), make([]byte, 1<<20)
	for off := int64(0); off < size; off += int64(len(want)) {
		clear(want)
		n := min(int64(len(want)), size-off)
		touched := false
		for at, p := range pieces {
			if at < off+n && at+int64(len(p)) > off {
				touched = true
				if at >= off {
					copy(want[at-off:n], p)
				} else {
					copy(want[:n], p[off-at:])
				}
			}
		}
		if !touched && off%(64<<20) != 0 && size > 1<<30 {
			continue // a sample of the empty parts is enough
		}
		if _, err := f.ReadAt(got[:n], off); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got[:n], want[:n]) {
			t.Fatalf("other bytes at %d", off)
		}
	}
}

func TestWriterRefusesOutside(t *testing.T) {
	f, _ := os.Create(filepath.Join(t.TempDir(), "q"))
	defer f.Close()
	w, err := NewWriter(f, 4096)
	if err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{-1, 1, 4097} {
		if _, err := w.WriteAt(make([]byte, 4096), off); err == nil {
			t.Errorf("a write at %d of a disk of 4096 was accepted", off)
		}
	}
	for _, size := range []int64{-1, 0, maxSize + 1} {
		if _, err := NewWriter(f, size); err == nil {
			t.Errorf("size %d accepted", size)
		}
	}
}

func TestReaderRefusesHostileImages(t *testing.T) {
	good, err := os.ReadFile(write(t, 1<<20, map[int64][]byte{0: random(2 * clusterSize)}))
	if err != nil {
		t.Fatal(err)
	}
	l1 := binary.BigEndian.Uint64(good[40:])
	l2 := binary.BigEndian.Uint64(good[l1:]) & offsetMask
	put64 := func(at uint64, v uint64) func([]byte) {
		return func(b []byte) { binary.BigEndian.PutUint64(b[at:], v) }
	}
	put32 := func(at uint64, v uint32) func([]byte) {
		return func(b []byte) { binary.BigEndian.PutUint32(b[at:], v) }
	}
	for name, c := range map[string]struct {
		change func([]byte)
		want   string
	}{
		"magic":             {put32(0, 0), "magic"},
		"version":           {put32(4, 4), "version 4"},
		"backing file":      {put64(8, 512), "backing file"},
		"cluster bits":      {put32(20, 63), "2^63"},
		"huge":              {put64(24, 1<<63), "virtual size"},
		"encrypted":         {put32(32, 2), "encrypted"},
		"L1 too short":      {put32(36, 0), "L1 table of 0"},
		"L1 outside":        {put64(40, 1<<40), "L1 table at"},
		"L1 unaligned":      {put64(40, 4096), "L1 table at"},
		"external data":     {put64(72, 4), "incompatible"},
		"L2 outside":        {put64(l1, 1<<40), "L2 table 0"},
		"cluster outside":   {put64(l2, 1<<40), "outside the file"},
		"cluster twice":     {put64(l2+8, binary.BigEndian.Uint64(good[l2:])), "used twice"},
		"cluster is the L2": {put64(l2, l2), "used twice"},
		"behind the end":    {put64(l2+8*100, 3*clusterSize), "behind the end"},
		"compressed":        {put64(l2, 1<<62|4096), "compressed"},
	} {
		t.Run(name, func(t *testing.T) {
			b := bytes.Clone(good)
			c.change(b)
			_, err := NewReader(bytes.NewReader(b), int64(len(b)))
			if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want one with %q", err, c.want)
			}
		})
	}
	if _, err := NewReader(bytes.NewReader(good[:50]), 50); !errors.Is(err, ErrInvalid) {
		t.Errorf("a header cut short: %v", err)
	}
}

type discardAt struct{ end int64 }

func (d discardAt) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(p)) > d.end {
		panic("written outside the disk")
	}
	return len(p), nil
}

// TestReaderMemory: a sparse file may say that it is of any size.
func TestReaderMemory(t *testing.T) {
	const tib = 1 << 40
	for name, c := range map[string]struct {
		bits               uint32
		virtual, fileBytes int64
	}{
		"tables":   {9, 16 * tib, 5 << 30},
		"clusters": {16, 1 << 20, 1 << 62},
	} {
		h := make([]byte, headerSize)
		for at, v := range map[int]uint32{0: magic, 4: 3, 20: c.bits, 36: 1 << 31, 100: headerSize} {
			binary.BigEndian.PutUint32(h[at:], v)
		}
		binary.BigEndian.PutUint64(h[24:], uint64(c.virtual))
		binary.BigEndian.PutUint64(h[40:], 1<<16)
		if _, err := NewReader(bytes.NewReader(h), c.fileBytes); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "too many") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzReader(f *testing.F) {
	for _, c := range images {
		if c.size <= 1<<20 {
			b, err := os.ReadFile(write(f, c.size, c.pieces))
			if err != nil {
				f.Fatal(err)
			}
			f.Add(b)
		}
	}
	// Small clusters give the fuzzer short inputs.
	small := make([]byte, 2048)
	binary.BigEndian.PutUint32(small[0:], magic)
	binary.BigEndian.PutUint32(small[4:], 2)
	binary.BigEndian.PutUint32(small[20:], 9)
	binary.BigEndian.PutUint64(small[24:], 4096)
	binary.BigEndian.PutUint32(small[36:], 1)
	binary.BigEndian.PutUint64(small[40:], 512)
	binary.BigEndian.PutUint64(small[512:], 1024)
	binary.BigEndian.PutUint64(small[1024:], 1536)
	f.Add(small)
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := NewReader(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatalf("an error of another kind: %v", err)
			}
			return
		}
		if err := r.CopyTo(discardAt{r.Size()}); err != nil {
			t.Fatal(err)
		}
	})
}
