// Package scenarios boots real bundles in QEMU on the simulated platform and
// attacks them as a hostile host would. Each attack must be refused for the
// reason named, not merely fail.
package scenarios

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"coffer/hostbuild/bundle"
	"coffer/hostbuild/disk"
	"coffer/internal/testenv"
	"coffer/test/dockersave"
	"coffer/test/harness"
)

// A boot takes about 10 s under TCG on two cores; a deadline is at least four
// times what was measured.
const (
	bootDeadline  = 4 * time.Minute
	buildDeadline = 3 * time.Minute
)

// line is a KBS and the bundles that the scenarios share. Bundles are made once
// and copied for each boot, because a guest writes to its drives.
type line struct {
	env      *harness.Env
	kbs      *harness.KBS
	settings string
	a, b     *harness.Bundle
}

func setup(t *testing.T) *line {
	t.Helper()
	l := setupKBS(t)
	ctx, cancel := context.WithTimeout(t.Context(), buildDeadline)
	defer cancel()
	l.a = l.build(t, ctx, "a")
	l.b = l.build(t, ctx, "b")
	return l
}

// setupKBS is a line without bundles.
func setupKBS(t *testing.T) *line {
	t.Helper()
	return startKBS(t, newEnv(t))
}

func newEnv(t *testing.T) *harness.Env {
	t.Helper()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	env := &harness.Env{Bin: filepath.Join(root, "bin"), Base: filepath.Join(root, "build/base/simulated"), Dir: t.TempDir(), Log: testWriter{t}}
	for _, p := range []string{env.Bin + "/hostbuild", env.Bin + "/simplatform", env.Base + "/base.json"} {
		_, err := os.Stat(p)
		testenv.Need(t, err == nil, "make bin base: "+p+" is missing")
	}
	testenv.LookTool(t, "qemu-system-x86_64")
	testenv.LookTool(t, "qemu-io")
	return env
}

func startKBS(t *testing.T, env *harness.Env) *line {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), buildDeadline)
	defer cancel()
	l := &line{env: env}
	var err error
	if l.kbs, err = env.StartKBS(ctx, "kbs"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.kbs.Stop() })
	if l.settings, err = l.kbs.Settings(); err != nil {
		t.Fatal(err)
	}
	return l
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	if testing.Verbose() {
		os.Stderr.Write(p)
	}
	return len(p), nil
}

func (l *line) build(t *testing.T, ctx context.Context, name string) *harness.Bundle {
	t.Helper()
	dir := filepath.Join(l.env.Dir, "in-"+name)
	if err := os.MkdirAll(filepath.Join(dir, "config"), 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "config/greeting.txt"), []byte("good morning "+name+"\n"))
	program, err := os.ReadFile(filepath.Join(l.env.Bin, "demo-workload"))
	if err != nil {
		t.Fatal(err)
	}
	lower, err := dockersave.Layer(dockersave.Entry{Name: "etc/"}, dockersave.Entry{Name: "etc/hidden", Body: []byte("of the lower layer")})
	if err != nil {
		t.Fatal(err)
	}
	upper, err := dockersave.Layer(dockersave.Entry{Name: "workload", Mode: 0o755, Body: program}, dockersave.Entry{Name: "etc/.wh.hidden", Body: []byte{}})
	if err != nil {
		t.Fatal(err)
	}
	image := dockersave.Image{Tag: "scenario:" + name, Entrypoint: []string{"/workload"}, Layers: [][]byte{lower, upper}}
	archive := filepath.Join(dir, "image.tar.gz")
	if err := image.SaveLegacy(archive); err != nil {
		t.Fatal(err)
	}
	yaml := filepath.Join(dir, "CONFIG.yaml")
	write(t, yaml, fmt.Appendf(nil, "root_drive_size: 1\ndocker_archive: %s\nuser_config:\n  demo: %s/config\nvcpus: [2, 1]\nmemory_mib: 1024\ncc_attestation:\n  check_frequency: 3\n  max_staleness: 60\n", archive, dir))
	b, err := l.env.Build(ctx, l.settings, yaml)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Unpack(ctx, filepath.Join(l.env.Dir, "site-"+name)); err != nil {
		t.Fatal(err)
	}
	return b
}

// copyOf gives a scenario its own copy of a bundle.
func (l *line) copyOf(t *testing.T, b *harness.Bundle) *harness.Bundle {
	t.Helper()
	c, err := b.Copy(t.Context(), filepath.Join(l.env.Dir, "site-"+strings.ReplaceAll(t.Name(), "/", "-")))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// guest is a booted bundle.
type guest struct {
	*harness.VM
	b   *harness.Bundle
	t   *testing.T
	ctx context.Context
}

func boot(t *testing.T, b *harness.Bundle, args ...string) *guest {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), bootDeadline)
	t.Cleanup(cancel)
	vm, err := b.Boot(args...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(vm.Kill)
	return &guest{vm, b, t, ctx}
}

func (g *guest) expect(re string) []string {
	g.t.Helper()
	m, err := g.Expect(g.ctx, re)
	if err != nil {
		g.t.Fatal(err)
	}
	return m
}

func (g *guest) off() {
	g.t.Helper()
	if err := g.Wait(g.ctx); err != nil {
		g.t.Fatal(err)
	}
}

// refused expects the boot to end in the FAILED line, as the guest's last, with
// this phase and code, and the machine to power off without a workload.
func (g *guest) refused(phase, code, detail string) {
	g.t.Helper()
	g.off()
	if strings.Contains(g.failed(phase, code, detail), "workload:") {
		g.t.Error("a workload ran")
	}
}

// failed expects the FAILED line as the last of a guest that is off, and returns
// the console.
func (g *guest) failed(phase, code, detail string) string {
	g.t.Helper()
	console, err := os.ReadFile(g.b.File("console.log"))
	if err != nil {
		g.t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(console)), "\n")
	last := lines[len(lines)-1]
	if !strings.Contains(last, fmt.Sprintf("coffer: FAILED phase=%s code=%s detail=", phase, code)) || !strings.Contains(last, detail) {
		g.t.Errorf("last line %q, want phase %s, code %s, detail with %q\n%s", last, phase, code, detail, g.Console.Text())
	}
	return string(console)
}

func TestScenarios(t *testing.T) {
	l := setup(t)
	for _, s := range []struct {
		name string
		run  func(*testing.T, *line)
	}{
		{"GoodBoot", goodBoot},
		{"InitrdByteChanged", initrdByteChanged},
		{"OtherCVMsKey", otherCVMsKey},
		{"HeaderNullCipher", func(t *testing.T, l *line) { headerRewritten(t, l, "cipher_null-ecb") }},
		{"HeaderKeyOfTheHost", func(t *testing.T, l *line) {
			headerRewritten(t, l, "aes-xts-plain64 "+strings.Repeat("41", 64)+" 0 /dev/vda 2048 1 sector_size:4096")
		}},
		{"RootSuperblockFlipped", func(t *testing.T, l *line) {
			// init reads this block before it lets the kernel panic, to name the fault.
			g := payloadByteFlipped(t, l, 1024)
			g.refused("verity", "E_VERITY", "does not match root hash")
		}},
		{"ProgramByteFlipped", func(t *testing.T, l *line) {
			g := payloadByteFlipped(t, l, 4096+64) // the first file: the programs, the agent among them
			g.off()
			if text := g.Console.Text(); !strings.Contains(text, "dm-verity device corrupted") || strings.Contains(text, "phase=system") {
				t.Errorf("verity did not stop the machine:\n%s", text)
			}
		}},
		{"UserConfigChanged", userConfigChanged},
		{"RuleRemovedWhileRunning", ruleRemoved},
		{"KBSUnreachable", kbsUnreachable},
		{"NoKeyAnywhere", noKeyAnywhere}, // last: it looks at what all the others left
	} {
		t.Run(s.name, func(t *testing.T) { s.run(t, l) })
	}
}

func goodBoot(t *testing.T, l *line) {
	b := l.copyOf(t, l.a)
	g := boot(t, b, "--stop-timeout", "120")
	digest := g.expect(`launch_digest=([0-9a-f]{96})`)[1]
	if want := manifest(t, b).LaunchDigests[0].Digest; digest != want {
		t.Errorf("the chip reports %s, the manifest predicts %s", digest, want)
	}
	g.expect(`phase=root status=ok`)
	g.expect(`workload: hello from the workload: good morning a`)
	g.expect(`attestation round=\d+ verdict=pass`)
	if _, _, err := l.kbs.Log.Expect(g.ctx, 0, `verdict=released.*`+"keys/root/"+l.a.ID+`.*`+digest); err != nil {
		t.Errorf("KBS: %v", err)
	}
	g.Stop() // as Ctrl-C does
	g.expect(`coffer: power off reason="power button"`)
	g.off()
}

func initrdByteChanged(t *testing.T, l *line) {
	b := l.copyOf(t, l.a)
	// One blank between two tokens of the guest config: the guest boots and reads
	// the same config, only the measurement tells.
	editInitrd(t, b, `"cvm_id": "`, `"cvm_id":`+"\t"+`"`)
	g := boot(t, b)
	g.refused("key", "E_KBS_DENIED", "policy")
}

func otherCVMsKey(t *testing.T, l *line) {
	b := l.copyOf(t, l.a)
	editInitrd(t, b, `"keys/root/`+l.a.ID+`"`, `"keys/root/`+l.b.ID+`"`)
	// Its new measurement is a legitimate one of A: the policy must tell A from B.
	m := manifest(t, b)
	for i, d := range m.LaunchDigests {
		out, err := l.env.Run(t.Context(), "hostbuild", "measure", "--json", "--ovmf", b.File("OVMF.amdsev.fd"), "--kernel", b.File("vmlinuz"),
			"--initrd", b.File("initrd.img"), "--append", m.Cmdline, "--vcpus", fmt.Sprint(d.VCPUs), "--cpu", d.CPU)
		if err != nil {
			t.Fatal(err)
		}
		var r struct {
			LaunchDigest string `json:"launch_digest"`
		}
		if err := json.Unmarshal([]byte(out), &r); err != nil {
			t.Fatal(err)
		}
		m.LaunchDigests[i].Digest = r.LaunchDigest
	}
	if err := bundle.WriteManifest(b.Dir, m); err != nil {
		t.Fatal(err)
	}
	l.policyAdd(t, b.Dir)
	defer l.policyAdd(t, l.a.Dir)
	g := boot(t, b)
	g.refused("key", "E_KBS_DENIED", "policy")
	if _, _, err := l.kbs.Log.Expect(g.ctx, 0, `verdict=denied.*`+"keys/root/"+l.b.ID+`.*`+m.LaunchDigests[0].Digest); err != nil {
		t.Errorf("KBS: %v", err)
	}
}

func (l *line) policyAdd(t *testing.T, dir string) {
	t.Helper()
	if _, err := l.env.Run(t.Context(), "hostbuild", "--settings", l.settings, "policy", "add", dir); err != nil {
		t.Fatal(err)
	}
}

func (l *line) policyRemove(t *testing.T, id string) {
	t.Helper()
	if _, err := l.env.Run(t.Context(), "hostbuild", "--settings", l.settings, "policy", "remove", id); err != nil {
		t.Fatal(err)
	}
}

// headerRewritten edits both LUKS2 headers as a host can: no key is involved in
// their checksum (facts: LUKS2 On-Disk Format Specification 1.0, section 2).
func headerRewritten(t *testing.T, l *line, encryption string) {
	b := l.copyOf(t, l.a)
	disk := b.File("crypt_root.qcow2")
	for _, offset := range []int64{0, 16384} {
		h := diskRead(t, disk, offset, 16384)
		area := h[4096:]
		doc := area[:bytes.IndexByte(area, 0)]
		var v map[string]any
		if err := json.Unmarshal(doc, &v); err != nil {
			t.Fatal(err)
		}
		v["segments"].(map[string]any)["0"].(map[string]any)["encryption"] = encryption
		doc, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		clear(area)
		copy(area, doc)
		clear(h[448:512])
		sum := sha256.Sum256(h)
		copy(h[448:], sum[:])
		diskWrite(t, disk, offset, h)
	}
	if tool := testenv.LookTool(t, "cryptsetup"); tool != "" {
		raw := filepath.Join(t.TempDir(), "header")
		write(t, raw, diskRead(t, disk, 0, 1<<20))
		if out, err := exec.Command(tool, "luksDump", raw).CombinedOutput(); err != nil {
			t.Fatalf("premise: cryptsetup finds nothing wrong with the edited header: %v\n%s", err, out)
		}
	}
	g := boot(t, b)
	g.refused("luks", "E_LUKS_HEADER", "")
}

// payloadByteFlipped boots with one bit of ciphertext changed, at this offset of
// the root.
func payloadByteFlipped(t *testing.T, l *line, at int64) *guest {
	b := l.copyOf(t, l.a)
	disk, offset := b.File("crypt_root.qcow2"), manifest(t, b).Disk.DataOffset+at
	block := diskRead(t, disk, offset&^511, 512)
	block[offset&511] ^= 1
	diskWrite(t, disk, offset&^511, block)
	return boot(t, b)
}

// userConfigChanged gives the guest another drive in place of the one that was
// built: that one is plain, and the host can write what it likes.
func userConfigChanged(t *testing.T, l *line) {
	b := l.copyOf(t, l.a)
	err := disk.BuildDrive(t.Context(), disk.DriveParams{
		Out: b.File("user_config.qcow2"), Size: 1 << 30, Label: "user_config", Time: time.Now(),
		Files: []disk.File{{Path: "/demo/greeting.txt", Mode: 0o100644, Data: []byte("good MORNING a\n")}},
	})
	if err != nil {
		t.Fatal(err)
	}
	g := boot(t, b)
	g.refused("user_config", "E_USER_CONFIG", `\"demo/greeting.txt\" was changed`)
}

func ruleRemoved(t *testing.T, l *line) {
	b := l.copyOf(t, l.b)
	g := boot(t, b)
	g.expect(`workload: work unit 1 done`)
	g.expect(`attestation round=\d+ verdict=pass`)
	l.policyRemove(t, l.b.ID)
	// A round that was under way may still pass; the next one must not.
	removed := len(g.Console.All())
	g.expect(`attestation round=\d+ verdict=negative.*code=E_KBS_DENIED`)
	passes := 0
	for _, line := range g.Console.All()[removed:] {
		if strings.Contains(line, "verdict=pass") {
			passes++
		}
	}
	if passes > 1 {
		t.Errorf("%d rounds passed after the rule was removed", passes)
	}
	g.expect(`workload exited code=137 signal=9`)
	g.off()

	rounds := l.rounds(t, b)
	if last := rounds[len(rounds)-1]; last != (round{"negative", "E_KBS_DENIED"}) {
		t.Errorf("last round in applog: %s", last)
	}

	again := boot(t, b)
	again.refused("key", "E_KBS_DENIED", "policy")
	l.policyAdd(t, b.Dir)
}

// round is a line of attestation.jsonl.
type round struct{ Verdict, Code string }

// rounds are those that a guest which is off has logged, one at least.
func (l *line) rounds(t *testing.T, b *harness.Bundle) []round {
	t.Helper()
	out, err := l.env.Run(t.Context(), "hostbuild", "drive", "cat", b.File("applog.qcow2"), "/attestation.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	var rounds []round
	for line := range strings.Lines(out) {
		var r round
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatalf("attestation.jsonl: %q: %v", line, err)
		}
		rounds = append(rounds, r)
	}
	if len(rounds) == 0 {
		t.Fatal("attestation.jsonl is empty")
	}
	return rounds
}

func kbsUnreachable(t *testing.T, l *line) {
	l.kbs.Stop()
	defer func() {
		if err := l.kbs.Start(t.Context()); err != nil {
			t.Error(err)
		}
	}()
	g := boot(t, l.copyOf(t, l.a))
	g.refused("key", "E_KBS_UNREACHABLE", "10.0.2.2:")
}

// noKeyAnywhere scans all that the scenarios printed and left for A's and B's
// keys. The KBS's own store is where they were read from.
func noKeyAnywhere(t *testing.T, l *line) {
	var needles []string
	for _, b := range []*harness.Bundle{l.a, l.b} {
		key := findKey(t, l.kbs.Dir, b.ID)
		raw, err := hex.DecodeString(string(key))
		if err != nil || len(raw) != 64 {
			t.Fatalf("the key of %s is not 128 hex characters", b.ID)
		}
		for _, form := range [][]byte{key, bytes.ToUpper(key), raw} {
			needles = append(needles, string(form))
			for shift := range 3 { // base64 of the key at any alignment
				e := base64.StdEncoding.EncodeToString(append(make([]byte, shift), form...))
				needles = append(needles, e[4:len(e)-4])
			}
		}
	}
	files := 0
	err := filepath.WalkDir(l.env.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || strings.HasPrefix(path, filepath.Join(l.kbs.Dir, "repository")) {
			return err
		}
		body, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		files++
		for _, n := range needles {
			if bytes.Contains(body, []byte(n)) {
				t.Errorf("a key stands in %s", path)
				break
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range needles {
		if strings.Contains(l.kbs.Log.Text(), n) {
			t.Error("a key stands in the KBS's log")
		}
	}
	if files < 20 {
		t.Errorf("only %d files were looked at", files)
	}
}

// findKey finds the stored key of a CVM below the KBS's folder.
func findKey(t *testing.T, dir, id string) []byte {
	t.Helper()
	var key []byte
	filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && strings.HasSuffix(path, "keys/root/"+id) {
			key, _ = os.ReadFile(path)
		}
		return nil
	})
	if key == nil {
		t.Fatalf("no stored key of %s below %s", id, dir)
	}
	return key
}

func manifest(t *testing.T, b *harness.Bundle) *bundle.Manifest {
	t.Helper()
	m, err := bundle.ReadManifest(b.Dir)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func editInitrd(t *testing.T, b *harness.Bundle, old, repl string) {
	t.Helper()
	if len(old) != len(repl) {
		t.Fatal("the initrd's length must not change")
	}
	path := b.File("initrd.img")
	body, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Count(body, []byte(old)) != 1 {
		t.Fatalf("%q stands %d times in the initrd", old, bytes.Count(body, []byte(old)))
	}
	write(t, path, bytes.Replace(body, []byte(old), []byte(repl), 1))
}

func write(t *testing.T, path string, body []byte) {
	t.Helper()
	if err := os.WriteFile(path, body, 0o644); err != nil {
		t.Fatal(err)
	}
}

// diskRead reads from the guest's view of a qcow2. qemu-io prints hex, 16 bytes a line.
func diskRead(t *testing.T, disk string, offset int64, n int) []byte {
	t.Helper()
	out, err := exec.Command("qemu-io", "-r", "-f", "qcow2", "-c", fmt.Sprintf("read -v %d %d", offset, n), disk).Output()
	if err != nil {
		t.Fatalf("qemu-io: %v", err)
	}
	var body []byte
	for _, line := range strings.Split(string(out), "\n") {
		_, rest, ok := strings.Cut(line, ":  ")
		if !ok || len(body) >= n {
			continue
		}
		hexPart, _, _ := strings.Cut(rest, "  ")
		chunk, err := hex.DecodeString(strings.ReplaceAll(hexPart, " ", ""))
		if err != nil {
			continue
		}
		body = append(body, chunk...)
	}
	if len(body) != n {
		t.Fatalf("qemu-io gave %d bytes of %d", len(body), n)
	}
	return body
}

func diskWrite(t *testing.T, disk string, offset int64, body []byte) {
	t.Helper()
	src := filepath.Join(t.TempDir(), "pattern")
	write(t, src, body)
	if out, err := exec.Command("qemu-io", "-f", "qcow2", "-c", fmt.Sprintf("write -s %s %d %d", src, offset, len(body)), disk).CombinedOutput(); err != nil || bytes.Contains(out, []byte("failed")) {
		t.Fatalf("qemu-io: %v\n%s", err, out)
	}
	if got := diskRead(t, disk, offset, len(body)); !bytes.Equal(got, body) {
		t.Fatal("qemu-io did not write")
	}
}
