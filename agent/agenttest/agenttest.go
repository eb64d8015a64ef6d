// Package agenttest is what tests of the agent share: a real containerd, a small
// image in the form that the builder leaves, and an output buffer.
package agenttest

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	erofs "github.com/erofs/go-erofs"

	"coffer/agent/daemon"
	"coffer/agent/workload"
	"coffer/internal/testenv"
)

// Programs is the folder of containerd, its shim, runc and snpguest: $COFFER_BIN, else
// bin at the repository's top.
func Programs(t testing.TB) string {
	t.Helper()
	dir := os.Getenv("COFFER_BIN")
	if dir == "" {
		dir, _ = filepath.Abs(filepath.Join(root(t), "bin"))
	}
	for _, name := range []string{"containerd", "containerd-shim-runc-v2", "runc", "snpguest"} {
		_, err := os.Stat(filepath.Join(dir, name))
		testenv.Need(t, err == nil, fmt.Sprintf("no %s in %s: build the guest programs or set COFFER_BIN", name, dir))
	}
	return dir
}

// Image is an image of one layer with busybox, as the builder leaves it.
func Image(t testing.TB, config string) workload.ImageSource {
	t.Helper()
	dir := t.TempDir()
	busybox, err := os.ReadFile(testenv.LookTool(t, "busybox"))
	if err != nil {
		t.Fatal(err)
	}

	blob, err := os.Create(filepath.Join(dir, "layer.erofs"))
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	w := erofs.Create(blob, erofs.WithBuildTime(1, 0))
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{"/bin", "/etc", "/proc", "/sys", "/dev", "/tmp"} {
		must(w.Mkdir(d, 0o755))
	}
	put := func(name string, mode os.FileMode, data []byte) {
		f, err := w.Create(name)
		must(err)
		_, err = f.Write(data)
		must(err)
		must(f.Chmod(mode))
		must(f.Close())
	}
	put("/bin/busybox", 0o755, busybox)
	put("/etc/passwd", 0o644, []byte("root:x:0:0::/:/bin/sh\nflare:x:1234:1234::/:/bin/sh\n"))
	put("/etc/group", 0o644, []byte("root:x:0:\nflare:x:1234:\n"))
	for _, a := range []string{"sh", "cat", "echo", "id", "sleep", "grep", "mount", "ls", "mknod", "unshare", "dd", "df", "touch", "stat", "ulimit", "hostname", "seq"} {
		must(w.Symlink("busybox", "/bin/"+a))
	}
	must(w.Close())

	// The name in the cache is what counts; no layer tar exists.
	diffID := sha256.Sum256([]byte("layer of " + t.Name()))
	hexID := hex.EncodeToString(diffID[:])
	layers := filepath.Join(dir, "layers")
	must(os.MkdirAll(filepath.Join(layers, "sha256", hexID[:2]), 0o755))
	must(os.Rename(blob.Name(), filepath.Join(layers, "sha256", hexID[:2], hexID+".erofs")))

	var out bytes.Buffer
	tw := tar.NewWriter(&out)
	add := func(name string, data []byte) {
		must(tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data))}))
		_, err := tw.Write(data)
		must(err)
	}
	blobOf := func(data []byte) string {
		sum := sha256.Sum256(data)
		d := hex.EncodeToString(sum[:])
		add("blobs/sha256/"+d, data)
		return "sha256:" + d
	}
	cfg := []byte(fmt.Sprintf(`{"architecture":"amd64","os":"linux","config":%s,"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}`, config, hexID))
	cfgDigest := blobOf(cfg)
	manifest, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": map[string]any{"mediaType": "application/vnd.oci.image.config.v1+json", "digest": cfgDigest, "size": len(cfg)},
		"layers": []any{map[string]any{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": "sha256:" + hexID, "size": 1024}},
	})
	must(err)
	digest := blobOf(manifest)
	index, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
		"manifests": []any{map[string]any{"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": len(manifest),
			"annotations": map[string]string{"io.containerd.image.name": "docker.io/library/test:1"}}},
	})
	must(err)
	add("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
	add("index.json", index)
	must(tw.Close())
	meta := filepath.Join(dir, "meta.tar")
	must(os.WriteFile(meta, out.Bytes(), 0o644))
	return workload.ImageSource{Meta: meta, Layers: layers, Digest: digest}
}

// Buffer is a writer that tests read while it is written to.
type Buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *Buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *Buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// Await waits until b holds text.
func (b *Buffer) Await(t testing.TB, text string) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !strings.Contains(b.String(), text); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("output never held %q: %q", text, b.String())
		}
	}
}

// StartDaemon starts containerd in a folder of its own.
func StartDaemon(t testing.TB, layers string) *daemon.Daemon {
	t.Helper()
	testenv.Root(t)
	bin := Programs(t)
	// A short path: the sockets below it have names of at most 107 bytes.
	dir := Dir(t)
	var log Buffer
	d, err := daemon.Start(context.Background(), daemon.Config{
		Binary: filepath.Join(bin, "containerd"), Path: bin,
		Root: dir + "/root", State: dir + "/state", Snapshots: dir + "/upper", Layers: layers,
		Log: &log, Printf: t.Logf,
	})
	if err != nil {
		t.Fatalf("%v\n%s", err, log.String())
	}
	t.Cleanup(func() {
		d.Stop()
		if t.Failed() {
			t.Logf("containerd: %s", log.String())
		}
	})
	return d
}

// Dir is a folder with a short path, because the sockets below it may have names
// of at most 107 bytes. What is mounted below it at the end is unmounted.
func Dir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "cof")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		mounts, _ := os.ReadFile("/proc/self/mounts")
		for line := range strings.Lines(string(mounts)) {
			if f := strings.Fields(line); len(f) > 1 && strings.HasPrefix(f[1], dir) {
				syscall.Unmount(f[1], syscall.MNT_DETACH)
			}
		}
		os.RemoveAll(dir)
	})
	return dir
}

// RemoveCgroups removes the empty groups that a test has left, path first, then
// its parents.
func RemoveCgroups(path string) {
	for ; path != "/"; path = filepath.Dir(path) {
		for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
			dirs, _ := filepath.Glob(root + path)
			for _, d := range dirs {
				syscall.Rmdir(d)
			}
		}
	}
}

// root is the top of the repository.
func root(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	for ; err == nil; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		if dir == "/" {
			break
		}
	}
	t.Fatal("no go.mod above the test's folder")
	return ""
}
