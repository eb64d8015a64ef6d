package config

import (
	"net/url"
	"slices"
	"strconv"
	"strings"

	"coffer/hostbuild/yamlcheck"
	"coffer/internal/guestconfig"
)

// GPU is how the CVM's NVIDIA GPUs are attested.
type GPU struct {
	guestconfig.GPU // without what the builder reads of the folders below

	Required    bool     // /vault and Resources are for evidence with verified GPUs alone
	Resources   []string // of the KBS, which the CVM's rule then lets it read
	RIMs        string   // folder of manifests that go into the bundle, absolute; "": none
	OCSPAnswers string   // folder of kept answers that go into the bundle, absolute; "": none
}

// NVIDIA's services.
const (
	nvidiaMechanism = "nvidia_cc" // NVFlare's name for GPUs
	nvidiaRIMs      = "https://rim.attestation.nvidia.com"
	gpuOCSPMaxAge   = 86400
)

// gpu reads the section gpu; nil where there are no GPUs.
func gpu(m *yamlcheck.Map, n guestconfig.Network) *GPU {
	mechanism := m.OneOf("cc_gpu_mechanism", "", nvidiaMechanism)
	g := m.Map("gpu")
	defer g.Finish()
	c := &GPU{Required: g.Bool("required", false), Resources: g.Strings("resources")}
	mode := guestconfig.GPULocal
	if c.Required {
		mode = guestconfig.GPULocalTrustee
	}
	c.Mode = g.OneOf("mode", mode, guestconfig.GPULocal, guestconfig.GPUNRAS, guestconfig.GPUTrustee, guestconfig.GPULocalNRAS, guestconfig.GPULocalTrustee)
	c.Count = int(g.Int("count", 0, 0, guestconfig.MaxGPUs))
	c.Drivers, c.VBIOSes = g.Strings("drivers"), g.Strings("vbioses")
	c.RIMs, c.OCSPAnswers = g.Path("rims"), g.Path("ocsp_answers")
	service := nvidiaRIMs
	if c.RIMs != "" || !c.Local() {
		service = ""
	}
	c.RIMService = g.String("rim_service", service)
	c.NRASURL = g.String("nras_url", "")
	c.AllowExpiredRIM, c.AllowHold = g.Bool("allow_expired_rims", false), g.Bool("allow_cert_hold", false)
	c.OCSP = g.OneOf("ocsp", "require", "require", "allow_cached", "off")
	age := int(g.Int("ocsp_max_age", gpuOCSPMaxAge, 1, 366*86400))
	if c.OCSP == "allow_cached" {
		c.OCSPMaxAge = age
	}
	if mechanism == "" && !m.Has("gpu") {
		return nil
	}

	if c.Required && !c.Trustee() {
		g.Faultf("mode", "%s: with required the KBS must judge the GPUs too: trustee or local+trustee", c.Mode)
	}
	if len(c.Resources) > 0 && !c.Required {
		g.Faultf("resources", "are for verified GPUs alone only with required: true")
	}
	for i, r := range c.Resources {
		if !guestconfig.ValidResourcePath(r) || strings.HasPrefix(r, "keys/") {
			g.FaultItemf("resources", i, "%q is not repository/type/tag, or is in the repository keys, which holds the CVMs' own", r)
		}
	}
	if c.OCSPAnswers != "" && c.OCSP != "allow_cached" {
		g.Faultf("ocsp_answers", "are used only with ocsp: allow_cached")
	}
	if c.NRASURL != "" && !c.NRAS() {
		g.Faultf("nras_url", "is asked only in the modes nras and local+nras")
	}
	for _, need := range []struct{ key, url string }{
		{"mode", service443(c.NRAS() && c.NRASURL == "")}, {"nras_url", c.NRASURL}, {"rim_service", c.RIMService},
		{"ocsp", service443(c.Local() && c.OCSP != "off" && c.OCSPAnswers == "")},
	} {
		switch p := portOf(need.url); {
		case need.url == "":
		case !guestconfig.ValidService(need.url):
			g.Faultf(need.key, "%q is not https://host", need.url)
		case !slices.Contains(n.AllowedOutPorts, guestconfig.Port{Port: p, Proto: "tcp"}):
			g.Faultf(need.key, "the service is asked at TCP port %d, which is none of allowed_out_ports; add it, or take rims and ocsp_answers into the bundle", p)
		}
	}
	return c
}

// service443 stands for one of NVIDIA's services.
func service443(asked bool) string {
	if asked {
		return nvidiaRIMs
	}
	return ""
}

// portOf is the port of an address, 0 where there is none.
func portOf(address string) uint16 {
	u, err := url.Parse(address)
	if err != nil || address == "" {
		return 0
	}
	if u.Port() == "" {
		return 443
	}
	p, _ := strconv.ParseUint(u.Port(), 10, 16)
	return uint16(p)
}
