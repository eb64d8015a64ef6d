package failopen

import (
	"slices"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
)

func TestLines(t *testing.T) {
	const p = "package policy\n"
	tests := []struct {
		name, text string
		lines      []int
	}{
		{"import rego.v1", p + "import rego.v1\nallow if { true }", nil},
		{"import future.keywords", p + "import future.keywords\nallow if { true }", nil},
		{"import future.keywords.if", p + "import future.keywords.if\nallow if { true }", nil},
		{"no if", p + "default allow = false\nallow { false }", nil},
		{"no import", p + "default allow := false\nallow if { false }\nallow := true if { false }", []int{3, 4}},
		{"only the keyword in", p + "import future.keywords.in\nallow if { false }", []int{3}},
		{"import in a comment", p + "# import rego.v1\nallow if { false }", []int{3}},
		{"import in a raw string", p + "x := `\nimport rego.v1\n`\nallow if { false }", []int{5}},
		{"import below", p + "allow if { false }\nimport rego.v1", []int{2}},
		{"import with alias", p + "import rego.v1 as x\nallow if { false }", []int{3}},
		{"import behind something", p + "x := 1; import rego.v1\nallow if { false }", []int{3}},
		{"longer name", p + "import rego.v10\nallow if { false }", []int{3}},
		{"if in comment and strings", p + "# if\nx := \"if\"\ny := `if`\nz := \"\\\" if\"", nil},
		{"if in a name", p + "iffy := 1\nx_if := 2\nz := input.if", nil},
		{"broken string", p + "x := \"\nallow if { false }", []int{3}},
		{"if on a line of its own", p + "allow\nif\n{ false }", []int{3}},
		{"windows line ends", "package policy\r\nimport rego.v1\r\nallow if { true }\r\n", nil},
		{"empty", "", nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if lines := Lines([]byte(tt.text)); !slices.Equal(lines, tt.lines) {
				t.Errorf("lines %v, want %v", lines, tt.lines)
			}
		})
	}
}

func FuzzLines(f *testing.F) {
	f.Add([]byte("package policy\nallow if { false }"))
	f.Add([]byte("package policy\nimport rego.v1\nx := `\n\"`\nallow if { \"\\\"\" }"))
	f.Fuzz(func(t *testing.T, b []byte) {
		// Where the scanner is content with an `if`, a parser must see the import.
		mod, err := ast.ParseModuleWithOpts("p", string(b), ast.ParserOptions{RegoVersion: ast.RegoV1})
		if err != nil || len(Lines(b)) != 0 {
			return
		}
		toks := scan(b)
		for i, tok := range toks {
			if tok.s == "if" && prev(toks, i) != "." && !importsIf(mod) {
				t.Fatal("an `if` without import was not found")
			}
		}
	})
}

func importsIf(mod *ast.Module) bool {
	for _, imp := range mod.Imports {
		switch imp.Path.String() {
		case "rego.v1", "future.keywords", "future.keywords.if":
			if imp.Alias == "" {
				return true
			}
		}
	}
	return false
}
