// Package yamlcheck reads YAML mappings with a fixed set of keys and reports
// every fault at once, each with its line and column.
//
// A key that no reader asked for is a warning, because a newer NVFlare may add
// some; a near miss of a known key is an error with the suggestion, because a
// misspelt key would otherwise silently leave its default in force.
//
// A document also remembers what its readers asked for, Doc.Asked: the one table
// of keys, from which reference and editor schema are checked and made.
package yamlcheck

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"coffer/internal/strict"

	"gopkg.in/yaml.v3"
)

// MaxSize bounds a document in bytes.
const MaxSize = 1 << 20

// Fault is one thing wrong with a document.
type Fault struct {
	File         string
	Line, Column int
	Text         string
}

func (f *Fault) Error() string {
	if f.Line == 0 {
		return fmt.Sprintf("%s: %s", f.File, f.Text)
	}
	return fmt.Sprintf("%s:%d:%d: %s", f.File, f.Line, f.Column, f.Text)
}

// Doc is a document being read.
type Doc struct {
	file     string
	errs     []error
	warnings []string
	asked    []*Key
}

// Kind is a form that a key's value may have.
type Kind string

// The forms that readers ask for.
const (
	Text    Kind = "text"
	Number  Kind = "number"
	Boolean Kind = "boolean"
	Texts   Kind = "texts" // a list, or one text
	Mapping Kind = "mapping"
	List    Kind = "list" // of mappings
)

// Key is one key that readers asked for.
type Key struct {
	// Path is dotted. A * in it stands for any name, and [] follows the name of a
	// list whose entries are mappings.
	Path    string
	Kinds   []Kind   // none: readers only looked whether it is there
	Allowed []string // the values of a Text, where they are a closed set
	Lo, Hi  int64    // of a Number
	Must    bool     // it is missed where its mapping is there
}

// Asked returns the keys that were asked for, each once, in the order of the
// questions.
func (d *Doc) Asked() []*Key { return d.asked }

// asks notes that a reader asks for key in the form kind, "" for any.
func (m *Map) asks(key string, kind Kind) *Key {
	if slices.Contains(m.free, key) {
		key = "*"
	}
	path := m.pattern + key
	i := slices.IndexFunc(m.doc.asked, func(k *Key) bool { return k.Path == path })
	if i < 0 {
		i = len(m.doc.asked)
		m.doc.asked = append(m.doc.asked, &Key{Path: path})
	}
	k := m.doc.asked[i]
	if kind != "" && !slices.Contains(k.Kinds, kind) {
		k.Kinds = append(k.Kinds, kind)
	}
	return k
}

// Map is one mapping of a document, perhaps an empty one.
type Map struct {
	doc  *Doc
	path string     // with a trailing dot, "" at the top
	node *yaml.Node // nil: it is not there
	at   *yaml.Node // for faults: itself, or what it should be in
	used []string

	pattern string   // of Key.Path, with a trailing dot
	free    []string // names that are not of a fixed set
}

// Read parses the mapping in the file at path.
func Read(path string) (*Doc, *Map, error) {
	b, err := strict.ReadFile(path, MaxSize)
	if err != nil {
		return nil, nil, err
	}
	return Parse(path, b)
}

// Parse parses the mapping in data; file names it in messages.
func Parse(file string, data []byte) (*Doc, *Map, error) {
	if len(data) > MaxSize {
		return nil, nil, &Fault{File: file, Text: fmt.Sprintf("larger than %d bytes", MaxSize)}
	}
	var n yaml.Node
	if err := yaml.Unmarshal(data, &n); err != nil {
		return nil, nil, &Fault{File: file, Text: "not YAML: " + strings.TrimPrefix(err.Error(), "yaml: ")}
	}
	d := &Doc{file: file}
	m := &Map{doc: d}
	if n.Kind == 0 {
		return d, m, nil
	}
	root := resolve(n.Content[0])
	if root.Kind != yaml.MappingNode {
		return nil, nil, &Fault{File: file, Line: root.Line, Column: root.Column, Text: "not a list of keys and values"}
	}
	m.node, m.at = root, root
	d.duplicates(root, "")
	return d, m, nil
}

func resolve(n *yaml.Node) *yaml.Node {
	for i := 0; n.Kind == yaml.AliasNode && i < 8; i++ {
		n = n.Alias
	}
	return n
}

func (d *Doc) duplicates(n *yaml.Node, path string) {
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k := n.Content[i]
		if seen[k.Value] {
			d.fault(k, "key %s%s stands twice", path, k.Value)
		}
		if k.Value == "<<" {
			d.fault(k, "merge keys are not read; write the keys out")
		}
		seen[k.Value] = true
	}
}

func (d *Doc) fault(n *yaml.Node, format string, a ...any) {
	f := &Fault{File: d.file, Text: fmt.Sprintf(format, a...)}
	if n != nil {
		f.Line, f.Column = n.Line, n.Column
	}
	d.errs = append(d.errs, f)
}

// Err returns all faults, joined, or nil.
func (d *Doc) Err() error { return errors.Join(d.errs...) }

// Warnings returns what is odd but tolerable.
func (d *Doc) Warnings() []string { return d.warnings }

// value finds a key. null counts as absent.
func (m *Map) value(key string) *yaml.Node {
	m.used = append(m.used, key)
	if m.node == nil {
		return nil
	}
	for i := 0; i+1 < len(m.node.Content); i += 2 {
		if m.node.Content[i].Value == key {
			v := resolve(m.node.Content[i+1])
			if v.Kind == yaml.ScalarNode && v.Tag == "!!null" {
				return nil
			}
			return v
		}
	}
	return nil
}

// Has reports whether the key is there and not null.
func (m *Map) Has(key string) bool {
	m.asks(key, "")
	return m.value(key) != nil
}

// Keys returns all keys in their order; none of them counts as unknown.
func (m *Map) Keys() []string {
	if m.node == nil {
		return nil
	}
	var ks []string
	for i := 0; i+1 < len(m.node.Content); i += 2 {
		ks = append(ks, m.node.Content[i].Value)
	}
	m.used, m.free = append(m.used, ks...), ks
	return ks
}

// Faultf reports a fault at the value of key, or at the mapping without one.
func (m *Map) Faultf(key, format string, a ...any) {
	v := m.value(key)
	if v == nil {
		v = m.at
	}
	m.doc.fault(v, "%s%s: %s", m.path, key, fmt.Sprintf(format, a...))
}

// FaultItemf reports a fault at one item of the list at key.
func (m *Map) FaultItemf(key string, item int, format string, a ...any) {
	v := m.value(key)
	if v != nil && v.Kind == yaml.SequenceNode && item < len(v.Content) {
		v = v.Content[item]
	}
	m.doc.fault(v, "%s%s: %s", m.path, key, fmt.Sprintf(format, a...))
}

// IsMap reports whether the value of key, which may be a text too, is a mapping.
func (m *Map) IsMap(key string) bool {
	m.asks(key, Text)
	m.asks(key, Mapping)
	v := m.value(key)
	return v != nil && v.Kind == yaml.MappingNode
}

// String returns a scalar as text, or def.
func (m *Map) String(key, def string) string {
	m.asks(key, Text)
	v := m.value(key)
	if v == nil {
		return def
	}
	if v.Kind != yaml.ScalarNode {
		m.Faultf(key, "must be a text")
		return def
	}
	return v.Value
}

// Required is String for a key that must be there and not empty.
func (m *Map) Required(key, what string) string {
	m.asks(key, Text).Must = true
	s := m.String(key, "")
	if s == "" && !slices.ContainsFunc(m.doc.errs, func(e error) bool { return strings.Contains(e.Error(), m.path+key+":") }) {
		m.doc.fault(m.at, "%s%s is missing: %s", m.path, key, what)
	}
	return s
}

// OneOf is String with a closed set of values.
func (m *Map) OneOf(key, def string, allowed ...string) string {
	m.asks(key, Text).Allowed = allowed
	s := m.String(key, def)
	if m.Has(key) && !slices.Contains(allowed, s) {
		m.Faultf(key, "%q is not %s", s, strings.Join(allowed, " or "))
		return def
	}
	return s
}

// Int returns a whole number within lo..hi, or def.
func (m *Map) Int(key string, def, lo, hi int64) int64 {
	k := m.asks(key, Number)
	k.Lo, k.Hi = lo, hi
	v := m.value(key)
	if v == nil {
		return def
	}
	n, err := strconv.ParseInt(v.Value, 10, 64)
	if v.Kind != yaml.ScalarNode || err != nil || n < lo || n > hi {
		m.Faultf(key, "%q is not a whole number from %d to %d", v.Value, lo, hi)
		return def
	}
	return n
}

// Bool returns true or false, or def.
func (m *Map) Bool(key string, def bool) bool {
	m.asks(key, Boolean)
	v := m.value(key)
	if v == nil {
		return def
	}
	var b bool
	if v.Kind != yaml.ScalarNode || v.Decode(&b) != nil {
		m.Faultf(key, "%q is not true or false", v.Value)
		return def
	}
	return b
}

// Strings returns a list of scalars; one scalar counts as a list of one.
func (m *Map) Strings(key string) []string {
	m.asks(key, Texts)
	v := m.value(key)
	if v == nil {
		return nil
	}
	if v.Kind == yaml.ScalarNode {
		return []string{v.Value}
	}
	var out []string
	for _, e := range v.Content {
		e = resolve(e)
		if v.Kind != yaml.SequenceNode || e.Kind != yaml.ScalarNode {
			m.Faultf(key, "must be a list of texts")
			return nil
		}
		out = append(out, e.Value)
	}
	return out
}

// Map returns the mapping at key; an empty one where there is none.
func (m *Map) Map(key string) *Map {
	c := &Map{doc: m.doc, path: m.path + key + ".", at: m.at, pattern: m.asks(key, Mapping).Path + "."}
	v := m.value(key)
	if v == nil {
		return c
	}
	if v.Kind != yaml.MappingNode {
		m.Faultf(key, "must be a list of keys and values")
		return c
	}
	c.node, c.at = v, v
	m.doc.duplicates(v, c.path)
	return c
}

// Maps returns the list of mappings at key.
func (m *Map) Maps(key string) []*Map {
	pattern := m.asks(key, List).Path + "[]."
	v := m.value(key)
	if v == nil {
		return nil
	}
	if v.Kind != yaml.SequenceNode {
		m.Faultf(key, "must be a list")
		return nil
	}
	var out []*Map
	for i, e := range v.Content {
		e = resolve(e)
		if e.Kind != yaml.MappingNode {
			m.Faultf(key, "entry %d must be a list of keys and values", i+1)
			continue
		}
		c := &Map{doc: m.doc, path: fmt.Sprintf("%s%s[%d].", m.path, key, i), node: e, at: e, pattern: pattern}
		m.doc.duplicates(e, c.path)
		out = append(out, c)
	}
	return out
}

// Path returns a file name: ~ is expanded, a relative one counts from the
// working directory, because NVFlare hands over a copy of the file elsewhere.
func (m *Map) Path(key string) string {
	s := m.String(key, "")
	if s == "" {
		return ""
	}
	p, err := Expand(s)
	if err != nil {
		m.Faultf(key, "%v", err)
	}
	return p
}

// Expand makes a path absolute: ~ and ~/x mean the home folder.
func Expand(p string) (string, error) {
	if p == "~" || strings.HasPrefix(p, "~/") {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", fmt.Errorf("expand %q: %w", p, err)
		}
		p = filepath.Join(home, p[1:])
	}
	return filepath.Abs(p)
}

// Finish reports the keys that no call asked for.
func (m *Map) Finish() {
	if m.node == nil {
		return
	}
	for i := 0; i+1 < len(m.node.Content); i += 2 {
		k := m.node.Content[i]
		if slices.Contains(m.used, k.Value) || k.Value == "<<" {
			continue
		}
		if s := Nearest(k.Value, m.used); s != "" {
			m.doc.fault(k, "unknown key %s%s: did you mean %s?", m.path, k.Value, s)
		} else {
			m.doc.warnings = append(m.doc.warnings, fmt.Sprintf("%s:%d:%d: unknown key %s%s is ignored", m.doc.file, k.Line, k.Column, m.path, k.Value))
		}
	}
}

// Nearest returns the known word within a third of the word's length of edits, or
// an empty string.
func Nearest(word string, known []string) string {
	best, dist := "", len(word)/3+1
	if dist > 4 {
		dist = 4
	}
	norm := func(s string) string { return strings.ReplaceAll(strings.ToLower(s), "-", "_") }
	for _, k := range known {
		if d := distance(norm(word), norm(k)); d < dist {
			best, dist = k, d
		}
	}
	return best
}

// distance is Levenshtein's.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		prev := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cur := row[j+1]
			cost := prev
			if a[i] != b[j] {
				cost++
			}
			row[j+1] = min(cost, row[j]+1, cur+1)
			prev = cur
		}
	}
	return row[len(b)]
}
