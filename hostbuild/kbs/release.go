package kbs

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"net/http"
	"strings"
	"unicode/utf8"
)

// Errors of reading a resource.
var (
	errTokenNotFound = errors.New("neither the cookie of an attested session nor a bearer token")
	errPolicyDeny    = errors.New("the resource policy does not allow it")
)

// tokenOf returns the verified claims that the request stands on: those of its
// session, else of its bearer token.
func (s *Server) tokenOf(c *call) (map[string]any, reply, error) {
	read := s.tokens.read // this server signed what its session holds
	token := ""
	if sess := s.sessionOf(c); sess != nil {
		token, c.facts = sess.attested()
	}
	if token == "" {
		var err error
		if token, err = bearer(c.Header.Get("Authorization")); err != nil {
			return nil, fail("TokenNotFound", "Attestation Token not found"), errTokenNotFound
		}
		read = s.tokens.verify
	}
	claims, err := read(token, s.now())
	if err != nil {
		return nil, fail("TokenVerifierError", "Token Verifier error"), err
	}
	if c.facts.tee == "" {
		c.facts = factsOf(claims)
	}
	return claims, reply{}, nil
}

// factsOf takes from a bearer token what the audit says.
func factsOf(claims map[string]any) (f facts) {
	evidence := evidenceOf(claims)
	f.simulated, _ = evidence["simulated"].(bool)
	if report, ok := evidence["snp"].(map[string]any); ok {
		f.tee = "snp"
		f.measurement, _ = report["measurement"].(string)
		if b, err := base64.StdEncoding.DecodeString(f.measurement); err == nil && len(b) == 48 {
			f.measurement = hex.EncodeToString(b)
		}
		f.chipID, _ = report["chip_id"].(string)
	} else if _, ok := evidence[teeSample]; ok {
		f.tee = teeSample
	}
	return f
}

func (s *Server) getResource(c *call) reply {
	c.action, c.path = "release", strings.TrimPrefix(c.rest, "/")
	out, err := s.release(c)
	if err != nil {
		c.refuse(denied, err)
		return out
	}
	c.verdict = released
	s.metrics.add("resource_reads_total")
	return out
}

func (s *Server) release(c *call) (reply, error) {
	claims, out, err := s.tokenOf(c)
	if err != nil {
		return out, err
	}
	if out, err := s.decide(c, claims); err != nil {
		return out, err
	}
	plain, err := s.store.resource(c.path)
	if err != nil {
		return fail("PluginInternalError", "Plugin internal error"), err
	}
	defer clear(plain)
	key, err := keyOf(claims)
	if err != nil {
		return fail("TokenVerifierError", "Token Verifier error"), err
	}
	body, err := key.encrypt(plain)
	if err != nil {
		return fail("JweError", "JWE failed"), err
	}
	return reply{status: http.StatusOK, contentType: jsonType, body: body}, nil
}

// decide asks the resource policy. Like Trustee it does so before it looks at
// the path's form or at the resource.
func (s *Server) decide(c *call, claims map[string]any) (reply, error) {
	s.metrics.add("kbs_policy_evaluations_total")
	ctx, cancel := context.WithTimeout(c.Context(), policyTime)
	defer cancel()
	text, err := s.store.policy()
	if err != nil {
		return s.policyError(err), err
	}
	data := map[string]any{}
	if s.dialect == DialectT {
		if strings.ContainsFunc(c.rest, func(r rune) bool { return r == '"' || r == '\\' || r < ' ' || r == utf8.RuneError }) {
			s.metrics.add("kbs_policy_errors_total")
			err := errors.New("the resource path has an illegal character")
			return s.policyError(err), err
		}
		data["resource-path"] = "resource" + c.rest
	} else {
		segments := []any{}
		for _, seg := range strings.Split(c.path, "/") {
			segments = append(segments, strings.ToValidUTF8(seg, "\ufffd"))
		}
		query := map[string]any{}
		for k, v := range c.URL.Query() {
			query[k] = v[len(v)-1]
		}
		data["plugin"], data["resource-path"], data["query"] = "resource", segments, query
	}
	allow, err := s.engine.allow(ctx, text, data, claims)
	switch {
	case errors.Is(err, errNoBoolean) && s.dialect == DialectH:
		s.metrics.add("kbs_policy_violations_total")
		return fail("PolicyDeny", "Access denied by policy"), err
	case err != nil:
		s.metrics.add("kbs_policy_errors_total")
		return s.policyError(err), err
	case !allow:
		s.metrics.add("kbs_policy_violations_total")
		return fail("PolicyDeny", "Access denied by policy"), errPolicyDeny
	}
	s.metrics.add("kbs_policy_approvals_total")
	return reply{}, nil
}

func (s *Server) policyError(err error) reply {
	if s.dialect == DialectT {
		return fail("PolicyEngine", "Policy engine error")
	}
	return fail("PolicyEngineError", "Policy engine error: "+clip(err.Error()))
}

// putResource answers as dialect H does: the request goes the way of attestation
// tokens and ends nowhere.
func (s *Server) putResource(c *call) reply {
	c.action, c.path = "put", strings.TrimPrefix(c.rest, "/")
	_, out, err := s.tokenOf(c)
	if err == nil {
		out, err = fail("PluginInternalError", "Plugin internal error"), errors.New("resources are written by POST")
	}
	c.refuse(refused, err)
	return out
}
