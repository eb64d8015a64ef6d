// Package nvidia gives the guest and its container what NVIDIA's kernel driver has:
// device nodes, which nobody else makes here, and the driver's libraries.
//
// A container gets them as one read-only folder at /usr/local/nvidia, whose lib64
// stands last in LD_LIBRARY_PATH and whose bin stands last in PATH. So nothing has
// to be written into the image, no hook runs, and an image without ldconfig or with
// other library folders works as well; what the image itself puts in LD_LIBRARY_PATH
// still comes first.
//
// Which GPUs, the container's environment says as it does elsewhere:
// NVIDIA_VISIBLE_DEVICES is "all" (also where it is not set: a guest whose config
// asks for GPUs wants them), "none" (libraries only), "void" or empty (nothing), or
// a list of indices, in the order of the PCI bus, and UUIDs. A GPU that is not there
// is an error. NVIDIA_DRIVER_CAPABILITIES changes nothing: there are compute and
// utility, and containers get both.
//
// Where the driver is not loaded, nothing is done. The package knows nothing of
// attestation: whether the GPUs accept work is the driver's and the agent's matter.
package nvidia

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Places in the container.
const (
	folder    = "/usr/local/nvidia"
	libraries = folder + "/lib64"
	programs  = folder + "/bin"
)

const (
	major        = 195 // of nvidiactl and the GPUs
	controlMinor = 255
	maxMinor     = 254

	// mode is what the driver's libraries expect; who may use a node, the
	// container's device rules say.
	mode = 0o666
)

// ErrNoSuchGPU is wrapped where NVIDIA_VISIBLE_DEVICES names what is not there.
var ErrNoSuchGPU = errors.New("no such GPU")

// Driver is the kernel's driver as it shows.
type Driver struct {
	Proc  string // /proc
	Dev   string // where nodes are made
	Files string // of the driver, for containers
	Mknod func(path string, mode uint32, dev int) error
}

// System is the guest's driver.
func System() Driver {
	return Driver{Proc: "/proc", Dev: "/dev", Files: "/usr/nvidia", Mknod: unix.Mknod}
}

// loaded reports whether the kernel has the driver.
func (d Driver) loaded() bool {
	if d.Proc == "" {
		return false
	}
	_, err := os.Stat(filepath.Join(d.Proc, "driver/nvidia"))
	return err == nil
}

// node is a device node.
type node struct {
	name         string // below /dev
	major, minor int64
}

// gpu is one GPU.
type gpu struct {
	minor int64
	uuid  string // "" before it was first used
}

// MakeNodes makes the nodes that the driver's libraries open.
func (d Driver) MakeNodes() error {
	if !d.loaded() {
		return nil
	}
	gpus, err := d.gpus()
	if err != nil {
		return err
	}
	nodes, err := d.nodes(gpus)
	if err != nil {
		return err
	}
	for _, n := range nodes {
		path := filepath.Join(d.Dev, n.name)
		err := d.Mknod(path, unix.S_IFCHR|mode, int(unix.Mkdev(uint32(n.major), uint32(n.minor))))
		if err == nil {
			err = os.Chmod(path, mode) // whatever the umask
		}
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("make device node %s: %w", path, err)
		}
	}
	return nil
}

// Inject is the option of a container's specification that gives it the GPUs its
// environment asks for.
func (d Driver) Inject(_ context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error {
	value, set := lookup(s.Process.Env, "NVIDIA_VISIBLE_DEVICES")
	if !set {
		value = "all"
	}
	if !d.loaded() || value == "" || value == "void" {
		return nil
	}
	all, err := d.gpus()
	if err != nil {
		return err
	}
	chosen, err := choose(all, value)
	if err != nil {
		return fmt.Errorf("NVIDIA_VISIBLE_DEVICES=%s: %w", value, err)
	}
	if len(chosen) > 0 {
		nodes, err := d.nodes(chosen)
		if err != nil {
			return err
		}
		for _, n := range nodes {
			permissions := os.FileMode(mode)
			s.Linux.Devices = append(s.Linux.Devices, specs.LinuxDevice{Path: "/dev/" + n.name, Type: "c", Major: n.major, Minor: n.minor, FileMode: &permissions})
			s.Linux.Resources.Devices = append(s.Linux.Resources.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: &n.major, Minor: &n.minor, Access: "rw"})
		}
	}
	s.Mounts = append(s.Mounts, specs.Mount{Destination: folder, Type: "bind", Source: d.Files, Options: []string{"bind", "nosuid", "nodev", "ro"}})
	s.Process.Env = appendTo(s.Process.Env, "LD_LIBRARY_PATH", libraries)
	if _, ok := lookup(s.Process.Env, "PATH"); ok { // without one, what runs has a default that must stay
		s.Process.Env = appendTo(s.Process.Env, "PATH", programs)
	}
	return nil
}

// choose finds the GPUs that a list names.
func choose(all []gpu, list string) ([]gpu, error) {
	switch list {
	case "all":
		return all, nil
	case "none":
		return nil, nil
	}
	var out []gpu
	for name := range strings.SplitSeq(list, ",") {
		i := slices.IndexFunc(all, func(g gpu) bool { return g.uuid != "" && g.uuid == name })
		if n, err := strconv.ParseUint(name, 10, 8); err == nil {
			i = int(n)
		}
		if i < 0 || i >= len(all) {
			return nil, fmt.Errorf("%w: %q; there are %d, with indices from 0 and UUIDs GPU-...", ErrNoSuchGPU, name, len(all))
		}
		if !slices.Contains(out, all[i]) {
			out = append(out, all[i])
		}
	}
	return out, nil
}

// nodes are those that work on the GPUs needs.
func (d Driver) nodes(gpus []gpu) ([]node, error) {
	uvm, err := d.major("nvidia-uvm")
	if err != nil {
		return nil, err
	}
	nodes := []node{{"nvidiactl", major, controlMinor}, {"nvidia-uvm", uvm, 0}, {"nvidia-uvm-tools", uvm, 1}}
	for _, g := range gpus {
		nodes = append(nodes, node{fmt.Sprintf("nvidia%d", g.minor), major, g.minor})
	}
	return nodes, nil
}

// major is the number that the kernel gave a driver of character devices.
func (d Driver) major(name string) (int64, error) {
	text, err := os.ReadFile(filepath.Join(d.Proc, "devices"))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if strings.HasPrefix(line, "Block devices") {
			break
		}
		if len(f) == 2 && f[1] == name {
			n, err := strconv.ParseUint(f[0], 10, 12)
			if err != nil {
				return 0, fmt.Errorf("/proc/devices: %s has the number %q", name, f[0])
			}
			return int64(n), nil
		}
	}
	return 0, fmt.Errorf("/proc/devices has no %s: its module is not loaded", name)
}

var uuid = regexp.MustCompile(`^GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// gpus are the driver's GPUs in the order of the PCI bus, which is that of their
// indices.
func (d Driver) gpus() ([]gpu, error) {
	dir := filepath.Join(d.Proc, "driver/nvidia/gpus")
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var out []gpu
	for _, e := range entries {
		text, err := os.ReadFile(filepath.Join(dir, e.Name(), "information"))
		if err != nil {
			return nil, err
		}
		g, err := parseInformation(text)
		if err != nil {
			return nil, fmt.Errorf("GPU %s: %w", e.Name(), err)
		}
		out = append(out, g)
	}
	return out, nil
}

// parseInformation reads what the driver says of a GPU.
func parseInformation(text []byte) (gpu, error) {
	g := gpu{minor: -1}
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		key, value, _ := strings.Cut(lines.Text(), ":")
		value = strings.TrimSpace(value)
		switch key {
		case "Device Minor":
			n, err := strconv.ParseUint(value, 10, 8)
			if err != nil || n > maxMinor {
				return gpu{}, fmt.Errorf("device minor %q is not 0..%d", value, maxMinor)
			}
			g.minor = int64(n)
		case "GPU UUID":
			if uuid.MatchString(value) { // question marks before its first use
				g.uuid = value
			}
		}
	}
	if g.minor < 0 {
		return gpu{}, errors.New("the driver names no device minor")
	}
	return g, nil
}

// lookup finds a variable; the last one counts.
func lookup(env []string, name string) (value string, ok bool) {
	for _, e := range slices.Backward(env) {
		if v, ok := strings.CutPrefix(e, name+"="); ok {
			return v, true
		}
	}
	return "", false
}

// appendTo adds a folder at the end of a list of folders.
func appendTo(env []string, name, dir string) []string {
	for i, e := range slices.Backward(env) {
		if v, ok := strings.CutPrefix(e, name+"="); ok {
			if v != "" {
				dir = v + ":" + dir
			}
			env[i] = name + "=" + dir
			return env
		}
	}
	return append(env, name+"="+dir)
}
