package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha512"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"coffer/internal/gpu"
	"coffer/test/gpusim"
	"coffer/test/harness"
)

// gpuFigures are of judging made-up GPUs, which sign as real ones do; the time that
// a device needs for its report is not in them.
func gpuFigures(env *harness.Env) error {
	const count = 8
	w := gpusim.NewWorld()
	driver := gpusim.NewDriver()
	for range count {
		d := w.NewDevice(gpu.Hopper)
		if len(driver.Devices) > 0 {
			d.Measurements = driver.Devices[0].Measurements
		}
		driver.Devices = append(driver.Devices, d)
	}
	nonce := [32]byte{1}
	var evidence []gpu.Evidence
	for _, d := range driver.Devices {
		evidence = append(evidence, d.Evidence(nonce))
	}
	v := &gpu.Verifier{
		DeviceRoot: w.DeviceRoot.Cert, RIMRoot: w.RIMRoot.Cert, RIMs: w.NewRIMs(driver.Devices[0]),
		Policy: gpu.Policy{OCSP: gpu.OCSPOff}, Now: func() time.Time { return gpusim.Now },
	}
	judge := func(list []gpu.Evidence) func() error {
		return func() error {
			_, err := v.VerifyAll(context.Background(), list, nonce)
			return err
		}
	}
	// Nobody can do without the signatures of report and chain, five of P-384.
	key := driver.Devices[0].Chain[0].Key
	digest := sha512.Sum384([]byte("floor"))
	signature, err := ecdsa.SignASN1(nil, key, digest[:])
	if err != nil {
		return err
	}
	floor := func(n int) func() error {
		return func() error {
			for range 5 * n {
				if !ecdsa.VerifyASN1(&key.PublicKey, digest[:], signature) {
					return errors.New("a signature does not verify")
				}
			}
			return nil
		}
	}
	for _, f := range []struct {
		name string
		n    int
	}{{"gpu_verify", 1}, {"gpu_verify_8", count}} {
		value, err := milliseconds(judge(evidence[:f.n]))
		if err != nil {
			return err
		}
		least, err := milliseconds(floor(f.n))
		if err != nil {
			return err
		}
		figure(f.name, value, "ms", least)
	}
	return helperRSS(env, driver)
}

// milliseconds is the median of the processor's time that f takes, which others on
// the machine do not change much.
func milliseconds(f func() error) (float64, error) {
	used := func() time.Duration {
		var u syscall.Rusage
		_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	var list []float64
	for range 51 {
		start := used()
		if err := f(); err != nil {
			return 0, err
		}
		list = append(list, float64((used()-start).Microseconds())/1000)
	}
	return median(list), nil
}

// helperRSS is the most memory that gpu-helper has while it asks 8 GPUs for
// reports; the floor is what it has while it waits for the question.
func helperRSS(env *harness.Env, driver *gpusim.Driver) error {
	dir, err := os.MkdirTemp("", "bench-gpu-") // short enough for a socket
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	library, socket := filepath.Join(dir, "libnvidia-ml.so.1"), filepath.Join(dir, "s")
	if out, err := exec.Command("gcc", "-O2", "-shared", "-fPIC", "-o", library, "test/fakenvml/fakenvml.c").CombinedOutput(); err != nil {
		return fmt.Errorf("gcc: %w\n%s", err, out)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	defer l.Close()
	go driver.Serve(l)
	cmd := exec.Command(filepath.Join(env.Bin, "gpu-helper"), "--library", library)
	cmd.Env = []string{"FAKENVML_SOCKET=" + socket}
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	defer cmd.Process.Kill()
	least, err := settled(cmd.Process.Pid) // it waits for its request
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintf(in, "{\"op\":\"collect\",\"nonce\":\"%064x\"}\n", 1); err != nil {
		return err
	}
	// The answer is more than a pipe holds: once it has begun the program waits.
	if _, err := io.ReadFull(out, make([]byte, 1)); err != nil {
		return err
	}
	value, err := settled(cmd.Process.Pid)
	if err != nil {
		return err
	}
	rest, err := io.ReadAll(out)
	if err != nil || !bytes.Contains(rest, []byte(`"evidence"`)) {
		return fmt.Errorf("gpu-helper: %w: %.200s", err, rest)
	}
	if err := cmd.Wait(); err != nil {
		return err
	}
	figure("gpu_helper_rss", value, "KiB", least)
	return nil
}

// settled is the most memory that a process had, in KiB, once it does no more.
func settled(pid int) (float64, error) {
	var last string
	for same := 0; same < 10; {
		time.Sleep(5 * time.Millisecond)
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			return 0, err
		}
		_, field, _ := strings.Cut(string(text), "VmHWM:")
		field, _, _ = strings.Cut(field, "kB")
		if same++; field != last {
			same, last = 0, field
		}
	}
	return strconv.ParseFloat(strings.TrimSpace(last), 64)
}
