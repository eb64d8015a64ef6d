package archive

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// meta makes the OCI layout that containerd imports in the guest: everything but
// the layers, which lie beside it under their diff IDs. The config stays as it
// is, byte for byte; the manifest is ours, because it describes plain layers.
// The same image gives the same bytes.
func meta(im Image, layers []Layer) (tarball []byte, manifestDigest string, err error) {
	manifest := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageManifest,
		Config:    ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.Digest(im.ConfigDigest), Size: int64(len(im.Config))},
	}
	for _, l := range layers {
		manifest.Layers = append(manifest.Layers, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.Digest(l.DiffID), Size: l.Size})
	}
	m, err := json.Marshal(manifest)
	if err != nil {
		return nil, "", err
	}
	index, err := json.Marshal(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{{
			MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(m), Size: int64(len(m)),
			Annotations: map[string]string{nameAnnotation: im.Name, refAnnotation: im.Name},
			Platform:    &ocispec.Platform{OS: "linux", Architecture: "amd64"},
		}},
	})
	if err != nil {
		return nil, "", err
	}
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, f := range []struct {
		name string
		data []byte
	}{
		{ocispec.ImageLayoutFile, []byte(`{"imageLayoutVersion":"` + ocispec.ImageLayoutVersion + `"}`)},
		{ocispec.ImageIndexFile, index},
		{blobPath(digest.FromBytes(m)), m},
		{blobPath(digest.Digest(im.ConfigDigest)), im.Config},
	} {
		if err := w.WriteHeader(&tar.Header{Name: f.name, Mode: 0o644, Size: int64(len(f.data)), Format: tar.FormatUSTAR}); err != nil {
			return nil, "", fmt.Errorf("meta tar: %w", err)
		}
		if _, err := w.Write(f.data); err != nil {
			return nil, "", fmt.Errorf("meta tar: %w", err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, "", fmt.Errorf("meta tar: %w", err)
	}
	return buf.Bytes(), digest.FromBytes(m).String(), nil
}

func blobPath(d digest.Digest) string {
	return ocispec.ImageBlobsDir + "/" + d.Algorithm().String() + "/" + d.Encoded()
}
