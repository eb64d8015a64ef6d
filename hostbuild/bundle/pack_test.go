package bundle

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"coffer/internal/testenv"
)

// testArchive writes a member of size bytes in pieces of any order and size, and
// two files behind it.
func testArchive(t *testing.T, size int) (path string, content []byte) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "cvm_1.tgz")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	a, err := NewArchive(f, "cvm_1", time.Unix(1700000000, 0))
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, uint64(size)))
	junk := make([]byte, size+100000)
	for i := range junk {
		junk[i] = byte(r.Uint32())
	}
	m := a.NewMember(CryptRoot, 0o644)
	if _, err := m.WriteAt(junk, 0); err != nil { // an attempt that is given up
		t.Fatal(err)
	}
	if err := m.Truncate(0); err != nil {
		t.Fatal(err)
	}
	content = make([]byte, size)
	for off := 0; off < size; {
		n := min(1+r.IntN(3*storedBlock), size-off)
		if r.IntN(4) > 0 || off+n == size { // else a hole
			copy(content[off:], junk[off:off+n])
			if _, err := m.WriteAt(content[off:off+n], int64(off)); err != nil {
				t.Fatal(err)
			}
		}
		off += n
	}
	for range min(size, 20) { // and some written again
		off := r.IntN(size)
		p := junk[:min(size-off, 1+r.IntN(100000))]
		copy(content[off:], p)
		if _, err := m.WriteAt(p, int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.Truncate(int64(size)); err != nil {
		t.Fatal(err)
	}
	got, err := m.Close()
	if err != nil {
		t.Fatal(err)
	}
	parts := sha256.New()
	for rest := content; len(rest) > 0; rest = rest[min(1<<20, len(rest)):] {
		fmt.Fprintf(parts, "%x  -\n", sha256.Sum256(rest[:min(1<<20, len(rest))]))
	}
	if want := (File{Name: CryptRoot, Size: int64(size), PartsSHA256: fmt.Sprintf("%x", parts.Sum(nil))}); got != want {
		t.Errorf("size %d: described as %+v, want %+v", size, got, want)
	}
	for _, name := range []string{LaunchVM, ManifestName} {
		if _, err := a.Add(name, 0o755, strings.NewReader(name), int64(len(name))); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	return path, content
}

func TestArchive(t *testing.T) {
	for _, size := range []int{0, 1, 511, 512, storedBlock - 1, storedBlock, storedBlock + 1, 32*storedBlock - 1, 32 * storedBlock, 5<<20 + 17} {
		path, content := testArchive(t, size)
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		z, err := gzip.NewReader(f)
		if err != nil {
			t.Fatal(err)
		}
		tr := tar.NewReader(z)
		for _, want := range []struct {
			name, data string
			mode       int64
		}{{"cvm_1/", "", 0o755}, {"cvm_1/" + CryptRoot, string(content), 0o644}, {"cvm_1/" + LaunchVM, LaunchVM, 0o755}, {"cvm_1/" + ManifestName, ManifestName, 0o755}} {
			h, err := tr.Next()
			if err != nil {
				t.Fatalf("size %d, %s: %v", size, want.name, err)
			}
			b, err := io.ReadAll(tr)
			if err != nil || h.Name != want.name || h.Mode != want.mode || string(b) != want.data || h.ModTime.Unix() != 1700000000 {
				t.Errorf("size %d: %s %o, %d bytes, %v", size, h.Name, h.Mode, len(b), err)
			}
		}
		if _, err := tr.Next(); err != io.EOF {
			t.Errorf("size %d: %v at the end", size, err)
		}
		if n, err := io.Copy(io.Discard, z); err != nil || n != 0 { // checks CRC and size
			t.Errorf("size %d: %d bytes behind the tar, %v", size, n, err)
		}
		f.Close()
	}
}

// What people have unpacks it.
func TestArchiveUnpacks(t *testing.T) {
	path, content := testArchive(t, 1<<20+5)
	for _, c := range [][]string{{"tar", "-zxf"}, {"busybox", "tar", "-zxf"}} {
		dir := t.TempDir()
		cmd := exec.Command(testenv.LookTool(t, c[0]), append(c[1:], path)...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", c, err, out)
		}
		name := filepath.Join(dir, "cvm_1", CryptRoot)
		said, err := exec.Command("sh", "-c", `split -b 1M --filter=sha256sum "$1" | sha256sum`, "sh", name).Output()
		if err != nil {
			t.Fatal(err)
		}
		if f, err := describe(t.Context(), name); err != nil || f.PartsSHA256+"  -\n" != string(said) {
			t.Errorf("%v: described as %+v, %v; coreutils say %s", c, f, err, said)
		}
		b, err := os.ReadFile(name)
		if err != nil || !bytes.Equal(b, content) {
			t.Errorf("%v: %d bytes, %v", c, len(b), err)
		}
	}
	if out, err := exec.Command(testenv.LookTool(t, "gzip"), "-t", path).CombinedOutput(); err != nil {
		t.Errorf("gzip -t: %v\n%s", err, out)
	}
}

// GNU's numbers hold drives of more than 8 GiB in a header of one block.
func TestHugeMemberHeader(t *testing.T) {
	a := &Archive{top: "cvm_1"}
	b, err := a.fileHeader(CryptRoot, 0o644, 1<<40)
	if err != nil {
		t.Fatal(err)
	}
	h, err := tar.NewReader(bytes.NewReader(b)).Next()
	if err != nil || h.Size != 1<<40 {
		t.Errorf("%+v, %v", h, err)
	}
}

func TestAddedFileChanges(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "a.tgz"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	a, err := NewArchive(f, "cvm_1", time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Add("f", 0o644, strings.NewReader("12"), 3); err == nil || !strings.Contains(err.Error(), "f") {
		t.Errorf("a file that is shorter than it was: %v", err)
	}
}
