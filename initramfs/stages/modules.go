package stages

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strings"

	"coffer/internal/guestconfig"
)

// sysctls are set once the modules are in. The last lets none follow.
var sysctls = [...]struct{ name, value string }{
	{"kernel/modprobe", "\n"}, // nothing is loaded on demand
	{"kernel/kexec_load_disabled", "1"},
	{"kernel/sysrq", "0"},
	{"kernel/dmesg_restrict", "1"},
	{"kernel/kptr_restrict", "2"},
	{"kernel/unprivileged_bpf_disabled", "1"},
	{"kernel/yama/ptrace_scope", "2"},
	{"kernel/modules_disabled", "1"},
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
		// Without a config, this is the way to a failed boot's measurement.
		if m.feature != "" && (g.cfg == nil || m.feature != guestconfig.FeatureNFS || !g.cfg.NFS()) {
			continue
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := g.LoadModule(m.path); err != nil {
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
	// The measured command line asks for it; a kernel may not know the word.
	mode, err := g.Lockdown()
	if err != nil {
		return err
	}
	if mode != "integrity" && mode != "confidentiality" {
		return fmt.Errorf("the kernel's lockdown is %q, not integrity", mode)
	}
	g.log.Printf("coffer: modules=%d modules_disabled=1 lockdown=%s", loaded, mode)
	return nil
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
