package nvidia

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const devices = "Character devices:\n  1 mem\n195 nvidia\n195 nvidiactl\n510 nvidia-uvm\n511 nvidia-caps\n\nBlock devices:\n254 virtblk\n259 nvidia-uvm\n"

func id(i int) string { return fmt.Sprintf("GPU-0000000%d-1111-2222-3333-444444444444", i) }

// tree is a guest with GPUs whose driver counts them down: minors are not indices.
func tree(t *testing.T, gpus int) Driver {
	t.Helper()
	d := Driver{Proc: t.TempDir(), Dev: t.TempDir(), Files: "/usr/nvidia", Mknod: func(path string, _ uint32, _ int) error {
		return os.WriteFile(path, nil, 0o600)
	}}
	put(t, filepath.Join(d.Proc, "devices"), devices)
	put(t, filepath.Join(d.Proc, "driver/nvidia/version"), "NVRM version: ...\n")
	for i := range gpus {
		text := fmt.Sprintf("Model: \t\t NVIDIA H100\nIRQ:   \t\t 11\nGPU UUID: \t %s\nVideo BIOS: \t ??.??\nBus Location: \t 0000:0%d:00.0\nDevice Minor: \t %d\n", id(i), i+1, gpus-1-i)
		put(t, filepath.Join(d.Proc, fmt.Sprintf("driver/nvidia/gpus/0000:0%d:00.0/information", i+1)), text)
	}
	return d
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
		t.Fatal(err)
	}
}

func TestMakeNodes(t *testing.T) {
	d := tree(t, 2)
	var made []string
	plain := d.Mknod
	d.Mknod = func(path string, mode uint32, dev int) error {
		made = append(made, fmt.Sprintf("%s %o %d:%d", filepath.Base(path), mode, unix.Major(uint64(dev)), unix.Minor(uint64(dev))))
		return plain(path, mode, dev)
	}
	if err := d.MakeNodes(); err != nil {
		t.Fatal(err)
	}
	want := []string{"nvidiactl 20666 195:255", "nvidia-uvm 20666 510:0", "nvidia-uvm-tools 20666 510:1", "nvidia1 20666 195:1", "nvidia0 20666 195:0"}
	if !slices.Equal(made, want) {
		t.Errorf("made %q, want %q", made, want)
	}
	d.Mknod = func(string, uint32, int) error { return fs.ErrExist }
	if err := d.MakeNodes(); err != nil {
		t.Errorf("nodes that are there: %v", err)
	}
	d.Mknod = func(string, uint32, int) error { return fs.ErrPermission }
	if err := d.MakeNodes(); !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "nvidiactl") {
		t.Errorf("no permission: %v", err)
	}
}

// spec is a container's, as containerd makes it before the options of ours.
func spec(env ...string) *oci.Spec {
	return &oci.Spec{
		Process: &specs.Process{Env: append([]string{"PATH=/bin"}, env...)},
		Linux:   &specs.Linux{Resources: &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Access: "rwm"}}}},
	}
}

const visible = "NVIDIA_VISIBLE_DEVICES="

func TestInject(t *testing.T) {
	const common = "nvidiactl 195:255, nvidia-uvm 510:0, nvidia-uvm-tools 510:1"
	for _, test := range []struct {
		name      string
		env       []string
		nodes     string // "": none
		libraries bool
	}{
		{"not set", nil, common + ", nvidia2 195:2, nvidia1 195:1, nvidia0 195:0", true},
		{"all", []string{visible + "all"}, common + ", nvidia2 195:2, nvidia1 195:1, nvidia0 195:0", true},
		{"none", []string{visible + "none"}, "", true},
		{"void", []string{visible + "void"}, "", false},
		{"empty", []string{visible}, "", false},
		{"an index", []string{visible + "1"}, common + ", nvidia1 195:1", true},
		{"indices count by the bus, not by minors", []string{visible + "0"}, common + ", nvidia2 195:2", true},
		{"the last one counts", []string{visible + "void", visible + "2"}, common + ", nvidia0 195:0", true},
		{"a UUID", []string{visible + id(1)}, common + ", nvidia1 195:1", true},
		{"both, one twice", []string{visible + "0," + id(0) + "," + id(2)}, common + ", nvidia2 195:2, nvidia0 195:0", true},
		{"capabilities change nothing", []string{visible + "0", "NVIDIA_DRIVER_CAPABILITIES=utility"}, common + ", nvidia2 195:2", true},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := spec(test.env...)
			if err := tree(t, 3).Inject(t.Context(), nil, nil, s); err != nil {
				t.Fatal(err)
			}
			var nodes []string
			for _, n := range s.Linux.Devices {
				nodes = append(nodes, fmt.Sprintf("%s %d:%d", strings.TrimPrefix(n.Path, "/dev/"), n.Major, n.Minor))
				if n.Type != "c" || *n.FileMode != 0o666 {
					t.Errorf("%s: type %s, mode %o", n.Path, n.Type, *n.FileMode)
				}
			}
			if got := strings.Join(nodes, ", "); got != test.nodes {
				t.Errorf("nodes %s, want %s", got, test.nodes)
			}
			// Everything is denied, then exactly the nodes are allowed, to use and not to make.
			rules := s.Linux.Resources.Devices
			if len(rules) != 1+len(nodes) || rules[0].Allow {
				t.Fatalf("%d rules for %d nodes", len(rules), len(nodes))
			}
			for i, n := range s.Linux.Devices {
				if r := rules[i+1]; !r.Allow || r.Type != "c" || *r.Major != n.Major || *r.Minor != n.Minor || r.Access != "rw" {
					t.Errorf("rule %+v for %s", r, n.Path)
				}
			}
			libs, _ := lookup(s.Process.Env, "LD_LIBRARY_PATH")
			if (libs == "/usr/local/nvidia/lib64") != test.libraries || (len(s.Mounts) == 1) != test.libraries {
				t.Errorf("LD_LIBRARY_PATH=%s, mounts %v", libs, s.Mounts)
			}
		})
	}
}

func TestInjectMount(t *testing.T) {
	s := spec("LD_LIBRARY_PATH=/opt/compat")
	if err := tree(t, 1).Inject(t.Context(), nil, nil, s); err != nil {
		t.Fatal(err)
	}
	m := s.Mounts[0]
	if m.Source != "/usr/nvidia" || m.Destination != "/usr/local/nvidia" || !slices.Contains(m.Options, "ro") || !slices.Contains(m.Options, "nodev") || !slices.Contains(m.Options, "nosuid") {
		t.Errorf("mount %+v", m)
	}
	// The image's own folders come first.
	if want := []string{"PATH=/bin:/usr/local/nvidia/bin", "LD_LIBRARY_PATH=/opt/compat:/usr/local/nvidia/lib64"}; !slices.Equal(s.Process.Env, want) {
		t.Errorf("env %q, want %q", s.Process.Env, want)
	}
}

func TestInjectRefuses(t *testing.T) {
	for _, value := range []string{"2", "-1", "0,7", "0,", "GPU-0", id(7), "MIG-1", "0:0", "nvidia.com/gpu=0", "ALL", strings.Repeat("9", 30)} {
		s := spec(visible + value)
		err := tree(t, 2).Inject(t.Context(), nil, nil, s)
		if !errors.Is(err, ErrNoSuchGPU) || !strings.Contains(err.Error(), "there are 2") {
			t.Errorf("%q: %v", value, err)
		}
		if len(s.Linux.Devices)+len(s.Mounts) > 0 {
			t.Errorf("%q: something was injected", value)
		}
	}
	d := tree(t, 1)
	put(t, filepath.Join(d.Proc, "devices"), "Character devices:\n195 nvidia\n\nBlock devices:\n259 nvidia-uvm\n")
	if err := d.Inject(t.Context(), nil, nil, spec()); err == nil || !strings.Contains(err.Error(), "nvidia-uvm") {
		t.Errorf("a number of a block device's was taken: %v", err)
	}
}

func TestNoDriver(t *testing.T) {
	for _, d := range []Driver{{}, {Proc: t.TempDir()}} {
		s := spec()
		if err := errors.Join(d.MakeNodes(), d.Inject(t.Context(), nil, nil, s)); err != nil || len(s.Mounts) > 0 {
			t.Errorf("%+v: %v, %v", d, err, s.Mounts)
		}
	}
}

func TestParseInformation(t *testing.T) {
	if g, err := parseInformation([]byte("GPU UUID: \t GPU-????????-????-????-????-????????????\nDevice Minor: \t 3\n")); err != nil || g != (gpu{minor: 3}) {
		t.Errorf("before its first use: %+v, %v", g, err)
	}
	for _, text := range []string{"", "Device Minor: \t 255\n", "Device Minor: \t -1\n", "Device Minor: x\n", "Model: x\n"} {
		if _, err := parseInformation([]byte(text)); err == nil {
			t.Errorf("%q was taken", text)
		}
	}
}

func FuzzParseInformation(f *testing.F) {
	f.Add([]byte("GPU UUID: \t " + id(0) + "\nDevice Minor: \t 0\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		g, err := parseInformation(text)
		if err == nil && (g.minor < 0 || g.minor > maxMinor || g.uuid != "" && len(g.uuid) != len(id(0))) {
			t.Errorf("%+v", g)
		}
	})
}
