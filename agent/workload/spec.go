package workload

import (
	"context"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// capabilities is all that root in the container has. Left out on purpose, from
// containerd's own default: NET_RAW (AF_PACKET passes the firewall's output
// hook), MKNOD and AUDIT_WRITE.
var capabilities = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID", "CAP_SETUID",
	"CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_SETFCAP",
}

// maxFiles is the limit of open files, where the agent's own hard limit allows it.
const maxFiles = 131072

// oomScore makes the workload the kernel's first choice when memory runs out.
const oomScore = 500

// Bind is one folder or file of the guest that the container sees.
type Bind struct {
	Source, Target string
	ReadOnly       bool
	NoExec         bool
	Follow         bool // what is mounted below Source later shows up as well
}

func (b Bind) mount() specs.Mount {
	opts := []string{"bind", "nosuid", "nodev"}
	if b.Follow {
		opts = []string{"rbind", "rslave", "nosuid", "nodev"}
	}
	if b.NoExec {
		opts = append(opts, "noexec")
	}
	if b.ReadOnly {
		opts = append(opts, "ro")
	} else {
		opts = append(opts, "rw")
	}
	return specs.Mount{Destination: b.Target, Type: "bind", Source: b.Source, Options: opts}
}

// specOpts is the container's whole specification. The order matters: the
// seccomp profile is made from the capabilities, so it comes last.
func specOpts(cfg *Config, image client.Image) []oci.SpecOpts {
	opts := []oci.SpecOpts{
		oci.WithDefaultSpec(),
		oci.WithDefaultUnixDevices,
		oci.WithImageConfigArgs(image, cfg.Args),
	}
	return append(opts, guardOpts(cfg)...)
}

// guardOpts is what does not depend on the image.
func guardOpts(cfg *Config) []oci.SpecOpts {
	mounts := []specs.Mount{tmpfs("/tmp", cfg.TmpMiB)}
	for _, b := range cfg.Binds {
		mounts = append(mounts, b.mount())
	}
	opts := []oci.SpecOpts{
		oci.WithEnv(cfg.Env),
		withPath(cfg.Path),
		oci.WithHostname(cfg.Hostname),
		oci.WithHostNamespace(specs.NetworkNamespace),
		oci.WithDevShmSize(cfg.TmpMiB * 1024),
		oci.WithMounts(mounts),
		oci.WithCgroup(cfg.Cgroup),
		oci.WithPidsLimit(cfg.PidsMax),
		withLimits,
		oci.WithNoNewPrivileges,
		oci.WithCapabilities(capabilities),
	}
	if cfg.MemoryMiB > 0 {
		limit := cfg.MemoryMiB << 20
		opts = append(opts, oci.WithMemoryLimit(uint64(limit)), oci.WithMemorySwap(limit))
	}
	if cfg.CPUPercent > 0 {
		const period = 100_000 // microseconds
		opts = append(opts, oci.WithCPUCFS(cfg.CPUPercent*period/100, period))
	}
	if cfg.Devices != nil {
		opts = append(opts, cfg.Devices)
	}
	return append(opts, seccomp.WithDefaultProfile())
}

// withPath lets the workload find the guest's programs by their names.
func withPath(dir string) oci.SpecOpts {
	return func(_ context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error {
		if dir == "" {
			return nil
		}
		for i, e := range s.Process.Env {
			if strings.HasPrefix(e, "PATH=") {
				s.Process.Env[i] = e + ":" + dir
				return nil
			}
		}
		s.Process.Env = append(s.Process.Env, "PATH="+defaultPath+":"+dir)
		return nil
	}
}

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

func withLimits(_ context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error {
	files := uint64(maxFiles)
	var have syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &have); err == nil {
		files = min(files, have.Max)
	}
	score := oomScore
	s.Process.OOMScoreAdj = &score
	s.Process.Rlimits = []specs.POSIXRlimit{
		{Type: "RLIMIT_NOFILE", Soft: files, Hard: files},
		{Type: "RLIMIT_CORE", Soft: 0, Hard: 0}, // a core dump would land on a drive
	}
	return nil
}

func tmpfs(target string, mib int64) specs.Mount {
	return specs.Mount{Destination: target, Type: "tmpfs", Source: "tmpfs",
		Options: []string{"nosuid", "nodev", "mode=1777", sizeMiB(mib)}}
}
