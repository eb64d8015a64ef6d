// Package settings reads the settings of a build host: what NVFlare's one
// argument cannot say. docs/reference.md lists the keys.
//
// The file is the first of: the one named on the command line, $COFFER_SETTINGS,
// ~/.config/coffer/hostbuild.yaml, /etc/coffer/hostbuild.yaml.
package settings

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode"

	"coffer/hostbuild/yamlcheck"
	"coffer/internal/snp"
	"coffer/internal/snp/verify"
)

// Settings are a build host's. All paths are absolute.
type Settings struct {
	File string // where they were read

	KBSURL      string // where build host and operator reach the KBS
	KBSGuestURL string // where guests reach it; KBSURL unless they differ
	KBSCA       string // PEM file, the only roots that are accepted
	AdminKey    string // PKCS#8 PEM file of the KBS's admin key
	PolicyDir   string // folder with policy.rego, the master copy

	AdminIssuer, AdminAudience string // iss and aud of admin tokens; empty: kbsclient's

	MinTCB map[string]snp.TCB // what rules ask of a guest's firmware, by product

	BaseDir   string // a guest base made by `hostbuild base build`; the installed one unless set
	OVMF      string // a firmware in place of the base's, "" for the base's
	IDKey     string // PEM file of the key that signs ID blocks, "" for none
	OutputDir string // where bundles go
	CacheDir  string // of converted layers
	CacheSize int64  // bytes that it may have; 0: no cache
	Warnings  []string
}

// ErrNotFound says that there is no settings file.
var ErrNotFound = errors.New("no settings file")

// Find returns the settings file to use; explicit may be empty.
func Find(explicit string, getenv func(string) string) (string, error) {
	if explicit != "" {
		return explicit, nil
	}
	if p := getenv("COFFER_SETTINGS"); p != "" {
		return p, nil
	}
	var tried []string
	if home, err := os.UserHomeDir(); err == nil {
		tried = append(tried, filepath.Join(home, ".config/coffer/hostbuild.yaml"))
	}
	tried = append(tried, "/etc/coffer/hostbuild.yaml")
	for _, p := range tried {
		if _, err := os.Stat(p); err == nil {
			return p, nil
		} else if !errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("settings: %w", err)
		}
	}
	return "", fmt.Errorf("%w: none of --settings, $COFFER_SETTINGS, %s, %s; `hostbuild init` writes one", ErrNotFound, tried[0], tried[len(tried)-1])
}

// Read reads the file at path.
func Read(path string) (*Settings, error) {
	doc, m, err := yamlcheck.Read(path)
	if err != nil {
		return nil, fmt.Errorf("settings: %w", err)
	}
	return build(path, doc, m)
}

// Keys lists all keys of a settings file.
func Keys() []*yamlcheck.Key {
	doc, m, err := yamlcheck.Parse("", []byte("min_tcb: {Turin: {}}"))
	if err != nil {
		panic(err) // of a constant
	}
	_, _ = build("", doc, m) // what is wrong with the values does not matter
	return doc.Asked()
}

func build(path string, doc *yamlcheck.Doc, m *yamlcheck.Map) (s *Settings, err error) {
	s = &Settings{File: path}
	kbs := m.Map("kbs")
	s.KBSURL = kbs.Required("url", "where the KBS is, such as https://kbs.example:8999")
	s.KBSGuestURL = kbs.String("guest_url", s.KBSURL)
	kbs.Required("ca", "PEM file of the authority that signed the KBS's certificate")
	s.KBSCA = file(kbs, "ca")
	s.AdminKey = file(kbs, "admin_key")
	s.AdminIssuer, s.AdminAudience = kbs.String("admin_issuer", ""), kbs.String("admin_audience", "")
	kbs.Finish()

	m.Required("policy_dir", "folder of the master copy policy.rego")
	s.PolicyDir = file(m, "policy_dir")
	if s.AdminKey == "" && s.PolicyDir != "" { // the folder as the deployment guide lays it out
		s.AdminKey = filepath.Join(s.PolicyDir, "private.key")
		if _, err := os.Stat(s.AdminKey); err != nil {
			kbs.Faultf("admin_key", "missing, and so is %s: PEM file of the KBS's admin key", s.AdminKey)
		}
	}
	s.MinTCB = minTCB(m)
	if s.BaseDir = file(m, "base_dir"); s.BaseDir == "" {
		if s.BaseDir = InstalledBase(); s.BaseDir == "" {
			m.Faultf("base_dir", "is missing, and no guest base is installed: folder of a guest base, made by `hostbuild base build`")
		}
	}
	s.OVMF, s.IDKey = file(m, "ovmf"), file(m, "id_key")
	if s.OutputDir = file(m, "output_dir"); s.OutputDir == "" {
		if s.OutputDir, err = yamlcheck.Expand("~/.local/share/coffer/bundles"); err != nil {
			return nil, fmt.Errorf("settings: output_dir is missing, and no home folder to fall back on: %w", err)
		}
	}
	if strings.ContainsFunc(s.OutputDir, unicode.IsSpace) {
		m.Faultf("output_dir", "%q holds a blank, and NVFlare reads the bundle's path only up to one", s.OutputDir)
	}
	s.CacheSize = m.Int("cache_size_gb", 20, 0, 65536) << 30
	if s.CacheDir = file(m, "cache_dir"); s.CacheDir == "" && s.CacheSize > 0 {
		if s.CacheDir, err = yamlcheck.Expand("~/.cache/coffer"); err != nil {
			s.CacheSize = 0 // no home folder, no cache
		}
	}
	m.Finish()
	s.Warnings = doc.Warnings()
	return s, doc.Err()
}

// InstalledBase is the guest base that was installed with the running program,
// "" where there is none: PREFIX/lib/coffer/base/snp beside PREFIX/bin.
func InstalledBase() string {
	program, err := os.Executable()
	if err != nil {
		return ""
	}
	return baseOf(program)
}

func baseOf(program string) string {
	dir := filepath.Join(filepath.Dir(filepath.Dir(program)), "lib/coffer/base/snp")
	if st, err := os.Stat(dir); err != nil || !st.IsDir() {
		return ""
	}
	return dir
}

// minTCB reads min_tcb; without it, the verifier's default holds.
func minTCB(m *yamlcheck.Map) map[string]snp.TCB {
	if !m.Has("min_tcb") {
		return verify.DefaultMinTCB()
	}
	products := m.Map("min_tcb")
	min := map[string]snp.TCB{}
	for _, product := range products.Keys() {
		t := products.Map(product)
		part := func(key string) uint8 { return uint8(t.Int(key, 0, 0, 255)) }
		min[product] = snp.TCB{Bootloader: part("bootloader"), TEE: part("tee"), SNP: part("snp"), Microcode: part("microcode")}
		t.Finish()
		if !slices.Contains([]string{"Milan", "Genoa", "Turin"}, product) {
			products.Faultf(product, "must be Milan, Genoa or Turin")
		}
	}
	if len(min) == 0 {
		m.Faultf("min_tcb", "names no product, so every guest would be refused; 0 accepts any version of a part")
	}
	products.Finish()
	return min
}

// file reads a file name. A relative one would depend on where NVFlare was started.
func file(m *yamlcheck.Map, key string) string {
	if p := m.String(key, ""); p != "" && !filepath.IsAbs(p) && p != "~" && !strings.HasPrefix(p, "~/") {
		m.Faultf(key, "%q must begin with / or ~/: a relative path would change its meaning with the working directory", p)
	}
	return m.Path(key)
}
