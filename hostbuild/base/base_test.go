package base

import (
	"archive/tar"
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"coffer/images"
	"coffer/initramfs"
	"coffer/initramfs/modules"
	"coffer/internal/measure"
	"coffer/internal/strict"
	"coffer/internal/testenv"
	"coffer/test/fakebase"

	"github.com/klauspost/compress/zstd"
	"github.com/u-root/mkuimage/cpio"
)

const testKernel = "6.12.1-cloud-amd64"

// deb makes a package of these files in the cache and returns its lock entry.
func deb(t *testing.T, cache, role, name string, files map[string]string) Package {
	t.Helper()
	dir := t.TempDir()
	files["DEBIAN/control"] = fmt.Sprintf("Package: %s\nVersion: 1.0-1\nArchitecture: amd64\nMaintainer: Test <test@example.org>\nDescription: test\n", name)
	for path, data := range files {
		mode := os.FileMode(0o644)
		if strings.Contains(path, "bin/") {
			mode = 0o755
		}
		path = filepath.Join(dir, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(data), mode)); err != nil {
			t.Fatal(err)
		}
	}
	out := filepath.Join(t.TempDir(), "x.deb")
	if text, err := exec.Command(testenv.LookTool(t, "dpkg-deb"), "-Zgzip", "--root-owner-group", "-b", dir, out).CombinedOutput(); err != nil {
		t.Fatalf("dpkg-deb: %v: %s", err, text)
	}
	sum, _, err := digestFile(out)
	if err != nil {
		t.Fatal(err)
	}
	store := filepath.Join(cache, "packages")
	if err := errors.Join(os.MkdirAll(store, 0o755), os.Rename(out, filepath.Join(store, sum+".deb"))); err != nil {
		t.Fatal(err)
	}
	return Package{Role: role, Name: name, Version: "1.0-1", SHA256: sum, Suite: "sid"}
}

// ko is an ELF file with a .modinfo section.
func ko(modinfo string) string {
	const names = "\x00.modinfo\x00.shstrtab\x00"
	var b bytes.Buffer
	h := elf.Header64{Type: uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: 1, Ehsize: 64, Shentsize: 64, Shnum: 3, Shstrndx: 2}
	copy(h.Ident[:], "\x7fELF\x02\x01\x01")
	h.Shoff = 64 + uint64(len(modinfo)+len(names))
	for _, v := range []any{h, []byte(modinfo), []byte(names), elf.Section64{},
		elf.Section64{Name: 1, Type: 1, Off: 64, Size: uint64(len(modinfo))},
		elf.Section64{Name: 10, Type: 3, Off: 64 + uint64(len(modinfo)), Size: uint64(len(names))}} {
		if err := binary.Write(&b, binary.LittleEndian, v); err != nil {
			panic(err)
		}
	}
	return b.String()
}

// goProgram builds a program that does nothing, as the Makefile builds them.
func goProgram(t *testing.T, tags string) string {
	t.Helper()
	dir := t.TempDir()
	source, program := filepath.Join(dir, "main.go"), filepath.Join(dir, "program")
	if err := os.WriteFile(source, []byte("package main\n\nfunc main() {}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(testenv.LookTool(t, "go"), "build", "-tags", tags, "-trimpath", "-ldflags", "-s -w -buildid=", "-o", program, source).CombinedOutput(); err != nil {
		t.Fatalf("go build: %v: %s", err, out)
	}
	return program
}

// params is a base of made-up packages that lie in the cache, so that no
// network is needed.
func params(t *testing.T) Params {
	t.Helper()
	cache := t.TempDir()
	image, err := images.Load("cpu")
	if err != nil {
		t.Fatal(err)
	}
	kernel := map[string]string{
		"boot/vmlinuz-" + testKernel:                             "the kernel",
		"usr/lib/modules/" + testKernel + "/modules.builtin":     "kernel/fs/ext4/ext4.ko\n",
		"usr/lib/modules/" + testKernel + "/kernel/fs/unused.ko": ko("depends=\x00"),
	}
	// What either platform wants; the kernel may have more.
	names := slices.Concat(image.ModuleNames(PlatformSNP, ""), image.ModuleNames(PlatformSimulated, ""), image.ModuleNames(PlatformSNP, "nfs"))
	if image, err = images.Load("nvidia"); err != nil {
		t.Fatal(err)
	}
	for _, name := range append(names, image.ModuleNames(PlatformSNP, "gpu")...) {
		name = strings.TrimPrefix(name, modules.OptionalMark)
		kernel["usr/lib/modules/"+testKernel+"/kernel/"+name+".ko"] = ko("name=" + name + "\x00depends=\x00")
	}
	l := lock{Version: manifestVersion, Packages: []Package{
		deb(t, cache, roleKernel, "linux-image-"+testKernel, kernel),
		deb(t, cache, roleFirmware, "ovmf-amdsev", map[string]string{image.Firmware.File: string(fakebase.OVMF(t)), "usr/share/ovmf/other.fd": "x"}),
		deb(t, cache, roleCA, "ca-certificates", map[string]string{
			image.CA.File + "/B.crt": "cert B\n", image.CA.File + "/A.crt": "cert A", image.CA.File + "/README": "no"}),
	}}
	data, err := encode(l)
	if err != nil {
		t.Fatal(err)
	}
	locked := filepath.Join(t.TempDir(), "base.lock")
	if err := os.WriteFile(locked, data, 0o644); err != nil {
		t.Fatal(err)
	}
	self := goProgram(t, "netgo")
	p := Params{
		Out: filepath.Join(t.TempDir(), "base"), Platform: PlatformSNP, Init: self, Programs: map[string]string{},
		Cache: cache, Locked: locked,
		Mirror: Mirror{Main: "file:" + t.TempDir(), Keyring: os.DevNull},
	}
	for _, name := range guestPrograms {
		p.Programs[name] = self
	}
	return p
}

func build1(t *testing.T, p Params) *Base {
	t.Helper()
	b, err := Build(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestBuild(t *testing.T) {
	p := params(t)
	b := build1(t, p)
	if b.Platform != PlatformSNP || b.KernelVersion != testKernel || b.Image != "cpu" {
		t.Errorf("platform %q, kernel %q, image %q", b.Platform, b.KernelVersion, b.Image)
	}
	for path, want := range map[string]string{b.Kernel: "the kernel", b.OVMF: string(fakebase.OVMF(t)), b.CACerts: "cert A\ncert B\n"} {
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v; want %q", path, got, err, want)
		}
	}
	var guest []string
	for path := range b.Programs {
		guest = append(guest, path)
	}
	slices.Sort(guest)
	if got := strings.Join(guest, " "); got != "/bin/agent /bin/containerd /bin/containerd-shim-runc-v2 /bin/runc /bin/snpguest" {
		t.Errorf("programs %s", got)
	}
	if info, err := os.Stat(b.Programs["/bin/agent"]); err != nil || info.Mode() != 0o755 {
		t.Errorf("agent: %v, %v", info, err)
	}
	unpacked := filepath.Join(t.TempDir(), "bin")
	if text, err := exec.Command(testenv.LookTool(t, "fsck.erofs"), "--extract="+unpacked, b.Packed).CombinedOutput(); err != nil {
		t.Fatalf("fsck.erofs: %v: %s", err, text)
	}
	for path, source := range b.Programs {
		want, _, _ := digestFile(source)
		if got, _, err := digestFile(filepath.Join(unpacked, filepath.Base(path))); err != nil || got != want {
			t.Errorf("%s in %s has digest %s, want %s: %v", path, b.Packed, got, want, err)
		}
	}
	packed, err1 := os.Stat(b.Packed)
	self, err2 := os.Stat(b.Programs["/bin/agent"])
	if err1 != nil || err2 != nil || packed.Size() >= self.Size() {
		t.Errorf("five times the same program: packed %v, one %v; want one copy, compressed", packed, self)
	}
	image, _ := images.Load("cpu")
	if got, want := len(b.Modules), len(slices.Concat(image.ModuleNames(PlatformSNP, ""), image.ModuleNames(PlatformSNP, "nfs"))); got != want {
		t.Errorf("%d modules, want %d", got, want)
	}
	if data, err := os.ReadFile(filepath.Join(b.Dir, manifestFile)); err != nil || digest(data) != b.ID {
		t.Errorf("the ID is not the digest of %s", manifestFile)
	}
	var l lock
	if data, err := os.ReadFile(filepath.Join(b.Dir, lockFile)); err != nil || strict.JSON(data, &l) != nil || len(l.Packages) != 3 || l.Packages[0].Suite != "sid" {
		t.Errorf("lock %+v, %v", l, err)
	}
	if left, _ := os.ReadDir(filepath.Dir(b.Dir)); len(left) != 1 {
		t.Errorf("beside the base there is more: %v", left)
	}
}

// The firmware may be a file. It must check kernel, initrd and command line,
// wherever it comes from.
func TestFirmware(t *testing.T) {
	p := params(t)
	fit := filepath.Join(t.TempDir(), "fit.fd")
	other := fakebase.OVMF(t)
	other[0] ^= 1
	plain := bytes.Replace(other, []byte{0x1f, 0x37, 0x55, 0x72}, make([]byte, 4), 1) // the start of the hash table's GUID
	unfit := filepath.Join(t.TempDir(), "OVMF.fd")
	if err := errors.Join(os.WriteFile(fit, other, 0o644), os.WriteFile(unfit, plain, 0o644)); err != nil {
		t.Fatal(err)
	}
	p.OVMF = fit
	b := build1(t, p)
	if got, err := os.ReadFile(b.OVMF); err != nil || !bytes.Equal(got, other) || len(b.Packages) != 2 {
		t.Errorf("%d bytes, %v, packages %v", len(got), err, b.Packages)
	}
	p.OVMF, p.Out = unfit, filepath.Join(t.TempDir(), "x")
	if _, err := Build(t.Context(), p); !errors.Is(err, measure.ErrNoKernelHashes) || !strings.Contains(err.Error(), unfit) {
		t.Errorf("unfit file: %v", err)
	}
	p.OVMF = ""
	pkg := deb(t, p.Cache, roleFirmware, "ovmf-amdsev", map[string]string{"usr/share/ovmf/OVMF.amdsev.fd": string(plain)})
	l, err := readLock(p.Locked)
	if err != nil {
		t.Fatal(err)
	}
	l[roleFirmware] = pkg
	data, err := encode(lock{Version: manifestVersion, Packages: slices.Collect(maps.Values(l))})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p.Locked, data, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Build(t.Context(), p); !errors.Is(err, measure.ErrNoKernelHashes) || !strings.Contains(err.Error(), "usr/share/ovmf/OVMF.amdsev.fd of ") {
		t.Errorf("unfit package: %v", err)
	}
}

// Where the firmware's package cannot be had, the installed one is taken, unless a
// lock asks for exactly that package. What else cannot be had ends the build.
func TestInstalledFirmware(t *testing.T) {
	image, err := images.Load("cpu")
	if err != nil {
		t.Fatal(err)
	}
	installed := filepath.Join(t.TempDir(), "OVMF.amdsev.fd")
	if err := os.WriteFile(installed, fakebase.OVMF(t), 0o644); err != nil {
		t.Fatal(err)
	}
	gone := errors.New("no archive has it")
	for _, c := range []struct {
		name, missing, installed, locked string
		ok                               bool
	}{
		{"fallback", roleFirmware, installed, "", true},
		{"none installed", roleFirmware, installed + "x", "", false},
		{"locked", roleFirmware, installed, "base.lock", false},
		{"kernel", roleKernel, installed, "", false},
	} {
		p := Params{Locked: c.locked, Log: t.Logf}
		packages, _, err := fetchAll(t.Context(), &p, image, func(_ context.Context, role string, _ images.Package) (Package, string, error) {
			if role == c.missing {
				return Package{}, "", gone
			}
			return Package{Role: role}, role + ".deb", nil
		}, c.installed)
		if c.ok && (err != nil || p.OVMF != installed || len(packages) != 2) || !c.ok && (!errors.Is(err, gone) || p.OVMF != "") {
			t.Errorf("%s: firmware %q, packages %v, %v", c.name, p.OVMF, packages, err)
		}
	}
}

// The same inputs give the same base, whatever the machine does.
func TestBuildIsReproducible(t *testing.T) {
	p := params(t)
	one := build1(t, p)
	copied := filepath.Join(t.TempDir(), "init") // other path, time and mode
	data, err := os.ReadFile(p.Init)
	if err == nil {
		err = os.WriteFile(copied, data, 0o700)
	}
	if err != nil {
		t.Fatal(err)
	}
	p.Init, p.Out = copied, filepath.Join(t.TempDir(), "other")
	two := build1(t, p) // with the module infos of the first build
	if one.ID != two.ID {
		t.Errorf("ID %s, then %s", one.ID, two.ID)
	}
	p.Platform, p.Out = PlatformSimulated, filepath.Join(t.TempDir(), "simulated")
	three := build1(t, p)
	for name, sum := range three.SHA256 {
		if (sum == one.SHA256[name]) != (name != initrdFile) {
			t.Errorf("%s: the platform must change the initrd's modules and no other file", name)
		}
	}
}

func TestBuildReplacesABaseAndNothingElse(t *testing.T) {
	p := params(t)
	build1(t, p)
	build1(t, p)
	if err := os.Remove(filepath.Join(p.Out, manifestFile)); err != nil {
		t.Fatal(err)
	}
	if _, err := Build(t.Context(), p); err == nil || !strings.Contains(err.Error(), "is not a base") {
		t.Errorf("a folder that is no base: %v", err)
	}
	if _, err := os.Stat(filepath.Join(p.Out, kernelFile)); err != nil {
		t.Errorf("it was touched: %v", err)
	}
}

func TestBuildRefuses(t *testing.T) {
	good := params(t)
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name   string
		change func(*Params)
		want   string
	}{
		{"platform", func(p *Params) { p.Platform = "tdx" }, `platform "tdx"`},
		{"image", func(p *Params) { p.Image = "../cpu" }, "no image"},
		{"no output", func(p *Params) { p.Out = "" }, "not given"},
		{"no agent", func(p *Params) { delete(p.Programs, "agent") }, "agent is not given"},
		{"program name", func(p *Params) { p.Programs["../agent"] = p.Init }, "plain file name"},
		{"init that is no program", func(p *Params) { p.Init = script }, "not a Go program"},
		{"init that is not there", func(p *Params) { p.Init = script + "x" }, "no such file"},
		{"lock that is not there", func(p *Params) { p.Locked = script + "x" }, "no such file"},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := good
			p.Programs = map[string]string{}
			for k, v := range good.Programs {
				p.Programs[k] = v
			}
			test.change(&p)
			if _, err := Build(t.Context(), p); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %q", err, test.want)
			}
			if _, err := os.Stat(good.Out); err == nil {
				t.Error("something was left at Out")
			}
		})
	}
}

// Rule: simulation code is never in a production base.
func TestSimulatedProgramsStayOutOfProduction(t *testing.T) {
	program := goProgram(t, "netgo,simulated")
	p := params(t)
	for _, change := range []func(*Params){
		func(p *Params) { p.Init = program },
		func(p *Params) { p.Programs["agent"] = program },
	} {
		p := p
		p.Programs = map[string]string{"agent": p.Init, "snpguest": p.Init, "containerd": p.Init, "containerd-shim-runc-v2": p.Init, "runc": p.Init}
		change(&p)
		if _, err := Build(t.Context(), p); err == nil || !strings.Contains(err.Error(), "must not get into a base for platform snp") {
			t.Errorf("got %v", err)
		}
		p.Platform = PlatformSimulated
		build1(t, p)
		if err := os.RemoveAll(p.Out); err != nil {
			t.Fatal(err)
		}
	}
}

// Made-up GPUs, their library and their roots are for simulated bases alone.
func TestSimulatedGPUs(t *testing.T) {
	from := t.TempDir()
	library := filepath.Join(from, "root/usr/lib/libnvidia-ml.so.1")
	if err := os.MkdirAll(filepath.Dir(library), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{library: "a library", from + "/device-root.pem": "devices", from + "/rim-root.pem": "RIMs"} {
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	p := params(t)
	p.SimulatedGPU = from
	if _, err := Build(t.Context(), p); err == nil || !strings.Contains(err.Error(), "made-up GPUs are for platform simulated alone") {
		t.Errorf("for snp: %v", err)
	}
	p.Platform = PlatformSimulated
	b := build1(t, p)
	if b.GPU == nil || b.GPU.DeviceRoot != "devices" || b.GPU.RIMRoot != "RIMs" || b.Root["/usr/lib/libnvidia-ml.so.1"] != filepath.Join(p.Out, "root/usr/lib/libnvidia-ml.so.1") {
		t.Errorf("GPUs %+v, files %v", b.GPU, b.Root)
	}
	// A manifest that says so for hardware is no base.
	file := filepath.Join(p.Out, manifestFile)
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	data = []byte(strings.Replace(string(data), `"platform": "simulated"`, `"platform": "snp"`, 1))
	if err := os.WriteFile(file, data, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(p.Out); !errors.Is(err, ErrNotBase) || !strings.Contains(err.Error(), "trusts simulated GPUs") {
		t.Errorf("for snp, by hand: %v", err)
	}
	p.SimulatedGPU = t.TempDir()
	if _, err := Build(t.Context(), p); err == nil {
		t.Error("a folder without roots was taken")
	}
}

func TestOpenFindsEveryChange(t *testing.T) {
	p := params(t)
	b := build1(t, p)
	for name := range b.SHA256 {
		path := filepath.Join(p.Out, name)
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		flipped := slices.Clone(data)
		flipped[len(flipped)/2] ^= 1
		for what, change := range map[string]func() error{
			"one bit": func() error { return os.WriteFile(path, flipped, 0o644) },
			"longer":  func() error { return os.WriteFile(path, append(slices.Clone(data), 0), 0o644) },
			"gone":    func() error { return os.Remove(path) },
		} {
			if err := change(); err != nil {
				t.Fatal(err)
			}
			if _, err := Open(p.Out); !errors.Is(err, ErrNotBase) || !strings.Contains(err.Error(), name) {
				t.Errorf("%s, %s: %v", name, what, err)
			}
			if err := os.WriteFile(path, data, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := Open(p.Out); err != nil {
		t.Errorf("restored: %v", err)
	}
}

func TestOpenRefusesManifests(t *testing.T) {
	p := params(t)
	build1(t, p)
	path := filepath.Join(p.Out, manifestFile)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ name, old, new string }{
		{"version", `"version": 1,`, `"version": 2,`},
		{"platform", `"platform": "snp"`, `"platform": "tdx"`},
		{"unknown field", `"platform"`, `"plattform": "", "platform"`},
		{"path outside", `"path": "vmlinuz"`, `"path": "../vmlinuz"`},
		{"file not named", `"path": "bin/runc"`, `"path": "bin/agent"`},
		{"not JSON", "{", "["},
	} {
		bad := strings.Replace(string(good), test.old, test.new, 1)
		if bad == string(good) {
			t.Fatalf("%s: nothing to replace", test.name)
		}
		if err := os.WriteFile(path, []byte(bad), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(p.Out); !errors.Is(err, ErrNotBase) {
			t.Errorf("%s: %v", test.name, err)
		}
	}
	if _, err := Open(t.TempDir()); !errors.Is(err, ErrNotBase) || !strings.Contains(err.Error(), "hostbuild base build") {
		t.Errorf("empty folder: %v", err)
	}
}

func TestLocked(t *testing.T) {
	p := params(t)
	good, err := os.ReadFile(p.Locked)
	if err != nil {
		t.Fatal(err)
	}
	var l lock
	if err := json.Unmarshal(good, &l); err != nil {
		t.Fatal(err)
	}
	sum := l.Packages[1].SHA256
	for _, test := range []struct{ name, old, new, want string }{
		{"version", `"version": 1,`, `"version": 9,`, "version 9"},
		{"role missing", `"role": "ca"`, `"role": "other"`, "no package for ca"},
		{"role twice", `"role": "ca"`, `"role": "kernel"`, "two packages for kernel"},
		{"digest", sum, sum[:10], "malformed"},
		{"digest as path", sum, "../" + sum[3:], "malformed"},
		{"option as name", `"ovmf-amdsev"`, `"-oDir=x"`, "malformed"},
		{"suite", `"suite": "sid"`, `"suite": "sid main\ndeb x"`, "malformed"},
		{"unknown field", `"role"`, `"rolle": "", "role"`, "rolle"},
	} {
		bad := strings.Replace(string(good), test.old, test.new, 1)
		if bad == string(good) {
			t.Fatalf("%s: nothing to replace", test.name)
		}
		p := p
		p.Locked = filepath.Join(t.TempDir(), "lock")
		if err := os.WriteFile(p.Locked, []byte(bad), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := Build(t.Context(), p); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v, want %q", test.name, err, test.want)
		}
	}
}

// A package in the cache that is not what the lock says is fetched again, and
// here it cannot be.
func TestLockedPackageIsCheckedAndCannotBeHad(t *testing.T) {
	testenv.LookTool(t, "apt-get")
	p := params(t)
	debs, err := filepath.Glob(filepath.Join(p.Cache, "packages", "*.deb"))
	if err != nil || len(debs) != 3 {
		t.Fatal(debs, err)
	}
	for _, d := range debs {
		if err := os.WriteFile(d, []byte("something else"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Build(t.Context(), p); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), p.Locked) {
		t.Errorf("got %v, want ErrLocked", err)
	}
}

// An archive that nobody signed is refused, even where the machine's own apt
// would be content with it.
func TestUnsignedArchiveIsRefused(t *testing.T) {
	testenv.LookTool(t, "apt-get")
	p := params(t)
	p.Locked = ""
	repo := strings.TrimPrefix(p.Mirror.Main, "file:")
	packages := "Package: linux-image-6.12-cloud-amd64\nVersion: 1\nArchitecture: amd64\nDepends: linux-image-x\n\n"
	for path, text := range map[string]string{
		"dists/trixie/Release": fmt.Sprintf("Origin: Debian\nLabel: Debian\nSuite: stable\nCodename: trixie\nDate: Sat, 01 Nov 2025 00:00:00 UTC\nComponents: main\nArchitectures: amd64\nSHA256:\n %s %d main/binary-amd64/Packages\n",
			digest([]byte(packages)), len(packages)),
		"dists/trixie/main/binary-amd64/Packages": packages,
	} {
		path = filepath.Join(repo, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("APT_CONFIG", filepath.Join(repo, "apt.conf"))
	lax := "Acquire::AllowInsecureRepositories \"true\";\nAPT::Get::AllowUnauthenticated \"true\";\n"
	if err := os.WriteFile(os.Getenv("APT_CONFIG"), []byte(lax), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Build(t.Context(), p); err == nil || !strings.Contains(err.Error(), "not signed") {
		t.Errorf("got %v, want an error that it is not signed", err)
	}
}

func TestParseTargets(t *testing.T) {
	for _, test := range []struct{ name, lines, main, security string }{
		{"Debian", "Debian|http://a/debian/\nDebian|http://a/debian/\nDebian-Security|http://s/\nDebian Backports|http://b/\nNode|http://n/\n", "http://a/debian/", "http://s/"},
		{"Ubuntu", "Ubuntu|http://u/\n", "", ""},
		{"no release info", "$(LABEL)|http://u/\n", "", ""},
		{"empty", "", "", ""},
	} {
		if main, security := parseTargets([]byte(test.lines)); main != test.main || security != test.security {
			t.Errorf("%s: %q, %q", test.name, main, security)
		}
	}
}

func TestMirrorCannotInjectSources(t *testing.T) {
	for _, bad := range []string{"http://a/ sid main\ndeb [trusted=yes] http://b/", "http://a/ x", "[trusted=yes]"} {
		if _, err := findMirror(t.Context(), Mirror{Main: bad, Keyring: os.DevNull}); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func TestParseRecord(t *testing.T) {
	const index = `Package: linux-image-6.12-cloud-amd64
Source: linux-signed-amd64
Version: 6.12.117-1~deb12u1
Depends: linux-base (>= 4), linux-image-6.12.117+deb12-cloud-amd64 (= 6.12.117-1~deb12u1)
Description: Linux
 Version: not this
SHA256: abc

Package: another
Version: 2
`
	r := parseRecord([]byte(index))
	want := record{"linux-image-6.12-cloud-amd64", "6.12.117-1~deb12u1", "abc", "linux-base (>= 4), linux-image-6.12.117+deb12-cloud-amd64 (= 6.12.117-1~deb12u1)"}
	if r != want {
		t.Errorf("got %+v", r)
	}
	if got := kernelImage(r.depends); got != "linux-image-6.12.117+deb12-cloud-amd64" {
		t.Errorf("kernel image %q", got)
	}
	if got := kernelImage("libc6 (>= 2), foo"); got != "" {
		t.Errorf("kernel image %q of no kernel", got)
	}
}

func TestPick(t *testing.T) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []*tar.Header{
		{Name: "./usr/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "./usr/a", Typeflag: tar.TypeReg, Size: 1},
		{Name: "../../usr/b", Typeflag: tar.TypeReg, Size: 1},
		{Name: "./usr/link", Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd"},
		{Name: "./other", Typeflag: tar.TypeReg, Size: 1},
	} {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			w.Write([]byte("x"))
		}
	}
	w.Close()
	archive := b.Bytes()
	want := func(name string) bool { return strings.HasPrefix(name, "usr/") }
	files, err := pick(bytes.NewReader(archive), want)
	if err != nil || len(files) != 2 || files["usr/a"] == nil || files["usr/b"] == nil {
		t.Errorf("got %v, %v", files, err)
	}
	if _, err := pick(bytes.NewReader(archive[:600]), want); err == nil {
		t.Error("a truncated archive was taken")
	}
	b.Reset()
	w = tar.NewWriter(&b)
	w.WriteHeader(&tar.Header{Name: "usr/huge", Typeflag: tar.TypeReg, Size: maxMember + 1})
	if _, err := pick(&b, want); err == nil || !strings.Contains(err.Error(), "too large") {
		t.Errorf("huge file: %v", err)
	}
}

// The real thing: Debian's packages, and that no module of the initrd comes
// before one it needs.
func TestBuildFromDebian(t *testing.T) {
	testenv.Need(t, os.Getenv("COFFER_TEST_APT") == "1" || os.Getenv("CI") != "", "downloads 35 MB of packages: set COFFER_TEST_APT=1")
	testenv.LookTool(t, "apt-get")
	p := params(t)
	p.Locked, p.Mirror, p.Log = "", Mirror{}, t.Logf
	b := build1(t, p)
	if !strings.Contains(b.KernelVersion, "-cloud-amd64") {
		t.Errorf("kernel %s", b.KernelVersion)
	}
	t.Logf("kernel %s, %d modules, initrd %d bytes", b.KernelVersion, len(b.Modules), size(t, b.Initrd))

	f, err := os.Open(b.Initrd)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := zstd.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	archive, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	records, err := cpio.ReadAllRecords(cpio.EOFReader{RecordReader: cpio.Newc.Reader(bytes.NewReader(archive))})
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	for _, r := range records {
		if r.Mode&cpio.S_IFMT == cpio.S_IFREG {
			if files[r.Name], err = io.ReadAll(io.NewSectionReader(r, 0, int64(r.FileSize))); err != nil {
				t.Fatal(err)
			}
		}
	}
	here := map[string]bool{} // in the initrd
	for _, m := range b.Modules {
		here[m.Name] = true
	}
	image, _ := images.Load("cpu")
	// What either platform wants; the kernel may have more.
	for _, name := range slices.Concat(image.ModuleNames(PlatformSNP, ""), image.ModuleNames(PlatformSNP, "nfs")) {
		if name = strings.TrimPrefix(name, modules.OptionalMark); !here[name] {
			t.Errorf("%s is not in the initrd", name)
		}
	}
	loaded := map[string]bool{}
	lines := strings.Fields(string(files[initramfs.LoadList]))
	if len(lines) != len(b.Modules) {
		t.Fatalf("%d lines, %d modules", len(lines), len(b.Modules))
	}
	for i, line := range lines {
		m := b.Modules[i]
		path := "/" + initramfs.ModulePath(b.KernelVersion, m.Name)
		if m.Optional {
			path = modules.OptionalMark + path
		}
		if m.Feature != "" {
			path = m.Feature + modules.FeatureMark + path
		}
		if line != path {
			t.Errorf("line %d is %s, want %s", i+1, line, path)
		}
		data := files[initramfs.ModulePath(b.KernelVersion, m.Name)]
		if digest(data) != m.SHA256 || !bytes.HasSuffix(data, []byte("~Module signature appended~\n")) {
			t.Errorf("%s is not the signed module", m.Name)
		}
		info, err := modules.ReadInfo(data)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range info.Depends {
			if !loaded[d] { // what is built in is named in no depends
				t.Errorf("%s comes before %s, which it needs", m.Name, d)
			}
		}
		loaded[m.Name] = true
	}
	if size(t, b.OVMF) != 4<<20 || size(t, b.CACerts) < 100<<10 {
		t.Errorf("firmware of %d bytes, certificates of %d", size(t, b.OVMF), size(t, b.CACerts))
	}
}

func size(t *testing.T, name string) int64 {
	t.Helper()
	info, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}
