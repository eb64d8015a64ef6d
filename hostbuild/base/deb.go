package base

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"slices"
	"strings"

	"coffer/initramfs/modules"
)

const (
	maxMember = 256 << 20 // bytes of one file of a package
	maxUsed   = 1 << 30   // bytes of all files used of a package
)

// unpackDeb returns the regular files of a Debian package that want accepts,
// by their path without leading slash.
func unpackDeb(ctx context.Context, deb string, want func(name string) bool) (map[string][]byte, error) {
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", deb)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("unpack %s: %w", deb, err)
	}
	files, err := pick(out, want)
	if err != nil {
		out.Close() // dpkg-deb ends by SIGPIPE
		return nil, errors.Join(fmt.Errorf("unpack %s: %w", deb, err), cmd.Wait())
	}
	if err := cmd.Wait(); err != nil {
		return nil, fmt.Errorf("unpack %s: dpkg-deb: %w: %s", deb, err, strings.TrimSpace(stderr.String()))
	}
	return files, nil
}

// pick reads a tar to its end and keeps the regular files that want accepts.
func pick(r io.Reader, want func(name string) bool) (map[string][]byte, error) {
	files := map[string][]byte{}
	var used int64
	t := tar.NewReader(r)
	for {
		h, err := t.Next()
		if err == io.EOF {
			_, err = io.Copy(io.Discard, r)
			return files, err
		}
		if err != nil {
			return nil, err
		}
		name := strings.TrimPrefix(path.Clean("/"+h.Name), "/")
		if h.Typeflag != tar.TypeReg || !want(name) {
			continue
		}
		if used += h.Size; h.Size > maxMember || used > maxUsed {
			return nil, fmt.Errorf("%s is too large (%d bytes)", name, h.Size)
		}
		if files[name], err = io.ReadAll(t); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
}

// kernel is what is needed of a kernel package.
type kernel struct {
	version string // as uname -r prints it
	image   []byte
	modules *modules.Index
}

// readKernel reads a kernel package. The file infos keeps what its modules say
// about themselves, which takes long to read.
func readKernel(ctx context.Context, deb, infos string) (*kernel, error) {
	const image, tree, builtin = "boot/vmlinuz-", "lib/modules/", "/modules.builtin"
	files, err := unpackDeb(ctx, deb, func(name string) bool {
		name = strings.TrimPrefix(name, "usr/")
		return strings.HasPrefix(name, image) ||
			strings.HasPrefix(name, tree) && (modules.IsModule(name) || strings.HasSuffix(name, builtin))
	})
	if err != nil {
		return nil, err
	}
	var k kernel
	var list []byte
	for name, data := range files {
		short := strings.TrimPrefix(name, "usr/")
		if version, ok := strings.CutPrefix(short, image); ok {
			k.version, k.image = version, data
			delete(files, name)
		} else if strings.HasSuffix(short, builtin) {
			list = data
			delete(files, name)
		}
	}
	if k.version == "" || list == nil || len(files) == 0 {
		return nil, fmt.Errorf("%s is not a kernel package: it lacks vmlinuz, modules.builtin or modules", deb)
	}
	var known map[string]modules.Info
	data, err := os.ReadFile(infos)
	if err != nil || json.Unmarshal(data, &known) != nil {
		known = nil // none yet, or damaged: it is made anew
	}
	if k.modules, err = modules.NewIndex(files, list, known); err != nil {
		return nil, fmt.Errorf("%s: %w", deb, err)
	}
	if data, err = json.Marshal(k.modules.Infos()); err != nil {
		return nil, err
	}
	return &k, writeAtomic(infos, data)
}

// readFile returns one file of a package.
func readFile(ctx context.Context, deb, name string) ([]byte, error) {
	files, err := unpackDeb(ctx, deb, func(n string) bool { return n == name })
	if err != nil {
		return nil, err
	}
	if len(files[name]) == 0 {
		return nil, fmt.Errorf("%s has no %s", deb, name)
	}
	return files[name], nil
}

// readCerts returns all certificates below a folder of a package as one PEM
// text, in the order of their names.
func readCerts(ctx context.Context, deb, folder string) ([]byte, error) {
	files, err := unpackDeb(ctx, deb, func(n string) bool {
		return strings.HasPrefix(n, folder+"/") && strings.HasSuffix(n, ".crt")
	})
	if err != nil {
		return nil, err
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("%s has no certificates in %s", deb, folder)
	}
	var names []string
	for n := range files {
		names = append(names, n)
	}
	slices.Sort(names)
	var out bytes.Buffer
	for _, n := range names {
		out.Write(bytes.TrimRight(files[n], "\n"))
		out.WriteByte('\n')
	}
	return out.Bytes(), nil
}
