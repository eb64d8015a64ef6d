package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"coffer/internal/guestconfig"
)

func TestProfileIsChosen(t *testing.T) {
	kit := t.TempDir()
	if err := os.MkdirAll(filepath.Join(kit, "startup"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(kit, "startup", "fed_client.json"), []byte(`{}`), 0o644); err != nil {
		t.Fatal(err)
	}
	const issuer = "cc_issuers:\n- id: snp\n  path: nvflare.app_opt.confidential_computing.snp_authorizer.SNPAuthorizer\n"
	for _, tc := range []struct{ name, text, want string }{
		{"plain", "", ""},
		{"by the issuer", issuer, "nvflare"},
		{"by the kit", "user_config:\n  site: " + kit + "\n", "nvflare"},
		{"another folder", "user_config:\n  site: " + t.TempDir() + "\n", ""},
		{"by name", "workload:\n  profile: nvflare\n", "nvflare"},
		{"none by name", issuer + "workload:\n  profile: none\n", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := Parse("c.yaml", []byte("docker_archive: /a.tar\n"+tc.text))
			if err != nil {
				t.Fatal(err)
			}
			if p := c.WorkloadProfile(); p.Name != tc.want {
				t.Errorf("profile %+v", p)
			}
		})
	}
}

// Every profile is one that a guest accepts.
func TestProfilesAreValid(t *testing.T) {
	for name, p := range profiles() {
		g := guestconfig.Config{Workload: guestconfig.Workload{Profile: p}}
		if err := g.Validate(); err == nil || strings.Contains(err.Error(), "profile") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestWorkloadKeys(t *testing.T) {
	c, err := Parse("c.yaml", []byte(`
docker_archive: /a.tar
allowed_out_ports: [443]
workload:
  restart: on-failure
  kbs_resources: [site/keys/model]
  api_port: 8006
peers:
  measurements: [ab]
  min_tcb:
    Turin: {fmc: 1, bootloader: 2, snp: 4, microcode: 71}
`))
	if err != nil {
		t.Fatal(err)
	}
	turin := c.Peers.MinTCB["Turin"]
	if c.Workload.Restart != "on-failure" || c.API.Resources[0] != "site/keys/model" || c.API.LoopbackPort != 8006 || c.API.KDS != amdKDS ||
		len(c.Peers.Measurements) != 1 || turin.FMC == nil || *turin.FMC != 1 || turin.Microcode != 71 {
		t.Errorf("%+v %+v %+v", c.Workload, c.API, c.Peers)
	}
	for _, bad := range []string{
		"workload:\n  kbs_resources: [keys/root/cvm_0123456789ab]\n", "workload:\n  kbs_resources: [a/b]\n", "workload:\n  restart: often\n",
		"workload:\n  profile: other\n", "peers:\n  min_tcb:\n    Rome: {}\n", "workload:\n  api_port: 70000\n",
	} {
		if _, err := Parse("c.yaml", []byte("docker_archive: /a.tar\n"+bad)); err == nil {
			t.Errorf("accepted: %s", bad)
		}
	}
	if c, err := Parse("c.yaml", []byte("docker_archive: /a.tar\n")); err != nil || c.API.KDS != "" || c.API.LoopbackPort != 0 {
		t.Errorf("defaults %+v, %v", c.API, err)
	}
}
