package kbs

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
)

// metrics are the counters of /metrics, under Trustee's names.
type metrics struct{ counters map[string]*atomic.Uint64 }

func newMetrics() *metrics {
	m := &metrics{counters: map[string]*atomic.Uint64{}}
	for _, name := range []string{
		"http_requests_total", "auth_requests_total", "auth_successes_total", "auth_errors_total",
		"attestation_requests_total", "attestation_successes_total", "attestation_errors_total",
		"kbs_policy_evaluations_total", "kbs_policy_approvals_total", "kbs_policy_violations_total", "kbs_policy_errors_total",
		"resource_reads_total", "resource_writes_total",
	} {
		m.counters[name] = new(atomic.Uint64)
	}
	return m
}

func (m *metrics) add(name string) { m.counters[name].Add(1) }

func (m *metrics) text() []byte {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(m.counters)) {
		fmt.Fprintf(&b, "# TYPE %s counter\n%s %d\n", name, name, m.counters[name].Load())
	}
	return []byte(b.String())
}
