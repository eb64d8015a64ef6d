package archive

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
)

type object = map[string]any

func sha(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

func toJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}

func gz(b []byte) []byte {
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	w.Write(b)
	w.Close()
	return buf.Bytes()
}

func zst(b []byte) []byte {
	w, _ := zstd.NewWriter(nil)
	return w.EncodeAll(b, nil)
}

func asIs(b []byte) []byte { return b }

// entry is a file of an archive, a symbolic link, or a device.
type entry struct {
	name   string
	data   []byte
	link   string
	device bool
}

func makeTar(entries ...entry) []byte {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Mode: 0o644, Size: int64(len(e.data)), Typeflag: tar.TypeReg}
		if e.link != "" {
			h.Typeflag, h.Linkname = tar.TypeSymlink, e.link
		}
		if e.device {
			h.Typeflag, h.Devmajor, h.Devminor = tar.TypeBlock, 8, 0
		}
		if err := w.WriteHeader(h); err != nil {
			panic(err)
		}
		w.Write(e.data)
	}
	w.Close()
	return buf.Bytes()
}

// layerTar is a layer with one file. Its padding is that of GNU tar.
func layerTar(text string) []byte {
	b := makeTar(entry{name: "f", data: []byte(text)})
	return append(b, make([]byte, 10240-len(b)%10240)...)
}

// image is what a test puts into an archive.
type image struct {
	tags     []string
	layers   [][]byte
	platform string // empty: linux/amd64
}

func (im image) config() []byte {
	var ids []string
	for _, l := range im.layers {
		ids = append(ids, "sha256:"+sha(l))
	}
	c := object{
		"config": object{"Entrypoint": []string{"/app"}, "Cmd": []string{"a", "b"}, "Healthcheck": object{"Test": []string{"NONE"}}},
		"rootfs": object{"type": "layers", "diff_ids": ids},
	}
	goos, arch, _ := strings.Cut(im.platform, "/")
	if im.platform == "" {
		goos, arch = "linux", "amd64"
	}
	if im.platform != "none" {
		c["os"], c["architecture"] = goos, arch
	}
	return toJSON(c)
}

// legacy is the layout of `docker save` before version 25: manifest.json comes
// last, and a layer that is there already is a symbolic link.
func legacy(images ...image) []entry {
	var out []entry
	var manifest []object
	where := map[string]string{}
	n := 0
	for _, im := range images {
		var layers []string
		for _, l := range im.layers {
			n++
			name := fmt.Sprintf("%064x/layer.tar", n)
			if first, ok := where[sha(l)]; ok {
				out = append(out, entry{name: name, link: "../" + first})
			} else {
				out = append(out, entry{name: name, data: l})
				where[sha(l)] = name
			}
			out = append(out, entry{name: filepath.Dir(name) + "/VERSION", data: []byte("1.0")}, entry{name: filepath.Dir(name) + "/json", data: []byte(`{"id":"x"}`)})
			layers = append(layers, name)
		}
		config := sha(im.config()) + ".json"
		out = append(out, entry{name: config, data: im.config()})
		manifest = append(manifest, object{"Config": config, "RepoTags": im.tags, "Layers": layers})
	}
	return append(out, entry{name: "manifest.json", data: toJSON(manifest)}, entry{name: "repositories", data: []byte("{}")})
}

// oci is an OCI layout. Options: compress its layers, put the manifests into a
// nested index with an attestation, add docker's manifest.json.
func oci(compress func([]byte) []byte, nested, docker bool, images ...image) []entry {
	blobs := map[string][]byte{}
	blob := func(mediaType string, b []byte) object {
		blobs["blobs/sha256/"+sha(b)] = b
		return object{"mediaType": mediaType, "digest": "sha256:" + sha(b), "size": len(b)}
	}
	const manifestType = "application/vnd.oci.image.manifest.v1+json"
	var tops []object
	var manifest []object
	for _, im := range images {
		var layers []object
		var paths []string
		for _, l := range im.layers {
			d := blob("application/vnd.oci.image.layer.v1.tar+whatever", compress(l))
			layers = append(layers, d)
			paths = append(paths, "blobs/sha256/"+sha(compress(l)))
		}
		top := blob(manifestType, toJSON(object{
			"schemaVersion": 2, "mediaType": manifestType,
			"config": blob("application/vnd.oci.image.config.v1+json", im.config()), "layers": layers,
		}))
		if nested {
			top["platform"] = object{"os": "linux", "architecture": "amd64"}
			if goos, arch, ok := strings.Cut(im.platform, "/"); ok {
				top["platform"] = object{"os": goos, "architecture": arch}
			}
			attestation := blob(manifestType, toJSON(object{
				"schemaVersion": 2, "config": blob("application/vnd.oci.image.config.v1+json", []byte(`{"architecture":"unknown"}`)), "layers": []object{},
			}))
			attestation["annotations"] = object{"vnd.docker.reference.type": "attestation-manifest"}
			attestation["platform"] = object{"os": "unknown", "architecture": "unknown"}
			absent := object{"mediaType": manifestType, "digest": "sha256:" + sha([]byte("other platform")), "size": 1, "platform": object{"os": "linux", "architecture": "s390x"}}
			top = blob("application/vnd.oci.image.index.v1+json", toJSON(object{"schemaVersion": 2, "manifests": []object{attestation, absent, top}}))
		}
		if len(im.tags) > 0 {
			top["annotations"] = object{"io.containerd.image.name": im.tags[0], "org.opencontainers.image.ref.name": "1"}
		}
		tops = append(tops, top)
		manifest = append(manifest, object{"Config": "blobs/sha256/" + sha(im.config()), "RepoTags": im.tags, "Layers": paths})
	}
	var out []entry
	for _, name := range slices.Sorted(maps.Keys(blobs)) {
		out = append(out, entry{name: name, data: blobs[name]})
	}
	out = append(out, entry{name: "index.json", data: toJSON(object{"schemaVersion": 2, "manifests": tops})})
	if docker {
		out = append(out, entry{name: "manifest.json", data: toJSON(manifest)})
	}
	return append(out, entry{name: "oci-layout", data: []byte(`{"imageLayoutVersion":"1.0.0"}`)})
}

func save(t testing.TB, b []byte) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "image.bin") // a name that says nothing
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// read reads an archive and returns the layers as they came by.
func read(t testing.TB, b []byte, ref string) (*Result, [][]byte, error) {
	t.Helper()
	var layers [][]byte
	res, err := Read(t.Context(), save(t, b), Options{Ref: ref, Layer: func(i int, r io.Reader) error {
		if i != len(layers) {
			t.Errorf("layer %d comes after %d", i, len(layers))
		}
		l, err := io.ReadAll(r)
		layers = append(layers, l)
		return err
	}})
	return res, layers, err
}

var app = image{tags: []string{"app:1"}, layers: [][]byte{layerTar("base"), layerTar("middle"), layerTar("base"), layerTar("top")}}

func TestForms(t *testing.T) {
	podman := func() []entry { // layers beside links with the old names
		var out []entry
		var names []string
		for i, l := range app.layers {
			out = append(out, entry{name: sha(l) + ".tar", data: l}, entry{name: fmt.Sprintf("id%d/layer.tar", i), link: "../" + sha(l) + ".tar"})
			names = append(names, sha(l)+".tar")
		}
		return append(out, entry{name: "c.json", data: app.config()},
			entry{name: "manifest.json", data: toJSON([]object{{"Config": "c.json", "RepoTags": app.tags, "Layers": names}})})
	}
	crane := func() []entry { // as kaniko does it too: gzip'd layers, the config named by its digest
		out := []entry{{name: "sha256:" + sha(app.config()), data: app.config()}}
		var names []string
		for _, l := range app.layers {
			name := sha(gz(l)) + ".tar.gz"
			if !slices.Contains(names, name) {
				out = append(out, entry{name: name, data: gz(l)})
			}
			names = append(names, name)
		}
		return append(out, entry{name: "manifest.json", data: toJSON([]object{{"Config": "sha256:" + sha(app.config()), "RepoTags": app.tags, "Layers": names}})})
	}
	for form, entries := range map[string][]entry{
		"crane, kaniko":           crane(),
		"docker before 25":        legacy(app),
		"podman":                  podman(),
		"docker 25":               oci(asIs, false, true, app),
		"docker 25, gzip":         oci(gz, false, true, app),
		"docker 28, index":        oci(gz, true, true, app),
		"OCI layout":              oci(asIs, false, false, app),
		"OCI layout, gzip":        oci(gz, false, false, app),
		"OCI layout, zstd":        oci(zst, false, false, app),
		"OCI layout, index":       oci(zst, true, false, app),
		"OCI, several platforms":  oci(gz, true, false, image{tags: app.tags, layers: [][]byte{layerTar("arm")}, platform: "linux/arm64"}, app),
		"platform not in config":  legacy(image{tags: app.tags, layers: app.layers, platform: "none"}),
		"names with leading dots": dotted(legacy(app)),
	} {
		for outer, compress := range map[string]func([]byte) []byte{"plain": asIs, "gzip": gz, "zstd": zst} {
			t.Run(form+", "+outer, func(t *testing.T) {
				res, layers, err := read(t, compress(makeTar(entries...)), "")
				if err != nil {
					t.Fatal(err)
				}
				if len(res.Layers) != len(app.layers) {
					t.Fatalf("%d layers", len(res.Layers))
				}
				for i, l := range res.Layers {
					if !bytes.Equal(layers[l.Index], app.layers[i]) || l.Size != int64(len(app.layers[i])) || l.DiffID != "sha256:"+sha(app.layers[i]) || l.DiffID != res.Image.DiffIDs[i] {
						t.Errorf("layer %d is another: %+v", i, l)
					}
				}
				im := res.Image
				if im.Name != "docker.io/library/app:1" || im.Platform != "linux/amd64" || im.ConfigDigest != "sha256:"+sha(im.Config) ||
					!slices.Equal(im.Entrypoint, []string{"/app"}) || !slices.Equal(im.Cmd, []string{"a", "b"}) {
					t.Errorf("image %+v", im)
				}
				checkMeta(t, res)
			})
		}
	}
}

func dotted(in []entry) []entry {
	for i := range in {
		in[i].name = "./" + in[i].name
	}
	return in
}

// checkMeta follows the digests of the meta tar from its index to the layers.
func checkMeta(t *testing.T, res *Result) {
	t.Helper()
	files := map[string][]byte{}
	tr := tar.NewReader(bytes.NewReader(res.Meta))
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		files[h.Name], _ = io.ReadAll(tr)
	}
	type descriptor struct {
		MediaType, Digest string
		Size              int
		Annotations       map[string]string
	}
	var index struct{ Manifests []descriptor }
	var manifest struct {
		Config descriptor
		Layers []descriptor
	}
	if string(files["oci-layout"]) != `{"imageLayoutVersion":"1.0.0"}` || len(files) != 4 {
		t.Errorf("files %v", slices.Sorted(maps.Keys(files)))
	}
	if err := json.Unmarshal(files["index.json"], &index); err != nil || len(index.Manifests) != 1 {
		t.Fatalf("index.json: %v: %s", err, files["index.json"])
	}
	d := index.Manifests[0]
	if d.Annotations["io.containerd.image.name"] != res.Image.Name || d.Annotations["org.opencontainers.image.ref.name"] != res.Image.Name || d.Digest != res.Image.Digest {
		t.Errorf("index %+v", d)
	}
	b := files["blobs/sha256/"+strings.TrimPrefix(d.Digest, "sha256:")]
	if "sha256:"+sha(b) != d.Digest || len(b) != d.Size {
		t.Error("the manifest is not what the index says")
	}
	if err := json.Unmarshal(b, &manifest); err != nil {
		t.Fatal(err)
	}
	c := files["blobs/sha256/"+strings.TrimPrefix(manifest.Config.Digest, "sha256:")]
	if !bytes.Equal(c, res.Image.Config) || manifest.Config.Digest != res.Image.ConfigDigest || manifest.Config.Size != len(c) {
		t.Error("the config is another")
	}
	for i, l := range manifest.Layers {
		if l.MediaType != "application/vnd.oci.image.layer.v1.tar" || l.Digest != res.Layers[i].DiffID || int64(l.Size) != res.Layers[i].Size {
			t.Errorf("layer %d: %+v", i, l)
		}
	}
	if len(manifest.Layers) != len(res.Layers) {
		t.Errorf("%d layers", len(manifest.Layers))
	}
}

// The bytes of the meta tar are part of what a guest measures.
func TestMetaGolden(t *testing.T) {
	res, _, err := read(t, makeTar(legacy(app)...), "")
	if err != nil {
		t.Fatal(err)
	}
	if got := sha(res.Meta); got != "041dd159d4192516b5e796aea1f4600aa67017277344734d351464f75f2d844a" {
		t.Errorf("SHA-256 %s", got)
	}
}

func TestChoice(t *testing.T) {
	one := image{tags: []string{"one:1", "registry.example/team/one:v1"}, layers: [][]byte{layerTar("1")}}
	two := image{tags: []string{"two"}, layers: [][]byte{layerTar("1"), layerTar("2")}}
	noName := image{layers: [][]byte{layerTar("3")}}
	arm := image{tags: []string{"two"}, layers: [][]byte{layerTar("arm")}, platform: "linux/arm64"}
	both := makeTar(legacy(one, two)...)
	for name, c := range map[string]struct {
		archive []byte
		ref     string
		want    string // name
		err     error
		words   []string
	}{
		"several":            {both, "", "", ErrTwoImages, []string{"docker.io/library/one:1", "registry.example/team/one:v1", "docker.io/library/two:latest"}},
		"by tag":             {both, "one:1", "docker.io/library/one:1", nil, nil},
		"by second tag":      {both, "registry.example/team/one:v1", "registry.example/team/one:v1", nil, nil},
		"by short name":      {both, "two", "docker.io/library/two:latest", nil, nil},
		"by full name":       {both, "docker.io/library/two:latest", "docker.io/library/two:latest", nil, nil},
		"by config digest":   {both, "sha256:" + sha(two.config()), "docker.io/library/two:latest", nil, nil},
		"by image ID":        {both, sha(one.config())[:12], "docker.io/library/one:1", nil, nil},
		"short ID":           {both, sha(one.config())[:6], "", ErrNoImage, nil},
		"none of that name":  {both, "three", "", ErrNoImage, []string{`"three"`, "docker.io/library/one:1", "docker.io/library/two:latest"}},
		"same image twice":   {makeTar(legacy(one, one)...), "", "docker.io/library/one:1", nil, nil},
		"no name":            {makeTar(legacy(noName)...), "", "localhost/untagged:" + sha(noName.config())[:12], nil, nil},
		"other platform":     {makeTar(legacy(arm)...), "", "", ErrPlatform, []string{"linux/arm64", "--platform linux/amd64"}},
		"platform chooses":   {makeTar(legacy(arm, two)...), "", "docker.io/library/two:latest", nil, nil},
		"ref and platform":   {makeTar(oci(gz, true, false, arm, two)...), "two", "docker.io/library/two:latest", nil, nil},
		"several in index":   {makeTar(oci(gz, false, false, one, two)...), "", "", ErrTwoImages, []string{"docker.io/library/one:1", "docker.io/library/two:latest"}},
		"by manifest digest": {makeTar(oci(asIs, false, false, one, two)...), manifestDigest(t, one), "docker.io/library/one:1", nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			res, _, err := read(t, c.archive, c.ref)
			if !errors.Is(err, c.err) {
				t.Fatalf("error %v, want %v", err, c.err)
			}
			for _, w := range c.words {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("error %q does not name %q", err, w)
				}
			}
			if c.err == nil && res.Image.Name != c.want {
				t.Errorf("name %q, want %q", res.Image.Name, c.want)
			}
		})
	}
}

func manifestDigest(t *testing.T, im image) string {
	for _, e := range oci(asIs, false, false, im) {
		if bytes.Contains(e.data, []byte(`"layers":[`)) {
			return "sha256:" + sha(e.data)
		}
	}
	t.Fatal("no manifest")
	return ""
}

// without leaves out the entries whose name ends in suffix; with changes them.
func without(in []entry, suffix string) []entry {
	return slices.DeleteFunc(slices.Clone(in), func(e entry) bool { return strings.HasSuffix(e.name, suffix) })
}

func with(in []entry, suffix string, data []byte) []entry {
	out := slices.Clone(in)
	for i := range out {
		if strings.HasSuffix(out[i].name, suffix) {
			out[i].data = data
		}
	}
	return out
}

func TestBadArchives(t *testing.T) {
	old := legacy(app)
	layout := oci(asIs, false, false, app)
	top := sha(layerTar("top"))
	whole := makeTar(old...)
	zipped := gz(whole)
	flipped := bytes.Clone(zipped)
	flipped[len(flipped)-5] ^= 1 // in the checksum
	zstBroken := zst(whole)
	zstBroken[len(zstBroken)/2] ^= 0xff
	var manyFiles []entry
	for i := range maxFiles + 1 {
		manyFiles = append(manyFiles, entry{name: fmt.Sprint(i)})
	}
	var deep []byte
	inner := object{"mediaType": "application/vnd.oci.image.index.v1+json", "digest": "sha256:" + sha([]byte("x")), "size": 1}
	deepEntries := []entry{}
	for range 6 {
		deep = toJSON(object{"schemaVersion": 2, "manifests": []object{inner}})
		deepEntries = append(deepEntries, entry{name: "blobs/sha256/" + sha(deep), data: deep})
		inner = object{"mediaType": "application/vnd.oci.image.index.v1+json", "digest": "sha256:" + sha(deep), "size": len(deep)}
	}
	deepEntries = append(deepEntries, entry{name: "index.json", data: deep})

	for name, c := range map[string]struct {
		archive []byte
		want    error
		words   string
	}{
		"empty":                      {nil, ErrNotArchive, "empty"},
		"text":                       {[]byte(strings.Repeat("hello world\n", 100)), ErrNotArchive, "docker save"},
		"gzip'd text":                {gz([]byte("hello")), ErrNotArchive, "gzip"},
		"xz":                         {append([]byte("\xfd7zXZ\x00"), make([]byte, 1000)...), ErrNotArchive, "xz"},
		"another tar":                {makeTar(entry{name: "etc/passwd", data: []byte("x")}), ErrNotArchive, "manifest.json"},
		"truncated tar":              {whole[:20000], ErrTruncated, "again"},
		"truncated gzip":             {zipped[:len(zipped)-100], ErrTruncated, "again"},
		"gzip without its checksum":  {zipped[:len(zipped)-8], ErrTruncated, "again"},
		"truncated zstd":             {zst(whole)[:100], ErrTruncated, "again"},
		"gzip checksum":              {flipped, ErrDamaged, "again"},
		"damaged zstd":               {zstBroken, ErrDamaged, "again"},
		"truncated gzip'd layer":     {makeTar(with(layout, "blobs/sha256/"+top, gz(layerTar("top"))[:50])...), ErrTruncated, top},
		"missing layer":              {makeTar(without(layout, top)...), ErrMissing, "layer 4 of 4 (sha256:" + top},
		"missing layer, old":         {makeTar(without(old, "4/layer.tar")...), ErrMissing, "4/layer.tar"},
		"other layer":                {makeTar(with(layout, top, layerTar("evil"))...), ErrDamaged, sha(layerTar("evil"))},
		"layer is no tar":            {makeTar(with(layout, top, []byte("evil"))...), ErrDamaged, "no tar"},
		"other config":               {makeTar(with(layout, sha(app.config()), []byte(`{}`))...), ErrMissing, sha(app.config())},
		"no config":                  {makeTar(without(old, sha(app.config())+".json")...), ErrMissing, "config"},
		"config without layers":      {makeTar(legacy(image{tags: app.tags})...), ErrMissing, "no layers"},
		"config is a list":           {makeTar(with(old, sha(app.config())+".json", []byte("[1]"))...), ErrDamaged, "config"},
		"manifest.json is an object": {makeTar(with(old, "manifest.json", []byte("{}"))...), ErrDamaged, "manifest.json"},
		"manifest.json is empty":     {makeTar(with(old, "manifest.json", []byte("[]"))...), ErrMissing, "manifest.json"},
		"index.json is a list":       {makeTar(with(layout, "index.json", []byte("[]"))...), ErrDamaged, "index.json"},
		"index.json is empty":        {makeTar(with(layout, "index.json", []byte("{}"))...), ErrMissing, "index.json"},
		"no manifest":                {makeTar(with(layout, "index.json", []byte(`{"manifests":[{"digest":"sha256:00"}]}`))...), ErrMissing, "sha256:00"},
		"digest without a colon":     {makeTar(with(layout, "index.json", []byte(`{"manifests":[{"digest":"x"}]}`))...), ErrMissing, "x"},
		"indexes, deep":              {makeTar(deepEntries...), ErrLimit, "deep"},
		"two manifest.json":          {makeTar(append(slices.Clone(old), entry{name: "./manifest.json", data: toJSON([]object{{"Config": "x"}})})...), ErrDamaged, `two files "manifest.json"`},
		"a layer twice, swapped":     {makeTar(append(slices.Clone(old), entry{name: fmt.Sprintf("%064x/layer.tar", 4), data: layerTar("evil")})...), ErrDamaged, "two files"},
		"a layer is a link outwards": {makeTar(append(without(old, "4/layer.tar"), entry{name: fmt.Sprintf("%064x/layer.tar", 4), link: "../../../../etc/passwd"})...), ErrMissing, "4/layer.tar"},
		"a layer is a device":        {makeTar(append(without(old, "4/layer.tar"), entry{name: fmt.Sprintf("%064x/layer.tar", 4), device: true})...), ErrMissing, "4/layer.tar"},
		"long name":                  {makeTar(entry{name: "first", data: []byte("{}")}, entry{name: strings.Repeat("x", maxName+1), data: []byte("{}")}), ErrLimit, "4097"},
		"many files":                 {makeTar(manyFiles...), ErrLimit, "files"},
	} {
		t.Run(name, func(t *testing.T) {
			res, _, err := read(t, c.archive, "")
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.words) || !strings.Contains(err.Error(), "image.bin") {
				t.Errorf("result %v, error %v, want %v with %q and the file's name", res, err, c.want, c.words)
			}
		})
	}
}

func TestManyLayersAndDocuments(t *testing.T) {
	var entries []entry
	for i := range maxLayers + 1 {
		entries = append(entries, entry{name: fmt.Sprint(i), data: make([]byte, 1024)})
	}
	if _, _, err := read(t, makeTar(entries...), ""); !errors.Is(err, ErrLimit) {
		t.Errorf("too many layers: %v", err)
	}
	entries = nil
	doc := append([]byte("["), bytes.Repeat([]byte(" "), maxDocument-1)...)
	for i := range maxDocuments/maxDocument + 1 {
		entries = append(entries, entry{name: fmt.Sprint(i), data: doc})
	}
	if _, _, err := read(t, makeTar(entries...), ""); !errors.Is(err, ErrLimit) {
		t.Errorf("too many documents: %v", err)
	}
}

func TestNoFile(t *testing.T) {
	if _, err := Read(t.Context(), "/no/such/file", Options{}); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "/no/such/file") {
		t.Errorf("error %v", err)
	}
	if _, err := Read(t.Context(), t.TempDir(), Options{}); !errors.Is(err, ErrNotArchive) {
		t.Errorf("a folder: %v", err)
	}
}

// An error of the caller ends the reading and comes back as it is.
func TestCallerStops(t *testing.T) {
	stop := errors.New("stop")
	for name, compress := range map[string]func([]byte) []byte{"plain": asIs, "gzip": gz} {
		_, err := Read(t.Context(), save(t, makeTar(oci(compress, false, false, app)...)), Options{
			Layer: func(int, io.Reader) error { return stop },
		})
		if !errors.Is(err, stop) {
			t.Errorf("%s: error %v", name, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	_, err := Read(ctx, save(t, makeTar(legacy(app)...)), Options{Layer: func(_ int, r io.Reader) error {
		cancel()
		_, err := io.Copy(io.Discard, r)
		return err
	}})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestProgress(t *testing.T) {
	b := makeTar(legacy(app)...)
	var last, total int64
	_, err := Read(t.Context(), save(t, b), Options{
		Layer:    func(_ int, r io.Reader) error { _, err := io.Copy(io.Discard, r); return err },
		Progress: func(d, n int64) { last, total = d, n },
	})
	if err != nil || last != int64(len(b)) || total != int64(len(b)) {
		t.Errorf("%d of %d bytes, error %v", last, total, err)
	}
}

func FuzzRead(f *testing.F) {
	small := image{tags: []string{"a"}, layers: [][]byte{makeTar(entry{name: "f"})}}
	f.Add(makeTar(legacy(small)...))
	f.Add(makeTar(oci(gz, true, true, small)...))
	f.Add(gz(makeTar(oci(asIs, false, false, small)...)))
	f.Add(zst(makeTar(oci(zst, false, false, small)...)))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, b []byte) {
		name := filepath.Join(dir, fmt.Sprint(os.Getpid()))
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
		layers := 0
		res, err := Read(t.Context(), name, Options{Layer: func(_ int, r io.Reader) error {
			layers++
			_, err := io.Copy(io.Discard, io.LimitReader(r, 1<<30))
			return err
		}})
		if err != nil {
			return
		}
		for i, l := range res.Layers {
			if l.Index >= layers || l.DiffID != res.Image.DiffIDs[i] {
				t.Errorf("layer %d: %+v", i, l)
			}
		}
	})
}
