// Package doctor looks at a build host and tells what works, what is missing and
// what to do about it: programs by the name of their Debian or Ubuntu package,
// settings, guest base, folders, and the KBS.
//
// It changes nothing but that output_dir and cache_dir are made where they are
// not there, as a build would. A finding holds no secret.
package doctor

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"coffer/hostbuild/base"
	"coffer/hostbuild/cache"
	"coffer/hostbuild/register"
	"coffer/hostbuild/settings"
	"coffer/internal/measure"
)

// Status is how a finding counts.
type Status string

const (
	OK      Status = "ok"
	Missing Status = "missing" // a build cannot do without
	Note    Status = "note"    // it can, yet it is worth knowing
)

// Finding is one thing that was looked at.
type Finding struct {
	Name    string `json:"name"` // does not change: for programs
	Status  Status `json:"status"`
	Text    string `json:"text"`
	Do      string `json:"do,omitempty"`
	Package string `json:"package,omitempty"` // which would be installed, of Debian and Ubuntu alike
}

// Host is where to look.
type Host struct {
	Root string   // "/", or a tree made up by a test
	Path []string // folders of programs, below Root
	Now  time.Time
}

// lowSpace is less than a usual build writes.
const lowSpace = 4 << 30

// Check looks at everything. read reads the settings.
func (h Host) Check(ctx context.Context, read func() (*settings.Settings, error)) []Finding {
	fs := []Finding{h.programs("e2fsprogs", "to make and read drives", Missing, "mke2fs", "debugfs", "e2fsck", "resize2fs")}
	s, err := read()
	if err != nil {
		do := "correct the file"
		if errors.Is(err, settings.ErrNotFound) {
			do = "hostbuild init"
		}
		fs = append(fs, Finding{Name: "settings", Status: Missing, Text: err.Error(), Do: do})
		return append(fs, h.baseTools(Note)...)
	}
	fs = append(fs, Finding{Name: "settings", Status: OK, Text: s.File})
	for _, w := range s.Warnings {
		fs = append(fs, Finding{Name: "settings", Status: Note, Text: w, Do: "correct " + s.File})
	}
	b := guestBase(s)
	fs = append(fs, b...)
	need := Note
	if b[0].Status == Missing {
		need = Missing
	}
	fs = append(fs, h.baseTools(need)...)
	fs = append(fs, outputDir(s), layerCache(s))
	fs = append(fs, policyFolder(s)...)
	return append(fs, h.KBS(ctx, s)...)
}

// programs looks for the programs of one package.
func (h Host) programs(pkg, purpose string, without Status, names ...string) Finding {
	var lacking []string
	for _, name := range names {
		if !h.has(name) {
			lacking = append(lacking, name)
		}
	}
	if len(lacking) == 0 {
		return Finding{Name: pkg, Status: OK, Text: strings.Join(names, ", ")}
	}
	return Finding{Name: pkg, Status: without, Package: pkg, Do: "apt-get install " + pkg,
		Text: fmt.Sprintf("%s: not installed; needed %s", strings.Join(lacking, ", "), purpose)}
}

func (h Host) has(program string) bool {
	for _, dir := range h.Path {
		st, err := os.Stat(filepath.Join(h.Root, dir, program))
		if err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return true
		}
	}
	return false
}

// baseTools looks for what makes a guest base.
func (h Host) baseTools(without Status) []Finding {
	const purpose = "to make a guest base"
	fs := []Finding{h.programs("erofs-utils", purpose, without, "mkfs.erofs")}
	for _, f := range []Finding{h.programs("apt", purpose, without, "apt-get"), h.programs("dpkg", purpose, without, "dpkg-deb")} {
		if f.Status != OK { // nothing installs these two
			f.Package, f.Do = "", "make the guest base on Debian or Ubuntu, or take one that was made elsewhere"
		}
		fs = append(fs, f)
	}
	const keyring = "debian-archive-keyring"
	found := false
	for _, ext := range []string{".gpg", ".pgp"} {
		_, err := os.Stat(filepath.Join(h.Root, "usr/share/keyrings", keyring+ext))
		found = found || err == nil
	}
	if found {
		fs = append(fs, Finding{Name: keyring, Status: OK, Text: "the keys of Debian's archive"})
	} else {
		fs = append(fs, Finding{Name: keyring, Status: without, Package: keyring, Do: "apt-get install " + keyring,
			Text: "the keys of Debian's archive are not installed; needed " + purpose})
	}
	if id := h.distribution(); id != "debian" {
		fs = append(fs, Finding{Name: "mirror", Status: Note, Text: fmt.Sprintf("this is %q, whose apt knows no Debian archive", id),
			Do: "make the guest base with --mirror ADDRESS-OF-A-DEBIAN-ARCHIVE, or take one that was made elsewhere"})
	}
	return append(fs, h.programs("qemu-system-x86", "to run guests here, which a build does not", Note, "qemu-system-x86_64"))
}

func (h Host) distribution() string {
	f, err := os.Open(filepath.Join(h.Root, "etc/os-release"))
	if err != nil {
		return ""
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if id, ok := strings.CutPrefix(s.Text(), "ID="); ok {
			return strings.Trim(id, `"'`)
		}
	}
	return ""
}

// guestBase is one finding, or two: base and firmware.
func guestBase(s *settings.Settings) []Finding {
	b, err := base.Open(s.BaseDir)
	if err != nil {
		return []Finding{{Name: "base", Status: Missing, Text: err.Error(), Do: "`make base` in Coffer's sources, or `hostbuild base build`; base_dir of the settings names it"}}
	}
	fs := []Finding{{Name: "base", Status: OK, Text: fmt.Sprintf("%s: for %s, kernel %s", b.Dir, b.Platform, b.KernelVersion)}}
	if b.Platform == base.PlatformSimulated {
		fs = append(fs, Finding{Name: "base", Status: Note, Text: "guests of this base are simulated: nothing about them is confidential", Do: "base_dir: a base for snp"})
	}
	firmware := b.OVMF
	if s.OVMF != "" {
		firmware = s.OVMF
	}
	if _, err := measure.ReadOVMF(firmware); err != nil {
		return append(fs, Finding{Name: "firmware", Status: Missing, Text: err.Error(), Do: "leave ovmf out of the settings, or name an OVMF.amdsev.fd"})
	}
	return append(fs, Finding{Name: "firmware", Status: OK, Text: firmware + " checks kernel, initrd and command line"})
}

func outputDir(s *settings.Settings) Finding {
	const name = "output_dir"
	if err := os.MkdirAll(s.OutputDir, 0o755); err != nil {
		return Finding{Name: name, Status: Missing, Text: err.Error(), Do: "make it, or set another output_dir"}
	}
	if err := unix.Access(s.OutputDir, unix.W_OK|unix.X_OK); err != nil {
		return Finding{Name: name, Status: Missing, Text: fmt.Sprintf("%s: %v", s.OutputDir, err), Do: "chown it to the user who builds, or set another output_dir"}
	}
	var st unix.Statfs_t
	if err := unix.Statfs(s.OutputDir, &st); err == nil {
		if free := int64(st.Bavail) * st.Bsize; free < lowSpace {
			return Finding{Name: name, Status: Note, Text: fmt.Sprintf("%s has %d MiB free; a bundle needs what its image has, and more", s.OutputDir, free>>20), Do: "free some, or set another output_dir"}
		}
	}
	return Finding{Name: name, Status: OK, Text: s.OutputDir}
}

func layerCache(s *settings.Settings) Finding {
	const name = "cache_dir"
	if s.CacheSize == 0 {
		return Finding{Name: name, Status: Note, Text: "there is no cache: every build converts every layer", Do: "cache_size_gb: 20"}
	}
	if _, err := cache.Open(s.CacheDir); err != nil {
		return Finding{Name: name, Status: Note, Text: err.Error(), Do: "builds go on without it, and take longer"}
	}
	return Finding{Name: name, Status: OK, Text: s.CacheDir}
}

func policyFolder(s *settings.Settings) []Finding {
	const name = "policy_dir"
	rules, err := register.Rules(s.PolicyDir)
	if err == nil {
		err = unix.Access(s.PolicyDir, unix.W_OK|unix.X_OK)
	}
	if err != nil {
		return []Finding{{Name: name, Status: Missing, Text: fmt.Sprintf("%s: %v", s.PolicyDir, err), Do: "make it, writable by the user who builds; policy_dir of the settings names it"}}
	}
	fs := []Finding{{Name: name, Status: OK, Text: fmt.Sprintf("%s: rules of %d CVMs", s.PolicyDir, len(rules))}}
	_, findings, err := register.Text(s.PolicyDir)
	if err != nil {
		return append(fs, Finding{Name: name, Status: Missing, Text: err.Error(), Do: "correct the file"})
	}
	for _, f := range findings {
		fs = append(fs, Finding{Name: name, Status: Note, Text: fmt.Sprintf("policy.rego, %s", f), Do: "docs/kbs.md, \"The policy folder\""})
	}
	return fs
}

// Healthy says whether nothing is missing.
func Healthy(fs []Finding) bool {
	for _, f := range fs {
		if f.Status == Missing {
			return false
		}
	}
	return true
}
