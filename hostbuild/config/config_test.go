package config

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"coffer/hostbuild/policy"
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
			if c.Role != tc.role || !slices.Equal(c.Network.AllowedPorts, tc.in) || !slices.Equal(c.Network.AllowedOutPorts, tc.out) {
				t.Errorf("role %q, ports %v, out %v", c.Role, c.Network.AllowedPorts, c.Network.AllowedOutPorts)
			}
			if c.RootDriveSize != 30*gb || c.ApplogDriveSize != gb {
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
		{"compression", "docker_archive: a\nroot_compression: xz\n", `root_compression: "xz" is not none or lz4 or zstd`},
		{"size", "docker_archive: a\nroot_drive_size: 0\n", `root_drive_size: "0" is not a whole number from 1`},
		{"size text", "docker_archive: a\napplog_drive_size: big\n", `applog_drive_size: "big" is not a whole number`},
		{"port", "docker_archive: a\nallowed_ports: [80, 70000]\n", `allowed_ports: "70000" is not a port`},
		{"action", "docker_archive: a\ncc_attestation: {failure_action: explode}\n", `failure_action: "explode" is not stop_job or shutdown or log or gpu_disable`},
		{"host", "docker_archive: a\nhost_entries: {a: nowhere}\n", `host_entries.a: "nowhere" is not an address`},
		{"folder name", "docker_archive: a\nuser_config: {../x: /tmp}\n", "is not a plain folder name"},
		{"not a mapping", "- a\n", "not a list of keys and values"},
		{"not YAML", "a: [\n", "not YAML"},
		{"port position", "docker_archive: a\nallowed_ports:\n  - 80\n  - 53/icmp\n", `c.yaml:4:5: allowed_ports: "53/icmp" is not a port`},
		{"vcpus", "docker_archive: a\nvcpus: [2, 256]\n", `c.yaml:2:12: vcpus: "256" is not a number from 1 to 255`},
		{"vcpus twice", "docker_archive: a\nvcpus: [2, 2]\n", `c.yaml:2:12: vcpus: "2" is not a number from 1 to 255, or stands twice`},
		{"cpu model", "docker_archive: a\ncpu_models: [EPYC-v4, EPYC-Genoaa]\n", `c.yaml:2:23: cpu_models: "EPYC-Genoaa" is no CPU model whose launch digest can be computed: did you mean EPYC-Genoa?`},
		{"memory", "docker_archive: a\nmemory_mib: 256\n", `memory_mib: "256" is not a whole number from 512`},
		{"memory of the workload", "docker_archive: a\nmemory_mib: 1024\nworkload: {memory_mib: 2048}\n", `c.yaml:2:13: memory_mib: the VM has 1024 MiB, and workload.memory_mib is 2048`},
		{"environment", "docker_archive: a\nworkload: {env: {A: \"x\\0y\"}}\n", `c.yaml:2:21: workload.env.A: "x\x00y" holds a zero byte`},
		{"argument", "docker_archive: a\nworkload: {args: [a, \"x\\0y\"]}\n", `c.yaml:2:22: workload.args: "x\x00y" holds a zero byte`},
		{"tcb", "docker_archive: a\nmin_tcb: {snp: 256}\n", `c.yaml:2:16: min_tcb.snp: "256" is not a whole number from 0 to 255`},
		{"tcb misspelt", "docker_archive: a\nmin_tcb: {microcod: 1}\n", `unknown key min_tcb.microcod: did you mean microcode?`},
		{"gateway missing", "docker_archive: a\nnetwork: {address: 192.0.2.7/24}\n", `network.gateway is missing`},
		{"gateway elsewhere", "docker_archive: a\nnetwork: {address: 192.0.2.7/24, gateway: 10.0.0.1}\n", `c.yaml:2:43: network.gateway: 10.0.0.1 is not in 192.0.2.0/24`},
		{"dns", "docker_archive: a\nnetwork: {address: 192.0.2.7/24, gateway: 192.0.2.1, dns: [x]}\n", `network.dns: "x" is not an address`},
		{"dns alone", "docker_archive: a\nnetwork: {dns: [192.0.2.1]}\n", `network.dns: works only with network.address`},
		{"host name", "docker_archive: a\nhosts_entries: {'a b': 10.0.0.1}\n", `hosts_entries.a b: is not a host's name`},
		{"merge key", "docker_archive: a\n<<: {role: server}\n", "c.yaml:2:1: merge keys are not read"},
		{"integrity", "docker_archive: a\nuser_config_integrity: strict\n", `c.yaml:2:24: user_config_integrity: "strict" is not pinned, off or {required: [files]}`},
		{"integrity without files", "docker_archive: a\nuser_config_integrity: {required: []}\n", `user_config_integrity.required: names no file`},
		{"integrity of no file", "docker_archive: a\nuser_config_integrity: {required: [nvflare/a, ../b]}\n", `c.yaml:2:47: user_config_integrity.required: "../b" is not a file's path below /user_config`},
		{"integrity misspelt", "docker_archive: a\nuser_config_integrity: {requird: [a]}\n", `unknown key user_config_integrity.requird: did you mean required?`},
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
	if !slices.Equal(c.CPUModels, []string{"EPYC-v4"}) || !slices.Equal(c.VCPUs, []int{2}) || c.Integrity != guestconfig.IntegrityPinned {
		t.Errorf("%v %v", c.CPUModels, c.VCPUs)
	}
}

func TestUserConfigIntegrity(t *testing.T) {
	for _, tc := range []struct {
		value, kind string
		files       []string
	}{
		{"", guestconfig.IntegrityPinned, nil},
		{"pinned", guestconfig.IntegrityPinned, nil},
		{"off", guestconfig.IntegrityOff, nil},
		{"false", guestconfig.IntegrityOff, nil}, // NVFlare's parser turns off into false
		{"{required: [nvflare/startup/sub_start.sh, /user_config/nvflare/local/x]}", guestconfig.IntegrityRequired, []string{"nvflare/startup/sub_start.sh", "nvflare/local/x"}},
	} {
		c, err := Parse("c.yaml", []byte("docker_archive: a\nuser_config_integrity: "+tc.value+"\n"))
		if err != nil || c.Integrity != tc.kind || !slices.Equal(c.Required, tc.files) {
			t.Errorf("%s: %v %+v", tc.value, err, c)
		}
	}
}

func TestOwnKeys(t *testing.T) {
	c, err := Parse("c.yaml", []byte("docker_archive: a\nvcpus: [4, 2]\ncpu_models: EPYC-Genoa\nmemory_mib: 4096\nmin_tcb: {bootloader: 10, snp: 23, microcode: 84}\n"+
		"network: {address: 192.0.2.7/24, gateway: 192.0.2.1, dns: [192.0.2.2]}\n"))
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(c.VCPUs, []int{4, 2}) || !slices.Equal(c.CPUModels, []string{"EPYC-Genoa"}) || c.MemoryMiB != 4096 || c.MinTCB != (policy.TCB{Bootloader: 10, SNP: 23, Microcode: 84}) {
		t.Errorf("%+v", c)
	}
	if s := c.Network.Static; s == nil || s.Address != "192.0.2.7/24" || s.Gateway != "192.0.2.1" || !slices.Equal(s.DNS, []string{"192.0.2.2"}) {
		t.Errorf("%+v", s)
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
