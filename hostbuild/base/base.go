// Package base makes and opens guest bases: all that the guests of one
// platform share. A base is a folder:
//
//	vmlinuz             kernel
//	initrd-base.img     init and kernel modules, see package initramfs
//	OVMF.amdsev.fd      firmware
//	bin/                programs of the verity root: agent, snpguest, containerd, ...
//	programs.erofs      the same, packed: what the guest mounts at /bin
//	root/               more files of the verity root, of a base for made-up GPUs
//	nvidia.erofs        of a base with NVIDIA's driver: what the guest mounts at /usr
//	ca-certificates.crt for the workload
//	base.json           manifest: what is here and what it was made from
//	base.lock           the packages that went in, for Params.Locked
//
// The SHA-256 of base.json is the base's ID, so a base is content-addressed:
// the same packages and programs give the same ID on every machine that has the
// same mkfs.erofs.
//
// Build needs no root and installs nothing: Debian's packages come through an
// apt configuration of its own and are unpacked in memory. Open trusts
// nothing that base.json does not cover.
//
// It knows nothing of CVMs, their configuration or their disks.
package base

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"coffer/internal/strict"
)

// Platforms a base can be for; the values of guestconfig's Platform.
const (
	PlatformSNP       = "snp"
	PlatformSimulated = "simulated"
)

// Names of a base's files.
const (
	kernelFile   = "vmlinuz"
	initrdFile   = "initrd-base.img"
	firmwareFile = "OVMF.amdsev.fd"
	caFile       = "ca-certificates.crt"
	programDir   = "bin"
	rootDir      = "root"
	programsFile = "programs.erofs"
	nvidiaFile   = "nvidia.erofs"
	manifestFile = "base.json"
	lockFile     = "base.lock"
)

// guestPrograms are in every base's bin/.
var guestPrograms = []string{"agent", "snpguest", "containerd", "containerd-shim-runc-v2", "runc"}

const manifestVersion = 1

const maxManifest = 4 << 20 // bytes of base.json or base.lock

var (
	hexDigest     = regexp.MustCompile(`^[0-9a-f]{64}$`)
	debianName    = regexp.MustCompile(`^[a-z0-9][a-z0-9.+-]+$`)
	debianVersion = regexp.MustCompile(`^[0-9][A-Za-z0-9.+:~-]*$`)
	suiteName     = regexp.MustCompile(`^[a-z][a-z0-9-]*(/[a-z][a-z-]*)?$`)
)

// ErrNotBase is wrapped by Open when a folder is not a base or was changed
// after it was built.
var ErrNotBase = errors.New("not an intact base")

// Package is one Debian package that went into a base.
type Package struct {
	Role    string `json:"role"` // "kernel", "firmware", "ca"; those of a driver are named by what they are
	Name    string `json:"name"`
	Version string `json:"version"`
	SHA256  string `json:"sha256"` // hex, of the .deb
	// Suite is where the package was found. It stands in the lock only: the
	// same package found elsewhere makes the same base.
	Suite string `json:"suite,omitempty"`
}

// Module is one kernel module of the initrd, in load order.
type Module struct {
	Name     string `json:"name"`
	SHA256   string `json:"sha256"`
	Optional bool   `json:"optional,omitempty"`
	Feature  string `json:"feature,omitempty"` // only guests that use it load the module
}

// Base is an opened base. Paths are absolute or relative as Dir is.
type Base struct {
	Dir      string
	ID       string // hex SHA-256 of base.json
	Platform string // PlatformSNP or PlatformSimulated
	Image    string // name in package images

	Kernel   string            // path of vmlinuz
	Initrd   string            // path of the base initrd
	OVMF     string            // path of the firmware
	CACerts  string            // path of the CA certificates, PEM
	Programs map[string]string // path in the guest, "/bin/agent", to path here
	Packed   string            // path of the EROFS that holds the programs and becomes the guest's /bin
	Root     map[string]string // further files of the verity root, as Programs
	NVIDIA   string            // path of the EROFS that holds NVIDIA's driver and becomes the guest's /usr; "": there is none
	GPU      *GPU              // nil: guests have no GPUs

	KernelVersion string // as uname -r prints it
	Packages      []Package
	Modules       []Module
	SHA256        map[string]string // path relative to Dir to hex digest
}

// GPU says which GPUs a base's guests can have.
type GPU struct {
	Driver    string   `json:"driver"`              // version of kernel modules and libraries
	Modules   []Module `json:"modules,omitempty"`   // in load order, beside those of the initrd
	Libraries []string `json:"libraries,omitempty"` // what containers get, by SONAME
	// Roots of made-up GPUs, PEM; of a simulated base alone.
	DeviceRoot string `json:"device_root,omitempty"`
	RIMRoot    string `json:"rim_root,omitempty"`
}

// manifest is base.json.
type manifest struct {
	Version       int       `json:"version"`
	Platform      string    `json:"platform"`
	Image         string    `json:"image"`
	KernelVersion string    `json:"kernel_version"`
	InitSHA256    string    `json:"init_sha256"`
	CPIOSHA256    string    `json:"initrd_cpio_sha256"` // the initrd before compression
	Packages      []Package `json:"packages"`
	Modules       []Module  `json:"modules"`
	GPU           *GPU      `json:"gpu,omitempty"`
	Files         []file    `json:"files"`
}

type file struct {
	Path   string `json:"path"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

// Open reads base.json and checks every file it names.
func Open(dir string) (*Base, error) {
	data, err := strict.ReadFile(filepath.Join(dir, manifestFile), maxManifest)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w: it has no %s; make one with `hostbuild base build`", dir, ErrNotBase, manifestFile)
	}
	if err != nil {
		return nil, fmt.Errorf("open base: %w", err)
	}
	var m manifest
	if err := strict.JSON(data, &m); err != nil {
		return nil, fmt.Errorf("%s: %w: %s: %w", dir, ErrNotBase, manifestFile, err)
	}
	if m.Version != manifestVersion {
		return nil, fmt.Errorf("%s: %w: %s has version %d, this program reads %d", dir, ErrNotBase, manifestFile, m.Version, manifestVersion)
	}
	if m.Platform != PlatformSNP && m.Platform != PlatformSimulated {
		return nil, fmt.Errorf("%s: %w: platform %q is not snp or simulated", dir, ErrNotBase, m.Platform)
	}
	if m.Platform != PlatformSimulated && m.GPU != nil && m.GPU.DeviceRoot+m.GPU.RIMRoot != "" {
		return nil, fmt.Errorf("%s: %w: it is for platform %s and trusts simulated GPUs", dir, ErrNotBase, m.Platform)
	}
	b := &Base{
		Dir: dir, ID: digest(data), Platform: m.Platform, Image: m.Image,
		Kernel:        filepath.Join(dir, kernelFile),
		Initrd:        filepath.Join(dir, initrdFile),
		OVMF:          filepath.Join(dir, firmwareFile),
		CACerts:       filepath.Join(dir, caFile),
		Packed:        filepath.Join(dir, programsFile),
		Programs:      map[string]string{},
		Root:          map[string]string{},
		GPU:           m.GPU,
		KernelVersion: m.KernelVersion, Packages: m.Packages, Modules: m.Modules,
		SHA256: map[string]string{},
	}
	for _, f := range m.Files {
		if !filepath.IsLocal(f.Path) {
			return nil, fmt.Errorf("%s: %w: path %q in %s", dir, ErrNotBase, f.Path, manifestFile)
		}
		got, size, err := digestFile(filepath.Join(dir, f.Path))
		if err != nil {
			return nil, fmt.Errorf("%s: %w: %w", dir, ErrNotBase, err)
		}
		if got != f.SHA256 || size != f.Size {
			return nil, fmt.Errorf("%s: %w: %s was changed: %d bytes with SHA-256 %s, want %d with %s; build the base anew", dir, ErrNotBase, f.Path, size, got, f.Size, f.SHA256)
		}
		b.SHA256[f.Path] = got
		if name, ok := strings.CutPrefix(f.Path, programDir+"/"); ok {
			b.Programs["/"+programDir+"/"+name] = filepath.Join(dir, f.Path)
		}
		if name, ok := strings.CutPrefix(f.Path, rootDir+"/"); ok {
			b.Root["/"+name] = filepath.Join(dir, f.Path)
		}
	}
	names := []string{kernelFile, initrdFile, firmwareFile, caFile, programsFile}
	for _, program := range guestPrograms {
		names = append(names, programDir+"/"+program)
	}
	if b.SHA256[nvidiaFile] != "" {
		b.NVIDIA = filepath.Join(dir, nvidiaFile)
	}
	if b.NVIDIA != "" && b.GPU == nil {
		return nil, fmt.Errorf("%s: %w: %s says nothing about the driver in %s", dir, ErrNotBase, manifestFile, nvidiaFile)
	}
	for _, name := range names {
		if b.SHA256[name] == "" {
			return nil, fmt.Errorf("%s: %w: %s does not name %s", dir, ErrNotBase, manifestFile, name)
		}
	}
	return b, nil
}

func encode(v any) ([]byte, error) {
	data, err := json.MarshalIndent(v, "", "  ")
	return append(data, '\n'), err
}

func digest(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

func digestFile(name string) (sum string, size int64, err error) {
	f, err := os.Open(name)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	h := sha256.New()
	size, err = io.Copy(h, f)
	if err != nil {
		return "", 0, fmt.Errorf("read %s: %w", name, err)
	}
	return hex.EncodeToString(h.Sum(nil)), size, nil
}
