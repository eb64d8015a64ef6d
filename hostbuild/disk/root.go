package disk

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"coffer/hostbuild/archive"
	"coffer/hostbuild/cache"
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
	Out        Target // gets the qcow2 image; what is in it is replaced
	Temp       string // folder for large temporary files
	Size       int64  // of the virtual drive in bytes; rounded up to 4096
	Passphrase []byte // as the KBS stores it
	Archive    string // the image, as package archive reads it
	ImageRef   string // chooses among several images; empty: the only one
	Files      []File // of the read-only root, beside the image
	FileKeys   bool   // folders of the writable part can have keys of their own
	Time       time.Time
	Rand       io.Reader    // nil: crypto/rand. The same bytes give the same drive.
	Cache      *cache.Cache // of converted layers; may be nil
	// Compression of the layers, by mkfs.erofs: "lz4" or "zstd". Empty: none. The
	// cache takes no compressed layers.
	Compression string
	// Progress is told of each stage how far it is, in bytes; "archive" is the
	// only long one.
	Progress func(stage string, done, total int64)
}

// Target is a file, or a part of one.
type Target interface {
	io.WriterAt
	Truncate(size int64) error
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
	FromCache    bool  // the archive was not decoded
	// CacheErr tells why the image could not be cached, which harms no build.
	CacheErr error
}

// minScratch is the least room for the writable part of crypt_root, in bytes.
const minScratch = 64 << 20

// scratchAlign is the alignment of the writable part, for no reason but order.
const scratchAlign = 1 << 20

// BuildRoot makes crypt_root: a LUKS2 header, and encrypted behind it a read-only
// EROFS of p.Files and the image, its dm-verity tree, and an empty ext4 over the
// rest. The archive streams through once. Its layers stay the tars they are, each
// with an EROFS index, in /image/layers; /image/meta.tar is the rest of the image.
//
// The verity root hash depends on p.Files, p.Time and the archive alone; with
// p.Compression on the version of mkfs.erofs besides.
func BuildRoot(ctx context.Context, p RootParams) (*Root, error) {
	if p.Rand == nil {
		p.Rand = rand.Reader
	}
	if p.Progress == nil {
		p.Progress = func(string, int64, int64) {}
	}
	p.Size = roundUp(p.Size, blockSize)
	name := filepath.Join(p.Temp, "crypt_root") // for messages
	if p.Size < luks2.DataOffset+minScratch {
		return nil, explain(name, fmt.Errorf("%w: %d bytes, with %d for the writable part alone", ErrTooSmall, p.Size, minScratch))
	}
	if p.Compression != "" {
		if err := checkCompression(ctx, p.Compression); err != nil {
			return nil, err
		}
		p.Cache = nil
	}
	source := openSource(p)
	defer source.close()
	root, err := buildRoot(ctx, p, source)
	if damaged := new(damagedLayer); errors.As(err, damaged) {
		source.forget(string(*damaged))
		root, err = buildRoot(ctx, p, source)
	}
	if err != nil {
		return nil, explain(name, err)
	}
	return root, nil
}

// The verity tree is made under a salt and a UUID that never change: a salt is
// against collisions that are prepared for it, which SHA-256 does not need, and so
// the same root has the same root hash, and a layer's hashes can be cached.
func veritySalt() [verity.SaltSize]byte { return sha256.Sum256([]byte("coffer verity salt, cache v1")) }

func verityUUID() [16]byte {
	sum := sha256.Sum256([]byte("coffer verity UUID"))
	return [16]byte(sum[:])
}

func buildRoot(ctx context.Context, p RootParams, source *imageSource) (*Root, error) {
	if err := p.Out.Truncate(0); err != nil {
		return nil, err
	}
	drive, err := qcow2.NewWriter(p.Out, p.Size)
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
	var scratchID [16]byte
	if _, err := io.ReadFull(p.Rand, scratchID[:]); err != nil {
		return nil, fmt.Errorf("read randomness: %w", err)
	}
	leaves, err := hiddenFile(p.Temp)
	if err != nil {
		return nil, err
	}
	defer leaves.Close()

	salt := veritySalt()
	s := &sealer{drive: drive, cipher: cipher, size: p.Size - luks2.DataOffset}
	b := &rootBuilder{p: p, source: source, out: newPayload(s, salt[:], leaves), tree: erofs.New(blockSize, p.Time)}
	defer b.close()
	image, err := b.build(ctx)
	if err := b.out.close(err); err != nil {
		return nil, err
	}

	blocks := b.out.off / blockSize
	treeOff := b.out.off
	scratchOff := roundUp(treeOff+verity.TreeSize(blocks), scratchAlign)
	if scratchOff+minScratch > s.size {
		need := roundUp(luks2.DataOffset+scratchOff+minScratch, 1<<20)
		return nil, fmt.Errorf("%w: it has %d bytes, and needs at least %d (%d MiB): raise root_drive_size", ErrTooSmall, p.Size, need, need>>20)
	}
	if err := b.checkCached(leaves); err != nil {
		return nil, err
	}
	hash, err := verity.Write(&sequence{s, treeOff}, verity.Params{Salt: salt[:], UUID: verityUUID(), Blocks: blocks, Leaves: leaves})
	if err != nil {
		return nil, fmt.Errorf("verity tree: %w", err)
	}
	p.Progress("scratch", 0, s.size-scratchOff)
	if err := scratch(ctx, p, s, scratchOff, luks2.UUID(scratchID)); err != nil {
		return nil, fmt.Errorf("writable part: %w", err)
	}
	size, err := drive.Finish()
	if err != nil {
		return nil, err
	}
	if err := p.Out.Truncate(size); err != nil {
		return nil, err
	}
	sum := sha256.Sum256(header)
	return &Root{
		HeaderSHA256: hex.EncodeToString(sum[:]), DataOffset: luks2.DataOffset, PayloadSize: s.size,
		Verity: guestconfig.Verity{
			RootHash: hex.EncodeToString(hash[:]), Salt: hex.EncodeToString(salt[:]),
			DataBlocks: blocks, HashStartBlock: treeOff/blockSize + 1, // behind verity's superblock
		},
		Scratch: guestconfig.Scratch{Offset: scratchOff, Size: s.size - scratchOff},
		Image:   image.Image, EROFSSize: b.out.off,
		FromCache: source.cached(), CacheErr: b.store(image, leaves),
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
	p      RootParams
	source *imageSource
	out    *payload
	tree   *erofs.Tree
	blobs  []blob // of the layers, as they came

	modules []string // Python's, of all layers
}

// blob is a layer in the root.
type blob struct {
	start, size int64
	entry       *cache.NewLayer // nil without a cache, and from it
}

func (b *rootBuilder) build(ctx context.Context) (*archive.Result, error) {
	if _, err := b.out.Write(make([]byte, erofs.SuperSize)); err != nil {
		return nil, err
	}
	for _, f := range b.p.Files {
		if err := b.file(f); err != nil {
			return nil, fmt.Errorf("put %s into the root: %w", f.Path, err)
		}
	}
	image, err := b.image(ctx)
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
	b.out.put(0, super)
	return image, nil
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

// image writes the layers' blobs, from the cache or from the archive.
func (b *rootBuilder) image(ctx context.Context) (*archive.Result, error) {
	if b.source.cached() {
		return b.source.image, b.fromCache(ctx)
	}
	layer := b.layer
	if b.p.Compression != "" {
		layer = func(index int, r io.Reader) error { return b.packedLayer(ctx, index, r) }
	}
	image, err := archive.Read(ctx, b.p.Archive, archive.Options{
		Ref: b.p.ImageRef, Layer: layer,
		Progress: func(done, total int64) { b.p.Progress("archive", done, total) },
	})
	if err != nil {
		return nil, err
	}
	slices.Sort(b.modules)
	image.Image.PythonModules = slices.Compact(b.modules)
	return image, nil
}

// layer writes a layer's blob: its superblock, its tar as it is, and its index.
// The blob depends on the tar alone.
func (b *rootBuilder) layer(index int, r io.Reader) error {
	const blockSize512 = 512
	bl := blob{start: b.out.off}
	var out io.Writer = b.out
	if b.source.store != nil {
		bl.entry = b.source.store.NewLayer(b.out.sealer.size - b.out.off)
		out = io.MultiWriter(b.out, bl.entry)
	}
	b.blobs = append(b.blobs, bl)
	if _, err := out.Write(make([]byte, erofs.SuperSize)); err != nil {
		return err
	}
	copies := &spool{dir: b.p.Temp}
	defer copies.close()
	tree := erofs.New(blockSize512, time.Unix(0, 0))
	if _, err := tree.AddTar(io.TeeReader(r, out), erofs.SuperSize, copies); err != nil {
		return fmt.Errorf("layer %d: %w", index+1, err)
	}
	if _, err := out.Write(make([]byte, -(b.out.off-bl.start)&(blockSize512-1))); err != nil {
		return err
	}
	if err := copies.appendTo(out); err != nil {
		return err
	}
	b.modules = append(b.modules, pythonModules(tree)...)
	super, size, err := tree.Finish(out, b.out.off-bl.start)
	if err != nil {
		return fmt.Errorf("layer %d: %w", index+1, err)
	}
	b.blobs[index].size = size
	b.out.put(bl.start, super)
	if bl.entry != nil {
		bl.entry.EndBlob(super)
	}
	return nil
}

// pythonModules are the names that Python finds in a layer's folders of packages.
func pythonModules(layer *erofs.Tree) []string {
	var modules []string
	for _, name := range layer.In("site-packages", "dist-packages") {
		name, _, _ = strings.Cut(name, ".") // of a module in one file
		modules = append(modules, name)
	}
	return modules
}

// spool keeps what has to wait, in a file that is made on the first write.
type spool struct {
	dir string
	f   *os.File
}

func (s *spool) Write(b []byte) (int, error) {
	if s.f == nil {
		f, err := hiddenFile(s.dir)
		if err != nil {
			return 0, err
		}
		s.f = f
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
	f, err := os.CreateTemp(p.Temp, "scratch-*")
	if err != nil {
		return err
	}
	defer f.Close()
	defer os.Remove(f.Name())
	if err := f.Truncate(s.size - off); err != nil {
		return err
	}
	if err := ext4.Make(ctx, f.Name(), ext4.Options{Label: "scratch", UUID: id, Time: p.Time, BytesPerInode: 65536, FileKeys: p.FileKeys}); err != nil {
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
