package erofs

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	goerofs "github.com/erofs/go-erofs"

	"coffer/internal/testenv"
)

var (
	memberTime = time.Unix(1600000000, 123456789)
	treeTime   = time.Unix(1700000000, 0)
)

// member is one member of a tar that a test makes.
type member struct {
	tar.Header
	data string
}

func file(name, data string) member { return member{tar.Header{Name: name, Mode: 0o644}, data} }
func dir(name string, mode int64) member {
	return member{tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: mode}, ""}
}
func symlink(name, target string) member {
	return member{tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: target, Mode: 0o777}, ""}
}
func link(name, target string) member {
	return member{tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: target}, ""}
}
func pax(m member, records ...string) member {
	m.PAXRecords = map[string]string{}
	for i := 0; i < len(records); i += 2 {
		m.PAXRecords[records[i]] = records[i+1]
	}
	return m
}

func makeTar(t testing.TB, members ...member) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, m := range members {
		h := m.Header
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.ModTime.IsZero() && h.Typeflag != tar.TypeXGlobalHeader {
			h.ModTime, h.Format = memberTime, tar.FormatPAX
		}
		h.Size = int64(len(m.data))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(m.data)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// blob makes the layer blob of a tar: superblock, tar, copies, index.
func blob(tarball []byte) ([]byte, error) {
	tree := New(512, treeTime)
	var copies bytes.Buffer
	n, err := tree.AddTar(bytes.NewReader(tarball), SuperSize, &copies)
	if err != nil {
		return nil, err
	}
	if n != int64(len(tarball)) {
		return nil, fmt.Errorf("size %d of a tar of %d", n, len(tarball))
	}
	image := bytes.NewBuffer(make([]byte, SuperSize))
	image.Write(tarball)
	image.Write(make([]byte, -image.Len()&511))
	image.Write(copies.Bytes())
	super, size, err := tree.Finish(image, int64(image.Len()))
	if err != nil {
		return nil, err
	}
	copy(image.Bytes(), super)
	if size != int64(image.Len()) {
		return nil, fmt.Errorf("size %d of an image of %d", size, image.Len())
	}
	return image.Bytes(), nil
}

// list reads an image with go-erofs, the oracle, into one line for each name.
func list(image []byte) (map[string]string, error) {
	fsys, err := goerofs.Open(bytes.NewReader(image))
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	err = fs.WalkDir(fsys, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*goerofs.Stat)
		line := fmt.Sprintf("%v %d:%d", info.Mode(), st.UID, st.GID)
		switch {
		case info.Mode().IsRegular():
			b, err := fs.ReadFile(fsys, name)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" x%d %q", st.Nlink, b)
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := fsys.(fs.ReadLinkFS).ReadLink(name)
			if err != nil {
				return err
			}
			line += " -> " + target
		case info.Mode()&fs.ModeDevice != 0:
			line += fmt.Sprintf(" dev %#x", st.Rdev)
		}
		for _, k := range slices.Sorted(maps.Keys(st.Xattrs)) {
			line += fmt.Sprintf(" %s=%q", k, st.Xattrs[k])
		}
		out[name] = line
		return nil
	})
	return out, err
}

const opaque = ` trusted.overlay.opaque="y"`

func TestLayers(t *testing.T) {
	const rootDir = "drwxr-xr-x 0:0"
	long := strings.Repeat("x", 255)
	owned := file("f", "1")
	owned.Uid, owned.Gid, owned.Mode = 70000, 1<<32-1, 0o6751
	char := member{tar.Header{Name: "c", Typeflag: tar.TypeChar, Mode: 0o600, Devmajor: 5, Devminor: 300}, ""}
	block := member{tar.Header{Name: "b", Typeflag: tar.TypeBlock, Mode: 0o660, Devmajor: 8, Devminor: 1}, ""}
	fifo := member{tar.Header{Name: "p", Typeflag: tar.TypeFifo, Mode: 0o640}, ""}

	for name, c := range map[string]struct {
		members []member
		want    map[string]string // without the root where it is plain
	}{
		"empty":           {nil, nil},
		"a file":          {[]member{file("f", "hello")}, map[string]string{"f": `-rw-r--r-- 0:0 x1 "hello"`}},
		"an empty file":   {[]member{file("f", "")}, map[string]string{"f": `-rw-r--r-- 0:0 x1 ""`}},
		"owner and bits":  {[]member{owned}, map[string]string{"f": `-rwxr-x--x 70000:4294967295 x1 "1"`}},
		"missing parents": {[]member{file("a/b/f", "1")}, map[string]string{"a": rootDir, "a/b": rootDir, "a/b/f": `-rw-r--r-- 0:0 x1 "1"`}},
		"root listed":     {[]member{dir("./", 0o700)}, map[string]string{".": "drwx------ 0:0"}},
		"cleaned names": {[]member{dir("./a/", 0o700), file("/a/f", "1"), file("a//./g", "2")},
			map[string]string{"a": "drwx------ 0:0", "a/f": `-rw-r--r-- 0:0 x1 "1"`, "a/g": `-rw-r--r-- 0:0 x1 "2"`}},
		"longest name": {[]member{file(long, "1")}, map[string]string{long: `-rw-r--r-- 0:0 x1 "1"`}},
		"special files": {[]member{char, block, fifo},
			map[string]string{"c": "Dcrw------- 0:0 dev 0x10052c", "b": "Drw-rw---- 0:0 dev 0x801", "p": "prw-r----- 0:0"}},

		"file replaces file":     {[]member{file("f", "1"), file("f", "22")}, map[string]string{"f": `-rw-r--r-- 0:0 x1 "22"`}},
		"file replaces folder":   {[]member{file("a/b", "1"), file("a", "2")}, map[string]string{"a": `-rw-r--r-- 0:0 x1 "2"`}},
		"folder replaces file":   {[]member{file("a", "1"), dir("a", 0o711)}, map[string]string{"a": "drwx--x--x 0:0"}},
		"folder listed again":    {[]member{file("a/b", "1"), dir("a", 0o711)}, map[string]string{"a": "drwx--x--x 0:0", "a/b": `-rw-r--r-- 0:0 x1 "1"`}},
		"symlink replaces file":  {[]member{file("a", "1"), symlink("a", "x/y")}, map[string]string{"a": "Lrwxrwxrwx 0:0 -> x/y"}},
		"long symlink":           {[]member{symlink("a", strings.Repeat("0123456789", 200))}, map[string]string{"a": "Lrwxrwxrwx 0:0 -> " + strings.Repeat("0123456789", 200)}},
		"hard links":             {[]member{file("a", "1"), link("b", "a"), link("d/c", "/b")}, map[string]string{"a": `-rw-r--r-- 0:0 x3 "1"`, "b": `-rw-r--r-- 0:0 x3 "1"`, "d": rootDir, "d/c": `-rw-r--r-- 0:0 x3 "1"`}},
		"first name replaced":    {[]member{file("a", "1"), link("b", "a"), file("a", "2")}, map[string]string{"a": `-rw-r--r-- 0:0 x1 "2"`, "b": `-rw-r--r-- 0:0 x1 "1"`}},
		"hard link to a symlink": {[]member{symlink("a", "x"), link("b", "a")}, map[string]string{"a": "Lrwxrwxrwx 0:0 -> x", "b": "Lrwxrwxrwx 0:0 -> x"}},

		"whiteout":                {[]member{file("a/.wh.b", "")}, map[string]string{"a": rootDir, "a/b": "Dc--------- 0:0 dev 0x0"}},
		"whiteout, then file":     {[]member{file(".wh.b", ""), file("b", "1")}, map[string]string{"b": `-rw-r--r-- 0:0 x1 "1"`}},
		"file, then whiteout":     {[]member{file("b", "1"), file(".wh.b", "")}, map[string]string{"b": `-rw-r--r-- 0:0 x1 "1"`}},
		"whiteout, then folder":   {[]member{file(".wh.b", ""), dir("b", 0o755)}, map[string]string{"b": rootDir + opaque}},
		"folder, then whiteout":   {[]member{dir("b", 0o755), file(".wh.b", "")}, map[string]string{"b": rootDir + opaque}},
		"whiteout, then below":    {[]member{file(".wh.b", ""), file("b/f", "1")}, map[string]string{"b": rootDir + opaque, "b/f": `-rw-r--r-- 0:0 x1 "1"`}},
		"opaque folder":           {[]member{dir("b", 0o711), file("b/.wh..wh..opq", ""), file("b/f", "1")}, map[string]string{"b": "drwx--x--x 0:0" + opaque, "b/f": `-rw-r--r-- 0:0 x1 "1"`}},
		"opaque before folder":    {[]member{file("b/.wh..wh..opq", ""), dir("b", 0o711)}, map[string]string{"b": "drwx--x--x 0:0" + opaque}},
		"opaque root":             {[]member{file(".wh..wh..opq", "")}, map[string]string{".": rootDir + opaque}},
		"aufs bookkeeping":        {[]member{dir(".wh..wh.plnk", 0o755), file(".wh..wh.aufs", "")}, nil},
		"through a symlink":       {[]member{dir("usr/lib", 0o755), symlink("lib", "usr/lib"), file("lib/f", "1")}, map[string]string{"usr": rootDir, "usr/lib": rootDir, "lib": "Lrwxrwxrwx 0:0 -> usr/lib", "usr/lib/f": `-rw-r--r-- 0:0 x1 "1"`}},
		"out through a symlink":   {[]member{symlink("a/l", "../../../../b"), file("a/l/f", "1")}, map[string]string{"a": rootDir, "a/l": "Lrwxrwxrwx 0:0 -> ../../../../b", "b": rootDir, "b/f": `-rw-r--r-- 0:0 x1 "1"`}},
		"global header":           {[]member{{tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "x"}, Format: tar.FormatPAX}, ""}}, nil},
		"attributes":              {[]member{pax(file("f", "1"), "SCHILY.xattr.user.a", "b", "SCHILY.xattr.security.capability", "\x01\x02\x00z")}, map[string]string{"f": `-rw-r--r-- 0:0 x1 "1" security.capability="\x01\x02\x00z" user.a="b"`}},
		"overlayfs's attributes":  {[]member{pax(dir("d", 0o755), "SCHILY.xattr.trusted.overlay.redirect", "/x", "SCHILY.xattr.trusted.ok", "1")}, map[string]string{"d": rootDir + ` trusted.ok="1"`}},
		"unknown attribute space": {[]member{pax(file("f", "1"), "SCHILY.xattr.system.nfs4", "b")}, map[string]string{"f": `-rw-r--r-- 0:0 x1 "1"`}},
	} {
		t.Run(name, func(t *testing.T) {
			b, err := blob(makeTar(t, c.members...))
			if err != nil {
				t.Fatal(err)
			}
			got, err := list(b)
			if err != nil {
				t.Fatal(err)
			}
			want := map[string]string{".": rootDir}
			maps.Copy(want, c.want)
			if !maps.Equal(got, want) {
				t.Errorf("\n got %v\nwant %v", got, want)
			}
		})
	}
}

func TestLayersRefused(t *testing.T) {
	huge := file("f", "1")
	huge.Uid = 1 << 33
	for name, c := range map[string]struct {
		members []member
		want    error
		words   string
	}{
		"dot dot":                {[]member{file("../f", "1")}, ErrBadName, `"../f"`},
		"dot dot inside":         {[]member{file("a/../f", "1")}, ErrBadName, `".."`},
		"long name":              {[]member{file("a/"+strings.Repeat("x", 256), "1")}, ErrBadName, "256 bytes"},
		"long parent":            {[]member{file(strings.Repeat("x", 256)+"/f", "1")}, ErrBadName, "256 bytes"},
		"long path":              {[]member{file(strings.Repeat("x/", 2100)+"f", "1")}, ErrBadName, "4201 bytes"},
		"long symlink":           {[]member{symlink("a", strings.Repeat("x", 4096))}, ErrBadEntry, "4096 bytes"},
		"root is a symlink":      {[]member{symlink(".", "x")}, ErrBadEntry, "root"},
		"below a file":           {[]member{file("a", "1"), file("a/b", "2")}, ErrBadEntry, `"a"`},
		"symlink loop":           {[]member{symlink("a", "b"), symlink("b", "a"), file("a/f", "1")}, ErrBadName, "symbolic links"},
		"hard link to nothing":   {[]member{link("a", "b")}, ErrBadEntry, `"b"`},
		"hard link forward":      {[]member{link("a", "b"), file("b", "1")}, ErrBadEntry, `"b"`},
		"hard link to a folder":  {[]member{dir("b", 0o755), link("a", "b")}, ErrBadEntry, `"b"`},
		"hard link to whiteout":  {[]member{file(".wh.b", ""), link("a", "b")}, ErrBadEntry, `"b"`},
		"hard link out":          {[]member{link("a", "../etc/passwd")}, ErrBadName, "passwd"},
		"whiteout of nothing":    {[]member{file("a/.wh.", "")}, ErrBadName, "whiteout"},
		"whiteout of dot dot":    {[]member{file("a/.wh...", "")}, ErrBadName, "whiteout"},
		"opaque file":            {[]member{file("a", "1"), file("a/.wh..wh..opq", "")}, ErrBadEntry, "opaque"},
		"owner":                  {[]member{huge}, ErrBadEntry, "owner"},
		"unknown type":           {[]member{{tar.Header{Name: "v", Typeflag: 'V'}, ""}}, ErrBadEntry, "type 'V'"},
		"attributes":             {[]member{pax(file("f", "1"), "SCHILY.xattr.user.a", strings.Repeat("x", 70000))}, ErrLimit, "attributes"},
		"attribute's name":       {[]member{pax(file("f", "1"), "SCHILY.xattr.user."+strings.Repeat("x", 256), "1")}, ErrLimit, "attributes"},
		"device number":          {[]member{{tar.Header{Name: "c", Typeflag: tar.TypeChar, Devmajor: 4096}, ""}}, ErrBadEntry, "4096:0"},
		"part of a symlink long": {[]member{symlink("a", strings.Repeat("x", 300)), file("a/f", "1")}, ErrBadName, "300 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := blob(makeTar(t, c.members...))
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.words) {
				t.Errorf("error %v, want %v with %q", err, c.want, c.words)
			}
		})
	}
}

func TestDamagedTars(t *testing.T) {
	good := makeTar(t, file("f", strings.Repeat("x", 2000)))
	for name, b := range map[string][]byte{
		"cut in data":   good[:1500],
		"cut in header": good[:100],
		"checksum":      append([]byte("zzz"), good[3:]...),
	} {
		if _, err := blob(b); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// Limits are counted, not measured: what was replaced counts too.
func TestLimits(t *testing.T) {
	tree := New(512, treeTime)
	tree.entries = maxEntries - 1
	if err := tree.Add("a", Entry{Mode: TypeRegular}); err != nil {
		t.Fatal(err)
	}
	if err := tree.Add("a", Entry{Mode: TypeRegular}); !errors.Is(err, ErrLimit) {
		t.Errorf("one entry too many: %v", err)
	}
	tree = New(512, treeTime)
	tree.meta = maxMetadata - 10
	if err := tree.Add("a", Entry{Mode: TypeSymlink, Target: "0123456789"}); !errors.Is(err, ErrLimit) {
		t.Errorf("too much metadata: %v", err)
	}
	tree = New(512, treeTime)
	if err := tree.Add("a", Entry{Mode: TypeRegular, Start: 1 << 42, Size: 1}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := tree.Finish(new(bytes.Buffer), 4096); !errors.Is(err, ErrLimit) {
		t.Errorf("data behind 2^32 blocks: %v", err)
	}
}

func TestManyNames(t *testing.T) {
	members := []member{dir("d", 0o755)}
	want := map[string]string{".": "drwxr-xr-x 0:0", "d": "drwxr-xr-x 0:0"}
	r := rand.New(rand.NewPCG(1, 2))
	for i := range 5000 {
		name := fmt.Sprintf("d/%x%s", r.Uint64(), strings.Repeat("n", r.IntN(200)))
		members = append(members, file(name, fmt.Sprint(i)))
		want[name] = fmt.Sprintf(`-rw-r--r-- 0:0 x1 "%d"`, i)
	}
	b, err := blob(makeTar(t, members...))
	if err != nil {
		t.Fatal(err)
	}
	got, err := list(b)
	if err != nil {
		t.Fatal(err)
	}
	if !maps.Equal(got, want) {
		t.Error("other names or contents")
	}
	testenv.Root(t)
	compare(t, makeTar(t, members...), b)
}

// What a Tree does not keep does not stay in memory: long PAX records around an
// attribute, and attributes that it leaves out.
func TestLongRecords(t *testing.T) {
	const members, length = 100, 900 << 10
	r, w := io.Pipe()
	go func() {
		tw := tar.NewWriter(w)
		long := strings.Repeat("x", length)
		for i := range members {
			h := &tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprint("f", i), Format: tar.FormatPAX,
				PAXRecords: map[string]string{"SCHILY.xattr.user.a": "b", "comment": long}}
			if i%2 == 1 {
				h.PAXRecords = map[string]string{"SCHILY.xattr.unknown.a": long}
			}
			if err := tw.WriteHeader(h); err != nil {
				w.CloseWithError(err)
				return
			}
		}
		w.CloseWithError(tw.Close())
	}()
	tree := New(512, treeTime)
	if _, err := tree.AddTar(r, 0, io.Discard); err != nil {
		t.Fatal(err)
	}
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	if m.HeapAlloc > members*length/2 {
		t.Errorf("%d MiB for %d names", m.HeapAlloc>>20, members)
	}
	if got := len(tree.root.more.children); got != members {
		t.Errorf("%d names, want %d", got, members)
	}
}

// Bytes of a known layer: a change of them changes what guests measure.
func TestGolden(t *testing.T) {
	tarball := makeTar(t, dir("etc/", 0o755), file("etc/passwd", "root:x:0:0::/:/bin/sh\n"), symlink("bin", "usr/bin"),
		link("etc/passwd-", "etc/passwd"), file("usr/bin/.wh.old", ""), file("var/.wh..wh..opq", ""),
		pax(file("usr/bin/ping", "ELF"), "SCHILY.xattr.security.capability", "\x01\x00\x00\x02"))
	b, err := blob(tarball)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(b)
	if got := hex.EncodeToString(sum[:]); got != "3022b1a25a7d6e8d4ec82551ed90425948d961d89cfd3cc21dda8e1804285c8b" {
		t.Errorf("SHA-256 %s", got)
	}
}

// The kernel mounts the blob; what it shows is what `tar -x` makes of the tar.
func TestAgainstKernelAndTar(t *testing.T) {
	testenv.Root(t)
	tarTool := testenv.LookTool(t, "tar")
	src := t.TempDir()
	r := rand.New(rand.NewPCG(3, 4))
	for i := range 300 {
		name := filepath.Join(src, fmt.Sprintf("d%d/e%d/f%d", r.IntN(5), r.IntN(5), i))
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, bytes.Repeat([]byte{byte(i)}, r.IntN(5000)), 0o644); err != nil {
			t.Fatal(err)
		}
		os.Chown(name, r.IntN(70000), r.IntN(70000))
		os.Chmod(name, fs.FileMode(r.IntN(0o1000))|fs.ModeSetuid)
		switch i % 10 {
		case 0:
			os.Link(name, name+".hard")
		case 1:
			os.Symlink(strings.Repeat("../x", 1+r.IntN(60)), name+".soft")
		case 2:
			syscall.Mkfifo(name+".fifo", 0o600)
		case 3:
			syscall.Mknod(name+".dev", syscall.S_IFCHR|0o600, r.IntN(1<<16)+1)
		case 4:
			syscall.Setxattr(name, "user.key", bytes.Repeat([]byte{1}, r.IntN(300)), 0)
			syscall.Setxattr(name, "trusted.key", []byte("t"), 0)
		}
	}
	hole, err := os.Create(filepath.Join(src, "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	for off := int64(0); off < 3<<20; off += 1 << 20 {
		hole.WriteAt([]byte("some data at"), off+4096)
	}
	hole.Truncate(4<<20 + 5)
	hole.Close()

	for _, format := range [][]string{
		{"--format=gnu"}, {"--format=gnu", "--sparse"},
		{"--format=pax"}, {"--format=pax", "--sparse", "--sparse-version=0.0"}, {"--format=pax", "--sparse", "--sparse-version=0.1"},
		{"--format=pax", "--sparse", "--sparse-version=1.0"}, {"--format=pax", "--xattrs", "--xattrs-include=*"},
	} {
		t.Run(strings.Join(format, " "), func(t *testing.T) {
			tarball, err := exec.Command(tarTool, append(format, "-C", src, "-cf", "-", ".")...).Output()
			if err != nil {
				t.Fatal(err)
			}
			b, err := blob(tarball)
			if err != nil {
				t.Fatal(err)
			}
			compare(t, tarball, b)
		})
	}
}

// compare mounts a blob and compares it with what tar extracts.
func compare(t *testing.T, tarball, blob []byte) {
	t.Helper()
	work, extracted, mounted := t.TempDir(), t.TempDir(), t.TempDir()
	image := filepath.Join(work, "blob")
	if err := os.WriteFile(image, blob, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(testenv.LookTool(t, "tar"), "--xattrs", "--xattrs-include=*", "--numeric-owner", "-C", extracted, "-xpf", "-")
	cmd.Stdin = bytes.NewReader(tarball)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("tar: %v\n%s", err, out)
	}
	if err := syscall.Mount(image, mounted, "erofs", syscall.MS_RDONLY, ""); err != nil {
		testenv.Need(t, !errors.Is(err, syscall.ENOTBLK) && !errors.Is(err, syscall.ENODEV) && !errors.Is(err, syscall.EPERM),
			"this kernel does not mount EROFS from a file: "+err.Error())
		t.Fatal(err)
	}
	defer syscall.Unmount(mounted, 0)
	got, want := describe(t, mounted), describe(t, extracted)
	for name := range want {
		if got[name] != want[name] {
			t.Errorf("%s:\n got %s\nwant %s", name, got[name], want[name])
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d names, want %d", len(got), len(want))
	}
}

// describe writes down all that stat, readlink, listxattr and read tell.
func describe(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	first := map[uint64]string{} // name by inode
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, name)
		st := info.Sys().(*syscall.Stat_t)
		line := fmt.Sprintf("%o %d:%d x%d rdev %d", st.Mode, st.Uid, st.Gid, st.Nlink, st.Rdev)
		switch {
		case info.IsDir():
			// The mount's own directory and tar's "." differ by what made them.
			if rel == "." {
				return nil
			}
			line = fmt.Sprintf("%o %d:%d at %v", st.Mode, st.Uid, st.Gid, info.ModTime().UnixNano())
		case info.Mode().IsRegular():
			b, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %d %x at %v", st.Size, sha256.Sum256(b), info.ModTime().UnixNano())
			if _, ok := first[st.Ino]; !ok {
				first[st.Ino] = rel
			}
			line += " = " + first[st.Ino]
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(name)
			if err != nil {
				return err
			}
			line += " -> " + target
		}
		if info.Mode().IsRegular() || info.IsDir() {
			buf := make([]byte, 4096)
			n, err := syscall.Listxattr(name, buf)
			if err != nil {
				return err
			}
			names := strings.Split(strings.TrimRight(string(buf[:n]), "\x00"), "\x00")
			slices.Sort(names)
			for _, k := range names {
				if k != "" {
					v := make([]byte, 4096)
					n, _ := syscall.Getxattr(name, k, v)
					line += fmt.Sprintf(" %s=%x", k, v[:n])
				}
			}
		}
		out[rel] = line
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func FuzzAddTar(f *testing.F) {
	f.Add(makeTar(f, dir("a/", 0o755), file("a/f", "hello"), symlink("l", "a"), file("l/g", "x"), link("h", "a/f")))
	f.Add(makeTar(f, file("a/.wh.f", ""), file("a/.wh..wh..opq", ""), pax(file("x", "1"), "SCHILY.xattr.user.a", "b")))
	f.Add(make([]byte, 1024))
	f.Fuzz(func(t *testing.T, tarball []byte) {
		b, err := blob(tarball)
		if err != nil {
			return
		}
		want, err := list(b)
		if err != nil {
			t.Fatalf("the oracle cannot read the image: %v", err)
		}
		// The plain form of it is the same tree.
		var plain bytes.Buffer
		if err := New(512, treeTime).CopyTar(bytes.NewReader(tarball), &plain); err != nil {
			return // archive/tar writes less than it reads
		}
		if b, err = blob(plain.Bytes()); err != nil {
			t.Fatalf("the plain form is refused: %v", err)
		}
		if got, err := list(b); err != nil || !maps.Equal(got, want) {
			t.Errorf("the plain form gives\n%v, %v\nwant\n%v", got, err, want)
		}
	})
}
