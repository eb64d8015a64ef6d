package policy

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
)

func digest(b byte) [48]byte { return [48]byte(bytes.Repeat([]byte{b}, 48)) }

func mustRules(t testing.TB, rules ...Rule) Rules {
	t.Helper()
	var rs Rules
	for _, r := range rules {
		if err := rs.Put(r); err != nil {
			t.Fatal(err)
		}
	}
	return rs
}

// snpClaims are the claims of a good guest, as old (base64) or new Trustee gives them.
func snpClaims(d [48]byte, old bool) map[string]any {
	m := hex.EncodeToString(d[:])
	if old {
		m = base64.StdEncoding.EncodeToString(d[:])
	}
	return map[string]any{
		"measurement": m, "policy_debug_allowed": false, "policy_migrate_ma": false,
		"reported_tcb_bootloader": 10, "reported_tcb_tee": 1, "reported_tcb_snp": 23, "reported_tcb_microcode": 84,
	}
}

// documents are what old or new Trustee shows to a policy.
func documents(old bool, path string, evidence map[string]any) (data, input map[string]any) {
	data = map[string]any{"resource-path": "resource/" + path}
	if !old {
		var segs []any
		for _, s := range strings.Split(path, "/") {
			segs = append(segs, s)
		}
		data = map[string]any{"plugin": "resource", "resource-path": segs, "query": map[string]any{}}
	}
	submods := map[string]any{}
	if devices, ok := evidence["devices"].(map[string]any); ok {
		submods = maps.Clone(devices)
		evidence = maps.Clone(evidence)
		delete(evidence, "devices")
	}
	submods["cpu0"] = map[string]any{"ear.veraison.annotated-evidence": evidence}
	return data, map[string]any{"submods": submods}
}

// answer is what OPA says: "true", "false", "refused" (the text does not load)
// or "error" (no boolean).
func answer(text []byte, old bool, data, input map[string]any) string {
	version := ast.RegoV1
	if old {
		version = ast.RegoV0
	}
	if _, err := ast.ParseModuleWithOpts("policy.rego", string(text), ast.ParserOptions{RegoVersion: version}); err != nil {
		return "refused"
	}
	rs, err := rego.New(rego.SetRegoVersion(version), rego.Query("data.policy.allow"), rego.Module("policy.rego", string(text)),
		rego.Store(inmem.NewFromObject(data)), rego.Input(input)).Eval(context.Background())
	if err != nil || len(rs) != 1 {
		return "error"
	}
	allow, ok := rs[0].Expressions[0].Value.(bool)
	if !ok {
		return "error"
	}
	return fmt.Sprint(allow)
}

// allows evaluates text as old or new Trustee would.
func allows(t testing.TB, text []byte, old bool, path string, evidence map[string]any) bool {
	t.Helper()
	data, input := documents(old, path, evidence)
	a := answer(text, old, data, input)
	if a != "true" && a != "false" {
		t.Fatalf("the policy gives no boolean: %s", a)
	}
	return a == "true"
}

// decision is a request under decisionRules, and what must come of it.
type decision struct {
	name     string
	path     string
	evidence func(old bool) map[string]any
	want     bool
}

func decisionRules(t testing.TB) Rules {
	return mustRules(t,
		Rule{CVMID: "one", Paths: []string{"keys/root/one", "keys/vault/one"}, Digests: [][48]byte{digest(1), digest(2)}},
		Rule{CVMID: "two", Paths: []string{"keys/root/two"}, Digests: [][48]byte{digest(3)}, MinTCB: map[string]TCB{"Genoa": {Bootloader: 10, SNP: 24}}},
		Rule{CVMID: "mix", Paths: []string{"keys/root/mix"}, Digests: [][48]byte{digest(3)}, MinTCB: map[string]TCB{"Genoa": {Bootloader: 10, SNP: 24}, "Turin": {Bootloader: 1, TEE: 1, SNP: 4, Microcode: 71}}},
		Rule{CVMID: "sim", Paths: []string{"keys/root/sim"}, Digests: [][48]byte{digest(4)}, Simulated: true},
		Rule{CVMID: "smp", Paths: []string{"keys/root/smp"}, TEE: TEESample},
		Rule{CVMID: "gpu", Paths: []string{"keys/root/gpu", "keys/vault/gpu", "site/data/gpu"}, Digests: [][48]byte{digest(5)}, GPUPaths: []string{"keys/vault/gpu", "site/data/gpu"}},
		Rule{CVMID: "gsm", Paths: []string{"keys/vault/gsm"}, Digests: [][48]byte{digest(6)}, GPUPaths: []string{"keys/vault/gsm"}, Simulated: true},
		Rule{CVMID: "gsp", Paths: []string{"keys/vault/gsp"}, TEE: TEESample, GPUPaths: []string{"keys/vault/gsp"}},
	)
}

func decisions() []decision {
	snp := func(d [48]byte, edit func(claims, evidence map[string]any)) func(bool) map[string]any {
		return func(old bool) map[string]any {
			c := snpClaims(d, old)
			e := map[string]any{"snp": c, "report_data": "x"}
			if edit != nil {
				edit(c, e)
			}
			return e
		}
	}
	sample := func(bool) map[string]any {
		return map[string]any{"sample": map[string]any{"svn": "1"}, "simulated": true}
	}
	gpus := func(d [48]byte, devices ...any) func(bool) map[string]any { // name, status and mark by turns
		return snp(d, func(_, e map[string]any) {
			list := map[string]any{}
			for i := 0; i < len(devices); i += 3 {
				list[devices[i].(string)] = device(devices[i+1], devices[i+2])
			}
			e["devices"] = list
		})
	}
	return []decision{
		{"GPUs' CVM without GPUs: its root", "keys/root/gpu", snp(digest(5), nil), true},
		{"without GPUs", "keys/vault/gpu", snp(digest(5), nil), false},
		{"a verified GPU", "keys/vault/gpu", gpus(digest(5), "gpu0", "affirming", nil), true},
		{"a verified GPU: the root", "keys/root/gpu", gpus(digest(5), "gpu0", "affirming", nil), true},
		{"a verified GPU: a resource", "site/data/gpu", gpus(digest(5), "gpu0", "affirming", nil), true},
		{"two verified GPUs", "keys/vault/gpu", gpus(digest(5), "gpu0", "affirming", nil, "gpu1", "affirming", false), true},
		{"a GPU that is contraindicated", "keys/vault/gpu", gpus(digest(5), "gpu0", "contraindicated", nil), false},
		{"a GPU without a status", "keys/vault/gpu", gpus(digest(5), "gpu0", nil, nil), false},
		{"the second is only a warning", "keys/vault/gpu", gpus(digest(5), "gpu0", "affirming", nil, "gpu1", "warning", nil), false},
		{"a device that is no GPU", "keys/vault/gpu", gpus(digest(5), "switch0", "affirming", nil), false},
		{"a switch beside the GPU", "keys/vault/gpu", gpus(digest(5), "gpu0", "affirming", nil, "switch0", "affirming", nil), false},
		{"verified GPUs, another CVM", "keys/vault/gpu", gpus(digest(1), "gpu0", "affirming", nil), false},
		{"a simulated GPU", "keys/vault/gpu", gpus(digest(5), "gpu0", "affirming", true), false},
		{"a simulated GPU beside a verified one", "keys/vault/gpu", gpus(digest(5), "gpu0", "affirming", nil, "gpu1", "affirming", true), false},
		{"a simulated GPU, rule allows it", "keys/vault/gsm", gpus(digest(6), "gpu0", "affirming", true), true},
		{"a real GPU, rule for simulation", "keys/vault/gsm", gpus(digest(6), "gpu0", "affirming", nil), true},
		{"no GPU, rule for simulation", "keys/vault/gsm", snp(digest(6), nil), false},
		{"sample evidence without GPUs", "keys/vault/gsp", sample, false},
		{"sample evidence with a GPU", "keys/vault/gsp", func(bool) map[string]any {
			e := sample(false)
			e["devices"] = map[string]any{"gpu0": device("affirming", nil)}
			return e
		}, true},
		{"own path and digest", "keys/root/one", snp(digest(1), nil), true},
		{"second digest", "keys/root/one", snp(digest(2), nil), true},
		{"second path", "keys/vault/one", snp(digest(2), nil), true},
		{"another CVM's path", "keys/root/two", snp(digest(1), nil), false},
		{"unknown path", "keys/root/three", snp(digest(1), nil), false},
		{"unknown digest", "keys/root/one", snp(digest(9), nil), false},
		{"debug guest", "keys/root/one", snp(digest(1), func(c, _ map[string]any) { c["policy_debug_allowed"] = true }), false},
		{"debug claim missing", "keys/root/one", snp(digest(1), func(c, _ map[string]any) { delete(c, "policy_debug_allowed") }), false},
		{"migration agent", "keys/root/one", snp(digest(1), func(c, _ map[string]any) { c["policy_migrate_ma"] = true }), false},
		{"TCB claim missing", "keys/root/one", snp(digest(1), func(c, _ map[string]any) { delete(c, "reported_tcb_snp") }), false},
		{"TCB too low", "keys/root/two", snp(digest(3), nil), false},
		{"another product's minimum", "keys/root/mix", snp(digest(3), nil), true}, // Trustee's claims do not tell
		{"no product's minimum", "keys/root/mix", snp(digest(3), func(c, _ map[string]any) { c["reported_tcb_tee"] = 0 }), false},
		{"another product's minimum, product known", "keys/root/mix", snp(digest(3), func(_, e map[string]any) { e["product"] = "Genoa" }), false},
		{"the second product's minimum, product known", "keys/root/mix", snp(digest(3), func(_, e map[string]any) { e["product"] = "Turin" }), true},
		{"product without a minimum", "keys/root/two", snp(digest(3), func(c, e map[string]any) {
			c["reported_tcb_snp"], e["product"] = 24, "Milan"
		}), false},
		{"no minimum, product known", "keys/root/one", snp(digest(1), func(_, e map[string]any) { e["product"] = "Milan" }), true},
		{"TCB at the minimum, product known", "keys/root/two", snp(digest(3), func(c, e map[string]any) {
			c["reported_tcb_snp"], e["product"] = 24, "Genoa"
		}), true},
		{"TCB at the minimum", "keys/root/two", snp(digest(3), func(c, _ map[string]any) { c["reported_tcb_snp"] = 24 }), true},
		{"TCB above the minimum", "keys/root/two", snp(digest(3), func(c, _ map[string]any) { c["reported_tcb_snp"] = 200 }), true},
		{"simulated chip, rule for hardware", "keys/root/one", snp(digest(1), func(_, e map[string]any) { e["simulated"] = true }), false},
		{"simulated chip, rule allows it", "keys/root/sim", snp(digest(4), func(_, e map[string]any) { e["simulated"] = true }), true},
		{"hardware, rule for simulation", "keys/root/sim", snp(digest(4), nil), true},
		{"sample, rule for hardware", "keys/root/one", sample, false},
		{"sample, rule for sample", "keys/root/smp", sample, true},
		{"hardware, rule for sample", "keys/root/smp", snp(digest(1), nil), false},
		{"no evidence", "keys/root/one", func(bool) map[string]any { return map[string]any{} }, false},
	}
}

// device is a submod; nil leaves status or mark out.
func device(status, simulated any) map[string]any {
	evidence := map[string]any{"nvidia": map[string]any{"measres": "success"}}
	submod := map[string]any{"ear.veraison.annotated-evidence": evidence}
	if status != nil {
		submod["ear.status"] = status
	}
	if simulated != nil {
		evidence["simulated"] = simulated
	}
	return submod
}

func TestRenderedPolicyDecides(t *testing.T) {
	text := Render(decisionRules(t))
	for _, old := range []bool{true, false} {
		for _, tt := range decisions() {
			t.Run(fmt.Sprintf("%s/old=%v", tt.name, old), func(t *testing.T) {
				if got := allows(t, text, old, tt.path, tt.evidence(old)); got != tt.want {
					t.Errorf("allow = %v, want %v", got, tt.want)
				}
			})
		}
	}
}

func TestRenderedPolicyOtherPlugin(t *testing.T) {
	text := Render(mustRules(t, Rule{CVMID: "one", Paths: []string{"keys/root/one"}, Digests: [][48]byte{digest(1)}}))
	data := map[string]any{"plugin": "pkcs11", "resource-path": []any{"keys", "root", "one"}}
	input := map[string]any{"submods": map[string]any{"cpu0": map[string]any{"ear.veraison.annotated-evidence": map[string]any{"snp": snpClaims(digest(1), false)}}}}
	rs, err := rego.New(rego.Query("data.policy.allow"), rego.Module("policy.rego", string(text)),
		rego.Store(inmem.NewFromObject(data)), rego.Input(input)).Eval(context.Background())
	if err != nil || len(rs) != 1 || rs[0].Expressions[0].Value != false {
		t.Fatalf("allow for another plugin: %v, %v; want false", rs, err)
	}
}

func TestRenderIsClean(t *testing.T) {
	for _, rules := range []Rules{nil, mustRules(t, Rule{CVMID: "one", Paths: []string{"keys/root/one"}, Digests: [][48]byte{digest(1)}})} {
		text := Render(rules)
		if f := Check(text); len(f) != 0 {
			t.Errorf("Check of our own text: %v", f)
		}
		if allows(t, text, true, "keys/root/two", map[string]any{"snp": snpClaims(digest(1), true)}) {
			t.Error("a path without a rule is allowed")
		}
	}
	a := Rule{CVMID: "a", Paths: []string{"k/r/2", "k/r/1"}, Digests: [][48]byte{digest(2), digest(1), digest(2)}}
	b := Rule{CVMID: "b", Paths: []string{"k/r/3"}, Digests: [][48]byte{digest(2)}}
	if !bytes.Equal(Render([]Rule{b, a}), Render(mustRules(t, a, b))) {
		t.Error("the text depends on the order of rules")
	}
}

func TestPutRefuses(t *testing.T) {
	good := Rule{CVMID: "one", Paths: []string{"keys/root/one"}, Digests: [][48]byte{digest(1)}}
	tests := []struct {
		name string
		edit func(*Rule)
		want string
	}{
		{"no id", func(r *Rule) { r.CVMID = "" }, "the id must be"},
		{"id with a quote", func(r *Rule) { r.CVMID = `a"b` }, "the id must be"},
		{"no path", func(r *Rule) { r.Paths = nil }, "no resource path"},
		{"two segments", func(r *Rule) { r.Paths = []string{"a/b"} }, "must be <repository>"},
		{"escape", func(r *Rule) { r.Paths = []string{"a/../b"} }, "must be <repository>"},
		{"newline", func(r *Rule) { r.Paths = []string{"a/b/c\n"} }, "must be <repository>"},
		{"path twice", func(r *Rule) { r.Paths = []string{"a/b/c", "a/b/c"} }, "twice"},
		{"no digest", func(r *Rule) { r.Digests = nil }, "no launch digest"},
		{"zero digest", func(r *Rule) { r.Digests = [][48]byte{{}} }, "all zero"},
		{"unknown TEE", func(r *Rule) { r.TEE = "tdx" }, "TEE"},
		{"sample with digest", func(r *Rule) { r.TEE = TEESample }, "carries no measurement"},
		{"path of another CVM", func(r *Rule) { r.CVMID = "two" }, "belongs to CVM one"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			rs := mustRules(t, good)
			r := good
			tt.edit(&r)
			if err := rs.Put(r); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Put: %v, want %q", err, tt.want)
			}
			if !reflect.DeepEqual(rs, mustRules(t, good)) {
				t.Error("a refused rule changed the rules")
			}
		})
	}
}

func TestCheck(t *testing.T) {
	const p = "package policy\nimport rego.v1\ndefault allow := false\n"
	tests := []struct {
		name, text string
		want       []string // "line level word"
	}{
		{"bound to a path", p + `allow if { data["resource-path"] == ["a","b","c"]; input.submods.cpu0["ear.status"] == "affirming" }`, nil},
		{"bound through other rules", p + "q := data[\"resource-path\"]\nr := split(q, \"/\")\nallow if r[1] == \"a\"", nil},
		{"bound through the package", p + "q := data[\"resource-path\"]\nallow if data.policy.q == \"a\"", nil},
		{"ignores the path", p + "\nallow if {\n\tinput.submods.cpu0[\"ear.veraison.annotated-evidence\"].snp.measurement == \"x\"\n}", []string{"5 warning ignores"}},
		{"always", p + "allow := true", []string{"4 warning ignores"}},
		{"default true", "package policy\nimport rego.v1\ndefault allow := true\n", []string{"3 error default allow"}},
		{"fail-open", "package policy\ndefault allow := false\nallow if { data[\"resource-path\"] }", []string{"3 error `if` without"}},
		{"v0 style", "package policy\ndefault allow = false\nallow { data[\"resource-path\"] }", []string{"3 warning Rego v0"}},
		{"as NVFlare documents it", "package policy\ndefault allow = false\nallow {\n\tinput[\"submods\"][\"cpu0\"][\"ear.veraison.annotated-evidence\"][\"snp\"][\"measurement\"] == \"x\"\n}",
			[]string{"3 warning Rego v0", "3 warning ignores"}},
		{"syntax", p + "allow if {", []string{"4 error"}},
		{"other package", "package other\nimport rego.v1\n", []string{"1 error package must be"}},
		{"our names", p + "coffer_x := 1", []string{"4 error coffer_"}},
		{"false, else true", p + "allow := false if { input.x } else := true", []string{"4 warning ignores"}},
		{"bound, else not", p + `allow if { data["resource-path"] == ["a","b","c"] } else := true if { input.x }`, []string{"4 warning ignores"}},
		{"bound, else bound", p + `allow if { data["resource-path"] == ["a","b","c"] } else if { data["resource-path"] == ["a","b","d"] }`, nil},
		{"allow as a set", p + "allow contains x if { x := 1 }", []string{"4 warning ignores"}},
		{"empty", "", []string{"0 error"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := Check([]byte(tt.text))
			if len(got) != len(tt.want) {
				t.Fatalf("findings %v, want %v", got, tt.want)
			}
			for i, f := range got {
				if s := fmt.Sprintf("%d %s %s", f.Line, f.Level, f.Message); !matches(s, tt.want[i]) {
					t.Errorf("finding %q, want %q", s, tt.want[i])
				}
			}
		})
	}
}

// TestCheckWordBehindAllow: old Trustee reads any word behind `allow` as it
// reads an `if` that it does not know: as the end of the fact `allow`.
func TestCheckWordBehindAllow(t *testing.T) {
	for _, text := range []string{
		"package policy\nallow when { false }\n",
		"package policy\nallow unless x { false }\n",
		"package policy\nimport future.keywords.if\nallow iff { false }\n",
		"package policy\ndefault allow = false\nallow\n",
		"package policy\nimport rego.v1\ndefault allow = false\nallow\n",
	} {
		if f := Check([]byte(text)); len(f) == 0 || f[0].Level != Error {
			t.Errorf("%q: findings %v, want an error", text, f)
		}
	}
}

func matches(s, want string) bool {
	parts := strings.SplitN(want, " ", 3)
	if !strings.HasPrefix(s, parts[0]+" "+parts[1]) {
		return false
	}
	return len(parts) < 3 || strings.Contains(s, parts[2])
}

func openFolder(t *testing.T, text string) *Folder {
	t.Helper()
	dir := t.TempDir()
	if text != "" {
		if err := os.WriteFile(filepath.Join(dir, fileName), []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	f, err := OpenFolder(dir)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func put(id string) func(*Rules) error {
	return func(rs *Rules) error {
		return rs.Put(Rule{CVMID: id, Paths: []string{"keys/root/" + id}, Digests: [][48]byte{digest(1)}})
	}
}

func TestFolderNew(t *testing.T) {
	f := openFolder(t, "")
	ctx := context.Background()
	var uploaded []byte
	apply := func(_ context.Context, b []byte) error { uploaded = bytes.Clone(b); return nil }
	if _, err := f.Update(ctx, put("one"), apply); err != nil {
		t.Fatal(err)
	}
	text, err := f.Text()
	if err != nil || !bytes.Equal(text, uploaded) {
		t.Fatalf("the master copy is not what was uploaded (%v)", err)
	}
	if !allows(t, text, false, "keys/root/one", map[string]any{"snp": snpClaims(digest(1), false)}) {
		t.Error("the rule does not allow its CVM")
	}
	_, err = f.Update(ctx, func(rs *Rules) error {
		if !rs.Remove("one") || rs.Remove("one") {
			t.Error("Remove does not say whether there was a rule")
		}
		return nil
	}, apply)
	if err != nil {
		t.Fatal(err)
	}
	if text, _ = f.Text(); !bytes.Equal(text, Render(nil)) {
		t.Error("after removal of the only rule the text is not that of a new folder")
	}
}

func TestFolderKeepsPeoplesText(t *testing.T) {
	const own = "# mine\r\npackage policy\n\nimport rego.v1\n\ndefault  allow := false\n\n\nallow if {\tdata[\"resource-path\"] == \"resource/a/b/c\" }   \n# no newline at the end"
	f := openFolder(t, own)
	ctx := context.Background()
	if _, err := f.Update(ctx, put("one"), nil); err != nil {
		t.Fatal(err)
	}
	text, _ := f.Text()
	if !bytes.HasPrefix(text, []byte(own)) {
		t.Fatalf("text of people changed:\n%s", text)
	}
	// People write behind the block, too.
	const behind = "\n\n  # behind \t\nx := 1"
	if err := os.WriteFile(f.Path(), append(text, behind...), 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Update(ctx, put("two"), nil); err != nil {
		t.Fatal(err)
	}
	text, _ = f.Text()
	if !bytes.HasPrefix(text, []byte(own)) || !bytes.HasSuffix(text, []byte(behind)) {
		t.Fatalf("text of people changed:\n%s", text)
	}
	rules, err := f.Rules()
	if err != nil || len(rules) != 2 {
		t.Fatalf("rules %v, %v; want two", rules, err)
	}
	if fi, err := os.Stat(f.Path()); err != nil || fi.Mode().Perm() != 0o640 {
		t.Errorf("mode %v (%v), want that of the old file", fi.Mode(), err)
	}
}

// TestFolderOfNVFlare: a master copy as NVFlare documents it works on, on the
// KBS that takes it, and is named in warnings.
func TestFolderOfNVFlare(t *testing.T) {
	const own = nvflareText
	f := openFolder(t, own)
	warnings, err := f.Update(t.Context(), put("one"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(warnings) != 2 || warnings[0].Line != 5 || warnings[1].Line != 5 || !strings.Contains(warnings[1].Message, "every CVM's key") {
		t.Errorf("warnings %v, want two about line 5", warnings)
	}
	text, _ := f.Text()
	if !bytes.HasPrefix(text, []byte(own)) {
		t.Fatalf("text of people changed:\n%s", text)
	}
	theirs := snpClaims(digest(1), true)
	theirs["measurement"] = "theirs"
	for _, tt := range []struct {
		path   string
		claims map[string]any
		want   bool
	}{
		{"keys/root/one", snpClaims(digest(1), true), true},
		{"keys/root/one", snpClaims(digest(2), true), false},
		{"keys/root/two", snpClaims(digest(1), true), false},
		{"keys/root/one", theirs, true}, // what the warning is about
	} {
		if got := allows(t, text, true, tt.path, map[string]any{"snp": tt.claims}); got != tt.want {
			t.Errorf("%s, %v: allow = %v, want %v", tt.path, tt.claims["measurement"], got, tt.want)
		}
	}
}

func TestFolderRefuses(t *testing.T) {
	ours := string(Render(mustRules(t, Rule{CVMID: "one", Paths: []string{"keys/root/one"}, Digests: [][48]byte{digest(1)}})))
	tests := []struct{ name, text, want string }{
		{"fail-open text of people", "package policy\nallow if { false }\n", "line 2: error: `if` without"},
		{"default allow", "package policy\nimport rego.v1\ndefault allow := true\n", "released to everyone"},
		{"no END line", strings.Replace(ours, endMark, "", 1), "must begin with one line"},
		{"two blocks", ours + ours[strings.Index(ours, beginMark):], "must begin with one line"},
		{"edited digest", strings.Replace(ours, "0101", "0201", 1), "damaged"},
		{"edited rule", strings.Replace(ours, "policy_debug_allowed == false", "policy_debug_allowed == true", 1), "is not what hostbuild wrote"},
		{"path moved", strings.Replace(ours, `"resource/keys/root/one": "one"`, `"resource/keys/root/two": "one"`, 1), "is not what hostbuild wrote"},
		{"line in the block", strings.Replace(ours, pathsVar, "allow := true\n"+pathsVar, 1), "is not what hostbuild wrote"},
		{"windows line ends", strings.ReplaceAll(ours, "\n", "\r\n"), "damaged"},
		{"cut", ours[:len(ours)-1], "no newline"},
		{"too large", ours + strings.Repeat("#", maxSize), "too large"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := openFolder(t, tt.text)
			_, err := f.Update(context.Background(), put("two"), func(context.Context, []byte) error {
				t.Error("the text was uploaded")
				return nil
			})
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), f.Path()) {
				t.Errorf("Update: %v; want the path and %q", err, tt.want)
			}
			if b, _ := os.ReadFile(f.Path()); string(b) != tt.text {
				t.Error("the master copy changed")
			}
		})
	}
}

// A new hostbuild takes over the block of an old one, whose rules said less, and
// an old one refuses that of a new one.
func TestFolderOfAnotherVersion(t *testing.T) {
	body, _ := unseal(renderBlock(mustRules(t, Rule{CVMID: "one", Paths: []string{"keys/root/one"}, Digests: [][48]byte{digest(1)}})))
	gpus := "\t\t\"gpus\": {},\n"
	if !strings.Contains(string(body), gpus) {
		t.Fatalf("no %q in\n%s", gpus, body)
	}
	old := strings.Replace(string(body), gpus, "", 1)
	old = old[:strings.Index(old, "coffer_asked")] + "allow := false\n"
	f := openFolder(t, head+string(seal([]byte(old))))
	if _, err := f.Update(t.Context(), put("two"), nil); err != nil {
		t.Fatal(err)
	}
	text, err := f.Text()
	if err != nil || !allows(t, text, true, "keys/root/one", map[string]any{"snp": snpClaims(digest(1), true)}) {
		t.Errorf("%v: the old rule does not hold in\n%s", err, text)
	}
	f = openFolder(t, head+string(seal([]byte(strings.Replace(string(body), gpus, gpus+"\t\t\"phase_of_the_moon\": 1,\n", 1)))))
	if _, err := f.Update(t.Context(), put("two"), nil); !errors.Is(err, ErrBlock) || !strings.Contains(err.Error(), "another version") {
		t.Errorf("a rule that says more: %v", err)
	}
}

func TestFolderKeepsMasterWhenApplyFails(t *testing.T) {
	f := openFolder(t, "")
	ctx := context.Background()
	if _, err := f.Update(ctx, put("one"), nil); err != nil {
		t.Fatal(err)
	}
	want, _ := f.Text()
	refused := errors.New("the KBS says no")
	seen := func(context.Context, []byte) error {
		if got, _ := f.Text(); bytes.Equal(got, want) {
			t.Error("apply does not find the new text in the master copy's place")
		}
		return refused
	}
	if _, err := f.Update(ctx, put("two"), seen); !errors.Is(err, refused) {
		t.Fatalf("Update: %v, want the error of apply", err)
	}
	if got, _ := f.Text(); !bytes.Equal(got, want) {
		t.Error("the master copy changed though the upload failed")
	}
	fresh := openFolder(t, "")
	if _, err := fresh.Update(ctx, put("one"), func(context.Context, []byte) error { return refused }); !errors.Is(err, refused) {
		t.Fatal(err)
	}
	if _, err := os.Stat(fresh.Path()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a failed first upload leaves a master copy (%v)", err)
	}
	entries, _ := os.ReadDir(f.dir)
	if len(entries) != 2 { // policy.rego and its lock
		t.Errorf("files left behind: %v", entries)
	}
}

func TestFolderConcurrentUpdates(t *testing.T) {
	dir := t.TempDir()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var wg sync.WaitGroup
	var uploads [][]byte // guarded by the folder's lock
	for i := range 20 {
		wg.Go(func() {
			f, err := OpenFolder(dir)
			if err != nil {
				t.Error(err)
				return
			}
			_, err = f.Update(ctx, put(fmt.Sprintf("cvm-%d", i)), func(_ context.Context, b []byte) error {
				uploads = append(uploads, bytes.Clone(b))
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	f, _ := OpenFolder(dir)
	rules, err := f.Rules()
	if err != nil || len(rules) != 20 {
		t.Fatalf("%d rules (%v), want 20", len(rules), err)
	}
	text, _ := f.Text()
	if len(uploads) != 20 || !bytes.Equal(uploads[19], text) {
		t.Error("the last upload is not the master copy")
	}
}

func TestFolderLockHasDeadline(t *testing.T) {
	f := openFolder(t, "")
	unlock, err := f.lock(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if _, err := f.Update(ctx, put("one"), nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Update with the lock held: %v, want the deadline", err)
	}
}

func FuzzParseBlock(f *testing.F) {
	f.Add(renderBlock(nil))
	f.Add(renderBlock(mustRules(f,
		Rule{CVMID: "one", Paths: []string{"keys/root/one", "a/b/c"}, Digests: [][48]byte{digest(1), digest(2)}, Simulated: true, MinTCB: map[string]TCB{"Genoa": {SNP: 3}}},
		Rule{CVMID: "two", Paths: []string{"keys/root/two"}, TEE: TEESample})))
	f.Fuzz(func(t *testing.T, b []byte) {
		rules, err := parseBlock(b)
		if err != nil {
			return
		}
		if _, sealed := unseal(b); !sealed {
			t.Error("a block was accepted that hostbuild did not write")
		}
		if again, err := parseBlock(renderBlock(rules)); err != nil || !bytes.Equal(renderBlock(again), renderBlock(rules)) {
			t.Errorf("what was read from a block is not what is written: %v", err)
		}
	})
}

func FuzzCheck(f *testing.F) {
	f.Add(Render(nil))
	f.Add([]byte("package policy\nallow if { false }"))
	f.Add([]byte("package policy\nimport rego.v1\nx := `\n\"`\nallow if { \"\\\"\" }"))
	f.Fuzz(func(t *testing.T, b []byte) {
		Check(b)
	})
}

// FuzzFolderText: whatever people wrote around the block comes out as it went in.
func FuzzFolderText(f *testing.F) {
	block := string(renderBlock(nil))
	f.Add([]byte("package policy\n\n"), []byte("x := 1"))
	f.Add([]byte("a\r\n"), []byte("\n"+beginMark))
	f.Fuzz(func(t *testing.T, above, below []byte) {
		if len(above) > 0 && above[len(above)-1] != '\n' {
			above = append(above, '\n')
		}
		text := bytes.Join([][]byte{above, []byte(block), below}, nil)
		before, got, after, err := split(text)
		if err != nil {
			return
		}
		if !bytes.Equal(before, above) || string(got) != block || !bytes.Equal(after, below) {
			t.Errorf("split %q into %q, %q, %q", text, before, got, after)
		}
	})
}

// The rule that docs/kbs.md has for a workload's resource asks what the CVM's own does.
func TestDocumentedRule(t *testing.T) {
	doc, err := os.ReadFile("../../docs/kbs.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(doc), "```rego\n")
	pasted, _, found := strings.Cut(rest, "```")
	if !found {
		t.Fatal("docs/kbs.md shows no rule")
	}
	const id, path = "cvm_0123456789ab", "site/keys/model"
	text := func(simulated bool) []byte {
		return append(Render(mustRules(t,
			Rule{CVMID: id, Paths: []string{"keys/root/" + id}, Digests: [][48]byte{digest(1)}, Simulated: simulated,
				MinTCB: map[string]TCB{"Genoa": {Bootloader: 10, TEE: 1, SNP: 23, Microcode: 84}}},
			Rule{CVMID: "other", Paths: []string{"keys/root/other"}, Digests: [][48]byte{digest(2)}},
		)), "\n"+pasted...)
	}
	if findings := Check(text(false)); len(findings) > 0 {
		t.Errorf("findings: %v", findings)
	}
	for _, c := range []struct {
		name      string
		path      string
		simulated bool // rule
		digest    byte
		edit      func(claims, evidence map[string]any)
		want      bool
	}{
		{"the CVM", path, false, 1, nil, true},
		{"the CVM, its product named", path, false, 1, func(_, e map[string]any) { e["product"] = "Genoa" }, true},
		{"a product without minimum", path, false, 1, func(_, e map[string]any) { e["product"] = "Turin" }, false},
		{"another path", "site/keys/other", false, 1, nil, false},
		{"another CVM", path, false, 2, nil, false},
		{"a debug guest", path, false, 1, func(c, _ map[string]any) { c["policy_debug_allowed"] = true }, false},
		{"a guest that migrates", path, false, 1, func(c, _ map[string]any) { c["policy_migrate_ma"] = true }, false},
		{"old bootloader", path, false, 1, func(c, _ map[string]any) { c["reported_tcb_bootloader"] = 9 }, false},
		{"old TEE", path, false, 1, func(c, _ map[string]any) { c["reported_tcb_tee"] = 0 }, false},
		{"old SNP", path, false, 1, func(c, _ map[string]any) { c["reported_tcb_snp"] = 22 }, false},
		{"old microcode", path, false, 1, func(c, _ map[string]any) { c["reported_tcb_microcode"] = 83 }, false},
		{"a simulated chip", path, false, 1, func(_, e map[string]any) { e["simulated"] = true }, false},
		{"a simulated chip for a simulated CVM", path, true, 1, func(_, e map[string]any) { e["simulated"] = true }, true},
	} {
		for _, old := range []bool{true, false} {
			claims := snpClaims(digest(c.digest), old)
			evidence := map[string]any{"snp": claims}
			if c.edit != nil {
				c.edit(claims, evidence)
			}
			if got := allows(t, text(c.simulated), old, c.path, evidence); got != c.want {
				t.Errorf("%s (old Trustee: %v): %v, want %v", c.name, old, got, c.want)
			}
		}
	}
}
