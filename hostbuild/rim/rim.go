// Package rim keeps a folder of NVIDIA's reference integrity manifests on the
// build host: it fetches them, and tells what a folder holds. Nothing is kept that
// does not verify at the time. It does not know which devices a site has.
package rim

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	gpurim "coffer/internal/gpu/rim"
)

// maxFiles is the number of files of one id that a folder can hold; their names
// end in .xml, .2.xml and so on to .9.xml.
const maxFiles = 9

// Info tells what a file is.
type Info struct {
	ID      string    `json:"id"`
	File    string    `json:"file"`
	SHA256  string    `json:"sha256"`
	Product string    `json:"product,omitempty"`
	Edition string    `json:"edition,omitempty"`
	Version string    `json:"version,omitempty"`
	Active  int       `json:"measurements,omitempty"`
	Until   time.Time `json:"valid_until,omitzero"`
	Err     error     `json:"-"` // why it does not verify
}

// Inspect reads and verifies a file. The id is what its name says.
func Inspect(path string, root *x509.Certificate, now time.Time) Info {
	id, _ := gpurim.FileID(path)
	file, err := gpurim.ReadFile(path)
	if err != nil {
		return Info{ID: id, File: path, Err: err}
	}
	return inspect(id, file, root, now)
}

func inspect(id string, file gpurim.File, root *x509.Certificate, now time.Time) Info {
	info := Info{ID: id, File: file.Name, SHA256: file.SHA256}
	r, err := gpurim.Parse(file.Data)
	if err != nil {
		info.Err = err
		return info
	}
	info.Product, info.Edition, info.Version, info.Active = r.Product, r.Edition, r.Version, r.Active()
	info.Until = r.Chain[0].NotAfter
	for _, c := range r.Chain {
		if c.NotAfter.Before(info.Until) {
			info.Until = c.NotAfter
		}
	}
	info.Err = r.Verify(root, now)
	return info
}

// List inspects every file of a folder that has a RIM's name.
func List(dir string, root *x509.Certificate, now time.Time) ([]Info, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("folder of RIMs: %w", err)
	}
	var list []Info
	for _, e := range entries {
		if _, ok := gpurim.FileID(e.Name()); ok && e.Type().IsRegular() {
			list = append(list, Inspect(filepath.Join(dir, e.Name()), root, now))
		}
	}
	return list, nil
}

// Fetch asks source for the RIM of id and keeps it in dir. Ids are re-issued with
// other content: where dir has other files of the id the new one is added beside
// them, and either may match a device. added is false where dir has this content.
func Fetch(ctx context.Context, source gpurim.Source, dir, id string, root *x509.Certificate, now time.Time) (info Info, added bool, err error) {
	got, err := source.RIMs(ctx, id)
	if err != nil {
		return Info{}, false, err
	}
	info = inspect(id, got[0], root, now)
	if info.Err != nil {
		return info, false, fmt.Errorf("%s: not kept: %w", got[0].Name, info.Err)
	}
	have, err := gpurim.Dir{Path: dir}.RIMs(ctx, id)
	if err != nil && !errors.Is(err, gpurim.ErrNotFound) {
		return info, false, err
	}
	if i := slices.IndexFunc(have, func(f gpurim.File) bool { return f.SHA256 == info.SHA256 }); i >= 0 {
		info.File = have[i].Name
		return info, false, nil
	}
	for n := 1; n <= maxFiles; n++ {
		info.File = filepath.Join(dir, id+".xml")
		if n > 1 {
			info.File = filepath.Join(dir, fmt.Sprintf("%s.%d.xml", id, n))
		}
		err := writeNew(info.File, got[0].Data)
		if !errors.Is(err, os.ErrExist) {
			return info, err == nil, err
		}
	}
	return info, false, fmt.Errorf("%s already holds %d files of %s: remove those that no device needs any more", dir, maxFiles, id)
}

// writeNew writes a file that must not exist, in one step.
func writeNew(path string, data []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".rim-*")
	if err != nil {
		return fmt.Errorf("keep RIM: %w", err)
	}
	defer os.Remove(f.Name())
	_, err = f.Write(data)
	if err == nil {
		err = f.Chmod(0o644)
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Link(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("keep RIM: %w", err)
	}
	return nil
}
