// Package harness runs the whole line from outside, as a person would: it starts
// the embedded KBS, has hostbuild make a bundle, unpacks it and boots it by its
// own launch_vm.sh on the simulated platform, and reads what all of them print.
//
// It knows programs and files, not packages: what it drives is what is shipped.
package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Env is a place for one run: the programs, a base and a simulated chip.
type Env struct {
	Bin  string // folder of the built programs
	Base string // folder of a simulated guest base
	Dir  string // work folder
	Log  io.Writer

	KBSFlags  []string // more flags for `hostbuild kbs serve`
	KBSOutput *os.File // takes what it prints, for a bench: KBS.Log stays empty, and no reader takes processor time
	BootEnv   []string // more variables for launch_vm.sh, NAME=value

	chipOnce sync.Once
	chipErr  error
}

func (e *Env) chip() string { return filepath.Join(e.Dir, "chip") }

// program returns the absolute path of a built program.
func (e *Env) program(name string) string { return filepath.Join(e.Bin, name) }

// Run runs a built program to its end and returns its standard output.
func (e *Env) Run(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, e.program(name), args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, io.MultiWriter(&errOut, e.Log)
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s %s: %w\n%s%s", name, strings.Join(args, " "), err, out.String(), errOut.String())
	}
	return out.String(), nil
}

// MakeChip makes the simulated chip once.
func (e *Env) MakeChip(ctx context.Context) error {
	e.chipOnce.Do(func() { _, e.chipErr = e.Run(ctx, "simplatform", "new", e.chip()) })
	return e.chipErr
}

// KBS is a running embedded KBS.
type KBS struct {
	Dir    string // made by `hostbuild kbs init`
	Listen string
	Log    *Lines

	proc *process
	env  *Env
}

// StartKBS makes a KBS in the folder name below e.Dir, or starts the one there.
func (e *Env) StartKBS(ctx context.Context, name string) (*KBS, error) {
	if err := e.MakeChip(ctx); err != nil {
		return nil, err
	}
	k := &KBS{Dir: filepath.Join(e.Dir, name), env: e}
	if _, err := os.Stat(filepath.Join(k.Dir, "ca.pem")); errors.Is(err, os.ErrNotExist) {
		// Guests on QEMU's user network reach the host's loopback at 10.0.2.2.
		if _, err := e.Run(ctx, "hostbuild", "kbs", "init", k.Dir, "--host", "127.0.0.1", "--host", "10.0.2.2"); err != nil {
			return nil, err
		}
	}
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	k.Listen = fmt.Sprintf("127.0.0.1:%d", port)
	return k, k.Start(ctx)
}

// Start starts the server at k.Listen and waits until it answers.
func (k *KBS) Start(ctx context.Context) error {
	k.Log = NewLines(k.env.Log)
	args := append([]string{"kbs", "serve", "--dir", k.Dir, "--listen", k.Listen,
		"--simulated-roots", filepath.Join(k.env.chip(), "roots.pem"), "--allow-simulated"}, k.env.KBSFlags...)
	cmd := exec.Command(k.env.program("hostbuild"), args...)
	if f := k.env.KBSOutput; f != nil {
		cmd.Stdout, cmd.Stderr = f, f
	}
	p, err := start(cmd, k.Log)
	if err != nil {
		return err
	}
	k.proc = p
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if k.env.KBSOutput != nil {
		err = k.listening(ctx)
	} else {
		_, _, err = k.Log.Expect(ctx, 0, `action=start`)
	}
	if err != nil {
		k.Stop()
		return fmt.Errorf("KBS: %w", err)
	}
	return nil
}

// listening waits until the server takes connections.
func (k *KBS) listening(ctx context.Context) error {
	for {
		conn, err := net.Dial("tcp", k.Listen)
		if err == nil {
			return conn.Close()
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-k.proc.done:
			return fmt.Errorf("it ended; its output is in %s", k.env.KBSOutput.Name())
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ctx.Err(), err)
		}
	}
}

// Stop ends the server.
func (k *KBS) Stop() {
	if k.proc != nil {
		k.proc.stop()
		k.proc = nil
	}
}

// Kill ends the server at once, as kill -9 does.
func (k *KBS) Kill() {
	if k.proc != nil {
		syscall.Kill(-k.proc.cmd.Process.Pid, syscall.SIGKILL)
		<-k.proc.done
		k.proc = nil
	}
}

// PID is the running server's.
func (k *KBS) PID() int { return k.proc.cmd.Process.Pid }

// Settings writes a build host's settings for this KBS and returns the file.
func (k *KBS) Settings() (string, error) {
	_, port, err := net.SplitHostPort(k.Listen)
	if err != nil {
		return "", err
	}
	path := filepath.Join(k.Dir, "hostbuild.yaml")
	return path, os.WriteFile(path, fmt.Appendf(nil, `kbs:
  url: https://127.0.0.1:%s
  guest_url: https://10.0.2.2:%s
  ca: %s/ca.pem
  admin_key: %s/admin.key
policy_dir: %s/policy
base_dir: %s
output_dir: %s
cache_dir: %s
`, port, port, k.Dir, k.Dir, k.Dir, k.env.Base, k.Bundles(), k.Cache()), 0o644)
}

// Bundles is the folder where a build with these settings puts its bundle.
func (k *KBS) Bundles() string { return filepath.Join(k.Dir, "bundles") }

// Cache is the folder where it keeps converted layers.
func (k *KBS) Cache() string { return filepath.Join(k.Dir, "cache") }

// Bundle is an unpacked bundle.
type Bundle struct {
	ID  string
	Tgz string
	Dir string

	env *Env
}

var readyLine = regexp.MustCompile(`CVM Bundle\s+([^\s]+)\s+is ready`) // as NVFlare's packager reads it

// Build has hostbuild make a bundle of a CONFIG.yaml.
func (e *Env) Build(ctx context.Context, settings, config string, flags ...string) (*Bundle, error) {
	args := append([]string{"--settings", settings, "cvm", config}, flags...)
	out, err := e.Run(ctx, "hostbuild", args...)
	if err != nil {
		return nil, err
	}
	lines := strings.Split(strings.TrimRight(out, "\n"), "\n")
	m := readyLine.FindStringSubmatch(lines[len(lines)-1])
	if m == nil {
		return nil, fmt.Errorf("hostbuild cvm printed no ready line last:\n%s", out)
	}
	return &Bundle{Tgz: m[1], ID: strings.TrimSuffix(filepath.Base(m[1]), ".tgz"), env: e}, nil
}

// Unpack unpacks the bundle below dir with tar, as a site does.
func (b *Bundle) Unpack(ctx context.Context, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "tar", "-zxf", b.Tgz, "-C", dir).CombinedOutput(); err != nil {
		return fmt.Errorf("tar: %w\n%s", err, out)
	}
	b.Dir = filepath.Join(dir, b.ID)
	return nil
}

// Copy makes a second, independent copy of the unpacked bundle.
func (b *Bundle) Copy(ctx context.Context, dir string) (*Bundle, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if out, err := exec.CommandContext(ctx, "cp", "-a", "--sparse=always", b.Dir, dir).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("cp: %w\n%s", err, out)
	}
	c := *b
	c.Dir = filepath.Join(dir, b.ID)
	return &c, nil
}

// File returns the path of a file of the bundle.
func (b *Bundle) File(name string) string { return filepath.Join(b.Dir, name) }

// VM is a running guest.
type VM struct {
	Console *Lines

	proc *process
	next int
}

// Boot starts the guest by its launch_vm.sh. An orderly stop gets a second
// unless args say otherwise, so that Kill is quick.
func (b *Bundle) Boot(args ...string) (*VM, error) {
	cmd := exec.Command("./launch_vm.sh", append([]string{"--stop-timeout", "1"}, args...)...)
	cmd.Dir = b.Dir
	cmd.Env = append(os.Environ(), "COFFER_SIMPLATFORM="+b.env.program("simplatform"), "COFFER_SIM_CHIP="+b.env.chip())
	cmd.Env = append(cmd.Env, b.env.BootEnv...)
	v := &VM{Console: NewLines(b.env.Log)}
	p, err := start(cmd, v.Console)
	if err != nil {
		return nil, err
	}
	v.proc = p
	return v, nil
}

// Expect waits for the next console line that matches, after the last one found.
func (v *VM) Expect(ctx context.Context, re string) ([]string, error) {
	m, next, err := v.Console.Expect(ctx, v.next, re)
	v.next = next
	return m, err
}

// Wait waits until the guest has powered off.
func (v *VM) Wait(ctx context.Context) error {
	select {
	case <-v.proc.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the guest is still running: %w; its last lines:\n%s", ctx.Err(), tail(v.Console.All(), 15))
	}
}

// Stop presses the guest's power button and leaves it to itself.
func (v *VM) Stop() { syscall.Kill(v.proc.cmd.Process.Pid, syscall.SIGTERM) }

// Kill ends the guest at once.
func (v *VM) Kill() { v.proc.stop() }

// process is a program that runs beside the test, with all its children.
type process struct {
	cmd  *exec.Cmd
	done chan struct{}
}

// start starts cmd; out takes its output where cmd says nothing else.
func start(cmd *exec.Cmd, out *Lines) (*process, error) {
	if cmd.Stdout == nil {
		cmd.Stdout, cmd.Stderr = out, out
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = 5 * time.Second // a left-behind child must not hold the output for ever
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	p := &process{cmd: cmd, done: make(chan struct{})}
	go func() {
		cmd.Wait()
		out.Close()
		close(p.done)
	}()
	return p, nil
}

func (p *process) stop() {
	select {
	case <-p.done:
		return
	default:
	}
	syscall.Kill(-p.cmd.Process.Pid, syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(10 * time.Second):
		syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
		<-p.done
	}
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

// FreePort returns a TCP port that nobody listens at on loopback.
func FreePort() (int, error) { return freePort() }
