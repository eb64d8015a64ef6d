package stages

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/anatol/devmapper.go"
	"github.com/u-root/u-root/pkg/mount"
	"golang.org/x/sys/unix"

	"coffer/internal/boot"
	"coffer/internal/evidence"
	"coffer/internal/firewall"
	"coffer/internal/guestconfig"
	"coffer/internal/netup"
	"coffer/kbsclient"
)

// System is the machine that this process is the first program of.
func System() Deps {
	return Deps{
		Mount:      mountEarly,
		ReadFile:   readFile,
		WriteFile:  writeFile,
		Now:        time.Now,
		SetClock:   setClock,
		ACPITables: acpiTablesOfKernel,
		LoadModule: loadModule,
		MountTSM:   mountTSM,
		Sysctl:     sysctl,
		Lockdown:   lockdown,
		KernelLog:  kernelLog,
		Evidence:   evidence.Open,
		Firewall:   firewall.Apply,
		Network:    netup.Configure,
		Lookup:     netup.Lookup,
		FetchKey:   fetchKey,
		OpenDisk:   openDisk,
		OpenVerity: openVerity,
		MountRoot:  mountRoot,
		Linear:     linear,
		SwitchRoot: switchRoot,
		PowerOff:   boot.PowerOff,
	}
}

const newRoot = "/newroot"

func mountEarly() error {
	const strict = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	for _, m := range []struct {
		fs, at string
		flags  uintptr
		data   string
	}{
		{"devtmpfs", "/dev", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0755"},
		{"proc", "/proc", strict, ""},
		{"sysfs", "/sys", strict, ""},
		{"tmpfs", "/run", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
	} {
		if err := mountAt(m.fs, m.fs, m.at, m.flags, m.data); err != nil {
			return err
		}
	}
	// No core dump of a program that holds the key.
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("limit core: %w", err)
	}
	// Our own resolver reads the files that the agent will be left with.
	if err := os.MkdirAll("/etc", 0o755); err != nil {
		return err
	}
	return errors.Join(
		os.Symlink(guestconfig.ResolvConfPath, "/etc/resolv.conf"),
		os.Symlink(guestconfig.HostsPath, "/etc/hosts"))
}

func mountAt(source, fstype, at string, flags uintptr, data string) error {
	if err := os.MkdirAll(at, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, at, fstype, flags, data); err != nil {
		return fmt.Errorf("mount %s at %s: %w", fstype, at, err)
	}
	return nil
}

func mountTSM() error {
	return mountAt("configfs", "configfs", "/sys/kernel/config", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
}

func mountRoot(dev string) error {
	const flags = unix.MS_RDONLY | unix.MS_NODEV
	if err := mountAt(dev, "erofs", newRoot, flags, ""); err != nil {
		return err
	}
	if err := mountAt(newRoot+guestconfig.ProgramsPath, "erofs", newRoot+"/bin", flags, ""); err != nil {
		return err
	}
	err := unix.Mount(newRoot+guestconfig.NVIDIAPath, newRoot+"/usr", "erofs", flags, "")
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("mount the driver at /usr: %w", err)
	}
	return nil
}

func readFile(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%s is longer than %d bytes", path, limit)
	}
	return b, nil
}

func writeFile(path string, data []byte, perm fs.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, data, perm)
}

func setClock(t time.Time) error {
	ts, err := unix.TimeToTimespec(t)
	if err != nil {
		return err
	}
	return unix.ClockSettime(unix.CLOCK_REALTIME, &ts)
}

func loadModule(path, params string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), params, 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

func sysctl(name, value string) error { return writeExisting("/proc/sys/"+name, value) }

func writeExisting(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// lockdown keeps even root from the kernel's memory and from unsigned code. The
// kernel names its modes so: "none [integrity] confidentiality".
func lockdown() (mode string, err error) {
	const dir, file = "/sys/kernel/security", "/sys/kernel/security/lockdown"
	if err := mountAt("securityfs", "securityfs", dir, unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, unix.Unmount(dir, 0)) }()
	text, err := readFile(file, 256)
	if err == nil && strings.HasPrefix(string(text), "[none]") {
		if err = writeExisting(file, "integrity"); err == nil {
			text, err = readFile(file, 256)
		}
	}
	if err != nil {
		return "", fmt.Errorf("the kernel's lockdown: %w", err)
	}
	_, rest, _ := strings.Cut(string(text), "[")
	mode, _, _ = strings.Cut(rest, "]")
	return mode, nil
}

// kernelLog is as much of the kernel's log as it keeps, a record a line.
func kernelLog() (string, error) {
	const readAll, size = 3, 10 // SYSLOG_ACTION_...
	n, err := unix.Klogctl(size, nil)
	if err != nil {
		return "", fmt.Errorf("read the kernel's log: %w", err)
	}
	b := make([]byte, n)
	if n, err = unix.Klogctl(readAll, b); err != nil {
		return "", fmt.Errorf("read the kernel's log: %w", err)
	}
	return string(b[:n]), nil
}

func fetchKey(ctx context.Context, kbs guestconfig.KBS, peers []netip.AddrPort, a kbsclient.Attester) ([]byte, error) {
	c, err := kbsclient.New(kbsclient.Config{
		URL:       kbs.URL,
		RootCAs:   []byte(kbs.CA),
		UserAgent: "coffer-init",
		Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			var errs []error
			for _, p := range peers {
				conn, err := (&net.Dialer{Timeout: 10 * time.Second}).DialContext(ctx, network, p.String())
				if err == nil {
					return conn, nil
				}
				errs = append(errs, err)
			}
			return nil, errors.Join(errs...)
		},
	})
	if err != nil {
		return nil, err
	}
	s, err := c.Attest(ctx, a)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	return s.Resource(ctx, kbs.KeyPath)
}

// dmDevice returns the device node of a device-mapper device. devtmpfs makes
// /dev/dm-N; nobody makes /dev/mapper/NAME.
func dmDevice(name string) (string, error) {
	info, err := devmapper.InfoByName(name)
	if err != nil {
		return "", fmt.Errorf("device of %s: %w", name, err)
	}
	return fmt.Sprintf("/dev/dm-%d", unix.Minor(info.DevNo)), nil
}

const blockSize = 4096

// openVerity maps the read-only root. From here on a block that is not the
// builder's stops the kernel; the first block is tried without that, so that a
// root that does not fit as a whole gets its line on the console.
func openVerity(_ context.Context, dev string, v guestconfig.Verity) (string, error) {
	const name = "vroot"
	table := devmapper.VerityTable{
		Length:         uint64(v.DataBlocks) * blockSize,
		HashType:       1,
		DataDevice:     dev,
		HashDevice:     dev,
		DataBlockSize:  blockSize,
		HashBlockSize:  blockSize,
		NumDataBlocks:  uint64(v.DataBlocks),
		HashStartBlock: uint64(v.HashStartBlock),
		Algorithm:      "sha256",
		Digest:         v.RootHash,
		Salt:           v.Salt,
	}
	for _, table.Params = range [][]string{nil, {"1", "panic_on_corruption"}} { // number of parameters, then they
		if err := devmapper.CreateAndLoad(name, "", devmapper.ReadOnlyFlag, table); err != nil {
			return "", fmt.Errorf("set up dm-verity: %w", err)
		}
		root, err := dmDevice(name)
		if err != nil || table.Params != nil {
			return root, err
		}
		if _, err := readFirstBlock(root); err != nil {
			return "", fmt.Errorf("the root does not match root hash %s: %w", v.RootHash, err)
		}
		if err := devmapper.Remove(name); err != nil {
			return "", fmt.Errorf("remove dm-verity probe: %w", err)
		}
	}
	return "", nil
}

func readFirstBlock(dev string) ([]byte, error) {
	f, err := os.Open(dev)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, blockSize)
	_, err = io.ReadFull(f, b)
	return b, err
}

func linear(name, dev string, offset, size int64) (string, error) {
	table := devmapper.LinearTable{Length: uint64(size), BackendDevice: dev, BackendOffset: uint64(offset)}
	if err := devmapper.CreateAndLoad(name, "", 0, table); err != nil {
		return "", fmt.Errorf("map %s: %w", name, err)
	}
	return dmDevice(name)
}

func switchRoot(program string) error {
	log.SetOutput(io.Discard) // u-root tells each step
	return mount.SwitchRoot(newRoot, program)
}
