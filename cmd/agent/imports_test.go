package main

import (
	"os/exec"
	"strings"
	"testing"

	"coffer/internal/testenv"
)

// The agent knows nothing of the builder, of opening disks and of policies, and
// a production build holds no simulation.
func TestImports(t *testing.T) {
	goTool := testenv.LookTool(t, "go")
	deps := func(tags string) []string {
		t.Helper()
		out, err := exec.Command(goTool, "list", "-deps", "-tags", tags, ".").Output()
		if err != nil {
			t.Fatal(err)
		}
		return strings.Fields(string(out))
	}
	has := func(deps []string, prefix string) bool {
		for _, d := range deps {
			if d == prefix || strings.HasPrefix(d, prefix+"/") {
				return true
			}
		}
		return false
	}
	production, simulated := deps(""), deps("simulated")
	for _, banned := range []string{
		"coffer/hostbuild", "coffer/initramfs", "coffer/test", "coffer/agent/agenttest", "testing",
		"github.com/anatol/luks.go", "github.com/open-policy-agent/opa", "github.com/spf13/cobra",
		"github.com/google/go-sev-guest", "github.com/u-root/u-root",
	} {
		if has(production, banned) || has(simulated, banned) {
			t.Errorf("the agent imports %s", banned)
		}
	}
	const simulation = "coffer/internal/simport"
	if has(production, simulation) {
		t.Errorf("a production build imports %s", simulation)
	}
	if !has(simulated, simulation) {
		t.Errorf("a simulated build does not import %s: this test looks for the wrong package", simulation)
	}
}
