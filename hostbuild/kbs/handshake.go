package kbs

import (
	"errors"
	"net/http"
)

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
		if errors.Is(err, errUnavailable) { // a refusal would be final: guests end, agents stop their workload
			return reply{status: http.StatusServiceUnavailable}
		}
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
