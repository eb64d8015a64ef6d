package cvm

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"coffer/hostbuild/bundle"
	"coffer/hostbuild/config"
	"coffer/hostbuild/kbs"
	"coffer/hostbuild/policy"
	"coffer/hostbuild/register"
	"coffer/hostbuild/settings"
	"coffer/internal/guestconfig"
	"coffer/internal/testenv"
	"coffer/test/fakebase"
)

var testTime = time.Unix(1700000000, 0)

// rig is all that a build needs: a KBS, a base, an archive.
type rig struct {
	dir      string
	settings *settings.Settings
	config   string // CONFIG.yaml
}

func newRig(t *testing.T) *rig {
	t.Helper()
	testenv.LookTool(t, "mke2fs")
	dir := t.TempDir()
	os.Chmod(dir, 0o755)
	for d := dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		os.Chmod(d, 0o755) // for the tests that build as another user
	}
	r := &rig{dir: dir, config: filepath.Join(dir, "CONFIG.yaml")}
	kbsDir := filepath.Join(dir, "kbs")
	if err := kbs.Init(kbsDir, kbs.Options{Hosts: []string{"127.0.0.1"}}); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(kbsDir, "policy"), 0o700); err != nil {
		t.Fatal(err)
	}
	server, err := kbs.New(kbs.Options{Dir: kbsDir, Dialect: kbs.DialectT, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); server.Serve(ctx, l) }()
	t.Cleanup(func() { cancel(); <-done })

	fakebase.Write(t, filepath.Join(dir, "base"))
	r.write(t, "kit/startup/run.sh", []byte("#!/bin/sh\n"))
	r.write(t, "image.tar.gz", image(t, "hello\n"))
	r.write(t, "CONFIG.yaml", fmt.Appendf(nil, "docker_archive: %s\nroot_drive_size: 1\nuser_config:\n  kit: %s\nallowed_ports: [8002]\nvcpus: [1, 2]\n",
		filepath.Join(dir, "image.tar.gz"), filepath.Join(dir, "kit")))
	url := "https://" + l.Addr().String()
	r.settings = &settings.Settings{
		File: "settings", KBSURL: url, KBSGuestURL: url, KBSCA: filepath.Join(kbsDir, "ca.pem"), AdminKey: filepath.Join(kbsDir, "admin.key"),
		PolicyDir: filepath.Join(kbsDir, "policy"), BaseDir: filepath.Join(dir, "base"), OutputDir: filepath.Join(dir, "out"),
	}
	return r
}

func (r *rig) write(t *testing.T, name string, data []byte) {
	t.Helper()
	path := filepath.Join(r.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
}

func sum(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}

// image is a gzip'd docker archive of one layer with a large and a small file.
func image(t *testing.T, motd string) []byte {
	t.Helper()
	large := make([]byte, 8<<20)
	rand.NewChaCha8([32]byte{1}).Read(large)
	layer := tarOf(t, map[string]string{"etc/motd": motd, "bin/app": string(large)})
	conf := fmt.Sprintf(`{"os":"linux","architecture":"amd64","config":{"Cmd":["/bin/app"]},"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}`, sum(layer))
	manifest := fmt.Sprintf(`[{"Config":"%s.json","RepoTags":["app:1"],"Layers":["l/layer.tar"]}]`, sum([]byte(conf)))
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	z.Write(tarOf(t, map[string]string{"l/layer.tar": string(layer), sum([]byte(conf)) + ".json": conf, "manifest.json": manifest}))
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func tarOf(t *testing.T, files map[string]string) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	var names []string
	for n := range files {
		names = append(names, n)
	}
	slices.Sort(names)
	for _, n := range names {
		if err := w.WriteHeader(&tar.Header{Name: n, Mode: 0o755, Size: int64(len(files[n])), ModTime: testTime}); err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, files[n])
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func (r *rig) params(t *testing.T) Params {
	t.Helper()
	c, err := config.Read(r.config)
	if err != nil {
		t.Fatal(err)
	}
	return Params{Config: c, Settings: r.settings, TEE: "snp", Now: testTime.Add(time.Millisecond)}
}

func (r *rig) build(t *testing.T) *Result {
	t.Helper()
	res, err := Build(t.Context(), r.params(t))
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// rules lists the CVMs that have a rule.
func (r *rig) rules(t *testing.T) []string {
	t.Helper()
	rules, err := register.Rules(r.settings.PolicyDir)
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, rule := range rules {
		ids = append(ids, rule.CVMID)
	}
	return ids
}

// bundles lists the CVMs that have a bundle under its final name, and whatever
// else lies in the output folder.
func (r *rig) bundles(t *testing.T) (ids, others []string) {
	t.Helper()
	list, err := os.ReadDir(r.settings.OutputDir)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range list {
		if id, ok := strings.CutSuffix(d.Name(), ".tgz"); ok && !strings.HasPrefix(id, ".") {
			ids = append(ids, id)
		} else {
			others = append(others, d.Name())
		}
	}
	return ids, others
}

func verify(t *testing.T, v VerifyParams) string {
	t.Helper()
	_, checks, err := Verify(t.Context(), v)
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	for _, c := range checks {
		if c.Err != nil {
			fmt.Fprintf(&out, "%s: %v\n", c.Subject, c.Err)
		}
	}
	return out.String()
}

func TestBuildAndVerify(t *testing.T) {
	r := newRig(t)
	res := r.build(t)
	if ids, others := r.bundles(t); !slices.Equal(ids, []string{res.Manifest.CVMID}) || len(others) > 0 {
		t.Errorf("output folder: %v and %v", ids, others)
	}
	if ids := r.rules(t); !slices.Equal(ids, []string{res.Manifest.CVMID}) {
		t.Errorf("rules: %v", ids)
	}
	if n := len(res.Manifest.LaunchDigests); n != 2 {
		t.Errorf("%d launch digests", n)
	}
	p := r.params(t)
	whole := VerifyParams{Bundle: res.Path, Config: p.Config, Settings: p.Settings}
	if out := verify(t, whole); out != "" {
		t.Errorf("a fresh bundle differs:\n%s", out)
	}
	if _, others := r.bundles(t); len(others) > 0 {
		t.Errorf("verify left %v", others)
	}

	dir, err := bundle.Unpack(t.Context(), res.Path, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	whole.Bundle = dir
	if out := verify(t, whole); out != "" {
		t.Errorf("a fresh bundle, unpacked, differs:\n%s", out)
	}
	t.Run("changed files", func(t *testing.T) {
		for name, c := range map[string]struct {
			off   int64
			words []string
		}{
			bundle.CryptRoot:  {70000, []string{"crypt_root.qcow2: SHA-256", "LUKS2 header: "}},
			bundle.Initrd:     {0, []string{"initrd.img: SHA-256"}},
			bundle.OVMF:       {0, []string{"OVMF.amdsev.fd: SHA-256"}},
			bundle.LaunchVM:   {20, []string{"launch_vm.sh: SHA-256"}},
			bundle.UserConfig: {70000, []string{"user_config.qcow2: SHA-256"}},
		} {
			flip(t, filepath.Join(dir, name), c.off)
			out := verify(t, VerifyParams{Bundle: dir})
			for _, w := range c.words {
				if !strings.Contains(out, w) {
					t.Errorf("%s changed: %q does not say %q", name, out, w)
				}
			}
			flip(t, filepath.Join(dir, name), c.off)
		}
	})
	t.Run("changed manifest", func(t *testing.T) {
		for words, change := range map[string]func(*bundle.Manifest){
			"launch digests: EPYC-v4, 1 vCPU": func(m *bundle.Manifest) { m.LaunchDigests[0].Digest = strings.Repeat("0", 96) },
			"guest config: disk":              func(m *bundle.Manifest) { m.Disk.Verity.RootHash = strings.Repeat("0", 64) },
			"guest config: cmdline":           func(m *bundle.Manifest) { m.Cmdline += " debug" },
			"guest config: network":           func(m *bundle.Manifest) { m.Network.AllowedPorts = nil },
			"vmlinuz: the manifest does not":  func(m *bundle.Manifest) { m.Files = m.Files[:8] },
		} {
			m, err := bundle.ReadManifest(dir)
			if err != nil {
				t.Fatal(err)
			}
			before, _ := m.Marshal()
			change(m)
			if err := bundle.WriteManifest(dir, m); err != nil {
				t.Fatal(err)
			}
			if out := verify(t, VerifyParams{Bundle: dir}); !strings.Contains(out, words) {
				t.Errorf("%q does not say %q", out, words)
			}
			os.WriteFile(filepath.Join(dir, bundle.ManifestName), before, 0o644)
		}
	})
	t.Run("other inputs", func(t *testing.T) {
		for words, change := range map[string]func() VerifyParams{
			"disk.verity.root_hash": func() VerifyParams {
				r.write(t, "image.tar.gz", image(t, "HELLO\n"))
				return whole
			},
			"files.user_config.qcow2.sha256": func() VerifyParams {
				r.write(t, "kit/startup/run.sh", []byte("#!/bin/bash\n"))
				return whole
			},
			"network.allowed_ports": func() VerifyParams {
				v := whole
				c := *v.Config
				c.Network.AllowedPorts = nil
				v.Config = &c
				return v
			},
			"files.initrd.img.sha256": func() VerifyParams {
				v := whole
				s := *v.Settings
				s.KBSGuestURL = "https://other.example:1"
				v.Settings = &s
				return v
			},
		} {
			if out := verify(t, change()); !strings.Contains(out, words) {
				t.Errorf("%q does not say %q", out, words)
			}
			r.write(t, "image.tar.gz", image(t, "hello\n"))
			r.write(t, "kit/startup/run.sh", []byte("#!/bin/sh\n"))
		}
	})
}

func flip(t *testing.T, name string, off int64) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, off); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
}

// child is a build in a process of its own.
type child struct {
	Settings *settings.Settings
	Config   string
	Seed     byte // 0: true randomness
}

const childEnv = "COFFER_TEST_BUILD"

func TestMain(m *testing.M) {
	if doc := os.Getenv(childEnv); doc != "" {
		if err := runChild(doc); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func runChild(doc string) error {
	var c child
	if err := json.Unmarshal([]byte(doc), &c); err != nil {
		return err
	}
	conf, err := config.Read(c.Config)
	if err != nil {
		return err
	}
	p := Params{Config: conf, Settings: c.Settings, TEE: "snp", Now: testTime}
	if c.Seed != 0 {
		p.rand = rand.NewChaCha8([32]byte{c.Seed})
	}
	res, err := Build(context.Background(), p)
	if err == nil {
		fmt.Print(res.Path)
	}
	return err
}

func (r *rig) child(t *testing.T, outputDir string, seed byte, wrap ...string) *exec.Cmd {
	t.Helper()
	s := *r.settings
	s.OutputDir = outputDir
	doc, err := json.Marshal(child{&s, r.config, seed})
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	args := append(wrap, self)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), childEnv+"="+string(doc))
	cmd.Stderr = os.Stderr
	return cmd
}

// The same inputs and the same randomness give the same bundle, byte for byte: as
// root, and as a user without capabilities who has no /dev but for null and random.
func TestSameBytesForEveryone(t *testing.T) {
	testenv.Root(t)
	r := newRig(t)
	umask := []string{"sh", "-c", "umask 077; exec \"$0\""}
	bare := []string{testenv.LookTool(t, "unshare"), "--mount", "--", "sh", "-c", `
		set -e
		mount -t tmpfs none /dev
		mknod -m 666 /dev/null c 1 3
		mknod -m 666 /dev/urandom c 1 9
		exec setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps=-all --bounding-set=-all --no-new-privs "$0"`}
	os.Chmod(filepath.Join(r.dir, "kbs"), 0o755)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for d := filepath.Dir(self); d != "/"; d = filepath.Dir(d) {
		if st, err := os.Stat(d); err == nil && st.Mode()&0o005 != 0o005 {
			os.Chmod(d, st.Mode()|0o055) // go test's own folder
		}
	}
	var first []byte
	for _, who := range []struct { // root can use the lock file that the other one makes
		name string
		wrap []string
	}{{"nobody", bare}, {"root", umask}} {
		name, wrap := who.name, who.wrap
		out := filepath.Join(r.dir, "out-"+name)
		if err := os.Mkdir(out, 0o777); err != nil {
			t.Fatal(err)
		}
		os.Chmod(out, 0o777)
		for _, private := range []string{"kbs/admin.key", "kbs/ca.pem", "kbs/policy"} { // root may in any case
			if err := exec.Command("chown", "-R", "65534:65534", filepath.Join(r.dir, private)).Run(); err != nil {
				t.Fatal(err)
			}
		}
		path, err := r.child(t, out, 7, wrap...).Output()
		if err != nil {
			t.Fatalf("build as %s: %v", name, err)
		}
		b, err := os.ReadFile(string(path))
		if err != nil {
			t.Fatal(err)
		}
		if first == nil {
			first = b
		} else if !bytes.Equal(first, b) {
			t.Errorf("%d and %d bytes, which differ", len(first), len(b))
		}
	}
}

// A build that is killed leaves nothing under a final name but whole bundles that
// have their rule; the next build works, and clears up.
func TestKilled(t *testing.T) {
	r := newRig(t)
	start := time.Now()
	r.build(t)
	whole := time.Since(start)
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 10 {
		cmd := r.child(t, r.settings.OutputDir, 0)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- cmd.Wait() }()
		select {
		case <-done:
		case <-time.After(time.Duration(rnd.Int64N(int64(whole)))):
			cmd.Process.Kill()
			<-done
		}
		ids, _ := r.bundles(t)
		rules := r.rules(t)
		for _, id := range ids {
			if !slices.Contains(rules, id) {
				t.Errorf("%s lies under its final name without a rule", id)
			}
		}
	}
	r.build(t)
	ids, others := r.bundles(t)
	if rules := r.rules(t); len(others) > 0 || !slices.Equal(slices.Sorted(slices.Values(rules)), ids) {
		t.Errorf("after the next build: bundles %v, rules %v, and %v", ids, rules, others)
	}
	for _, id := range ids {
		if out := verify(t, VerifyParams{Bundle: filepath.Join(r.settings.OutputDir, id+".tgz")}); out != "" {
			t.Errorf("%s: %s", id, out)
		}
	}
}

// Killed between the rule and the bundle's place: the rule is taken back. Killed
// right behind it: the bundle stands. A build that runs is left alone.
func TestClearUp(t *testing.T) {
	r := newRig(t)
	reg, err := register.Open(r.settings)
	if err != nil {
		t.Fatal(err)
	}
	stale := func(id string, placed bool) *work {
		t.Helper()
		w, err := newWork(t.Context(), r.settings.OutputDir, id, reg)
		if err != nil {
			t.Fatal(err)
		}
		rule, err := reg.RuleOf(&bundle.Manifest{CVMID: id, TEE: "snp", KBS: bundle.KBS{KeyPath: policy.KeyPath(id), CanaryPath: policy.CanaryPath(id)},
			LaunchDigests: []bundle.LaunchDigest{{Digest: strings.Repeat("ab", 48)}}})
		if err != nil {
			t.Fatal(err)
		}
		key, _ := newPassphrase(rand.NewChaCha8([32]byte{1}))
		if err := w.registering(); err != nil {
			t.Fatal(err)
		}
		if err := reg.AddCVM(t.Context(), rule, map[string][]byte{policy.KeyPath(id): key, policy.CanaryPath(id): []byte(id)}); err != nil {
			t.Fatal(err)
		}
		if !placed {
			if err := os.WriteFile(w.tgz(), []byte("bundle"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return w
	}
	running := stale("cvm_000000000001", false)
	defer running.close()
	stale("cvm_000000000002", false).lock.Close() // as the kernel does for the dead
	stale("cvm_000000000003", true).lock.Close()
	res := r.build(t)
	want := []string{"cvm_000000000001", "cvm_000000000003", res.Manifest.CVMID}
	rules := slices.Sorted(slices.Values(r.rules(t)))
	slices.Sort(want)
	if !slices.Equal(rules, want) {
		t.Errorf("rules %v, want %v", rules, want)
	}
	if _, others := r.bundles(t); !slices.Equal(others, []string{".cvm_000000000001.build"}) {
		t.Errorf("left: %v", others)
	}
}

// A KBS that does not answer ends a build before its work, and one that refuses
// the key leaves no bundle.
func TestNoKBS(t *testing.T) {
	r := newRig(t)
	p := r.params(t)
	s := *p.Settings
	s.KBSURL = "https://127.0.0.1:1"
	p.Settings = &s
	if _, err := Build(t.Context(), p); err == nil || !strings.Contains(err.Error(), "127.0.0.1:1") {
		t.Errorf("error %v", err)
	}
	if _, err := os.Stat(s.OutputDir); err == nil {
		t.Error("the output folder was made")
	}
}

// So does a policy folder whose rules cannot be read.
func TestDamagedPolicy(t *testing.T) {
	r := newRig(t)
	r.build(t)
	path := filepath.Join(r.settings.PolicyDir, "policy.rego")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, bytes.Replace(text, []byte(`"paths"`), []byte(`"path"`), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	p := r.params(t)
	p.Progress = func(stage string, _, _ int64) { t.Errorf("the work began: %s", stage) }
	if _, err := Build(t.Context(), p); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("error %v", err)
	}
}

// What a guest would refuse ends the build before its work, not after it.
func TestGuestWouldRefuse(t *testing.T) {
	for words, change := range map[string]func(p *Params){
		"kbs.url":            func(p *Params) { p.Settings.KBSGuestURL += "/path" },
		"api.kds":            func(p *Params) { p.Config.API.KDS = "kds.example" },
		"peers.measurements": func(p *Params) { p.Config.Peers.Measurements = []string{"abc"} },
	} {
		r := newRig(t)
		p := r.params(t)
		p.Progress = func(stage string, _, _ int64) { t.Errorf("%s: the work began: %s", words, stage) }
		change(&p)
		if _, err := Build(t.Context(), p); !errors.Is(err, guestconfig.ErrInvalid) || !strings.Contains(err.Error(), words) {
			t.Errorf("%s: %v", words, err)
		}
		if ids := r.rules(t); len(ids) > 0 {
			t.Errorf("%s: rules %v", words, ids)
		}
	}
}

func TestCheckKernel(t *testing.T) {
	for _, c := range []struct {
		version, compression string
		ok                   bool
	}{{"6.12.117+deb12-cloud-amd64", "zstd", true}, {"6.10.0", "zstd", true}, {"7.0.1", "zstd", true}, {"6.1.0-49-amd64", "zstd", false}, {"5.19", "zstd", false},
		{"", "zstd", false}, {"6.1.0-49-amd64", "lz4", true}, {"6.1.0-49-amd64", "", true}} {
		if err := checkKernel(c.version, c.compression); (err == nil) != c.ok {
			t.Errorf("%s on %s: %v", c.compression, c.version, err)
		}
	}
}
