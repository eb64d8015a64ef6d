package guestconfig

import (
	"strings"
	"testing"
)

func TestValidateGPU(t *testing.T) {
	for _, m := range []struct {
		name     string
		platform string
		edit     func(*GPU)
		want     string // in the one fault, "" for none
	}{
		{"local", PlatformSNP, func(*GPU) {}, ""},
		{"cached", PlatformSNP, func(g *GPU) { g.OCSP, g.OCSPMaxAge = "allow_cached", 3600 }, ""},
		{"pinned", PlatformSNP, func(g *GPU) { g.RIMs = []string{strings.Repeat("0a", 32)} }, ""},
		{"service", PlatformSNP, func(g *GPU) { g.RIMService = "https://rim.example" }, ""},
		{"roots", PlatformSimulated, func(g *GPU) { g.DeviceRoot, g.RIMRoot = "PEM", "PEM" }, ""},
		{"NRAS", PlatformSNP, func(g *GPU) { g.Mode, g.NRASURL = GPULocalNRAS, "https://nras.example" }, ""},
		{"NRAS by http", PlatformSNP, func(g *GPU) { g.Mode, g.NRASURL = GPUNRAS, "http://nras.example" }, "nras_url"},
		{"no mode", PlatformSNP, func(g *GPU) { g.Mode = "" }, "mode"},
		{"other mode", PlatformSNP, func(g *GPU) { g.Mode = "none" }, "mode"},
		{"too many", PlatformSNP, func(g *GPU) { g.Count = 17 }, "count"},
		{"no digest", PlatformSNP, func(g *GPU) { g.RIMs = []string{"0A"} }, "rims"},
		{"http", PlatformSNP, func(g *GPU) { g.RIMService = "http://rim.example" }, "rim_service"},
		{"no OCSP mode", PlatformSNP, func(g *GPU) { g.OCSP = "" }, "ocsp"},
		{"cached without age", PlatformSNP, func(g *GPU) { g.OCSP = "allow_cached" }, "ocsp_max_age"},
		{"age without cache", PlatformSNP, func(g *GPU) { g.OCSPMaxAge = 1 }, "ocsp_max_age"},
		{"roots on real hardware", PlatformSNP, func(g *GPU) { g.RIMRoot = "PEM" }, "simulated"},
	} {
		g := &GPU{Mode: GPULocal, OCSP: "require"}
		m.edit(g)
		faults := g.faults(m.platform)
		if (m.want == "") != (len(faults) == 0) || m.want != "" && (len(faults) != 1 || !strings.Contains(faults[0], m.want)) {
			t.Errorf("%s: faults %q, want %q", m.name, faults, m.want)
		}
	}
	if faults := (*GPU)(nil).faults(PlatformSNP); faults != nil {
		t.Errorf("without GPUs: %q", faults)
	}
}
