package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"coffer/internal/simport"
	"coffer/internal/snp"
	"coffer/internal/snp/verify"
	"coffer/test/fakebase"
)

// The test binary is the program too, so that the test can start it as a process.
func TestMain(m *testing.M) {
	if os.Getenv("SIMPLATFORM_MAIN") != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

const patience = time.Minute

func program(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, os.Args[0], args...)
	cmd.Env = append(os.Environ(), "SIMPLATFORM_MAIN=1")
	cmd.Stderr = os.Stderr
	return cmd
}

// files writes a firmware, a kernel and an initrd and returns serve's arguments.
func files(t *testing.T, dir string) []string {
	t.Helper()
	args := []string{"serve", "--append", "console=ttyS0", "--vcpus", "2", "--cpu", "EPYC-v4"}
	for name, b := range map[string][]byte{"ovmf": fakebase.OVMF(t), "kernel": []byte("the kernel"), "initrd": []byte("the initrd")} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "--"+name, path)
	}
	return args
}

// start starts serve, waits for its line and returns the digest that it prints.
func start(t *testing.T, args ...string) (*exec.Cmd, [48]byte) {
	t.Helper()
	cmd := program(t, args...)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatalf("no line from serve: %v", err)
	}
	text, ok := strings.CutPrefix(strings.TrimSpace(line), "simulated launch_digest=")
	digest, err := hex.DecodeString(text)
	if !ok || err != nil || len(digest) != 48 {
		t.Fatalf("serve says %q", line)
	}
	return cmd, [48]byte(digest)
}

func connect(t *testing.T, socket string) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(patience))
	t.Cleanup(func() { conn.Close() })
	return conn
}

func TestReportOverSocketVerifies(t *testing.T) {
	dir := t.TempDir()
	chip, socket := filepath.Join(dir, "chip"), filepath.Join(dir, "sim.sock")
	if err := program(t, "new", chip).Run(); err != nil {
		t.Fatal(err)
	}
	pem, err := os.ReadFile(filepath.Join(chip, "roots.pem"))
	if err != nil {
		t.Fatal(err)
	}
	roots, err := verify.LoadRoots(pem)
	if err != nil {
		t.Fatal(err)
	}
	args := append(files(t, dir), "--chip", chip, "--socket", socket)

	// launch starts the platform and returns the measurement of a report of it.
	launch := func() [48]byte {
		t.Helper()
		cmd, digest := start(t, args...)
		if info, err := os.Stat(socket); err != nil || info.Mode().Perm()&0o077 != 0 {
			t.Errorf("socket is open to others: %v, %v", info.Mode(), err)
		}
		conn := connect(t, socket)
		var measurement [48]byte
		for vmpl := range 2 {
			data := [64]byte{0xc0, byte(vmpl)}
			raw, table, err := simport.Request(conn, data, vmpl)
			if err != nil {
				t.Fatal(err)
			}
			report, err := snp.ParseReport(raw)
			if err != nil {
				t.Fatal(err)
			}
			certs, err := snp.ParseCertTable(table)
			if err != nil {
				t.Fatal(err)
			}
			o := verify.Options{Roots: roots, Now: time.Now(), ReportData: &data, MaxVMPL: 1, MinTCB: verify.DefaultMinTCB()}
			got, err := verify.Verify(report, certs, o)
			if err != nil {
				t.Fatal(err)
			}
			if want := (verify.Result{Product: "Genoa", Signer: snp.VCEK, Simulated: true}); *got != want {
				t.Errorf("Verify = %+v, want %+v", *got, want)
			}
			o.Roots = verify.AMDRoots()
			if _, err := verify.Verify(report, certs, o); !errors.Is(err, verify.ErrChain) {
				t.Errorf("AMD's roots: %v, want %v", err, verify.ErrChain)
			}
			if report.VMPL != uint32(vmpl) || report.Measurement != digest {
				t.Errorf("report of VMPL %d with measurement %x, want %d and %x", report.VMPL, report.Measurement, vmpl, digest)
			}
			measurement = report.Measurement
		}
		conn.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("after the connection's end serve fails: %v", err)
		}
		return measurement
	}

	first := launch()
	if again := launch(); again != first {
		t.Errorf("the same files measure as %x and %x", first, again)
	}
	initrd := filepath.Join(dir, "initrd")
	b, err := os.ReadFile(initrd)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-1] ^= 1
	if err := os.WriteFile(initrd, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if changed := launch(); changed == first {
		t.Error("a changed byte of the initrd does not change the measurement")
	}
}

func TestServeEndsOnSIGTERM(t *testing.T) {
	for _, connected := range []bool{false, true} {
		dir := t.TempDir()
		chip, socket := filepath.Join(dir, "chip"), filepath.Join(dir, "sim.sock")
		if err := program(t, "new", chip).Run(); err != nil {
			t.Fatal(err)
		}
		cmd, _ := start(t, append(files(t, dir), "--chip", chip, "--socket", socket)...)
		if connected {
			if _, _, err := simport.Request(connect(t, socket), [64]byte{}, 0); err != nil {
				t.Fatal(err)
			}
		}
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("connected=%v: %v, want exit code 0", connected, err)
		}
		if _, err := os.Lstat(socket); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("connected=%v: the socket is still there (%v)", connected, err)
		}
	}
}

// A launch script that is killed does not leave its platform behind.
func TestServeEndsWithItsParent(t *testing.T) {
	dir := t.TempDir()
	chip, socket := filepath.Join(dir, "chip"), filepath.Join(dir, "sim.sock")
	if err := program(t, "new", chip).Run(); err != nil {
		t.Fatal(err)
	}
	cmd := program(t, append(files(t, dir), "--chip", chip, "--socket", socket)...)
	// The shell runs the program in the background and ends with its input.
	cmd.Path, cmd.Args = "/bin/sh", append([]string{"sh", "-c", `"$0" "$@" & read x`}, cmd.Args...)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	out := bufio.NewReader(stdout)
	if _, err := out.ReadString('\n'); err != nil {
		t.Fatalf("no line from serve: %v", err)
	}
	connect(t, socket) // it would go on for as long as this stands
	stdin.Close()
	ended := make(chan error, 1)
	go func() { _, err := out.ReadByte(); ended <- err }()
	select {
	case err := <-ended:
		if err != io.EOF {
			t.Errorf("standard output ends with %v", err)
		}
	case <-time.After(patience):
		t.Error("serve outlives its parent")
	}
	cmd.Wait()
}

func TestServeTakesOverStaleSocket(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "sim.sock")
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
	l, err := listen(t.Context(), socket)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if err := os.WriteFile(socket, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listen(t.Context(), socket); err == nil {
		t.Error("listen took the place of a regular file")
	}
}

func TestRunRefuses(t *testing.T) {
	dir := t.TempDir()
	chip := filepath.Join(dir, "chip")
	if err := run(t.Context(), []string{"new", chip}, io.Discard); err != nil {
		t.Fatal(err)
	}
	good := append(files(t, dir), "--chip", chip, "--socket", filepath.Join(dir, "s"))
	for name, tc := range map[string]struct {
		args []string
		want string
	}{
		"nothing":       {nil, "usage"},
		"unknown verb":  {[]string{"boot"}, "usage"},
		"chip is there": {[]string{"new", chip}, "file exists"},
		"no chip":       {append(good[:len(good):len(good)], "--chip", dir), "chip.json"},
		"no kernel":     {[]string{"serve", "--chip", chip, "--socket", "s", "--ovmf", "f"}, "needs"},
		"unknown CPU":   {append(good[:len(good):len(good)], "--cpu", "host"), "unknown CPU"},
		"bad firmware":  {append(good[:len(good):len(good)], "--ovmf", filepath.Join(dir, "kernel")), "not a firmware"},
		"no initrd":     {append(good[:len(good):len(good)], "--initrd", filepath.Join(dir, "x")), "no such file"},
	} {
		var out bytes.Buffer
		err := run(t.Context(), tc.args, &out)
		if err == nil || !strings.Contains(err.Error(), tc.want) || out.Len() > 0 {
			t.Errorf("%s: %v, printed %q, want an error with %q", name, err, out.String(), tc.want)
		}
	}
}
