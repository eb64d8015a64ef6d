package erofs

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
)

// CopyTar reads a layer's tar to its end and writes it to w in a plain form, for
// programs that know fewer forms: PAX headers, clean relative names, no sparse
// members. The tree gets the members as from AddTar, which refuses the same, but
// not their data: it is good for names alone.
func (t *Tree) CopyTar(r io.Reader, w io.Writer) error {
	tr, tw := tar.NewReader(r), tar.NewWriter(w)
	expanded := int64(0) // bytes of sparse members
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) { // paths are judged by addMember
			return fmt.Errorf("read the tar: %w", err)
		}
		if _, err := t.addMember(h, 0); err != nil {
			return fmt.Errorf("entry %.200q: %w", h.Name, err)
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		if sparse(h) {
			if expanded += h.Size; h.Size > maxCopied || expanded > maxCopied {
				return fmt.Errorf("entry %.200q: %w: sparse members of more than %d bytes", h.Name, ErrLimit, int64(maxCopied))
			}
		}
		out := &tar.Header{
			Format: tar.FormatPAX, Typeflag: h.Typeflag, Name: relative(h.Name), Linkname: h.Linkname, Size: h.Size, Mode: h.Mode & 0o7777,
			Uid: h.Uid, Gid: h.Gid, ModTime: h.ModTime, Devmajor: h.Devmajor, Devminor: h.Devminor, PAXRecords: map[string]string{},
		}
		if strings.HasPrefix(path.Base(out.Name), whiteoutPrefix) {
			out.ModTime = t.mtime
		}
		for k, v := range h.PAXRecords {
			if strings.HasPrefix(k, xattrRecord) {
				out.PAXRecords[k] = v
			}
		}
		switch h.Typeflag {
		case tar.TypeGNUSparse, tar.TypeCont:
			out.Typeflag = tar.TypeReg
		case tar.TypeLink:
			out.Linkname = relative(h.Linkname)
		}
		if err := tw.WriteHeader(out); err != nil {
			return fmt.Errorf("entry %.200q: %w", h.Name, err)
		}
		if _, err := io.Copy(tw, tr); err != nil {
			return fmt.Errorf("entry %.200q: %w", h.Name, err)
		}
	}
	if err := tw.Close(); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, r); err != nil {
		return fmt.Errorf("read the tar's padding: %w", err)
	}
	return nil
}

func relative(name string) string { return "." + path.Clean("/"+name) }
