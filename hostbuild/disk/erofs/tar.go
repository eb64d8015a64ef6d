package erofs

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"math"
	"path"
	"strings"
)

// maxCopied bounds the bytes of one layer's members that AddTar has to copy.
const maxCopied = 1 << 30

// Marks in layers, of the OCI image specification's layer.md.
const (
	whiteoutPrefix = ".wh."
	whiteoutMeta   = ".wh..wh."
	whiteoutOpaque = ".wh..wh..opq"
	xattrRecord    = "SCHILY.xattr."
)

// AddTar reads a layer's tar to its end, trailing padding included, and adds
// its members to the tree. The caller has the bytes it reads written into the
// image, from offset base on, a multiple of 512: the members' data stay there.
//
// The data of sparse members do not lie in a tar as they read. They are written
// to copies, each padded to a block, for the caller to append to the image at the
// next multiple of the block size behind the tar. AddTar returns the tar's size.
//
// Whiteouts become what overlayfs reads: `.wh.X` a character device 0:0 named X,
// `.wh..wh..opq` the attribute trusted.overlay.opaque of its directory.
func (t *Tree) AddTar(r io.Reader, base int64, copies io.Writer) (size int64, err error) {
	in := &counter{r: r}
	var copied []*inode // their start is relative to the first copy's until the end
	var copyEnd int64
	tr := tar.NewReader(in)
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) { // paths are judged here
			return in.n, fmt.Errorf("read the tar at %d: %w", in.n, err)
		}
		n, err := t.addMember(h, base+in.n)
		if err != nil {
			return in.n, fmt.Errorf("entry %.200q: %w", h.Name, err)
		}
		if n == nil || !n.is(TypeRegular) || !sparse(h) {
			continue
		}
		if h.Size > maxCopied-copyEnd {
			return in.n, fmt.Errorf("entry %.200q: %w: sparse members of more than %d bytes", h.Name, ErrLimit, int64(maxCopied))
		}
		if _, err := io.Copy(copies, tr); err != nil {
			return in.n, fmt.Errorf("entry %.200q: copy: %w", h.Name, err)
		}
		n.start = copyEnd
		copied = append(copied, n)
		copyEnd += h.Size
		if _, err := copies.Write(make([]byte, -copyEnd&(1<<t.bits-1))); err != nil {
			return in.n, fmt.Errorf("entry %.200q: copy: %w", h.Name, err)
		}
		copyEnd = roundUp(copyEnd, 1<<t.bits)
	}
	if _, err := io.Copy(io.Discard, in); err != nil {
		return in.n, fmt.Errorf("read the tar's padding: %w", err)
	}
	for _, n := range copied {
		n.start += roundUp(base+in.n, 1<<t.bits)
	}
	return in.n, nil
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

// sparse tells whether a member's data may lie in pieces: the old GNU form by
// its type, the PAX forms by their records.
func sparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// addMember adds one member whose data begin at start. It returns nil for what
// is not an inode of its own: a link, a mark.
func (t *Tree) addMember(h *tar.Header, start int64) (*inode, error) {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil, nil
	}
	dir, name := path.Split(strings.TrimRight(h.Name, "/"))
	switch {
	case name == whiteoutOpaque:
		return nil, t.hide(dir)
	case strings.HasPrefix(name, whiteoutMeta):
		return nil, nil // bookkeeping of aufs
	case strings.HasPrefix(name, whiteoutPrefix):
		removed := strings.TrimPrefix(name, whiteoutPrefix)
		if removed == "" || removed == "." || removed == ".." {
			return nil, fmt.Errorf("%w: a whiteout of nothing", ErrBadName)
		}
		return nil, t.remove(dir + removed)
	}
	if h.Typeflag == tar.TypeLink {
		return nil, t.Link(h.Name, h.Linkname)
	}
	if h.Uid < 0 || h.Uid > math.MaxUint32 || h.Gid < 0 || h.Gid > math.MaxUint32 {
		return nil, fmt.Errorf("%w: owner %d:%d", ErrBadEntry, h.Uid, h.Gid)
	}
	e := Entry{Mode: uint32(h.Mode & 0o7777), UID: uint32(h.Uid), GID: uint32(h.Gid), Mtime: h.ModTime}
	for k, v := range h.PAXRecords {
		name, ok := strings.CutPrefix(k, xattrRecord)
		if !ok {
			continue
		}
		if _, _, ok := xattrSpace(name); !ok {
			continue
		}
		if e.Xattrs == nil {
			e.Xattrs = map[string]string{}
		}
		e.Xattrs[strings.Clone(name)] = strings.Clone(v) // not a part of a long record
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		e.Mode |= TypeRegular
		e.Size = h.Size
		if h.Size > 0 && !sparse(h) {
			e.Start = start
		}
	case tar.TypeDir:
		e.Mode |= TypeDir
	case tar.TypeSymlink:
		e.Mode |= TypeSymlink
		e.Mode |= 0o777
		e.Target = h.Linkname
	case tar.TypeFifo:
		e.Mode |= TypeFIFO
	case tar.TypeChar, tar.TypeBlock:
		e.Mode |= TypeChar
		if h.Typeflag == tar.TypeBlock {
			e.Mode = e.Mode&^TypeMask | TypeBlock
		}
		if h.Devmajor < 0 || h.Devminor < 0 || h.Devmajor > math.MaxUint32 || h.Devminor > math.MaxUint32 {
			return nil, fmt.Errorf("%w: device number %d:%d", ErrBadEntry, h.Devmajor, h.Devminor)
		}
		e.Major, e.Minor = uint32(h.Devmajor), uint32(h.Devminor)
	default:
		return nil, fmt.Errorf("%w: type %q", ErrBadEntry, h.Typeflag)
	}
	return t.add(h.Name, e)
}
