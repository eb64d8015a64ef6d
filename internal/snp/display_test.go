package snp

import (
	"os"
	"strings"
	"testing"
)

// The texts are snpguest 0.9.2's own.
func TestDisplayIsByteIdenticalToSnpguest(t *testing.T) {
	for _, name := range []string{"genoa-v3", "turin-v5"} {
		raw, err := os.ReadFile("testdata/" + name + ".bin")
		if err != nil {
			t.Fatal(err)
		}
		want, err := os.ReadFile("testdata/" + name + ".txt")
		if err != nil {
			t.Fatal(err)
		}
		r, err := ParseReport(raw)
		if err != nil {
			t.Fatal(err)
		}
		if got := r.Display(); got != string(want) {
			for i, line := range strings.Split(string(want), "\n") {
				if g := strings.Split(got, "\n"); i >= len(g) || g[i] != line {
					t.Errorf("%s, line %d: %q, want %q", name, i+1, g[min(i, len(g)-1)], line)
					break
				}
			}
			t.Errorf("%s: %d bytes, want %d", name, len(got), len(want))
		}
	}
}

// What the report's version does not hold is None; the words for keys are snpguest's.
func TestDisplayOfOtherVersions(t *testing.T) {
	for version, want := range map[uint32][]string{
		2: {"CPUID Family ID:              None\n", "Launch Mitigation Vector:     None\n"},
		4: {"CPUID Family ID:              25\n", "Current Mitigation Vector:    None\n"},
		5: {"CPUID Family ID:              25\n", "Current Mitigation Vector:    3\n"},
	} {
		r := &Report{Version: version, CPUFamily: 25, CurrentMitVector: 3}
		for _, w := range want {
			if !strings.Contains(r.Display(), w) {
				t.Errorf("version %d lacks %q", version, w)
			}
		}
	}
	for info, want := range map[uint32]string{0: "vcek", 1 << 2: "vlek", 7 << 2: "none", 3 << 2: "unknown"} {
		if r := (&Report{KeyInfo: info}); !strings.Contains(r.Display(), "signing key:        "+want+"\n") {
			t.Errorf("key info %#x is not shown as %s", info, want)
		}
	}
}
