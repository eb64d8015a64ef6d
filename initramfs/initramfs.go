// Package initramfs packs the initrd that a guest boots from.
//
// A guest's initrd is two segments in one file. The base segment, zstd, holds
// the init and the kernel modules and is made once (WriteBase). The guest
// segment, a plain cpio archive, holds the guest config of one CVM
// (GuestSegment) and is appended (AppendSegment); the kernel unpacks one after
// the other, and the SNP launch digest covers both.
//
// The same inputs give the same bytes: every mode is explicit, owner, times
// and inode numbers are zero, paths are sorted, and compression runs on one
// goroutine. A new version of the compressor changes them.
//
// It knows nothing of where the init and the modules come from.
package initramfs

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"strings"

	"coffer/initramfs/modules"
	"coffer/internal/guestconfig"

	"github.com/klauspost/compress/zstd"
	"github.com/u-root/mkuimage/cpio"
	packer "github.com/u-root/mkuimage/uimage/initramfs"
)

// LoadList is where the base initrd lists its modules: one absolute path a
// line, in the order in which they load; modules.OptionalMark stands before
// those whose failure to load does not matter, before that the feature that
// wants it, if not all guests load it.
const LoadList = "lib/modules/load"

// Base is what a base initrd holds.
type Base struct {
	Init          []byte // the program /init
	KernelVersion string // as uname -r prints it
	Modules       []modules.Module
}

// WriteBase writes a base initrd and returns the SHA-256 of its cpio archive
// before compression, in hex: that stays the same across compressors.
func WriteBase(w io.Writer, b Base) (string, error) {
	records := []cpio.Record{
		cpio.Directory(".", 0o755), // the kernel makes it 1777
		cpio.Directory("dev", 0o755), cpio.Directory("proc", 0o755), cpio.Directory("sys", 0o755),
		cpio.Directory("run", 0o755), cpio.Directory("newroot", 0o755),
		// The kernel opens /dev/console for the init before anyone can
		// mount a devtmpfs.
		cpio.CharDev("dev/console", 0o600, 5, 1),
		cpio.CharDev("dev/null", 0o666, 1, 3),
		cpio.StaticRecord(b.Init, cpio.Info{Name: "init", Mode: cpio.S_IFREG | 0o755}),
	}
	var list strings.Builder
	for _, m := range b.Modules {
		name := ModulePath(b.KernelVersion, m.Name)
		records = append(records, cpio.StaticRecord(m.Data, cpio.Info{Name: name, Mode: cpio.S_IFREG | 0o644}))
		if m.Feature != "" {
			list.WriteString(m.Feature + modules.FeatureMark)
		}
		if m.Optional {
			list.WriteString(modules.OptionalMark)
		}
		list.WriteString("/" + name + "\n")
	}
	records = append(records, cpio.StaticFile(LoadList, list.String(), 0o644))

	// One goroutine: with more, the bytes depend on their number.
	z, err := zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithEncoderConcurrency(1))
	if err != nil {
		return "", fmt.Errorf("pack initrd: %w", err)
	}
	sum := sha256.New()
	if err := pack(io.MultiWriter(z, sum), records); err != nil {
		return "", err
	}
	if err := z.Close(); err != nil {
		return "", fmt.Errorf("pack initrd: %w", err)
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

// ModulePath is where a module lies in the base initrd, without the leading slash.
func ModulePath(kernelVersion, name string) string {
	return "lib/modules/" + kernelVersion + "/kernel/" + name + ".ko"
}

// GuestSegment is a cpio archive of one guest config, for AppendSegment.
func GuestSegment(config []byte) ([]byte, error) {
	if len(config) == 0 || len(config) > guestconfig.MaxSize {
		return nil, fmt.Errorf("pack guest config: %d bytes, want 1..%d", len(config), guestconfig.MaxSize)
	}
	var out bytes.Buffer
	err := pack(&out, []cpio.Record{
		cpio.StaticRecord(config, cpio.Info{Name: guestconfig.InitrdPath, Mode: cpio.S_IFREG | 0o600}),
	})
	if err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// AppendSegment writes base, zeros up to a multiple of four, and segment.
func AppendSegment(base io.Reader, segment []byte, w io.Writer) error {
	n, err := io.Copy(w, base)
	if err != nil {
		return fmt.Errorf("copy base initrd: %w", err)
	}
	if _, err := w.Write(append(make([]byte, -n&3), segment...)); err != nil {
		return fmt.Errorf("append segment to initrd: %w", err)
	}
	return nil
}

func pack(w io.Writer, records []cpio.Record) error {
	files := packer.NewFiles()
	for _, r := range records {
		// AddRecord takes a second record of the same size for the same file.
		if files.Contains(r.Name) {
			return fmt.Errorf("pack initrd: %s stands twice", r.Name)
		}
		if err := files.AddRecord(r); err != nil {
			return fmt.Errorf("pack initrd: %w", err)
		}
	}
	out := archive{cpio.Newc.Writer(w)}
	if err := packer.Write(&packer.Opts{Files: files, OutputFile: out}); err != nil {
		return fmt.Errorf("pack initrd: %w", err)
	}
	return nil
}

// archive makes a cpio writer an output of mkuimage.
type archive struct{ cpio.RecordWriter }

func (a archive) OpenWriter() (packer.Writer, error) { return a, nil }
func (a archive) Finish() error                      { return cpio.WriteTrailer(a) }
