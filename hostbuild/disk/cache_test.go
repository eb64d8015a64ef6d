package disk

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	"coffer/hostbuild/cache"
)

// The second crypt_root comes from the cache and is the same, byte for byte; a
// damaged entry is noticed, dropped and made again; a changed archive is another.
func TestCachedLayers(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "cache")
	store, err := cache.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	layer := makeTar(t, regular("bin/app", randomBytes(1, 3<<20)), regular("etc/motd", []byte("hello\n")))
	top := makeTar(t, regular("etc/.wh.motd", nil))
	image := writeFile(t, "image.tar", dockerSave(t, layer, top))
	waitUntilOld(t, image)
	build := func(image string, fromCache bool) []byte {
		t.Helper()
		p := params(t, image)
		p.Cache = store
		root, err := BuildRoot(t.Context(), p)
		if err != nil {
			t.Fatal(err)
		}
		if root.FromCache != fromCache || root.CacheErr != nil {
			t.Errorf("from cache: %v, error %v", root.FromCache, root.CacheErr)
		}
		b, err := os.ReadFile(p.file())
		if err != nil {
			t.Fatal(err)
		}
		os.Remove(p.file())
		nothingLeft(t, p.file())
		return b
	}
	one := build(image, false)
	if !bytes.Equal(one, build(image, true)) {
		t.Error("the cache gives another drive")
	}

	entry := filepath.Join(dir, "v2/layers", digestOf(layer))
	for name, off := range map[string]int64{"tar": 1 << 20, "hashes": -100, "seal": -1} {
		f, err := os.OpenFile(entry, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		st, _ := f.Stat()
		if off < 0 {
			off += st.Size()
		}
		b := make([]byte, 1)
		f.ReadAt(b, off)
		b[0] ^= 1
		f.WriteAt(b, off)
		f.Close()
		if !bytes.Equal(one, build2(t, store, image)) {
			t.Errorf("%s damaged: another drive", name)
		}
		if !bytes.Equal(one, build(image, true)) {
			t.Errorf("%s damaged: not cached again", name)
		}
	}

	changed := bytes.Replace(dockerSave(t, layer, top), []byte("hello"), []byte("HELLO"), 1)
	if err := os.WriteFile(image, changed, 0o644); err != nil {
		t.Fatal(err)
	}
	p := params(t, image)
	p.Cache = store
	if _, err := BuildRoot(t.Context(), p); err == nil {
		t.Error("a changed archive was taken for the one in the cache")
	}
}

func build2(t *testing.T, store *cache.Cache, image string) []byte {
	t.Helper()
	p := params(t, image)
	p.Cache, p.Rand = store, nil
	if _, err := BuildRoot(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	p = params(t, image)
	p.Cache = store
	if _, err := BuildRoot(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(p.file())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// waitUntilOld waits until the cache trusts the file's times.
func waitUntilOld(t *testing.T, name string) {
	t.Helper()
	for start := time.Now(); time.Since(start) < 10*time.Second; time.Sleep(50 * time.Millisecond) {
		if key, err := cache.ArchiveKey(name, ""); err != nil || key != "" {
			return
		}
	}
	t.Fatal("the archive stays too new for the cache")
}
