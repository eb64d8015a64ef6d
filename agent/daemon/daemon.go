// Package daemon runs containerd as a supervised child: it writes its
// configuration, starts it, waits until it serves, and starts it again when it
// ends. The containers it started outlive it; their shims and their output do
// not depend on it.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/client"
)

// Namespace is containerd's namespace of everything the agent makes.
const Namespace = "coffer"

// Snapshotter is the snapshotter that reads layers from the layer cache.
const Snapshotter = "erofs"

// Config says where containerd lives. All paths are absolute.
type Config struct {
	Binary    string // containerd
	Path      string // PATH of containerd: holds its shim and runc
	Root      string // its state over restarts; lies in RAM in the guest
	State     string // sockets and runtime state
	Snapshots string // writable layers
	Layers    string // layer cache, read only
	Log       io.Writer
	// Printf writes to the boot log.
	Printf func(format string, a ...any)
}

// Socket is where containerd serves.
func (c *Config) Socket() string { return filepath.Join(c.State, "containerd.sock") }

// toml is containerd's configuration. dm-verity is off because the layers lie
// in a root that stands behind dm-verity as a whole; a default_size of 0 makes
// the writable layer a plain folder. The plugin opt wants to write to /opt. The
// scheduler sleeps 5 ms / pause_threshold between two looks at whether there is
// garbage: 50 s, not its own quarter of a second, as there is hardly ever any.
func (c *Config) toml() string {
	q := strconv.Quote
	return `version = 4
root = ` + q(c.Root) + `
state = ` + q(c.State) + `
oom_score = -999
imports = []
disabled_plugins = ["io.containerd.internal.v1.opt"]
[debug]
  level = "warn"
[plugins."io.containerd.server.v1.grpc"]
  address = ` + q(c.Socket()) + `
[plugins."io.containerd.server.v1.ttrpc"]
  address = ` + q(c.Socket()+".ttrpc") + `
[plugins."io.containerd.service.v1.diff-service"]
  default = ["walking"]
[plugins."io.containerd.gc.v1.scheduler"]
  pause_threshold = 0.0001
[plugins."io.containerd.snapshotter.v1.erofs"]
  root_path = ` + q(c.Snapshots) + `
  default_size = "0"
  dmverity_mode = "off"
  layer_content_caches = [` + q(c.Layers) + `]
`
}

// Times of the supervision.
const (
	servingWithin = 30 * time.Second
	restartFirst  = 100 * time.Millisecond
	restartMax    = 5 * time.Second
	steadyAfter   = time.Minute // a run this long forgets earlier failures
	restartLimit  = 10          // failed runs in a row
	termWithin    = 5 * time.Second
)

// Daemon is a running containerd.
type Daemon struct {
	cfg    Config
	client *client.Client

	mu      sync.Mutex
	proc    *os.Process
	stop    chan struct{} // closed by Stop
	stopped chan struct{} // closed when supervision has ended
	err     error         // why, where Stop was not it
}

// Start returns when containerd serves.
func Start(ctx context.Context, cfg Config) (*Daemon, error) {
	for _, dir := range []string{cfg.Root, cfg.State, cfg.Snapshots} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("containerd's folders: %w", err)
		}
	}
	if err := os.WriteFile(cfg.file(), []byte(cfg.toml()), 0o600); err != nil {
		return nil, fmt.Errorf("containerd's configuration: %w", err)
	}
	c, err := client.New(cfg.Socket(), client.WithDefaultNamespace(Namespace), client.WithTimeout(time.Second))
	if err != nil {
		return nil, fmt.Errorf("containerd's client: %w", err)
	}
	d := &Daemon{cfg: cfg, client: c, stop: make(chan struct{}), stopped: make(chan struct{})}
	wait, err := d.run()
	if err != nil {
		c.Close()
		return nil, err
	}
	go d.supervise(wait)
	if err := d.serving(ctx); err != nil {
		d.Stop()
		return nil, err
	}
	return d, nil
}

func (c *Config) file() string { return filepath.Join(c.State, "config.toml") }

// Client is good for the daemon's whole life: it connects again by itself.
func (d *Daemon) Client() *client.Client { return d.client }

// TaskDir is where containerd keeps what it knows of a container's shim.
func (d *Daemon) TaskDir(id string) string {
	return filepath.Join(d.cfg.State, "io.containerd.runtime.v2.task", Namespace, id)
}

// Done is closed when containerd is not restarted any more; Err says why.
func (d *Daemon) Done() <-chan struct{} { return d.stopped }

// Err is nil before Done and after Stop.
func (d *Daemon) Err() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err
}

// Pid is the process id of the present containerd.
func (d *Daemon) Pid() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.proc.Pid
}

// serving asks until containerd answers. It dials by itself first: gRPC sits out
// a second after a dial that failed.
func (d *Daemon) serving(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, servingWithin)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		conn, err := net.Dial("unix", d.cfg.Socket())
		if err == nil {
			conn.Close()
			var ok bool
			if ok, err = d.client.IsServing(ctx); ok {
				return nil
			}
		}
		select {
		case <-d.stopped:
			return fmt.Errorf("containerd: %w", d.Err())
		case <-ctx.Done():
			return fmt.Errorf("containerd does not serve at %s: %w", d.cfg.Socket(), errors.Join(ctx.Err(), err))
		case <-tick.C:
		}
	}
}

// errStopped says that Stop came before a restart.
var errStopped = errors.New("stopped")

func (d *Daemon) run() (wait func() error, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	select {
	case <-d.stop:
		return nil, errStopped
	default:
	}
	cmd := exec.Command(d.cfg.Binary, "--config", d.cfg.file())
	// It manages one container: a second processor gives it nothing but threads.
	cmd.Env = []string{"PATH=" + d.cfg.Path, "GOMAXPROCS=1", "CONTAINERD_DISABLE_IGZIP=1", "CONTAINERD_DISABLE_PIGZ=1"}
	cmd.Stdout, cmd.Stderr = d.cfg.Log, d.cfg.Log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// Shims inherit containerd's output; do not wait for them.
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start containerd: %w", err)
	}
	d.proc = cmd.Process
	return cmd.Wait, nil
}

func (d *Daemon) supervise(wait func() error) {
	defer close(d.stopped)
	failures := 0
	for {
		began := time.Now()
		err := wait()
		select {
		case <-d.stop:
			return
		default:
		}
		if time.Since(began) > steadyAfter {
			failures = 0
		}
		failures++
		if err == nil {
			err = errors.New("exit status 0")
		}
		d.cfg.Printf("containerd ended reason=%q restart=%d", err, failures)
		for {
			if failures > restartLimit {
				d.mu.Lock()
				d.err = fmt.Errorf("ended %d times in a row, the last time: %w", failures, err)
				d.mu.Unlock()
				return
			}
			select {
			case <-d.stop:
				return
			case <-time.After(min(restartFirst<<(failures-1), restartMax)):
			}
			if wait, err = d.run(); err == nil {
				break
			}
			failures++
		}
		d.client.Reconnect()
	}
}

// Stop ends containerd and its supervision. Containers are not stopped by it.
func (d *Daemon) Stop() {
	d.mu.Lock()
	select {
	case <-d.stop:
	default:
		close(d.stop)
	}
	proc := d.proc
	d.mu.Unlock()
	proc.Signal(syscall.SIGTERM)
	select {
	case <-d.stopped:
	case <-time.After(termWithin):
		proc.Kill()
		<-d.stopped
	}
	d.client.Close()
}

// LayerFile is where the layer cache holds a layer, by its diffID (sha256:<hex>).
func LayerFile(cache, diffID string) (string, error) {
	hex, ok := strings.CutPrefix(diffID, "sha256:")
	if !ok || len(hex) != 64 || strings.Trim(hex, "0123456789abcdef") != "" {
		return "", fmt.Errorf("diffID %q is not sha256:<hex>", diffID)
	}
	return filepath.Join(cache, "sha256", hex[:2], hex+".erofs"), nil
}
