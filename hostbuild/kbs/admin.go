package kbs

import (
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"unicode/utf8"

	"coffer/hostbuild/policy"
)

// authorize checks the admin token of a call on an endpoint.
func (s *Server) authorize(c *call, action, endpoint string) (reply, bool) {
	c.action = "admin-" + action
	err := s.admin.check(c.Header.Get("Authorization"), s.dialect, s.now())
	if err == nil {
		c.verdict = done
		return reply{}, true
	}
	c.refuse(refused, err)
	why := err.Error()
	switch {
	case s.dialect == DialectT && errors.Is(err, errNoBearer):
		return fail("AdminAuth", "Admin auth error: "+why), false
	case s.dialect == DialectT:
		return fail("AdminAuth", "Admin auth error: Admin Token verification failed"), false
	case !errors.Is(err, errNoBearer):
		why = "Admin access denied: " + why
	}
	if endpoint == "resource" {
		return fail("AdminAuthInitialization", "failed to initialize [admin] configuration: "+why), false
	}
	return fail("AdminAuthAccess", "admin access denied for endpoint "+endpoint+": "+why), false
}

// setResource stores or deletes a resource.
func (s *Server) setResource(c *call) reply {
	c.path = strings.TrimPrefix(c.rest, "/")
	action := "set-resource"
	if c.Method == http.MethodDelete {
		action = "delete-resource"
	}
	if out, ok := s.authorize(c, action, "resource"); !ok {
		return out
	}
	var err error
	if c.Method == http.MethodDelete {
		err = s.store.deleteResource(c.path)
	} else {
		err = s.store.setResource(c.path, c.body)
	}
	if err != nil {
		c.refuse(refused, err)
		return fail("PluginInternalError", "Plugin internal error")
	}
	s.metrics.add("resource_writes_total")
	return reply{status: http.StatusOK, contentType: xmlType}
}

func (s *Server) setPolicy(c *call) reply {
	if out, ok := s.authorize(c, "set-resource-policy", "resource-policy"); !ok {
		return out
	}
	text, err := uploaded(c.body)
	if err == nil {
		_, err = s.engine.parse(text)
	}
	if err != nil {
		c.refuse(refused, err)
		if f := policy.FailOpen(text); len(f) > 0 && s.dialect == DialectT {
			// Old Trustee takes this text, so say aloud why we do not.
			return fail("PolicyEngine", "Policy engine error: "+f[0].String())
		}
		if s.dialect == DialectH {
			err = errors.New("Failed to load policy: " + err.Error())
		}
		return s.policyError(err)
	}
	if err := s.store.setPolicy(text); err != nil {
		c.refuse(refused, err)
		return s.policyError(err)
	}
	if f := policy.FailOpen(text); len(f) > 0 {
		c.reason = "warning: " + f[0].String()
	}
	return reply{status: http.StatusOK}
}

// uploaded returns the text of {"policy":"<base64url without padding>"}.
func uploaded(body []byte) ([]byte, error) {
	m, err := members(body)
	if err != nil {
		return nil, err
	}
	var encoded string
	if err := member(m, "policy", &encoded); err != nil {
		return nil, err
	}
	text, err := b64.DecodeString(encoded)
	if err != nil {
		return nil, err
	}
	if !utf8.Valid(text) {
		return nil, errors.New("the policy is not UTF-8")
	}
	return text, nil
}

func (s *Server) getPolicy(c *call) reply {
	if out, ok := s.authorize(c, "get-resource-policy", "resource-policy"); !ok {
		return out
	}
	if s.dialect == DialectH {
		return reply{status: http.StatusOK, contentType: jsonType, body: []byte(`["resource-policy"]`)}
	}
	text, err := s.store.policy()
	if err != nil {
		c.refuse(refused, err)
		return s.policyError(err)
	}
	return reply{status: http.StatusOK, contentType: xmlType, body: []byte(b64.EncodeToString(text))}
}

func (s *Server) setAttestationPolicy(c *call) reply {
	if out, ok := s.authorize(c, "set-attestation-policy", "attestation-policy"); !ok {
		return out
	}
	c.refuse(refused, errors.New("this server evaluates no attestation policy; what decides is the resource policy"))
	return fail("AttestationError", "Attestation error: Set Attestation Policy failed")
}

func (s *Server) setReferences(c *call) reply {
	if out, ok := s.authorize(c, "set-reference-value", "reference-value"); !ok {
		return out
	}
	values, err := parseReferences(c.body)
	if err == nil {
		err = s.store.addReferences(values)
	}
	if err != nil {
		c.refuse(refused, err)
		return fail("RvpsError", "RVPS configuration failed: Failed to register reference value: register reference value")
	}
	return reply{status: http.StatusOK, contentType: jsonType}
}

// getReferences answers all values at T, and the one that the path names at H.
func (s *Server) getReferences(c *call) reply {
	if out, ok := s.authorize(c, "get-reference-value", "reference-value"); !ok {
		return out
	}
	values, err := s.store.references()
	var answer any = values
	if s.dialect == DialectH && err == nil {
		id := strings.TrimPrefix(c.rest, "/")
		if answer = values[id]; answer == nil {
			err = errors.New("no such reference value")
		}
	}
	var body []byte
	if err == nil {
		body, err = json.Marshal(answer)
	}
	if err != nil {
		c.refuse(refused, err)
		return fail("RvpsError", "RVPS configuration failed: Failed to get reference_values: query reference values")
	}
	return reply{status: http.StatusOK, contentType: jsonType, body: body}
}
