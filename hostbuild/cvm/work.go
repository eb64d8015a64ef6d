package cvm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"coffer/hostbuild/policy"
)

// Names of a work folder, which lies in the output folder, and of the mark in it
// that a build makes before it gives its key and its rule to the KBS.
const (
	workPrefix      = "."
	workSuffix      = ".build"
	registeringMark = "registering"
)

// work is the folder of one build. The build holds a lock on it, so that others
// can tell a running build from one that was killed.
type work struct {
	id   string
	dir  string
	lock *os.File
}

// registrar is what clearing up after a killed build needs of the KBS.
type registrar interface {
	ForgetCVM(ctx context.Context, rule policy.Rule) error
}

// newWork makes the work folder of the build of a CVM, and clears up after
// builds that were killed.
func newWork(ctx context.Context, outputDir, id string, reg registrar) (*work, error) {
	if err := os.MkdirAll(outputDir, 0o755); err != nil {
		return nil, err
	}
	out, err := lockDir(outputDir, unix.LOCK_EX) // between making a folder and locking it nobody may look
	if err != nil {
		return nil, err
	}
	defer out.Close()
	stale, err := filepath.Glob(filepath.Join(outputDir, workPrefix+"cvm_*"+workSuffix))
	if err != nil {
		return nil, err
	}
	for _, dir := range stale {
		if err := clearUp(ctx, dir, reg); err != nil {
			return nil, fmt.Errorf("clear up after a killed build, %s: %w", dir, err)
		}
	}
	w := &work{id: id, dir: filepath.Join(outputDir, workPrefix+id+workSuffix)}
	if err := os.Mkdir(w.dir, 0o700); err != nil {
		return nil, err
	}
	if w.lock, err = lockDir(w.dir, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(err, os.Remove(w.dir))
	}
	return w, nil
}

func lockDir(dir string, how int) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), how); err != nil {
		f.Close()
		return nil, &fs.PathError{Op: "lock", Path: dir, Err: err}
	}
	return f, nil
}

// clearUp removes a work folder whose build is gone. Where that build may have
// registered a CVM without placing the bundle, it takes key and rule back.
func clearUp(ctx context.Context, dir string, reg registrar) error {
	lock, err := lockDir(dir, unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) || errors.Is(err, fs.ErrNotExist) {
		return nil // it runs, or has just ended
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	id := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(dir), workPrefix), workSuffix)
	w := &work{id: id, dir: dir}
	if exists(filepath.Join(dir, registeringMark)) && exists(w.tgz()) {
		rule := policy.Rule{CVMID: id, Paths: []string{policy.KeyPath(id), policy.CanaryPath(id), policy.VaultKeyPath(id)}}
		if err := reg.ForgetCVM(ctx, rule); err != nil {
			return err
		}
	}
	return os.RemoveAll(dir)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// tgz is where the bundle lies until it gets its place.
func (w *work) tgz() string { return filepath.Join(w.dir, w.id+".tgz") }

// registering marks that the KBS may know the CVM from now on.
func (w *work) registering() error {
	return os.WriteFile(filepath.Join(w.dir, registeringMark), nil, 0o600)
}

func (w *work) close() {
	os.RemoveAll(w.dir)
	w.lock.Close()
}
