package base

import (
	"bytes"
	"context"
	"debug/buildinfo"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"coffer/images"
	"coffer/initramfs"
	"coffer/internal/guestconfig"
	"coffer/internal/measure"
	"coffer/internal/strict"
)

// Roles of packages, in the order in which manifest and lock name them.
const (
	roleKernel   = "kernel"
	roleFirmware = "firmware"
	roleCA       = "ca"
)

// simulatedTag is the build tag of programs for the simulated platform.
const simulatedTag = "simulated"

// Params say what base to build.
type Params struct {
	Out      string // folder to make; a base that is there already is replaced
	Platform string // PlatformSNP or PlatformSimulated
	Image    string // name in package images; "" means "cpu"

	Init     string            // program that becomes /init
	Programs map[string]string // name in bin/, such as "agent", to program; agent, snpguest, containerd, containerd-shim-runc-v2 and runc at least

	// OVMF is a firmware file to take in place of the image's package. Where it is
	// empty and the package cannot be had, installedOVMF is taken if it is there.
	OVMF string

	// SimulatedGPU is a folder that makes a simulated base one for made-up GPUs: a
	// tree root of files for the verity root, and device-root.pem and rim-root.pem.
	SimulatedGPU string
	// NVIDIADriver is a driver to take in place of the image's packages: NVIDIA's
	// .run file or a folder of .deb files.
	NVIDIADriver string

	Cache  string // folder that keeps downloaded packages by their SHA-256
	Mirror Mirror // what is empty is found out from the machine
	Locked string // a base.lock; if set, exactly its packages are taken
	// Log gets one line of progress at a time. It may be nil.
	Log func(format string, args ...any)
}

// installedOVMF is where Debian's package ovmf-amdsev puts the firmware.
const installedOVMF = "/usr/share/ovmf/OVMF.amdsev.fd"

// lock is base.lock.
type lock struct {
	Version  int       `json:"version"`
	Packages []Package `json:"packages"`
}

// Build makes a base. On failure nothing is left at Out, and a base that was
// there before stays.
func Build(ctx context.Context, p Params) (*Base, error) {
	if p.Log == nil {
		p.Log = func(string, ...any) {}
	}
	if p.Image == "" {
		p.Image = "cpu"
	}
	if p.Platform != PlatformSNP && p.Platform != PlatformSimulated {
		return nil, fmt.Errorf("build base: platform %q is not %s or %s", p.Platform, PlatformSNP, PlatformSimulated)
	}
	if p.SimulatedGPU != "" && p.Platform != PlatformSimulated {
		return nil, fmt.Errorf("build base: made-up GPUs are for platform %s alone", PlatformSimulated)
	}
	if p.Out == "" || p.Cache == "" {
		return nil, errors.New("build base: the output or cache folder is not given")
	}
	image, err := images.Load(p.Image)
	if err != nil {
		return nil, fmt.Errorf("build base: %w", err)
	}
	if p.SimulatedGPU != "" && image.NVIDIA != nil {
		return nil, fmt.Errorf("build base: the image %s has a driver for real GPUs, not for made-up ones", p.Image)
	}
	if p.NVIDIADriver != "" && image.NVIDIA == nil {
		return nil, fmt.Errorf("build base: the image %s has no NVIDIA driver", p.Image)
	}
	b, err := build(ctx, p, image)
	if err != nil {
		return nil, fmt.Errorf("build base %s: %w", p.Out, err)
	}
	return b, nil
}

func build(ctx context.Context, p Params, image *images.Image) (*Base, error) {
	if err := replaceable(p.Out); err != nil {
		return nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(p.Programs)) {
		if name != filepath.Base(name) || !filepath.IsLocal(name) {
			return nil, fmt.Errorf("program name %q is not a plain file name", name)
		}
		if err := checkProgram(p.Programs[name], p.Platform); err != nil {
			return nil, err
		}
	}
	programs := guestPrograms
	if image.NVIDIA != nil {
		programs = append(slices.Clone(programs), "gpu-helper")
	}
	for _, name := range programs {
		if p.Programs[name] == "" {
			return nil, fmt.Errorf("the program %s is not given", name)
		}
	}
	if err := checkProgram(p.Init, p.Platform); err != nil {
		return nil, err
	}
	packages, debs, err := fetch(ctx, &p, image)
	if err != nil {
		return nil, err
	}

	parent := filepath.Dir(filepath.Clean(p.Out))
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(parent, "."+filepath.Base(p.Out)+"-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	m := manifest{Version: manifestVersion, Platform: p.Platform, Image: image.Name}
	for _, pkg := range packages {
		pkg.Suite = ""
		m.Packages = append(m.Packages, pkg)
	}
	put := func(name string, data []byte, mode os.FileMode) error {
		m.Files = append(m.Files, file{Path: name, Size: int64(len(data)), SHA256: digest(data)})
		return write(filepath.Join(dir, name), data, mode)
	}

	p.Log("reading the kernel's modules")
	k, err := readKernel(ctx, debs[roleKernel], strings.TrimSuffix(debs[roleKernel], ".deb")+".modules.json")
	if err != nil {
		return nil, err
	}
	m.KernelVersion = k.version
	features := map[string][]string{}
	for _, f := range []string{guestconfig.FeatureNFS, guestconfig.FeatureGPU} {
		features[f] = image.ModuleNames(p.Platform, f)
	}
	loaded, err := k.modules.ClosureOf(image.ModuleNames(p.Platform, ""), features)
	if err != nil {
		return nil, err
	}
	for _, mod := range loaded {
		m.Modules = append(m.Modules, Module{Name: mod.Name, SHA256: digest(mod.Data), Optional: mod.Optional, Feature: mod.Feature})
	}
	init, err := os.ReadFile(p.Init)
	if err != nil {
		return nil, err
	}
	m.InitSHA256 = digest(init)
	p.Log("packing the base initrd: init and %d modules", len(loaded))
	var initrd bytes.Buffer
	m.CPIOSHA256, err = initramfs.WriteBase(&initrd, initramfs.Base{Init: init, KernelVersion: k.version, Modules: loaded})
	if err != nil {
		return nil, err
	}
	var firmware []byte
	if deb := debs[roleFirmware]; deb == "" {
		firmware, err = measure.ReadOVMF(p.OVMF)
	} else if firmware, err = readFile(ctx, deb, image.Firmware.File); err == nil {
		err = measure.CheckOVMF(image.Firmware.File+" of "+filepath.Base(deb), firmware)
	}
	if err != nil {
		return nil, err
	}
	certs, err := readCerts(ctx, debs[roleCA], image.CA.File)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(
		put(kernelFile, k.image, 0o644), put(initrdFile, initrd.Bytes(), 0o644),
		put(firmwareFile, firmware, 0o644), put(caFile, certs, 0o644),
		os.Mkdir(filepath.Join(dir, programDir), 0o755), os.Chmod(filepath.Join(dir, programDir), 0o755),
	); err != nil {
		return nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(p.Programs)) {
		data, err := os.ReadFile(p.Programs[name])
		if err != nil {
			return nil, err
		}
		if err := put(programDir+"/"+name, data, 0o755); err != nil {
			return nil, err
		}
	}
	if p.SimulatedGPU != "" {
		if m.GPU, err = putSimulatedGPU(p.SimulatedGPU, dir, put); err != nil {
			return nil, fmt.Errorf("simulated GPUs: %w", err)
		}
	}
	if image.NVIDIA != nil {
		work, err := os.MkdirTemp(p.Cache, "nvidia-")
		if err != nil {
			return nil, err
		}
		defer os.RemoveAll(work)
		if work, err = filepath.Abs(work); err != nil {
			return nil, err
		}
		d := &driver{NVIDIA: image.NVIDIA, kernel: k.version, debs: debs, own: p.NVIDIADriver, log: p.Log}
		packed, gpu, own, err := d.build(ctx, work)
		if err == nil {
			err = put(nvidiaFile, packed, 0o644)
		}
		if err != nil {
			return nil, err
		}
		m.GPU, m.Packages = gpu, append(m.Packages, own...)
	}
	packed, err := packPrograms(ctx, filepath.Join(dir, programDir))
	if err != nil {
		return nil, err
	}
	if err := put(programsFile, packed, 0o644); err != nil {
		return nil, err
	}
	data, err := encode(m)
	if err != nil {
		return nil, err
	}
	locked, err := encode(lock{Version: manifestVersion, Packages: packages})
	if err != nil {
		return nil, err
	}
	if err := errors.Join(
		write(filepath.Join(dir, manifestFile), data, 0o644),
		write(filepath.Join(dir, lockFile), locked, 0o644),
		os.Chmod(dir, 0o755),
	); err != nil {
		return nil, err
	}
	if err := replace(p.Out, dir); err != nil {
		return nil, err
	}
	return Open(p.Out)
}

// putSimulatedGPU puts the files for made-up GPUs into a base.
func putSimulatedGPU(from, dir string, put func(name string, data []byte, mode os.FileMode) error) (*GPU, error) {
	var roots [2]string
	for i, name := range []string{"device-root.pem", "rim-root.pem"} {
		b, err := os.ReadFile(filepath.Join(from, name))
		if err != nil {
			return nil, err
		}
		roots[i] = string(b)
	}
	tree := os.DirFS(from)
	err := fs.WalkDir(tree, rootDir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir():
			return os.Mkdir(filepath.Join(dir, path), 0o755)
		}
		data, err := fs.ReadFile(tree, path)
		if err != nil {
			return err
		}
		return put(path, data, 0o755)
	})
	return &GPU{Driver: "simulated", DeviceRoot: roots[0], RIMRoot: roots[1]}, err
}

// packPrograms makes a compressed EROFS of a folder: every byte that the guest
// reads is decrypted and verified first, so there had better be few. Programs
// with the same content become one file, whose pages the guest keeps once.
func packPrograms(ctx context.Context, dir string) ([]byte, error) {
	tmp, err := os.MkdirTemp("", "coffer-programs-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	tree := filepath.Join(tmp, "programs")
	if err := os.Mkdir(tree, 0o755); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	seen := map[string]string{} // digest to path
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return nil, err
		}
		path := filepath.Join(tree, e.Name())
		if first := seen[digest(data)]; first != "" {
			err = os.Link(first, path)
		} else {
			seen[digest(data)] = path
			err = write(path, data, 0o755)
		}
		if err != nil {
			return nil, err
		}
	}
	return packTree(ctx, tree)
}

// packTree makes a compressed EROFS of a folder, whose folders' modes it sets.
func packTree(ctx context.Context, tree string) ([]byte, error) {
	err := filepath.WalkDir(tree, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() {
			err = os.Chmod(path, 0o755)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	out := tree + ".erofs"
	cmd := exec.CommandContext(ctx, "mkfs.erofs", "-zlz4hc", "-C65536", "-T0", "-U", "00000000-0000-0000-0000-000000000000", "--all-root", out, tree)
	if text, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("pack %s with mkfs.erofs (package erofs-utils): %w\n%s", filepath.Base(tree), err, text)
	}
	return os.ReadFile(out)
}

// checkProgram keeps simulation code out of a production base. It is told by
// the build tag that Go records in a program.
func checkProgram(program, platform string) error {
	info, err := buildinfo.ReadFile(program)
	if err != nil {
		return fmt.Errorf("%s is not a Go program: %w", program, err)
	}
	simulated := false
	for _, s := range info.Settings {
		if s.Key == "-tags" {
			simulated = slices.Contains(strings.Split(s.Value, ","), simulatedTag)
		}
	}
	if simulated && platform != PlatformSimulated {
		return fmt.Errorf("%s was built with the tag %q and must not get into a base for platform %s", program, simulatedTag, platform)
	}
	return nil
}

// fetch brings the image's packages into the cache. It returns them in the
// order of their roles, and where each lies by its role. There is no package of
// the firmware where p.OVMF is set, which it may come to be.
func fetch(ctx context.Context, p *Params, image *images.Image) (packages []Package, debs map[string]string, err error) {
	store := filepath.Join(p.Cache, "packages")
	if err := os.MkdirAll(store, 0o755); err != nil {
		return nil, nil, err
	}
	if store, err = filepath.Abs(store); err != nil { // apt changes its folder
		return nil, nil, err
	}
	work, err := os.MkdirTemp(store, "apt-")
	if err != nil {
		return nil, nil, err
	}
	defer os.RemoveAll(work)
	f := &fetcher{apt: &apt{dir: work, log: p.Log, suites: map[string]suite{}}, p: p, store: store}
	if p.Locked != "" {
		if f.locked, err = readLock(p.Locked); err != nil {
			return nil, nil, err
		}
	}
	return fetchAll(ctx, p, image, f.fetch, installedOVMF)
}

// fetchAll fetches one package for each role. installed is the firmware to fall
// back on.
func fetchAll(ctx context.Context, p *Params, image *images.Image,
	fetch func(ctx context.Context, role string, want images.Package) (Package, string, error), installed string) (packages []Package, debs map[string]string, err error) {
	debs = map[string]string{}
	want := []wanted{{roleKernel, image.Kernel}, {roleFirmware, image.Firmware}, {roleCA, image.CA}}
	for len(want) > 0 {
		next := want[0]
		want = want[1:]
		if next.role == roleFirmware && p.OVMF != "" {
			continue
		}
		pkg, deb, err := fetch(ctx, next.role, next.Package)
		if err != nil && next.role == roleFirmware && p.Locked == "" && ctx.Err() == nil {
			if _, missing := os.Stat(installed); missing == nil {
				p.Log("the firmware's package cannot be had (%v): taking %s", err, installed)
				p.OVMF = installed
				continue
			}
		}
		if err != nil {
			return nil, nil, err
		}
		debs[next.role] = deb
		packages = append(packages, pkg)
		if next.role == roleKernel && image.NVIDIA != nil {
			more, err := driverPackages(image.NVIDIA, pkg, p.NVIDIADriver != "")
			if err != nil {
				return nil, nil, err
			}
			want = append(want, more...)
		}
	}
	return packages, debs, nil
}

// wanted is a package and what it is for.
type wanted struct {
	role string
	images.Package
}

// fetcher brings packages into the store, and asks apt only for what is not there.
type fetcher struct {
	apt    *apt
	p      *Params
	store  string
	locked map[string]Package // by role; nil: the newest
}

func (f *fetcher) connect(ctx context.Context) (err error) {
	if f.apt.mirror.Main == "" {
		f.apt.mirror, err = findMirror(ctx, f.p.Mirror)
	}
	return err
}

// fetch returns the package of one role and where it lies.
func (f *fetcher) fetch(ctx context.Context, role string, want images.Package) (pkg Package, deb string, err error) {
	pkg, ok := f.locked[role]
	if f.p.Locked != "" && !ok {
		return pkg, "", fmt.Errorf("%s names no package for %s", f.p.Locked, role)
	}
	if !ok {
		if err := f.connect(ctx); err != nil {
			return pkg, "", err
		}
		if pkg, err = f.apt.newest(ctx, role, want); err != nil {
			return pkg, "", err
		}
	}
	deb = filepath.Join(f.store, pkg.SHA256+".deb")
	if sum, _, err := digestFile(deb); err == nil && sum == pkg.SHA256 {
		return pkg, deb, nil
	}
	if err := f.connect(ctx); err != nil {
		return pkg, "", err
	}
	if err := f.apt.download(ctx, pkg, deb); err != nil {
		if f.p.Locked != "" {
			err = fmt.Errorf("%w: %s: %w", ErrLocked, f.p.Locked, err)
		}
		return pkg, "", err
	}
	return pkg, deb, nil
}

func readLock(name string) (map[string]Package, error) {
	data, err := strict.ReadFile(name, maxManifest)
	if err != nil {
		return nil, fmt.Errorf("read lock: %w", err)
	}
	var l lock
	if err := strict.JSON(data, &l); err != nil {
		return nil, fmt.Errorf("read lock %s: %w", name, err)
	}
	if l.Version != manifestVersion {
		return nil, fmt.Errorf("read lock %s: version %d, this program reads %d", name, l.Version, manifestVersion)
	}
	out := map[string]Package{}
	for _, p := range l.Packages {
		if !debianName.MatchString(p.Name) || !debianVersion.MatchString(p.Version) || !hexDigest.MatchString(p.SHA256) || !suiteName.MatchString(p.Suite) {
			return nil, fmt.Errorf("read lock %s: package %q has a malformed name, version, sha256 or suite", name, p.Name)
		}
		if _, twice := out[p.Role]; twice {
			return nil, fmt.Errorf("read lock %s: two packages for %s", name, p.Role)
		}
		out[p.Role] = p
	}
	return out, nil
}

// replaceable refuses to put a base where something else is.
func replaceable(out string) error {
	entries, err := os.ReadDir(out)
	if errors.Is(err, os.ErrNotExist) || err == nil && len(entries) == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(out, manifestFile)); err != nil {
		return fmt.Errorf("it exists and is not a base (no %s): it is left alone; give another folder", manifestFile)
	}
	return nil
}

// replace puts the folder dir in the place of out.
func replace(out, dir string) error {
	old := dir + ".old"
	err := os.Rename(out, old)
	if errors.Is(err, os.ErrNotExist) {
		return os.Rename(dir, out)
	}
	if err != nil {
		return err
	}
	if err := os.Rename(dir, out); err != nil {
		return errors.Join(err, os.Rename(old, out))
	}
	return os.RemoveAll(old)
}

// write makes a file with that mode, whatever the umask.
func write(name string, data []byte, mode os.FileMode) error {
	return errors.Join(os.WriteFile(name, data, mode), os.Chmod(name, mode))
}

// writeAtomic makes a file that others see whole or not at all.
func writeAtomic(name string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(name), ".new-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(data)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}
