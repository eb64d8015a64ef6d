package rim

import (
	"bytes"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Limits of a document; NVIDIA's have 27 kB, 200 elements and 6 levels.
const (
	maxDepth    = 16
	maxElements = 4096
	maxAttrs    = 64
)

// element is an element of a document. Its children stand in order, text and
// elements mixed.
type element struct {
	prefix, local, space string
	attrs                []attr // without namespace declarations
	decls                []decl
	children             []node
	parent               *element
}

type attr struct{ prefix, local, space, value string }
type decl struct{ prefix, uri string }

// node is an element, or text where elem is nil.
type node struct {
	elem *element
	text string
}

// parseXML reads the subset of XML that a RIM needs: elements, attributes, text,
// the five named entities and character references. Everything that lets two
// readers see two documents is refused: DOCTYPE, processing instructions,
// comments, CDATA, xml: attributes, names outside ASCII.
func parseXML(data []byte) (*element, error) {
	if !utf8.Valid(data) {
		return nil, fmt.Errorf("the document is not UTF-8")
	}
	data = bytes.ReplaceAll(data, []byte("\r\n"), []byte("\n"))
	data = bytes.ReplaceAll(data, []byte("\r"), []byte("\n"))
	p := &parser{s: string(data)}
	if err := p.declaration(); err != nil {
		return nil, err
	}
	p.space()
	root, err := p.element(nil, 0)
	if err != nil {
		return nil, fmt.Errorf("at byte %d: %w", p.at, err)
	}
	if p.space(); p.at < len(p.s) {
		return nil, fmt.Errorf("at byte %d: something follows the root element", p.at)
	}
	return root, nil
}

type parser struct {
	s        string
	at       int
	elements int
}

// declaration skips an XML declaration of version 1.0 in UTF-8.
func (p *parser) declaration() error {
	if !p.have("<?xml ") {
		return nil
	}
	text, after, ok := strings.Cut(p.s[p.at:], "?>")
	if p.at = len(p.s) - len(after); !ok || strings.Contains(text, "<") {
		return fmt.Errorf("the XML declaration does not end")
	}
	quoted := strings.ToLower(strings.ReplaceAll(text, "'", `"`))
	if !strings.Contains(quoted, `version="1.0"`) || strings.Contains(quoted, "encoding") && !strings.Contains(quoted, `encoding="utf-8"`) {
		return fmt.Errorf("the XML declaration %q is not of version 1.0 in UTF-8", text)
	}
	return nil
}

// element reads an element, whose "<" comes next.
func (p *parser) element(parent *element, depth int) (*element, error) {
	p.elements++
	switch {
	case depth > maxDepth || p.elements > maxElements:
		return nil, fmt.Errorf("more than %d levels or %d elements", maxDepth, maxElements)
	case !p.have("<"):
		return nil, fmt.Errorf("an element should begin here")
	}
	e := &element{parent: parent}
	name, err := p.name()
	if err != nil {
		return nil, err
	}
	if e.prefix, e.local, err = splitName(name); err != nil {
		return nil, err
	}
	if err := p.attributes(e); err != nil {
		return nil, err
	}
	if err := e.resolve(); err != nil {
		return nil, err
	}
	if p.have("/>") {
		return e, nil
	}
	if !p.have(">") {
		return nil, fmt.Errorf("the tag of <%s> does not end", name)
	}
	return e, p.content(e, name, depth)
}

func (p *parser) attributes(e *element) error {
	for n := 0; ; n++ {
		before := p.at
		p.space()
		if p.at == len(p.s) || p.s[p.at] == '/' || p.s[p.at] == '>' {
			return nil
		}
		name, err := p.name()
		switch {
		case err != nil:
			return err
		case p.at-len(name) == before:
			return fmt.Errorf("no space before attribute %s", name)
		case n == maxAttrs:
			return fmt.Errorf("more than %d attributes", maxAttrs)
		}
		value, err := p.attrValue(name)
		if err != nil {
			return err
		}
		prefix, local, err := splitName(name)
		if err != nil {
			return err
		}
		switch {
		case name == "xmlns":
			err = e.declare("", value)
		case prefix == "xmlns":
			err = e.declare(local, value)
		default:
			e.attrs = append(e.attrs, attr{prefix: prefix, local: local, value: value})
		}
		if err != nil {
			return err
		}
	}
}

func (p *parser) attrValue(name string) (string, error) {
	p.space()
	if !p.have("=") {
		return "", fmt.Errorf("attribute %s has no value", name)
	}
	p.space()
	if p.at == len(p.s) || p.s[p.at] != '"' && p.s[p.at] != '\'' {
		return "", fmt.Errorf("the value of attribute %s is not quoted", name)
	}
	quote := p.s[p.at : p.at+1]
	raw, _, ok := strings.Cut(p.s[p.at+1:], quote)
	if !ok || strings.Contains(raw, "<") {
		return "", fmt.Errorf("the value of attribute %s does not end", name)
	}
	p.at += len(raw) + 2
	// Literal white space becomes spaces; what character references name stays.
	return unescape(spaces.Replace(raw))
}

// content reads what stands between the tags of e, and the end tag.
func (p *parser) content(e *element, name string, depth int) error {
	for {
		raw, _, ok := strings.Cut(p.s[p.at:], "<")
		if !ok {
			return fmt.Errorf("<%s> does not end", name)
		}
		if strings.Contains(raw, "]]>") {
			return fmt.Errorf("%q in text", "]]>")
		}
		text, err := unescape(raw)
		if err != nil {
			return err
		}
		if p.at += len(raw); text != "" {
			e.children = append(e.children, node{text: text})
		}
		if p.have("</") {
			end, err := p.name()
			if p.space(); err != nil || end != name || !p.have(">") {
				return fmt.Errorf("<%s> ends with another tag", name)
			}
			return nil
		}
		child, err := p.element(e, depth+1)
		if err != nil {
			return err
		}
		e.children = append(e.children, node{elem: child})
	}
}

func (p *parser) name() (string, error) {
	start := p.at
	for p.at < len(p.s) && isName(p.s[p.at], p.at == start) {
		p.at++
	}
	if p.at == start {
		return "", fmt.Errorf("a name should stand here (comments, DOCTYPE, CDATA and processing instructions are refused)")
	}
	return p.s[start:p.at], nil
}

func isName(c byte, first bool) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || c == '_' || !first && ('0' <= c && c <= '9' || c == '-' || c == '.' || c == ':')
}

func (p *parser) have(s string) bool {
	ok := strings.HasPrefix(p.s[p.at:], s)
	if ok {
		p.at += len(s)
	}
	return ok
}

func (p *parser) space() {
	for p.at < len(p.s) && strings.IndexByte(" \t\n", p.s[p.at]) >= 0 {
		p.at++
	}
}

func splitName(name string) (prefix, local string, err error) {
	prefix, local, ok := strings.Cut(name, ":")
	if !ok {
		return "", name, nil
	}
	if local == "" || !isName(local[0], true) || strings.Contains(local, ":") || prefix == "xml" {
		return "", "", fmt.Errorf("name %q", name)
	}
	return prefix, local, nil
}

var entities = map[string]rune{"amp": '&', "lt": '<', "gt": '>', "quot": '"', "apos": '\''}

func unescape(raw string) (string, error) {
	for _, c := range raw {
		if !isChar(c) {
			return "", fmt.Errorf("character %U", c)
		}
	}
	before, rest, more := strings.Cut(raw, "&")
	if !more {
		return raw, nil
	}
	var b strings.Builder
	for more {
		b.WriteString(before)
		ref, after, ok := strings.Cut(rest, ";")
		c, known := entities[ref]
		if number, isNumber := strings.CutPrefix(ref, "#"); isNumber {
			base := 10
			if hex, isHex := strings.CutPrefix(number, "x"); isHex {
				number, base = hex, 16
			}
			n, err := strconv.ParseUint(number, base, 21)
			c, known = rune(n), err == nil && isChar(rune(n))
		}
		if !ok || !known {
			return "", fmt.Errorf("reference &%.12s", ref)
		}
		b.WriteRune(c)
		before, rest, more = strings.Cut(after, "&")
	}
	b.WriteString(before)
	return b.String(), nil
}

func isChar(c rune) bool {
	return c == '\t' || c == '\n' || c == '\r' || 0x20 <= c && c <= 0xD7FF || 0xE000 <= c && c <= 0xFFFD || 0x10000 <= c && c <= 0x10FFFF
}

func (e *element) declare(prefix, uri string) error {
	switch {
	case prefix == "xml" || prefix == "xmlns" || prefix != "" && uri == "":
		return fmt.Errorf("namespace declaration xmlns:%s=%q", prefix, uri)
	case slices.ContainsFunc(e.decls, func(d decl) bool { return d.prefix == prefix }):
		return fmt.Errorf("namespace prefix %q is declared twice", prefix)
	}
	e.decls = append(e.decls, decl{prefix, uri})
	return nil
}

// resolve gives e and its attributes their namespaces.
func (e *element) resolve() error {
	var ok bool
	if e.space, ok = e.lookup(e.prefix); !ok {
		return fmt.Errorf("namespace prefix %q is not declared", e.prefix)
	}
	for i := range e.attrs {
		a := &e.attrs[i]
		if a.prefix != "" {
			if a.space, ok = e.lookup(a.prefix); !ok {
				return fmt.Errorf("namespace prefix %q is not declared", a.prefix)
			}
		}
		if slices.ContainsFunc(e.attrs[:i], func(b attr) bool { return a.local == b.local && a.space == b.space }) {
			return fmt.Errorf("attribute %s is there twice", a.local)
		}
	}
	return nil
}

// lookup returns the namespace of a prefix in e; the empty prefix always has one.
func (e *element) lookup(prefix string) (string, bool) {
	for ; e != nil; e = e.parent {
		for _, d := range e.decls {
			if d.prefix == prefix {
				return d.uri, true
			}
		}
	}
	return "", prefix == ""
}

// is reports whether e has this name in this namespace.
func (e *element) is(space, local string) bool { return e.local == local && e.space == space }

// elements returns the child elements, or an error where other text than white
// space stands among them.
func (e *element) elements() ([]*element, error) {
	var list []*element
	for _, c := range e.children {
		switch {
		case c.elem != nil:
			list = append(list, c.elem)
		case strings.TrimSpace(c.text) != "":
			return nil, fmt.Errorf("<%s> holds the text %.20q", e.local, strings.TrimSpace(c.text))
		}
	}
	return list, nil
}

// text returns the text of an element that has nothing else.
func (e *element) text() (string, error) {
	var b strings.Builder
	for _, c := range e.children {
		if c.elem != nil {
			return "", fmt.Errorf("<%s> holds <%s>", e.local, c.elem.local)
		}
		b.WriteString(c.text)
	}
	return b.String(), nil
}

func (e *element) attr(space, local string) (string, bool) {
	for _, a := range e.attrs {
		if a.local == local && a.space == space {
			return a.value, true
		}
	}
	return "", false
}

// canonical returns e in Canonical XML 1.1 (inclusive, without comments), as the
// root of its own document subset: it renders every namespace in scope. The
// element skip is left out.
func (e *element) canonical(skip *element) []byte {
	var b bytes.Buffer
	e.write(&b, skip, true)
	return b.Bytes()
}

func (e *element) write(b *bytes.Buffer, skip *element, apex bool) {
	name := e.local
	if e.prefix != "" {
		name = e.prefix + ":" + name
	}
	b.WriteString("<" + name)
	for _, d := range e.rendered(apex) {
		if b.WriteString(" xmlns"); d.prefix != "" {
			b.WriteString(":" + d.prefix)
		}
		writeValue(b, d.uri)
	}
	attrs := slices.Clone(e.attrs)
	slices.SortFunc(attrs, func(a, c attr) int {
		if a.space != c.space {
			return strings.Compare(a.space, c.space)
		}
		return strings.Compare(a.local, c.local)
	})
	for _, a := range attrs {
		if b.WriteByte(' '); a.prefix != "" {
			b.WriteString(a.prefix + ":")
		}
		b.WriteString(a.local)
		writeValue(b, a.value)
	}
	b.WriteByte('>')
	for _, c := range e.children {
		switch c.elem {
		case nil:
			textEscaper.WriteString(b, c.text)
		case skip:
		default:
			c.elem.write(b, skip, false)
		}
	}
	b.WriteString("</" + name + ">")
}

// rendered returns the namespace declarations to write for e, sorted: those that
// change something, or for the apex all that are in scope.
func (e *element) rendered(apex bool) []decl {
	var list []decl
	for at := e; at != nil; at = at.parent {
		for _, d := range at.decls {
			if slices.ContainsFunc(list, func(l decl) bool { return l.prefix == d.prefix }) {
				continue
			}
			if outer, _ := e.parent.lookup(d.prefix); apex || outer != d.uri {
				list = append(list, d)
			}
		}
		if !apex {
			break
		}
	}
	if apex {
		list = slices.DeleteFunc(list, func(d decl) bool { return d.uri == "" })
	}
	slices.SortFunc(list, func(a, c decl) int { return strings.Compare(a.prefix, c.prefix) })
	return list
}

var (
	spaces       = strings.NewReplacer("\t", " ", "\n", " ")
	textEscaper  = strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;", "\r", "&#xD;")
	valueEscaper = strings.NewReplacer("&", "&amp;", "<", "&lt;", `"`, "&quot;", "\t", "&#x9;", "\n", "&#xA;", "\r", "&#xD;")
)

func writeValue(b *bytes.Buffer, v string) {
	b.WriteString(`="`)
	valueEscaper.WriteString(b, v)
	b.WriteByte('"')
}
