package workload

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/unpack"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"coffer/agent/daemon"
)

// ImageSource says where an image lies.
type ImageSource struct {
	Meta   string // tar of an OCI layout without layers: index, manifest, config
	Layers string // containerd's layer cache
	Digest string // sha256:<hex> of the manifest to run
}

// Import makes the image known to containerd under its digest's name and stacks
// its layers from the cache. No layer is copied or read. What the digest names
// is what runs, whatever names the index holds.
func Import(ctx context.Context, c *client.Client, src ImageSource) (client.Image, error) {
	ctx, done, err := c.WithLease(ctx) // keeps the garbage collector off
	if err != nil {
		return nil, fmt.Errorf("import %s: %w", src.Meta, err)
	}
	defer done(context.WithoutCancel(ctx))

	f, err := os.Open(src.Meta)
	if err != nil {
		return nil, fmt.Errorf("import the image: %w", err)
	}
	defer f.Close()
	if _, err := c.Import(ctx, f, client.WithImportPlatform(platforms.All), client.WithSkipMissing(),
		client.WithIndexName(indexName)); err != nil {
		return nil, fmt.Errorf("import %s: %w", src.Meta, err)
	}
	manifest, err := findManifest(ctx, c, src.Digest)
	if err != nil {
		return nil, fmt.Errorf("import %s: %w", src.Meta, err)
	}
	if err := checkLayers(ctx, c.ContentStore(), *manifest, src.Layers); err != nil {
		return nil, fmt.Errorf("image %s: %w", src.Digest, err)
	}
	is := c.ImageService()
	record := images.Image{Name: src.Digest, Target: *manifest}
	img, err := is.Create(ctx, record)
	if errdefs.IsAlreadyExists(err) {
		img, err = is.Update(ctx, record, "target")
	}
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", src.Digest, err)
	}
	if err := stack(ctx, c, img.Target); err != nil {
		return nil, fmt.Errorf("stack the layers of image %s: %w", src.Digest, err)
	}
	return client.NewImageWithPlatform(c, img, platforms.All), nil
}

// indexName is the record of the imported index. It keeps the content.
const indexName = "index"

// findManifest looks for the manifest among the children of the imported index.
func findManifest(ctx context.Context, c *client.Client, want string) (*ocispec.Descriptor, error) {
	index, err := c.ImageService().Get(ctx, indexName)
	if err != nil {
		return nil, err
	}
	children, err := images.Children(ctx, c.ContentStore(), index.Target)
	if err != nil {
		return nil, err
	}
	var have []string
	for _, d := range children {
		if d.Digest.String() == want {
			return &d, nil
		}
		have = append(have, d.Digest.String())
	}
	return nil, fmt.Errorf("the index holds no manifest %s, only [%s]", want, strings.Join(have, " "))
}

// checkLayers demands every layer in the cache: a missing one would be a miss
// for containerd, which would then look for a blob that is nowhere.
func checkLayers(ctx context.Context, cs content.Store, manifest ocispec.Descriptor, cache string) error {
	m, err := images.Manifest(ctx, cs, manifest, platforms.All)
	if err != nil {
		return fmt.Errorf("manifest: %w", err)
	}
	b, err := content.ReadBlob(ctx, cs, m.Config)
	if err != nil {
		return fmt.Errorf("config: %w", err)
	}
	var config ocispec.Image
	if err := json.Unmarshal(b, &config); err != nil {
		return fmt.Errorf("config: %w", err)
	}
	if len(config.RootFS.DiffIDs) == 0 || len(config.RootFS.DiffIDs) != len(m.Layers) {
		return fmt.Errorf("config names %d layers, manifest %d", len(config.RootFS.DiffIDs), len(m.Layers))
	}
	for _, id := range config.RootFS.DiffIDs {
		file, err := daemon.LayerFile(cache, id.String())
		if err != nil {
			return err
		}
		if fi, err := os.Stat(file); err != nil || !fi.Mode().IsRegular() {
			return fmt.Errorf("layer %s is not in the cache %s", id, cache)
		}
	}
	return nil
}

// stack makes the snapshots. core/unpack is the one way that knows cached layers.
func stack(ctx context.Context, c *client.Client, target ocispec.Descriptor) error {
	caps, err := c.GetSnapshotterCapabilities(ctx, daemon.Snapshotter)
	if err != nil {
		return err
	}
	cs := c.ContentStore()
	u, err := unpack.NewUnpacker(ctx, cs, unpack.WithUnpackPlatform(unpack.Platform{
		Platform:                platforms.All,
		SnapshotterKey:          daemon.Snapshotter,
		Snapshotter:             c.SnapshotService(daemon.Snapshotter),
		SnapshotterCapabilities: caps,
		Applier:                 c.DiffService(),
	}))
	if err != nil {
		return err
	}
	walk := u.Unpack(images.ChildrenHandler(cs))
	if err := images.Dispatch(ctx, walk, nil, target); err != nil {
		return err
	}
	_, err = u.Wait()
	return err
}
