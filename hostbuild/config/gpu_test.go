package config

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"coffer/internal/guestconfig"
)

func TestGPU(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"rims", "ocsp"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	const out = "docker_archive: a\nallowed_out_ports: [443]\n"
	folders := "rims: " + dir + "/rims, ocsp_answers: " + dir + "/ocsp, ocsp: allow_cached"
	own := guestconfig.GPU{Mode: guestconfig.GPULocal, RIMService: "https://rim.attestation.nvidia.com", OCSP: "require"}
	offline := guestconfig.GPU{Mode: guestconfig.GPULocal, OCSP: "allow_cached", OCSPMaxAge: 86400}
	required := offline
	required.Mode, required.Count, required.Drivers = guestconfig.GPULocalTrustee, 8, []string{"570.124.06"}
	for _, tc := range []struct {
		name, doc string
		want      *GPU
		fault     string
	}{
		{"none", "docker_archive: a\n", nil, ""},
		{"NVFlare's word", out + "cc_gpu_mechanism: nvidia_cc\n", &GPU{GPU: own}, ""},
		{"another word", out + "cc_gpu_mechanism: nvidia\n", nil, `cc_gpu_mechanism: "nvidia" is not nvidia_cc`},
		{"the section alone", out + "gpu: {}\n", &GPU{GPU: own}, ""},
		{"by what the bundle carries", "docker_archive: a\ngpu: {" + folders + "}\n", &GPU{GPU: offline, RIMs: dir + "/rims", OCSPAnswers: dir + "/ocsp"}, ""},
		{"required", "docker_archive: a\ngpu: {required: true, count: 8, drivers: [570.124.06], resources: [site/data/one], " + folders + "}\n",
			&GPU{GPU: required, Required: true, Resources: []string{"site/data/one"}, RIMs: dir + "/rims", OCSPAnswers: dir + "/ocsp"}, ""},
		{"NRAS", out + "gpu: {mode: nras, ocsp: off}\n", &GPU{GPU: guestconfig.GPU{Mode: guestconfig.GPUNRAS, OCSP: "off"}}, ""},
		{"NRAS elsewhere", "docker_archive: a\nallowed_out_ports: [8443]\ngpu: {mode: nras, ocsp: off, nras_url: 'https://nras.example:8443'}\n",
			&GPU{GPU: guestconfig.GPU{Mode: guestconfig.GPUNRAS, OCSP: "off", NRASURL: "https://nras.example:8443"}}, ""},
		{"no way to NRAS", "docker_archive: a\ngpu: {mode: nras, ocsp: off}\n", nil, "gpu.mode: the service is asked at TCP port 443"},
		{"no way to NRAS elsewhere", out + "gpu: {mode: nras, ocsp: off, nras_url: 'https://nras.example:8443'}\n", nil, "gpu.nras_url: the service is asked at TCP port 8443"},
		{"NRAS by http", out + "gpu: {mode: nras, ocsp: off, nras_url: 'http://nras.example'}\n", nil, `gpu.nras_url: "http://nras.example" is not https://host`},
		{"NRAS that is not asked", out + "gpu: {nras_url: 'https://nras.example'}\n", nil, "gpu.nras_url: is asked only in the modes"},
		{"RIM service by http", out + "gpu: {rim_service: 'http://rim.example'}\n", nil, "gpu.rim_service: "},
		{"required without the KBS", out + "gpu: {required: true, mode: local}\n", nil, "gpu.mode: local: with required the KBS must judge the GPUs too"},
		{"resources without required", out + "gpu: {resources: [a/b/c]}\n", nil, "gpu.resources: are for verified GPUs alone only with required: true"},
		{"another CVM's key", out + "gpu: {required: true, resources: [keys/root/x]}\n", nil, "in the repository keys"},
		{"no way to NVIDIA", "docker_archive: a\ngpu: {}\n", nil, "gpu.rim_service: the service is asked at TCP port 443"},
		{"no way to the responder", "docker_archive: a\ngpu: {rims: " + dir + "/rims}\n", nil, "gpu.ocsp: the service"},
		{"answers that are not used", out + "gpu: {ocsp_answers: " + dir + "/ocsp}\n", nil, "gpu.ocsp_answers: are used only with ocsp: allow_cached"},
		{"mode", out + "gpu: {mode: remote}\n", nil, `gpu.mode: "remote" is not local or nras`},
		{"count", out + "gpu: {count: 17}\n", nil, "gpu.count"},
		{"misspelt", out + "gpu: {requird: true}\n", nil, "did you mean required?"},
		{"the vault's key for the workload", "docker_archive: a\nworkload: {kbs_resources: [keys/vault/x]}\n", nil, "what a CVM's disk is opened by"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := Parse("c.yaml", []byte(tc.doc))
			if tc.fault != "" {
				if err == nil || !strings.Contains(err.Error(), tc.fault) {
					t.Errorf("%v, want %q", err, tc.fault)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(c.GPU, tc.want) {
				t.Errorf("%+v, want %+v", c.GPU, tc.want)
			}
		})
	}
}
