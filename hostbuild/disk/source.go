package disk

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"coffer/hostbuild/archive"
	"coffer/hostbuild/cache"
	"coffer/hostbuild/disk/verity"
)

// cacheRoom is how many times an archive's size must be free on the disk for its
// layers to be cached: the bundle needs the room more.
const cacheRoom = 10

// imageSource is where an image comes from: its archive, or what the cache knows of it.
type imageSource struct {
	cache  *cache.Cache
	store  *cache.Cache // takes what is read of the archive; nil: nothing does
	key    string       // of the archive in the cache; empty: none
	image  *archive.Result
	layers map[string]*cache.Layer
}

func openSource(p RootParams) *imageSource {
	s := &imageSource{cache: p.Cache}
	if p.Cache == nil {
		return s
	}
	var err error
	if s.key, err = cache.ArchiveKey(p.Archive, p.ImageRef); err != nil || s.key == "" {
		return s // archive.Read says what is wrong with it
	}
	s.image, s.layers, err = p.Cache.Archive(s.key)
	if err == nil {
		return s
	}
	var free unix.Statfs_t
	if st, err := os.Stat(p.Archive); err == nil && unix.Statfs(p.Cache.Dir(), &free) == nil &&
		int64(free.Bavail)*free.Bsize > st.Size()*cacheRoom {
		s.store = p.Cache
	}
	return s
}

func (s *imageSource) cached() bool { return s.image != nil }

func (s *imageSource) close() {
	for _, l := range s.layers {
		l.Close()
	}
}

// forget drops a layer that is not what it was, and goes back to the archive.
func (s *imageSource) forget(diffID string) {
	s.cache.Drop(diffID)
	s.close()
	s.image, s.layers, s.store = nil, nil, s.cache
}

// damagedLayer is the diff ID of a cached layer with other blocks than were stored.
type damagedLayer string

func (d damagedLayer) Error() string { return "cached layer " + string(d) + " is damaged" }

// fromCache writes all layers' blobs as the archive would give them.
func (b *rootBuilder) fromCache(ctx context.Context) error {
	for i, id := range b.source.image.Stream {
		l := b.source.layers[id]
		b.p.Progress("cached layers", int64(i), int64(len(b.source.image.Stream)))
		b.blobs = append(b.blobs, blob{start: b.out.off, size: l.Size})
		if _, err := io.Copy(b.out, contextReader{ctx, l.Blob()}); err != nil {
			return err
		}
	}
	return nil
}

// contextReader ends when its context does.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (r contextReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}

// checkCached compares the hashes of what came from the cache with those that
// were stored with it.
func (b *rootBuilder) checkCached(leaves io.ReaderAt) error {
	if !b.source.cached() {
		return nil
	}
	for i, id := range b.source.image.Stream {
		same, err := equal(b.source.layers[id].Hashes(), b.blobs[i].leaves(leaves))
		if err != nil {
			return err
		}
		if !same {
			return damagedLayer(id)
		}
	}
	return nil
}

// leaves reads the hashes of the blob's blocks.
func (bl blob) leaves(all io.ReaderAt) io.Reader {
	return io.NewSectionReader(all, bl.start/blockSize*verity.HashSize, bl.size/blockSize*verity.HashSize)
}

func equal(a, b io.Reader) (bool, error) {
	ra, rb := bufio.NewReaderSize(a, 1<<16), bufio.NewReaderSize(b, 1<<16)
	var x, y [1 << 12]byte
	for {
		n, errA := io.ReadFull(ra, x[:])
		m, errB := io.ReadFull(rb, y[:])
		for _, err := range []error{errA, errB} {
			if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
				return false, err
			}
		}
		if !bytes.Equal(x[:n], y[:m]) {
			return false, nil
		}
		if errA != nil {
			return errB != nil, nil
		}
	}
}

// store puts what was read of the archive into the cache.
func (b *rootBuilder) store(image *archive.Result, leaves io.ReaderAt) error {
	if b.source.store == nil {
		return nil
	}
	if key, err := cache.ArchiveKey(b.p.Archive, b.p.ImageRef); err != nil || key != b.source.key {
		return err // it has changed under our hands
	}
	for i, id := range image.Stream {
		if err := b.blobs[i].entry.Commit(id, b.blobs[i].leaves(leaves)); err != nil {
			return err
		}
	}
	return b.source.store.PutArchive(b.source.key, image)
}

// close drops the layers that did not make it into the cache.
func (b *rootBuilder) close() {
	for _, bl := range b.blobs {
		if bl.entry != nil {
			bl.entry.Close()
		}
	}
}

// hiddenFile is a file without a name, which lives as long as it is open.
func hiddenFile(dir string) (*os.File, error) {
	f, err := os.CreateTemp(dir, "hidden-*")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil && !os.IsNotExist(err) {
		f.Close()
		return nil, err
	}
	return f, nil
}
