package policy

import (
	"errors"
	"fmt"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"

	"coffer/internal/failopen"
)

// Level says how bad a finding is.
type Level string

// Levels of a finding.
const (
	Error   Level = "error"   // must not be uploaded
	Warning Level = "warning" // someone should look at it
)

// Finding is one fault of a policy text.
type Finding struct {
	Line    int // from 1; 0 when the fault has no line
	Level   Level
	Message string
}

func (f Finding) String() string {
	if f.Line == 0 {
		return fmt.Sprintf("%s: %s", f.Level, f.Message)
	}
	return fmt.Sprintf("line %d: %s: %s", f.Line, f.Level, f.Message)
}

// FailOpen is what failopen.Lines finds, as errors.
func FailOpen(text []byte) []Finding {
	var out []Finding
	for _, line := range failopen.Lines(text) {
		out = append(out, Finding{Line: line, Level: Error, Message: "`if` without `import rego.v1` above it: " +
			"Trustee before v0.17 releases every resource to everyone under this policy; put `import rego.v1` below the package line"})
	}
	return out
}

// Check finds what is wrong with a whole policy text. Errors: what old Trustee
// would read as a release to everyone, what it or both generations of Trustee
// would refuse, a damaged block. Warnings: rules of people that allow without a
// look at the resource's path, and texts in Rego v0, as NVFlare documents them,
// which serve old Trustee but which new Trustee refuses.
func Check(text []byte) []Finding {
	out := FailOpen(text)
	parse := func(v ast.RegoVersion) (*ast.Module, error) {
		mod, err := ast.ParseModuleWithOpts("policy.rego", string(text), ast.ParserOptions{RegoVersion: v})
		if err == nil && mod == nil {
			err = errors.New("the text is empty")
		}
		return mod, err
	}
	// Rego v0, with the import where there is one, is what old Trustee reads.
	mod, errNew := parse(ast.RegoV1)
	old, errOld := parse(ast.RegoV0)
	switch {
	case errNew != nil && errOld != nil:
		return append(out, syntax(errNew)...)
	case errNew != nil:
		mod = old
		for _, f := range syntax(errNew) {
			f.Level = Warning
			f.Message = "Rego v0, which Trustee since v0.17 refuses with all the rest of this text: " + f.Message +
				"; to serve both, write `if` before each rule's body and put `import rego.v1` below the package line"
			out = append(out, f)
		}
	case errOld != nil && len(out) == 0:
		for _, f := range syntax(errOld) {
			f.Message = "old Trustee (Rego v0): " + f.Message + "; put `import rego.v1` below the package line"
			out = append(out, f)
		}
	}
	if mod.Package.Path.String() != "data.policy" {
		out = append(out, Finding{Line: mod.Package.Location.Row, Level: Error, Message: "the package must be `policy`: a KBS asks for data.policy.allow"})
	}
	before, block, _, err := split(text)
	first, last := 0, 0
	if err != nil {
		out = append(out, Finding{Level: Error, Message: err.Error()})
	} else if block != nil {
		first = 1 + strings.Count(string(before), "\n")
		last = first + strings.Count(string(block), "\n") - 1
		if _, err := parseBlock(block); err != nil {
			out = append(out, Finding{Line: first, Level: Error, Message: err.Error()})
		}
	}
	return append(out, checkRules(mod, first, last)...)
}

func syntax(err error) []Finding {
	var es ast.Errors
	if !errors.As(err, &es) {
		return []Finding{{Level: Error, Message: err.Error()}}
	}
	var out []Finding
	for _, e := range es {
		f := Finding{Level: Error, Message: e.Message}
		if e.Location != nil {
			f.Line = e.Location.Row
		}
		out = append(out, f)
	}
	return out
}

// checkRules looks at the rules outside of lines first..last.
func checkRules(mod *ast.Module, first, last int) []Finding {
	var out []Finding
	bound := pathRules(mod)
	for _, r := range mod.Rules {
		name := ruleName(r)
		row := r.Head.Location.Row
		if row >= first && row <= last {
			continue
		}
		switch {
		case strings.HasPrefix(name, "coffer_"):
			out = append(out, Finding{Line: row, Level: Error, Message: "names that begin with coffer_ are hostbuild's: rename the rule " + name})
		case name != "allow":
		case r.Default && !isFalse(r.Head.Value):
			out = append(out, Finding{Line: row, Level: Error, Message: "`default allow` is not false: every resource is released to everyone"})
		case ignoresPath(r, bound):
			out = append(out, Finding{Line: row, Level: Warning, Message: "this allow rule ignores data[\"resource-path\"]: " +
				"whoever satisfies it can read every CVM's key; bind it to a path"})
		}
	}
	return out
}

func isFalse(t *ast.Term) bool { return t != nil && t.Equal(ast.BooleanTerm(false)) }

func ruleName(r *ast.Rule) string {
	if ref := r.Head.Ref(); len(ref) > 0 {
		if v, ok := ref[0].Value.(ast.Var); ok {
			return string(v)
		}
	}
	return string(r.Head.Name)
}

// pathRules are the names of the rules that use the resource's path, directly
// or through another rule.
func pathRules(mod *ast.Module) map[string]bool {
	bound := map[string]bool{}
	for changed := true; changed; {
		changed = false
		for _, r := range mod.Rules {
			if name := ruleName(r); name != "allow" && !bound[name] && reachesPath(r, bound) {
				bound[name] = true
				changed = true
			}
		}
	}
	return bound
}

// ignoresPath reports whether the rule, or an else of it, allows without a look at
// the resource's path.
func ignoresPath(r *ast.Rule, bound map[string]bool) bool {
	for ; r != nil; r = r.Else {
		branch := *r
		branch.Else = nil
		if !isFalse(r.Head.Value) && !reachesPath(&branch, bound) {
			return true
		}
	}
	return false
}

// reachesPath reports whether the rule names data["resource-path"] or a rule
// in bound.
func reachesPath(r *ast.Rule, bound map[string]bool) bool {
	found := false
	ast.WalkTerms(r, func(t *ast.Term) bool {
		switch v := t.Value.(type) {
		case ast.Ref:
			if len(v) > 1 && v[0].Equal(ast.DefaultRootDocument) {
				found = found || v[1].Equal(ast.StringTerm("resource-path"))
				if len(v) > 2 && v[1].Equal(ast.StringTerm("policy")) {
					if s, ok := v[2].Value.(ast.String); ok {
						found = found || bound[string(s)]
					}
				}
			}
		case ast.Var:
			found = found || bound[string(v)]
		}
		return found
	})
	return found
}
