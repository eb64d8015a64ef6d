// Package modules finds out which kernel modules a guest needs and in which
// order they load.
//
// It reads what a Debian kernel package ships: compressed modules and
// modules.builtin; no modules.dep is needed, because every module names its
// dependencies in its ELF section .modinfo. The module files are passed on
// byte for byte, since they end in the distribution's signature.
//
// It knows nothing of packages, archives or what a module is for.
package modules

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/ulikunitz/xz"
	"golang.org/x/sync/errgroup"
)

// OptionalMark stands before the name of a module whose failure to load does
// not matter, both in a list of wanted modules and in the load list.
const OptionalMark = "-"

const (
	maxModule  = 64 << 20 // bytes of one decompressed module
	maxModinfo = 1 << 20  // bytes of one .modinfo section
)

// ErrNotFound is wrapped when a required module is in no file and not built in.
var ErrNotFound = errors.New("no such kernel module")

// Info is what .modinfo says about loading. Names have "_" for "-", as the
// kernel prints them.
type Info struct {
	Depends []string // modules that must be loaded before
	SoftPre []string // modules or aliases that are better loaded before
	Aliases []string // other names, may hold wildcards
}

// ParseInfo reads a .modinfo section: NUL-separated key=value. Keys other
// than depends, softdep and alias are passed over.
func ParseInfo(section []byte) (*Info, error) {
	if len(section) > maxModinfo {
		return nil, fmt.Errorf(".modinfo has %d bytes, more than %d", len(section), maxModinfo)
	}
	var info Info
	for entry := range bytes.SplitSeq(section, []byte{0}) {
		if len(entry) == 0 {
			continue
		}
		key, value, ok := strings.Cut(string(entry), "=")
		if !ok {
			return nil, fmt.Errorf(".modinfo entry %.40q is not key=value", entry)
		}
		switch key {
		case "depends":
			for name := range strings.SplitSeq(value, ",") {
				if name = normal(name); name != "" {
					info.Depends = append(info.Depends, name)
				}
			}
		case "softdep":
			pre := false
			for _, word := range strings.Fields(value) {
				if word == "pre:" || word == "post:" {
					pre = word == "pre:"
				} else if pre {
					info.SoftPre = append(info.SoftPre, normal(word))
				}
			}
		case "alias":
			if value != "" {
				info.Aliases = append(info.Aliases, normal(value))
			}
		}
	}
	return &info, nil
}

// ReadInfo finds and parses the .modinfo section of a module, an ELF file.
func ReadInfo(ko []byte) (*Info, error) {
	f, err := elf.NewFile(bytes.NewReader(ko))
	if err != nil {
		return nil, fmt.Errorf("not an ELF file: %w", err)
	}
	s := f.Section(".modinfo")
	if s == nil {
		return nil, errors.New("no .modinfo section: not a kernel module")
	}
	if s.Size > maxModinfo || s.FileSize > maxModinfo {
		return nil, fmt.Errorf(".modinfo has %d bytes, more than %d", s.Size, maxModinfo)
	}
	data, err := s.Data()
	if err != nil {
		return nil, fmt.Errorf("read .modinfo: %w", err)
	}
	return ParseInfo(data)
}

// Module is one module to load.
type Module struct {
	Name     string // as the kernel prints it
	Data     []byte // the decompressed file with its signature
	Optional bool   // its failure to load does not matter
}

// Index is all modules of one kernel.
type Index struct {
	modules map[string]*entry
	aliases map[string][]string // alias to module names, sorted
	builtin map[string]bool
}

type entry struct {
	Info
	packed []byte
}

// NewIndex reads all modules of a kernel. files maps the path of each module
// file to its content, compressed where the name ends in ".xz"; builtin is the
// kernel's modules.builtin.
func NewIndex(files map[string][]byte, builtin []byte) (*Index, error) {
	x := &Index{modules: map[string]*entry{}, aliases: map[string][]string{}, builtin: map[string]bool{}}
	for line := range strings.Lines(string(builtin)) {
		x.builtin[moduleName(strings.TrimSpace(line))] = true
	}
	var g errgroup.Group
	g.SetLimit(4)
	for file, packed := range files {
		name := moduleName(file)
		if x.modules[name] != nil {
			return nil, fmt.Errorf("kernel module %s stands twice", name)
		}
		e := &entry{packed: packed}
		x.modules[name] = e
		g.Go(func() error {
			ko, err := unpack(packed)
			if err == nil {
				var info *Info
				if info, err = ReadInfo(ko); err == nil {
					e.Info = *info
				}
			}
			if err != nil {
				return fmt.Errorf("kernel module %s: %w", file, err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	for name, e := range x.modules {
		for _, a := range e.Aliases {
			x.aliases[a] = append(x.aliases[a], name)
		}
	}
	for _, names := range x.aliases {
		slices.Sort(names)
	}
	return x, nil
}

// Closure returns the wanted modules and all they need, dependencies first.
// A name with OptionalMark is optional, and so is everything that only
// optional modules or soft dependencies ask for. Built-in modules are left
// out. A wanted name that does not exist is an error, optional or not: the
// list was written for another kernel.
func (x *Index) Closure(wanted []string) ([]Module, error) {
	required := map[string]bool{}
	var require func(name string)
	require = func(name string) {
		e := x.modules[name]
		if e == nil || required[name] {
			return
		}
		required[name] = true
		for _, d := range e.Depends {
			require(d)
		}
	}
	var order []string
	state := map[string]int{} // 1: on the path to the root, 2: done
	var visit func(name, by string) error
	visit = func(name, by string) error {
		e := x.modules[name]
		switch {
		case e == nil && x.builtin[name]:
			return nil
		case e == nil:
			return fmt.Errorf("%w: %s, wanted by %s", ErrNotFound, name, by)
		case state[name] == 1:
			return fmt.Errorf("kernel module %s depends on itself by way of %s", name, by)
		case state[name] == 2:
			return nil
		}
		state[name] = 1
		for _, soft := range e.SoftPre {
			// A soft dependency that nobody provides is nothing, and
			// one that leads back here is already being loaded.
			for _, p := range x.providers(soft) {
				if state[p] == 0 {
					if err := visit(p, name); err != nil {
						return err
					}
				}
			}
		}
		for _, d := range e.Depends {
			if err := visit(d, name); err != nil {
				return err
			}
		}
		state[name] = 2
		order = append(order, name)
		return nil
	}
	for _, w := range wanted {
		name, optional := strings.CutPrefix(w, OptionalMark)
		name = normal(name)
		if err := visit(name, "the module list"); err != nil {
			return nil, err
		}
		if !optional {
			require(name)
		}
	}
	var out []Module
	for _, name := range order {
		ko, err := unpack(x.modules[name].packed)
		if err != nil {
			return nil, fmt.Errorf("kernel module %s: %w", name, err)
		}
		out = append(out, Module{Name: name, Data: ko, Optional: !required[name]})
	}
	return out, nil
}

// providers are the modules of that name or alias.
func (x *Index) providers(name string) []string {
	if x.modules[name] != nil {
		return []string{name}
	}
	return x.aliases[name]
}

func unpack(packed []byte) ([]byte, error) {
	if !bytes.HasPrefix(packed, []byte("\xfd7zXZ\x00")) {
		return packed, nil
	}
	r, err := xz.NewReader(bytes.NewReader(packed))
	if err != nil {
		return nil, fmt.Errorf("decompress: %w", err)
	}
	ko, err := io.ReadAll(io.LimitReader(r, maxModule+1))
	if err != nil {
		return nil, fmt.Errorf("decompress: %w", err)
	}
	if len(ko) > maxModule {
		return nil, fmt.Errorf("decompress: more than %d bytes", maxModule)
	}
	return ko, nil
}

// IsModule reports whether a path of a kernel package is a module file.
func IsModule(file string) bool {
	return strings.HasSuffix(file, ".ko") || strings.HasSuffix(file, ".ko.xz")
}

func moduleName(file string) string {
	return normal(strings.TrimSuffix(strings.TrimSuffix(path.Base(file), ".xz"), ".ko"))
}

func normal(name string) string { return strings.ReplaceAll(strings.TrimSpace(name), "-", "_") }
