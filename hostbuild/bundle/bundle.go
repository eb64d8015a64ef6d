// Package bundle writes what a site receives: the files that belong to a
// crypt_root and its drives (launch_vm.sh, README.txt, manifest.json) and the
// archive cvm_<id>.tgz that holds them all.
//
// The names are those of NVIDIA FLARE's deployment guide. Everything in a bundle
// is readable to the host that runs it: nothing here is secret.
package bundle

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	_ "embed"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/template"
	"time"

	"coffer/hostbuild/policy"
	"coffer/internal/guestconfig"
)

// Files of a bundle, beside ManifestName.
const (
	Applog     = "applog.qcow2"
	CryptRoot  = "crypt_root.qcow2"
	Initrd     = "initrd.img"
	LaunchVM   = "launch_vm.sh"
	OVMF       = "OVMF.amdsev.fd"
	Readme     = "README.txt"
	UserConfig = "user_config.qcow2"
	UserData   = "user_data.qcow2"
	Kernel     = "vmlinuz"

	ManifestName = "manifest.json"
)

// Manifest says what a bundle is made of.
type Manifest struct {
	Version       int                     `json:"version"`
	CVMID         string                  `json:"cvm_id"`
	Platform      string                  `json:"platform"`
	TEE           string                  `json:"tee"` // of the evidence, as the KBS names it
	Created       time.Time               `json:"created"`
	Files         []File                  `json:"files"` // all but the manifest
	Cmdline       string                  `json:"cmdline"`
	LaunchDigests []LaunchDigest          `json:"launch_digests"`
	GuestFeatures string                  `json:"guest_features"`     // SEV_FEATURES, hex
	IDBlock       *IDBlock                `json:"id_block,omitempty"` // where the owner signed the launch digests
	Base          Base                    `json:"base"`
	Image         Image                   `json:"image"`
	Disk          guestconfig.Disk        `json:"disk"`
	KBS           KBS                     `json:"kbs"`
	KDS           string                  `json:"kds_url,omitempty"` // where the agent fetches chips' certificates
	Network       guestconfig.Network     `json:"network"`
	Attestation   guestconfig.Attestation `json:"attestation"`
	MinTCB        policy.TCB              `json:"min_tcb"` // the oldest firmware that gets the key
	UserConfig    UserConfigPin           `json:"user_config"`
}

// UserConfigPin says what the guest demands of user_config.qcow2.
type UserConfigPin struct {
	Integrity string `json:"integrity"`
	Digest    string `json:"digest"` // of the pinned entries, as the guest prints it
}

// File is a file of the bundle.
type File struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256,omitempty"` // of all files but crypt_root
	// PartsSHA256 is crypt_root's: of the SHA-256 of each MiB, as
	// `split -b 1M --filter=sha256sum FILE | sha256sum` has it.
	PartsSHA256 string `json:"parts_sha256,omitempty"`
}

// LaunchDigest is what the chip reports for one shape of the VM.
type LaunchDigest struct {
	CPU    string `json:"cpu"`
	VCPUs  int    `json:"vcpus"`
	Digest string `json:"digest"` // hex
}

// IDBlock says what the owner's ID blocks make every report of this CVM hold.
type IDBlock struct {
	KeyDigest string `json:"id_key_digest"` // hex, SHA-384 of the owner's public key
	ImageID   string `json:"image_id"`      // the CVM's id as 16 bytes of ASCII, hex
}

// GuestPolicy is the SNP launch policy of every bundle: SMT allowed, no
// debugging, no migration agent.
const GuestPolicy = 0x30000

// Base names the guest base and the packages in it.
type Base struct {
	ID            string    `json:"id"`
	KernelVersion string    `json:"kernel_version"`
	Packages      []Package `json:"packages"`
}

// Package is a package that went into the base.
type Package struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	SHA256  string `json:"sha256"`
}

// Image names the workload's image.
type Image struct {
	Name         string   `json:"name"`
	Digest       string   `json:"digest"`
	ConfigDigest string   `json:"config_digest"`
	DiffIDs      []string `json:"diff_ids"`
}

// KBS says where the key lies.
type KBS struct {
	URL        string `json:"url"`
	KeyPath    string `json:"key_path"`
	CanaryPath string `json:"canary_path"`

	// What is for evidence with verified GPUs alone, the canary besides.
	VaultKeyPath string   `json:"vault_key_path,omitempty"` // of /vault's key
	GPUResources []string `json:"gpu_resources,omitempty"`
}

// Cmdline returns the kernel command line of a CVM. It is measured, and carries
// hardening (facts of the words: docs/security.md) and the CVM's id alone. In a
// guest with GPUs init locks the kernel once their driver, which Debian has not
// signed, is in.
func Cmdline(platform, cvmID string, gpu bool) string {
	words := "console=ttyS0 loglevel=4 panic=-1 oops=panic mce=off random.trust_cpu=on random.trust_bootloader=off" +
		" ia32_emulation=off vsyscall=none debugfs=off efi=noruntime init_on_alloc=1 acpi_no_static_ssdt" +
		" cryptomgr.notests=1"
	if !gpu {
		words += " module.sig_enforce=1 lockdown=integrity"
	}
	if platform == guestconfig.PlatformSNP {
		words += " tsc=reliable clocksource=tsc no-kvmclock"
	} else { // QEMU 7.2 under TCG corrupts flags around the kernel's cmpxchg16b
		words += " clearcpuid=cx16"
	}
	return words + " vm_id=" + cvmID
}

//go:embed launch_vm.sh.tmpl
var launchTemplate string

// Launch is what launch_vm.sh is made from.
type Launch struct {
	CVMID     string
	Platform  string
	CPUModels []string
	VCPUs     []int
	MemoryMiB int64
	Cmdline   string
	Ports     []guestconfig.Port
	Files     []File          // of these, the measured ones are checked at the start
	IDBlocks  []SignedIDBlock // one for each shape, or none
}

// SignedIDBlock is the ID block of one shape of the VM, as QEMU takes it.
type SignedIDBlock struct {
	CPU         string
	VCPUs       int
	Block, Auth string // base64
}

// LaunchScript renders launch_vm.sh.
func LaunchScript(l Launch) ([]byte, error) {
	var tcp, udp []string
	for _, p := range l.Ports {
		if p.Proto == "udp" {
			udp = append(udp, strconv.Itoa(int(p.Port)))
		} else {
			tcp = append(tcp, strconv.Itoa(int(p.Port)))
		}
	}
	var vcpus, sums []string
	for _, n := range l.VCPUs {
		vcpus = append(vcpus, strconv.Itoa(n))
	}
	for _, f := range l.Files {
		if f.Name == Kernel || f.Name == Initrd || f.Name == OVMF {
			sums = append(sums, f.SHA256+"  "+f.Name)
		}
	}
	for _, s := range append([]string{l.CVMID, l.Platform, l.Cmdline}, l.CPUModels...) {
		if strings.ContainsAny(s, "'\n") {
			return nil, fmt.Errorf("launch_vm.sh: %q cannot stand in a shell script", s)
		}
	}
	mac := sha256.Sum256([]byte(l.CVMID)) // two bundles on one bridge must differ
	t := template.Must(template.New("launch_vm.sh").Funcs(template.FuncMap{
		"join": func(s []string) string { return strings.Join(s, " ") },
	}).Parse(launchTemplate))
	var b bytes.Buffer
	err := t.Execute(&b, map[string]any{
		"CVMID": l.CVMID, "Platform": l.Platform, "Simulated": l.Platform == guestconfig.PlatformSimulated,
		"CPUModels": l.CPUModels, "VCPUs": vcpus, "Cmdline": l.Cmdline, "TCPPorts": tcp, "UDPPorts": udp,
		"MemoryMiB": l.MemoryMiB, "MAC": fmt.Sprintf("52:54:00:%02x:%02x:%02x", mac[0], mac[1], mac[2]),
		"Policy": fmt.Sprintf("%#x", uint64(GuestPolicy)), "IDBlocks": l.IDBlocks, "Sums": strings.Join(sums, "\n"),
	})
	return b.Bytes(), err
}

// ReadmeText is README.txt of a bundle.
func ReadmeText(m *Manifest) []byte {
	var b strings.Builder
	fmt.Fprintf(&b, `%s: a confidential VM, made by Coffer

Start it:       ./launch_vm.sh            (./launch_vm.sh --help, --check, --print)
Its console:    the terminal, and console.log

applog.qcow2       what the workload and the attestation log wrote; plain ext4
crypt_root.qcow2   the encrypted root; its key comes from the KBS at
                   %s
                   and only for the launch digests below
user_config.qcow2  the workload's configuration; plain ext4 (integrity: %s)
user_data.qcow2    place for the site's data; plain ext4, grow it as you like
initrd.img vmlinuz OVMF.amdsev.fd   measured at launch: a changed byte means no key
launch_vm.sh       starts the VM
manifest.json      digests and versions of all of it

To look into a drive without root:
    qemu-img convert -O raw applog.qcow2 applog.raw && debugfs -R 'ls -l /' applog.raw

A boot that fails ends with one line on the console:
    coffer: FAILED phase=<phase> code=<E_...> detail="..."

Launch digests (platform %s):
`, m.CVMID, m.KBS.URL, m.UserConfig.Integrity, m.Platform)
	for _, d := range m.LaunchDigests {
		fmt.Fprintf(&b, "    %-14s %3d vCPU  %s\n", d.CPU, d.VCPUs, d.Digest)
	}
	return []byte(b.String())
}

// Marshal writes manifest.json.
func (m *Manifest) Marshal() ([]byte, error) {
	slices.SortFunc(m.Files, func(a, b File) int { return cmp.Compare(a.Name, b.Name) })
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return nil, err
	}
	return append(b, '\n'), nil
}

// WriteManifest writes manifest.json into dir.
func WriteManifest(dir string, m *Manifest) error {
	b, err := m.Marshal()
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, ManifestName), b, 0o644)
}

// ReadManifest reads the manifest of an unpacked bundle.
func ReadManifest(dir string) (*Manifest, error) {
	f, err := os.Open(filepath.Join(dir, ManifestName))
	if err != nil {
		return nil, fmt.Errorf("%s is no bundle: %w", dir, err)
	}
	defer f.Close()
	return ParseManifest(f.Name(), f)
}

// ParseManifest reads manifest.json; name is for messages.
func ParseManifest(name string, r io.Reader) (*Manifest, error) {
	var m Manifest
	if err := json.NewDecoder(io.LimitReader(r, 16<<20)).Decode(&m); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return &m, nil
}
