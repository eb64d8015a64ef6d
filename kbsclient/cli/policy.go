package cli

import (
	"fmt"

	"coffer/internal/failopen"
)

// builtinPolicies are what set-resource-policy has flags for. They load and mean
// the same on a KBS of 2025 (Rego v0) and of 2026 (Rego v1).
var builtinPolicies = []struct{ flag, help, rego string }{
	{"allow-all", "release every resource to everyone", `package policy
import rego.v1

default allow := true
`},
	{"deny-all", "release nothing", `package policy
import rego.v1

default allow := false
`},
	{"affirming", "release everything to evidence that the attestation policy affirms in all its parts", `package policy
import rego.v1

default allow := false

doubtful if {
	some submod in input.submods
	submod["ear.status"] != "affirming"
}

allow if {
	input.submods.cpu0["ear.status"] == "affirming"
	not doubtful
}
`},
	{"default", "release everything to any evidence but sample", `package policy
import rego.v1

default allow := false

allow if {
	evidence := input.submods.cpu0["ear.veraison.annotated-evidence"]
	not evidence.sample
}
`},
}

func (t *tool) warnOfPolicy(rego []byte) {
	if len(failopen.Lines(rego)) > 0 {
		fmt.Fprintln(t.stderr, "warning: the policy has `if` and no `import rego.v1`: "+
			"a KBS of July 2025 ignores every condition in it and allows everything to everyone")
	}
}
