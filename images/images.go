// Package images says what the guest bases are made of: which Debian packages
// hold kernel, firmware, CA certificates and the GPUs' driver, in which suites
// they are looked for, and which kernel modules go into the initrd. One folder is
// one kind of base. It is data; hostbuild/base does the work.
package images

import (
	"bytes"
	"embed"
	"fmt"
	"slices"

	"gopkg.in/yaml.v3"
)

//go:embed */base.yaml
var files embed.FS

// Image is one kind of base.
type Image struct {
	Name     string   `yaml:"-"`
	Like     string   `yaml:"like"`     // another image: it has all of that one, and more modules
	Kernel   Package  `yaml:"kernel"`   // a package that depends on the newest kernel image of one line
	Firmware Package  `yaml:"firmware"` // holds File, the OVMF build for measured direct boot
	CA       Package  `yaml:"ca"`       // holds the certificates as .crt files below the folder File
	Modules  []Module `yaml:"modules"`
	NVIDIA   *NVIDIA  `yaml:"nvidia"` // nil: no driver
}

// NVIDIA says how the driver of NVIDIA's GPUs is made. Lists of packages and files
// are named by what they are for.
type NVIDIA struct {
	Modules      []string `yaml:"modules"`       // in load order
	Driver       []Source `yaml:"driver"`        // source of the modules, firmware, libraries
	Libraries    []string `yaml:"libraries"`     // names without ".so.VERSION"
	Firmware     []string `yaml:"firmware"`      // names of files
	Edits        []Edit   `yaml:"edits"`         // of the modules' source
	Runtime      Source   `yaml:"runtime"`       // the C library
	RuntimeFiles []string `yaml:"runtime_files"` // names of its files
	Compiler     string   `yaml:"compiler"`      // name of the program
	Toolchain    []Source `yaml:"toolchain"`     // with the compiler
}

// Edit replaces a text in a file wherever it stands.
type Edit struct {
	File string `yaml:"file"`
	Old  string `yaml:"old"`
	New  string `yaml:"new"`
}

// Package is where one Debian package is found.
type Package struct {
	From []Source `yaml:"from"` // the first suite that has it counts
	File string   `yaml:"file"` // path inside the package, without leading slash
}

// Source is a package's name in one suite.
type Source struct {
	Suite   string `yaml:"suite"` // SUITE, or SUITE/COMPONENT; main where none is named
	Package string `yaml:"package"`
}

// Module is a group of kernel modules that go together.
type Module struct {
	Group    string   `yaml:"group"`
	Platform string   `yaml:"platform"` // the only platform that gets them; "" means all
	Names    []string `yaml:"names"`    // "-" before a name: may fail to load
	Feature  string   `yaml:"feature"`  // only guests that use it load them; "" means all
}

// Load returns the image of that name.
func Load(name string) (*Image, error) {
	data, err := files.ReadFile(name + "/base.yaml")
	if err != nil {
		return nil, fmt.Errorf("there is no image %q", name)
	}
	var image Image
	if err := decode(data, &image); err != nil {
		return nil, fmt.Errorf("image %s: %w", name, err)
	}
	if image.Like != "" {
		like, err := Load(image.Like)
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", name, err)
		}
		modules := like.Modules
		if err := decode(data, like); err != nil { // what it names takes the place of the other's
			return nil, fmt.Errorf("image %s: %w", name, err)
		}
		image, image.Modules = *like, append(modules, image.Modules...)
	}
	image.Name = name
	for _, p := range []Package{image.Kernel, image.Firmware, image.CA} {
		if len(p.From) == 0 || slices.Contains(p.From, Source{}) {
			return nil, fmt.Errorf("image %s: a package is said to come from nowhere", name)
		}
	}
	return &image, nil
}

func decode(data []byte, image *Image) error {
	d := yaml.NewDecoder(bytes.NewReader(data))
	d.KnownFields(true)
	return d.Decode(image)
}

// ModuleNames is the wanted modules of one platform, in order: those that all
// guests load where feature is "", else those of the feature.
func (i *Image) ModuleNames(platform, feature string) []string {
	var out []string
	for _, m := range i.Modules {
		if (m.Platform == "" || m.Platform == platform) && m.Feature == feature {
			out = append(out, m.Names...)
		}
	}
	return out
}
