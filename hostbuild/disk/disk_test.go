package disk

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"coffer/hostbuild/disk/luks2"
	"coffer/hostbuild/disk/xts"
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
	base := makeTar(t,
		tarMember{tar.Header{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o755}, nil},
		regular("etc/motd", []byte("hello\n")),
		regular("etc/old", []byte("old\n")),
		regular("bin/app", randomBytes(1, 3<<20)),
	)
	top := makeTar(t, regular("etc/.wh.old", nil), regular("etc/new", []byte("new\n")))
	return writeFile(t, "image.tar", dockerSave(t, base, top))
}

func params(t testing.TB, image string) RootParams {
	return RootParams{
		Out: filepath.Join(t.TempDir(), "crypt_root.qcow2"), Size: 300 << 20, Passphrase: testPassphrase, Archive: image,
		Files: []File{
			{Path: "/bin/agent", Mode: 0o100755, Data: randomBytes(9, 100000)},
			{Path: "/etc/hosts", Mode: 0o120777, Link: "/run/coffer/hosts"},
			{Path: "/proc", Mode: 0o40555},
		},
		Time: testTime, Rand: seeded(7),
	}
}

// payload decrypts crypt_root with tools of others: qemu-img reads the image,
// cryptsetup gives the volume key.
func decrypt(t testing.TB, drive string) string {
	t.Helper()
	qemu, cryptsetup := testenv.LookTool(t, "qemu-img"), testenv.LookTool(t, "cryptsetup")
	dir := t.TempDir()
	raw, key, pass := filepath.Join(dir, "raw"), filepath.Join(dir, "key"), filepath.Join(dir, "pass")
	if err := os.WriteFile(pass, testPassphrase, 0o600); err != nil {
		t.Fatal(err)
	}
	output(t, qemu, "convert", "-O", "raw", drive, raw)
	output(t, cryptsetup, "luksDump", "--batch-mode", "--dump-volume-key", "--volume-key-file", key, "--key-file", pass, raw)
	k, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	c, err := xts.New(k)
	if err != nil {
		t.Fatal(err)
	}
	b = b[luks2.DataOffset:]
	c.Decrypt(b, 0, luks2.SectorSize)
	payload := filepath.Join(dir, "payload")
	if err := os.WriteFile(payload, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return payload
}

func output(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func TestBuildRoot(t *testing.T) {
	p := params(t, smallImage(t))
	root, err := BuildRoot(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	if out := output(t, testenv.LookTool(t, "qemu-img"), "check", p.Out); !strings.Contains(out, "No errors were found") {
		t.Errorf("qemu-img check: %s", out)
	}
	payload := decrypt(t, p.Out)

	output(t, testenv.LookTool(t, "veritysetup"), "verify", payload, payload, root.Verity.RootHash,
		"--hash-offset", strconv.FormatInt((root.Verity.HashStartBlock-1)*4096, 10))

	erofs := filepath.Join(t.TempDir(), "root.erofs")
	cut(t, payload, erofs, 0, root.EROFSSize)
	output(t, testenv.LookTool(t, "fsck.erofs"), erofs)

	ext4 := filepath.Join(t.TempDir(), "scratch")
	cut(t, payload, ext4, root.Scratch.Offset, root.Scratch.Size)
	output(t, testenv.LookTool(t, "e2fsck"), "-fn", ext4)

	testenv.Root(t)
	dir := mountImage(t, erofs, "erofs", "ro")
	tree(t, dir)
}

func tree(t testing.TB, dir string) {
	t.Log(output(t, "find", dir, "-ls"))
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
