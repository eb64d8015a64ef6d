package workload_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"

	"coffer/agent/agenttest"
	"coffer/agent/daemon"
	"coffer/agent/workload"
	"coffer/internal/testenv"
)

type run struct {
	*workload.Runner
	daemon *daemon.Daemon
	out    *agenttest.Buffer
	dir    string // holds user_config, user_data, applog, vault
}

// runner makes a container of the shell script.
func runner(t *testing.T, script string, change func(*workload.Config)) run {
	t.Helper()
	testenv.Root(t)
	src := agenttest.Image(t, `{"Entrypoint":["/bin/sh","-c"],"Cmd":["echo default"],"Env":["PATH=/bin","FROM_IMAGE=yes"],"WorkingDir":"/etc"}`)
	d := agenttest.StartDaemon(t, src.Layers)
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
	out := &agenttest.Buffer{}
	cfg := workload.Config{
		ID: "workload", Hostname: "cvm_0123456789ab", Cgroup: fmt.Sprintf("/coffer-test-%d/workload", os.Getpid()),
		Env: []string{"EXTRA=1"}, PidsMax: 64, MemoryMiB: 64, TmpMiB: 8, Binds: binds,
		TaskDir: d.TaskDir("workload"), FIFODir: filepath.Join(dir, "fifo"), RuncRoot: filepath.Join(dir, "runc"), Stdout: out, Stderr: out,
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
		agenttest.RemoveCgroups(cfg.Cgroup)
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
		r.out.Await(t, "ready")
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
		r.out.Await(t, "ready")
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
		r.out.Await(t, "ready")
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
	r.out.Await(t, "before")
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

// What the workload prints while containerd is killed again and again arrives,
// all of it and in order.
func TestLogSurvivesContainerd(t *testing.T) {
	const lines = 3000
	r := runner(t, fmt.Sprintf(`i=0; while [ $i -lt %d ]; do i=$((i+1)); echo line $i; [ $((i %% 100)) = 0 ] && sleep 0.3; done; exit 5`, lines), nil)
	ended := r.start(t)
	kills := 0
	for running := true; running; {
		select {
		case <-ended:
			running = false
		case <-time.After(500 * time.Millisecond):
			if kills < 3 {
				awaitServing(t, r.daemon, killContainerd(t, r.daemon))
				kills++
			}
		}
	}
	if kills == 0 {
		t.Fatal("the workload ended before containerd was killed")
	}
	var want strings.Builder
	for i := range lines {
		fmt.Fprintf(&want, "line %d\n", i+1)
	}
	if got := r.out.String(); got != want.String() {
		t.Errorf("after %d kills %d of %d bytes arrived", kills, len(got), want.Len())
	}
	if e := r.Exit(); e.Err != nil || e.Code != 5 {
		t.Errorf("exit is %v, want code 5", e)
	}
}

// What root in the container cannot read, change or do.
func TestConfinement(t *testing.T) {
	r := runner(t, `
		try() { name=$1; shift; "$@" >/dev/null 2>&1 && echo "CAN $name" || echo "cannot $name"; }
		for f in kcore keys timer_list sched_debug; do [ -e /proc/$f ] && { [ "$(busybox head -c 1 /proc/$f 2>/dev/null | busybox wc -c)" = 0 ] && echo masked $f || echo "CAN read $f"; }; done
		[ -z "$(ls /sys/firmware 2>/dev/null)" ] && echo masked firmware || echo CAN list firmware
		try sysctl busybox sh -c 'echo 1 >/proc/sys/kernel/sysrq'
		try sysrq busybox sh -c 'echo h >/proc/sysrq-trigger'
		try sysfs busybox sh -c 'echo 0 >/sys/kernel/mm/transparent_hugepage/enabled'
		try cgroup busybox mkdir /sys/fs/cgroup/x
		try bind mount -o bind /vault /tmp
		try remount mount -o remount,exec /applog
		try pivot busybox pivot_root /vault /vault
		try ping busybox ping -c 1 -W 1 127.0.0.1
		try packet busybox arping -c 1 -I lo 127.0.0.1
		try link busybox ip link set lo mtu 1000
		busybox date -s 2001-01-01 >/dev/null 2>&1; try clock [ "$(busybox date +%Y)" = 2001 ]
		try hostname busybox hostname other
		try modprobe busybox insmod /nothing.ko
		try reboot busybox reboot -f
		try swap busybox swapon /vault/x
		try chroot-out busybox sh -c 'echo x >/proc/1/root/proc/sys/kernel/sysrq'
		try dmesg busybox dmesg
		try nice busybox nice -n -5 true
		echo 'echo ran' >/applog/p; busybox chmod 755 /applog/p; try applog /applog/p
		busybox cp /bin/busybox /vault/su; busybox chmod 4755 /vault/su; busybox stat -c %a /vault/su
		ulimit -c; echo nofile $(ulimit -n)
		busybox ps | busybox wc -l`, nil)
	waitFor(t, r.start(t))
	out := r.out.String()
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, "CAN ") {
			t.Errorf("the workload %s", strings.TrimSpace(line))
		}
	}
	for _, want := range []string{"masked keys", "masked firmware", "cannot sysctl", "cannot packet", "cannot bind", "cannot reboot", "cannot clock", "cannot applog"} {
		if !strings.Contains(out, want) {
			t.Errorf("output lacks %q", want)
		}
	}
	if t.Failed() {
		t.Log(out)
	}
}

// The limits of the guest config hold.
func TestLimits(t *testing.T) {
	r := runner(t, `busybox head -c 16m /dev/zero >/tmp/fill || echo tmp is full
		busybox head -c 16m /dev/zero >/dev/shm/fill || echo shm is full
		i=0; while [ $i -lt 100 ]; do busybox sleep 5 & i=$((i+1)); done; echo all started`, func(c *workload.Config) { c.PidsMax = 20 })
	waitFor(t, r.start(t))
	out := r.out.String()
	for _, want := range []string{"tmp is full", "shm is full", "can't fork"} {
		if !strings.Contains(out, want) {
			t.Errorf("output lacks %q: %s", want, out)
		}
	}
	if strings.Contains(out, "all started") {
		t.Error("more processes than the limit allows")
	}
}

// A workload that ends while containerd is down is known to have ended, and how; it
// can run again.
func TestExitWhileContainerdIsDown(t *testing.T) {
	r := runner(t, `echo before; while [ ! -e /user_data/go ]; do sleep 0.1; done; exit 33`, nil)
	ended := r.start(t)
	r.out.Await(t, "before")
	if err := os.WriteFile(filepath.Join(r.dir, "user_data/go"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	killContainerd(t, r.daemon)
	waitFor(t, ended)
	if e := r.Exit(); e.Err != nil || e.Code != 33 {
		t.Errorf("exit is %v, want code 33", e)
	}
	waitFor(t, r.start(t))
	if e := r.Exit(); e.Err != nil || e.Code != 33 {
		t.Errorf("exit of the second run is %v, want code 33", e)
	}
}

// A run whose shim dies is over: containerd kills what is left and tells.
func TestShimKilled(t *testing.T) {
	r := runner(t, `echo ready; sleep 100`, nil)
	ended := r.start(t)
	r.out.Await(t, "ready")
	state, _, _ := strings.Cut(r.daemon.TaskDir("workload"), "/io.containerd") // its socket is an argument of the shim
	processes, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	killed := 0
	for _, p := range processes {
		cmdline, _ := os.ReadFile(p)
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(p))); err == nil && strings.Contains(string(cmdline), "containerd-shim") && strings.Contains(string(cmdline), state) {
			syscall.Kill(pid, syscall.SIGKILL)
			killed++
		}
	}
	if killed != 1 {
		t.Fatalf("%d shims were killed", killed)
	}
	waitFor(t, ended)
	if e := r.Exit(); e.Err == nil && e.Code != 137 {
		t.Errorf("exit is %v, want code 137 or unknown", e)
	}
}

// The limit of CPU time is in force.
func TestCPULimit(t *testing.T) {
	r := runner(t, `echo ready; sleep 30`, func(c *workload.Config) { c.CPUPercent = 150 })
	r.start(t)
	r.out.Await(t, "ready")
	group := fmt.Sprintf("/coffer-test-%d/workload", os.Getpid())
	got := ""
	for _, f := range []string{"/sys/fs/cgroup" + group + "/cpu.max", "/sys/fs/cgroup/cpu" + group + "/cpu.cfs_quota_us"} { // cgroup v2, v1
		if b, err := os.ReadFile(f); err == nil {
			got = strings.Fields(string(b))[0]
		}
	}
	if got != "150000" { // of 100,000 microseconds
		t.Errorf("the group's quota is %q, want 150000", got)
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
	src := agenttest.Image(t, `{"Cmd":["/bin/sh"]}`)
	d := agenttest.StartDaemon(t, src.Layers)
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
