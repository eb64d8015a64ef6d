// Command copyright prints whose work is in the Debian package, and under which
// licences: the Go modules in the programs named, as their own files in the module
// cache say, the C libraries linked into runc, and the Debian packages of a base, as
// theirs say. A text is printed once; the long ones that every Debian has, by name.
package main

import (
	"bufio"
	"bytes"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

func main() {
	if len(os.Args) < 4 {
		fmt.Fprintln(os.Stderr, "usage: copyright BASE CACHE PROGRAM...")
		os.Exit(2)
	}
	out := bufio.NewWriter(os.Stdout)
	if err := errors.Join(write(out, os.Args[1], os.Args[2], os.Args[3:]), out.Flush()); err != nil {
		fmt.Fprintln(os.Stderr, "copyright:", err)
		os.Exit(1)
	}
}

// common are texts in /usr/share/common-licenses, by what their beginning holds. A
// longer text has something besides.
var common = map[string]struct {
	beginning *regexp.Regexp
	length    int
}{
	"Apache-2.0": {regexp.MustCompile(`^\s*Apache License\s+Version 2\.0, January 2004\s`), 11500},
	"MPL-2.0":    {regexp.MustCompile(`(?i)^\s*Mozilla Public License,? Version 2\.0\s`), 17000},
}

var licence = regexp.MustCompile(`(?i)^(licen[sc]e|copying|notice|patents)([.-].*)?$`)

func write(out *bufio.Writer, base, cache string, programs []string) error {
	out.WriteString("Coffer's own sources name no licence. This package holds the work of others besides; what follows\nis theirs, and what their sources say of it.\n")
	modules, err := modulesOf(programs)
	if err != nil {
		return err
	}
	users := map[string][]string{} // of a text
	for _, name := range slices.Sorted(maps.Keys(modules)) {
		if err := collect(name, modules[name], users); err != nil {
			return err
		}
	}
	var texts []string
	for text := range users {
		texts = append(texts, text)
	}
	slices.SortFunc(texts, func(a, b string) int { return strings.Compare(users[a][0]+a, users[b][0]+b) })
	for _, text := range texts {
		heading(out, strings.Join(users[text], "\n"))
		out.WriteString(text + "\n")
	}

	for _, p := range []string{"libc6-dev", "libseccomp-dev"} {
		version, err := exec.Command("dpkg-query", "-W", "-f", "${Version}", p).Output()
		if err != nil {
			return fmt.Errorf("dpkg-query %s: %w", p, err)
		}
		text, err := os.ReadFile("/usr/share/doc/" + p + "/copyright")
		if err != nil {
			return err
		}
		heading(out, fmt.Sprintf("C library in runc: Debian's %s %s", p, version))
		out.Write(text)
	}

	var b struct {
		Packages []struct{ Name, Version, SHA256 string }
	}
	text, err := os.ReadFile(filepath.Join(base, "base.json"))
	if err != nil {
		return err
	}
	if err := json.Unmarshal(text, &b); err != nil {
		return fmt.Errorf("%s/base.json: %w", base, err)
	}
	for _, p := range b.Packages {
		heading(out, fmt.Sprintf("In the guest base: Debian's %s %s, whose source Debian has", p.Name, p.Version))
		tar := exec.Command("dpkg-deb", "--fsys-tarfile", filepath.Join(cache, "packages", p.SHA256+".deb"))
		untar := exec.Command("tar", "-xO", "./usr/share/doc/"+p.Name+"/copyright")
		if untar.Stdin, err = tar.StdoutPipe(); err != nil {
			return err
		}
		untar.Stdout = out
		if err := errors.Join(tar.Start(), untar.Run(), tar.Wait()); err != nil {
			return fmt.Errorf("copyright of %s: %w", p.Name, err)
		}
	}
	return nil
}

func heading(out *bufio.Writer, title string) {
	fmt.Fprintf(out, "\n%s\n%s\n\n", strings.Repeat("-", 79), title)
}

// modulesOf gives the modules in programs, with their folders.
func modulesOf(programs []string) (map[string]string, error) {
	paths := map[string]bool{}
	for _, p := range programs {
		info, err := buildinfo.ReadFile(p)
		if err != nil {
			return nil, err
		}
		for _, d := range info.Deps {
			paths[d.Path] = true
		}
	}
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return nil, fmt.Errorf("go env: %w", err)
	}
	version, err := exec.Command("go", "env", "GOVERSION").Output()
	if err != nil {
		return nil, fmt.Errorf("go env: %w", err)
	}
	dirs := map[string]string{"Go " + strings.TrimPrefix(strings.TrimSpace(string(version)), "go"): strings.TrimSpace(string(root))}
	out, err := exec.Command("go", append([]string{"list", "-m", "-f", "{{.Path}} {{.Version}}\t{{.Dir}}"}, slices.Sorted(maps.Keys(paths))...)...).Output()
	if err != nil {
		return nil, fmt.Errorf("go list -m: %w", err)
	}
	for line := range strings.Lines(string(out)) {
		name, dir, _ := strings.Cut(strings.TrimSpace(line), "\t")
		dirs[name] = dir
	}
	return dirs, nil
}

// collect adds a module to the users of each of its licences' texts.
func collect(name, dir string, users map[string][]string) error {
	found := false
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if path != dir && (slices.Contains([]string{"vendor", "testdata"}, d.Name()) || strings.HasPrefix(name, "Go ")) {
				return fs.SkipDir
			}
			return nil
		}
		if !licence.MatchString(d.Name()) || filepath.Ext(path) == ".go" {
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		text := string(bytes.TrimSpace(b))
		for id, c := range common {
			if len(text) < c.length && c.beginning.MatchString(text) {
				text = "/usr/share/common-licenses/" + id
			}
		}
		found = true
		if !slices.Contains(users[text], name) {
			users[text] = append(users[text], name)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if !found {
		return fmt.Errorf("%s: no licence in %q", name, dir)
	}
	return nil
}
