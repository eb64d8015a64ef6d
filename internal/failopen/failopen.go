// Package failopen finds what Trustee before v0.17 misreads in a policy. It parses
// `allow if { ... }` without an import as the fact `allow` and a rule `if`: it
// releases every resource to everyone, and neither its answer to the upload nor an
// evaluation with OPA shows it. The package works on the text, because parsers
// disagree just here.
package failopen

import "strings"

// Lines returns the line, from 1, of each `if` that no import above it makes a
// keyword.
func Lines(policy []byte) []int {
	var out []int
	imported := false
	toks := scan(policy)
	for i, t := range toks {
		if imports(toks, i) {
			imported = true
		}
		if t.s == "if" && !imported && prev(toks, i) != "." {
			out = append(out, t.line)
		}
	}
	return out
}

// imports reports whether the statement `import rego.v1`, `import
// future.keywords` or `import future.keywords.if`, without alias, begins at i.
func imports(toks []token, i int) bool {
	if toks[i].s != "import" || i > 0 && toks[i-1].line == toks[i].line {
		return false
	}
	var s []string
	for _, t := range toks[i+1:] {
		if t.line != toks[i].line {
			break
		}
		s = append(s, t.s)
	}
	switch strings.Join(s, "") {
	case "rego.v1", "future.keywords", "future.keywords.if":
		return true
	}
	return false
}

type token struct {
	s    string
	line int
}

func prev(toks []token, i int) string {
	if i == 0 {
		return ""
	}
	return toks[i-1].s
}

// scan splits Rego into words and single other characters, without blanks,
// comments and the insides of strings.
func scan(text []byte) []token {
	var out []token
	line := 1
	for i := 0; i < len(text); {
		c := text[i]
		switch {
		case c == '\n':
			line++
			i++
		case c == ' ' || c == '\t' || c == '\r':
			i++
		case c == '#':
			for i < len(text) && text[i] != '\n' {
				i++
			}
		case c == '"' || c == '`':
			out = append(out, token{string(c), line})
			for i++; i < len(text) && text[i] != c; i++ {
				if c == '"' && text[i] == '\n' {
					break // no string of Rego: let the words behind it be seen
				}
				if c == '"' && text[i] == '\\' {
					i++
				}
				if i < len(text) && text[i] == '\n' {
					line++
				}
			}
			if i < len(text) && text[i] == c {
				i++
			}
		case word(c):
			j := i
			for j < len(text) && word(text[j]) {
				j++
			}
			out = append(out, token{string(text[i:j]), line})
			i = j
		default:
			out = append(out, token{string(c), line})
			i++
		}
	}
	return out
}

func word(c byte) bool {
	return c == '_' || c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
}
