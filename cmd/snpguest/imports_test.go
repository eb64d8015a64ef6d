package main

import (
	"os/exec"
	"slices"
	"strings"
	"testing"

	"coffer/internal/testenv"
)

// The program runs in the workload's container: it knows neither the builder nor
// the agent, and a production build has no way to trust a simulated chip.
func TestImports(t *testing.T) {
	goTool := testenv.LookTool(t, "go")
	list := func(format, tags, pkg string) []string {
		t.Helper()
		out, err := exec.Command(goTool, "list", "-deps", "-tags", tags, "-f", format, pkg).Output()
		if err != nil {
			t.Fatal(err)
		}
		return strings.Fields(string(out))
	}
	for _, tags := range []string{"", "simulated"} {
		for _, d := range list("{{.ImportPath}}", tags, ".") {
			for _, banned := range []string{"coffer/hostbuild", "coffer/agent", "coffer/initramfs", "coffer/test", "coffer/internal/simport", "github.com/", "testing"} {
				if d == banned || strings.HasPrefix(d, strings.TrimSuffix(banned, "/")+"/") {
					t.Errorf("tags %q: imports %s", tags, d)
				}
			}
		}
	}
	const format = `{{if eq .ImportPath "coffer/internal/snpguest"}}{{join .GoFiles " "}}{{end}}`
	if files := list(format, "", "."); slices.Contains(files, "roots_simulated.go") || !slices.Contains(files, "roots.go") {
		t.Errorf("a production build is made of %v", files)
	}
	if files := list(format, "simulated", "."); !slices.Contains(files, "roots_simulated.go") {
		t.Errorf("a simulated build is made of %v", files)
	}
}
