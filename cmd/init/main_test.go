package main

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// What the init depends on is what runs before the disk is open. A production
// build must not hold the simulation, and neither build anything of the agent's
// or the builder's.
func TestDependencies(t *testing.T) {
	forbidden := []string{
		"coffer/agent", "coffer/hostbuild", "coffer/test", "coffer/internal/snp/verify",
		"github.com/containerd/", "github.com/opencontainers/", "github.com/open-policy-agent/", "github.com/spf13/",
		"github.com/google/go-sev-guest", "google.golang.org/", "flag", "os/exec", "plugin",
	}
	for _, c := range []struct {
		tags      string
		simulated bool
	}{{"", false}, {"simulated", true}} {
		t.Run("tags="+c.tags, func(t *testing.T) {
			out, err := exec.Command("go", "list", "-deps", "-tags", c.tags, ".").Output()
			if err != nil {
				t.Fatalf("go list: %v", err)
			}
			deps := strings.Fields(string(out))
			for _, d := range deps {
				for _, f := range forbidden {
					if d == strings.TrimSuffix(f, "/") || strings.HasPrefix(d, strings.TrimSuffix(f, "/")+"/") {
						t.Errorf("depends on %s", d)
					}
				}
			}
			if got := slices.Contains(deps, "coffer/internal/simport"); got != c.simulated {
				t.Errorf("holds the simulated platform's port: %v, want %v", got, c.simulated)
			}
			if !slices.Contains(deps, "coffer/initramfs/stages") {
				t.Error("the list is not the init's")
			}
		})
	}
}
