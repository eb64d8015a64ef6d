package workload_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	erofs "github.com/erofs/go-erofs"

	"coffer/agent/daemon"
	"coffer/agent/workload"
	"coffer/internal/testenv"
)

// programs is the folder of containerd, its shim and runc: $COFFER_BIN, else
// bin at the repository's top.
func programs(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("COFFER_BIN")
	if dir == "" {
		dir, _ = filepath.Abs("../../bin")
	}
	for _, name := range []string{"containerd", "containerd-shim-runc-v2", "runc"} {
		_, err := os.Stat(filepath.Join(dir, name))
		testenv.Need(t, err == nil, fmt.Sprintf("no %s in %s: build the guest programs or set COFFER_BIN", name, dir))
	}
	return dir
}

// imageFiles is an image of one layer with busybox, as the builder leaves it.
func imageFiles(t *testing.T, config string) workload.ImageSource {
	t.Helper()
	dir := t.TempDir()
	busybox, err := os.ReadFile(testenv.LookTool(t, "busybox"))
	if err != nil {
		t.Fatal(err)
	}

	blob, err := os.Create(filepath.Join(dir, "layer.erofs"))
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	w := erofs.Create(blob, erofs.WithBuildTime(1, 0))
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{"/bin", "/etc", "/proc", "/sys", "/dev", "/tmp"} {
		must(w.Mkdir(d, 0o755))
	}
	put := func(name string, mode os.FileMode, data []byte) {
		f, err := w.Create(name)
		must(err)
		_, err = f.Write(data)
		must(err)
		must(f.Chmod(mode))
		must(f.Close())
	}
	put("/bin/busybox", 0o755, busybox)
	put("/etc/passwd", 0o644, []byte("root:x:0:0::/:/bin/sh\nflare:x:1234:1234::/:/bin/sh\n"))
	put("/etc/group", 0o644, []byte("root:x:0:\nflare:x:1234:\n"))
	for _, a := range []string{"sh", "cat", "echo", "id", "sleep", "grep", "mount", "ls", "mknod", "unshare", "dd", "df", "touch", "stat", "ulimit", "hostname", "seq"} {
		must(w.Symlink("busybox", "/bin/"+a))
	}
	must(w.Close())

	// The name in the cache is what counts; no layer tar exists.
	diffID := sha256.Sum256([]byte("layer of " + t.Name()))
	hexID := hex.EncodeToString(diffID[:])
	layers := filepath.Join(dir, "layers")
	must(os.MkdirAll(filepath.Join(layers, "sha256", hexID[:2]), 0o755))
	must(os.Rename(blob.Name(), filepath.Join(layers, "sha256", hexID[:2], hexID+".erofs")))

	var out bytes.Buffer
	tw := tar.NewWriter(&out)
	add := func(name string, data []byte) {
		must(tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data))}))
		_, err := tw.Write(data)
		must(err)
	}
	blobOf := func(data []byte) string {
		sum := sha256.Sum256(data)
		d := hex.EncodeToString(sum[:])
		add("blobs/sha256/"+d, data)
		return "sha256:" + d
	}
	cfg := []byte(fmt.Sprintf(`{"architecture":"amd64","os":"linux","config":%s,"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}`, config, hexID))
	cfgDigest := blobOf(cfg)
	manifest, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": map[string]any{"mediaType": "application/vnd.oci.image.config.v1+json", "digest": cfgDigest, "size": len(cfg)},
		"layers": []any{map[string]any{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": "sha256:" + hexID, "size": 1024}},
	})
	must(err)
	digest := blobOf(manifest)
	index, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
		"manifests": []any{map[string]any{"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": len(manifest),
			"annotations": map[string]string{"io.containerd.image.name": "docker.io/library/test:1"}}},
	})
	must(err)
	add("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
	add("index.json", index)
	must(tw.Close())
	meta := filepath.Join(dir, "meta.tar")
	must(os.WriteFile(meta, out.Bytes(), 0o644))
	return workload.ImageSource{Meta: meta, Layers: layers, Digest: digest}
}

// buffer is a writer that tests read while it is written to.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// await waits until b holds text.
func (b *buffer) await(t *testing.T, text string) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !strings.Contains(b.String(), text); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("output never held %q: %q", text, b.String())
		}
	}
}

// startPlain starts a child for a process that is not PID 1.
func startPlain(cmd *exec.Cmd) (func() error, error) { return cmd.Wait, cmd.Start() }

func startDaemon(t *testing.T, layers string) *daemon.Daemon {
	t.Helper()
	testenv.Root(t)
	bin := programs(t)
	// A short path: the sockets below it have names of at most 107 bytes.
	dir, err := os.MkdirTemp("", "cof")
	if err != nil {
		t.Fatal(err)
	}
	var log buffer
	d, err := daemon.Start(context.Background(), daemon.Config{
		Binary: filepath.Join(bin, "containerd"), Path: bin,
		Root: dir + "/root", State: dir + "/state", Snapshots: dir + "/upper", Layers: layers,
		Log: &log, Start: startPlain, Printf: t.Logf,
	})
	if err != nil {
		t.Fatalf("%v\n%s", err, log.String())
	}
	t.Cleanup(func() {
		d.Stop()
		if t.Failed() {
			t.Logf("containerd: %s", log.String())
		}
		// Shims leave their mounts to containerd, which may be gone.
		mounts, _ := os.ReadFile("/proc/self/mounts")
		for line := range strings.Lines(string(mounts)) {
			if f := strings.Fields(line); len(f) > 1 && strings.HasPrefix(f[1], dir) {
				syscall.Unmount(f[1], syscall.MNT_DETACH)
			}
		}
		os.RemoveAll(dir)
	})
	return d
}

type run struct {
	*workload.Runner
	daemon *daemon.Daemon
	out    *buffer
	dir    string // holds user_config, user_data, applog, vault
}

// runner makes a container of the shell script.
func runner(t *testing.T, script string, change func(*workload.Config)) run {
	t.Helper()
	testenv.Root(t)
	src := imageFiles(t, `{"Entrypoint":["/bin/sh","-c"],"Cmd":["echo default"],"Env":["PATH=/bin","FROM_IMAGE=yes"],"WorkingDir":"/etc"}`)
	d := startDaemon(t, src.Layers)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	image, err := workload.Import(ctx, d.Client(), src)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	var binds []workload.Bind
	for _, name := range []string{"user_config", "user_data", "applog", "vault"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o777); err != nil {
			t.Fatal(err)
		}
		binds = append(binds, workload.Bind{Source: filepath.Join(dir, name), Target: "/" + name, ReadOnly: name == "user_config", NoExec: name == "applog"})
	}
	for _, name := range []string{"hosts", "resolv.conf"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("# "+name+" of the guest\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		binds = append(binds, workload.Bind{Source: filepath.Join(dir, name), Target: "/etc/" + name, ReadOnly: true})
	}
	out := &buffer{}
	cfg := workload.Config{
		ID: "workload", Hostname: "cvm_0123456789ab", Cgroup: fmt.Sprintf("/coffer-test-%d/workload", os.Getpid()),
		Env: []string{"EXTRA=1"}, PidsMax: 64, MemoryMiB: 64, TmpMiB: 8, Binds: binds,
		FIFODir: filepath.Join(dir, "fifo"), Stdout: out, Stderr: out,
	}
	if script != "" {
		cfg.Args = []string{script}
	}
	if change != nil {
		change(&cfg)
	}
	r, err := workload.Create(ctx, d.Client(), image, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := r.Kill(ctx); err != nil {
			t.Errorf("kill at the end: %v", err)
		}
		if err := r.Remove(ctx); err != nil {
			t.Errorf("remove: %v", err)
		}
		for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
			for _, p := range []string{cfg.Cgroup, filepath.Dir(cfg.Cgroup)} {
				dirs, _ := filepath.Glob(root + p)
				for _, d := range dirs {
					syscall.Rmdir(d)
				}
			}
		}
	})
	return run{r, d, out, dir}
}

func (r run) start(t *testing.T) <-chan struct{} {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	ended, err := r.Start(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return ended
}

func waitFor(t *testing.T, ended <-chan struct{}) {
	t.Helper()
	select {
	case <-ended:
	case <-time.After(30 * time.Second):
		t.Fatal("the workload did not end")
	}
}

func TestRunToExit(t *testing.T) {
	r := runner(t, `
		echo "env=$FROM_IMAGE,$EXTRA cwd=$PWD"; echo on stderr >&2
		grep -e NoNewPrivs -e Seccomp: -e CapEff -e CapBnd /proc/self/status
		cat /etc/hosts /etc/resolv.conf; hostname
		echo data >/user_data/a; echo data >/vault/b; echo data >/rootfs-is-writable && echo wrote root
		touch /user_config/c || echo user_config read only
		mknod /tmp/dev c 1 3 || echo no mknod
		unshare -U sh -c 'echo user namespace' || echo no user namespace
		mount -t tmpfs none /vault || echo no mount
		df /tmp
		exit 7`, nil)
	waitFor(t, r.start(t))
	if e := r.Exit(); e.Err != nil || e.Code != 7 {
		t.Errorf("exit is %v, want code 7", e)
	}
	for _, want := range []string{
		"env=yes,1 cwd=/etc", "on stderr", "NoNewPrivs:\t1", "Seccomp:\t2",
		"CapEff:\t00000000800405fb", "CapBnd:\t00000000800405fb", "cvm_0123456789ab",
		"# hosts of the guest", "# resolv.conf of the guest", "wrote root", "user_config read only", "no mknod", "no user namespace", "no mount",
		" 8192 ",
	} {
		if !strings.Contains(r.out.String(), want) {
			t.Errorf("output lacks %q:\n%s", want, r.out.String())
		}
	}
	for _, f := range []string{"user_data/a", "vault/b"} {
		if b, err := os.ReadFile(filepath.Join(r.dir, f)); err != nil || string(b) != "data\n" {
			t.Errorf("%s: %q, %v", f, b, err)
		}
	}
}

func TestImageDefaultsAndRestart(t *testing.T) {
	r := runner(t, "", nil)
	for i := 1; i <= 2; i++ { // the same container can run again
		waitFor(t, r.start(t))
		if e := r.Exit(); e.Err != nil || e.Code != 0 {
			t.Fatalf("run %d: exit is %v, want code 0", i, e)
		}
		if got := strings.Count(r.out.String(), "default\n"); got != i {
			t.Fatalf("after run %d the image's own command has run %d times", i, got)
		}
	}
}

func TestKillAndTerminate(t *testing.T) {
	const stubborn = `trap "echo got TERM" TERM; echo ready; while :; do sleep 1 & wait $!; done`
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	t.Run("kill gives no chance", func(t *testing.T) {
		r := runner(t, stubborn, nil)
		ended := r.start(t)
		r.out.await(t, "ready")
		if err := r.Kill(ctx); err != nil {
			t.Fatal(err)
		}
		waitFor(t, ended)
		if e := r.Exit(); e.Code != 137 || e.Signal() != syscall.SIGKILL {
			t.Errorf("exit is %v, want signal 9", e)
		}
		if strings.Contains(r.out.String(), "got TERM") {
			t.Error("the workload got a signal that it could catch")
		}
	})
	t.Run("grace passes", func(t *testing.T) {
		r := runner(t, stubborn, nil)
		r.start(t)
		r.out.await(t, "ready")
		if err := r.Terminate(ctx, 500*time.Millisecond); err != nil {
			t.Fatal(err)
		}
		if e := r.Exit(); e.Code != 137 {
			t.Errorf("exit is %v, want code 137", e)
		}
		if !strings.Contains(r.out.String(), "got TERM") {
			t.Error("the workload was not asked to end")
		}
	})
	t.Run("polite", func(t *testing.T) {
		r := runner(t, `trap "echo bye; exit 3" TERM; echo ready; while :; do sleep 1 & wait $!; done`, nil)
		r.start(t)
		r.out.await(t, "ready")
		if err := r.Terminate(ctx, 20*time.Second); err != nil {
			t.Fatal(err)
		}
		if e := r.Exit(); e.Code != 3 {
			t.Errorf("exit is %v, want code 3", e)
		}
	})
}

// A killed containerd stops neither the workload nor its output, and the exit
// code still arrives.
func TestContainerdKilled(t *testing.T) {
	r := runner(t, `echo before; while [ ! -e /user_data/go ]; do sleep 0.1; done; echo after; exit 33`, nil)
	ended := r.start(t)
	r.out.await(t, "before")
	pid := killContainerd(t, r.daemon)
	awaitServing(t, r.daemon, pid)
	if err := os.WriteFile(filepath.Join(r.dir, "user_data/go"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	waitFor(t, ended)
	if e := r.Exit(); e.Err != nil || e.Code != 33 {
		t.Errorf("exit is %v, want code 33", e)
	}
	if !strings.Contains(r.out.String(), "after") {
		t.Errorf("output after the restart is lost: %q", r.out.String())
	}
}

// A workload that ends while containerd is down is known to have ended, though
// containerd may have lost its exit code.
func TestExitWhileContainerdIsDown(t *testing.T) {
	r := runner(t, `echo before; while [ ! -e /user_data/go ]; do sleep 0.1; done; exit 33`, nil)
	ended := r.start(t)
	r.out.await(t, "before")
	if err := os.WriteFile(filepath.Join(r.dir, "user_data/go"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	killContainerd(t, r.daemon)
	waitFor(t, ended)
	if e := r.Exit(); e.Err == nil && e.Code != 33 {
		t.Errorf("exit is %v, want code 33 or unknown", e)
	}
}

func killContainerd(t *testing.T, d *daemon.Daemon) (pid int) {
	t.Helper()
	pid = d.Pid()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	return pid
}

// awaitServing waits until another containerd than old serves.
func awaitServing(t *testing.T, d *daemon.Daemon, old int) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		ok, err := d.Client().IsServing(ctx)
		cancel()
		if d.Pid() != old && ok {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("no new containerd serves: %v", err)
		}
	}
}

func TestImportRefuses(t *testing.T) {
	src := imageFiles(t, `{"Cmd":["/bin/sh"]}`)
	d := startDaemon(t, src.Layers)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	refuse := func(src workload.ImageSource, want string) {
		t.Helper()
		var img client.Image
		img, err := workload.Import(ctx, d.Client(), src)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, %v; want an error with %q", img, err, want)
		}
	}
	other := src
	other.Digest = "sha256:" + strings.Repeat("0", 64)
	refuse(other, "holds no manifest sha256:0000")

	empty := src
	empty.Layers = t.TempDir()
	refuse(empty, "is not in the cache")

	none := src
	none.Meta = filepath.Join(t.TempDir(), "meta.tar")
	refuse(none, "no such file")

	cut := src
	cut.Meta = filepath.Join(t.TempDir(), "meta.tar")
	if err := copyN(cut.Meta, src.Meta, 700); err != nil {
		t.Fatal(err)
	}
	refuse(cut, "import")
}

func copyN(dst, src string, n int64) error {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(dst)
	if err != nil {
		return err
	}
	_, err = io.CopyN(out, in, n)
	out.Close()
	return err
}
