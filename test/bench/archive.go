package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// largeArchive makes an archive of about size bytes once, as `docker save | gzip`
// would: one layer of incompressible files and one, as large, of the files of the
// archive at sample, over and over.
func largeArchive(ctx context.Context, dir, sample string, size int64) (string, error) {
	path := filepath.Join(dir, fmt.Sprintf("bench-%dM.tar.gz", size>>20))
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	code, err := gunzip(sample)
	if err != nil {
		return "", err
	}
	const fileSize = 1 << 20
	// Code of this kind shrinks to a third.
	files := max(size*3/4/fileSize, 1)
	random := rand.NewChaCha8([32]byte{1})
	at := 0
	a := &archiveWriter{time: time.Unix(1700000000, 0)}

	out, err := os.CreateTemp(dir, ".bench-*")
	if err != nil {
		return "", err
	}
	defer os.Remove(out.Name())
	defer out.Close()
	cmd := exec.CommandContext(ctx, "gzip", "-c")
	cmd.Stdout, cmd.Stderr = out, os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return "", err
	}
	if err := cmd.Start(); err != nil {
		return "", err
	}
	a.tw = tar.NewWriter(in)
	a.layer(files, fileSize, func(b []byte) { random.Read(b) })
	a.layer(files, fileSize, func(b []byte) {
		for n := 0; n < len(b); {
			m := copy(b[n:], code[at:])
			n += m
			at = (at + m) % len(code)
		}
	})
	a.finish()
	in.Close()
	if err := cmd.Wait(); err != nil {
		return "", fmt.Errorf("gzip: %w", err)
	}
	if a.err != nil {
		return "", a.err
	}
	return path, os.Rename(out.Name(), path)
}

func gunzip(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(z)
}

// archiveWriter writes a docker archive; its first error stays.
type archiveWriter struct {
	tw      *tar.Writer
	time    time.Time
	names   []string
	diffIDs []string
	err     error
}

func (a *archiveWriter) member(tw *tar.Writer, name string, size int64, write func(io.Writer) error) {
	if a.err == nil {
		a.err = tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: size, ModTime: a.time})
	}
	if a.err == nil {
		a.err = write(tw)
	}
}

// layer writes a layer of n files whose contents fill makes.
func (a *archiveWriter) layer(n, fileSize int64, fill func([]byte)) {
	name := fmt.Sprintf("layer%d/layer.tar", len(a.names))
	const tarBlock = 512 // headers, and two at the end
	a.member(a.tw, name, n*(tarBlock+fileSize)+2*tarBlock, func(w io.Writer) error {
		sum := sha256.New()
		tw := tar.NewWriter(io.MultiWriter(w, sum))
		buf := make([]byte, fileSize)
		for i := range n {
			fill(buf)
			a.member(tw, fmt.Sprintf("data/%s-%d", filepath.Dir(name), i), fileSize, func(w io.Writer) error {
				_, err := w.Write(buf)
				return err
			})
		}
		if a.err == nil {
			a.err = tw.Close()
		}
		a.diffIDs = append(a.diffIDs, "sha256:"+hexSum(sum))
		return a.err
	})
	a.names = append(a.names, name)
}

func (a *archiveWriter) finish() {
	config, err := json.Marshal(map[string]any{
		"architecture": "amd64", "os": "linux", "config": map[string]any{"Cmd": []string{"/data/app"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": a.diffIDs},
	})
	if err != nil {
		a.err = err
		return
	}
	sum := sha256.New()
	sum.Write(config)
	name := hexSum(sum) + ".json"
	manifest, err := json.Marshal([]map[string]any{{"Config": name, "RepoTags": []string{"bench:latest"}, "Layers": a.names}})
	if err != nil {
		a.err = err
		return
	}
	for n, data := range map[string][]byte{name: config, "manifest.json": manifest} {
		a.member(a.tw, n, int64(len(data)), func(w io.Writer) error {
			_, err := io.Copy(w, bytes.NewReader(data))
			return err
		})
	}
	if a.err == nil {
		a.err = a.tw.Close()
	}
}

func hexSum(h hash.Hash) string { return hex.EncodeToString(h.Sum(nil)) }
