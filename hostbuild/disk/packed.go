package disk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"coffer/hostbuild/disk/erofs"
)

// ErrCompression is wrapped by errors about a compression that this host or the
// guest's kernel cannot do.
var ErrCompression = errors.New("root_compression")

// checkCompression fails unless mkfs.erofs makes images of tars and knows the
// compressor: version 1.8 was the first to do so whole.
func checkCompression(ctx context.Context, algorithm string) error {
	out, err := exec.CommandContext(ctx, "mkfs.erofs", "--version").CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		return fmt.Errorf("%w: %s needs mkfs.erofs 1.8 or later, and there is none: install erofs-utils of Debian 13 or later, or set none", ErrCompression, algorithm)
	}
	first, rest, _ := strings.Cut(string(out), "\n")
	version := strings.TrimPrefix(strings.Replace(first, "(erofs-utils) ", "", 1), "mkfs.erofs ")
	if err != nil { // before 1.8 there was no --version
		version = "1.7 or older"
	}
	var major, minor int
	if fmt.Sscanf(version, "%d.%d", &major, &minor); err != nil || major < 1 || major == 1 && minor < 8 {
		return fmt.Errorf("%w: %s needs mkfs.erofs 1.8 or later, and this host's is %s: install erofs-utils of Debian 13 or later, or set none", ErrCompression, algorithm, version)
	}
	if slices.Contains(strings.FieldsFunc(rest, func(r rune) bool { return strings.ContainsRune(", \n", r) }), algorithm) {
		return nil
	}
	return fmt.Errorf("%w: this host's mkfs.erofs %s was built without %s", ErrCompression, version, algorithm)
}

// packedLayer writes a layer's blob as mkfs.erofs makes it, compressed: a file
// system of the same files.
func (b *rootBuilder) packedLayer(ctx context.Context, index int, r io.Reader) error {
	dir, err := os.MkdirTemp(b.p.Temp, "layer-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	image := filepath.Join(dir, "image")
	tree, err := packTar(ctx, b.p.Compression, image, r, func(w io.Writer) io.Writer { return &limited{w, b.out.sealer, 0} })
	if err != nil {
		return fmt.Errorf("layer %d: %w", index+1, err)
	}
	f, err := os.Open(image)
	if err != nil {
		return err
	}
	defer f.Close()
	bl := blob{start: b.out.off}
	if bl.size, err = io.Copy(b.out, f); err != nil {
		return err
	}
	b.blobs = append(b.blobs, bl)
	b.modules = append(b.modules, pythonModules(tree)...)
	return b.out.align(blockSize)
}

// packTar makes image of a layer's tar, beside temporary files of mkfs.erofs. The
// plain tar goes through limit. The tree holds the layer's names.
func packTar(ctx context.Context, algorithm, image string, r io.Reader, limit func(io.Writer) io.Writer) (*erofs.Tree, error) {
	running, kill := context.WithCancel(ctx)
	defer kill()
	cmd := exec.CommandContext(running, "mkfs.erofs", "--quiet", "--tar=f", "--aufs", "-z"+algorithm, "-C65536", "-b4096",
		"-T0", "--mkfs-time", "-U", "00000000-0000-0000-0000-000000000000", image)
	cmd.Env = append(os.Environ(), "TMPDIR="+filepath.Dir(image))
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	tree := erofs.New(blockSize, time.Unix(0, 0))
	copied := tree.CopyTar(r, limit(in))
	if copied != nil && !errors.Is(copied, syscall.EPIPE) {
		kill() // some versions wait for ever for the rest of a tar
	}
	in.Close()
	switch err := cmd.Wait(); {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case err != nil && (copied == nil || errors.Is(copied, syscall.EPIPE)):
		return nil, fmt.Errorf("mkfs.erofs: %w\n%s", err, said.Bytes())
	}
	return tree, copied
}

// limited refuses what no drive of this size can hold, so that a small archive
// cannot fill the build host's disk.
type limited struct {
	w    io.Writer
	s    *sealer
	size int64
}

func (l *limited) Write(b []byte) (int, error) {
	if l.size += int64(len(b)); l.size > l.s.most() {
		return 0, l.s.farTooSmall()
	}
	return l.w.Write(b)
}
