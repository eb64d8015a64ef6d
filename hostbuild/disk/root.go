package disk

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"time"

	"coffer/hostbuild/archive"
	"coffer/hostbuild/disk/erofs"
	"coffer/hostbuild/disk/ext4"
	"coffer/hostbuild/disk/luks2"
	"coffer/hostbuild/disk/qcow2"
	"coffer/hostbuild/disk/verity"
	"coffer/hostbuild/disk/xts"
	"coffer/internal/guestconfig"
)

// RootParams says what crypt_root is made of.
type RootParams struct {
	Out        string // the qcow2 file
	Size       int64  // of the virtual drive in bytes; rounded up to 4096
	Passphrase []byte // as the KBS stores it
	Archive    string // the image, as package archive reads it
	ImageRef   string // chooses among several images; empty: the only one
	Files      []File // of the read-only root, beside the image
	Time       time.Time
	Rand       io.Reader // nil: crypto/rand. The same bytes give the same drive.
	// Progress is told of each stage how far it is, in bytes; "archive" is the
	// only long one.
	Progress func(stage string, done, total int64)
}

// Root describes a finished crypt_root.
type Root struct {
	HeaderSHA256 string // hex, of the first DataOffset bytes
	DataOffset   int64
	PayloadSize  int64
	Verity       guestconfig.Verity
	Scratch      guestconfig.Scratch
	Image        archive.Image
	EROFSSize    int64 // bytes that Verity covers
}

// MinScratch is the least room for the writable part of crypt_root, in bytes.
const MinScratch = 64 << 20

// scratchAlign is the alignment of the writable part, for no reason but order.
const scratchAlign = 1 << 20

// BuildRoot makes crypt_root: a LUKS2 header, and encrypted behind it a read-only
// EROFS of p.Files and the image, its dm-verity tree, and an empty ext4 over the
// rest. The archive streams through once. Its layers stay the tars they are, each
// with an EROFS index, in /image/layers; /image/meta.tar is the rest of the image.
func BuildRoot(ctx context.Context, p RootParams) (*Root, error) {
	if p.Rand == nil {
		p.Rand = rand.Reader
	}
	if p.Progress == nil {
		p.Progress = func(string, int64, int64) {}
	}
	p.Size = roundUp(p.Size, blockSize)
	if p.Size < luks2.DataOffset+MinScratch {
		return nil, explain(p.Out, fmt.Errorf("%w: %d bytes, with %d for the writable part alone", ErrTooSmall, p.Size, MinScratch))
	}
	out, err := newPartial(p.Out, 0o644)
	if err != nil {
		return nil, explain(p.Out, err)
	}
	root, err := buildRoot(ctx, p, out.File)
	return root, explain(p.Out, out.finish(err))
}

func buildRoot(ctx context.Context, p RootParams, out *os.File) (*Root, error) {
	drive, err := qcow2.NewWriter(out, p.Size)
	if err != nil {
		return nil, err
	}
	header, key, err := luks2.Format(luks2.Params{Passphrase: p.Passphrase, Label: "crypt_root", Rand: p.Rand})
	if err != nil {
		return nil, err
	}
	defer clear(key)
	cipher, err := xts.New(key)
	if err != nil {
		return nil, err
	}
	if _, err := drive.WriteAt(header, 0); err != nil {
		return nil, err
	}
	seed := make([]byte, verity.SaltSize+2*16) // salt, UUIDs of verity and ext4
	if _, err := io.ReadFull(p.Rand, seed); err != nil {
		return nil, fmt.Errorf("read randomness: %w", err)
	}
	salt, verityID, scratchID := seed[:verity.SaltSize], [16]byte(seed[verity.SaltSize:]), [16]byte(seed[verity.SaltSize+16:])

	leaves, err := tempFile(p.Out)
	if err != nil {
		return nil, err
	}
	defer leaves.Close()
	if err := os.Remove(leaves.Name()); err != nil { // it lives as long as it is open
		return nil, err
	}

	s := &sealer{drive: drive, cipher: cipher, size: p.Size - luks2.DataOffset}
	b := &rootBuilder{p: p, out: newPayload(s, salt, leaves), tree: erofs.New(blockSize, p.Time)}
	image, err := b.build(ctx)
	if err := b.out.close(err); err != nil {
		return nil, err
	}

	blocks := b.out.off / blockSize
	treeOff := b.out.off
	scratchOff := roundUp(treeOff+verity.TreeSize(blocks), scratchAlign)
	if scratchOff+MinScratch > s.size {
		need := roundUp(luks2.DataOffset+scratchOff+MinScratch, 1<<20)
		return nil, fmt.Errorf("%w: it has %d bytes, and needs at least %d (%d MiB): raise root_drive_size", ErrTooSmall, p.Size, need, need>>20)
	}
	hash, err := verity.Write(&sequence{s, treeOff}, verity.Params{Salt: salt, UUID: verityID, Blocks: blocks, Leaves: leaves})
	if err != nil {
		return nil, fmt.Errorf("verity tree: %w", err)
	}
	p.Progress("scratch", 0, s.size-scratchOff)
	if err := scratch(ctx, p, s, scratchOff, luks2.UUID(scratchID)); err != nil {
		return nil, fmt.Errorf("writable part: %w", err)
	}
	if err := drive.Finish(); err != nil {
		return nil, err
	}
	sum := sha256.Sum256(header)
	return &Root{
		HeaderSHA256: hex.EncodeToString(sum[:]), DataOffset: luks2.DataOffset, PayloadSize: s.size,
		Verity: guestconfig.Verity{
			RootHash: hex.EncodeToString(hash[:]), Salt: hex.EncodeToString(salt),
			DataBlocks: blocks, HashStartBlock: treeOff/blockSize + 1, // behind verity's superblock
		},
		Scratch: guestconfig.Scratch{Offset: scratchOff, Size: s.size - scratchOff},
		Image:   *image, EROFSSize: b.out.off,
	}, nil
}

// sequence seals what is written to it, one block multiple after the other.
type sequence struct {
	*sealer
	off int64
}

func (q *sequence) Write(b []byte) (int, error) {
	sealed := bytes.Clone(b) // Write must leave b alone
	err := q.seal(sealed, q.off)
	q.off += int64(len(b))
	return len(b), err
}

// rootBuilder makes the root EROFS.
type rootBuilder struct {
	p     RootParams
	out   *payload
	tree  *erofs.Tree
	blobs []blob // of the layers, by index
}

type blob struct{ start, size int64 }

func (b *rootBuilder) build(ctx context.Context) (*archive.Image, error) {
	if _, err := b.out.Write(make([]byte, erofs.SuperSize)); err != nil {
		return nil, err
	}
	for _, f := range b.p.Files {
		if err := b.file(f); err != nil {
			return nil, fmt.Errorf("put %s into the root: %w", f.Path, err)
		}
	}
	image, err := archive.Read(ctx, b.p.Archive, archive.Options{
		Ref: b.p.ImageRef, Layer: b.layer,
		Progress: func(done, total int64) { b.p.Progress("archive", done, total) },
	})
	if err != nil {
		return nil, err
	}
	if err := b.file(File{Path: guestconfig.ImageMetaPath, Mode: erofs.TypeRegular | 0o644, Data: image.Meta}); err != nil {
		return nil, err
	}
	for _, l := range image.Layers {
		hash := strings.TrimPrefix(l.DiffID, "sha256:")
		name := path.Join(guestconfig.ImageLayersPath, "sha256", hash[:2], hash+".erofs")
		bl := b.blobs[l.Index]
		err := b.tree.Add(name, erofs.Entry{Mode: erofs.TypeRegular | 0o644, Mtime: b.p.Time, Start: bl.start, Size: bl.size})
		if err != nil {
			return nil, err
		}
	}
	super, _, err := b.tree.Finish(b.out, b.out.off)
	if err != nil {
		return nil, err
	}
	return &image.Image, b.out.put(0, super)
}

// file puts one file into the root.
func (b *rootBuilder) file(f File) error {
	e := erofs.Entry{Mode: f.Mode, Mtime: b.p.Time, Target: f.Link}
	if f.Mode&typeMask == erofs.TypeRegular {
		e.Start = b.out.off
		var r io.Reader = bytes.NewReader(f.Data)
		if f.Source != "" {
			src, _, err := source(f.Source)
			if err != nil {
				return err
			}
			defer src.Close()
			r = src
		}
		n, err := io.Copy(b.out, r)
		if err != nil {
			return err
		}
		e.Size = n
		if err := b.out.align(blockSize); err != nil {
			return err
		}
	}
	return b.tree.Add(f.Path, e)
}

// layer writes a layer's blob: its superblock, its tar as it is, and its index.
func (b *rootBuilder) layer(index int, r io.Reader) error {
	const blockSize512 = 512
	start := b.out.off
	if _, err := b.out.Write(make([]byte, erofs.SuperSize)); err != nil {
		return err
	}
	copies := &spool{near: b.p.Out}
	defer copies.close()
	tree := erofs.New(blockSize512, b.p.Time)
	if _, err := tree.AddTar(io.TeeReader(r, b.out), erofs.SuperSize, copies); err != nil {
		return fmt.Errorf("layer %d: %w", index+1, err)
	}
	if err := b.out.align(blockSize512); err != nil {
		return err
	}
	if err := copies.appendTo(b.out); err != nil {
		return err
	}
	super, size, err := tree.Finish(b.out, b.out.off-start)
	if err != nil {
		return fmt.Errorf("layer %d: %w", index+1, err)
	}
	b.blobs = append(b.blobs, blob{start, size})
	return b.out.put(start, super)
}

// spool keeps what has to wait, in a file that is made on the first write.
type spool struct {
	near string
	f    *os.File
}

func (s *spool) Write(b []byte) (int, error) {
	if s.f == nil {
		f, err := tempFile(s.near)
		if err != nil {
			return 0, err
		}
		s.f = f
		if err := os.Remove(f.Name()); err != nil {
			return 0, err
		}
	}
	return s.f.Write(b)
}

func (s *spool) appendTo(w io.Writer) error {
	if s.f == nil {
		return nil
	}
	if _, err := s.f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	_, err := io.Copy(w, s.f)
	return err
}

func (s *spool) close() {
	if s.f != nil {
		s.f.Close()
	}
}

// scratch makes the writable file system. Only the blocks that matter are
// written: the rest of the drive stays unallocated, and reads as noise once it is
// decrypted.
func scratch(ctx context.Context, p RootParams, s *sealer, off int64, id string) error {
	f, err := tempFile(p.Out)
	if err != nil {
		return err
	}
	defer f.Close()
	defer os.Remove(f.Name())
	if err := f.Truncate(s.size - off); err != nil {
		return err
	}
	if err := ext4.Make(ctx, f.Name(), ext4.Options{Label: "scratch", UUID: id, Time: p.Time, BytesPerInode: 65536}); err != nil {
		return err
	}
	live, err := ext4.Live(f)
	if err != nil {
		return err
	}
	buf := make([]byte, bufferSize)
	for _, e := range live {
		for done := int64(0); done < e.Len; {
			b := buf[:min(bufferSize, e.Len-done)]
			if _, err := f.ReadAt(b, e.Off+done); err != nil {
				return err
			}
			if err := s.seal(b, off+e.Off+done); err != nil {
				return err
			}
			done += int64(len(b))
		}
	}
	return nil
}

func roundUp(n, unit int64) int64 { return (n + unit - 1) / unit * unit }
