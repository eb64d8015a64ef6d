package archive

import (
	"bytes"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"coffer/internal/testenv"
)

// skopeo reads our test archives, and what it writes of them is the same image.
func TestSkopeo(t *testing.T) {
	skopeo := testenv.LookTool(t, "skopeo")
	run := func(args ...string) []byte {
		t.Helper()
		cmd := exec.Command(skopeo, append([]string{"--insecure-policy", "--tmpdir", t.TempDir()}, args...)...)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("skopeo %v: %v\n%s", args, err, &stderr)
		}
		return out
	}
	// The config as people have it: skopeo wants its history to fit the layers.
	im := image{tags: []string{"docker.io/library/app:1"}, layers: [][]byte{layerTar("base"), layerTar("top")}}
	in := "docker-archive:" + save(t, makeTar(legacy(im)...)) + ":" + im.tags[0]
	dir := t.TempDir()
	for name, args := range map[string][]string{
		"docker":     {"docker-archive:" + filepath.Join(dir, "docker") + ":app:1"},
		"two tags":   {"--additional-tag", "app:2", "docker-archive:" + filepath.Join(dir, "two tags") + ":app:1"},
		"oci":        {"oci-archive:" + filepath.Join(dir, "oci") + ":app:1"},
		"oci, zstd":  {"--dest-compress-format", "zstd", "oci-archive:" + filepath.Join(dir, "oci, zstd") + ":app:1"},
		"oci, plain": {"--dest-decompress", "oci-archive:" + filepath.Join(dir, "oci, plain") + ":app:1"},
	} {
		t.Run(name, func(t *testing.T) {
			dest := args[len(args)-1]
			run(append([]string{"copy"}, append(args[:len(args)-1], in, dest)...)...)
			res, err := Read(t.Context(), filepath.Join(dir, name), Options{Layer: func(_ int, r io.Reader) error {
				_, err := io.Copy(io.Discard, r)
				return err
			}})
			if err != nil {
				t.Fatal(err)
			}
			if want := []string{"sha256:" + sha(im.layers[0]), "sha256:" + sha(im.layers[1])}; !slices.Equal(res.Image.DiffIDs, want) {
				t.Errorf("layers %v, want %v", res.Image.DiffIDs, want)
			}
			if got := run("inspect", "--config", "--raw", dest); !bytes.Equal(got, res.Image.Config) {
				t.Errorf("config\n%s\nskopeo says\n%s", res.Image.Config, got)
			}
			wantTags := []string{"docker.io/library/app:1"}
			if name == "two tags" {
				wantTags = append(wantTags, "docker.io/library/app:2")
			}
			if !slices.Equal(res.Image.Tags, wantTags) {
				t.Errorf("tags %v, want %v", res.Image.Tags, wantTags)
			}
			checkMeta(t, res)

			// And what the guest imports is an image to skopeo, but for its layers.
			meta := save(t, res.Meta)
			if got := run("inspect", "--config", "--raw", "oci-archive:"+meta); !bytes.Equal(got, res.Image.Config) {
				t.Errorf("the guest's config\n%s", got)
			}
		})
	}
}
