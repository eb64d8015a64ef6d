// Package images says what the guest bases are made of: which Debian packages
// hold kernel, firmware and CA certificates, in which suites they are looked
// for, and which kernel modules go into the initrd. One folder is one kind of
// base. It is data; hostbuild/base does the work.
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
	Kernel   Package  `yaml:"kernel"`   // a package that depends on the newest kernel image of one line
	Firmware Package  `yaml:"firmware"` // holds File, the OVMF build for measured direct boot
	CA       Package  `yaml:"ca"`       // holds the certificates as .crt files below the folder File
	Modules  []Module `yaml:"modules"`
}

// Package is where one Debian package is found.
type Package struct {
	From []Source `yaml:"from"` // the first suite that has it counts
	File string   `yaml:"file"` // path inside the package, without leading slash
}

// Source is a package's name in one suite.
type Source struct {
	Suite   string `yaml:"suite"`
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
	d := yaml.NewDecoder(bytes.NewReader(data))
	d.KnownFields(true)
	image := Image{Name: name}
	if err := d.Decode(&image); err != nil {
		return nil, fmt.Errorf("image %s: %w", name, err)
	}
	for _, p := range []Package{image.Kernel, image.Firmware, image.CA} {
		if len(p.From) == 0 || slices.Contains(p.From, Source{}) {
			return nil, fmt.Errorf("image %s: a package is said to come from nowhere", name)
		}
	}
	return &image, nil
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
