// Package install puts the Debian package into a fresh root and works there as a
// stranger would: nothing of this machine but its kernel is used. `make test-deb`
// makes the package and names it.
package install

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"coffer/internal/testenv"
	"coffer/test/debimage"
	"coffer/test/dockersave"
)

func deb(t *testing.T) string {
	t.Helper()
	path := os.Getenv("COFFER_DEB")
	testenv.Need(t, path != "", "COFFER_DEB names no package; `make test-deb` does")
	return path
}

func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), testenv.LookTool(t, name), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

func TestContents(t *testing.T) {
	list := output(t, "dpkg-deb", "-c", deb(t))
	for _, want := range []string{
		"usr/bin/hostbuild", "usr/bin/kbs-client", "usr/bin/cvm_build -> hostbuild",
		"usr/lib/coffer/base/snp/base.json", "usr/lib/coffer/base/snp/vmlinuz", "usr/share/coffer/config.schema.json", "usr/share/coffer/settings.schema.json",
		"usr/share/man/man1/hostbuild-cvm.1.gz", "usr/share/man/man1/kbs-client-config-set-resource.1.gz", "usr/share/bash-completion/completions/hostbuild", "usr/share/zsh/vendor-completions/_hostbuild",
		"usr/share/fish/vendor_completions.d/hostbuild.fish", "usr/share/doc/coffer/README.md", "usr/share/doc/coffer/docs/operations.md",
		"usr/share/doc/coffer/copyright",
	} {
		if !strings.Contains(list, "./"+want+"\n") {
			t.Errorf("%s is missing", want)
		}
	}
	for line := range strings.Lines(list) {
		if f := strings.Fields(line); f[1] != "root/root" || f[0][0] != 'l' && (f[0][5] == 'w' || f[0][8] == 'w') {
			t.Errorf("not root's alone: %s", line)
		}
	}
	if deps := output(t, "dpkg-deb", "-f", deb(t), "Depends"); !strings.HasPrefix(deps, "e2fsprogs ") {
		t.Errorf("depends on %q", deps)
	}
}

// chroot is a root of another system.
type chroot string

// command runs a program inside, with a /proc of its own.
func (c chroot) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "unshare", append([]string{"--fork", "--pid", "--kill-child", "--mount-proc=" + filepath.Join(string(c), "proc"), "chroot", string(c)}, args...)...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8"}
	return cmd
}

func (c chroot) run(t *testing.T, wantCode int, args ...string) string {
	t.Helper()
	cmd := c.command(t.Context(), args...)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != wantCode {
		t.Fatalf("%q: %v, want exit code %d\n%s", args, err, wantCode, out)
	}
	t.Logf("$ %s\n%s", strings.Join(args, " "), out)
	return string(out)
}

func copyTo(t *testing.T, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestInstalled(t *testing.T) {
	pkg := deb(t)
	testenv.Root(t)
	testenv.LookTool(t, "unshare")
	suite, mirror, err := debimage.MachineSuite(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if s := os.Getenv("COFFER_SUITE"); s != "" {
		suite = s
	}
	source := os.Getenv("COFFER_SOURCE")
	if source == "" {
		source = fmt.Sprintf("deb %s %s main", mirror, suite)
	}
	root := chroot(filepath.Join(t.TempDir(), "root"))
	// What it depends on, by name; dpkg refuses it where that is not enough.
	depends := regexp.MustCompile(`\s*\([^)]*\)|\s`).ReplaceAllString(output(t, "dpkg-deb", "-f", pkg, "Depends"), "")
	output(t, "mmdebstrap", "--quiet", "--variant=minbase", `--aptopt=Acquire::Languages "none"`, "--include="+depends, suite, string(root), source)
	copyTo(t, pkg, filepath.Join(string(root), "coffer.deb"))
	root.run(t, 0, "dpkg", "-i", "/coffer.deb")

	if v := root.run(t, 0, "hostbuild", "--version"); !regexp.MustCompile(`^hostbuild version [0-9]+\.`).MatchString(v) {
		t.Errorf("version %q", v)
	}
	out := root.run(t, 1, "hostbuild", "doctor")
	if !strings.Contains(out, "ok       e2fsprogs") || !strings.Contains(out, "MISSING  settings") {
		t.Error("the doctor of a fresh installation says something else")
	}

	// A KBS in there, settings by init, which names no base, and a bundle.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	root.run(t, 0, "hostbuild", "kbs", "init", "/srv/kbs", "--host", "127.0.0.1")
	serve := root.command(t.Context(), "hostbuild", "kbs", "serve", "--dir", "/srv/kbs", "--listen", address)
	serve.Stderr = os.Stderr
	if err := serve.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { serve.Process.Kill(); serve.Wait() }()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		c, err := net.Dial("tcp", address)
		if err == nil {
			c.Close()
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	layer, err := dockersave.Layer(dockersave.Entry{Name: "app", Mode: 0o755, Body: []byte("#!/bin/sh\n")})
	if err != nil {
		t.Fatal(err)
	}
	if err := (dockersave.Image{Tag: "app:1", Entrypoint: []string{"/app"}, Layers: [][]byte{layer}}).SaveLegacy(filepath.Join(string(root), "app.tar.gz")); err != nil {
		t.Fatal(err)
	}
	root.run(t, 0, "hostbuild", "init", "--kbs-url", "https://"+address, "--kbs-dir", "/srv/kbs", "--archive", "/app.tar.gz", "--config", "/CONFIG.yaml")
	if out := root.run(t, 0, "hostbuild", "doctor"); !strings.Contains(out, "ok       base: /usr/lib/coffer/base/snp: for snp") {
		t.Error("the installed base is not found")
	}
	out = root.run(t, 0, "cvm_build", "/CONFIG.yaml")
	m := regexp.MustCompile(`(?m)^CVM Bundle (\S+\.tgz) is ready$`).FindStringSubmatch(out)
	if m == nil {
		t.Fatal("no bundle")
	}
	root.run(t, 0, "hostbuild", "verify", m[1])
	config, err := os.ReadFile(filepath.Join(string(root), "CONFIG.yaml"))
	if err != nil || !strings.HasPrefix(string(config), "# yaml-language-server: $schema=/usr/share/coffer/config.schema.json\n") {
		t.Errorf("CONFIG.yaml does not name the installed schema: %v, %.80q", err, config)
	}
	settings, err := os.ReadFile(filepath.Join(string(root), "root/.config/coffer/hostbuild.yaml"))
	if err != nil || !strings.HasPrefix(string(settings), "# yaml-language-server: $schema=/usr/share/coffer/settings.schema.json\n") {
		t.Errorf("hostbuild.yaml does not name the installed schema: %v, %.80q", err, settings)
	}
	root.run(t, 0, "dpkg", "-r", "coffer")
	if _, err := os.Stat(filepath.Join(string(root), "usr/lib/coffer")); err == nil {
		t.Error("after removal something is left in /usr/lib/coffer")
	}
}
