package policy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"coffer/internal/strict"

	"golang.org/x/sys/unix"
)

const (
	fileName = "policy.rego"
	lockName = "policy.rego.lock"
	// maxSize keeps an upload, the text in base64 inside JSON, below the 2 MiB
	// that a KBS takes.
	maxSize  = 1_500_000
	lockPoll = 20 * time.Millisecond
)

// Folder holds the master copy of a policy. Several programs may use one folder.
type Folder struct{ dir string }

// OpenFolder opens dir, which must exist. A folder without policy.rego is a new
// one: it denies everything until a rule is added.
func OpenFolder(dir string) (*Folder, error) {
	fi, err := os.Stat(dir)
	if err != nil {
		return nil, fmt.Errorf("policy folder: %w", err)
	}
	if !fi.IsDir() {
		return nil, fmt.Errorf("policy folder %s is not a directory", dir)
	}
	return &Folder{dir: dir}, nil
}

// Path is the master copy's path.
func (f *Folder) Path() string { return filepath.Join(f.dir, fileName) }

// Text returns the master copy, or the text of a new folder.
func (f *Folder) Text() ([]byte, error) {
	b, err := strict.ReadFile(f.Path(), maxSize)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return Render(nil), nil
	case errors.Is(err, strict.ErrTooLarge):
		return nil, fmt.Errorf("policy %w; a KBS takes no more", err)
	case err != nil:
		return nil, fmt.Errorf("read policy: %w", err)
	}
	return b, nil
}

// Rules returns the rules that hostbuild keeps in the folder.
func (f *Folder) Rules() (Rules, error) {
	text, err := f.Text()
	if err != nil {
		return nil, err
	}
	_, rules, _, err := f.parse(text)
	return rules, err
}

func (f *Folder) parse(text []byte) (before []byte, rules Rules, after []byte, err error) {
	before, block, after, err := split(text)
	if err == nil && block != nil {
		rules, err = parseBlock(block)
	}
	if err != nil {
		return nil, nil, nil, fmt.Errorf("policy %s: %w", f.Path(), err)
	}
	return before, rules, after, nil
}

// CheckError is a policy text that must not be uploaded.
type CheckError struct {
	Path     string
	Findings []Finding // all, warnings included
}

func (e *CheckError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "policy %s must not be uploaded:", e.Path)
	for _, f := range e.Findings {
		if f.Level == Error {
			fmt.Fprintf(&b, "\n  %s", f)
		}
	}
	return b.String()
}

// Update changes hostbuild's rules under the folder's lock: it reads the master
// copy, lets edit change the rules, checks the new text, puts it in the master
// copy's place and hands it to apply (which uploads it; nil does nothing). When
// edit, the check or apply fails, the master copy is the old one; after a failed
// apply the KBS may or may not have the new text: call Update again. apply is
// also called when edit changed nothing, so that a second call repeats the
// upload. The findings are warnings about text of people.
func (f *Folder) Update(ctx context.Context, edit func(*Rules) error, apply func(ctx context.Context, text []byte) error) ([]Finding, error) {
	unlock, err := f.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	text, err := f.Text()
	if err != nil {
		return nil, err
	}
	before, rules, after, err := f.parse(text)
	if err != nil {
		return nil, err
	}
	if err := edit(&rules); err != nil {
		return nil, err
	}
	next := bytes.Join([][]byte{before, renderBlock(rules), after}, nil)
	if len(next) > maxSize {
		return nil, fmt.Errorf("policy %s would be larger than %d bytes, more than a KBS takes", f.Path(), maxSize)
	}
	findings := Check(next)
	if slices.ContainsFunc(findings, func(fd Finding) bool { return fd.Level == Error }) {
		return nil, &CheckError{Path: f.Path(), Findings: findings}
	}
	if err := f.swap(next, func() error {
		if apply == nil {
			return nil
		}
		return apply(ctx, next)
	}); err != nil {
		return nil, err
	}
	return findings, nil
}

// swap puts text in the master copy's place in one step, runs apply, and puts
// the old one back if it fails.
func (f *Folder) swap(text []byte, apply func() error) error {
	old, err := os.ReadFile(f.Path())
	isNew := errors.Is(err, fs.ErrNotExist)
	if err != nil && !isNew {
		return fmt.Errorf("read policy: %w", err)
	}
	// Both files are made first: a full disk shows before anything has changed.
	var names [2]string
	for i, b := range [][]byte{text, old} {
		if names[i], err = f.stage(b); err != nil {
			return fmt.Errorf("write policy: %w", err)
		}
		defer os.Remove(names[i])
	}
	if err := errors.Join(os.Rename(names[0], f.Path()), syncDir(f.dir)); err != nil {
		return fmt.Errorf("write policy: %w", err)
	}
	err = apply()
	if err == nil {
		return nil
	}
	var back error
	if isNew {
		back = os.Remove(f.Path())
	} else {
		back = os.Rename(names[1], f.Path())
	}
	if back = errors.Join(back, syncDir(f.dir)); back != nil {
		back = fmt.Errorf("put the old %s back: %w", f.Path(), back)
	}
	return errors.Join(err, back)
}

// stage writes text beside the master copy, with the master copy's mode.
func (f *Folder) stage(text []byte) (string, error) {
	mode := fs.FileMode(0o644)
	if fi, err := os.Stat(f.Path()); err == nil {
		mode = fi.Mode().Perm()
	}
	tmp, err := os.CreateTemp(f.dir, "."+fileName+".*")
	if err != nil {
		return "", err
	}
	_, err = tmp.Write(text)
	err = errors.Join(err, tmp.Chmod(mode), tmp.Sync(), tmp.Close())
	if err != nil {
		os.Remove(tmp.Name())
		return "", err
	}
	return tmp.Name(), nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// lock waits for the folder's lock until ctx ends.
func (f *Folder) lock(ctx context.Context) (unlock func(), err error) {
	path := filepath.Join(f.dir, lockName)
	fh, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if errors.Is(err, fs.ErrPermission) { // another user's, in a folder of several
		fh, err = os.Open(path)
	}
	if err != nil {
		return nil, fmt.Errorf("lock policy folder: %w", err)
	}
	for {
		err := unix.Flock(int(fh.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { fh.Close() }, nil
		}
		if err != unix.EWOULDBLOCK && err != unix.EINTR {
			fh.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		select {
		case <-ctx.Done():
			fh.Close()
			return nil, fmt.Errorf("lock %s: another program holds it: %w", path, ctx.Err())
		case <-time.After(lockPoll):
		}
	}
}

// split cuts text at the marker lines. Without a block, block is nil and before
// is all of the text, ended by a newline and an empty line.
func split(text []byte) (before, block, after []byte, err error) {
	begin, nb := markLine(text, beginMark)
	end, ne := markLine(text, endMark)
	switch {
	case nb == 0 && ne == 0:
		before = bytes.Clone(text)
		if len(before) > 0 && before[len(before)-1] != '\n' {
			before = append(before, '\n')
		}
		return append(before, '\n'), nil, nil, nil
	case nb != 1 || ne != 1 || end < begin:
		return nil, nil, nil, fmt.Errorf("%w: it must begin with one line %q and end with one line %q", ErrBlock, beginMark, endMark)
	}
	end += len(endMark) + 1
	if end > len(text) {
		return nil, nil, nil, fmt.Errorf("%w: no newline behind the END line", ErrBlock)
	}
	return text[:begin], text[begin:end], text[end:], nil
}

// markLine returns the offset of the first line that is mark, and how many are.
func markLine(text []byte, mark string) (first, n int) {
	off := 0
	for line := range bytes.Lines(text) {
		if strings.TrimRight(string(line), "\r\n") == mark {
			if n == 0 {
				first = off
			}
			n++
		}
		off += len(line)
	}
	return first, n
}
