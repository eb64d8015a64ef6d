package cli

import (
	"context"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"

	"coffer/internal/failopen"
)

// The built-in policies mean the same in both versions of Rego. OPA shows the
// meaning only; that a KBS of 2025 does not misread them shows failopen.
func TestBuiltinPolicies(t *testing.T) {
	cpu := func(status, tee string) map[string]any {
		return map[string]any{"ear.status": status, "ear.veraison.annotated-evidence": map[string]any{tee: map[string]any{"svn": "1"}}}
	}
	inputs := map[string]map[string]any{
		"snp affirming":       {"cpu0": cpu("affirming", "snp")},
		"snp contraindicated": {"cpu0": cpu("contraindicated", "snp")},
		"sample affirming":    {"cpu0": cpu("affirming", "sample")},
		"good cpu, bad gpu":   {"cpu0": cpu("affirming", "snp"), "gpu0": cpu("warning", "nvidia")},
		"no cpu":              {"gpu0": cpu("affirming", "sampledevice")},
		"nothing":             {},
	}
	allowed := map[string][]string{
		"allow-all": {"snp affirming", "snp contraindicated", "sample affirming", "good cpu, bad gpu", "no cpu", "nothing"},
		"deny-all":  {},
		"affirming": {"snp affirming", "sample affirming"},
		"default":   {"snp affirming", "snp contraindicated", "good cpu, bad gpu"},
	}
	for _, p := range builtinPolicies {
		if len(failopen.Lines([]byte(p.rego))) > 0 {
			t.Errorf("%s fails open", p.flag)
		}
		for version, v := range map[string]ast.RegoVersion{"v0": ast.RegoV0, "v1": ast.RegoV1} {
			q, err := rego.New(rego.Query("data.policy.allow"), rego.Module("p.rego", p.rego), rego.SetRegoVersion(v)).
				PrepareForEval(context.Background())
			if err != nil {
				t.Fatalf("%s, %s: %v", p.flag, version, err)
			}
			for name, submods := range inputs {
				want := false
				for _, a := range allowed[p.flag] {
					want = want || a == name
				}
				result, err := q.Eval(context.Background(), rego.EvalInput(map[string]any{"submods": submods}))
				if err != nil || result.Allowed() != want || len(result) != 1 {
					t.Errorf("%s, %s, %s: %v, %v", p.flag, version, name, result, err)
				}
			}
		}
	}
}
