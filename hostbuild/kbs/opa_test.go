package kbs

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"coffer/hostbuild/policy"
)

func TestEngineReachesNothing(t *testing.T) {
	for _, call := range []string{`http.send({"method":"GET","url":"http://127.0.0.1"})`, `opa.runtime()`, `net.lookup_ip_addr("localhost")`, `rego.metadata.rule()`,
		`io.jwt.decode("a")`, `crypto.sha256("a")`, `hex.encode("a")`, `uuid.rfc4122("x")`} {
		for _, d := range []Dialect{DialectT, DialectH} {
			text := "package policy\nimport rego.v1\nallow if { x := " + call + "; x == x }\n"
			ok, err := newEngine(d).allow(context.Background(), []byte(text), nil, nil)
			if ok || err == nil || !strings.Contains(err.Error(), "undefined function") {
				t.Errorf("%s at %s: %v, %v; want an undefined function", call, d, ok, err)
			}
		}
	}
}

func TestEngineHasDeadline(t *testing.T) {
	text := "package policy\nimport rego.v1\ndefault allow := false\nallow if { some i in numbers.range(1, 100000); some j in numbers.range(1, 100000); i * j < 0 }\n"
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if ok, err := newEngine(DialectH).allow(ctx, []byte(text), nil, nil); ok || err == nil {
		t.Errorf("endless policy: %v, %v; want an error", ok, err)
	}
}

// TestEngineKeepsRequestsApart: one request's data never reach another, and a
// new text replaces the old one.
func TestEngineKeepsRequestsApart(t *testing.T) {
	e := newEngine(DialectT)
	ctx := context.Background()
	text := []byte("package policy\nimport rego.v1\ndefault allow := false\nallow if data[\"resource-path\"] == input.path\n")
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 50 {
				path := fmt.Sprintf("p%d", i)
				want := j%2 == 0
				data := map[string]any{"resource-path": path}
				if !want {
					data["resource-path"] = "other"
				}
				if got, err := e.allow(ctx, text, data, map[string]any{"path": path}); err != nil || got != want {
					t.Errorf("allow %v, %v; want %v", got, err, want)
				}
			}
		})
	}
	wg.Wait()
	if got, err := e.allow(ctx, text, nil, map[string]any{"path": "other"}); err != nil || got {
		t.Errorf("data of an earlier request are still there: %v, %v", got, err)
	}
	if _, err := e.allow(ctx, []byte("package policy\n"), nil, nil); !errors.Is(err, errNoBoolean) {
		t.Errorf("without allow: %v", err)
	}
	for _, text := range []string{"package policy\nallow := 1\n", "package policy\nallow := \"true\"\n", "package policy\nallow := [true]\n", "package other\nallow := true\n"} {
		if ok, err := e.allow(ctx, []byte(text), nil, nil); ok || !errors.Is(err, errNoBoolean) {
			t.Errorf("%q: %v, %v; want no boolean", text, ok, err)
		}
	}
	if ok, err := e.allow(ctx, []byte("package policy\nallow := true { input.a }\nallow := false { input.b }\n"), nil, map[string]any{"a": true, "b": true}); ok || err == nil {
		t.Errorf("conflict of rules: %v, %v; want an error", ok, err)
	}
}

func TestFailOpenUpload(t *testing.T) {
	const text = "package policy\ndefault allow := false\nallow if { false }\n"
	for d, status := range map[Dialect]int{DialectT: 401, DialectH: 200} {
		r := newRig(t, Options{Dialect: d})
		before, err := r.server.store.policy()
		if err != nil {
			t.Fatal(err)
		}
		a := r.asAdmin("POST", "/kbs/v0/resource-policy", policyBody(text))
		if a.status != status {
			t.Errorf("%s: %d %s, want %d", d, a.status, a.body, status)
		}
		if !strings.Contains(fmt.Sprint(r.log.last(t)["reason"]), "import rego.v1") {
			t.Errorf("%s: the audit does not say why: %v", d, r.log.last(t))
		}
		if d != DialectT {
			continue
		}
		if a.errType() != "PolicyEngine" || !strings.Contains(a.detail(), "line 3") {
			t.Errorf("answer %s", a.body)
		}
		if after, _ := r.server.store.policy(); string(after) != string(before) {
			t.Error("a refused policy is in force")
		}
	}
}

// TestEngineWordBehindAllow: what old Trustee misreads in the same way as an
// unknown `if` is no policy at all to OPA.
func TestEngineWordBehindAllow(t *testing.T) {
	for _, text := range []string{"allow when { false }", "allow unless x { false }", "import future.keywords.if\nallow iff { false }", "allow"} {
		if _, err := newEngine(DialectT).parse([]byte("package policy\ndefault allow = false\n" + text + "\n")); err == nil {
			t.Errorf("%q is accepted", text)
		}
	}
}

// TestPolicyOnDisk: a policy that stands in the folder fails closed, too.
func TestPolicyOnDisk(t *testing.T) {
	r := ready(t, DialectT)
	g := r.guest("sample")
	g.attested()
	for _, text := range []string{"package policy\nallow if { false }\n", "", "package policy\nallow {", "\xff"} {
		if err := r.server.store.setPolicy([]byte(text)); err != nil {
			t.Fatal(err)
		}
		if a := g.get(keyPath); a.errType() != "PolicyEngine" {
			t.Errorf("%q: %d %s, want PolicyEngine", text, a.status, a.body)
		}
	}
	if err := r.server.store.root.Remove(policyFile); err != nil {
		t.Fatal(err)
	}
	if a := g.get(keyPath); a.errType() != "PolicyDeny" {
		t.Errorf("without a policy: %d %s, want PolicyDeny", a.status, a.body)
	}
	if err := r.server.store.setPolicy(policy.Render(nil)); err != nil {
		t.Fatal(err)
	}
	if a := g.get(keyPath); a.errType() != "PolicyDeny" {
		t.Errorf("without rules: %d %s, want PolicyDeny", a.status, a.body)
	}
}

// TestPolicyWithoutBoolean: what is neither true nor false releases nothing.
func TestPolicyWithoutBoolean(t *testing.T) {
	dialects(t, func(t *testing.T, d Dialect) {
		r := ready(t, d)
		g := r.guest("sample")
		g.attested()
		for _, rule := range []string{"", "allow = 1", `allow = "true"`, "allow = {true}", "allow = [true]", "allow = null", "allow = false { false }"} {
			if d == DialectH {
				rule = strings.Replace(rule, "{ false }", "if { false }", 1)
			}
			r.setPolicy("package policy\n" + rule + "\n")
			want := map[Dialect]string{DialectT: "PolicyEngine", DialectH: "PolicyDeny"}[d]
			if a := g.get(keyPath); a.status != 401 || a.errType() != want {
				t.Errorf("%q: %d %s, want %s", rule, a.status, a.body, want)
			}
			r.reason(errNoBoolean.Error())
		}
	})
}
