// Package cvm turns a CONFIG.yaml and a docker archive into a bundle: it writes
// the disks, predicts the launch digests, gives key and rule to the KBS and packs
// the archive, in that order.
//
// It needs no root, no device and no VM. A build that fails leaves no bundle
// under its final name, no key and no rule behind.
package cvm

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"coffer/hostbuild/base"
	"coffer/hostbuild/bundle"
	"coffer/hostbuild/config"
	"coffer/hostbuild/disk"
	"coffer/hostbuild/measure"
	"coffer/hostbuild/policy"
	"coffer/hostbuild/register"
	"coffer/hostbuild/settings"
	"coffer/initramfs"
	"coffer/internal/guestconfig"
)

// GuestFeatures is SEV_FEATURES as upstream KVM and QEMU 9.1 and later set it: SNPActive.
const GuestFeatures = 0x1

// Params are the inputs of a build.
type Params struct {
	Config   *config.Config
	Settings *settings.Settings
	// TEE is the KBS's name of the evidence: "snp", or "sample" for a KBS that
	// does not know the simulated platform's roots. Only a simulated base takes it.
	TEE      string
	Progress func(stage string, done, total int64) // may be nil
	Warn     func(policy.Finding)                  // about the policy folder's own text; may be nil
	Now      time.Time
}

// Result is a finished bundle.
type Result struct {
	Path     string // absolute, of the .tgz
	Manifest *bundle.Manifest
}

// Build makes one bundle.
func Build(ctx context.Context, p Params) (res *Result, err error) {
	if p.Progress == nil {
		p.Progress = func(string, int64, int64) {}
	}
	s := p.Settings
	guestBase, err := base.Open(s.BaseDir)
	if err != nil {
		return nil, fmt.Errorf("guest base %s: %w", s.BaseDir, err)
	}
	if p.TEE == "sample" && guestBase.Platform != guestconfig.PlatformSimulated {
		return nil, fmt.Errorf("sample evidence works on the simulated platform alone, and the base %s is for %s", s.BaseDir, guestBase.Platform)
	}
	if err := checkInputs(p.Config); err != nil {
		return nil, err
	}
	reg, err := register.Open(s)
	if err != nil {
		return nil, err
	}
	reg.Warn = p.Warn
	if err := reg.Check(ctx); err != nil { // before the work, not after it
		return nil, err
	}

	id, err := newID()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(s.OutputDir, 0o755); err != nil {
		return nil, fmt.Errorf("output_dir: %w", err)
	}
	work, err := os.MkdirTemp(s.OutputDir, "."+id+".")
	if err != nil {
		return nil, fmt.Errorf("output_dir: %w", err)
	}
	defer os.RemoveAll(work)
	dir := filepath.Join(work, id)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}

	key, err := newPassphrase()
	if err != nil {
		return nil, err
	}
	defer clear(key)

	root, err := buildDisks(ctx, p, guestBase, dir, key)
	if err != nil {
		return nil, err
	}

	gc := guestConfig(p, id, string(reg.CA), guestBase, root)
	p.Progress("initrd", 0, 0)
	m, err := assemble(dir, gc, guestBase, root, p)
	if err != nil {
		return nil, err
	}

	tgz := filepath.Join(work, id+".tgz")
	p.Progress("pack", 0, 0)
	if err := pack(ctx, tgz, dir, m); err != nil {
		return nil, err
	}

	p.Progress("register", 0, 0)
	rule, err := reg.RuleOf(m)
	if err != nil {
		return nil, err
	}
	undo, err := reg.AddCVM(ctx, rule, key)
	if err != nil {
		return nil, err
	}
	final := filepath.Join(s.OutputDir, id+".tgz")
	if err := os.Rename(tgz, final); err != nil {
		return nil, errors.Join(fmt.Errorf("place the bundle: %w", err), undo(context.WithoutCancel(ctx)))
	}
	if err := syncDir(s.OutputDir); err != nil {
		return nil, err
	}
	return &Result{Path: final, Manifest: m}, nil
}

// checkInputs fails early on files that are not there.
func checkInputs(c *config.Config) error {
	var errs []error
	check := func(key, path string) {
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("%s: %s is not there", key, path))
		} else if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", key, err))
		}
	}
	check("docker_archive", c.DockerArchive)
	for name, path := range c.UserConfig {
		check("user_config."+name, path)
	}
	return errors.Join(errs...)
}

func newID() (string, error) {
	b := make([]byte, 6)
	if _, err := rand.Read(b); err != nil {
		return "", err
	}
	return "cvm_" + hex.EncodeToString(b), nil
}

// newPassphrase returns 128 lower-case hex characters of 64 random bytes: text,
// because a KBS backed by Vault stores nothing else.
func newPassphrase() ([]byte, error) {
	b := make([]byte, 64)
	defer clear(b)
	if _, err := rand.Read(b); err != nil {
		return nil, err
	}
	out := make([]byte, hex.EncodedLen(len(b)))
	hex.Encode(out, b)
	return out, nil
}

func buildDisks(ctx context.Context, p Params, b *base.Base, dir string, key []byte) (*disk.Root, error) {
	c := p.Config
	var root *disk.Root
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		root, err = disk.BuildRoot(ctx, disk.RootParams{
			Out: filepath.Join(dir, bundle.CryptRoot), Size: c.RootDriveSize, Passphrase: key,
			Archive: c.DockerArchive, ImageRef: c.DockerImage, Files: rootFiles(b),
			Time: p.Now, Rand: rand.Reader, Progress: p.Progress,
		})
		return err
	})
	for _, d := range []disk.DriveParams{
		{Out: bundle.Applog, Size: c.ApplogDriveSize, Label: "applog"},
		{Out: bundle.UserConfig, Size: c.UserConfigDriveSize, Label: "user_config", Trees: c.UserConfig},
		{Out: bundle.UserData, Size: c.UserDataDriveSize, Label: "user_data"},
	} {
		d.Out, d.Time = filepath.Join(dir, d.Out), p.Now
		g.Go(func() error {
			if err := disk.BuildDrive(ctx, d); err != nil {
				return fmt.Errorf("drive %s: %w", d.Label, err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return root, nil
}

// rootFiles is the verity root without the image.
func rootFiles(b *base.Base) []disk.File {
	const dir, regular, link = unix.S_IFDIR, unix.S_IFREG, unix.S_IFLNK
	var fs []disk.File
	for _, d := range []string{"/bin", "/dev", "/proc", "/sys", "/run", "/tmp", "/var", "/etc", "/etc/ssl", "/etc/ssl/certs",
		"/image", "/scratch", "/user_config", "/user_data", "/applog", "/vault", "/host"} {
		fs = append(fs, disk.File{Path: d, Mode: dir | 0o755})
	}
	for path, src := range b.Programs {
		fs = append(fs, disk.File{Path: path, Mode: regular | 0o755, Source: src})
	}
	fs = append(fs,
		disk.File{Path: "/etc/ssl/certs/ca-certificates.crt", Mode: regular | 0o644, Source: b.CACerts},
		disk.File{Path: "/etc/passwd", Mode: regular | 0o644, Data: []byte("root:x:0:0:root:/:/nonexistent\n")},
		disk.File{Path: "/etc/group", Mode: regular | 0o644, Data: []byte("root:x:0:\n")},
		disk.File{Path: "/etc/resolv.conf", Mode: link | 0o777, Link: guestconfig.ResolvConfPath},
		disk.File{Path: "/etc/hosts", Mode: link | 0o777, Link: guestconfig.HostsPath},
	)
	return fs
}

func guestConfig(p Params, id, ca string, b *base.Base, root *disk.Root) *guestconfig.Config {
	c := p.Config
	w := c.Workload
	w.ImageName, w.ImageDigest = root.Image.Name, root.Image.Digest
	return &guestconfig.Config{
		Version: guestconfig.Version, CVMID: id, Platform: b.Platform, TEE: p.TEE, BuildTime: p.Now.Unix(),
		KBS: guestconfig.KBS{URL: p.Settings.KBSGuestURL, CA: ca, KeyPath: "keys/root/" + id, CanaryPath: "keys/canary/" + id},
		Disk: guestconfig.Disk{
			Serial: "crypt_root", HeaderSHA256: root.HeaderSHA256, DataOffset: root.DataOffset, PayloadSize: root.PayloadSize,
			Verity: root.Verity, Scratch: root.Scratch,
		},
		Network: c.Network, Attestation: c.Attestation, Workload: w,
	}
}

// assemble writes all files but the disks, and predicts the launch digests.
func assemble(dir string, gc *guestconfig.Config, b *base.Base, root *disk.Root, p Params) (*bundle.Manifest, error) {
	doc, err := gc.Marshal()
	if err != nil {
		return nil, err
	}
	if err := writeInitrd(filepath.Join(dir, bundle.Initrd), b.Initrd, doc); err != nil {
		return nil, fmt.Errorf("initrd: %w", err)
	}
	for src, name := range map[string]string{b.Kernel: bundle.Kernel, b.OVMF: bundle.OVMF} {
		if err := copyFile(filepath.Join(dir, name), src); err != nil {
			return nil, err
		}
	}
	m := &bundle.Manifest{
		Version: 1, CVMID: gc.CVMID, Platform: gc.Platform, TEE: gc.TEE, Created: p.Now.UTC().Truncate(time.Second),
		Cmdline: bundle.Cmdline(gc.Platform, gc.CVMID), GuestFeatures: fmt.Sprintf("%#x", GuestFeatures),
		Base:  bundle.Base{ID: b.ID, KernelVersion: b.KernelVersion},
		Image: bundle.Image{Name: root.Image.Name, Digest: root.Image.Digest, ConfigDigest: root.Image.ConfigDigest, DiffIDs: root.Image.DiffIDs},
		Disk:  gc.Disk, KBS: bundle.KBS{URL: gc.KBS.URL, KeyPath: gc.KBS.KeyPath, CanaryPath: gc.KBS.CanaryPath},
		Network: gc.Network, Attestation: gc.Attestation,
	}
	for _, pk := range b.Packages {
		m.Base.Packages = append(m.Base.Packages, bundle.Package{Name: pk.Name, Version: pk.Version, SHA256: pk.SHA256})
	}
	if err := predict(dir, m, p.Config); err != nil {
		return nil, err
	}
	m.Files, err = bundle.Describe(dir, bundle.Kernel, bundle.Initrd, bundle.OVMF)
	if err != nil {
		return nil, err
	}
	script, err := bundle.LaunchScript(bundle.Launch{
		CVMID: gc.CVMID, Platform: gc.Platform, CPUModels: p.Config.CPUModels, VCPUs: p.Config.VCPUs, MemoryMiB: p.Config.MemoryMiB,
		Cmdline: m.Cmdline, Ports: gc.Network.AllowedPorts, Files: m.Files,
	})
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, bundle.LaunchVM), script, 0o755); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, bundle.Readme), bundle.ReadmeText(m), 0o644); err != nil {
		return nil, err
	}
	rest, err := bundle.Describe(dir, bundle.LaunchVM, bundle.Readme, bundle.CryptRoot, bundle.Applog, bundle.UserConfig, bundle.UserData)
	if err != nil {
		return nil, err
	}
	m.Files = append(m.Files, rest...)
	return m, bundle.WriteManifest(dir, m)
}

// predict computes a launch digest for each shape the bundle allows.
func predict(dir string, m *bundle.Manifest, c *config.Config) error {
	ovmf, err := os.ReadFile(filepath.Join(dir, bundle.OVMF))
	if err != nil {
		return err
	}
	in := measure.Input{OVMF: ovmf, HasKernel: true, HasInitrd: true, Cmdline: m.Cmdline, GuestFeatures: GuestFeatures}
	for name, sum := range map[string]*[32]byte{bundle.Kernel: &in.Kernel, bundle.Initrd: &in.Initrd} {
		if *sum, err = measure.HashFile(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	for _, cpu := range c.CPUModels {
		for _, n := range c.VCPUs {
			in.CPU, in.VCPUs = cpu, n
			r, err := measure.Digest(in)
			if err != nil {
				return fmt.Errorf("launch digest: %w", err)
			}
			m.LaunchDigests = append(m.LaunchDigests, bundle.LaunchDigest{CPU: cpu, VCPUs: n, Digest: hex.EncodeToString(r.LaunchDigest[:])})
		}
	}
	return nil
}

func writeInitrd(path, baseInitrd string, doc []byte) error {
	segment, err := initramfs.GuestSegment(doc)
	if err != nil {
		return err
	}
	in, err := os.Open(baseInitrd)
	if err != nil {
		return err
	}
	defer in.Close()
	return writeFile(path, func(w io.Writer) error { return initramfs.AppendSegment(in, segment, w) })
}

func copyFile(dst, src string) error {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	return writeFile(dst, func(w io.Writer) error { _, err := io.Copy(w, in); return err })
}

func pack(ctx context.Context, path, dir string, m *bundle.Manifest) error {
	return writeFile(path, func(w io.Writer) error { return bundle.Pack(ctx, w, dir, m) })
}

// writeFile writes path through write and syncs it.
func writeFile(path string, write func(io.Writer) error) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := write(f); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return f.Sync()
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
