package kbs

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"
)

const (
	newPrefix = ".new-" // of files being written; no resource's name begins with a dot
	sweepAge  = time.Hour
)

const segment = `[a-zA-Z0-9_\-]+[a-zA-Z0-9_\-.]*`

var resourceForm = regexp.MustCompile(`^` + segment + `/` + segment + `/` + segment + `$`)

// store keeps resources, policy and reference values in a server's folder. A
// file is replaced in one step and reaches the disk before the answer does.
// Several servers may share a folder: nothing is cached.
type store struct {
	root *os.Root
	mu   sync.Mutex // reference values are read, changed and written
}

func openStore(dir string) (*store, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	st := &store{root: root}
	return st, st.sweep()
}

// sweep removes what a server that was killed was writing: files that were never
// acknowledged. Young ones may be another server's.
func (st *store) sweep() error {
	return fs.WalkDir(st.root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasPrefix(d.Name(), newPrefix) {
			return err
		}
		fi, err := d.Info()
		if err == nil && time.Since(fi.ModTime()) > sweepAge {
			err = st.root.Remove(name)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
}

// resource reads a resource. The caller wipes it.
func (st *store) resource(name string) ([]byte, error) {
	if !resourceForm.MatchString(name) {
		return nil, fmt.Errorf("resource path %q is not <repository>/<type>/<tag>", name)
	}
	return st.read(path.Join(repositoryDir, name))
}

func (st *store) setResource(name string, data []byte) error {
	if !resourceForm.MatchString(name) {
		return fmt.Errorf("resource path %q is not <repository>/<type>/<tag>", name)
	}
	return st.write(path.Join(repositoryDir, name), data)
}

func (st *store) deleteResource(name string) error {
	if !resourceForm.MatchString(name) {
		return fmt.Errorf("resource path %q is not <repository>/<type>/<tag>", name)
	}
	file := path.Join(repositoryDir, name)
	if err := st.root.Remove(file); err != nil {
		return err
	}
	return st.sync(path.Dir(file))
}

// policy reads the resource policy. A missing one denies.
func (st *store) policy() ([]byte, error) {
	b, err := st.read(policyFile)
	if errors.Is(err, fs.ErrNotExist) {
		return []byte("package policy\n\ndefault allow := false\n"), nil
	}
	return b, err
}

func (st *store) setPolicy(text []byte) error { return st.write(policyFile, text) }

// references are the reference values by name.
func (st *store) references() (map[string]any, error) {
	values := map[string]any{}
	b, err := st.read(referenceFile)
	if errors.Is(err, fs.ErrNotExist) {
		return values, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &values)
	}
	return values, err
}

func (st *store) addReferences(add map[string]any) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	values, err := st.references()
	if err != nil {
		return err
	}
	for name, v := range add {
		values[name] = v
	}
	b, err := json.Marshal(values)
	if err != nil {
		return err
	}
	return st.write(referenceFile, b)
}

var errNoVCEK = errors.New("no VCEK in the evidence")

// vcek returns the DER of the first of names that is there.
func (st *store) vcek(names ...string) ([]byte, error) {
	for _, name := range names {
		b, err := st.read(path.Join(vcekDir, name))
		if !errors.Is(err, fs.ErrNotExist) {
			return b, err
		}
	}
	return nil, fmt.Errorf("%w, and none of %s in the folder %s", errNoVCEK, strings.Join(names, ", "), vcekDir)
}

// sessionKey reads the key of sessions, or makes it.
func (st *store) sessionKey() ([]byte, error) {
	key, err := st.read(sessionKeyFile)
	if errors.Is(err, fs.ErrNotExist) {
		key = make([]byte, 32)
		rand.Read(key)
		err = st.write(sessionKeyFile, key)
	}
	if err == nil && len(key) != 32 {
		err = errors.New("not 32 bytes: remove it, and the server makes a new one")
	}
	return key, err
}

func (st *store) read(name string) ([]byte, error) {
	f, err := st.root.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() || fi.Size() > maxBody {
		return nil, fmt.Errorf("%s is not a file of at most %d bytes", name, maxBody)
	}
	b := make([]byte, fi.Size())
	if _, err := io.ReadFull(f, b); err != nil {
		clear(b)
		return nil, err
	}
	return b, nil
}

func (st *store) write(name string, data []byte) error {
	dir := path.Dir(name)
	if err := st.root.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	tmp := path.Join(dir, newPrefix+rand.Text())
	f, err := st.root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = st.root.Rename(tmp, name)
	}
	if err != nil {
		return errors.Join(err, st.root.Remove(tmp))
	}
	for ; dir != "."; dir = path.Dir(dir) {
		if err := st.sync(dir); err != nil {
			return err
		}
	}
	return st.sync(".")
}

func (st *store) sync(dir string) error {
	d, err := st.root.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// writeFile makes a new file that only its owner can read.
func writeFile(name string, data []byte) error {
	f, err := os.OpenFile(filepath.Clean(name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}
