// Package disk makes a CVM's drives: crypt_root (BuildRoot), in one pass over the
// image archive, and the plain drives (BuildDrive); and reads plain drives that
// come back from a host (ReadDrive, ListDrive).
//
// It needs neither root nor loop devices, nbd, device mapper or a daemon, only
// e2fsprogs. Memory stays below 256 MiB whatever the archive's size. A drive
// appears under its name when it is whole; after an error nothing is left.
//
// The package knows nothing of keys' origin, of KBSes or of bundles.
package disk

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// Errors that a caller may tell apart. Those of reading the archive are in
// package archive.
var (
	ErrNoSpace  = errors.New("no space left on the build host")
	ErrTooSmall = errors.New("the drive is too small")
	ErrBadFile  = errors.New("a file that a drive cannot take")
)

// File is a file, directory or link that goes into a drive, owned by 0:0.
type File struct {
	Path   string // absolute, in the drive
	Mode   uint32 // type and permissions as in stat(2): regular, directory or symbolic link
	Source string // of a regular file: the host file with its contents, or
	Data   []byte // the contents
	Link   string // of a symbolic link: its target
}

// partial is a file that gets its name when it is whole.
type partial struct {
	*os.File
	out string
}

func newPartial(out string, mode os.FileMode) (*partial, error) {
	f, err := tempFile(out)
	if err != nil {
		return nil, err
	}
	if err := f.Chmod(mode); err != nil {
		return nil, errors.Join(err, f.Close(), os.Remove(f.Name()))
	}
	return &partial{f, out}, nil
}

// tempFile makes a hidden file beside out, where there is room for large files.
func tempFile(out string) (*os.File, error) {
	return os.CreateTemp(filepath.Dir(out), "."+filepath.Base(out)+".*")
}

// finish gives the file its name, or removes it where err is not nil.
func (p *partial) finish(err error) error {
	err = errors.Join(err, p.Close())
	if err == nil {
		err = os.Rename(p.Name(), p.out)
	}
	if err != nil {
		os.Remove(p.Name())
	}
	return err
}

// explain adds what a user can do about an error of making out.
func explain(out string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), errors.Is(err, syscall.EFBIG):
		return fmt.Errorf("make %s: %w: free some in %s or build elsewhere: %w", out, ErrNoSpace, filepath.Dir(out), err)
	}
	return fmt.Errorf("make %s: %w", out, err)
}

const typeMask = uint32(syscall.S_IFMT)

// source opens a regular host file.
func source(name string) (*os.File, int64, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, 0, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = &fs.PathError{Op: "read", Path: name, Err: fmt.Errorf("%w: not a regular file", ErrBadFile)}
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, st.Size(), nil
}
