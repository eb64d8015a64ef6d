package kbs

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"time"
	"unicode/utf8"

	"coffer/hostbuild/policy"
)

const (
	prefix    = "/kbs/v0/"
	errorBase = "https://github.com/confidential-containers/kbs/errors/"
	jsonType  = "application/json"
	xmlType   = "text/xml" // as Trustee: for a resource's upload and the policy
)

// reply is an answer. Trustee sends no Content-Type with errors and with most
// empty answers, so there is none unless it is set.
type reply struct {
	status      int
	contentType string
	body        []byte
	header      map[string]string
}

// call is one request, and what the audit says about it.
type call struct {
	*http.Request
	body []byte
	rest string // the path behind the first segment, with its slash

	action, verdict, path, reason string
	facts                         facts
}

// Verdicts: the messages of audit lines.
const (
	challenged = "challenged"
	attested   = "attested"
	refused    = "refused"
	released   = "released"
	denied     = "denied"
	done       = "done" // an administrator's request
)

// refuse notes the verdict and its reason, which the client does not see.
func (c *call) refuse(verdict string, err error) { c.verdict, c.reason = verdict, err.Error() }

// fail is an error answer. Trustee's status is nearly always 401.
func fail(typ, detail string) reply {
	b, err := json.Marshal(struct {
		Type   string `json:"type"`
		Detail string `json:"detail"`
	}{errorBase + typ, detail})
	if err != nil {
		panic(err) // two strings
	}
	return reply{status: http.StatusUnauthorized, body: b}
}

// Handler returns the server's HTTP handler. Serve adds TLS and time limits.
func (s *Server) Handler() http.Handler { return http.HandlerFunc(s.serve) }

func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	defer s.inFlight.Add(-1)
	c := &call{Request: r}
	out := reply{status: http.StatusServiceUnavailable}
	switch {
	case s.inFlight.Add(1) > maxInFlight:
		s.metrics.add("http_requests_refused_total")
	case !s.limiter.allow(r.RemoteAddr):
		s.metrics.add("http_requests_refused_total")
		out.status = http.StatusTooManyRequests
	default:
		out = s.route(w, c)
	}
	took := time.Since(start)
	s.metrics.request(took, len(c.body), len(out.body))
	s.audit(c, took)
	clear(c.body)

	h := w.Header()
	h["Content-Type"] = nil
	if out.contentType != "" {
		h.Set("Content-Type", out.contentType)
	}
	for name, v := range out.header {
		h.Set(name, v)
	}
	w.WriteHeader(out.status)
	w.Write(out.body)
}

// audit writes the one line of a decision. Requests that decide nothing, such
// as unknown routes, have no action and no line.
func (s *Server) audit(c *call, took time.Duration) {
	if c.action == "" {
		return
	}
	attrs := []slog.Attr{slog.String("action", c.action), slog.String("verdict", c.verdict), slog.String("remote", c.RemoteAddr)}
	for _, a := range []struct{ key, value string }{
		{"path", c.path}, {"tee", c.facts.tee}, {"measurement", c.facts.measurement}, {"chip_id", c.facts.chipID}, {"reason", c.reason},
	} {
		if a.value != "" {
			attrs = append(attrs, slog.String(a.key, clip(a.value)))
		}
	}
	if c.facts.simulated {
		attrs = append(attrs, slog.Bool("simulated", true))
	}
	attrs = append(attrs, slog.Float64("ms", float64(took.Microseconds())/1000))
	level := slog.LevelInfo
	if c.verdict == refused || c.verdict == denied {
		level = slog.LevelWarn
	}
	s.log.LogAttrs(c.Context(), level, c.verdict, attrs...)
}

// clip bounds what a client can write into the log.
func clip(s string) string {
	const limit = 500
	if len(s) > limit {
		s = s[:limit] + "..."
	}
	return strings.ToValidUTF8(s, "?")
}

func (s *Server) methods() string {
	if s.dialect == DialectT {
		return "GET, POST"
	}
	return "GET, POST, PUT, DELETE"
}

func (s *Server) route(w http.ResponseWriter, c *call) reply {
	path := unescape(c.URL.EscapedPath())
	switch {
	case path == "/metrics":
		if c.Method != http.MethodGet {
			return reply{status: http.StatusMethodNotAllowed}
		}
		return reply{status: http.StatusOK, contentType: "text/plain; charset=utf-8", body: s.metrics.text()}
	case path == "/healthz" && c.Method == http.MethodGet:
		return reply{status: http.StatusOK}
	}
	rest, ok := strings.CutPrefix(path, prefix)
	first, _, _ := strings.Cut(rest, "/")
	if !ok || first == "" {
		return reply{status: http.StatusNotFound}
	}
	if !strings.Contains(s.methods()+",", c.Method+",") {
		return reply{status: http.StatusMethodNotAllowed, header: map[string]string{"Allow": s.methods()}}
	}
	c.rest = rest[len(first):]
	var err error
	if c.body, err = io.ReadAll(http.MaxBytesReader(w, c.Body, maxBody)); err != nil {
		var tooLarge *http.MaxBytesError
		if errors.As(err, &tooLarge) {
			return reply{status: http.StatusRequestEntityTooLarge, contentType: "text/plain; charset=utf-8", body: []byte("payload reached size limit")}
		}
		return reply{status: http.StatusBadRequest}
	}
	plain := c.rest == "" || c.rest == "/"
	switch {
	case first == "auth" && c.Method == http.MethodPost && plain:
		return s.auth(c)
	case first == "attest" && c.Method == http.MethodPost && plain:
		return s.attest(c)
	case first == "resource" && c.Method == http.MethodGet:
		return s.getResource(c)
	case first == "resource" && c.Method == http.MethodPut:
		return s.putResource(c)
	case first == "resource":
		return s.setResource(c)
	case first == "resource-policy" && c.Method == http.MethodPost && plain:
		return s.setPolicy(c)
	case first == "resource-policy" && c.Method == http.MethodGet && plain:
		return s.getPolicy(c)
	case first == "attestation-policy" && c.Method == http.MethodPost && plain:
		return s.setAttestationPolicy(c)
	case first == "reference-value" && c.Method == http.MethodPost && plain:
		return s.setReferences(c)
	case first == "reference-value" && c.Method == http.MethodGet:
		return s.getReferences(c)
	}
	out := fail("PluginNotFound", "Plugin "+clip(first)+" not found")
	out.status = http.StatusNotFound
	return out
}

// unescape decodes a path as Trustee's server does: once, and neither a slash
// nor a percent sign.
func unescape(p string) string {
	if !strings.Contains(p, "%") {
		return p
	}
	var b strings.Builder
	for i := 0; i < len(p); i++ {
		if p[i] == '%' && i+2 < len(p) {
			if c, err := hex.DecodeString(p[i+1 : i+3]); err == nil && c[0] != '/' && c[0] != '%' && c[0] != '+' {
				b.WriteByte(c[0])
				i += 2
				continue
			}
		}
		b.WriteByte(p[i])
	}
	return b.String()
}

func (s *Server) auth(c *call) reply {
	c.action = "auth"
	s.metrics.add("auth_requests_total")
	tee, err := parseAuth(c.body, s.dialect)
	if err != nil {
		s.metrics.add("auth_errors_total")
		c.refuse(refused, err)
		detail := err.Error()
		if errors.Is(err, errRequest) {
			detail = errRequest.Error()
		}
		return fail("AttestationError", "Attestation error: RCAR handshake Auth failed: "+detail)
	}
	s.metrics.add("auth_successes_total")
	sess := s.sessions.open(tee)
	c.verdict, c.facts.tee = challenged, tee
	return withCookie(sess, []byte(`{"nonce":"`+sess.nonce+`","extra-params":""}`))
}

func withCookie(sess *session, body []byte) reply {
	return reply{status: http.StatusOK, contentType: jsonType, body: body, header: map[string]string{"Set-Cookie": sess.cookie()}}
}

// sessionOf returns the live session that the request's cookie names, or nil.
func (s *Server) sessionOf(c *call) *session {
	cookie, err := c.Cookie(cookieName)
	if err != nil {
		return nil
	}
	return s.sessions.get(cookie.Value)
}

func (s *Server) attest(c *call) reply {
	c.action = "attest"
	s.metrics.add("attestation_requests_total")
	sess, token, err := s.attestSession(c)
	if err != nil {
		if c.facts.tee != "" {
			s.metrics.addTEE("attestation_failures_total", c.facts.tee)
		} else {
			s.metrics.add("attestation_errors_total")
		}
		c.refuse(refused, err)
		return fail("AttestationError", "Attestation error: RCAR handshake Attest failed")
	}
	s.metrics.addTEE("attestation_successes_total", c.facts.tee)
	c.verdict = attested
	return withCookie(sess, []byte(`{"token":"`+token+`"}`))
}

func (s *Server) attestSession(c *call) (*session, string, error) {
	sess := s.sessionOf(c)
	if sess == nil {
		return nil, "", errors.New("no cookie of a live session: begin with /auth")
	}
	a, err := parseAttestation(c.body)
	if err != nil {
		return nil, "", err
	}
	sess.mu.Lock()
	defer sess.mu.Unlock()
	if sess.token != "" {
		// As Trustee: the old token, whatever the body says, if it parses.
		if s.dialect == DialectH {
			if _, err := a.parse(); err != nil {
				return nil, "", err
			}
		}
		c.facts, c.reason = sess.facts, "this session is attested already: its token again"
		return sess, sess.token, nil
	}
	token, f, err := s.attestOnce(c.Context(), sess, a)
	c.facts = f
	if err != nil {
		return nil, "", err
	}
	sess.token, sess.facts = token, f
	s.sessions.keep(sess)
	return sess, token, nil
}

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
	if err != nil {
		c.refuse(refused, err)
		return fail("RvpsError", "RVPS configuration failed: Failed to get reference_values: query reference values")
	}
	body, err := json.Marshal(answer)
	if err != nil {
		c.refuse(refused, err)
		return fail("RvpsError", "RVPS configuration failed: Failed to get reference_values: query reference values")
	}
	return reply{status: http.StatusOK, contentType: jsonType, body: body}
}
