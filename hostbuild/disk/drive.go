package disk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"coffer/hostbuild/disk/ext4"
	"coffer/hostbuild/disk/qcow2"
)

// DriveParams says what a plain drive holds.
type DriveParams struct {
	Out   string // the qcow2 file
	Size  int64  // of the virtual drive in bytes; rounded up to 4096
	Label string // of the file system
	UUID  string // of the file system; empty: random
	// Trees are host folders or files that are copied in, by their name in the
	// drive's root. Links in a tree stay links; devices, sockets and pipes are
	// refused. All belongs to 0:0, with the permissions that it has on the host.
	Trees map[string]string
	Files []File
	Time  time.Time // every time in the drive
}

// minDrive is the least size of a plain drive, in bytes.
const minDrive = 8 << 20

// BuildDrive makes a drive whose whole is one ext4. The file is for its owner
// alone: nothing in it is encrypted.
func BuildDrive(ctx context.Context, p DriveParams) error {
	p.Size = roundUp(p.Size, blockSize)
	if p.Size < minDrive {
		return explain(p.Out, fmt.Errorf("%w: %d bytes, less than %d", ErrTooSmall, p.Size, minDrive))
	}
	out, err := newPartial(p.Out, 0o600)
	if err != nil {
		return explain(p.Out, err)
	}
	return explain(p.Out, out.finish(buildDrive(ctx, p, out.File)))
}

func buildDrive(ctx context.Context, p DriveParams, out *os.File) error {
	work, err := os.MkdirTemp(filepath.Dir(p.Out), "."+filepath.Base(p.Out)+".*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	stage := driveStage{work: work, items: map[string]ext4.Item{}}
	for _, name := range slices.Sorted(maps.Keys(p.Trees)) {
		if err := stage.addTree(path.Join("/", name), p.Trees[name]); err != nil {
			return fmt.Errorf("copy %s: %w", p.Trees[name], err)
		}
	}
	for _, f := range p.Files {
		if err := stage.addFile(f); err != nil {
			return fmt.Errorf("put %s into the drive: %w", f.Path, err)
		}
	}
	if stage.bytes > p.Size {
		return fmt.Errorf("%w: %d bytes for %d bytes of files", ErrTooSmall, p.Size, stage.bytes)
	}

	raw, err := os.Create(filepath.Join(work, "raw"))
	if err != nil {
		return err
	}
	defer raw.Close()
	if err := raw.Truncate(p.Size); err != nil {
		return err
	}
	if err := ext4.Make(ctx, raw.Name(), ext4.Options{Label: p.Label, UUID: p.UUID, Time: p.Time}); err != nil {
		return err
	}
	if err := ext4.Populate(ctx, raw.Name(), p.Time, stage.list()); err != nil {
		if errors.Is(err, ext4.ErrFull) {
			return fmt.Errorf("%w: %d bytes for %d bytes of files: %w", ErrTooSmall, p.Size, stage.bytes, err)
		}
		return err
	}
	return packRaw(raw, p.Size, out)
}

// packRaw makes a qcow2 image of size bytes of what is no hole in raw.
func packRaw(raw *os.File, size int64, out *os.File) error {
	drive, err := qcow2.NewWriter(out, size)
	if err != nil {
		return err
	}
	extents, err := ext4.Data(raw)
	if err != nil {
		return err
	}
	for _, e := range extents {
		if _, err := io.Copy(io.NewOffsetWriter(drive, e.Off), io.NewSectionReader(raw, e.Off, e.Len)); err != nil {
			return err
		}
	}
	end, err := drive.Finish()
	if err != nil {
		return err
	}
	return out.Truncate(end)
}

// driveStage collects what goes into a drive, with the directories it needs.
type driveStage struct {
	work  string
	items map[string]ext4.Item
	bytes int64
	files int // data files in work
}

func (s *driveStage) add(it ext4.Item) error {
	for dir := path.Dir(it.Path); dir != "/"; dir = path.Dir(dir) {
		if _, ok := s.items[dir]; !ok {
			s.items[dir] = ext4.Item{Path: dir, Mode: 0o755}
		}
	}
	if old, ok := s.items[it.Path]; ok && (old.Source+old.Link != "" || it.Source+it.Link != "") {
		return fmt.Errorf("%w: %s is there twice", ErrBadFile, it.Path)
	}
	s.items[it.Path] = it
	return nil
}

// list gives the items, parents first.
func (s *driveStage) list() []ext4.Item {
	var out []ext4.Item
	for _, p := range slices.Sorted(maps.Keys(s.items)) {
		out = append(out, s.items[p])
	}
	return out
}

func (s *driveStage) addTree(dest, src string) error {
	src, err := filepath.EvalSymlinks(src) // only the tree's top may be a link
	if err != nil {
		return err
	}
	if src, err = filepath.Abs(src); err != nil {
		return err
	}
	return filepath.WalkDir(src, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(src, name)
		if err != nil {
			return err
		}
		it := ext4.Item{Path: path.Join(dest, rel), Mode: uint32(info.Sys().(*syscall.Stat_t).Mode) & 0o7777}
		switch {
		case info.IsDir():
			if it.Path == "/" {
				return nil
			}
		case info.Mode().IsRegular():
			it.Source = name
			s.bytes += info.Size()
		case info.Mode()&fs.ModeSymlink != 0:
			if it.Link, err = os.Readlink(name); err != nil {
				return err
			}
		default:
			return fmt.Errorf("%w: %s is a %s; move it out of the folder", ErrBadFile, name, kindOf(info.Mode()))
		}
		return s.add(it)
	})
}

func kindOf(m fs.FileMode) string {
	switch {
	case m&fs.ModeSocket != 0:
		return "socket"
	case m&fs.ModeNamedPipe != 0:
		return "pipe"
	}
	return "device"
}

func (s *driveStage) addFile(f File) error {
	it := ext4.Item{Path: path.Clean("/" + f.Path), Mode: f.Mode & 0o7777}
	switch f.Mode & typeMask {
	case syscall.S_IFDIR:
	case syscall.S_IFLNK:
		it.Link = f.Link
	case syscall.S_IFREG:
		it.Source = f.Source
		if f.Source == "" {
			it.Source = filepath.Join(s.work, fmt.Sprintf("data%d", s.files))
			s.files++
			if err := os.WriteFile(it.Source, f.Data, 0o600); err != nil {
				return err
			}
			s.bytes += int64(len(f.Data))
		} else {
			src, size, err := source(f.Source)
			if err != nil {
				return err
			}
			src.Close()
			s.bytes += size
		}
	default:
		return fmt.Errorf("%w: type %#o", ErrBadFile, f.Mode&typeMask)
	}
	return s.add(it)
}

// DriveEntry is one name in a directory of a plain drive.
type DriveEntry = ext4.Entry

// ListDrive lists a directory of the plain drive in a qcow2 file. What is not
// there gives fs.ErrNotExist.
func ListDrive(ctx context.Context, file, dir string) ([]DriveEntry, error) {
	var list []DriveEntry
	err := withRaw(file, func(raw string, _ int64) (err error) {
		list, err = ext4.List(ctx, raw, dir)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list %s of drive %s: %w", dir, file, err)
	}
	return list, nil
}

// ReadDrive writes a file of the plain drive in a qcow2 file to w.
func ReadDrive(ctx context.Context, file string, w io.Writer, name string) error {
	err := withRaw(file, func(raw string, _ int64) error { return ext4.Read(ctx, raw, name, w) })
	if err != nil {
		return fmt.Errorf("read %s of drive %s: %w", name, file, err)
	}
	return nil
}

// withRaw gives f a raw copy of the drive, and the size of its file. The image comes from a host that is
// not trusted: see package qcow2 for what is refused.
func withRaw(file string, f func(raw string, size int64) error) error {
	in, size, err := source(file)
	if err != nil {
		return err
	}
	defer in.Close()
	raw, _, err := rawCopy(in, size)
	if err != nil {
		return err
	}
	defer os.Remove(raw.Name())
	defer raw.Close()
	return f(raw.Name(), size)
}

// rawCopy unpacks a qcow2 image into a temporary file.
func rawCopy(in *os.File, size int64) (raw *os.File, virtual int64, err error) {
	r, err := qcow2.NewReader(in, size)
	if err != nil {
		return nil, 0, err
	}
	raw, err = os.CreateTemp("", "drive-*.raw")
	if err != nil {
		return nil, 0, err
	}
	if err = raw.Truncate(r.Size()); err == nil {
		err = explain(raw.Name(), r.CopyTo(raw))
	}
	if err != nil {
		return nil, 0, errors.Join(err, raw.Close(), os.Remove(raw.Name()))
	}
	return raw, r.Size(), nil
}
