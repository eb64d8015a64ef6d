package base

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"coffer/images"
	"coffer/internal/testenv"
)

// library is a shared library of that SONAME, with that content.
func library(t *testing.T, soname, content string) string {
	t.Helper()
	dir := t.TempDir()
	source, out := filepath.Join(dir, "x.c"), filepath.Join(dir, "x.so")
	if err := os.WriteFile(source, fmt.Appendf(nil, "const char content[] = %q;\n", content), 0o644); err != nil {
		t.Fatal(err)
	}
	if text, err := exec.Command(testenv.LookTool(t, "gcc"), "-shared", "-nostdlib", "-Wl,-soname,"+soname, "-o", out, source).CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v: %s", err, text)
	}
	data, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// source is the modules' as either kind of package has it.
func source(under, version, license string) map[string]string {
	return map[string]string{
		under + "/Kbuild":           `ccflags-y += -DNV_VERSION_STRING=\"` + version + `\"` + "\n",
		under + "/nvidia/nv.c":      `MODULE_LICENSE("` + license + `");` + "\n",
		under + "/nvidia/nv-pci.c":  "r = pci_resize_resource(pci_dev, NV_GPU_BAR1, requested_size);\n",
		under + "/nvidia/Kbuild":    "# part of the other\n",
		under + "/nvidia-uvm/uvm.c": "uvm " + version + "\n",
	}
}

const openLicense = "Dual MIT/GPL"

// driverFiles is a driver without its source: libraries below lib, and the rest.
func driverFiles(t *testing.T, version, lib, smi, firmware string) map[string]string {
	t.Helper()
	return map[string]string{
		lib + "/libcuda.so." + version:                   library(t, "libcuda.so.1", version),
		lib + "/libnvidia-ml.so." + version:              library(t, "libnvidia-ml.so.1", version),
		lib + "/libnvidia-pkcs11-openssl3.so." + version: library(t, "libnvidia-pkcs11-openssl3.so."+version, version),
		lib + "/libGLX_nvidia.so." + version:             library(t, "libGLX_nvidia.so.0", version),
		smi + "/nvidia-smi":                              "smi " + version,
		firmware + "/gsp_ga10x.bin":                      "firmware " + version,
		firmware + "/gsp_tu10x.bin":                      "firmware of GPUs without confidential computing",
	}
}

func merged(maps ...map[string]string) map[string]string {
	out := map[string]string{}
	for _, m := range maps {
		for k, v := range m {
			out[k] = v
		}
	}
	return out
}

// nvidiaParams is a base with a driver out of made-up packages. The toolchain's make
// turns a part of each module's source into the module.
func nvidiaParams(t *testing.T) Params {
	t.Helper()
	p := params(t)
	p.Image, p.Programs["gpu-helper"] = "nvidia", p.Init
	image, err := images.Load("nvidia")
	if err != nil {
		t.Fatal(err)
	}
	n := image.NVIDIA
	content := map[string]map[string]string{
		"make":                      {"usr/bin/make": "#!/bin/sh\ncp nvidia/nv-pci.c nvidia.ko && cp nvidia-uvm/uvm.c nvidia-uvm.ko\n"},
		"binutils-x86-64-linux-gnu": {"usr/bin/x86_64-linux-gnu-strip": "#!/bin/sh\n"},
		"libc6":                     {},
		"headers":                   {"usr/src/linux-headers-" + testKernel + "/vmlinux": "type information"},
		"nvidia-open-kernel-dkms":   source("usr/src/nvidia-current-open-550.163.01", "550.163.01", openLicense),
		"libcuda1":                  driverFiles(t, "550.163.01", "usr/lib/x86_64-linux-gnu/nvidia/current", "usr/lib/nvidia/current", "usr/lib/firmware/nvidia/550.163.01"),
	}
	for _, name := range n.RuntimeFiles {
		content["libc6"]["usr/lib/x86_64-linux-gnu/"+name] = "glibc's " + name
	}
	l, err := readLock(p.Locked)
	if err != nil {
		t.Fatal(err)
	}
	packages := []Package{l[roleKernel], l[roleFirmware], l[roleCA]}
	want, err := driverPackages(n, l[roleKernel], false)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range want {
		files := merged(content[w.role], map[string]string{"usr/share/doc/" + w.role: "x"})
		packages = append(packages, deb(t, p.Cache, w.role, w.From[0].Package, files))
	}
	data, err := encode(lock{Version: manifestVersion, Packages: packages})
	if err == nil {
		err = os.WriteFile(p.Locked, data, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// unpacked is what the guest finds at /usr: content of files, "-> target" of links.
func unpacked(t *testing.T, b *Base) map[string]string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "usr")
	if text, err := exec.Command(testenv.LookTool(t, "fsck.erofs"), "--extract="+dir, b.NVIDIA).CombinedOutput(); err != nil {
		t.Fatalf("fsck.erofs: %v: %s", err, text)
	}
	out := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		if link, err := os.Readlink(path); err == nil {
			out[name] = "-> " + link
			return nil
		}
		data, err := os.ReadFile(path)
		out[name] = string(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestNVIDIABase(t *testing.T) {
	p := nvidiaParams(t)
	b := build1(t, p)
	if b.GPU == nil || b.GPU.Driver != "550.163.01" || len(b.GPU.Modules) != 2 || b.GPU.Modules[1].Name != "nvidia_uvm" {
		t.Fatalf("GPU %+v", b.GPU)
	}
	if want := []string{"libcuda.so.1", "libnvidia-ml.so.1", "libnvidia-pkcs11-openssl3.so.550.163.01"}; !slices.Equal(b.GPU.Libraries, want) {
		t.Errorf("libraries %q, want %q", b.GPU.Libraries, want)
	}
	if b.Programs["/bin/gpu-helper"] == "" {
		t.Error("no gpu-helper")
	}
	const version = "550.163.01"
	files := unpacked(t, b)
	for name, want := range map[string]string{
		"lib/modules/load":                                  "/lib/modules/" + testKernel + "/nvidia.ko\n/lib/modules/" + testKernel + "/nvidia-uvm.ko\n",
		"lib/modules/" + testKernel + "/nvidia.ko":          "r = pci_resize_resource(pci_dev, NV_GPU_BAR1, requested_size, 0);\n",
		"lib/modules/" + testKernel + "/nvidia-uvm.ko":      "uvm " + version + "\n",
		"lib/firmware/nvidia/" + version + "/gsp_ga10x.bin": "firmware " + version,
		"nvidia/bin/nvidia-smi":                             "smi " + version,
		"nvidia/lib64/libcuda.so.1":                         "-> libcuda.so." + version,
		"nvidia/lib64/libcuda.so":                           "-> libcuda.so." + version,
		"nvidia/lib64/libnvidia-pkcs11-openssl3.so":         "-> libnvidia-pkcs11-openssl3.so." + version,
		"lib/x86_64-linux-gnu/libnvidia-ml.so.1":            "-> ../../nvidia/lib64/libnvidia-ml.so.1",
		"lib/x86_64-linux-gnu/libc.so.6":                    "glibc's libc.so.6",
		"lib64/ld-linux-x86-64.so.2":                        "-> ../lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
	} {
		if files[name] != want {
			t.Errorf("%s is %q, want %q", name, files[name], want)
		}
	}
	for name := range files {
		if strings.Contains(name, "gsp_tu10x") || strings.Contains(name, "GLX") || strings.Contains(name, "doc") ||
			strings.HasPrefix(name, "nvidia/") && strings.Contains(name, "libc.so") {
			t.Errorf("%s has no business there", name)
		}
	}

	// The same again, elsewhere and from the lock that was written.
	again := p
	again.Out, again.Locked = filepath.Join(t.TempDir(), "b"), filepath.Join(p.Out, lockFile)
	if c := build1(t, again); c.ID != b.ID {
		t.Errorf("ID %s, then %s", b.ID, c.ID)
	}
}

// tree writes files below a folder.
func tree(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, data := range files {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(data), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
}

// runFile is a shell script that unpacks itself, as NVIDIA's does.
func runFile(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	content := filepath.Join(dir, "content")
	tree(t, content, files)
	script := `#!/bin/sh
[ "$1" = --extract-only ] && [ "$2" = --target ] || exit 1
[ ! -e "$3" ] || { echo "$3 exists" >&2; exit 1; }
cp -r ` + content + ` "$3"
`
	path := filepath.Join(dir, "NVIDIA-Linux-x86_64.run")
	if err := os.WriteFile(path, []byte(script), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// A site's own driver takes the place of Debian's, whichever way NVIDIA packs it.
func TestOwnDriver(t *testing.T) {
	const version = "580.95.05"
	p := nvidiaParams(t)
	installer := runFile(t, merged(
		source("kernel", version, "NVIDIA"), source("kernel-open", version, openLicense),
		driverFiles(t, version, ".", ".", "firmware"),
		map[string]string{"32/libcuda.so." + version: "\x7fELF\x01\x01\x01" + strings.Repeat("\x00", 9) + "\x03\x00\x03\x00\x01\x00\x00\x00" + strings.Repeat("\x00", 28)},
	))
	debs := t.TempDir()
	store := t.TempDir()
	for name, files := range map[string]map[string]string{
		"nvidia-dkms-open":    source("usr/src/nvidia-"+version, version, openLicense),
		"libnvidia-compute":   driverFiles(t, version, "usr/lib/x86_64-linux-gnu", "usr/bin", "lib/firmware/nvidia/"+version),
		"nvidia-persistenced": {"usr/bin/nvidia-persistenced": "not used"},
	} {
		pkg := deb(t, store, "x", name, files)
		if err := os.Rename(filepath.Join(store, "packages", pkg.SHA256+".deb"), filepath.Join(debs, name+".deb")); err != nil {
			t.Fatal(err)
		}
	}
	var content [2]map[string]string
	for i, own := range []string{installer, debs} {
		p.NVIDIADriver = own
		b := build1(t, p)
		if b.GPU.Driver != version || len(b.GPU.Libraries) != 3 {
			t.Errorf("%s: GPU %+v", own, b.GPU)
		}
		files := 0
		for _, pkg := range b.Packages {
			if strings.HasPrefix(pkg.Name, "libcuda1") {
				t.Errorf("%s: Debian's driver is in as well", own)
			}
			if pkg.Role == roleOwn && pkg.Version == version && hexDigest.MatchString(pkg.SHA256) {
				files++
			}
		}
		if want := []int{1, 3}[i]; files != want {
			t.Errorf("%s: %d files are named, want %d", own, files, want)
		}
		if _, err := readLock(filepath.Join(p.Out, lockFile)); err != nil {
			t.Errorf("%s: its lock: %v", own, err)
		}
		content[i] = unpacked(t, b)
	}
	for name, want := range content[0] {
		if content[1][name] != want && !strings.HasPrefix(want, "\x7fELF") {
			t.Errorf("%s is %q of the installer and %q of the packages", name, want, content[1][name])
		}
	}
}

func TestOwnDriverRefused(t *testing.T) {
	const version = "580.95.05"
	good := merged(source("kernel-open", version, openLicense), driverFiles(t, version, ".", ".", "firmware"))
	without := func(name string) map[string]string {
		m := merged(good)
		if _, ok := m[name]; !ok {
			t.Fatalf("%s is not there", name)
		}
		delete(m, name)
		return m
	}
	p := nvidiaParams(t)
	broken := filepath.Join(t.TempDir(), "x.run")
	if err := os.WriteFile(broken, []byte("echo no space >&2; exit 1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ name, own, want string }{
		{"closed modules alone", runFile(t, merged(without("kernel-open/nvidia/nv.c"), source("kernel", version, "NVIDIA"))), "no source of the open kernel modules"},
		{"no version", runFile(t, merged(good, map[string]string{"kernel-open/Kbuild": "x"})), "names no version"},
		{"no library", runFile(t, without("./libnvidia-ml.so."+version)), "lacks libnvidia-ml.so." + version},
		{"libraries of another version", runFile(t, merged(source("kernel-open", "575.57.08", openLicense), driverFiles(t, version, ".", ".", "firmware"))), "575.57.08 lacks libcuda.so.575.57.08"},
		{"no firmware", runFile(t, without("firmware/gsp_ga10x.bin")), "lacks gsp_ga10x.bin"},
		{"a library that is none", runFile(t, merged(good, map[string]string{"./libcuda.so." + version: "text"})), version + ": EOF"},
		{"modules that do not build", runFile(t, without("kernel-open/nvidia-uvm/uvm.c")), "build the kernel modules of NVIDIA " + version},
		{"an installer that fails", broken, "no space"},
		{"an empty folder", t.TempDir(), "neither a .run file nor a folder of .deb files"},
	} {
		t.Run(test.name, func(t *testing.T) {
			p.NVIDIADriver = test.own
			if _, err := Build(t.Context(), p); !errors.Is(err, ErrDriver) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %q", err, test.want)
			}
			if _, err := os.Stat(p.Out); err == nil {
				t.Error("something was left at Out")
			}
			if left, _ := filepath.Glob(filepath.Join(p.Cache, "nvidia-*")); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
	p.Image = "cpu"
	if _, err := Build(t.Context(), p); err == nil || !strings.Contains(err.Error(), "the image cpu has no NVIDIA driver") {
		t.Errorf("a driver for a base without GPUs: %v", err)
	}
	p = nvidiaParams(t)
	delete(p.Programs, "gpu-helper")
	if _, err := Build(t.Context(), p); err == nil || !strings.Contains(err.Error(), "gpu-helper is not given") {
		t.Errorf("without gpu-helper: %v", err)
	}
}
