// Package docs has no code: its test holds the documentation to the program.
// `go test ./docs -update` writes what is generated, commands.md and the two
// schemas.
package docs

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode"

	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"gopkg.in/yaml.v3"

	"coffer/hostbuild/cli"
	"coffer/hostbuild/config"
	"coffer/hostbuild/settings"
	"coffer/hostbuild/yamlcheck"
)

var update = flag.Bool("update", false, "write the generated files")

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// generated compares a file with what it has to be, or writes it.
func generated(t *testing.T, name string, want []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(name, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got := read(t, name); got != string(want) {
		t.Errorf("docs/%s is not what the program says; make it anew: go test ./docs -update", name)
	}
}

// section returns the text below a heading, to the next one of its level or above.
func section(t *testing.T, name, heading string) string {
	t.Helper()
	_, text, found := strings.Cut("\n"+read(t, name), "\n"+heading+"\n")
	if !found {
		t.Fatalf("docs/%s has no heading %q", name, heading)
	}
	level := len(heading) - len(strings.TrimLeft(heading, "#"))
	if end := regexp.MustCompile(fmt.Sprintf(`(?m)^#{1,%d} `, level)).FindStringIndex(text); end != nil {
		text = text[:end[0]]
	}
	return text
}

// row is a line of a table.
type row struct {
	names []string // in backticks in the first cell
	cells []string
}

var inBackticks = regexp.MustCompile("`([^`]+)`")

// rows reads the tables in text. A name that begins with a dot stands for the
// same parents as the name before it.
func rows(text string) []row {
	var out []row
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(strings.ReplaceAll(line, `\|`, "\x00"))
		if !strings.HasPrefix(line, "|") || strings.HasPrefix(line, "|---") {
			continue
		}
		r := row{cells: strings.Split(strings.Trim(line, "|"), "|")}
		parents := ""
		for _, m := range inBackticks.FindAllStringSubmatch(r.cells[0], -1) {
			name := m[1]
			if strings.HasPrefix(name, ".") {
				name = parents + name
			} else if i := strings.LastIndexByte(name, '.'); i > 0 {
				parents = name[:i]
			}
			r.names = append(r.names, name)
		}
		if len(r.names) > 0 {
			out = append(out, r)
		}
	}
	return out
}

func TestBootCodesAreInTheRunBook(t *testing.T) {
	described := map[string]bool{}
	for _, r := range rows(section(t, "operations.md", "## Boot codes")) {
		for _, name := range r.names {
			if described[name] {
				t.Errorf("%s has two entries", name)
			}
			described[name] = true
		}
		if len(r.cells) != 3 || strings.TrimSpace(r.cells[1]) == "" || strings.TrimSpace(r.cells[2]) == "" {
			t.Errorf("the entry of %s has not both cause and cure", r.names)
		}
	}
	codes := constants(t, "../internal/boot/boot.go", func(name, _ string) bool { return strings.HasPrefix(name, "Code") })
	if len(codes) < 20 {
		t.Fatalf("only %q were found in the code", codes)
	}
	for _, c := range codes {
		if !described[c] {
			t.Errorf("docs/operations.md has no entry for %s", c)
		}
		delete(described, c)
	}
	for c := range described {
		t.Errorf("docs/operations.md has an entry for %s, which the code does not know", c)
	}
}

// constants returns the values of a source file's text constants that want asks
// for, by name and by the comment of their group.
func constants(t *testing.T, file string, want func(name, group string) bool) []string {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	var values []string
	for _, d := range f.Decls {
		g, ok := d.(*ast.GenDecl)
		if !ok || g.Tok != token.CONST {
			continue
		}
		for _, s := range g.Specs {
			v := s.(*ast.ValueSpec)
			for i, id := range v.Names {
				if i >= len(v.Values) || !want(id.Name, g.Doc.Text()) {
					continue
				}
				if lit, ok := v.Values[i].(*ast.BasicLit); ok && lit.Kind == token.STRING {
					text, err := strconv.Unquote(lit.Value)
					if err != nil {
						t.Fatal(err)
					}
					values = append(values, text)
				}
			}
		}
	}
	return values
}

// Every file that the code names is in the reference's table of its folder.
func TestFilesAreInTheReference(t *testing.T) {
	for heading, src := range map[string]struct{ file, group string }{
		"### A bundle":       {"../hostbuild/bundle/bundle.go", "Files of a bundle"},
		"### A KBS's folder": {"../hostbuild/kbs/init.go", "Files of a server's folder"},
		"### A guest base":   {"../hostbuild/base/base.go", "Names of a base's files"},
	} {
		var described []string
		for _, r := range rows(section(t, "reference.md", heading)) {
			described = append(described, r.names...)
		}
		files := constants(t, src.file, func(_, group string) bool { return strings.HasPrefix(group, src.group) })
		if len(files) == 0 {
			t.Errorf("%s has no constants %q", src.file, src.group)
		}
		for _, f := range files {
			if !slices.ContainsFunc(described, func(d string) bool { return strings.TrimSuffix(d, "/") == f }) {
				t.Errorf("docs/reference.md, %q, lacks %s", heading, f)
			}
		}
	}
}

func TestEndpointsAreInTheReference(t *testing.T) {
	text := section(t, "reference.md", "### The embedded KBS")
	found := regexp.MustCompile(`(?:first|path) == "(/?)([a-z-]+)"`).FindAllStringSubmatch(read(t, "../hostbuild/kbs/http.go"), -1)
	if len(found) < 6 {
		t.Fatalf("only %q were found in the code", found)
	}
	for _, m := range found {
		path := "/kbs/v0/" + m[2]
		if m[1] != "" {
			path = "/" + m[2]
		}
		if !strings.Contains(text, path+"`") && !strings.Contains(text, path+"/") {
			t.Errorf("docs/reference.md lacks the endpoint %s", path)
		}
	}
}

func TestKeysAreInTheReference(t *testing.T) {
	for _, tc := range []struct {
		heading string
		keys    []*yamlcheck.Key
	}{
		{"## CONFIG.yaml", config.Keys()},
		{"## Settings of the build host", settings.Keys()},
	} {
		text := map[string]string{} // key to its row
		for _, r := range rows(section(t, "reference.md", tc.heading)[:tableEnd(section(t, "reference.md", tc.heading))]) {
			for _, name := range r.names {
				text[name] = strings.Join(r.cells, "|")
			}
		}
		known := map[string]bool{}
		for _, k := range tc.keys {
			known[k.Path] = true
			if !slices.Contains(k.Kinds, yamlcheck.Mapping) && !documented(k.Path, text) {
				t.Errorf("docs/reference.md, %q, lacks the key %s", tc.heading, k.Path)
			}
		}
		for name := range text {
			if !known[name] {
				t.Errorf("docs/reference.md, %q, has the key %s, which no reader asks for", tc.heading, name)
			}
		}
	}
}

// tableEnd is where the first table of a text ends.
func tableEnd(text string) int {
	start := strings.Index(text, "\n|")
	end := strings.Index(text[start:], "\n\n")
	if end < 0 {
		return len(text)
	}
	return start + end
}

// documented says whether a key has a row of its own or is named in the row of
// the nearest parent that has one.
func documented(path string, rows map[string]string) bool {
	if _, ok := rows[path]; ok {
		return true
	}
	name := path[strings.LastIndexByte(path, '.')+1:]
	for parent := path; ; {
		i := strings.LastIndexByte(parent, '.')
		if i < 0 {
			return false
		}
		parent = strings.TrimSuffix(parent[:i], "[]")
		if text, ok := rows[parent]; ok {
			return name == "*" || strings.Contains(text, "`"+name+"`")
		}
	}
}

var option = regexp.MustCompile(`--[a-z][a-z-]+`)

func TestLaunchOptionsAreInTheReference(t *testing.T) {
	_, usage, _ := strings.Cut(read(t, "../hostbuild/bundle/launch_vm.sh.tmpl"), "<<END\n")
	usage, _, _ = strings.Cut(usage, "\nEND\n")
	served := map[string]bool{}
	for _, o := range option.FindAllString(usage, -1) {
		served[o] = true
	}
	text := section(t, "reference.md", "## launch_vm.sh")
	for o := range served {
		if o != "--help" && !strings.Contains(text, o) {
			t.Errorf("docs/reference.md lacks %s of launch_vm.sh", o)
		}
	}
	for _, o := range option.FindAllString(text, -1) {
		if !served[o] {
			t.Errorf("docs/reference.md has %s, which launch_vm.sh does not know", o)
		}
	}
}

func TestCommandsAreCurrent(t *testing.T) {
	var b bytes.Buffer
	b.WriteString("# hostbuild's commands\n\nMade from the program's help texts. `hostbuild COMMAND --help` prints the same, `man hostbuild-COMMAND` too.\n")
	describe(&b, (&cli.App{}).Command())
	generated(t, "commands.md", b.Bytes())
}

func describe(b *bytes.Buffer, c *cobra.Command) {
	if c.Hidden {
		return
	}
	if c.Runnable() && !c.HasAvailableSubCommands() {
		long := c.Long
		if long == "" {
			long = c.Short + "."
		}
		long = strings.ReplaceAll(long, "<", `\<`) // else a page shows none of it
		fmt.Fprintf(b, "\n## %s\n\n%s\n\n    %s\n", c.CommandPath(), long, c.UseLine())
		if c.LocalNonPersistentFlags().HasAvailableFlags() {
			b.WriteString("\n| option | default | meaning |\n|---|---|---|\n")
			c.LocalNonPersistentFlags().VisitAll(func(f *pflag.Flag) {
				if f.Name == "help" {
					return
				}
				value, text := pflag.UnquoteUsage(f)
				name := strings.TrimSpace("--" + f.Name + " " + value)
				def := f.DefValue
				if def == "false" || def == "[]" || def == "0" {
					def = ""
				}
				fmt.Fprintf(b, "| `%s` | %s | %s |\n", name, def, strings.ReplaceAll(text, "|", `\|`))
			})
		}
		if c.Example != "" {
			fmt.Fprintf(b, "\nFor example:\n\n```sh\n%s\n```\n", strings.ReplaceAll(strings.TrimPrefix(c.Example, "  "), "\n  ", "\n"))
		}
	}
	for _, sub := range c.Commands() {
		describe(b, sub)
	}
}

// schema makes a JSON Schema out of the keys that a reader asks for and of what
// the reference says below a heading: in the last cell, and the default in the
// one before, if there are three.
func schema(t *testing.T, title, head string, keys []*yamlcheck.Key) []byte {
	descriptions := map[string]string{}
	text := section(t, "reference.md", head)
	for _, r := range rows(text[:tableEnd(text)]) {
		for _, name := range r.names {
			d := strings.TrimSpace(r.cells[len(r.cells)-1])
			if len(r.cells) > 2 {
				if def := strings.TrimSpace(r.cells[1]); def != "" && def != "required" {
					d = "(default: " + def + ") " + d
				}
			}
			d = regexp.MustCompile(`\[([^]]*)\]\([^)]*\)`).ReplaceAllString(d, "$1")
			descriptions[name] = strings.ReplaceAll(strings.ReplaceAll(d, "`", ""), "\x00", "|")
		}
	}
	root := mapping()
	for _, k := range keys {
		if len(k.Kinds) == 0 {
			continue // known in order to be refused
		}
		at := root
		names := strings.Split(k.Path, ".")
		for _, name := range names[:len(names)-1] {
			at = below(at, strings.TrimSuffix(name, "[]"))
			if strings.HasSuffix(name, "[]") {
				at = at["items"].(map[string]any)
			}
		}
		name := names[len(names)-1]
		node := form(k)
		if d := descriptions[k.Path]; d != "" {
			node["description"] = d
		}
		if name == "*" {
			at["additionalProperties"] = node
			continue
		}
		at["properties"].(map[string]any)[name] = node
		if k.Must {
			required, _ := at["required"].([]string)
			at["required"] = append(required, name)
		}
	}
	root["$schema"] = "http://json-schema.org/draft-07/schema#"
	root["title"] = title
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(root); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func mapping() map[string]any {
	return map[string]any{"type": "object", "properties": map[string]any{}, "additionalProperties": false}
}

// below finds the mapping that a name stands for, which may be one of several forms.
func below(at map[string]any, name string) map[string]any {
	var node map[string]any
	if name == "*" {
		node = at["additionalProperties"].(map[string]any)
	} else {
		node = at["properties"].(map[string]any)[name].(map[string]any)
	}
	if forms, ok := node["anyOf"].([]any); ok {
		for _, f := range forms {
			if f := f.(map[string]any); f["properties"] != nil {
				return f
			}
		}
	}
	return node
}

// scalar is what YAML makes of a text that is not quoted.
var scalar = []string{"string", "number", "boolean"}

func form(k *yamlcheck.Key) map[string]any {
	var forms []any
	for _, kind := range k.Kinds {
		switch kind {
		case yamlcheck.Text:
			if k.Allowed != nil {
				forms = append(forms, map[string]any{"enum": k.Allowed})
				break
			}
			forms = append(forms, map[string]any{"type": scalar})
		case yamlcheck.Number:
			forms = append(forms, map[string]any{"type": "integer", "minimum": k.Lo, "maximum": k.Hi})
		case yamlcheck.Boolean:
			forms = append(forms, map[string]any{"type": "boolean"})
		case yamlcheck.Texts:
			forms = append(forms, map[string]any{"type": append([]string{"array"}, scalar...), "items": map[string]any{"type": scalar}})
		case yamlcheck.Mapping:
			forms = append(forms, mapping())
		case yamlcheck.List:
			forms = append(forms, map[string]any{"type": "array", "items": mapping()})
		}
	}
	if len(forms) == 1 {
		return forms[0].(map[string]any)
	}
	return map[string]any{"anyOf": forms}
}

func TestSchemasAreCurrent(t *testing.T) {
	generated(t, "config.schema.json", schema(t, "CONFIG.yaml of a Coffer CVM", "## CONFIG.yaml", config.Keys()))
	generated(t, "settings.schema.json", schema(t, "Settings of a Coffer build host", "## Settings of the build host", settings.Keys()))
}

// The schemas take what hostbuild takes, and refuse common slips.
func TestSchemaDecides(t *testing.T) {
	query, err := rego.New(rego.Query(`x = json.match_schema(input.document, input.schema)`)).PrepareForEval(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	accepts := func(schema, document string) bool {
		t.Helper()
		var d any
		if err := yaml.Unmarshal([]byte(document), &d); err != nil {
			t.Fatal(err)
		}
		rs, err := query.Eval(context.Background(), rego.EvalInput(map[string]any{"document": d, "schema": read(t, schema)}))
		if err != nil || len(rs) != 1 {
			t.Fatalf("%v, %d results", err, len(rs))
		}
		return rs[0].Bindings["x"].([]any)[0].(bool)
	}
	examples, err := filepath.Glob("../hostbuild/config/testdata/*.y*ml")
	if err != nil || len(examples) == 0 {
		t.Fatalf("%v, %d examples", err, len(examples))
	}
	for _, name := range examples {
		if !accepts("config.schema.json", read(t, name)) {
			t.Errorf("%s is refused", name)
		}
	}
	for document, want := range map[string]bool{
		"docker_archive: a": true,
		"docker_archive: a\nuser_config_integrity: off\nallowed_ports: 8002\nvcpus: [2, 4]":      true,
		"docker_archive: a\nuser_config_integrity: {required: [a]}\nworkload: {env: {A: 1}}":     true,
		"docker_archive: a\npeers: {min_tcb: {Turin: {fmc: 1}}}\ncc_issuers: [{id: a, path: b}]": true,
		"role: server":                                           false,
		"docker_archive: a\nrole: boss":                          false,
		"docker_archive: a\nroot_drive_size: x":                  false,
		"docker_archive: a\nroot_drive_size: 0":                  false,
		"docker_archive: a\nallowed_port: [1]":                   false,
		"docker_archive: a\npeers: {min_tcb: {Turin: {fmc: x}}}": false,
		"docker_archive: a\ncc_issuers: [{id: a}]":               false,
	} {
		if accepts("config.schema.json", document) != want {
			t.Errorf("accepted is %v: %q", !want, document)
		}
	}
	const kbs = "policy_dir: /p\nkbs: {url: 'https://k:1', ca: /c}\n"
	for document, want := range map[string]bool{
		kbs: true,
		kbs + "cache_size_gb: 0\nmin_tcb: {Genoa: {snp: 23}}": true,
		"policy_dir: /p\nkbs: {url: 'https://k:1'}":           false,
		"kbs: {url: 'https://k:1', ca: /c}":                   false,
		kbs + "cache_size_gb: many":                           false,
		kbs + "base_dri: /b":                                  false,
		kbs + "min_tcb: {Genoa: {snp: 256}}":                  false,
	} {
		if accepts("settings.schema.json", document) != want {
			t.Errorf("settings: accepted is %v: %q", !want, document)
		}
	}
}

// pages are the documents that people read.
func pages(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob("*.md")
	if err != nil || len(files) < 5 {
		t.Fatalf("%v, %q", err, files)
	}
	return append(files, "../README.md")
}

// prose is a page without its blocks of code, whose lines are left empty.
func prose(text string) string {
	var b strings.Builder
	inside := false
	for line := range strings.Lines(text) {
		fence := strings.HasPrefix(strings.TrimSpace(line), "```")
		if fence {
			inside = !inside
		}
		if fence || inside || strings.HasPrefix(line, "    ") {
			line = "\n"
		}
		b.WriteString(line)
	}
	return b.String()
}

var (
	heading = regexp.MustCompile(`(?m)^#+ (.*)$`)
	link    = regexp.MustCompile(`\[[^\]]*\]\(([^)\s]+)\)`)
)

// anchors are the names that headings can be reached by.
func anchors(text string) map[string]bool {
	found := map[string]bool{}
	for _, m := range heading.FindAllStringSubmatch(prose(text), -1) {
		name := strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case unicode.IsLetter(r) || unicode.IsDigit(r) || r == '-' || r == '_':
				return unicode.ToLower(r)
			}
			return -1
		}, strings.TrimSpace(m[1]))
		for i, base := 1, name; found[name]; i++ {
			name = fmt.Sprintf("%s-%d", base, i)
		}
		found[name] = true
	}
	return found
}

func TestLinksLead(t *testing.T) {
	linked := map[string]bool{}
	for _, page := range pages(t) {
		text := read(t, page)
		for _, m := range link.FindAllStringSubmatch(inBackticks.ReplaceAllString(prose(text), ""), -1) {
			target, anchor, _ := strings.Cut(m[1], "#")
			if strings.Contains(target, "://") {
				continue
			}
			if target == "" {
				target = page
			} else {
				target = filepath.Join(filepath.Dir(page), target)
				linked[filepath.Base(target)] = true
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s: the link %s leads nowhere", page, m[1])
				continue
			}
			if anchor != "" && !anchors(read(t, target))[anchor] {
				t.Errorf("%s: the link %s leads to no heading; there are %q", page, m[1], slices.Sorted(maps.Keys(anchors(read(t, target)))))
			}
		}
	}
	for _, page := range pages(t) {
		if page != "../README.md" && !linked[page] {
			t.Errorf("no page links to docs/%s", page)
		}
	}
}

// What the program tells people to read is there.
func TestNamedPagesAreThere(t *testing.T) {
	named := regexp.MustCompile(`\bdocs/([a-z0-9_.-]+\.(?:md|ya?ml|json))\b`)
	for _, dir := range []string{"agent", "cmd", "hostbuild", "images", "initramfs", "internal", "kbsclient", "test"} {
		err := filepath.WalkDir(filepath.Join("..", dir), func(path string, d os.DirEntry, err error) error {
			if err != nil || d.IsDir() || !slices.Contains([]string{".go", ".tmpl", ".txtar"}, filepath.Ext(path)) {
				return err
			}
			for _, m := range named.FindAllStringSubmatch(read(t, path), -1) {
				if _, err := os.Stat(m[1]); err != nil {
					t.Errorf("%s names docs/%s, which is not there", path, m[1])
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

var (
	aCommand = regexp.MustCompile("(?m)(?:^|`|&& )(?:    )?(?:bin/)?(hostbuild|make) ([^`\n|&]*)")
	noOption = regexp.MustCompile(` # .*|\$\([^)]*\)|"[^"]*"`)
	anOption = regexp.MustCompile(`(?:^|[ \[])--([a-z-]+)`)
	aTarget  = regexp.MustCompile(`(?m)^([a-z][a-z0-9 -]*):`)
)

// TestCommandsInPages: what people are told to type is a command of hostbuild with
// options that it has, or a target of the Makefile.
func TestCommandsInPages(t *testing.T) {
	targets := map[string]bool{}
	for _, m := range aTarget.FindAllStringSubmatch(read(t, "../Makefile"), -1) {
		for _, name := range strings.Fields(m[1]) {
			targets[name] = true
		}
	}
	seen := 0
	for _, page := range pages(t) {
		if page == "commands.md" { // is made from the commands
			continue
		}
		for _, m := range aCommand.FindAllStringSubmatch(read(t, page), -1) {
			line := noOption.ReplaceAllString(m[2], "")
			words := strings.Fields(line)
			seen++
			if m[1] == "make" {
				for _, w := range words {
					if !strings.ContainsAny(w, "=/") && !targets[w] {
						t.Errorf("%s: make %s: the Makefile has no target %s", page, line, w)
					}
				}
				continue
			}
			cmd, _, err := (&cli.App{}).Command().Find(words)
			if err != nil {
				t.Errorf("%s: hostbuild %s: %v", page, line, err)
				continue
			}
			for _, o := range anOption.FindAllStringSubmatch(line, -1) {
				if cmd.Flag(o[1]) == nil && o[1] != "help" && o[1] != "version" {
					t.Errorf("%s: hostbuild %s: %s has no option --%s", page, line, cmd.CommandPath(), o[1])
				}
			}
		}
	}
	if seen < 50 {
		t.Errorf("%d commands seen: this test looks for the wrong thing", seen)
	}
}
