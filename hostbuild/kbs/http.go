package kbs

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"time"
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

// serve answers one request.
func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	c := &call{Request: r}
	out := reply{status: http.StatusServiceUnavailable}
	switch {
	case !s.inFlight.take(r.RemoteAddr):
		s.metrics.add("http_requests_refused_total")
	case !s.limiter.allow(r.RemoteAddr):
		s.inFlight.give(r.RemoteAddr)
		s.metrics.add("http_requests_refused_total")
		out.status = http.StatusTooManyRequests
	default:
		defer s.inFlight.give(r.RemoteAddr)
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
	if !slices.Contains(strings.Split(s.methods(), ", "), c.Method) {
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
