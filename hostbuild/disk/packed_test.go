package disk

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"coffer/hostbuild/disk/erofs"
	"coffer/internal/testenv"
)

// needPacker skips without CI's complaint: Debian 12 has no such mkfs.erofs.
func needPacker(t *testing.T, algorithm string) {
	t.Helper()
	if err := checkCompression(t.Context(), algorithm); err != nil {
		t.Skip("optional: ", err)
	}
}

// oddLayer has all that a layer may hold, but folders that it does not name: their
// times differ.
func oddLayer(t *testing.T) []byte {
	h := func(h tar.Header, data string) tarMember {
		h.Format, h.ModTime = tar.FormatPAX, time.Unix(1600000000, 123456789)
		return tarMember{h, []byte(data)}
	}
	long := strings.Repeat("long-name-", 20)
	plain := makeTar(t,
		h(tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755}, ""),
		h(tar.Header{Name: "./usr/", Typeflag: tar.TypeDir, Mode: 0o751, Uid: 3, Gid: 4}, ""),
		h(tar.Header{Name: "usr/text", Mode: 0o640, Uid: 1 << 20, Gid: 70000}, strings.Repeat("compressible ", 50000)),
		h(tar.Header{Name: "usr/empty", Mode: 0o600}, ""),
		h(tar.Header{Name: "/usr/setuid", Mode: 0o4755}, "x"),
		h(tar.Header{Name: "usr/hard", Typeflag: tar.TypeLink, Linkname: "./usr/text"}, ""),
		h(tar.Header{Name: "usr/soft", Typeflag: tar.TypeSymlink, Linkname: "../" + long, Mode: 0o777}, ""),
		h(tar.Header{Name: "usr/fifo", Typeflag: tar.TypeFifo, Mode: 0o600}, ""),
		h(tar.Header{Name: "usr/null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 300, Mode: 0o666}, ""),
		h(tar.Header{Name: "usr/" + long, Mode: 0o644}, "long"),
		h(tar.Header{Name: "xattr", Mode: 0o644, PAXRecords: map[string]string{"SCHILY.xattr.user.a": "b", "SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"}}, "x"),
		h(tar.Header{Name: "gone/", Typeflag: tar.TypeDir, Mode: 0o755}, ""),
		h(tar.Header{Name: "gone/.wh.file"}, ""),
		h(tar.Header{Name: "opaque/", Typeflag: tar.TypeDir, Mode: 0o755}, ""),
		h(tar.Header{Name: "opaque/.wh..wh..opq"}, ""),
		h(tar.Header{Name: "twice", Mode: 0o644}, "first"),
		h(tar.Header{Name: "twice", Mode: 0o755}, "second"),
	)
	// A sparse member, by GNU tar, in place of the two zero blocks at the end.
	hole := filepath.Join(t.TempDir(), "sparse")
	f, err := os.Create(hole)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteAt([]byte("data"), 1<<20)
	f.Truncate(3<<20 + 5)
	f.Close()
	out, err := exec.Command(testenv.LookTool(t, "tar"), "--format=pax", "--sparse", "--mtime=@1600000000", "-C", filepath.Dir(hole), "-cf", "-", "sparse").Output()
	if err != nil {
		t.Fatal(err)
	}
	return append(plain[:len(plain)-1024], out...)
}

// A compressed layer shows the kernel the same files as the plain one.
func TestPackedLayer(t *testing.T) {
	for _, algorithm := range []string{"lz4", "zstd"} {
		t.Run(algorithm, func(t *testing.T) {
			needPacker(t, algorithm)
			testenv.Root(t)
			layer, dir := oddLayer(t), t.TempDir()
			all := func(w io.Writer) io.Writer { return w }
			packed, again := filepath.Join(dir, "packed"), filepath.Join(dir, "again")
			for _, image := range []string{packed, again} {
				if _, err := packTar(t.Context(), algorithm, image, bytes.NewReader(layer), all); err != nil {
					t.Fatal(err)
				}
			}
			a, _ := os.ReadFile(packed)
			if b, _ := os.ReadFile(again); !bytes.Equal(a, b) {
				t.Error("the same layer gives other bytes")
			}
			if len(a) > len(layer)/10 {
				t.Errorf("%d bytes of a layer of %d", len(a), len(layer))
			}
			want, got := show(t, plainLayer(t, layer)), show(t, packed)
			if !bytes.Equal(want, got) {
				t.Errorf("other files:\n%s\nplain:\n%s", listing(t, got), listing(t, want))
			}
		})
	}
}

// plainLayer makes the blob of package erofs.
func plainLayer(t *testing.T, layer []byte) string {
	t.Helper()
	tree, image, copies := erofs.New(512, time.Unix(0, 0)), bytes.NewBuffer(make([]byte, erofs.SuperSize)), new(bytes.Buffer)
	if _, err := tree.AddTar(io.TeeReader(bytes.NewReader(layer), image), erofs.SuperSize, copies); err != nil {
		t.Fatal(err)
	}
	image.Write(make([]byte, -image.Len()&511))
	image.Write(copies.Bytes())
	super, _, err := tree.Finish(image, int64(image.Len()))
	if err != nil {
		t.Fatal(err)
	}
	copy(image.Bytes(), super)
	return writeFile(t, "plain", image.Bytes())
}

// show mounts an image and packs what the kernel shows.
func show(t *testing.T, image string) []byte {
	t.Helper()
	dir := t.TempDir()
	if err := syscall.Mount(image, dir, "erofs", syscall.MS_RDONLY, ""); err != nil {
		testenv.Need(t, !errors.Is(err, syscall.ENOTBLK) && !errors.Is(err, syscall.ENODEV) && !errors.Is(err, syscall.EPERM),
			"this kernel does not mount EROFS from a file: "+err.Error())
		t.Fatal(err)
	}
	defer syscall.Unmount(dir, 0)
	out, err := exec.Command(testenv.LookTool(t, "tar"), "--format=pax", "--pax-option=delete=atime,delete=ctime", "--xattrs", "--xattrs-include=*",
		"--xattrs-exclude=trusted.overlay.origin", // without a value: mkfs.erofs has it where something is hidden
		"--numeric-owner", "--sort=name", "-C", dir, "-cf", "-", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func listing(t *testing.T, tarball []byte) []byte {
	cmd := exec.Command("tar", "--numeric-owner", "--full-time", "--xattrs", "--xattrs-include=*", "-vvtf", "-")
	cmd.Stdin = bytes.NewReader(tarball)
	out, _ := cmd.Output()
	return out
}

func TestPackedRoot(t *testing.T) {
	needPacker(t, "lz4")
	p := params(t, writeFile(t, "image.tar", dockerSave(t, makeTar(t, regular("text", bytes.Repeat([]byte("compressible "), 1<<20))))))
	plain, err := BuildRoot(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	p = params(t, p.Archive)
	p.Compression = "lz4"
	packed, err := BuildRoot(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	if packed.EROFSSize > plain.EROFSSize/5 {
		t.Errorf("%d bytes, %d without compression", packed.EROFSSize, plain.EROFSSize)
	}
	if packed.Image.Digest != plain.Image.Digest {
		t.Error("another image")
	}
}

// What is refused of a layer is refused of a compressed one, by us.
func TestPackedRefuses(t *testing.T) {
	needPacker(t, "lz4")
	bomb := tar.Header{Name: "bomb", Mode: 0o644, Format: tar.FormatPAX}
	for name, c := range map[string]struct {
		layer []byte
		want  error
	}{
		"path escape": {makeTar(t, regular("../../etc/passwd", []byte("x"))), erofs.ErrBadName},
		"truncated":   {makeTar(t, regular("f", randomBytes(1, 5000)))[:3000], io.ErrUnexpectedEOF},
		"too large":   {makeTar(t, tarMember{bomb, make([]byte, 3<<20)}), ErrTooSmall},
	} {
		_, err := packTar(t.Context(), "lz4", filepath.Join(t.TempDir(), "image"), bytes.NewReader(c.layer),
			func(w io.Writer) io.Writer { return &limited{w, &sealer{size: 100 << 10}, 0} })
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

// Any other mkfs.erofs is refused, with the version that is needed.
func TestOtherPackers(t *testing.T) {
	for name, c := range map[string]struct{ script, want string }{
		"Debian 12":       {"echo 'mkfs.erofs: unrecognized option --version' >&2; exit 1", "1.8 or later, and this host's is 1.7 or older"},
		"too old":         {"echo 'mkfs.erofs (erofs-utils) 1.7.1'", "1.8 or later, and this host's is 1.7.1"},
		"without zstd":    {"echo 'mkfs.erofs (erofs-utils) 1.8.6'; echo 'available compressors: lz4, lz4hc'", "1.8.6 was built without zstd"},
		"nothing at all":  {"", "there is none"},
		"as it should be": {"echo 'mkfs.erofs (erofs-utils) 1.9'; echo 'available compressors: lz4, lz4hc, zstd'", ""},
	} {
		dir := t.TempDir()
		if c.script != "" {
			if err := os.WriteFile(filepath.Join(dir, "mkfs.erofs"), []byte("#!/bin/sh\n"+c.script+"\n"), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		t.Setenv("PATH", dir)
		err := checkCompression(t.Context(), "zstd")
		if c.want == "" && err != nil || c.want != "" && (!errors.Is(err, ErrCompression) || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}
