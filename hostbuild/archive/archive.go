// Package archive reads container image archives as they stream by: those of
// `docker save` (the old layout with ID/layer.tar and the new one), of podman and
// skopeo, and OCI layouts, as a plain, gzip'd or zstd'd tar, with plain, gzip'd or
// zstd'd layers in it.
//
// An archive names its layers at its end, so each layer is handed to the caller
// when it comes by, and only afterwards Read says which of them the image is made
// of. What a file is shows in its content, never in its name; a layer is found by
// the SHA-256 of its decoded tar, which the image's config demands (its diff ID),
// so file names, links and compression inside an archive carry no trust.
//
// The package knows nothing of disks or file systems.
package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
)

// Errors of Read. Their messages name the archive and what to do.
var (
	ErrNotArchive = errors.New("not an image archive")
	ErrTruncated  = errors.New("the archive ends too early")
	ErrDamaged    = errors.New("the archive is damaged")
	ErrTwoImages  = errors.New("the archive holds several images")
	ErrNoImage    = errors.New("the archive does not hold that image")
	ErrMissing    = errors.New("a part of the image is missing")
	ErrPlatform   = errors.New("the image is not for linux/amd64")
	ErrLimit      = errors.New("the archive is over a limit")
)

// Limits of an archive.
const (
	maxFiles     = 1 << 16  // entries of the outer tar
	maxName      = 4096     // bytes of such an entry's name
	maxDocument  = 4 << 20  // bytes of one JSON document
	maxDocuments = 32 << 20 // bytes of all of them
	maxLayers    = 1 << 10  // layers that the archive holds
)

// Image describes the chosen image.
type Image struct {
	Name         string          // the name in the index of Result.Meta
	Tags         []string        // all names that the archive gives it, in full form
	Digest       string          // sha256:<hex> of the manifest in Result.Meta
	ConfigDigest string          // sha256:<hex>
	Config       json.RawMessage // as it stands in the archive
	Entrypoint   []string
	Cmd          []string
	DiffIDs      []string // sha256:<hex>, lowest layer first
	Platform     string   // linux/amd64
	// PythonModules are those installed in any layer; who takes the layers in
	// fills them in.
	PythonModules []string
}

// Layer is one layer of the image.
type Layer struct {
	DiffID string
	Size   int64 // bytes of its tar
	Index  int   // of the call of Options.Layer that read it
}

// Options says what to read and whom to give it to.
type Options struct {
	// Ref chooses among several images: a name, or the digest of a manifest or
	// config. Empty: the only one.
	Ref string
	// Layer gets the decoded tar of each layer that comes by, in the archive's
	// order, whether the image turns out to need it or not. It reads to the end.
	Layer func(index int, r io.Reader) error
	// Progress is told how many bytes of the archive file have been read.
	Progress func(done, total int64)
}

// Result is what an archive turned out to hold.
type Result struct {
	Image  Image
	Layers []Layer // of the image, in the order of DiffIDs
	Meta   []byte  // an OCI layout tar with index, manifest and config, no layers
	// Stream has the diff ID of each layer that Options.Layer got, in its order.
	Stream []string
}

// Read reads the archive at name once, from the beginning to the end.
func Read(ctx context.Context, name string, o Options) (*Result, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("open image archive: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("open image archive: %w", err)
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("read image archive %s: %w: it is not a regular file; give the file that `docker save -o` writes", name, ErrNotArchive)
	}
	s := &scan{ctx: ctx, o: o, files: map[string]file{}, docs: map[string][]byte{}, layers: map[string]Layer{}}
	err = s.outer(&progress{ctx: ctx, r: f, total: st.Size(), tell: o.Progress})
	if err != nil {
		return nil, fmt.Errorf("read image archive %s: %w", name, err)
	}
	res, err := s.resolve()
	if err != nil {
		return nil, fmt.Errorf("image archive %s: %w", name, err)
	}
	res.Stream = s.stream
	return res, nil
}

// progress counts what is read of the file, and ends when ctx does.
type progress struct {
	ctx         context.Context
	r           io.Reader
	done, total int64
	tell        func(done, total int64)
}

func (p *progress) Read(b []byte) (int, error) {
	if err := p.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := p.r.Read(b)
	p.done += int64(n)
	if p.tell != nil {
		p.tell(p.done, p.total)
	}
	return n, err
}

// scan is what is remembered while an archive streams by.
type scan struct {
	ctx      context.Context
	o        Options
	files    map[string]file   // by clean path
	docs     map[string][]byte // JSON documents, by hex SHA-256
	docBytes int
	layers   map[string]Layer // by diff ID
	stream   []string         // diff IDs of the layers so far
}

// file is one regular file of the archive.
type file struct {
	doc    string // a JSON document: its hex SHA-256
	diffID string // a layer
}

func (s *scan) outer(r io.Reader) error {
	head, err := sniff(&r, blockSize)
	if err != nil {
		return err
	}
	if len(head) == 0 {
		return fmt.Errorf("%w: the file is empty; write it again with `docker save -o`", ErrNotArchive)
	}
	kind := kindOf(head)
	dec, err := decode(s.ctx, r, kind)
	if err != nil {
		return err
	}
	defer dec.Close()
	r = dec
	if head, err = sniff(&r, blockSize); err != nil {
		return err
	}
	if !isTar(head) {
		return fmt.Errorf("%w: it holds no tar (compression: %s); write it with `docker save -o`, `podman save` or `skopeo copy ... docker-archive:`", ErrNotArchive, kind)
	}
	tr := tar.NewReader(r)
	for n := 0; ; n++ {
		if err := s.ctx.Err(); err != nil {
			return err
		}
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) { // no path is used
			return tarError(err)
		}
		if n == maxFiles {
			return fmt.Errorf("%w: more than %d files", ErrLimit, maxFiles)
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		if len(h.Name) > maxName {
			return fmt.Errorf("%w: a file name of %d bytes", ErrLimit, len(h.Name))
		}
		f, err := s.read(tr, h.Size)
		if err != nil {
			return fmt.Errorf("file %q: %w", h.Name, tarError(err))
		}
		name := clean(h.Name)
		if first, twice := s.files[name]; twice && first != f { // programs differ in which of them counts
			return fmt.Errorf("%w: it holds two files %q; `docker save` or copy it again", ErrDamaged, name)
		}
		s.files[name] = f
	}
	// A compressed stream shows at its end that it is whole.
	if _, err := io.Copy(io.Discard, r); err != nil {
		return tarError(err)
	}
	return nil
}

// read takes in one file of the archive.
func (s *scan) read(r io.Reader, size int64) (file, error) {
	head, err := sniff(&r, blockSize)
	if err != nil {
		return file{}, err
	}
	kind := kindOf(head)
	switch {
	case kind == plain && !isTar(head):
		if size <= maxDocument && looksLikeJSON(head) {
			return s.document(r)
		}
		return file{}, nil
	case kind == plain:
		return s.layer(r)
	}
	dec, err := decode(s.ctx, r, kind)
	if err != nil {
		return file{}, err
	}
	defer dec.Close() // before r is used again
	var in io.Reader = dec
	if head, err = sniff(&in, blockSize); err != nil {
		return file{}, err
	}
	if !isTar(head) {
		return file{}, nil // an artifact of another kind
	}
	return s.layer(in)
}

func (s *scan) document(r io.Reader) (file, error) {
	b, err := io.ReadAll(r)
	if err != nil {
		return file{}, err
	}
	if s.docBytes += len(b); s.docBytes > maxDocuments {
		return file{}, fmt.Errorf("%w: more than %d bytes of JSON documents", ErrLimit, maxDocuments)
	}
	sum := sha256.Sum256(b)
	digest := hex.EncodeToString(sum[:])
	s.docs[digest] = b
	return file{doc: digest}, nil
}

func (s *scan) layer(r io.Reader) (file, error) {
	index := len(s.stream)
	if index == maxLayers {
		return file{}, fmt.Errorf("%w: more than %d layers", ErrLimit, maxLayers)
	}
	h := sha256.New()
	in := &counter{r: io.TeeReader(r, h)}
	if err := s.o.Layer(index, in); err != nil {
		return file{}, err
	}
	if n, err := in.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		return file{}, errors.Join(errors.New("internal error: the layer was not read to its end"), err)
	}
	id := "sha256:" + hex.EncodeToString(h.Sum(nil))
	if _, twice := s.layers[id]; !twice {
		s.layers[id] = Layer{DiffID: id, Size: in.n, Index: index}
	}
	s.stream = append(s.stream, id)
	return file{diffID: id}, nil
}

type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// sniff returns the first n bytes of *r, or fewer where it is shorter, and lets
// *r begin with them again.
func sniff(r *io.Reader, n int) ([]byte, error) {
	head := make([]byte, n)
	got, err := io.ReadFull(*r, head)
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return nil, tarError(err)
	}
	head = head[:got]
	*r = io.MultiReader(bytes.NewReader(head), *r)
	return head, nil
}

const blockSize = 512 // of tar

// isTar tells whether a tar begins with head: a header whose checksum is right,
// or a block of zeros, which is an empty tar.
func isTar(head []byte) bool {
	if len(head) < blockSize {
		return false
	}
	_, err := tar.NewReader(bytes.NewReader(head)).Next()
	return !errors.Is(err, tar.ErrHeader)
}

func looksLikeJSON(head []byte) bool {
	head = bytes.TrimLeft(head, " \t\r\n")
	return len(head) > 0 && (head[0] == '{' || head[0] == '[')
}

func clean(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }
