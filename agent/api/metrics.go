package api

import (
	"bytes"
	"fmt"
	"net/http"
)

// verdicts are those that a round can have, in the words of its record.
var verdicts = [...]string{"pass", "negative", "unknown"}

// metrics is the attestation's state in Prometheus's text format.
func (s *Server) metrics(*http.Request) (*answer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var b bytes.Buffer
	b.WriteString("# TYPE coffer_attestation_rounds_total counter\n")
	for _, v := range verdicts {
		fmt.Fprintf(&b, "coffer_attestation_rounds_total{verdict=%q} %d\n", v, s.rounds[v])
	}
	b.WriteString("# HELP coffer_attestation_clock_lost_seconds_total What the KBS's clock counted and the guest's, stopped or slowed, did not.\n# TYPE coffer_attestation_clock_lost_seconds_total counter\n")
	fmt.Fprintf(&b, "coffer_attestation_clock_lost_seconds_total %g\n", seconds(s.lost))
	if s.passed {
		b.WriteString("# HELP coffer_attestation_pass_age_seconds Since the end of the last round that passed.\n# TYPE coffer_attestation_pass_age_seconds gauge\n")
		fmt.Fprintf(&b, "coffer_attestation_pass_age_seconds %g\n", seconds(s.cfg.Now()-s.passAt))
	}
	return &answer{kind: "text/plain; version=0.0.4", body: b.Bytes()}, nil
}
