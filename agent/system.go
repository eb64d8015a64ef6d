package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"coffer/agent/drives"
	"coffer/agent/nfs"
	"coffer/agent/nvidia"
	"coffer/agent/vault"
	"coffer/internal/boot"
	"coffer/internal/evidence"
	"coffer/internal/firewall"
	"coffer/internal/guestconfig"
	"coffer/internal/netup"
	"coffer/kbsclient"
)

// System is the machine that this process is the agent of. flush gives
// the console the time that it is worth, before the power goes.
func System(flush func()) Deps {
	stayed := make(chan error, 1)
	go func() { stayed <- stay() }()
	go readAhead("/bin/containerd", "/bin/containerd-shim-runc-v2", "/bin/runc")
	return Deps{
		Paths: Paths{
			Bin: "/bin", Run: "/run", Applog: "/applog", UserConfig: "/user_config", UserData: "/user_data",
			Scratch: "/scratch", CgroupRoot: "/sys/fs/cgroup", Cgroup: "/coffer/workload",
			ImageMeta: guestconfig.ImageMetaPath, Layers: guestconfig.ImageLayersPath,
			ResolvConf: guestconfig.ResolvConfPath, Hosts: guestconfig.HostsPath,
		},
		Mount: mountSystem,
		Stay: func(ctx context.Context) error {
			select {
			case err := <-stayed:
				return err
			case <-ctx.Done():
				return ctx.Err()
			}
		},
		Handover:  readHandover,
		Hostname:  func(name string) error { return unix.Sethostname([]byte(name)) },
		Firewall:  firewall.Apply,
		Network:   netup.Configure,
		Lookup:    netup.Lookup,
		Attach:    drives.Attach,
		Detach:    detach,
		Share:     nfs.Share,
		NFS:       nfs.Kernel{},
		Overlay:   drives.Overlay,
		OpenVault: vault.Open,
		Evidence:  evidence.Open,
		KBS:       newKBS,
		GPUs:      newGPUs,
		NVIDIA:    nvidia.System(),
		Now:       boot.SinceKernelStart,
		Stop:      stopRequests(),
		PowerOff: func() {
			flush()
			boot.PowerOff()
		},
	}
}

// readAhead has the kernel read programs before they are needed. They lie behind
// dm-verity and dm-crypt, which work on another processor meanwhile.
func readAhead(paths ...string) {
	for _, path := range paths {
		if f, err := os.Open(path); err == nil {
			_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_WILLNEED)
			f.Close()
		}
	}
}

// mountSystem makes of what init has left (/dev, /proc, /sys, /run) a system that
// containers run on.
func mountSystem() error {
	const strict = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	for _, m := range []struct {
		fs, at string
		flags  uintptr
		data   string
	}{
		{"devpts", "/dev/pts", unix.MS_NOSUID | unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620"},
		{"tmpfs", "/dev/shm", strict, "mode=1777,size=16m"},
		{"tmpfs", "/tmp", strict, "mode=1777,size=64m"},
		{"tmpfs", "/var", strict, "mode=0755,size=16m"},
		{"cgroup2", "/sys/fs/cgroup", strict, "nsdelegate,memory_recursiveprot"},
	} {
		if strings.HasPrefix(m.at, "/dev/") { // the others are there: root and sysfs are read-only
			if err := os.MkdirAll(m.at, 0o755); err != nil {
				return err
			}
		}
		if err := unix.Mount(m.fs, m.at, m.fs, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s at %s: %w", m.fs, m.at, err)
		}
	}
	if err := delegate("/sys/fs/cgroup"); err != nil {
		return err
	}
	for _, s := range sysctls {
		if err := sysctl(s.name, s.value); err != nil {
			return err
		}
	}
	// No core dump of a process that holds a secret; enough files for the workload.
	return errors.Join(
		limit("core", syscall.Rlimit{}, unix.RLIMIT_CORE),
		limit("nofile", syscall.Rlimit{Cur: 1 << 20, Max: 1 << 20}, unix.RLIMIT_NOFILE))
}

// delegate hands every controller that the kernel has to the groups below.
func delegate(root string) error {
	have, err := os.ReadFile(filepath.Join(root, "cgroup.controllers"))
	if err != nil {
		return err
	}
	for _, c := range strings.Fields(string(have)) {
		if err := os.WriteFile(filepath.Join(root, "cgroup.subtree_control"), []byte("+"+c), 0); err != nil {
			return fmt.Errorf("cgroup controller %s: %w", c, err)
		}
	}
	for _, c := range []string{"cpu", "memory", "pids"} {
		if !strings.Contains(" "+strings.TrimSpace(string(have))+" ", " "+c+" ") {
			return fmt.Errorf("the kernel has no cgroup controller %s: the workload's limits would not hold", c)
		}
	}
	return nil
}

// sysctls are what init has not set. It has: no modules, no kexec, no sysrq.
var sysctls = [...]struct{ name, value string }{
	{"kernel/perf_event_paranoid", "3"},
	{"kernel/core_pattern", "/dev/null"},
	{"fs/suid_dumpable", "0"},
	{"fs/protected_fifos", "2"},
	{"fs/protected_regular", "2"},
	{"fs/protected_hardlinks", "1"},
	{"fs/protected_symlinks", "1"},
	{"net/core/bpf_jit_harden", "2"},
	// A user namespace would give the workload capabilities in a network of its
	// own; seccomp refuses it as well.
	{"user/max_user_namespaces", "0"},
}

func sysctl(name, value string) error {
	f, err := os.OpenFile("/proc/sys/"+name, os.O_WRONLY, 0)
	if errors.Is(err, fs.ErrNotExist) { // a kernel without what it restricts
		return nil
	}
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("sysctl %s: %w", name, err)
	}
	return nil
}

// limit sets a limit for this process and, as package syscall remembers it, for
// its children.
func limit(name string, l syscall.Rlimit, resource int) error {
	if err := syscall.Setrlimit(resource, &l); err != nil {
		return fmt.Errorf("limit %s: %w", name, err)
	}
	return nil
}

// readHandover reads the file once: it is removed, as nobody else needs it.
func readHandover() ([]byte, error) {
	fi, err := os.Stat(guestconfig.HandoverPath)
	if err != nil {
		return nil, err
	}
	if fi.Size() > 2*guestconfig.MaxSize {
		return nil, fmt.Errorf("%s has %d bytes", guestconfig.HandoverPath, fi.Size())
	}
	b, err := os.ReadFile(guestconfig.HandoverPath)
	if err != nil {
		return nil, err
	}
	return b, os.Remove(guestconfig.HandoverPath)
}

// detach unmounts; a drive that is still in use is made read-only and let go.
func detach(target string) error {
	err := unix.Unmount(target, 0)
	if errors.Is(err, unix.EBUSY) {
		_ = unix.Mount("", target, "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
		err = unix.Unmount(target, unix.MNT_DETACH)
	}
	return err
}

// kbs is the real verifier. Its client lives as long as the agent.
type kbs struct{ client *kbsclient.Client }

func newKBS(cfg guestconfig.KBS, dial Dial) (KBS, error) {
	c, err := kbsclient.New(kbsclient.Config{
		URL: cfg.URL, RootCAs: []byte(cfg.CA), UserAgent: "coffer-agent", Dial: dial, AttestTimeout: 3 * time.Minute, // the round's own limit is tighter
	})
	if err != nil {
		return nil, err
	}
	return kbs{c}, nil
}

func (k kbs) Fetch(ctx context.Context, a kbsclient.Attester, path string) ([]byte, string, error) {
	s, err := k.client.Attest(ctx, a)
	if err != nil {
		return nil, "", err
	}
	defer s.Close()
	resource, err := s.Resource(ctx, path)
	return resource, s.Token(), err
}

func (k kbs) LastAnswer() kbsclient.Answered { return k.client.LastAnswer() }

// stopRequests tells of the first wish that the machine should stop: a signal,
// Ctrl-Alt-Del, or the power button.
func stopRequests() <-chan string {
	stop := make(chan string, 1)
	ask := func(why string) {
		select {
		case stop <- why:
		default:
		}
	}
	signals := make(chan os.Signal, 4)
	signal.Ignore(unix.SIGPIPE)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGPWR)
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF) // Ctrl-Alt-Del becomes SIGINT
	go func() {
		for s := range signals {
			ask("signal " + s.String())
		}
	}()
	devices, _ := filepath.Glob("/dev/input/event*")
	for _, d := range devices {
		if f, err := os.Open(d); err == nil {
			go func() {
				defer f.Close()
				if awaitPowerKey(f) {
					ask("power button")
				}
			}()
		}
	}
	return stop
}
