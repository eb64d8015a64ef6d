//go:build simulated

package evidence

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"coffer/internal/simport"
	"coffer/internal/testenv"
)

// A pseudo terminal plays the virtio port: it is a character device that both
// sides can open.
func openTerminal(t *testing.T) (host *os.File, device string) {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	testenv.Need(t, err == nil, "no pseudo terminals here")
	host = os.NewFile(uintptr(fd), "ptmx")
	t.Cleanup(func() { host.Close() })
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tio, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	tio.Lflag &^= unix.ICANON | unix.ECHO | unix.ISIG
	tio.Oflag &^= unix.OPOST
	tio.Iflag &^= unix.ICRNL
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, tio); err != nil {
		t.Fatal(err)
	}
	device = filepath.Join("/dev/pts", strconv.Itoa(n))
	keep, err := os.OpenFile(device, os.O_RDWR|unix.O_NOCTTY, 0) // else the first close hangs the line up
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { keep.Close() })
	return host, device
}

func TestPort(t *testing.T) {
	host, device := openTerminal(t)
	go simport.Serve(host, func(data [64]byte, vmpl int) ([]byte, []byte, error) {
		return answerTo(data, vmpl), []byte("certs"), nil
	})

	sys, dev := t.TempDir(), t.TempDir()
	for name, content := range map[string]string{"vport0p1": "org.qemu.guest_agent.0\n", "vport0p2": simport.PortName + "\n"} {
		if err := errors.Join(os.Mkdir(filepath.Join(sys, name), 0o755), os.WriteFile(filepath.Join(sys, name, "name"), []byte(content), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(device, filepath.Join(dev, "vport0p2")); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	p := port{sys: sys, dev: dev}
	for vmpl := range 2 { // the port is opened anew each time
		report, certs, err := newSource(TEESNP, true, p.report).Report(ctx, testData, vmpl)
		if err != nil || !bytes.Equal(report, answerTo(testData, vmpl)) || string(certs) != "certs" {
			t.Errorf("VMPL %d: %d bytes, certificates %q, %v", vmpl, len(report), certs, err)
		}
	}
}

func TestNoPort(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := (port{sys: t.TempDir(), dev: t.TempDir()}).find(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}
