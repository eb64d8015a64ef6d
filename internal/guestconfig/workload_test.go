package guestconfig

import (
	"errors"
	"strings"
	"testing"
)

func TestValidateWorkload(t *testing.T) {
	c := valid()
	c.Workload.Restart = RestartOnFailure
	c.Workload.Profile = Profile{Name: "x", Remove: []string{"a/*/b"}, Writable: []string{"/opt/certs"}, Certs: "/opt/certs", StopFile: "a/stop", StopSeconds: 20}
	fmc := uint8(1)
	c.Peers = Peers{MinTCB: map[string]TCB{"Turin": {FMC: &fmc}}, Measurements: []string{strings.Repeat("ab", 48)}}
	c.API = API{Resources: []string{"site/keys/model"}, LoopbackPort: 8006, KDS: "https://kds.example"}
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(*Config){
		"workload.restart \"often\"":     func(c *Config) { c.Workload.Restart = "often" },
		"profile: remove: \"../x\"":      func(c *Config) { c.Workload.Profile.Remove = []string{"../x"} },
		"profile: remove: \"[\"":         func(c *Config) { c.Workload.Profile.Remove = []string{"["} },
		"profile: writable: \"opt\"":     func(c *Config) { c.Workload.Profile.Writable = []string{"opt"} },
		"profile: certs: \"/opt/certs\"": func(c *Config) { c.Workload.Profile.Certs = "/opt/certs" },
		"profile: stop_file: \"/x\"":     func(c *Config) { c.Workload.Profile.StopFile = "/x" },
		"profile: stop_seconds 0":        func(c *Config) { c.Workload.Profile.StopFile = "x" },
		"peers.min_tcb: \"Rome\"":        func(c *Config) { c.Peers.MinTCB = map[string]TCB{"Rome": {}} },
		"Genoa has no fmc":               func(c *Config) { c.Peers.MinTCB = map[string]TCB{"Genoa": {FMC: &fmc}} },
		"peers.measurements: \"ab\"":     func(c *Config) { c.Peers.Measurements = []string{"ab"} },
		"api.resources: \"a/b\"":         func(c *Config) { c.API.Resources = []string{"a/b"} },
		"gets no disk's key":             func(c *Config) { c.API.Resources = []string{"keys/root/cvm_other"} },
		"disk's key and no canary":       func(c *Config) { c.API.Resources = []string{c.KBS.CanaryPath} },
		"no key of /vault": func(c *Config) {
			c.GPU = &GPU{Mode: GPUTrustee, OCSP: "require", VaultKeyPath: "keys/vault/cvm_0123456789ab"}
			c.API.Resources = []string{"keys/vault/cvm_0123456789ab"}
		},
		"api.kds \"http://kds.example\"": func(c *Config) { c.API.KDS = "http://kds.example" },
	} {
		c := valid()
		change(c)
		if err := c.Validate(); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}
