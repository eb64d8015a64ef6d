package initramfs_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"coffer/initramfs"
	"coffer/initramfs/modules"
	"coffer/internal/guestconfig"

	"github.com/klauspost/compress/zstd"
	"github.com/u-root/mkuimage/cpio"
)

func base() initramfs.Base {
	return initramfs.Base{
		Init: []byte("init program"), KernelVersion: "6.12.1-cloud",
		Modules: []modules.Module{
			{Name: "virtio_blk", Data: []byte("first")},
			{Name: "aesni_intel", Data: []byte("second"), Optional: true},
			{Name: "dm_mod", Data: []byte("third")},
		},
	}
}

// contents lists an archive, one line per record.
func contents(t *testing.T, archive []byte) string {
	t.Helper()
	var out strings.Builder
	r := cpio.EOFReader{RecordReader: cpio.Newc.Reader(bytes.NewReader(archive))}
	for {
		rec, err := r.ReadRecord()
		if err == io.EOF {
			return out.String()
		}
		if err != nil {
			t.Fatal(err)
		}
		if rec.MTime != 0 || rec.UID != 0 || rec.GID != 0 || rec.Ino != 0 {
			t.Errorf("%s has a time, owner or inode", rec.Name)
		}
		fmt.Fprintf(&out, "%06o %s", rec.Mode, rec.Name)
		if rec.Mode&cpio.S_IFMT == cpio.S_IFREG {
			data, err := io.ReadAll(io.NewSectionReader(rec, 0, int64(rec.FileSize)))
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(&out, " %q", data)
		}
		if rec.Mode&cpio.S_IFMT == cpio.S_IFCHR {
			fmt.Fprintf(&out, " %d:%d", rec.Rmajor, rec.Rminor)
		}
		out.WriteByte('\n')
	}
}

func TestWriteBase(t *testing.T) {
	var packed, again bytes.Buffer
	sum, err := initramfs.WriteBase(&packed, base())
	if err != nil {
		t.Fatal(err)
	}
	z, err := zstd.NewReader(&packed)
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	if _, err := initramfs.WriteBase(&again, base()); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(packed.Bytes(), again.Bytes()) {
		t.Error("the same base gave other bytes")
	}
	archive, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	if got := sha256.Sum256(archive); hex.EncodeToString(got[:]) != sum {
		t.Errorf("digest of the archive is %x, want %s", got, sum)
	}
	const want = `040755 .
040755 dev
020600 dev/console 5:1
020666 dev/null 1:3
100755 init "init program"
040755 lib
040755 lib/modules
040755 lib/modules/6.12.1-cloud
040755 lib/modules/6.12.1-cloud/kernel
100644 lib/modules/6.12.1-cloud/kernel/aesni_intel.ko "second"
100644 lib/modules/6.12.1-cloud/kernel/dm_mod.ko "third"
100644 lib/modules/6.12.1-cloud/kernel/virtio_blk.ko "first"
100644 lib/modules/load "/lib/modules/6.12.1-cloud/kernel/virtio_blk.ko\n-/lib/modules/6.12.1-cloud/kernel/aesni_intel.ko\n/lib/modules/6.12.1-cloud/kernel/dm_mod.ko\n"
040755 newroot
040755 proc
040755 run
040755 sys
`
	if got := contents(t, archive); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

func TestWriteBaseRefusesTheSameModuleTwice(t *testing.T) {
	b := base()
	b.Modules = append(b.Modules, b.Modules[0])
	if _, err := initramfs.WriteBase(io.Discard, b); err == nil || !strings.Contains(err.Error(), "virtio_blk") {
		t.Errorf("got %v", err)
	}
}

func TestGuestSegment(t *testing.T) {
	segment, err := initramfs.GuestSegment([]byte("{}\n"))
	if err != nil {
		t.Fatal(err)
	}
	const want = "040755 etc\n040755 etc/coffer\n100600 etc/coffer/guest.json \"{}\\n\"\n"
	if got := contents(t, segment); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	// The launch digest covers these bytes, so they must not change unseen.
	const golden = "4067f44395f99c246e8077f1df41ff7b8b0619af3d9d2bab6c16cbef146e826d"
	if got := sha256.Sum256(segment); hex.EncodeToString(got[:]) != golden {
		t.Errorf("segment has SHA-256 %x, want %s", got, golden)
	}
	for _, config := range [][]byte{nil, make([]byte, guestconfig.MaxSize+1)} {
		if _, err := initramfs.GuestSegment(config); err == nil {
			t.Errorf("a config of %d bytes was taken", len(config))
		}
	}
}

func TestAppendSegment(t *testing.T) {
	for n, pad := range []string{"", "\x00\x00\x00", "\x00\x00", "\x00", ""} {
		var out bytes.Buffer
		body := strings.Repeat("b", n)
		if err := initramfs.AppendSegment(strings.NewReader(body), []byte("070701"), &out); err != nil {
			t.Fatal(err)
		}
		if got, want := out.String(), body+pad+"070701"; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

type full struct{ left int }

func (f *full) Write(p []byte) (int, error) {
	if len(p) > f.left {
		return 0, errFull
	}
	f.left -= len(p)
	return len(p), nil
}

var errFull = errors.New("no space")

func TestWriteErrorsAreReported(t *testing.T) {
	if err := initramfs.AppendSegment(strings.NewReader("base"), []byte("070701"), &full{5}); !errors.Is(err, errFull) {
		t.Errorf("AppendSegment: %v", err)
	}
	if _, err := initramfs.WriteBase(&full{5}, base()); !errors.Is(err, errFull) {
		t.Errorf("WriteBase: %v", err)
	}
}
