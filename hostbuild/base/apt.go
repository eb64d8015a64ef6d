package base

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"coffer/images"
)

// Mirror is where Debian's packages come from.
type Mirror struct {
	Main     string // the archive; holds the suites without "-security"
	Security string // the security archive; may be empty, then its suites are passed over
	Keyring  string // the Debian archive keyring
}

var (
	// ErrNoMirror says that no Debian mirror is known.
	ErrNoMirror = errors.New("no Debian mirror is known")
	// ErrLocked says that a locked package cannot be had.
	ErrLocked = errors.New("a locked package cannot be had")
)

const securitySuffix = "-security"

// findMirror fills what m lacks from the machine: the keyring from its usual
// places, the addresses from the machine's own apt sources.
func findMirror(ctx context.Context, m Mirror) (Mirror, error) {
	if m.Keyring == "" {
		for _, name := range []string{"debian-archive-keyring.gpg", "debian-archive-keyring.pgp"} {
			path := filepath.Join("/usr/share/keyrings", name)
			if _, err := os.Stat(path); err == nil {
				m.Keyring = path
				break
			}
		}
	}
	if m.Keyring == "" {
		return m, errors.New("the Debian archive keyring is missing: install the package debian-archive-keyring")
	}
	for _, v := range []string{m.Main, m.Security, m.Keyring} {
		if strings.ContainsAny(v, " \t\r\n[]") { // would end a word in sources.list
			return m, fmt.Errorf("mirror or keyring %q holds a space or bracket", v)
		}
	}
	if m.Main != "" {
		return m, nil
	}
	targets, err := run(ctx, "", "apt-get", "indextargets", "--format", "$(LABEL)|$(REPO_URI)", "Created-By: Packages")
	if err != nil {
		return m, err
	}
	m.Main, m.Security = parseTargets(targets)
	if m.Main == "" {
		return m, fmt.Errorf("%w: this machine's apt has no index of a Debian archive. On Debian run `apt-get update` first; "+
			"elsewhere name one by --mirror", ErrNoMirror)
	}
	return m, nil
}

// parseTargets reads lines LABEL|URI as apt prints them. The labels are those
// of the archives' signed Release files.
func parseTargets(lines []byte) (main, security string) {
	for line := range strings.Lines(string(lines)) {
		label, uri, _ := strings.Cut(strings.TrimSpace(line), "|")
		switch {
		case label == "Debian" && main == "":
			main = uri
		case label == "Debian-Security" && security == "":
			security = uri
		}
	}
	return main, security
}

// apt fetches packages from one mirror, with a configuration, lists and cache
// of its own below dir.
type apt struct {
	dir    string
	mirror Mirror
	log    func(format string, a ...any)
	suites map[string]suite // those that were looked for
}

type suite struct {
	config string // apt's configuration file
	err    error
}

// open makes the lists of a SUITE or SUITE/COMPONENT, once.
func (a *apt) open(ctx context.Context, name string) (config string, err error) {
	if s, ok := a.suites[name]; ok {
		return s.config, s.err
	}
	defer func() { a.suites[name] = suite{config, err} }()
	release, component, ok := strings.Cut(name, "/")
	if !ok {
		component = "main"
	}
	uri := a.mirror.Main
	if strings.HasSuffix(release, securitySuffix) {
		if uri = a.mirror.Security; uri == "" {
			return "", fmt.Errorf("suite %s: no address of a security archive is known", name)
		}
	}
	dir := filepath.Join(a.dir, name)
	for _, d := range []string{"lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return "", err
		}
	}
	config = filepath.Join(dir, "apt.conf")
	for path, text := range map[string]string{
		config:                             aptConfig(dir),
		filepath.Join(dir, "status"):       "",
		filepath.Join(dir, "sources.list"): sourcesList(uri, release, component, a.mirror.Keyring),
	} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return "", err
		}
	}
	a.log("reading the package index of %s", name)
	if _, err := run(ctx, dir, "apt-get", "-c", config, "-qq", "--error-on=any", "update"); err != nil {
		return "", fmt.Errorf("suite %s: %w", name, err)
	}
	return config, nil
}

// aptConfig is read after the machine's own configuration, of which it keeps
// how to reach the network (proxies) and replaces what is trusted, asked for
// and written to.
func aptConfig(dir string) string {
	return strings.ReplaceAll(`#clear APT::Architectures;
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
APT::Architecture "amd64";
APT::Architectures { "amd64"; };
APT::Sandbox::User "root";
APT::Get::AllowUnauthenticated "false";
Acquire::AllowInsecureRepositories "false";
Acquire::AllowWeakRepositories "false";
Acquire::AllowDowngradeToInsecureRepositories "false";
Acquire::Languages "none";
Acquire::Retries "3";
Dir::Etc::sourcelist "DIR/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::Etc::trusted "/dev/null";
Dir::Etc::trustedparts "/dev/null";
Dir::State::lists "DIR/lists";
Dir::State::status "DIR/status";
Dir::Cache "DIR/cache";
Dir::Cache::archives "DIR/cache/archives";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
`, "DIR", dir)
}

func sourcesList(uri, release, component, keyring string) string {
	return fmt.Sprintf("deb [arch=amd64 target=Packages signed-by=%s] %s %s %s\n", keyring, uri, release, component)
}

// candidate is the newest version of a package in a suite.
func (a *apt) candidate(ctx context.Context, suite, name string) (record, error) {
	config, err := a.open(ctx, suite)
	if err != nil {
		return record{}, err
	}
	out, err := run(ctx, "", "apt-cache", "-c", config, "show", "--no-all-versions", name)
	if err != nil {
		return record{}, fmt.Errorf("suite %s: %w", suite, err)
	}
	r := parseRecord(out)
	if r.name != name || r.version == "" || r.sha256 == "" {
		return record{}, fmt.Errorf("suite %s: apt-cache show %s gave no usable record", suite, name)
	}
	return r, nil
}

// newest finds a package in the first suite that has it. For the kernel, it is
// the image that the package depends on that counts.
func (a *apt) newest(ctx context.Context, role string, p images.Package) (Package, error) {
	var errs []error
	for _, from := range p.From {
		r, err := a.candidate(ctx, from.Suite, from.Package)
		if err == nil && role == roleKernel {
			image := kernelImage(r.depends)
			if image == "" {
				return Package{}, fmt.Errorf("package %s %s depends on no linux-image-*", r.name, r.version)
			}
			r, err = a.candidate(ctx, from.Suite, image)
		}
		if err == nil {
			return Package{Role: role, Name: r.name, Version: r.version, SHA256: r.sha256, Suite: from.Suite}, nil
		}
		if ctx.Err() != nil {
			return Package{}, ctx.Err()
		}
		a.log("no %s in %s", from.Package, from.Suite)
		errs = append(errs, err)
	}
	return Package{}, fmt.Errorf("find the package for %s: %w", role, errors.Join(errs...))
}

// download fetches exactly that package and leaves it at dest.
func (a *apt) download(ctx context.Context, p Package, dest string) error {
	config, err := a.open(ctx, p.Suite)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(a.dir, "get-")
	if err != nil {
		return err
	}
	a.log("downloading %s %s from %s", p.Name, p.Version, p.Suite)
	if _, err := run(ctx, dir, "apt-get", "-c", config, "-qq", "download", p.Name+"="+p.Version); err != nil {
		return fmt.Errorf("suite %s of the mirror does not give %s %s; Debian keeps one version of a suite only: take a newer one, or name a mirror that keeps old ones: %w", p.Suite, p.Name, p.Version, err)
	}
	debs, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil || len(debs) != 1 {
		return fmt.Errorf("apt-get download %s left %d files", p.Name, len(debs))
	}
	sum, _, err := digestFile(debs[0])
	if err != nil {
		return err
	}
	if sum != p.SHA256 {
		return fmt.Errorf("package %s %s has SHA-256 %s, want %s", p.Name, p.Version, sum, p.SHA256)
	}
	return os.Rename(debs[0], dest)
}

// record is what is needed of one paragraph of a package index.
type record struct{ name, version, sha256, depends string }

func parseRecord(paragraph []byte) record {
	var r record
	for line := range strings.Lines(string(paragraph)) {
		if strings.TrimSpace(line) == "" && r.name != "" {
			break
		}
		key, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch key {
		case "Package":
			r.name = value
		case "Version":
			r.version = value
		case "SHA256":
			r.sha256 = value
		case "Depends":
			r.depends = value
		}
	}
	return r
}

// kernelImage is the linux-image-* in a list of dependencies.
func kernelImage(depends string) string {
	for d := range strings.SplitSeq(depends, ",") {
		if f := strings.Fields(d); len(f) > 0 && strings.HasPrefix(f[0], "linux-image-") {
			return f[0]
		}
	}
	return ""
}

// run runs a program and returns its standard output. The error holds what it
// said on standard error.
func run(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if errors.Is(err, exec.ErrNotFound) {
		return nil, fmt.Errorf("%s is missing: bases are made from Debian packages with the tools of the packages apt and dpkg", name)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(tail(stderr.String(), 2000)))
	}
	return out, nil
}

func tail(s string, n int) string {
	if len(s) > n {
		return "..." + s[len(s)-n:]
	}
	return s
}
