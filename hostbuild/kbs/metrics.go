package kbs

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

// metrics are those of /metrics: Trustee's names, in Prometheus' text form.
type metrics struct {
	mu         sync.Mutex
	counters   map[string]map[string]uint64 // by name and label, "" for none
	histograms map[string]*histogram
}

type histogram struct {
	bounds []float64
	counts []uint64 // as many as bounds, not summed up
	sum    float64
	count  uint64
}

var (
	counterHelp = map[string]string{
		"http_requests_total":          "HTTP requests",
		"http_requests_refused_total":  "HTTP requests refused unread: too many at a time, or of one address",
		"auth_requests_total":          "Requests for a challenge",
		"auth_successes_total":         "Challenges given",
		"auth_errors_total":            "Requests for a challenge that cannot be read",
		"attestation_requests_total":   "Attestations asked for",
		"attestation_successes_total":  "Attestations that verified",
		"attestation_failures_total":   "Attestations whose evidence was refused",
		"attestation_errors_total":     "Attestations without a live session or that cannot be read",
		"kbs_policy_evaluations_total": "Evaluations of the resource policy",
		"kbs_policy_approvals_total":   "Requests that the resource policy allows",
		"kbs_policy_violations_total":  "Requests that the resource policy denies",
		"kbs_policy_errors_total":      "Requests for which the resource policy gives no answer",
		"resource_reads_total":         "Resources released",
		"resource_writes_total":        "Resources stored or deleted",
	}
	histogramHelp = map[string]string{
		"http_request_duration_seconds": "Time from a request's head to its answer",
		"http_request_size_bytes":       "Size of request bodies",
		"http_response_size_bytes":      "Size of answers' bodies",
	}
)

func newMetrics() *metrics {
	m := &metrics{counters: map[string]map[string]uint64{}, histograms: map[string]*histogram{}}
	for name := range counterHelp {
		m.counters[name] = map[string]uint64{}
		if !strings.HasPrefix(name, "attestation_s") && !strings.HasPrefix(name, "attestation_f") { // those have a label always
			m.counters[name][""] = 0
		}
	}
	sizes := []float64{32, 128, 512, 2048, 8192, 32768}
	for name, bounds := range map[string][]float64{
		"http_request_duration_seconds": {0.0005, 0.001, 0.005, 0.01, 0.05, 0.5, 1},
		"http_request_size_bytes":       sizes,
		"http_response_size_bytes":      sizes,
	} {
		m.histograms[name] = &histogram{bounds: bounds, counts: make([]uint64, len(bounds))}
	}
	return m
}

func (m *metrics) add(name string) { m.addTEE(name, "") }

// addTEE counts by TEE, a name that /auth accepted: a handful.
func (m *metrics) addTEE(name, tee string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.counters[name][tee]++
}

// request counts a request that was answered.
func (m *metrics) request(took time.Duration, in, out int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.counters["http_requests_total"][""]++
	for name, v := range map[string]float64{
		"http_request_duration_seconds": took.Seconds(), "http_request_size_bytes": float64(in), "http_response_size_bytes": float64(out),
	} {
		h := m.histograms[name]
		if i, _ := slices.BinarySearch(h.bounds, v); i < len(h.bounds) {
			h.counts[i]++
		}
		h.sum += v
		h.count++
	}
}

func (m *metrics) text() []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	var b strings.Builder
	for _, name := range sortedKeys(counterHelp) {
		fmt.Fprintf(&b, "# HELP %s %s\n# TYPE %s counter\n", name, counterHelp[name], name)
		for _, tee := range sortedKeys(m.counters[name]) {
			label := ""
			if tee != "" {
				label = fmt.Sprintf("{tee_type=%q}", tee)
			}
			fmt.Fprintf(&b, "%s%s %d\n", name, label, m.counters[name][tee])
		}
	}
	for _, name := range sortedKeys(histogramHelp) {
		h := m.histograms[name]
		fmt.Fprintf(&b, "# HELP %s %s\n# TYPE %s histogram\n", name, histogramHelp[name], name)
		sum := uint64(0)
		for i, bound := range h.bounds {
			sum += h.counts[i]
			fmt.Fprintf(&b, "%s_bucket{le=\"%g\"} %d\n", name, bound, sum)
		}
		fmt.Fprintf(&b, "%s_bucket{le=\"+Inf\"} %d\n%s_sum %g\n%s_count %d\n", name, h.count, name, h.sum, name, h.count)
	}
	return []byte(b.String())
}
