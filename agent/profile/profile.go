// Package profile carries out what the guest config's workload profile asks for:
// files to remove before a start, folders to make, how to ask for an end, what
// end counts as one that nobody asked for. It knows no kind of workload: the
// builder writes the profile, this package reads it.
//
// /vault is the workload's own, and so may hold anything that an earlier run has
// put there: no symlink leads out of it, and no pipe holds anyone up.
package profile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"coffer/internal/guestconfig"
)

// maxRemove bounds the files that one start removes.
const maxRemove = 1000

// Prepare removes what must not be there at a start. vault is the folder that
// the container sees as /vault.
func Prepare(p guestconfig.Profile, vault string) (removed []string, err error) {
	patterns := p.Remove
	if p.StopFile != "" { // the last end's request is not this run's
		patterns = append(append([]string(nil), patterns...), p.StopFile)
	}
	if len(patterns) == 0 {
		return nil, nil
	}
	root, err := os.OpenRoot(vault)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	var errs []error
	for _, pattern := range patterns {
		names, err := glob(root, ".", strings.Split(pattern, "/"))
		errs = append(errs, err)
		for _, name := range names {
			if len(removed) == maxRemove {
				return removed, errors.Join(append(errs, fmt.Errorf("more than %d files to remove below /vault", maxRemove))...)
			}
			switch err := root.Remove(name); {
			case err == nil:
				removed = append(removed, path.Join("/vault", name))
			case !errors.Is(err, fs.ErrNotExist):
				errs = append(errs, err)
			}
		}
	}
	return removed, errors.Join(errs...)
}

// glob finds what matches, level by level, without following a symlink.
func glob(root *os.Root, dir string, pattern []string) ([]string, error) {
	d, err := root.OpenFile(dir, os.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NONBLOCK, 0)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.ELOOP) {
			err = nil
		}
		return nil, err
	}
	defer d.Close()
	var found []string
	for {
		entries, readErr := d.ReadDir(256)
		for _, e := range entries {
			if ok, _ := path.Match(pattern[0], e.Name()); !ok {
				continue
			}
			name := path.Join(dir, e.Name())
			if len(pattern) == 1 {
				found = append(found, name)
			} else if e.IsDir() {
				below, err := glob(root, name, pattern[1:])
				if err != nil {
					return found, err
				}
				found = append(found, below...)
			}
			if len(found) > maxRemove {
				return found, nil
			}
		}
		if readErr != nil || len(entries) == 0 {
			return found, nil
		}
	}
}

// Folder makes a new folder that every user can write to, and returns its path.
// parent is the agent's own.
func Folder(parent, target string) (string, error) {
	dir := filepath.Join(parent, strings.ReplaceAll(strings.Trim(target, "/"), "/", "-"))
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return "", err
	}
	return dir, os.Chmod(dir, 0o777)
}

// Ask asks the workload to end, where its profile has a way of its own.
func Ask(p guestconfig.Profile, vault string) error {
	root, err := os.OpenRoot(vault)
	if err != nil {
		return err
	}
	defer root.Close()
	f, err := root.OpenFile(p.StopFile, os.O_WRONLY|os.O_CREATE|syscall.O_NONBLOCK, 0o666)
	if err != nil {
		return fmt.Errorf("ask the workload to end by /vault/%s: %w", p.StopFile, err)
	}
	return f.Close()
}

// Failed tells whether an end that nobody asked for is a failure.
func Failed(p guestconfig.Profile, code int) bool { return code != 0 || p.Lasting }
