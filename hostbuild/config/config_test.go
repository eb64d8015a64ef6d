package config

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"coffer/hostbuild/yamlcheck"
	"coffer/internal/guestconfig"
)

// The files under testdata are the deployment guide's, as printed, and what
// NVFlare 2.9.0 makes of them, with placeholders for the paths.
func TestReadsWhatNVFlareSends(t *testing.T) {
	for _, tc := range []struct {
		file   string
		role   string
		in     []guestconfig.Port
		out    []guestconfig.Port
		hosts  map[string]string
		config string
	}{
		{"guide-server1.yml", "server", tcp(8002), tcp(443, 8002, 8999), nil, "/tmp/startup_kits"},
		{"guide-site-1.yml", "client", nil, nil, map[string]string{"server1": "10.176.200.152"}, "/tmp/startup_kits"},
		{"nvflare-2.9.0.server1.yaml", "server", tcp(8002), tcp(443, 8002, 8999), nil, "/ws/example_project/prod_00/server1"},
		{"nvflare-2.9.0.site-1.yaml", "client", nil, nil, map[string]string{"server1": "10.176.200.152"}, "/ws/example_project/prod_00/site-1"},
	} {
		t.Run(tc.file, func(t *testing.T) {
			t.Setenv("HOME", "/home/admin")
			c, err := Read(filepath.Join("testdata", tc.file))
			if err != nil {
				t.Fatal(err)
			}
			if len(c.Warnings) != 0 {
				t.Errorf("warnings: %q", c.Warnings)
			}
			if c.Role != tc.role || !slices.Equal(c.Network.AllowedPorts, tc.in) && len(tc.in) > 0 || !slices.Equal(c.Network.AllowedOutPorts, tc.out) && len(tc.out) > 0 {
				t.Errorf("role %q, ports %v, out %v", c.Role, c.Network.AllowedPorts, c.Network.AllowedOutPorts)
			}
			if c.RootDriveSize != 30*GB || c.ApplogDriveSize != GB {
				t.Errorf("sizes %d %d", c.RootDriveSize, c.ApplogDriveSize)
			}
			if want := "/home/admin/NVFlare/examples/advanced/cc_provision/docker/nvflare-site.tar.gz"; c.DockerArchive != want {
				t.Errorf("docker_archive %q, want %q", c.DockerArchive, want)
			}
			if c.UserConfig["nvflare"] != tc.config {
				t.Errorf("user_config %v", c.UserConfig)
			}
			for k, v := range tc.hosts {
				if c.Network.Hosts[k] != v {
					t.Errorf("hosts %v", c.Network.Hosts)
				}
			}
			a := c.Attestation
			if a.CheckFrequency != 120 || a.FailureAction != guestconfig.ActionStopJob || a.MaxStaleness != 360 {
				t.Errorf("attestation %+v", a)
			}
			if len(c.Issuers) != 1 || c.Issuers[0].ID != "snp_authorizer" {
				t.Errorf("issuers %v", c.Issuers)
			}
		})
	}
}

func tcp(ports ...uint16) []guestconfig.Port {
	var ps []guestconfig.Port
	for _, p := range ports {
		ps = append(ps, guestconfig.Port{Port: p, Proto: "tcp"})
	}
	return ps
}

func TestFaults(t *testing.T) {
	for _, tc := range []struct{ name, doc, want string }{
		{"missing archive", "role: server\n", "c.yaml:1:1: docker_archive is missing"},
		{"misspelt key", "docker_archive: a.tgz\ndocker_archiv: b\n", "c.yaml:2:1: unknown key docker_archiv: did you mean docker_archive?"},
		{"misspelt nested key", "docker_archive: a\ncc_attestation:\n  check_frequncy: 5\n", "c.yaml:3:3: unknown key cc_attestation.check_frequncy: did you mean check_frequency?"},
		{"duplicate", "docker_archive: a\ndocker_archive: b\n", "key docker_archive stands twice"},
		{"CC switched off", "docker_archive: a\ncompute_env: onprem-cvm\n", `c.yaml:2:14: compute_env: "onprem-cvm" switches confidential computing off`},
		{"include", "docker_archive: a\ninclude: x.yml\n", "include: NVFlare resolves include: only for itself"},
		{"gpu", "docker_archive: a\ncc_gpu_mechanism: nvidia_cc\n", "attests no GPU"},
		{"size", "docker_archive: a\nroot_drive_size: 0\n", `root_drive_size: "0" is not a whole number from 1`},
		{"size text", "docker_archive: a\napplog_drive_size: big\n", `applog_drive_size: "big" is not a whole number`},
		{"port", "docker_archive: a\nallowed_ports: [80, 70000]\n", `allowed_ports: "70000" is not a port`},
		{"action", "docker_archive: a\ncc_attestation: {failure_action: explode}\n", `failure_action: "explode" is not stop_job or shutdown or log`},
		{"host", "docker_archive: a\nhost_entries: {a: nowhere}\n", `host_entries.a: "nowhere" is not an address`},
		{"folder name", "docker_archive: a\nuser_config: {../x: /tmp}\n", "is not a plain folder name"},
		{"not a mapping", "- a\n", "not a list of keys and values"},
		{"not YAML", "a: [\n", "not YAML"},
		{"staleness", "docker_archive: a\ncc_attestation: {check_frequency: 60, max_staleness: 30}\n", "max_staleness: 30 is less than check_frequency 60"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := Parse("c.yaml", []byte(tc.doc))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want %q", err, tc.want)
			}
		})
	}
}

func TestAllFaultsAtOnce(t *testing.T) {
	_, err := Parse("c.yaml", []byte("role: boss\nroot_drive_size: x\nallowed_ports: [0]\n"))
	if n := strings.Count(err.Error(), "\n") + 1; n != 4 {
		t.Errorf("%d faults, want 4: %v", n, err)
	}
	var f *yamlcheck.Fault
	if !errors.As(err, &f) {
		t.Error("no *Fault among them")
	}
}

func TestUnknownKeyIsAWarning(t *testing.T) {
	c, err := Parse("c.yaml", []byte("docker_archive: a\nsomething_from_the_future: 1\n"))
	if err != nil || len(c.Warnings) != 1 || !strings.Contains(c.Warnings[0], "c.yaml:2:1: unknown key something_from_the_future") {
		t.Errorf("%v %v", c, err)
	}
}

func TestDefaultsAreStrict(t *testing.T) {
	wd, _ := os.Getwd()
	c, err := Parse("c.yaml", []byte("docker_archive: app.tar.gz\n"))
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Network.AllowedPorts)+len(c.Network.AllowedOutPorts) != 0 || c.Attestation.FailureAction != guestconfig.ActionStopJob || c.Attestation.RestartOnRecovery {
		t.Errorf("%+v", c)
	}
	if c.DockerArchive != filepath.Join(wd, "app.tar.gz") {
		t.Errorf("a relative path counts from the working directory, got %q", c.DockerArchive)
	}
	if !slices.Equal(c.CPUModels, []string{"EPYC-v4"}) || !slices.Equal(c.VCPUs, []int{2}) {
		t.Errorf("%v %v", c.CPUModels, c.VCPUs)
	}
}

func FuzzParse(f *testing.F) {
	for _, name := range []string{"guide-server1.yml", "nvflare-2.9.0.site-1.yaml"} {
		b, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte("a: &a [*a]\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := Parse("f", b); err == nil && c.DockerArchive == "" {
			t.Error("accepted without docker_archive")
		}
	})
}
