// Package cvm turns a CONFIG.yaml and a docker archive into a bundle: it writes
// the disks, predicts the launch digests, gives key and rule to the KBS and packs
// the archive, in that order.
//
// It needs no root, no device and no VM. A build that fails leaves no bundle
// under its final name, no key and no rule behind. One that is killed leaves a
// work folder, and the next build in the same output folder clears up after it.
//
// Verify makes the same again from the inputs, without a key and without a KBS.
package cvm

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"coffer/hostbuild/base"
	"coffer/hostbuild/bundle"
	"coffer/hostbuild/cache"
	"coffer/hostbuild/config"
	"coffer/hostbuild/disk"
	"coffer/hostbuild/disk/luks2"
	"coffer/hostbuild/policy"
	"coffer/hostbuild/register"
	"coffer/hostbuild/settings"
	"coffer/initramfs"
	"coffer/internal/guestconfig"
	"coffer/internal/measure"
)

// Params are the inputs of a build.
type Params struct {
	Config   *config.Config
	Settings *settings.Settings
	// TEE is the KBS's name of the evidence: "snp", or "sample" for a KBS that
	// does not know the simulated platform's roots. Only a simulated base takes it.
	TEE      string
	Progress func(stage string, done, total int64) // may be nil
	Warn     func(policy.Finding)                  // about the policy folder's own text; may be nil
	Now      time.Time                             // the bundle's time; it counts in whole seconds

	rand io.Reader // of tests; nil: crypto/rand
}

// Result is a finished bundle.
type Result struct {
	Path     string // absolute, of the .tgz
	Manifest *bundle.Manifest
	Warnings []string
}

// Build makes one bundle.
func Build(ctx context.Context, p Params) (*Result, error) {
	p = p.withDefaults()
	s := p.Settings
	guestBase, err := openBase(p)
	if err != nil {
		return nil, err
	}
	if err := checkGPUBase(p.Config, guestBase); err != nil {
		return nil, err
	}
	in, err := checkInputs(p.Config, s)
	if err != nil {
		return nil, err
	}
	if _, err := readIDKey(s.IDKey); err != nil {
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
	if err := checkGPUKBS(ctx, p.Config, reg); err != nil {
		return nil, err
	}
	id, err := newID(p.rand)
	if err != nil {
		return nil, err
	}
	if err := checkGuestConfig(p, id, string(reg.CA), guestBase, in); err != nil {
		return nil, err
	}
	w, err := newWork(ctx, s.OutputDir, id, reg)
	if err != nil {
		return nil, fmt.Errorf("output_dir: %w", err)
	}
	defer w.close()
	store, warnings := openCache(s)
	if in.kit != nil {
		if shut := in.kit.ShutPort(p.Config.Network.AllowedPorts, p.Config.Network.AllowedOutPorts); shut != "" {
			warnings = append(warnings, shut)
		}
	}

	key, err := newPassphrase(p.rand)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	m, cacheErr, err := pack(ctx, p, guestBase, string(reg.CA), w, key, store, in)
	if err != nil {
		return nil, err
	}
	if cacheErr != nil {
		warnings = append(warnings, fmt.Sprintf("the image is not cached: %v", cacheErr))
	}

	p.Progress("register", 0, 0)
	rule, err := reg.RuleOf(m)
	if err != nil {
		return nil, err
	}
	if err := w.registering(); err != nil {
		return nil, err
	}
	resources := map[string][]byte{m.KBS.KeyPath: key, m.KBS.CanaryPath: []byte(id)}
	if m.KBS.VaultKeyPath != "" {
		vault, err := newPassphrase(p.rand)
		if err != nil {
			return nil, err
		}
		defer clear(vault)
		resources[m.KBS.VaultKeyPath] = vault
	}
	if err := reg.AddCVM(ctx, rule, resources); err != nil {
		return nil, err
	}
	final := filepath.Join(s.OutputDir, id+".tgz")
	if err := os.Rename(w.tgz(), final); err != nil {
		return nil, errors.Join(fmt.Errorf("place the bundle: %w", err), reg.ForgetCVM(context.WithoutCancel(ctx), rule))
	}
	if store != nil {
		if _, err := store.Prune(s.CacheSize); err != nil {
			warnings = append(warnings, err.Error())
		}
	}
	return &Result{Path: final, Manifest: m, Warnings: warnings}, nil
}

func (p Params) withDefaults() Params {
	if p.Progress == nil {
		p.Progress = func(string, int64, int64) {}
	}
	if p.rand == nil {
		p.rand = rand.Reader
	}
	p.Now = p.Now.UTC().Truncate(time.Second)
	return p
}

func openBase(p Params) (*base.Base, error) {
	dir := p.Settings.BaseDir
	b, err := base.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("guest base %s: %w", dir, err)
	}
	if p.TEE == "sample" && b.Platform != guestconfig.PlatformSimulated {
		return nil, fmt.Errorf("sample evidence works on the simulated platform alone, and the base %s is for %s", dir, b.Platform)
	}
	if err := checkKernel(b.KernelVersion, p.Config.RootCompression); err != nil {
		return nil, fmt.Errorf("guest base %s: %w", dir, err)
	}
	if p.Settings.OVMF != "" {
		b.OVMF = p.Settings.OVMF
	}
	if _, err := measure.ReadOVMF(b.OVMF); err != nil {
		return nil, err
	}
	return b, nil
}

// checkKernel fails where a guest's kernel cannot read its root.
func checkKernel(version, compression string) error {
	var major, minor int
	if _, err := fmt.Sscanf(version, "%d.%d", &major, &minor); compression == "zstd" && (err != nil || major < 6 || major == 6 && minor < 10) {
		return fmt.Errorf("root_compression: its kernel is %s, and EROFS reads zstd from 6.10 on: choose lz4 or none", version)
	}
	return nil
}

// openCache opens the cache of layers. Without it builds only take longer.
func openCache(s *settings.Settings) (*cache.Cache, []string) {
	if s.CacheSize == 0 {
		return nil, nil
	}
	c, err := cache.Open(s.CacheDir)
	if err != nil {
		return nil, []string{err.Error()}
	}
	return c, nil
}

func newID(rand io.Reader) (string, error) {
	b := make([]byte, 6)
	if _, err := io.ReadFull(rand, b); err != nil {
		return "", err
	}
	return "cvm_" + hex.EncodeToString(b), nil
}

// newPassphrase returns 128 lower-case hex characters of 64 random bytes: text,
// because a KBS backed by Vault stores nothing else.
func newPassphrase(rand io.Reader) ([]byte, error) {
	b := make([]byte, 64)
	defer clear(b)
	if _, err := io.ReadFull(rand, b); err != nil {
		return nil, err
	}
	out := make([]byte, hex.EncodedLen(len(b)))
	hex.Encode(out, b)
	return out, nil
}

// pack writes the whole bundle: crypt_root straight into the archive, beside it
// the small drives into the work folder, and then all the rest.
func pack(ctx context.Context, p Params, b *base.Base, ca string, w *work, key []byte, store *cache.Cache, in inputs) (m *bundle.Manifest, cacheErr, err error) {
	// user_config holds private keys of the site: the bundle is for its owner alone.
	f, err := os.OpenFile(w.tgz(), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	a, err := bundle.NewArchive(f, w.id, p.Now)
	if err != nil {
		return nil, nil, err
	}
	member := a.NewMember(bundle.CryptRoot, 0o644)
	root, err := buildDisks(ctx, p, b, w, key, member, store, in)
	if err != nil {
		return nil, nil, err
	}
	if err := in.checkImage(root.Image.PythonModules); err != nil {
		return nil, nil, err
	}
	p.Progress("pack", 0, 0)
	cryptRoot, err := member.Close()
	if err != nil {
		return nil, nil, err
	}
	gc := guestConfig(p, w.id, ca, b, root, in)
	m, err = assemble(a, cryptRoot, w.dir, gc, b, root, p)
	if err != nil {
		return nil, nil, err
	}
	return m, root.CacheErr, a.Close()
}

// drives describes the plain drives of a bundle, to be made in dir. The same
// inputs give the same bytes with the same e2fsprogs.
func drives(p Params, id, dir string) []disk.DriveParams {
	c := p.Config
	ds := []disk.DriveParams{
		{Out: bundle.Applog, Size: c.ApplogDriveSize, Label: "applog"},
		{Out: bundle.UserConfig, Size: c.UserConfigDriveSize, Label: "user_config", Trees: c.UserConfig},
		{Out: bundle.UserData, Size: c.UserDataDriveSize, Label: "user_data"},
	}
	for i := range ds {
		d := &ds[i]
		sum := sha256.Sum256([]byte(id + " " + d.Label))
		d.Out, d.Time, d.UUID = filepath.Join(dir, d.Out), p.Now, luks2.UUID([16]byte(sum[:]))
	}
	return ds
}

func rootParams(p Params, b *base.Base, temp string, in inputs) disk.RootParams {
	c := p.Config
	return disk.RootParams{
		Temp: temp, Size: c.RootDriveSize, Archive: c.DockerArchive, ImageRef: c.DockerImage, Files: rootFiles(b, in),
		Compression: c.RootCompression, FileKeys: c.GPU != nil && c.GPU.Required, Time: p.Now, Rand: p.rand, Progress: p.Progress,
	}
}

func buildDisks(ctx context.Context, p Params, b *base.Base, w *work, key []byte, out disk.Target, store *cache.Cache, in inputs) (root *disk.Root, err error) {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		rp := rootParams(p, b, w.dir, in)
		rp.Out, rp.Passphrase, rp.Cache = out, key, store
		root, err = disk.BuildRoot(ctx, rp)
		return err
	})
	for _, d := range drives(p, w.id, w.dir) {
		g.Go(func() error {
			if err := disk.BuildDrive(ctx, d); err != nil {
				return fmt.Errorf("drive %s: %w", d.Label, err)
			}
			return nil
		})
	}
	return root, g.Wait()
}

// rootFiles is the verity root without the image.
func rootFiles(b *base.Base, in inputs) []disk.File {
	const dir, regular, link = unix.S_IFDIR, unix.S_IFREG, unix.S_IFLNK
	var fs []disk.File
	for _, d := range []string{"/bin", "/dev", "/proc", "/sys", "/run", "/tmp", "/var", "/etc", "/etc/ssl", "/etc/ssl/certs",
		"/image", "/scratch", "/user_config", "/user_data", "/applog", "/vault", "/host"} {
		fs = append(fs, disk.File{Path: d, Mode: dir | 0o755})
	}
	fs = append(fs,
		disk.File{Path: guestconfig.ProgramsPath, Mode: regular | 0o644, Source: b.Packed}, // mounted at /bin
		disk.File{Path: "/etc/ssl/certs/ca-certificates.crt", Mode: regular | 0o644, Source: b.CACerts},
		disk.File{Path: "/etc/passwd", Mode: regular | 0o644, Data: []byte("root:x:0:0:root:/:/nonexistent\n")},
		disk.File{Path: "/etc/group", Mode: regular | 0o644, Data: []byte("root:x:0:\n")},
		disk.File{Path: "/etc/resolv.conf", Mode: link | 0o777, Link: guestconfig.ResolvConfPath},
		disk.File{Path: "/etc/hosts", Mode: link | 0o777, Link: guestconfig.HostsPath},
	)
	dirs := map[string]bool{}
	for _, name := range slices.Sorted(maps.Keys(b.Root)) {
		for _, d := range parents(name) {
			if !dirs[d] && !slices.ContainsFunc(fs, func(f disk.File) bool { return f.Path == d }) {
				fs, dirs[d] = append(fs, disk.File{Path: d, Mode: dir | 0o755}), true
			}
		}
		fs = append(fs, disk.File{Path: name, Mode: regular | 0o755, Source: b.Root[name]})
	}
	if b.NVIDIA != "" { // mounted at /usr
		fs = append(fs,
			disk.File{Path: "/usr", Mode: dir | 0o755},
			disk.File{Path: guestconfig.NVIDIAPath, Mode: regular | 0o644, Source: b.NVIDIA},
			disk.File{Path: "/lib", Mode: link | 0o777, Link: "usr/lib"},
			disk.File{Path: "/lib64", Mode: link | 0o777, Link: "usr/lib64"},
		)
	}
	return append(fs, in.gpu.files...)
}

// parents are the folders above an absolute path, without the root, outermost first.
func parents(name string) (dirs []string) {
	for d := path.Dir(name); d != "/"; d = path.Dir(d) {
		dirs = append(dirs, d)
	}
	slices.Reverse(dirs)
	return dirs
}

func guestConfig(p Params, id, ca string, b *base.Base, root *disk.Root, in inputs) *guestconfig.Config {
	c := p.Config
	api := c.API
	if c.GPU != nil {
		api.Resources = append(slices.Clone(api.Resources), c.GPU.Resources...)
	}
	w := c.Workload
	w.ImageName, w.ImageDigest = root.Image.Name, root.Image.Digest
	w.Profile = c.WorkloadProfile()
	return &guestconfig.Config{
		Version: guestconfig.Version, CVMID: id, Platform: b.Platform, TEE: p.TEE, BuildTime: p.Now.Unix(),
		KBS: guestconfig.KBS{URL: p.Settings.KBSGuestURL, CA: ca, KeyPath: policy.KeyPath(id), CanaryPath: policy.CanaryPath(id)},
		Disk: guestconfig.Disk{
			Serial: "crypt_root", HeaderSHA256: root.HeaderSHA256, DataOffset: root.DataOffset, PayloadSize: root.PayloadSize,
			Verity: root.Verity, Scratch: root.Scratch,
		},
		Network: c.Network, Attestation: c.Attestation, Workload: w, UserConfig: in.pinned, Peers: c.Peers, API: api,
		GPU: gpuGuard(c, id, in.gpu.pins, b), VCEKs: in.vceks, ACPITables: c.ACPITables,
	}
}

// checkGuestConfig finds what a guest would refuse of config and settings, before
// there is a disk: one that is made up stands in for it.
func checkGuestConfig(p Params, id, ca string, b *base.Base, in inputs) error {
	zeros := strings.Repeat("0", 64)
	madeUp := &disk.Root{
		HeaderSHA256: zeros, DataOffset: luks2.DataOffset, PayloadSize: 1 << 30,
		Verity:  guestconfig.Verity{RootHash: zeros, Salt: zeros, DataBlocks: 1, HashStartBlock: 2},
		Scratch: guestconfig.Scratch{Offset: 1 << 20, Size: 1 << 20},
	}
	madeUp.Image.Name, madeUp.Image.Digest = "image", "sha256:"+zeros
	return guestConfig(p, id, ca, b, madeUp, in).Validate()
}

// assemble packs all files but crypt_root, and predicts the launch digests.
func assemble(a *bundle.Archive, cryptRoot bundle.File, dir string, gc *guestconfig.Config, b *base.Base, root *disk.Root, p Params) (*bundle.Manifest, error) {
	m := &bundle.Manifest{
		Version: 1, CVMID: gc.CVMID, Platform: gc.Platform, TEE: gc.TEE, Created: p.Now,
		Cmdline: bundle.Cmdline(gc.Platform, gc.CVMID, gc.GPU != nil), GuestFeatures: fmt.Sprintf("%#x", measure.DefaultGuestFeatures),
		Base:  bundle.Base{ID: b.ID, KernelVersion: b.KernelVersion},
		Image: bundle.Image{Name: root.Image.Name, Digest: root.Image.Digest, ConfigDigest: root.Image.ConfigDigest, DiffIDs: root.Image.DiffIDs},
		Disk:  gc.Disk, KBS: kbsOf(gc),
		KDS: gc.API.KDS, Network: gc.Network, Attestation: gc.Attestation, MinTCB: p.Config.MinTCB,
		UserConfig: bundle.UserConfigPin{Integrity: gc.UserConfig.Integrity, Digest: gc.UserConfig.Files.Digest()},
		Files:      []bundle.File{cryptRoot},
	}
	if p.Config.GPU != nil {
		m.KBS.GPUResources = p.Config.GPU.Resources
	}
	for _, pk := range b.Packages {
		m.Base.Packages = append(m.Base.Packages, bundle.Package{Name: pk.Name, Version: pk.Version, SHA256: pk.SHA256})
	}
	initrd, err := makeInitrd(gc, b)
	if err != nil {
		return nil, err
	}
	add := func(f bundle.File, err error) error {
		m.Files = append(m.Files, f)
		return err
	}
	addBytes := func(name string, mode int64, data []byte) error {
		return add(a.Add(name, mode, bytes.NewReader(data), int64(len(data))))
	}
	err = cmp.Or(
		add(a.AddFile(bundle.OVMF, 0o644, b.OVMF)),
		add(a.AddFile(bundle.Kernel, 0o644, b.Kernel)),
		addBytes(bundle.Initrd, 0o644, initrd),
	)
	if err != nil {
		return nil, err
	}
	if m.LaunchDigests, err = predict(m, b.OVMF, p.Config.CPUModels, p.Config.VCPUs); err != nil {
		return nil, err
	}
	blocks, err := signShapes(m, p.Settings.IDKey)
	if err != nil {
		return nil, err
	}
	script, err := bundle.LaunchScript(bundle.Launch{
		CVMID: gc.CVMID, Platform: gc.Platform, CPUModels: p.Config.CPUModels, VCPUs: p.Config.VCPUs, MemoryMiB: p.Config.MemoryMiB,
		Cmdline: m.Cmdline, Ports: gc.Network.AllowedPorts, Files: m.Files, IDBlocks: blocks,
	})
	if err != nil {
		return nil, err
	}
	err = cmp.Or(
		addBytes(bundle.LaunchVM, 0o755, script),
		addBytes(bundle.Readme, 0o644, bundle.ReadmeText(m)),
		add(a.AddFile(bundle.UserConfig, 0o644, filepath.Join(dir, bundle.UserConfig))),
		add(a.AddFile(bundle.UserData, 0o644, filepath.Join(dir, bundle.UserData))),
		add(a.AddFile(bundle.Applog, 0o644, filepath.Join(dir, bundle.Applog))),
	)
	if err != nil {
		return nil, err
	}
	doc, err := m.Marshal()
	if err != nil {
		return nil, err
	}
	_, err = a.Add(bundle.ManifestName, 0o644, bytes.NewReader(doc), int64(len(doc)))
	return m, err
}

// kbsOf is what the guest config says of the KBS.
func kbsOf(gc *guestconfig.Config) bundle.KBS {
	k := bundle.KBS{URL: gc.KBS.URL, KeyPath: gc.KBS.KeyPath, CanaryPath: gc.KBS.CanaryPath}
	if gc.GPU != nil {
		k.VaultKeyPath = gc.GPU.VaultKeyPath
	}
	return k
}

// makeInitrd appends the guest config to the base's initrd.
func makeInitrd(gc *guestconfig.Config, b *base.Base) ([]byte, error) {
	doc, err := gc.Marshal()
	if err != nil {
		return nil, err
	}
	segment, err := initramfs.GuestSegment(doc)
	if err != nil {
		return nil, fmt.Errorf("initrd: %w", err)
	}
	in, err := os.Open(b.Initrd)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	var out bytes.Buffer
	if err := initramfs.AppendSegment(in, segment, &out); err != nil {
		return nil, fmt.Errorf("initrd: %w", err)
	}
	return out.Bytes(), nil
}

// predict computes a launch digest for each shape the bundle allows, from the
// manifest's command line and digests of kernel and initrd.
func predict(m *bundle.Manifest, ovmfFile string, cpus []string, vcpus []int) ([]bundle.LaunchDigest, error) {
	ovmf, err := os.ReadFile(ovmfFile)
	if err != nil {
		return nil, err
	}
	features, err := strconv.ParseUint(m.GuestFeatures, 0, 64)
	if err != nil {
		return nil, fmt.Errorf("guest_features: %w", err)
	}
	in := measure.Input{OVMF: ovmf, HasKernel: true, HasInitrd: true, Cmdline: m.Cmdline, GuestFeatures: features}
	for name, sum := range map[string]*[32]byte{bundle.Kernel: &in.Kernel, bundle.Initrd: &in.Initrd} {
		i := slices.IndexFunc(m.Files, func(f bundle.File) bool { return f.Name == name })
		if i < 0 {
			return nil, fmt.Errorf("the manifest lacks %s", name)
		}
		if n, err := hex.Decode(sum[:], []byte(m.Files[i].SHA256)); err != nil || n != len(sum) {
			return nil, fmt.Errorf("the manifest's digest of %s is none", name)
		}
	}
	var out []bundle.LaunchDigest
	for _, cpu := range cpus {
		for _, n := range vcpus {
			in.CPU, in.VCPUs = cpu, n
			r, err := measure.Digest(in)
			if err != nil {
				return nil, fmt.Errorf("launch digest: %w", err)
			}
			out = append(out, bundle.LaunchDigest{CPU: cpu, VCPUs: n, Digest: hex.EncodeToString(r.LaunchDigest[:])})
		}
	}
	return out, nil
}
