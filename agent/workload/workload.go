// Package workload runs the one container of a guest with containerd: host
// network, no new privileges, seccomp, few capabilities, no devices but those that
// the caller adds, limits.
//
// The container's output goes to writers of the caller, which must neither fail
// nor block: what blocks them blocks the workload. The container and its output
// survive a restart of containerd.
package workload

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"

	"coffer/agent/daemon"

	// The user named in an image is looked up in its EROFS layers.
	_ "github.com/containerd/containerd/v2/plugins/mount/fsview/erofs"
)

// Config is how the container runs.
type Config struct {
	ID             string
	Hostname       string
	Cgroup         string // absolute path below the cgroup root
	CgroupRoot     string // /sys/fs/cgroup, cgroup v2
	Args           []string
	Env            []string
	MemoryMiB      int64 // 0: no limit
	CPUPercent     int64 // of one CPU; 0: no limit
	PidsMax        int64
	TmpMiB         int64 // /tmp and /dev/shm, each
	Binds          []Bind
	Path           string       // added at the end of PATH
	Devices        oci.SpecOpts // adds devices and what they need; may be nil
	TaskDir        string       // where containerd keeps what it knows of the run's shim
	FIFODir        string
	RuncRoot       string // runc's state
	Stdout, Stderr io.Writer
}

func sizeMiB(mib int64) string { return "size=" + strconv.FormatInt(mib, 10) + "m" }

// Times of the workload's management.
const (
	askTime   = 2 * time.Second // for containerd to pause or to kill
	killEvery = 500 * time.Millisecond
	askEvery  = 200 * time.Millisecond
	lostAfter = 2 * time.Minute // containerd has not answered for so long: the workload is lost
)

// Exit is how a run ended.
type Exit struct {
	Code int
	Err  error // the run's end is not known: containerd was lost
}

// Signal is the signal that ended the run, 0 if none did. A shell's exit code
// for a child's signal looks the same.
func (e Exit) Signal() syscall.Signal {
	if e.Err == nil && e.Code > 128 && e.Code <= 128+64 {
		return syscall.Signal(e.Code - 128)
	}
	return 0
}

func (e Exit) String() string {
	switch s := e.Signal(); {
	case e.Err != nil:
		return "code=unknown reason=" + strconv.Quote(e.Err.Error())
	case s != 0:
		return fmt.Sprintf("code=%d signal=%d", e.Code, s)
	}
	return fmt.Sprintf("code=%d", e.Code)
}

// Runner runs the container, again where asked to. Its methods are not safe for
// concurrent use, but for Exited's channel.
type Runner struct {
	client    *client.Client
	cfg       Config
	container client.Container

	mu   sync.Mutex
	task client.Task
	exit Exit
	done chan struct{} // closed when the present run has ended
}

// Create makes the container with a fresh writable layer. It starts nothing.
func Create(ctx context.Context, c *client.Client, image client.Image, cfg Config) (*Runner, error) {
	container, err := c.NewContainer(ctx, cfg.ID,
		client.WithImage(image),
		client.WithImageStopSignal(image, "SIGTERM"),
		client.WithRuntime(plugins.RuntimeRuncV2, &options.Options{Root: cfg.RuncRoot}),
		client.WithSnapshotter(daemon.Snapshotter),
		client.WithNewSnapshot(cfg.ID, image),
		client.WithNewSpec(specOpts(&cfg, image)...),
	)
	if err != nil {
		return nil, fmt.Errorf("create container %s: %w", cfg.ID, err)
	}
	return &Runner{client: c, cfg: cfg, container: container}, nil
}

// Start starts a run. ctx bounds the start, not the run. The channel is closed
// when the run has ended; Exit then tells how.
func (r *Runner) Start(ctx context.Context) (ended <-chan struct{}, err error) {
	if _, done := r.run(); done != nil {
		select {
		case <-done:
		default:
			return nil, errors.New("the workload runs already")
		}
	}
	var held fifos
	task, err := r.container.NewTask(ctx, held.hold(cio.NewCreator(
		cio.WithStreams(nil, r.cfg.Stdout, r.cfg.Stderr), cio.WithFIFODir(r.cfg.FIFODir))))
	if err != nil {
		held.release()
		return nil, fmt.Errorf("create the task: %w", err)
	}
	if err := task.Start(ctx); err != nil {
		held.release()
		r.delete(ctx, task)
		return nil, fmt.Errorf("start the task: %w", err)
	}
	done := make(chan struct{})
	r.mu.Lock()
	r.task, r.done = task, done
	r.mu.Unlock()
	go func() {
		exit, err := shimExit(context.Background(), r.cfg.TaskDir, r.cfg.ID)
		if err != nil {
			exit = await(task)
		}
		held.release()
		r.delete(context.Background(), task)
		r.mu.Lock()
		r.exit = exit
		r.mu.Unlock()
		close(done)
	}()
	return done, nil
}

// fifos holds the pipes of a run's output open from before its start until its
// end. The client opens them in the background: a run that was over before
// would take its output with it, because a pipe that nobody holds forgets.
type fifos []*os.File

// hold makes create hold the pipes that it makes.
func (f *fifos) hold(create cio.Creator) cio.Creator {
	return func(id string) (cio.IO, error) {
		io, err := create(id)
		if err != nil {
			return nil, err
		}
		for _, path := range []string{io.Config().Stdout, io.Config().Stderr} {
			pipe, err := os.OpenFile(path, os.O_RDWR|syscall.O_NONBLOCK, 0)
			if err != nil {
				io.Cancel()
				io.Close()
				return nil, err
			}
			*f = append(*f, pipe)
		}
		return io, nil
	}
}

func (f *fifos) release() {
	for _, pipe := range *f {
		pipe.Close()
	}
	*f = nil
}

// run is the present or last run; done is nil where there was none.
func (r *Runner) run() (task client.Task, done <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.task, r.done
}

// Exit tells how the last run ended.
func (r *Runner) Exit() Exit {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.exit
}

// await asks containerd for the run's end until it is known. containerd answers
// with an error when it goes down itself; the run then goes on without it.
func await(task client.Task) Exit {
	silent := time.Now()
	for {
		asked := time.Now()
		ch, err := task.Wait(context.Background())
		if err == nil {
			status := <-ch
			var code uint32
			if code, _, err = status.Result(); err == nil {
				return Exit{Code: int(code)}
			}
			err = errgrpc.ToNative(err)
		}
		if time.Since(asked) > askEvery {
			silent = time.Now() // it listened for a while, so it was there
		}
		if errdefs.IsNotFound(err) {
			// A containerd that starts forgets the runs that ended while it was away.
			return Exit{Code: -1, Err: fmt.Errorf("the run ended while containerd was down: %w", err)}
		}
		if time.Since(silent) > lostAfter {
			return Exit{Code: -1, Err: fmt.Errorf("containerd has not answered for %s: %w", lostAfter, err)}
		}
		time.Sleep(askEvery)
	}
}

// delete removes a task that has ended or never started, once containerd is there.
func (r *Runner) delete(ctx context.Context, task client.Task) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	// Delete waits for the output without a limit; the container's processes
	// are dead, but whoever else holds the pipe is not known.
	within(ctx, func() {
		for ctx.Err() == nil {
			if _, err := task.Delete(ctx, client.WithProcessKill); !errdefs.IsUnavailable(err) {
				return
			}
			time.Sleep(askEvery)
		}
	})
}

// within returns when f has, or ctx has ended.
func within(ctx context.Context, f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-ctx.Done():
	}
}

// Kill ends the run at once: the kernel kills all of its processes in one go.
// Where it cannot (no cgroup v2), and where something is left, containerd does:
// it pauses them, so that none acts any more, and kills. nil means that none is
// left.
func (r *Runner) Kill(ctx context.Context) error {
	killed := r.killCgroup() // also what a start that failed half-way has left
	task, done := r.run()
	if done == nil {
		return nil
	}
	if killed != nil {
		pause, cancel := context.WithTimeout(ctx, askTime)
		task.Pause(pause) // the kill is what counts
		cancel()
	}
	tick := time.NewTicker(killEvery)
	defer tick.Stop()
	for {
		if killed != nil {
			try, cancel := context.WithTimeout(ctx, askTime)
			killed = task.Kill(try, syscall.SIGKILL, client.WithKillAll)
			cancel()
		}
		select {
		case <-done:
			return nil
		case <-ctx.Done():
			return fmt.Errorf("the workload does not die: %w", errors.Join(ctx.Err(), killed))
		case <-tick.C:
			r.killCgroup()
			killed = errAlive
		}
	}
}

// errAlive makes Kill ask containerd, too.
var errAlive = errors.New("its processes are still there")

// killCgroup kills without containerd's help. It returns an error where that
// cannot be done.
func (r *Runner) killCgroup() error {
	if r.cfg.CgroupRoot == "" {
		return errAlive
	}
	f, err := os.OpenFile(filepath.Join(r.cfg.CgroupRoot, r.cfg.Cgroup, "cgroup.kill"), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString("1")
	return errors.Join(err, f.Close())
}

// Terminate asks the workload to end by its image's stop signal, gives it grace,
// and then kills it.
func (r *Runner) Terminate(ctx context.Context, grace time.Duration) error {
	task, done := r.run()
	if done == nil {
		return nil
	}
	signal, err := client.GetStopSignal(ctx, r.container, syscall.SIGTERM)
	if err != nil {
		signal = syscall.SIGTERM
	}
	if err := task.Kill(ctx, signal); err == nil {
		timer := time.NewTimer(grace)
		defer timer.Stop()
		select {
		case <-done:
			return nil
		case <-timer.C:
		case <-ctx.Done():
		}
	}
	return r.Kill(ctx)
}

// Remove removes the container and its writable layer.
func (r *Runner) Remove(ctx context.Context) error {
	return r.container.Delete(ctx, client.WithSnapshotCleanup)
}
