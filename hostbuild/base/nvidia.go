package base

import (
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"

	"coffer/images"
	"coffer/initramfs"
	"coffer/internal/guestconfig"
)

// roleOwn is that of the files of a driver of the site's own; they are in no lock.
const roleOwn = "own driver"

// ErrDriver is wrapped where a driver is not what a base needs or cannot be built.
var ErrDriver = errors.New("no usable NVIDIA driver")

// driverPackages are the packages that make a driver for a kernel's package.
func driverPackages(n *images.NVIDIA, kernel Package, own bool) ([]wanted, error) {
	version, ok := strings.CutPrefix(kernel.Name, "linux-image-")
	release, _, flavoured := strings.Cut(version, "-")
	if !ok || !flavoured {
		return nil, fmt.Errorf("package %s: its headers cannot be told from its name", kernel.Name)
	}
	list := slices.Concat(n.Toolchain, []images.Source{n.Runtime})
	if !own {
		list = append(list, n.Driver...)
	}
	var out []wanted
	for _, s := range list {
		out = append(out, wanted{s.Package, images.Package{From: []images.Source{s}}})
	}
	for role, name := range map[string]string{"headers": "linux-headers-" + version, "headers-common": "linux-headers-" + release + "-common", "kbuild": "linux-kbuild-" + release} {
		out = append(out, wanted{role, images.Package{From: []images.Source{{Suite: kernel.Suite, Package: name}}}})
	}
	slices.SortStableFunc(out, func(a, b wanted) int { return strings.Compare(a.role, b.role) })
	return out, nil
}

// driver is NVIDIA's driver while it is made.
type driver struct {
	*images.NVIDIA
	kernel string            // as uname -r prints it
	debs   map[string]string // by role
	own    string            // the site's own driver, or ""
	log    func(format string, args ...any)

	tools, files, usr string // folders: unpacked toolchain and headers, unpacked driver, what becomes the guest's /usr
	source            string // folder of the modules
	version           string
}

// build makes the EROFS that becomes the guest's /usr, in a work folder, with the
// files of the site's own driver.
//
//	lib/modules/VERSION, lib/modules/load   kernel modules, and their order
//	lib/firmware                            for the kernel
//	lib64, lib/x86_64-linux-gnu             C library; NVML for gpu-helper
//	nvidia/lib64, nvidia/bin                what containers get, and nothing else
func (d *driver) build(ctx context.Context, work string) (packed []byte, gpu *GPU, own []Package, err error) {
	d.tools, d.files, d.usr = filepath.Join(work, "tools"), filepath.Join(work, "driver"), filepath.Join(work, "usr")
	for _, dir := range []string{d.tools, d.files, d.usr} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return nil, nil, nil, err
		}
	}
	if own, err = d.unpack(ctx); err != nil {
		return nil, nil, nil, err
	}
	if err := d.findSource(); err != nil {
		return nil, nil, nil, err
	}
	for i := range own {
		own[i].Version = d.version
	}
	gpu = &GPU{Driver: d.version}
	d.log("building the kernel modules of NVIDIA %s", d.version)
	if gpu.Modules, err = d.buildModules(ctx); err != nil {
		return nil, nil, nil, err
	}
	if gpu.Libraries, err = d.collect(); err != nil {
		return nil, nil, nil, err
	}
	if err := d.runtime(ctx); err != nil {
		return nil, nil, nil, err
	}
	d.log("packing the driver")
	packed, err = packTree(ctx, d.usr)
	return packed, gpu, own, err
}

// unpack brings toolchain, headers and driver into their folders.
func (d *driver) unpack(ctx context.Context) (own []Package, err error) {
	for role, deb := range d.debs {
		isDriver := slices.ContainsFunc(d.Driver, func(s images.Source) bool { return s.Package == role })
		switch {
		case isDriver:
			_, err = run(ctx, "", "dpkg-deb", "-x", deb, d.files)
		case role != roleKernel && role != roleFirmware && role != roleCA && role != d.Runtime.Package:
			_, err = run(ctx, "", "dpkg-deb", "-x", deb, d.tools)
		}
		if err != nil {
			return nil, err
		}
	}
	if d.own == "" {
		return nil, nil
	}
	packages := []string{d.own}
	if !strings.HasSuffix(d.own, ".run") {
		if packages, err = filepath.Glob(filepath.Join(d.own, "*.deb")); err != nil || len(packages) == 0 {
			return nil, fmt.Errorf("%s: %w: it is neither a .run file nor a folder of .deb files", d.own, ErrDriver)
		}
	}
	for _, name := range packages {
		sum, _, err := digestFile(name)
		if err != nil {
			return nil, err
		}
		own = append(own, Package{Role: roleOwn, Name: filepath.Base(name), SHA256: sum})
		if strings.HasSuffix(name, ".deb") {
			_, err = run(ctx, "", "dpkg-deb", "-x", name, d.files)
		} else {
			err = extract(ctx, name, d.files)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w: %w", name, ErrDriver, err)
		}
	}
	return own, nil
}

// extract has NVIDIA's installer, a shell script, unpack itself.
func extract(ctx context.Context, name, to string) error {
	name, err := filepath.Abs(name)
	if err != nil {
		return err
	}
	if err := os.Remove(to); err != nil { // it wants to make the folder
		return err
	}
	_, err = run(ctx, filepath.Dir(to), "sh", name, "--extract-only", "--target", to)
	return err
}

var driverVersion = regexp.MustCompile(`NV_VERSION_STRING=\\"([0-9]+(?:\.[0-9]+){1,2})\\"`)

// findSource finds the open modules' source; an installer carries the closed
// ones' as well, which cannot do confidential computing.
func (d *driver) findSource() error {
	err := filepath.WalkDir(d.files, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.Name() != "Kbuild" || filepath.Base(filepath.Dir(path)) == "nvidia" {
			return err
		}
		main, err := os.ReadFile(filepath.Join(filepath.Dir(path), "nvidia", "nv.c"))
		if err != nil || !strings.Contains(string(main), `MODULE_LICENSE("Dual MIT/GPL")`) {
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		m := driverVersion.FindSubmatch(text)
		if m == nil {
			return fmt.Errorf("%w: %s names no version", ErrDriver, path)
		}
		d.source, d.version = filepath.Dir(path), string(m[1])
		return fs.SkipAll
	})
	if err == nil && d.source == "" {
		err = fmt.Errorf("%w: it has no source of the open kernel modules", ErrDriver)
	}
	return err
}

// buildModules builds, strips and lists the modules.
func (d *driver) buildModules(ctx context.Context) ([]Module, error) {
	for _, e := range d.Edits {
		path := filepath.Join(d.source, e.File)
		text, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		if err := os.WriteFile(path, []byte(strings.ReplaceAll(string(text), e.Old, e.New)), 0o644); err != nil {
			return nil, err
		}
	}
	release, _, _ := strings.Cut(d.kernel, "-")
	headers := filepath.Join(d.tools, "usr/src/linux-headers-"+d.kernel)
	if err := os.Remove(filepath.Join(headers, "vmlinux")); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err // type information would be made, where a machine has the program for it
	}
	prefix, _, _ := strings.Cut(d.Compiler, "gcc")
	work := filepath.Dir(d.tools)
	if err := d.run(ctx, d.source, "make", "modules", fmt.Sprintf("-j%d", runtime.GOMAXPROCS(0)),
		"NV_KERNEL_MODULES="+strings.Join(d.Modules, " "),
		"SYSSRC="+filepath.Join(d.tools, "usr/src/linux-headers-"+release+"-common"), "SYSOUT="+headers,
		"CC="+d.Compiler, "LD="+prefix+"ld", "AR="+prefix+"ar", "OBJDUMP="+prefix+"objdump", "OBJCOPY="+prefix+"objcopy",
		"KCFLAGS=-ffile-prefix-map="+work+"=."); err != nil {
		return nil, fmt.Errorf("%w: build the kernel modules of NVIDIA %s for Linux %s: %w", ErrDriver, d.version, d.kernel, err)
	}
	var out []Module
	var list strings.Builder
	for _, name := range d.Modules {
		ko := filepath.Join(d.source, name+".ko")
		if err := d.run(ctx, d.source, prefix+"strip", "--strip-debug", ko); err != nil {
			return nil, err
		}
		data, err := os.ReadFile(ko)
		if err != nil {
			return nil, err
		}
		path := filepath.Join("lib/modules", d.kernel, name+".ko")
		if err := d.put(path, data, 0o644); err != nil {
			return nil, err
		}
		out = append(out, Module{Name: strings.ReplaceAll(name, "-", "_"), SHA256: digest(data)})
		list.WriteString("/" + path + "\n")
	}
	return out, d.put(initramfs.LoadList, []byte(list.String()), 0o644)
}

// run runs a program of the toolchain. Only the most basic ones are the machine's.
func (d *driver) run(ctx context.Context, dir, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, filepath.Join(d.tools, "usr/bin", name), args...)
	cmd.Dir = dir
	cmd.Env = []string{
		"LC_ALL=C", "PATH=" + filepath.Join(d.tools, "usr/bin") + ":/usr/bin:/bin",
		"LD_LIBRARY_PATH=" + filepath.Join(d.tools, "usr/lib/x86_64-linux-gnu") + ":" + filepath.Join(d.tools, "lib/x86_64-linux-gnu"),
	}
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, tail(string(text), 2000))
	}
	return nil
}

// collect puts libraries, firmware and nvidia-smi where the guest has them.
func (d *driver) collect() (sonames []string, err error) {
	found := map[string]bool{}
	err = filepath.WalkDir(d.files, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		name := e.Name()
		library, ours := strings.CutSuffix(name, ".so."+d.version)
		ours = ours && slices.Contains(d.Libraries, library)
		firmware := slices.Contains(d.Firmware, name)
		if !ours && !firmware && name != "nvidia-smi" || found[name] {
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		switch {
		case firmware:
			err = d.put(filepath.Join("lib/firmware/nvidia", d.version, name), data, 0o644)
		case !ours:
			err = d.put("nvidia/bin/"+name, data, 0o755)
		default:
			soname, err := sonameOf(path)
			if err != nil || soname == "" { // for 32 bits
				return err
			}
			sonames = append(sonames, soname)
			if err := d.library(name, soname, library, data); err != nil {
				return err
			}
		}
		found[name] = true
		return err
	})
	if err != nil {
		return nil, err
	}
	need := append([]string{"nvidia-smi"}, d.Firmware...)
	for _, l := range d.Libraries[:2] {
		need = append(need, l+".so."+d.version)
	}
	for _, name := range need {
		if !found[name] {
			return nil, fmt.Errorf("%w: %s lacks %s", ErrDriver, d.version, name)
		}
	}
	slices.Sort(sonames)
	return sonames, nil
}

// library puts a library with the links by which programs and compilers look for it.
func (d *driver) library(name, soname, library string, data []byte) error {
	const dir = "nvidia/lib64/"
	if err := d.put(dir+name, data, 0o755); err != nil {
		return err
	}
	for _, link := range []string{soname, library + ".so"} {
		if link != name {
			if err := os.Symlink(name, filepath.Join(d.usr, dir, link)); err != nil {
				return err
			}
		}
	}
	return nil
}

// sonameOf is the name that programs load a library by; "" where it is none for
// this machine.
func sonameOf(path string) (string, error) {
	f, err := elf.Open(path)
	if err != nil {
		return "", fmt.Errorf("%w: %s: %w", ErrDriver, path, err)
	}
	defer f.Close()
	if f.Machine != elf.EM_X86_64 {
		return "", nil
	}
	names, err := f.DynString(elf.DT_SONAME)
	if err == nil && (len(names) != 1 || names[0] != filepath.Base(names[0])) {
		err = fmt.Errorf("its SONAME is %q", names)
	}
	if err != nil {
		return "", fmt.Errorf("%w: %s: %w", ErrDriver, path, err)
	}
	return names[0], nil
}

// runtime puts the C library, which gpu-helper needs, and NVML where it looks for it.
// Containers have their own.
func (d *driver) runtime(ctx context.Context) error {
	lib, nvml := filepath.Split(strings.TrimPrefix(guestconfig.NVMLPath, "/usr/"))
	files, err := unpackDeb(ctx, d.debs[d.Runtime.Package], func(name string) bool { return slices.Contains(d.RuntimeFiles, filepath.Base(name)) })
	if err != nil {
		return err
	}
	if len(files) != len(d.RuntimeFiles) {
		return fmt.Errorf("%s has %d of the files %s", d.Runtime.Package, len(files), strings.Join(d.RuntimeFiles, ", "))
	}
	for name, data := range files {
		if err := d.put(lib+filepath.Base(name), data, 0o755); err != nil {
			return err
		}
	}
	const loader = "ld-linux-x86-64.so.2"
	return errors.Join(
		os.Mkdir(filepath.Join(d.usr, "lib64"), 0o755),
		os.Symlink("../"+lib+loader, filepath.Join(d.usr, "lib64", loader)),
		os.Symlink("../../nvidia/lib64/"+nvml, filepath.Join(d.usr, lib, nvml)))
}

// put makes a file of the guest's /usr.
func (d *driver) put(name string, data []byte, mode os.FileMode) error {
	path := filepath.Join(d.usr, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return write(path, data, mode)
}
