package bundle

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"coffer/initramfs"
	"coffer/internal/testenv"
)

const testID = "cvm_0123456789ab"

func packed(t testing.TB, headers ...tar.Header) []byte {
	t.Helper()
	var buf bytes.Buffer
	z := gzip.NewWriter(&buf)
	w := tar.NewWriter(z)
	for _, h := range headers {
		if h.Typeflag == 0 {
			h.Typeflag, h.Size = tar.TypeReg, 1
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Size <= 1 {
			w.Write(make([]byte, h.Size))
		}
	}
	w.Close()
	z.Close()
	return buf.Bytes()
}

// sparseMember is an archive of a file that is a hole of 64 MiB, as `tar
// --sparse --format=pax` packs it.
func sparseMember(t testing.TB) []byte {
	t.Helper()
	name := filepath.Join(t.TempDir(), testID, Kernel)
	if err := errors.Join(os.Mkdir(filepath.Dir(name), 0o755), os.WriteFile(name, nil, 0o644), os.Truncate(name, 64<<20)); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(testenv.LookTool(t, "tar"), "-C", filepath.Dir(filepath.Dir(name)), "--sparse", "--format=pax", "-czf", "-", testID+"/"+Kernel).Output()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Unpack writes a bundle's files and nothing else, wherever the archive comes from.
func TestUnpackRefuses(t *testing.T) {
	good := packed(t, tar.Header{Name: testID + "/", Typeflag: tar.TypeDir}, tar.Header{Name: testID + "/" + Kernel})
	for name, c := range map[string]struct {
		archive []byte
		words   string
	}{
		"escape":          {packed(t, tar.Header{Name: "../" + Kernel}), `"../vmlinuz"`},
		"escape inside":   {packed(t, tar.Header{Name: testID + "/../" + Kernel}), "member"},
		"absolute":        {packed(t, tar.Header{Name: "/" + testID + "/" + Kernel}), "member"},
		"deeper":          {packed(t, tar.Header{Name: testID + "/a/" + Kernel}), "member"},
		"unknown file":    {packed(t, tar.Header{Name: testID + "/.bashrc"}), ".bashrc"},
		"no id":           {packed(t, tar.Header{Name: "bundle/" + Kernel}), "bundle/vmlinuz"},
		"two folders":     {packed(t, tar.Header{Name: testID + "/" + Kernel}, tar.Header{Name: "cvm_0123456789ac/" + Initrd}), "cvm_0123456789ac"},
		"twice":           {packed(t, tar.Header{Name: testID + "/" + Kernel}, tar.Header{Name: testID + "/" + Kernel}), "member"},
		"link":            {packed(t, tar.Header{Name: testID + "/" + Kernel, Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd"}), "member"},
		"device":          {packed(t, tar.Header{Name: testID + "/" + Kernel, Typeflag: tar.TypeChar}), "member"},
		"folder for file": {packed(t, tar.Header{Name: testID + "/" + Kernel + "/", Typeflag: tar.TypeDir}), "member"},
		"sparse":          {sparseMember(t), "member"},
		"large initrd":    {packed(t, tar.Header{Name: testID + "/" + Initrd, Typeflag: tar.TypeReg, Size: maxFile + 1}), "initrd.img has 268435457 bytes"},
		"empty":           {packed(t), "empty"},
		"no gzip":         {[]byte("hello, this is no archive"), "gzip"},
		"cut":             {good[:len(good)-9], ""},
		"checksum":        {append(bytes.Clone(good[:len(good)-8]), 0, 0, 0, 0, 0, 0, 0, 0), "checksum"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			file := filepath.Join(dir, "a.tgz")
			if err := os.WriteFile(file, c.archive, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(filepath.Join(dir, "out"), 0o700); err != nil {
				t.Fatal(err)
			}
			_, err := Unpack(t.Context(), file, filepath.Join(dir, "out"))
			if !errors.Is(err, ErrNotBundle) || !strings.Contains(err.Error(), c.words) || !strings.Contains(err.Error(), "a.tgz") {
				t.Errorf("error %v, want one with %q", err, c.words)
			}
			onlyBundleFiles(t, dir)
		})
	}
}

// A drive that does not fit is refused before anything of it is written.
func TestUnpackWithoutRoom(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "a.tgz")
	// What the header says is all that counts: nothing follows it.
	if err := os.WriteFile(file, packed(t, tar.Header{Name: testID + "/" + UserData, Typeflag: tar.TypeReg, Size: 1 << 60}), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Unpack(t.Context(), file, dir)
	if err == nil || !strings.Contains(err.Error(), "user_data.qcow2 has 1152921504606846976 bytes, and "+dir) {
		t.Errorf("a drive of 2^60 bytes: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, testID, "*")); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// onlyBundleFiles checks that nothing lies below dir but a.tgz and files of a bundle.
func onlyBundleFiles(t *testing.T, dir string) {
	t.Helper()
	filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		rel, _ := filepath.Rel(dir, path)
		switch {
		case err != nil:
			t.Error(err)
		case d.IsDir() && strings.Count(rel, "/") < 2, rel == "a.tgz":
		case d.Type().IsRegular() && strings.HasPrefix(rel, "out/cvm_") && strings.Count(rel, "/") == 2:
		default:
			t.Errorf("%s appeared", rel)
		}
		return nil
	})
}

func FuzzUnpack(f *testing.F) {
	f.Add(packed(f, tar.Header{Name: testID + "/", Typeflag: tar.TypeDir}, tar.Header{Name: testID + "/" + Kernel}))
	f.Add(packed(f, tar.Header{Name: "../x"}))
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "a.tgz"), b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(filepath.Join(dir, "out"), 0o700); err != nil {
			t.Fatal(err)
		}
		Unpack(t.Context(), filepath.Join(dir, "a.tgz"), filepath.Join(dir, "out"))
		onlyBundleFiles(t, dir)
	})
}

func TestGuestConfigRefuses(t *testing.T) {
	segment, err := initramfs.GuestSegment([]byte("{}"))
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{
		"empty": nil, "no segment": bytes.Repeat([]byte("070701"), 100), "name alone": []byte("etc/coffer/guest.json\x00"),
		"cut": segment[:len(segment)/3], "not a config": segment,
	} {
		if c, err := GuestConfig(b); err == nil {
			t.Errorf("%s: %+v", name, c)
		}
	}
}

func FuzzGuestConfig(f *testing.F) {
	segment, err := initramfs.GuestSegment([]byte(`{"version":1}`))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(segment)
	f.Fuzz(func(t *testing.T, b []byte) { GuestConfig(b) })
}
