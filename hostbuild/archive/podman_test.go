package archive

import (
	"archive/tar"
	"bytes"
	"io"
	"path/filepath"
	"slices"
	"testing"
)

// Podman 4.3.1 wrote these two: `podman build` of two COPY from scratch, then
// `podman save`, once as it is and once with --format oci-archive.
func TestPodman(t *testing.T) {
	diffIDs := []string{
		"sha256:e7f71ece5e1e67014ba58157603621eaefd769c7059f6767d8f50cb6ee9077b4",
		"sha256:cc517d0c9aed5eba79299b2ad51cde33fae8f64a5003cd66a5ed1e1c0820a555",
	}
	for _, file := range []string{"podman-docker.tar", "podman-oci.tar"} {
		var layers [][]string
		res, err := Read(t.Context(), filepath.Join("testdata", file), Options{Layer: func(_ int, r io.Reader) error {
			b, err := io.ReadAll(r)
			if err != nil {
				return err
			}
			var names []string
			for tr := tar.NewReader(bytes.NewReader(b)); ; {
				h, err := tr.Next()
				if err == io.EOF {
					layers = append(layers, names)
					return nil
				}
				if err != nil {
					return err
				}
				names = append(names, h.Name)
			}
		}})
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(res.Image.DiffIDs, diffIDs) || res.Image.Name != "localhost/coffer-podman:1" || !slices.Equal(res.Image.Cmd, []string{"/a/x"}) {
			t.Errorf("%s: image %+v", file, res.Image)
		}
		for i, want := range [][]string{{"a/", "a/x"}, {"b/", "b/y"}} {
			if got := layers[res.Layers[i].Index]; !slices.Equal(got, want) {
				t.Errorf("%s: layer %d holds %q, want %q", file, i, got, want)
			}
		}
		checkMeta(t, res)
	}
}
