package api_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"coffer/internal/snp/verify"
	"coffer/internal/snpguest"
)

// Variables by which this test program becomes the snpguest that NVFlare calls.
const (
	asSocket = "COFFER_TEST_SNPGUEST_SOCKET"
	asRoots  = "COFFER_TEST_SNPGUEST_ROOTS"
)

func TestMain(m *testing.M) {
	if socket := os.Getenv(asSocket); socket != "" {
		text, err := os.ReadFile(os.Getenv(asRoots))
		var roots []verify.Roots
		if err == nil {
			roots, err = verify.LoadRoots(text)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(snpguest.Run(os.Args[1:], snpguest.Env{Stdout: os.Stdout, Stderr: os.Stderr, Socket: socket, Now: time.Now(), Roots: roots}))
	}
	os.Exit(m.Run())
}

// script is one site that makes a token, and others that judge it.
const script = `
import base64, logging, sys, time
from nvflare.app_opt.confidential_computing.snp_authorizer import SNPAuthorizer
logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
def site(n): return SNPAuthorizer(amd_certs_dir="certs-%d" % n, max_retries=1, cmd_timeout=30)
began = time.monotonic()
a, b = site(0), site(1)
token = a.generate()
print("size", len(base64.b64decode(token)))
print("own", a.verify(token))
print("peer", b.verify(token))
print("again", b.verify(token))
print("second", b.verify(a.generate()))
raw = bytearray(base64.b64decode(token))
raw[0x90] ^= 1
print("measurement changed", site(2).verify(base64.b64encode(bytes(raw))))
raw = bytearray(base64.b64decode(token))
raw[0x1a0] ^= 1
print("chip changed", site(3).verify(base64.b64encode(bytes(raw))))
print("garbage", site(4).verify(base64.b64encode(b"x" * 1184)))
print("seconds %.1f" % (time.monotonic() - began))
`

// NVFlare's own SNPAuthorizer, from PyPI, is content with our snpguest, and only
// with good tokens: make test-nvflare.
func TestNVFlareAuthorizer(t *testing.T) {
	venv := os.Getenv("COFFER_NVFLARE_VENV")
	if venv == "" {
		t.Skip("make test-nvflare runs this: COFFER_NVFLARE_VENV is not set")
	}
	g := newGuest(t)
	dir := t.TempDir()
	rootsFile := filepath.Join(dir, "roots.pem")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	wrapper := fmt.Sprintf("#!/bin/sh\n%s=%s %s=%s exec %s \"$@\"\n", asSocket, g.socket, asRoots, rootsFile, self)
	for name, text := range map[string]string{rootsFile: string(g.chip.RootsPEM()), filepath.Join(dir, "snpguest"): wrapper} {
		if err := os.WriteFile(name, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 5 {
		if err := os.Mkdir(fmt.Sprintf("%s/certs-%d", dir, i), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(filepath.Join(venv, "bin/python"), "-c", script)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"size 1184", "own True", "peer True", "again False", "second True", "measurement changed False", "chip changed False", "garbage False"} {
		if !strings.Contains("\n"+string(out), "\n"+want+"\n") {
			t.Errorf("NVFlare does not say %q", want)
		}
	}
	for _, vmpl := range g.vmpls {
		if vmpl != 1 {
			t.Errorf("asked at VMPL %d", vmpl)
		}
	}
}
