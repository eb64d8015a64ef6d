package disk

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"coffer/hostbuild/archive"
	"coffer/hostbuild/disk/erofs"
	"coffer/internal/testenv"
)

var (
	testTime       = time.Unix(1700000000, 0)
	testPassphrase = []byte(strings.Repeat("0123456789abcdef", 8))
)

func seeded(b byte) *rand.ChaCha8 { return rand.NewChaCha8([32]byte{b}) }

func randomBytes(seed byte, n int) []byte {
	b := make([]byte, n)
	seeded(seed).Read(b)
	return b
}

// makeTar makes a tar of the given members.
func makeTar(t testing.TB, members ...tarMember) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, m := range members {
		h := m.Header
		if h.ModTime.IsZero() {
			h.ModTime = time.Unix(1600000000, 0)
		}
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		h.Size = int64(len(m.data))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(m.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

type tarMember struct {
	tar.Header
	data []byte
}

func regular(name string, data []byte) tarMember {
	return tarMember{tar.Header{Name: name, Mode: 0o644}, data}
}

func digestOf(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// dockerSave makes an archive as old `docker save` does: manifest.json last.
func dockerSave(t testing.TB, layers ...[]byte) []byte {
	t.Helper()
	var members []tarMember
	var names, diffIDs []string
	for i, l := range layers {
		name := digestOf([]byte{byte(i)}) + "/layer.tar"
		members = append(members, regular(name, l))
		names = append(names, name)
		diffIDs = append(diffIDs, "sha256:"+digestOf(l))
	}
	config, _ := json.Marshal(map[string]any{
		"architecture": "amd64", "os": "linux",
		"config": map[string]any{"Entrypoint": []string{"/bin/app"}, "Cmd": []string{"serve"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs},
	})
	configName := digestOf(config) + ".json"
	manifest, _ := json.Marshal([]map[string]any{{"Config": configName, "RepoTags": []string{"app:1"}, "Layers": names}})
	return makeTar(t, append(members, regular(configName, config), regular("manifest.json", manifest))...)
}

func writeFile(t testing.TB, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func smallImage(t testing.TB) string {
	return writeFile(t, "image.tar", dockerSave(t, makeTar(t, regular("etc/motd", []byte("hello\n")), regular("bin/app", randomBytes(1, 3<<20)))))
}

func params(t testing.TB, image string) RootParams {
	dir := t.TempDir()
	return RootParams{
		Out: create(t, dir), Temp: dir, Size: 200 << 20, Passphrase: testPassphrase, Archive: image,
		Files: []File{
			{Path: "/bin/agent", Mode: 0o100755, Data: randomBytes(9, 100000)},
			{Path: "/etc/hosts", Mode: 0o120777, Link: "/run/coffer/hosts"},
			{Path: "/proc", Mode: 0o40555},
		},
		Time: testTime, Rand: seeded(7),
	}
}

func create(t testing.TB, dir string) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "crypt_root.qcow2"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// file is where params lets crypt_root be written.
func (p RootParams) file() string { return p.Out.(*os.File).Name() }

// nothingBeside checks that no temporary file outlives the building.
func nothingBeside(t *testing.T, p RootParams) {
	t.Helper()
	os.Remove(p.file())
	nothingLeft(t, p.file())
}

// decrypt opens crypt_root with tools of others and returns its payload in a
// file: qemu-img reads the qcow2 image, cryptsetup decrypts it in place.
func decrypt(t testing.TB, drive string, root *Root) string {
	t.Helper()
	dir := t.TempDir()
	raw, pass := filepath.Join(dir, "raw"), filepath.Join(dir, "pass")
	if err := os.WriteFile(pass, testPassphrase, 0o600); err != nil {
		t.Fatal(err)
	}
	output(t, testenv.LookTool(t, "qemu-img"), "convert", "-O", "raw", drive, raw)
	header := make([]byte, root.DataOffset)
	f, err := os.Open(raw)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := io.ReadFull(f, header); err != nil {
		t.Fatal(err)
	}
	if got := digestOf(header); got != root.HeaderSHA256 {
		t.Errorf("header of SHA-256 %s, Root says %s", got, root.HeaderSHA256)
	}
	output(t, testenv.LookTool(t, "cryptsetup"), "reencrypt", "--decrypt", "--force-offline-reencrypt", "--disable-locks", "--batch-mode",
		"--header", filepath.Join(dir, "header"), "--key-file", pass, raw)
	// The payload has moved to the front.
	if err := os.Truncate(raw, root.PayloadSize); err != nil {
		t.Fatal(err)
	}
	return raw
}

func output(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// Every part of crypt_root is read by a tool of others, from the qcow2 file down
// to the files of a layer.
func TestBuildRoot(t *testing.T) {
	base := makeTar(t,
		tarMember{tar.Header{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o755}, nil},
		regular("etc/motd", []byte("hello\n")),
		regular("etc/old", []byte("old\n")),
		regular("bin/app", randomBytes(1, 3<<20)),
	)
	top := makeTar(t, regular("etc/.wh.old", nil), regular("etc/new", []byte("new\n")))
	p := params(t, writeFile(t, "image.tar", dockerSave(t, base, top)))
	root, err := BuildRoot(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	if out := output(t, testenv.LookTool(t, "qemu-img"), "check", p.file()); !strings.Contains(out, "No errors were found") {
		t.Errorf("qemu-img check: %s", out)
	}
	if st, err := os.Stat(p.file()); err != nil || st.Sys().(*syscall.Stat_t).Blocks*512 > 16<<20 {
		t.Errorf("the drive is %v, not sparse or not readable", st)
	}
	payload := decrypt(t, p.file(), root)
	if root.PayloadSize != p.Size-root.DataOffset {
		t.Errorf("payload of %d bytes", root.PayloadSize)
	}

	output(t, testenv.LookTool(t, "veritysetup"), "verify", payload, payload, root.Verity.RootHash,
		"--hash-offset", strconv.FormatInt((root.Verity.HashStartBlock-1)*4096, 10))
	if root.Verity.DataBlocks*4096 != root.EROFSSize {
		t.Errorf("verity covers %d blocks of %d bytes", root.Verity.DataBlocks, root.EROFSSize)
	}
	fsck := filepath.Join(t.TempDir(), "root.erofs")
	cut(t, payload, fsck, 0, root.EROFSSize)
	output(t, testenv.LookTool(t, "fsck.erofs"), fsck)

	scratch := filepath.Join(t.TempDir(), "scratch")
	cut(t, payload, scratch, root.Scratch.Offset, root.Scratch.Size)
	output(t, testenv.LookTool(t, "e2fsck"), "-fn", scratch)

	im := root.Image
	if im.Name != "docker.io/library/app:1" || !slices.Equal(im.DiffIDs, []string{"sha256:" + digestOf(base), "sha256:" + digestOf(top)}) {
		t.Errorf("image %+v", im)
	}

	testenv.Root(t)
	dir := mountImage(t, fsck, "erofs", "ro")
	if got, _ := os.ReadFile(filepath.Join(dir, "bin/agent")); !bytes.Equal(got, p.Files[0].Data) {
		t.Error("/bin/agent has other contents")
	}
	if st, err := os.Lstat(filepath.Join(dir, "bin/agent")); err != nil || st.Mode() != 0o755 || !st.ModTime().Equal(testTime) || st.Sys().(*syscall.Stat_t).Uid != 0 {
		t.Errorf("/bin/agent: %v, %v", st, err)
	}
	if got, _ := os.Readlink(filepath.Join(dir, "etc/hosts")); got != "/run/coffer/hosts" {
		t.Errorf("/etc/hosts -> %q", got)
	}
	if st, err := os.Stat(filepath.Join(dir, "proc")); err != nil || st.Mode() != 0o555|os.ModeDir {
		t.Errorf("/proc: %v, %v", st, err)
	}
	var layers []string
	for _, id := range slices.Backward(im.DiffIDs) {
		hash := strings.TrimPrefix(id, "sha256:")
		blob := filepath.Join(t.TempDir(), "blob")
		b, err := os.ReadFile(filepath.Join(dir, "image/layers/sha256", hash[:2], hash+".erofs"))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(blob, b, 0o600); err != nil {
			t.Fatal(err)
		}
		layers = append(layers, mountImage(t, blob, "erofs", "ro"))
	}
	merged := mountImage(t, "overlay", "overlay", "ro,lowerdir="+strings.Join(layers, ":"))
	for name, want := range map[string][]byte{"etc/motd": []byte("hello\n"), "etc/new": []byte("new\n"), "bin/app": randomBytes(1, 3<<20)} {
		if got, err := os.ReadFile(filepath.Join(merged, name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s in the container: %v, or other contents", name, err)
		}
	}
	if _, err := os.Stat(filepath.Join(merged, "etc/old")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the removed file is there: %v", err)
	}

	rw := mountImage(t, scratch, "ext4", "loop,nosuid,nodev,noatime,noinit_itable")
	for i := range 200 {
		if err := os.WriteFile(filepath.Join(rw, strconv.Itoa(i)), randomBytes(byte(i), 50000), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	output(t, "umount", rw)
	output(t, testenv.LookTool(t, "e2fsck"), "-fn", scratch)
}

func TestSameInputSameBytes(t *testing.T) {
	build := func(seed byte) []byte {
		p := params(t, smallImage(t))
		p.Rand = seeded(seed)
		if _, err := BuildRoot(t.Context(), p); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(p.file())
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	one := build(7)
	if !bytes.Equal(one, build(7)) {
		t.Error("the same randomness gives another drive")
	}
	if bytes.Equal(one, build(8)) {
		t.Error("other randomness gives the same drive")
	}
	for _, secret := range [][]byte{testPassphrase[:16], []byte("layer.tar"), []byte("hello\n"), randomBytes(1, 32)} {
		if bytes.Contains(one, secret) {
			t.Errorf("%q stands in the drive in the clear", secret)
		}
	}
}

// The verity root hash of a known root: what a guest measures must not change
// unnoticed. It holds the EROFS and nothing that e2fsprogs makes.
func TestGoldenRootHash(t *testing.T) {
	root, err := BuildRoot(t.Context(), params(t, smallImage(t)))
	if err != nil {
		t.Fatal(err)
	}
	if root.Verity.RootHash != "de7050eea251e16fc115cc03de40675d3d30fe4c83f2d57db95be7e37123c2da" ||
		root.HeaderSHA256 != "7874eca2962e4b4de8f493de110dacd88747acc4585e19aed27e259ff31551d4" {
		t.Errorf("root hash %s, header %s", root.Verity.RootHash, root.HeaderSHA256)
	}
}

// The size that the error asks for is enough, and a byte less is not.
func TestTooSmall(t *testing.T) {
	image := smallImage(t)
	p := params(t, image)
	p.Size = 66 << 20 // the writable part fits, the image does not
	_, err := BuildRoot(t.Context(), p)
	if !errors.Is(err, ErrTooSmall) {
		t.Fatalf("error %v", err)
	}
	nothingBeside(t, p)
	m := regexp.MustCompile(`at least (\d+) `).FindStringSubmatch(err.Error())
	if m == nil {
		t.Fatalf("error %v names no size", err)
	}
	need, _ := strconv.ParseInt(m[1], 10, 64)
	for size, want := range map[int64]error{need: nil, need - 1<<20: ErrTooSmall} {
		p := params(t, image)
		p.Size = size
		if _, err := BuildRoot(t.Context(), p); !errors.Is(err, want) {
			t.Errorf("with %d bytes: %v", size, err)
		}
	}
	p.Size = 1 << 20
	if _, err := BuildRoot(t.Context(), p); !errors.Is(err, ErrTooSmall) {
		t.Errorf("with no room for the writable part: %v", err)
	}
}

func TestBuildRootErrors(t *testing.T) {
	good := dockerSave(t, makeTar(t, regular("f", randomBytes(1, 3<<20))))
	for name, c := range map[string]struct {
		archive []byte
		change  func(*RootParams)
		want    error
		words   string
	}{
		"truncated":     {gzipped(t, good)[:1<<20], nil, archive.ErrTruncated, "image.tar"},
		"no archive":    {[]byte("hello"), nil, archive.ErrNotArchive, "docker save"},
		"escape":        {dockerSave(t, makeTar(t, regular("../../etc/passwd", nil))), nil, erofs.ErrBadName, `"../../etc/passwd"`},
		"no image":      {good, func(p *RootParams) { p.ImageRef = "other" }, archive.ErrNoImage, "app:1"},
		"missing file":  {good, func(p *RootParams) { p.Files[0] = File{Path: "/bin/agent", Mode: 0o100755, Source: "/no/such"} }, fs.ErrNotExist, "/bin/agent"},
		"odd file":      {good, func(p *RootParams) { p.Files[0].Mode = 0o140755 }, erofs.ErrBadEntry, "/bin/agent"},
		"source folder": {good, func(p *RootParams) { p.Files[0].Source = "/etc" }, ErrBadFile, "/etc"},
		"no randomness": {good, func(p *RootParams) { p.Rand = bytes.NewReader(nil) }, io.EOF, "randomness"},
		"no place":      {good, func(p *RootParams) { p.Temp = "/no/such" }, fs.ErrNotExist, "/no/such/"},
		"bomb":          {gzipped(t, dockerSave(t, makeTar(t, regular("zeros", make([]byte, 80<<20))))), func(p *RootParams) { p.Size = 70 << 20 }, ErrTooSmall, "raise root_drive_size"},
	} {
		t.Run(name, func(t *testing.T) {
			p := params(t, writeFile(t, "image.tar", c.archive))
			if c.change != nil {
				c.change(&p)
			}
			_, err := BuildRoot(t.Context(), p)
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.words) || !strings.Contains(err.Error(), p.Temp) {
				t.Errorf("error %v, want %v with %q", err, c.want, c.words)
			}
			nothingBeside(t, p)
		})
	}
}

func TestCancel(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	p := params(t, smallImage(t))
	p.Progress = func(stage string, done, total int64) { cancel() }
	if _, err := BuildRoot(ctx, p); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	nothingBeside(t, p)
}

// A build host's full disk is told apart from a drive that is too small.
func TestNoSpace(t *testing.T) {
	testenv.Root(t)
	dir := mountImage(t, "none", "tmpfs", "size=8m")
	p := params(t, writeFile(t, "image.tar", dockerSave(t, makeTar(t, regular("f", randomBytes(1, 20<<20))))))
	p.Out, p.Temp = create(t, dir), dir
	if _, err := BuildRoot(t.Context(), p); !errors.Is(err, ErrNoSpace) || !strings.Contains(err.Error(), dir) {
		t.Errorf("error %v", err)
	}
	nothingBeside(t, p)
	d := DriveParams{Out: filepath.Join(dir, "user_data.qcow2"), Size: 100 << 20, Time: testTime, Files: []File{{Path: "/f", Mode: 0o100644, Data: randomBytes(1, 20<<20)}}}
	if err := BuildDrive(t.Context(), d); !errors.Is(err, ErrNoSpace) {
		t.Errorf("error %v", err)
	}
	nothingLeft(t, d.Out)
}

func cut(t testing.TB, from, to string, off, n int64) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, b[off:off+n], 0o600); err != nil {
		t.Fatal(err)
	}
}

func mountImage(t testing.TB, image, fstype, opts string) string {
	t.Helper()
	dir := t.TempDir()
	output(t, "mount", "-t", fstype, "-o", opts, image, dir)
	t.Cleanup(func() { exec.Command("umount", dir).Run() })
	return dir
}
