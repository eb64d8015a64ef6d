package ext4

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"coffer/internal/testenv"
)

var now = time.Unix(1700000000, 0)

func fresh(t testing.TB, size int64) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "fs"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if err := Make(t.Context(), f.Name(), Options{Label: "scratch", UUID: "01234567-89ab-4def-8123-456789abcdef", Time: now, BytesPerInode: 65536}); err != nil {
		t.Fatal(err)
	}
	return f
}

func check(t testing.TB, image string) {
	t.Helper()
	if out, err := exec.Command(testenv.LookTool(t, "e2fsck"), "-fn", image).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
}

// What Live leaves out may be noise: a file system that keeps only the live
// blocks is whole for e2fsck and for the kernel, which fills it with files, and
// is whole afterwards.
func TestLiveIsEnough(t *testing.T) {
	testenv.LookTool(t, "mke2fs")
	for _, size := range []int64{64 << 20, 200<<20 + 4096, 1 << 30, 5 << 30} {
		t.Run(fmt.Sprint(size>>20, " MiB"), func(t *testing.T) {
			f := fresh(t, size)
			live, err := Live(f)
			if err != nil {
				t.Fatal(err)
			}
			noisy := filepath.Join(t.TempDir(), "noisy")
			out, err := os.Create(noisy)
			if err != nil {
				t.Fatal(err)
			}
			defer out.Close()
			if err := out.Truncate(size); err != nil {
				t.Fatal(err)
			}
			// All metadata of a flexible group lies at its beginning, and the
			// backups at that of a group: noise there is noise everywhere.
			noise := make([]byte, 12<<20)
			rand.NewChaCha8([32]byte{1}).Read(noise)
			const group = 128 << 20
			for off := int64(0); off < size; off += group {
				if _, err := out.WriteAt(noise[:min(int64(len(noise)), size-off)], off); err != nil {
					t.Fatal(err)
				}
			}
			if size < group { // and in the journal
				for off := int64(len(noise)); off < size; off += int64(len(noise)) {
					out.WriteAt(noise[:min(int64(len(noise)), size-off)], off)
				}
			}
			var kept int64
			for _, e := range live {
				b := make([]byte, e.Len)
				if _, err := f.ReadAt(b, e.Off); err != nil {
					t.Fatal(err)
				}
				if _, err := out.WriteAt(b, e.Off); err != nil {
					t.Fatal(err)
				}
				kept += e.Len
			}
			if kept > 2<<20 {
				t.Errorf("%d bytes are live: not sparse", kept)
			}
			check(t, noisy)

			testenv.Root(t)
			dir := t.TempDir()
			if msg, err := exec.Command("mount", "-t", "ext4", "-o", "loop,nosuid,nodev,noatime,noinit_itable", noisy, dir).CombinedOutput(); err != nil {
				t.Fatalf("mount: %v\n%s", err, msg)
			}
			data := bytes.Repeat([]byte("data"), 3000)
			for i := range 600 {
				sub := filepath.Join(dir, fmt.Sprintf("d%d", i%40))
				os.Mkdir(sub, 0o755)
				if err := os.WriteFile(filepath.Join(sub, fmt.Sprint(i)), data, 0o644); err != nil {
					t.Error(err)
					break
				}
			}
			if msg, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
				t.Fatalf("umount: %v\n%s", err, msg)
			}
			check(t, noisy)
		})
	}
}

// A block too few is noticed: the check above can fail.
func TestLiveIsNeeded(t *testing.T) {
	f := fresh(t, 64<<20)
	live, err := Live(f)
	if err != nil {
		t.Fatal(err)
	}
	noise := make([]byte, BlockSize)
	rand.NewChaCha8([32]byte{1}).Read(noise)
	for _, e := range live[:1] {
		for off := e.Off; off < e.Off+e.Len; off += BlockSize {
			keep := make([]byte, BlockSize)
			f.ReadAt(keep, off)
			f.WriteAt(noise, off)
			if exec.Command(testenv.LookTool(t, "e2fsck"), "-fn", f.Name()).Run() == nil {
				t.Errorf("noise at %d goes unnoticed", off)
			}
			f.WriteAt(keep, off)
		}
	}
}

func TestDeterministic(t *testing.T) {
	read := func() []byte {
		b, err := os.ReadFile(fresh(t, 64<<20).Name())
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	if !bytes.Equal(read(), read()) {
		t.Error("the same options give other bytes")
	}
}

func TestLargeIsSparse(t *testing.T) {
	f := fresh(t, 30<<30)
	live, err := Live(f)
	if err != nil {
		t.Fatal(err)
	}
	var n int64
	for _, e := range live {
		n += e.Len
	}
	if n > 4<<20 {
		t.Errorf("%d bytes of a fresh file system of 30 GiB are live", n)
	}
}

func BenchmarkMake30GiB(b *testing.B) {
	for b.Loop() {
		f := fresh(b, 30<<30)
		if _, err := Live(f); err != nil {
			b.Fatal(err)
		}
	}
}

func TestLiveRefusesOthers(t *testing.T) {
	f := fresh(t, 64<<20)
	f.WriteAt(make([]byte, 2), 1024+0x38)
	if _, err := Live(f); err == nil {
		t.Error("no magic, and accepted")
	}
}

func TestErrors(t *testing.T) {
	if err := Make(t.Context(), "/no/such/file", Options{Time: now}); err == nil {
		t.Error("made a file system on a file that is not there")
	}
	t.Setenv("PATH", t.TempDir())
	if _, err := find("no-such-tool"); !errors.Is(err, ErrNoTool) {
		t.Errorf("a missing tool: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Make(ctx, fresh(t, 64<<20).Name(), Options{Time: now}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func FuzzMetadata(f *testing.F) {
	image := fresh(f, 64<<20)
	head := make([]byte, 2*BlockSize)
	if _, err := image.ReadAt(head, 0); err != nil {
		f.Fatal(err)
	}
	f.Add(head[1024:2048], head[BlockSize:], int64(64<<20))
	f.Fuzz(func(t *testing.T, super, groups []byte, size int64) {
		b := make([]byte, BlockSize+len(groups))
		copy(b[1024:BlockSize], super)
		copy(b[BlockSize:], groups)
		size = min(max(size, 0), 1<<44)
		extents, err := usedMetadata(bytes.NewReader(b), size)
		if err != nil {
			return
		}
		for _, e := range join(extents) {
			if e.Off < 0 || e.Len <= 0 || e.Off > size || e.Len > size-e.Off {
				t.Errorf("%+v of a file system of %d bytes", e, size)
			}
		}
	})
}

func FuzzListing(f *testing.F) {
	f.Add("/2/040755/0/0/./4096/\n/12/100644/0/0/a b/5/\n/13/040700/0/0/d//\n")
	f.Fuzz(func(t *testing.T, text string) {
		list, err := parseListing(strings.NewReader(text))
		if err != nil {
			return
		}
		for _, e := range list {
			if e.Name == "." || e.Name == ".." || strings.ContainsAny(e.Name, "/\n") {
				t.Errorf("a name %q", e.Name)
			}
		}
	})
}

// As a drive may look whose guest writes to it at this moment.
func TestReadsWithWrongBitmap(t *testing.T) {
	f := fresh(t, 64<<20)
	if err := Populate(t.Context(), f.Name(), now, []Item{{Path: "/log.txt", Mode: 0o644, Source: "ext4_test.go"}}); err != nil {
		t.Fatal(err)
	}
	var block [4]byte // of group 0's bitmap: the first word of its descriptor
	if _, err := f.ReadAt(block[:], 4096); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{0xa5}, int64(binary.LittleEndian.Uint32(block[:]))*4096+100); err != nil {
		t.Fatal(err)
	}
	list, err := List(t.Context(), f.Name(), "/")
	if err != nil || !slices.ContainsFunc(list, func(e Entry) bool { return e.Name == "log.txt" }) {
		t.Errorf("%v, %v", list, err)
	}
	want, _ := os.ReadFile("ext4_test.go")
	var got bytes.Buffer
	if err := Read(t.Context(), f.Name(), "log.txt", &got); err != nil || !bytes.Equal(got.Bytes(), want) {
		t.Errorf("%d bytes of %d, %v", got.Len(), len(want), err)
	}
}
