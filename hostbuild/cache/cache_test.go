package cache

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"coffer/hostbuild/archive"
)

func open(t *testing.T) (*Cache, string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "cache")
	c, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return c, dir
}

func diffID(s string) string {
	sum := sha256.Sum256([]byte(s))
	return "sha256:" + hex.EncodeToString(sum[:])
}

// put stores a layer of so many blocks.
func put(t *testing.T, c *Cache, id string, blocks int) (blob, hashes []byte) {
	t.Helper()
	blob = bytes.Repeat([]byte(id)[:64], blocks*blockSize/64)
	hashes = bytes.Repeat([]byte{7}, blocks*hashSize)
	n := c.NewLayer(1 << 30)
	defer n.Close()
	n.Write(make([]byte, blockSize))
	n.Write(blob[blockSize:])
	n.EndBlob(blob[:blockSize])
	if err := n.Commit(id, bytes.NewReader(hashes)); err != nil {
		t.Fatal(err)
	}
	return blob, hashes
}

func TestLayers(t *testing.T) {
	c, dir := open(t)
	id := diffID("a")
	if _, err := c.Layer(id); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a layer that is not there: %v", err)
	}
	blob, hashes := put(t, c, id, 3)
	l, err := c.Layer(id)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	gotBlob, _ := io.ReadAll(l.Blob())
	gotHashes, _ := io.ReadAll(l.Hashes())
	if !bytes.Equal(gotBlob, blob) || !bytes.Equal(gotHashes, hashes) || l.Size != int64(len(blob)) {
		t.Error("other bytes than were put")
	}
	name := filepath.Join(dir, version, "layers", strings.TrimPrefix(id, "sha256:"))
	whole, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	for what, b := range map[string][]byte{"empty": {}, "short": whole[:len(whole)-1], "long": append(bytes.Clone(whole), 0), "zeros": make([]byte, len(whole))} {
		os.WriteFile(name, b, 0o600)
		if _, err := c.Layer(id); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", what, err)
		}
	}
	other := diffID("b")
	os.WriteFile(filepath.Join(dir, version, "layers", strings.TrimPrefix(other, "sha256:")), whole, 0o600)
	if _, err := c.Layer(other); !errors.Is(err, ErrDamaged) {
		t.Errorf("under another name: %v", err)
	}
	for _, bad := range []string{"", "sha256:..", "sha256:../../etc/passwd", "md5:" + id[7:]} {
		if _, err := c.Layer(bad); !errors.Is(err, ErrDamaged) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestNotCommitted(t *testing.T) {
	c, dir := open(t)
	n := c.NewLayer(1 << 30)
	n.Write([]byte("half"))
	n.Close()
	if left, _ := filepath.Glob(filepath.Join(dir, version, "*/*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	// A killed build's file has no lock any more; a running one's has.
	running := c.NewLayer(1 << 30)
	defer running.Close()
	os.WriteFile(filepath.Join(dir, version, "layers/.new-1"), nil, 0o600)
	os.WriteFile(filepath.Join(dir, version, "archives/.new-1"), nil, 0o600)
	if _, err := Open(dir); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, version, "*/.new-*")); len(left) != 1 || left[0] != running.f.Name() {
		t.Errorf("left: %v", left)
	}
}

func TestArchives(t *testing.T) {
	c, dir := open(t)
	one, two := diffID("1"), diffID("2")
	put(t, c, one, 1)
	put(t, c, two, 2)
	want := &archive.Result{
		Image:  archive.Image{Name: "n", Tags: []string{"t"}, Config: []byte("{ \"a\" : 1 }\n"), DiffIDs: []string{two}},
		Layers: []archive.Layer{{DiffID: two, Size: 5, Index: 1}}, Meta: []byte{0, 1, 255}, Stream: []string{one, two, one},
	}
	if err := c.PutArchive("key", want); err != nil {
		t.Fatal(err)
	}
	got, layers, err := c.Archive("key")
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) || len(layers) != 2 || layers[two].Size != 2*blockSize {
		t.Errorf("%+v with %v, want %+v", got, layers, want)
	}
	if _, _, err := c.Archive("other"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("another key: %v", err)
	}
	names, _ := filepath.Glob(filepath.Join(dir, version, "archives/*"))
	b, _ := os.ReadFile(names[0])
	b[len(b)-3] ^= 1
	os.WriteFile(names[0], b, 0o600)
	if _, _, err := c.Archive("key"); !errors.Is(err, ErrDamaged) {
		t.Errorf("damaged: %v", err)
	}
	c.PutArchive("key", want)
	if err := c.Drop(one); err != nil {
		t.Fatal(err)
	}
	if _, _, err := c.Archive("key"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without one of its layers: %v", err)
	}
}

func TestPrune(t *testing.T) {
	c, dir := open(t)
	ids := []string{diffID("0"), diffID("1"), diffID("2")}
	for i, id := range ids {
		put(t, c, id, 100)
		age := time.Unix(int64(1000*(i+1)), 0)
		if err := os.Chtimes(filepath.Join(dir, version, "layers", id[7:]), age, age); err != nil {
			t.Fatal(err)
		}
		if err := c.PutArchive(id, &archive.Result{Stream: []string{id}}); err != nil {
			t.Fatal(err)
		}
	}
	l, err := c.Layer(ids[0]) // used now
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	p, err := c.Prune(2*100*(blockSize+hashSize) + 16<<10)
	if err != nil || p.Removed != 1 || p.Kept != 2 {
		t.Fatalf("%+v, %v", p, err)
	}
	for i, want := range []error{nil, fs.ErrNotExist, nil} {
		_, _, err := c.Archive(ids[i])
		if !errors.Is(err, want) {
			t.Errorf("layer %d: %v, want %v", i, err, want)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, version, "archives/*")); len(left) != 2 {
		t.Errorf("archives left: %v", left)
	}
	if p, err := c.Prune(0); err != nil || p.Removed != 2 || p.Left != 0 {
		t.Errorf("%+v, %v", p, err)
	}
	if b, err := io.ReadAll(l.Blob()); err != nil || len(b) != 100*blockSize {
		t.Errorf("a layer that a build has open: %d bytes, %v", len(b), err)
	}
}

func TestOthersMayWrite(t *testing.T) {
	dir := t.TempDir()
	os.Chmod(dir, 0o777)
	if _, err := Open(dir); err == nil || !strings.Contains(err.Error(), "cache_dir") {
		t.Errorf("error %v", err)
	}
}

// The key follows every change of the file, and of what is asked for.
func TestArchiveKey(t *testing.T) {
	name := filepath.Join(t.TempDir(), "a.tar")
	os.WriteFile(name, []byte("1"), 0o600)
	if key, err := ArchiveKey(name, ""); err != nil || key != "" {
		t.Errorf("a new file has the key %q, %v", key, err)
	}
	if _, err := ArchiveKey(name+"x", ""); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error %v", err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for start := time.Now(); time.Since(start) < 10*time.Second; time.Sleep(50 * time.Millisecond) {
		one, err := ArchiveKey(self, "")
		if err != nil {
			t.Fatal(err)
		}
		if one == "" {
			continue
		}
		if two, _ := ArchiveKey(self, "ref"); one == two {
			t.Error("the image asked for does not count")
		}
		return
	}
	t.Error("no key after ten seconds")
}

// A layer that its drive cannot hold does not fill the disk.
func TestLayerTooLarge(t *testing.T) {
	c, err := Open(filepath.Join(t.TempDir(), "cache"))
	if err != nil {
		t.Fatal(err)
	}
	n := c.NewLayer(1 << 20)
	defer n.Close()
	for range 64 {
		if w, err := n.Write(make([]byte, 1<<20)); w != 1<<20 || err != nil {
			t.Fatalf("%d, %v: a build does not fail for its cache", w, err)
		}
	}
	n.EndBlob(make([]byte, 4096))
	if err := n.Commit("sha256:"+strings.Repeat("ab", 32), strings.NewReader("")); !errors.Is(err, ErrTooLarge) {
		t.Errorf("commit: %v", err)
	}
	if st, err := n.f.Stat(); err != nil || st.Size() > 1<<20 {
		t.Errorf("%v, %v", st.Size(), err)
	}
}
