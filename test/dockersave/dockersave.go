// Package dockersave writes image archives as `docker save | gzip` does, without
// a daemon, in the legacy layout: one folder a layer, manifest.json last. It exists
// for tests and the demo.
package dockersave

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"time"
)

// Image is what goes into an archive.
type Image struct {
	Tag        string // name:tag
	Entrypoint []string
	Cmd        []string
	Env        []string
	Layers     [][]byte // uncompressed tars, the lowest first
}

// Entry is one member of a layer.
type Entry struct {
	Name string
	Mode int64  // permission bits; 0 means 0644, or 0755 for a folder
	Body []byte // nil and Link empty: a folder
	Link string // symbolic link's target
}

// Layer makes the tar of a layer. It is the same for the same entries.
func Layer(entries ...Entry) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{Name: e.Name, Mode: e.Mode, Size: int64(len(e.Body)), Typeflag: tar.TypeReg, ModTime: time.Unix(1700000000, 0)}
		switch {
		case e.Link != "":
			h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, e.Link, 0o777
		case e.Body == nil:
			h.Typeflag = tar.TypeDir
		}
		if h.Mode == 0 {
			h.Mode = 0o644
			if h.Typeflag == tar.TypeDir {
				h.Mode = 0o755
			}
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := w.Write(e.Body); err != nil {
			return nil, err
		}
	}
	err := w.Close()
	return b.Bytes(), err
}

func hexSum(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}

func (im Image) config() ([]byte, error) {
	var ids []string
	for _, l := range im.Layers {
		ids = append(ids, "sha256:"+hexSum(l))
	}
	return json.Marshal(map[string]any{
		"architecture": "amd64", "os": "linux", "created": "2023-11-14T22:13:20Z",
		"config": map[string]any{"Entrypoint": im.Entrypoint, "Cmd": im.Cmd, "Env": append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, im.Env...)},
		"rootfs": map[string]any{"type": "layers", "diff_ids": ids},
	})
}

type member struct {
	name string
	body []byte
}

// WriteLegacy writes the gzip'd legacy layout of several images.
func WriteLegacy(w io.Writer, images ...Image) error {
	var ms []member
	var index []map[string]any
	for _, im := range images {
		config, err := im.config()
		if err != nil {
			return err
		}
		configName := hexSum(config) + ".json"
		var layers []string
		for i, l := range im.Layers {
			name := fmt.Sprintf("%s%02x/layer.tar", hexSum(l)[:62], i)
			layers = append(layers, name)
			ms = append(ms, member{name, l})
		}
		ms = append(ms, member{configName, config})
		index = append(index, map[string]any{"Config": configName, "RepoTags": []string{im.Tag}, "Layers": layers})
	}
	manifest, err := json.Marshal(index)
	if err != nil {
		return err
	}
	return writeTar(w, append(ms, member{"manifest.json", manifest}))
}

func writeTar(w io.Writer, ms []member) error {
	zw := gzip.NewWriter(w)
	tw := tar.NewWriter(zw)
	for _, m := range ms {
		if err := tw.WriteHeader(&tar.Header{Name: m.name, Mode: 0o644, Size: int64(len(m.body)), Typeflag: tar.TypeReg, ModTime: time.Unix(0, 0)}); err != nil {
			return err
		}
		if _, err := tw.Write(m.body); err != nil {
			return err
		}
	}
	if err := tw.Close(); err != nil {
		return err
	}
	return zw.Close()
}

// SaveLegacy writes the legacy layout to a file.
func (im Image) SaveLegacy(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	if err := WriteLegacy(f, im); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}
