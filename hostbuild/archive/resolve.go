package archive

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// candidate is an image that the archive offers.
type candidate struct {
	names    []string // in full form
	manifest string   // hex digest of an OCI manifest, or empty
	config   string   // hex digest
	layers   []string // where the archive says that its layers are
}

func (c candidate) String() string {
	if len(c.names) > 0 {
		return strings.Join(c.names, " = ")
	}
	return "sha256:" + c.config + " (no name)"
}

// resolve finds the image among what the archive held.
func (s *scan) resolve() (*Result, error) {
	all, err := s.candidates()
	if err != nil {
		return nil, err
	}
	c, config, err := s.choose(all)
	if err != nil {
		return nil, err
	}
	im := Image{
		Tags: c.names, Config: s.docs[c.config], ConfigDigest: "sha256:" + c.config, Platform: platform,
		Entrypoint: config.Config.Entrypoint, Cmd: config.Config.Cmd,
	}
	switch full := fullName(s.o.Ref); {
	case slices.Contains(c.names, full):
		im.Name = full
	case len(c.names) > 0:
		im.Name = c.names[0]
	default:
		im.Name = "localhost/untagged:" + c.config[:12]
	}
	if config.RootFS.Type != "layers" || len(config.RootFS.DiffIDs) == 0 {
		return nil, fmt.Errorf("%w: the config of %s lists no layers", ErrMissing, c)
	}
	res := &Result{}
	for i, d := range config.RootFS.DiffIDs {
		l, ok := s.layers[d.String()]
		if !ok {
			return nil, s.missingLayer(c, i, len(config.RootFS.DiffIDs), d)
		}
		im.DiffIDs = append(im.DiffIDs, l.DiffID)
		res.Layers = append(res.Layers, l)
	}
	res.Meta, im.Digest, err = meta(im, res.Layers)
	if err != nil {
		return nil, err
	}
	res.Image = im
	return res, nil
}

func (s *scan) missingLayer(c candidate, i, n int, d digest.Digest) error {
	what := fmt.Sprintf("layer %d of %d (%s)", i+1, n, d)
	if i >= len(c.layers) {
		return fmt.Errorf("%w: no file holds %s; `docker save` the image again", ErrMissing, what)
	}
	switch f, ok := s.files[clean(c.layers[i])]; {
	case !ok:
		return fmt.Errorf("%w: no file holds %s, and %q is not there; `docker save` the image again", ErrMissing, what, c.layers[i])
	case f.diffID == "":
		return fmt.Errorf("%w: %q, which should hold %s, holds no tar; `docker save` the image again", ErrDamaged, c.layers[i], what)
	default:
		return fmt.Errorf("%w: %q holds %s instead of %s; `docker save` the image again", ErrDamaged, c.layers[i], f.diffID, what)
	}
}

// choose picks the image that was asked for, and reads its config.
func (s *scan) choose(all []candidate) (c candidate, config ocispec.Image, err error) {
	list := func(cs []candidate) string {
		var names []string
		for _, c := range cs {
			names = append(names, c.String())
		}
		return strings.Join(names, "; ")
	}
	named := all
	if s.o.Ref != "" {
		named = slices.DeleteFunc(slices.Clone(all), func(c candidate) bool { return !c.is(s.o.Ref) })
		if len(named) == 0 {
			return c, config, fmt.Errorf("%w: %q is not among these: %s", ErrNoImage, s.o.Ref, list(all))
		}
	}
	var fit []candidate
	var others []string
	for _, c := range named {
		if slices.ContainsFunc(fit, func(f candidate) bool { return f.config == c.config }) {
			continue
		}
		var im ocispec.Image
		if err := json.Unmarshal(s.docs[c.config], &im); err != nil {
			return c, config, fmt.Errorf("%w: the config of %s is no JSON: %w", ErrDamaged, c, err)
		}
		if p := im.OS + "/" + im.Architecture; p != platform && p != "/" {
			others = append(others, p)
			continue
		}
		fit = append(fit, c)
		config = im
	}
	switch len(fit) {
	case 0:
		return c, config, fmt.Errorf("%w but for %s; build or pull it with --platform %s", ErrPlatform, strings.Join(others, ", "), platform)
	case 1:
		return fit[0], config, nil
	}
	return c, config, fmt.Errorf("%w: set docker_image to one of them, or `docker save` only one: %s", ErrTwoImages, list(fit))
}

// platform is the only one that a confidential VM of ours runs.
const platform = "linux/amd64"

// is tells whether ref, a name or a digest, means this image.
func (c candidate) is(ref string) bool {
	if slices.Contains(c.names, fullName(ref)) {
		return true
	}
	id := strings.TrimPrefix(ref, "sha256:")
	if _, err := hex.DecodeString(id); err != nil || len(id) < 12 {
		return false
	}
	return strings.HasPrefix(c.config, id) || strings.HasPrefix(c.manifest, id)
}

// fullName writes out what a short name means to docker.
func fullName(name string) string {
	n, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return name
	}
	return reference.TagNameOnly(n).String()
}

// candidates lists the images. docker's manifest.json goes first: where both are
// there, it names what `docker load` would load.
func (s *scan) candidates() ([]candidate, error) {
	if b, ok := s.doc("manifest.json"); ok {
		return s.dockerCandidates(b)
	}
	b, ok := s.doc("index.json")
	if !ok {
		return nil, fmt.Errorf("%w: it is a tar, but has neither manifest.json nor index.json; write it with `docker save -o` (`docker export` is another thing)", ErrNotArchive)
	}
	var index ocispec.Index
	if err := json.Unmarshal(b, &index); err != nil {
		return nil, fmt.Errorf("%w: index.json: %w", ErrDamaged, err)
	}
	var out []candidate
	var missing []error
	for _, d := range index.Manifests {
		cs, err := s.ociCandidates(d, nil, 0)
		if err != nil {
			missing = append(missing, err)
		}
		out = append(out, cs...)
	}
	if len(out) == 0 {
		if err := errors.Join(missing...); err != nil {
			return nil, err
		}
		return nil, fmt.Errorf("%w: index.json lists no image", ErrMissing)
	}
	return out, nil
}

func (s *scan) doc(name string) ([]byte, bool) {
	b, ok := s.docs[s.files[name].doc]
	return b, ok
}

func (s *scan) dockerCandidates(b []byte) ([]candidate, error) {
	var items []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	if err := json.Unmarshal(b, &items); err != nil {
		return nil, fmt.Errorf("%w: manifest.json: %w", ErrDamaged, err)
	}
	var out []candidate
	for _, it := range items {
		f := s.files[clean(it.Config)]
		if f.doc == "" {
			return nil, fmt.Errorf("%w: manifest.json names the config %q, which is not there; `docker save` the image again", ErrMissing, it.Config)
		}
		c := candidate{config: f.doc, layers: it.Layers}
		for _, t := range it.RepoTags {
			c.names = append(c.names, fullName(t))
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%w: manifest.json lists no image", ErrMissing)
	}
	return out, nil
}

// hexOf is the hex part of a SHA-256 digest, and empty for any other string.
func hexOf(d digest.Digest) string {
	if d.Validate() != nil || d.Algorithm() != digest.SHA256 {
		return ""
	}
	return d.Encoded()
}

// Annotations of index.json that name an image: containerd's full name, and the
// specification's, which may be as little as a tag.
const (
	nameAnnotation = "io.containerd.image.name"
	refAnnotation  = ocispec.AnnotationRefName
)

// ociCandidates lists the images below one descriptor of an index. What is no
// image for a known platform (attestations, signatures) is left out. It can be
// that an archive holds only one platform's part of an index: what is missing is
// an error only where nothing is left.
func (s *scan) ociCandidates(d ocispec.Descriptor, names []string, depth int) ([]candidate, error) {
	const maxDepth = 4
	if depth > maxDepth {
		return nil, fmt.Errorf("%w: indexes inside of each other, more than %d deep", ErrLimit, maxDepth)
	}
	for _, a := range []string{nameAnnotation, refAnnotation} {
		if n := d.Annotations[a]; n != "" && len(names) == 0 {
			names = []string{fullName(n)}
		}
	}
	if d.ArtifactType != "" || d.Annotations["vnd.docker.reference.type"] != "" {
		return nil, nil
	}
	if d.Platform != nil && d.Platform.OS == "unknown" {
		return nil, nil
	}
	b, ok := s.docs[hexOf(d.Digest)]
	if !ok {
		return nil, fmt.Errorf("%w: manifest %s is not there, or its file is damaged; save the image again", ErrMissing, d.Digest)
	}
	switch d.MediaType {
	case ocispec.MediaTypeImageIndex, "application/vnd.docker.distribution.manifest.list.v2+json":
		var index ocispec.Index
		if err := json.Unmarshal(b, &index); err != nil {
			return nil, fmt.Errorf("%w: index %s: %w", ErrDamaged, d.Digest, err)
		}
		var out []candidate
		var missing []error
		for _, m := range index.Manifests {
			cs, err := s.ociCandidates(m, names, depth+1)
			if err != nil {
				missing = append(missing, err)
			}
			out = append(out, cs...)
		}
		if len(out) > 0 {
			return out, nil
		}
		return nil, errors.Join(missing...)
	case ocispec.MediaTypeImageManifest, "application/vnd.docker.distribution.manifest.v2+json":
	default:
		return nil, fmt.Errorf("%w: %s is of media type %q, which is no image", ErrMissing, d.Digest, d.MediaType)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("%w: manifest %s: %w", ErrDamaged, d.Digest, err)
	}
	if m.ArtifactType != "" {
		return nil, nil
	}
	c := candidate{names: names, manifest: hexOf(d.Digest), config: hexOf(m.Config.Digest)}
	if _, ok := s.docs[c.config]; !ok {
		return nil, fmt.Errorf("%w: config %s of manifest %s is not there, or its file is damaged; save the image again", ErrMissing, m.Config.Digest, d.Digest)
	}
	for _, l := range m.Layers {
		c.layers = append(c.layers, "blobs/sha256/"+hexOf(l.Digest))
	}
	return []candidate{c}, nil
}
