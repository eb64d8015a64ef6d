package bundle

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"coffer/internal/guestconfig"
)

// ErrNotBundle is wrapped by errors about files that are no bundle.
var ErrNotBundle = errors.New("not a bundle")

// names are those of all files of a bundle.
var names = []string{ManifestName, Readme, LaunchVM, OVMF, Kernel, Initrd, UserConfig, UserData, Applog, CryptRoot}

// maxFile bounds the files that are no drives, in bytes. They are read as a whole.
const maxFile = 256 << 20

// Unpack unpacks the archive at name into dir, and returns the bundle's folder. It
// takes the files of a bundle and nothing else; the archive may come from anywhere.
func Unpack(ctx context.Context, name, dir string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	bad := func(format string, a ...any) (string, error) {
		return "", fmt.Errorf("%s: %w: "+format, append([]any{name, ErrNotBundle}, a...)...)
	}
	z, err := gzip.NewReader(f)
	if err != nil {
		return bad("%w", err)
	}
	top := ""
	seen := map[string]bool{}
	for tr := tar.NewReader(z); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return bad("%w", err)
		}
		folder, file := path.Split(strings.TrimSuffix(h.Name, "/"))
		if h.Typeflag == tar.TypeDir {
			folder, file = file, ""
		}
		folder = strings.TrimSuffix(folder, "/")
		switch {
		case !guestconfig.ValidCVMID(folder) || top != "" && folder != top:
			return bad("a member %q", h.Name)
		case h.Typeflag == tar.TypeDir:
		case h.Typeflag != tar.TypeReg || !slices.Contains(names, file) || seen[file] || sparse(h):
			return bad("a member %q", h.Name)
		case h.Size > maxFile && path.Ext(file) != path.Ext(CryptRoot):
			return bad("%s has %d bytes, at most %d are read", file, h.Size, maxFile)
		}
		if top == "" {
			top = folder
			if err := os.Mkdir(filepath.Join(dir, top), 0o700); err != nil {
				return "", err
			}
		}
		if h.Typeflag == tar.TypeDir {
			continue
		}
		seen[file] = true
		// A drive may be of zeros, a thousand times what the archive holds of it.
		var free unix.Statfs_t
		if err := unix.Statfs(dir, &free); err == nil && h.Size > int64(free.Bavail)*free.Bsize {
			return "", fmt.Errorf("unpack %s: %s has %d bytes, and %s %d free", name, file, h.Size, dir, int64(free.Bavail)*free.Bsize)
		}
		if err := unpackFile(ctx, filepath.Join(dir, top, file), tr); err != nil {
			return "", fmt.Errorf("unpack %s of %s: %w", file, name, err)
		}
	}
	if _, err := io.Copy(io.Discard, z); err != nil { // its checksum comes last
		return bad("%w", err)
	}
	if top == "" {
		return bad("it is empty")
	}
	return filepath.Join(dir, top), nil
}

// sparse tells whether a member may be larger than what the archive holds of it:
// a few bytes could fill any disk.
func sparse(h *tar.Header) bool {
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

func unpackFile(ctx context.Context, name string, r io.Reader) (err error) {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	for err == nil {
		if err = ctx.Err(); err == nil {
			_, err = io.CopyN(f, r, 1<<20)
		}
	}
	if err == io.EOF {
		err = nil
	}
	return err
}

// CheckFiles compares the files of the bundle in dir with its manifest.
func CheckFiles(ctx context.Context, dir string, m *Manifest) error {
	var errs []error
	listed := []string{ManifestName}
	for _, f := range m.Files {
		if !slices.Contains(names, f.Name) || slices.Contains(listed, f.Name) {
			errs = append(errs, fmt.Errorf("%s: the manifest lists it, and it is no file of a bundle, or listed twice", f.Name))
			continue
		}
		listed = append(listed, f.Name)
		got, err := describe(ctx, filepath.Join(dir, f.Name))
		switch {
		case err != nil:
			errs = append(errs, err)
		case got.Size != f.Size:
			errs = append(errs, fmt.Errorf("%s: %d bytes, the manifest says %d", f.Name, got.Size, f.Size))
		case got.SHA256 != f.SHA256:
			errs = append(errs, fmt.Errorf("%s: SHA-256 %s, the manifest says %s", f.Name, got.SHA256, f.SHA256))
		case got.PartsSHA256 != f.PartsSHA256:
			errs = append(errs, fmt.Errorf("%s: SHA-256 of its parts %s, the manifest says %s", f.Name, got.PartsSHA256, f.PartsSHA256))
		}
	}
	for _, n := range names {
		if !slices.Contains(listed, n) {
			errs = append(errs, fmt.Errorf("%s: the manifest does not list it", n))
		}
	}
	return errors.Join(errs...)
}

func describe(ctx context.Context, name string) (File, error) {
	f, err := os.Open(name)
	if err != nil {
		return File{}, err
	}
	defer f.Close()
	d := File{Name: filepath.Base(name)}
	if d.Name == CryptRoot {
		var st fs.FileInfo
		if st, err = f.Stat(); err != nil {
			return File{}, err
		}
		d.Size = st.Size()
		d.PartsSHA256, err = sumParts(d.Size, partSize, func(b []byte, off, n int64) ([]byte, error) {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			_, err := f.ReadAt(b[:n], off)
			return b[:n], err
		}, func(h hash.Hash, b []byte) { h.Write(b) })
	} else {
		h := sha256.New()
		d.Size, err = io.Copy(h, readerFunc(func(p []byte) (int, error) {
			if err := ctx.Err(); err != nil {
				return 0, err
			}
			return f.Read(p)
		}))
		d.SHA256 = hex.EncodeToString(h.Sum(nil))
	}
	if err != nil {
		return File{}, fmt.Errorf("hash %s: %w", name, err)
	}
	return d, nil
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// GuestConfig reads the guest config at the end of an initrd.
func GuestConfig(initrd []byte) (*guestconfig.Config, error) {
	const head = 110 // of a newc record, before its name; all numbers are 8 hex digits
	name := guestconfig.InitrdPath + "\x00"
	at := bytes.LastIndex(initrd, []byte(name)) - head
	none := fmt.Errorf("%w: the initrd ends without a guest config", ErrNotBundle)
	if at < 0 || string(initrd[at:at+6]) != "070701" {
		return nil, none
	}
	size, err := strconv.ParseUint(string(initrd[at+54:at+62]), 16, 32)
	start := at + (head+len(name)+3)&^3
	if err != nil || start > len(initrd) || size > uint64(len(initrd)-start) {
		return nil, none
	}
	return guestconfig.Parse(initrd[start : start+int(size)])
}

// IsArchive tells whether name is a packed bundle rather than a folder.
func IsArchive(name string) (bool, error) {
	st, err := os.Stat(name)
	if err != nil {
		return false, err
	}
	if !st.IsDir() && !st.Mode().IsRegular() {
		return false, &fs.PathError{Op: "open", Path: name, Err: ErrNotBundle}
	}
	return !st.IsDir(), nil
}
