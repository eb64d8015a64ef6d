//go:build simulated

package stages

import (
	"strings"
	"testing"

	"coffer/internal/evidence"
)

// The TEE "sample" exists on the simulated platform only.
func TestSampleHasNoMeasurement(t *testing.T) {
	m := newMachine()
	m.cfg.TEE, m.source.tee = evidence.TEESample, evidence.TEESample
	m.boot(t.Context())
	if !m.did("SwitchRoot") || strings.Contains(m.console.String(), "launch_digest=") {
		t.Errorf("boot with sample evidence:\n%s", m.console.String())
	}
}
