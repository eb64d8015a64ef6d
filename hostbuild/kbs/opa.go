package kbs

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/storage/inmem"

	"coffer/hostbuild/policy"
)

// engine evaluates resource policies with OPA. It keeps the compiled form of
// one text, the one in force.
type engine struct {
	version ast.RegoVersion
	caps    *ast.Capabilities

	mu    sync.Mutex
	text  string
	query rego.PreparedEvalQuery
	data  storage.Store
}

func newEngine(d Dialect) *engine {
	e := &engine{version: ast.RegoV1, caps: capabilities()}
	if d == DialectT {
		e.version = ast.RegoV0
	}
	return e
}

// capabilities are OPA's without what Trustee's engine lacks, and above all
// without what reaches out of the policy: network, environment, other policies.
func capabilities() *ast.Capabilities {
	caps := ast.CapabilitiesForThisVersion()
	var keep []*ast.Builtin
	for _, b := range caps.Builtins {
		family, _, dotted := strings.Cut(b.Name, ".")
		switch {
		case !dotted, b.Name == "base64.encode", b.Name == "base64.decode":
			keep = append(keep, b)
		default:
			switch family {
			case "array", "object", "regex", "time", "bits", "strings", "numbers", "json", "internal":
				keep = append(keep, b)
			}
		}
	}
	caps.Builtins = keep
	caps.AllowNet = []string{}
	return caps
}

// parse checks a text for upload. Like Trustee it parses only: an unknown
// function shows at the first use. dialect T also refuses what old Trustee
// would take and read as `allow`, always.
func (e *engine) parse(text []byte) (*ast.Module, error) {
	if e.version == ast.RegoV0 {
		if f := policy.FailOpen(text); len(f) > 0 {
			return nil, errors.New(f[0].String())
		}
	}
	mod, err := ast.ParseModuleWithOpts(policyFile, string(text), ast.ParserOptions{RegoVersion: e.version, Capabilities: e.caps})
	if err != nil {
		return nil, err
	}
	if mod == nil {
		return nil, errors.New("the text is empty")
	}
	return mod, nil
}

// errNoBoolean says that a policy gives no boolean `allow`.
var errNoBoolean = errors.New("data.policy.allow is not a boolean")

// allow evaluates data.policy.allow of text with data and input.
func (e *engine) allow(ctx context.Context, text []byte, data, input map[string]any) (bool, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.prepare(ctx, text); err != nil {
		return false, fmt.Errorf("Failed to load policy: %w", err)
	}
	// The request's data live in a transaction that is never committed.
	txn, err := e.data.NewTransaction(ctx, storage.WriteParams)
	if err != nil {
		return false, err
	}
	defer e.data.Abort(ctx, txn)
	for name, v := range data {
		if err := e.data.Write(ctx, txn, storage.AddOp, storage.Path{name}, v); err != nil {
			return false, err
		}
	}
	growStack()
	rs, err := e.query.Eval(ctx, rego.EvalInput(input), rego.EvalTransaction(txn))
	if err != nil {
		return false, fmt.Errorf("Failed to eval policy: %w", err)
	}
	if len(rs) != 1 || len(rs[0].Expressions) != 1 {
		return false, errNoBoolean
	}
	allow, ok := rs[0].Expressions[0].Value.(bool)
	if !ok {
		return false, errNoBoolean
	}
	return allow, nil
}

// growStack makes the goroutine's stack as large as an evaluation needs, in one
// step: it recurses deeply, and on a new connection the stack would be doubled,
// and copied with all its frames, five times in the middle of it.
//
//go:noinline
func growStack() {
	var room [32 << 10]byte
	runtime.KeepAlive(&room)
}

func (e *engine) prepare(ctx context.Context, text []byte) error {
	if e.data != nil && e.text == string(text) {
		return nil
	}
	e.data = nil
	mod, err := e.parse(text)
	if err != nil {
		return err
	}
	data := inmem.New()
	e.query, err = rego.New(rego.Query("data.policy.allow"), rego.ParsedModule(mod), rego.Store(data),
		rego.SetRegoVersion(e.version), rego.Capabilities(e.caps)).PrepareForEval(ctx)
	if err != nil {
		return err
	}
	e.text, e.data = string(text), data
	return nil
}
