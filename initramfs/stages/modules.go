package stages

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"
	"syscall"

	"coffer/internal/guestconfig"
)

// sysctls are set once the initrd's modules are in.
var sysctls = [...]struct{ name, value string }{
	{"kernel/modprobe", "\n"}, // nothing is loaded on demand
	{"kernel/kexec_load_disabled", "1"},
	{"kernel/sysrq", "0"},
	{"kernel/dmesg_restrict", "1"},
	{"kernel/kptr_restrict", "2"},
	{"kernel/unprivileged_bpf_disabled", "1"},
	{"kernel/yama/ptrace_scope", "2"},
}

func (g *guest) modules(ctx context.Context) error {
	text, err := g.ReadFile(loadListPath, 64<<10)
	if err != nil {
		return err
	}
	list, err := loadList(string(text))
	if err != nil {
		return fmt.Errorf("%s: %w", loadListPath, err)
	}
	loaded := 0
	for _, m := range list {
		if !g.wants(m.feature) {
			continue
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := g.LoadModule(m.path, ""); err != nil {
			if !m.optional {
				return fmt.Errorf("load %s: %w", m.path, err)
			}
			g.log.Printf("coffer: module %s not loaded: %v", path.Base(m.path), err)
			continue
		}
		loaded++
	}
	if err := g.MountTSM(); err != nil {
		return err
	}
	for _, s := range sysctls {
		if err := g.Sysctl(s.name, s.value); err != nil {
			return err
		}
	}
	g.log.Printf("coffer: modules=%d", loaded)
	if g.wants(guestconfig.FeatureGPU) { // see driver
		return nil
	}
	return g.lock()
}

// lock sees to it that nothing unsigned and no module follows. Most guests' measured
// command line asks for the lockdown; a kernel may not know the word.
func (g *guest) lock() error {
	mode, err := g.Lockdown()
	if err != nil {
		return err
	}
	if mode != "integrity" && mode != "confidentiality" {
		return fmt.Errorf("the kernel's lockdown is %q, not integrity", mode)
	}
	if err := g.Sysctl("kernel/modules_disabled", "1"); err != nil {
		return err
	}
	g.log.Printf("coffer: modules_disabled=1 lockdown=%s", mode)
	return nil
}

// wants reports whether the guest loads the modules of a feature. One whose config
// is no good gets as far as its measurement and needs none.
func (g *guest) wants(feature string) bool {
	switch feature {
	case "":
		return true
	case guestconfig.FeatureNFS:
		return g.cfg != nil && g.cfg.NFS()
	case guestconfig.FeatureGPU:
		return g.cfg != nil && g.cfg.GPU != nil
	}
	return false
}

// driver loads the GPUs' driver, which lies in the verity root, and then does what
// the command line and the phase modules do for other guests: nothing unsigned and
// no module follows.
func (g *guest) driver(ctx context.Context) error {
	text, err := g.ReadFile(newRoot+loadListPath, 64<<10)
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // made-up GPUs have none
		return err
	}
	if err == nil {
		if err := g.loadDriver(ctx, string(text)); err != nil {
			g.tellDriver()
			return err
		}
	}
	return g.lock()
}

func (g *guest) loadDriver(ctx context.Context, text string) error {
	list, err := loadList(text)
	if err != nil {
		return fmt.Errorf("%s of the driver: %w", loadListPath, err)
	}
	for _, m := range list {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		params := ""
		if path.Base(m.path) == "nvidia.ko" && g.cfg.GPU.Count == 1 {
			params = "NVreg_NvLinkDisable=1" // nobody is at the link's other end, and CUDA would wait for it
		}
		err := g.LoadModule(newRoot+m.path, params)
		if errors.Is(err, syscall.ENODEV) {
			err = fmt.Errorf("%w: the VM has no NVIDIA GPU", err)
		}
		if err != nil {
			return fmt.Errorf("load %s: %w", m.path, err)
		}
	}
	return nil
}

// tellDriver prints what the driver said last, which nobody could read otherwise.
func (g *guest) tellDriver() {
	const mark, most = "NVRM:", 10
	text, err := g.KernelLog()
	if err != nil {
		g.log.Printf("coffer: %v", err)
	}
	var said []string
	for line := range strings.Lines(text) {
		if i := strings.Index(line, mark); i >= 0 {
			said = append(said, strings.TrimSpace(line[i:]))
		}
	}
	for _, line := range said[max(0, len(said)-most):] {
		g.log.Printf("coffer: kernel: %s", line)
	}
}

type module struct {
	path     string
	optional bool   // its failure to load does not matter
	feature  string // only guests that use it load the module
}

// loadList reads the list that the builder wrote: an absolute path a line, "-"
// before those whose failure to load does not matter, "feature:" before that.
func loadList(text string) ([]module, error) {
	var list []module
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		feature, rest, found := strings.Cut(line, ":")
		if !found {
			feature, rest = "", line
		}
		name, optional := strings.CutPrefix(rest, "-")
		if !strings.HasPrefix(name, "/lib/modules/") || path.Clean(name) != name {
			return nil, fmt.Errorf("%q is not a path of a module", name)
		}
		list = append(list, module{name, optional, feature})
	}
	if len(list) == 0 {
		return nil, errors.New("no modules listed")
	}
	return list, nil
}
