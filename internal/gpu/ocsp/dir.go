package ocsp

import (
	"os"
	"path/filepath"

	"coffer/internal/strict"
)

// Dir keeps answers as files <key>.ocsp of a folder. A bundle can carry such a
// folder, so that a site without a way to the responder has answers to begin with.
type Dir string

// Get implements Store.
func (d Dir) Get(key string) ([]byte, bool) {
	b, err := strict.ReadFile(d.path(key), maxSize)
	return b, err == nil
}

// Put implements Store. The file is replaced in one step.
func (d Dir) Put(key string, answer []byte) error {
	f, err := os.CreateTemp(string(d), ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if _, err := f.Write(answer); err != nil {
		f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), d.path(key))
}

func (d Dir) path(key string) string { return filepath.Join(string(d), key+".ocsp") }
