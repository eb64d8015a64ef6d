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
	"maps"
	"path"
	"runtime"
	"slices"
	"strings"
	"sync"

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
	Depends []string `json:",omitempty"` // modules that must be loaded before
	SoftPre []string `json:",omitempty"` // modules or aliases that are better loaded before
	Aliases []string `json:",omitempty"` // other names, may hold wildcards
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
			if name := normal(value); name != "" {
				info.Aliases = append(info.Aliases, name)
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
	Feature  string // only guests that use it load the module; "": all
}

// FeatureMark stands between a feature and its module in the load list.
const FeatureMark = ":"

// Index is all modules of one kernel.
type Index struct {
	files   map[string][]byte // by module name
	infos   map[string]Info   // by module name
	aliases map[string][]string
	builtin map[string]bool
}

// NewIndex reads all modules of a kernel. files maps the path of each module
// file to its content, compressed where the content is xz; builtin is the
// kernel's modules.builtin.
//
// known is what Infos returned for the same files, or nil. It saves the
// decompression of all modules; if it does not fit the files, it is ignored.
func NewIndex(files map[string][]byte, builtin []byte, known map[string]Info) (*Index, error) {
	x := &Index{files: map[string][]byte{}, infos: known, aliases: map[string][]string{}, builtin: map[string]bool{}}
	for line := range strings.Lines(string(builtin)) {
		x.builtin[moduleName(strings.TrimSpace(line))] = true
	}
	for file, packed := range files {
		name := moduleName(file)
		if x.files[name] != nil {
			return nil, fmt.Errorf("kernel module %s stands twice", name)
		}
		x.files[name] = packed
	}
	if !x.fits() {
		if err := x.scan(); err != nil {
			return nil, err
		}
	}
	for name, info := range x.infos {
		for _, a := range info.Aliases {
			x.aliases[a] = append(x.aliases[a], name)
		}
	}
	for _, names := range x.aliases {
		slices.Sort(names)
	}
	return x, nil
}

// Infos is what all modules say, by their names.
func (x *Index) Infos() map[string]Info { return x.infos }

func (x *Index) fits() bool {
	for name := range x.files {
		if _, ok := x.infos[name]; !ok {
			return false
		}
	}
	return len(x.infos) == len(x.files)
}

func (x *Index) scan() error {
	x.infos = map[string]Info{}
	var mu sync.Mutex
	var g errgroup.Group
	g.SetLimit(runtime.GOMAXPROCS(0))
	for name, packed := range x.files {
		g.Go(func() error {
			ko, err := unpack(packed)
			if err != nil {
				return fmt.Errorf("kernel module %s: %w", name, err)
			}
			info, err := ReadInfo(ko)
			if err != nil {
				return fmt.Errorf("kernel module %s: %w", name, err)
			}
			mu.Lock()
			defer mu.Unlock()
			x.infos[name] = *info
			return nil
		})
	}
	return g.Wait()
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
		if required[name] {
			return
		}
		required[name] = true
		for _, d := range x.infos[name].Depends {
			require(d)
		}
	}
	var order []string
	seen := map[string]bool{}
	var visit func(name, by string) error
	visit = func(name, by string) error {
		info, ok := x.infos[name]
		switch {
		case !ok && x.builtin[name]:
			return nil
		case !ok:
			return fmt.Errorf("%w: %s, wanted by %s", ErrNotFound, name, by)
		case seen[name]:
			return nil
		}
		seen[name] = true
		for _, soft := range info.SoftPre {
			for _, p := range x.providers(soft) { // often nobody
				if err := visit(p, name); err != nil {
					return err
				}
			}
		}
		for _, d := range info.Depends {
			if err := visit(d, name); err != nil {
				return err
			}
		}
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
		ko, err := unpack(x.files[name])
		if err != nil {
			return nil, fmt.Errorf("kernel module %s: %w", name, err)
		}
		out = append(out, Module{Name: name, Data: ko, Optional: !required[name]})
	}
	return out, nil
}

// ClosureOf is Closure of the wanted modules, then of those that each feature needs
// besides. No two features may need the same besides.
func (x *Index) ClosureOf(wanted []string, features map[string][]string) ([]Module, error) {
	out, err := x.Closure(wanted)
	if err != nil {
		return nil, err
	}
	taken := map[string]string{} // module to feature
	for _, m := range out {
		taken[m.Name] = ""
	}
	for _, feature := range slices.Sorted(maps.Keys(features)) {
		more, err := x.Closure(slices.Concat(wanted, features[feature]))
		if err != nil {
			return nil, err
		}
		for _, m := range more {
			by, is := taken[m.Name]
			switch {
			case is && by != "" && by != feature:
				return nil, fmt.Errorf("kernel module %s is needed by both %s and %s: list it for all guests", m.Name, by, feature)
			case !is:
				taken[m.Name], m.Feature = feature, feature
				out = append(out, m)
			}
		}
	}
	return out, nil
}

// providers are the modules of that name or alias.
func (x *Index) providers(name string) []string {
	if x.files[name] != nil {
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
