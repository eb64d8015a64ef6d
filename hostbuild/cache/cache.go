// Package cache keeps what image archives were converted to, so that the next
// bundle from the same archive need not decode it again.
//
// Below DIR/v2 lie
//
//	layers/HEX      a layer by its diff ID: its blob (superblock, tar, index), the
//	                verity hash of each block of it, and a seal over those
//	archives/HEX    what an archive file turned out to hold, by that file's place,
//	                size and times
//
// An entry is used only when it is whole: the seal binds the hashes to the diff
// ID, and the builder, which hashes every block anyway, compares them. A file
// that was changed in any way is another archive.
//
// The cache holds what the archives hold, in plain, for its owner alone; never a
// key. The version in the path stands for the layout of blobs and the salt of the
// hashes: whoever changes those counts it up.
package cache

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"coffer/hostbuild/archive"
)

const (
	version   = "v2"
	blockSize = 4096
	hashSize  = sha256.Size
	sealSize  = sha256.Size
	newPrefix = ".new-"
)

var (
	// ErrDamaged is wrapped by errors about entries that are not what was stored.
	ErrDamaged = errors.New("damaged cache entry")
	// ErrTooLarge is of a layer that is larger than its drive.
	ErrTooLarge = errors.New("too large for the drive")
)

// Cache is a folder of entries. Several processes may use it at once.
type Cache struct{ dir string }

// Open opens the cache in dir, and makes it where there is none. It removes what
// builds that were killed have left half-made.
func Open(dir string) (*Cache, error) {
	c := &Cache{filepath.Join(dir, version)}
	for _, d := range []string{c.layers(), c.archives()} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("cache: %w", err)
		}
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return nil, fmt.Errorf("cache %s: %w", dir, err)
	}
	if int(st.Uid) != os.Geteuid() || st.Mode&0o022 != 0 {
		return nil, fmt.Errorf("cache %s: others may write to it: it must belong to uid %d, mode 0700; `chmod go-w` it, or set another cache_dir", dir, os.Geteuid())
	}
	for _, d := range []string{c.layers(), c.archives()} {
		if err := removeStale(d); err != nil {
			return nil, fmt.Errorf("cache: %w", err)
		}
	}
	return c, nil
}

// Dir is where the entries lie.
func (c *Cache) Dir() string { return c.dir }

func (c *Cache) layers() string   { return filepath.Join(c.dir, "layers") }
func (c *Cache) archives() string { return filepath.Join(c.dir, "archives") }

// removeStale removes new files that nobody holds the lock of.
func removeStale(dir string) error {
	names, err := filepath.Glob(filepath.Join(dir, newPrefix+"*"))
	if err != nil {
		return err
	}
	for _, name := range names {
		f, err := os.Open(name)
		if err != nil {
			continue // another process was faster
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			os.Remove(name)
		}
		f.Close()
	}
	return nil
}

// create makes a locked new file in dir.
func create(dir string) (*os.File, error) {
	f, err := os.CreateTemp(dir, newPrefix)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(err, f.Close(), os.Remove(f.Name()))
	}
	return f, nil
}

// Layer is a stored layer.
type Layer struct {
	Size int64 // of the blob, a multiple of 4096

	f *os.File
}

// Layer opens the layer with the diff ID "sha256:<hex>". One that is not there
// gives fs.ErrNotExist. It may be pruned while it is open.
func (c *Cache) Layer(diffID string) (*Layer, error) {
	name, err := c.layerFile(diffID)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	l := &Layer{f: f}
	if err := l.check(diffID); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	now := time.Now()
	os.Chtimes(name, now, now) // for Prune; a read-only cache does without
	return l, nil
}

func (c *Cache) layerFile(diffID string) (string, error) {
	h, ok := strings.CutPrefix(diffID, "sha256:")
	if b, err := hex.DecodeString(h); !ok || err != nil || len(b) != sha256.Size {
		return "", fmt.Errorf("%w: %q is no diff ID", ErrDamaged, diffID)
	}
	return filepath.Join(c.layers(), h), nil
}

func (l *Layer) check(diffID string) error {
	st, err := l.f.Stat()
	if err != nil {
		return err
	}
	blocks := (st.Size() - sealSize) / (blockSize + hashSize)
	if blocks <= 0 || st.Size() != blocks*(blockSize+hashSize)+sealSize {
		return fmt.Errorf("%w: %s has %d bytes", ErrDamaged, l.f.Name(), st.Size())
	}
	l.Size = blocks * blockSize
	s := newSeal(diffID)
	if _, err := io.Copy(s, l.Hashes()); err != nil {
		return err
	}
	stored := make([]byte, sealSize)
	if _, err := l.f.ReadAt(stored, st.Size()-sealSize); err != nil {
		return err
	}
	if !bytes.Equal(stored, s.Sum(nil)) {
		return fmt.Errorf("%w: %s does not hold the hashes of %s", ErrDamaged, l.f.Name(), diffID)
	}
	return nil
}

// newSeal starts what binds a layer's hashes to its diff ID.
func newSeal(diffID string) hash.Hash {
	h := sha256.New()
	io.WriteString(h, diffID+"\n")
	return h
}

// Blob reads the layer's blob. Whoever uses it compares its blocks with Hashes.
func (l *Layer) Blob() io.Reader { return io.NewSectionReader(l.f, 0, l.Size) }

// Hashes reads the SHA-256 of each block of the blob.
func (l *Layer) Hashes() io.Reader {
	return io.NewSectionReader(l.f, l.Size, l.Size/blockSize*hashSize)
}

// Close closes the layer.
func (l *Layer) Close() error { return l.f.Close() }

// Drop removes a layer that turned out to be damaged.
func (c *Cache) Drop(diffID string) error {
	name, err := c.layerFile(diffID)
	if err != nil {
		return err
	}
	return os.Remove(name)
}

// NewLayer is a layer on its way into the cache. An error of writing is kept and
// ends it, since no build fails for its cache.
type NewLayer struct {
	c    *Cache
	f    *os.File
	w    *bufio.Writer
	left int64
	err  error
}

// NewLayer starts a layer of at most so many bytes: a small archive must not fill
// the disk with layers that no drive will hold.
func (c *Cache) NewLayer(most int64) *NewLayer {
	n := &NewLayer{c: c, left: most}
	if n.f, n.err = create(c.layers()); n.err == nil {
		n.w = bufio.NewWriterSize(n.f, 1<<20)
	}
	return n
}

// Write appends to the blob. It reports no error: Commit does.
func (n *NewLayer) Write(p []byte) (int, error) {
	if n.left -= int64(len(p)); n.err == nil && n.left < 0 {
		n.err = ErrTooLarge
	}
	if n.err == nil {
		_, n.err = n.w.Write(p)
	}
	return len(p), nil
}

// EndBlob ends the blob and puts its first part, which was written as zeros, in place.
func (n *NewLayer) EndBlob(first []byte) {
	if n.err == nil {
		n.err = n.w.Flush()
	}
	if n.err == nil {
		_, n.err = n.f.WriteAt(first, 0)
	}
	n.w = nil // its buffer
}

// Commit stores the layer under its diff ID, with its blocks' hashes.
func (n *NewLayer) Commit(diffID string, hashes io.Reader) error {
	name, err := n.c.layerFile(diffID)
	if n.err = cmp.Or(n.err, err); n.err != nil {
		return n.err
	}
	seal := newSeal(diffID)
	if _, n.err = io.Copy(io.MultiWriter(n.f, seal), hashes); n.err != nil {
		return n.err
	}
	if _, n.err = n.f.Write(seal.Sum(nil)); n.err != nil {
		return n.err
	}
	n.err = os.Rename(n.f.Name(), name)
	return n.err
}

// Close frees what is left, and removes a layer that was not committed.
func (n *NewLayer) Close() {
	if n.f != nil {
		os.Remove(n.f.Name()) // after Commit there is nothing of that name
		n.f.Close()
	}
}

// archiveEntry is the file of an archive. Config stands beside Result because
// JSON inside of JSON does not keep its blanks.
type archiveEntry struct {
	Key    string
	Config []byte
	Result archive.Result
}

// ArchiveKey is the identity of an archive file, as it is now, and of the image
// in it that is asked for. A file that has changed within the last second gets
// none: it might change again without a sign.
func ArchiveKey(name, ref string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(name, &st); err != nil {
		return "", &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	if time.Since(time.Unix(st.Ctim.Unix())) < time.Second {
		return "", nil
	}
	return fmt.Sprintf("dev %d ino %d size %d mtime %d.%09d ctime %d.%09d ref %q",
		st.Dev, st.Ino, st.Size, st.Mtim.Sec, st.Mtim.Nsec, st.Ctim.Sec, st.Ctim.Nsec, ref), nil
}

func (c *Cache) archiveFile(key string) string {
	sum := sha256.Sum256([]byte(key))
	return filepath.Join(c.archives(), hex.EncodeToString(sum[:]))
}

// Archive returns what the archive with this key holds, with all layers that it
// streamed, by diff ID. The caller closes the layers. What is not there, in whole,
// gives fs.ErrNotExist.
func (c *Cache) Archive(key string) (*archive.Result, map[string]*Layer, error) {
	b, err := os.ReadFile(c.archiveFile(key))
	if err != nil {
		return nil, nil, err
	}
	sum, doc, _ := bytes.Cut(b, []byte("\n"))
	want := sha256.Sum256(doc)
	var e archiveEntry
	if string(sum) != hex.EncodeToString(want[:]) || json.Unmarshal(doc, &e) != nil || e.Key != key {
		return nil, nil, fmt.Errorf("%w: %s", ErrDamaged, c.archiveFile(key))
	}
	e.Result.Image.Config = e.Config
	layers := map[string]*Layer{}
	for _, id := range e.Result.Stream {
		if layers[id] != nil {
			continue
		}
		l, err := c.Layer(id)
		if err != nil {
			for _, l := range layers {
				l.Close()
			}
			return nil, nil, err
		}
		layers[id] = l
	}
	return &e.Result, layers, nil
}

// PutArchive stores what the archive with this key holds.
func (c *Cache) PutArchive(key string, r *archive.Result) error {
	e := archiveEntry{Key: key, Config: r.Image.Config, Result: *r}
	e.Result.Image.Config = nil
	doc, err := json.Marshal(e)
	if err != nil {
		return err
	}
	f, err := create(c.archives())
	if err != nil {
		return err
	}
	defer f.Close()
	defer os.Remove(f.Name())
	sum := sha256.Sum256(doc)
	if _, err := fmt.Fprintf(f, "%x\n%s", sum, doc); err != nil {
		return err
	}
	return os.Rename(f.Name(), c.archiveFile(key))
}

// Pruned says what Prune did.
type Pruned struct {
	Removed, Kept int   // layers
	Freed, Left   int64 // bytes
}

// Prune removes the layers that were not used for the longest time until no more
// than limit bytes are left, and what the cache knows of archives that miss one then.
func (c *Cache) Prune(limit int64) (p Pruned, err error) {
	type entry struct {
		name string
		size int64
		used time.Time
	}
	var all []entry
	list, err := os.ReadDir(c.layers())
	if err != nil {
		return p, fmt.Errorf("cache: %w", err)
	}
	for _, d := range list {
		info, err := d.Info()
		if err != nil || strings.HasPrefix(d.Name(), newPrefix) {
			continue // just gone, or not there yet
		}
		all = append(all, entry{filepath.Join(c.layers(), d.Name()), allocated(info), info.ModTime()})
	}
	slices.SortFunc(all, func(a, b entry) int { return b.used.Compare(a.used) })
	for _, e := range all {
		if p.Left+e.size <= limit {
			p.Left += e.size
			p.Kept++
			continue
		}
		if err := os.Remove(e.name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return p, fmt.Errorf("cache: %w", err)
		}
		p.Freed += e.size
		p.Removed++
	}
	return p, c.pruneArchives()
}

func (c *Cache) pruneArchives() error {
	list, err := os.ReadDir(c.archives())
	if err != nil {
		return fmt.Errorf("cache: %w", err)
	}
	for _, d := range list {
		name := filepath.Join(c.archives(), d.Name())
		b, err := os.ReadFile(name)
		if err != nil || strings.HasPrefix(d.Name(), newPrefix) {
			continue
		}
		_, doc, _ := bytes.Cut(b, []byte("\n"))
		var e archiveEntry
		whole := json.Unmarshal(doc, &e) == nil
		for _, id := range e.Result.Stream {
			file, err := c.layerFile(id)
			if err == nil {
				_, err = os.Stat(file)
			}
			whole = whole && err == nil
		}
		if !whole {
			os.Remove(name)
		}
	}
	return nil
}

func allocated(info fs.FileInfo) int64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Blocks * 512
	}
	return info.Size()
}
