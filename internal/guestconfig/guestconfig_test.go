package guestconfig

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"coffer/internal/treedigest"
)

func valid() *Config {
	return &Config{
		Version: Version, CVMID: "cvm_0123456789ab", Platform: PlatformSNP, TEE: "snp", BuildTime: 1700000000,
		KBS: KBS{URL: "https://kbs.example:8999", CA: "-----BEGIN CERTIFICATE-----\n", KeyPath: "keys/root/cvm_0123456789ab", CanaryPath: "keys/canary/cvm_0123456789ab"},
		Disk: Disk{
			Serial: "crypt_root", HeaderSHA256: strings.Repeat("a", 64), DataOffset: 1 << 20, PayloadSize: 1 << 30,
			Verity:  Verity{RootHash: strings.Repeat("b", 64), Salt: strings.Repeat("c", 64), DataBlocks: 1000, HashStartBlock: 1001},
			Scratch: Scratch{Offset: 2000 * 4096, Size: 4096 * 100},
		},
		Network: Network{
			AllowedPorts: []Port{{8002, "tcp"}}, AllowedOutPorts: []Port{{53, "udp"}}, Hosts: map[string]string{"server1": "10.0.0.1"},
			Static: &Static{Address: "192.0.2.7/24", Gateway: "192.0.2.1", DNS: []string{"192.0.2.1"}},
		},
		Attestation: Attestation{CheckFrequency: 120, MaxStaleness: 360, FailureAction: ActionStopJob},
		Workload:    Workload{ImageName: "a", ImageDigest: "sha256:" + strings.Repeat("d", 64), Env: []string{"A=b"}, PidsMax: 1, TmpMiB: 1},
		UserConfig: UserConfig{Integrity: IntegrityPinned, Files: treedigest.Tree{
			{Path: "nvflare", Mode: 0o755}, {Path: "nvflare/a", Mode: 0o600, Size: 1, SHA256: strings.Repeat("e", 64)}, {Path: "nvflare/b", Link: "a"}}},
	}
}

func TestRoundTrip(t *testing.T) {
	a, err := valid().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	c, err := Parse(a)
	if err != nil {
		t.Fatal(err)
	}
	b, err := c.Marshal()
	if err != nil || !bytes.Equal(a, b) {
		t.Errorf("%v\n%s\n%s", err, a, b)
	}
}

func TestValidate(t *testing.T) {
	for want, change := range map[string]func(*Config){
		"version is 2":            func(c *Config) { c.Version = 2 },
		"cvm_id":                  func(c *Config) { c.CVMID = "cvm_0123456789AB" },
		"platform":                func(c *Config) { c.Platform = "none" },
		"tee \"sample\" on":       func(c *Config) { c.TEE = "sample" }, // sample evidence proves nothing
		"build_time":              func(c *Config) { c.BuildTime = 0 },
		"kbs.url":                 func(c *Config) { c.KBS.URL = "http://kbs.example" },
		"kbs.ca":                  func(c *Config) { c.KBS.CA = "" },
		"kbs.key_path":            func(c *Config) { c.KBS.KeyPath = "keys/../root" },
		"is the key's own path":   func(c *Config) { c.KBS.CanaryPath = c.KBS.KeyPath },
		"disk.header_sha256":      func(c *Config) { c.Disk.HeaderSHA256 = strings.Repeat("A", 64) },
		"disk.data_offset":        func(c *Config) { c.Disk.DataOffset = 4096 },
		"disk.payload_size":       func(c *Config) { c.Disk.PayloadSize = 1<<30 + 1 },
		"disk.verity.root_hash":   func(c *Config) { c.Disk.Verity.RootHash = "b" },
		"disk.verity.salt":        func(c *Config) { c.Disk.Verity.Salt = "" },
		"disk.verity.data_blocks": func(c *Config) { c.Disk.Verity.DataBlocks = 1 << 40 },
		"verity.hash_start_block": func(c *Config) { c.Disk.Verity.HashStartBlock = 1000 },
		"disk.scratch.offset":     func(c *Config) { c.Disk.Scratch.Offset = 4096 },
		"disk.scratch.size":       func(c *Config) { c.Disk.Scratch.Size = 1 << 40 },
		"static.address":          func(c *Config) { c.Network.Static.Address = "192.0.2.7" },
		"static.gateway":          func(c *Config) { c.Network.Static.Gateway = "router" },
		"static.dns":              func(c *Config) { c.Network.Static.DNS = []string{"x"} },
		"port 0/tcp":              func(c *Config) { c.Network.AllowedPorts[0].Port = 0 },
		"port 53/icmp":            func(c *Config) { c.Network.AllowedOutPorts[0].Proto = "icmp" },
		"is not a host name":      func(c *Config) { c.Network.Hosts = map[string]string{"a b": "10.0.0.1"} },
		"is not an address":       func(c *Config) { c.Network.Hosts = map[string]string{"a": "1.2.3"} },
		"check_frequency 0":       func(c *Config) { c.Attestation.CheckFrequency = 0 },
		"max_staleness 60":        func(c *Config) { c.Attestation.MaxStaleness = 60 },
		"failure_action":          func(c *Config) { c.Attestation.FailureAction = "" },
		"workload.image_name":     func(c *Config) { c.Workload.ImageName = "" },
		"workload.image_digest":   func(c *Config) { c.Workload.ImageDigest = "latest" },
		"workload.env \"=x\"":     func(c *Config) { c.Workload.Env = []string{"=x"} },
		"integrity \"\"":          func(c *Config) { c.UserConfig.Integrity = "" },
		"integrity is off":        func(c *Config) { c.UserConfig.Integrity = IntegrityOff },
		"files is empty":          func(c *Config) { c.UserConfig = UserConfig{Integrity: IntegrityRequired} },
		"files: path \"../a\"":    func(c *Config) { c.UserConfig.Files[0].Path = "../a" },
		"cpu_percent, pids_max":   func(c *Config) { c.Workload.PidsMax = 0 },
		"memory_mib, cpu_percent": func(c *Config) { c.Workload.CPUPercent = MaxCPUPercent + 1 },
	} {
		c := valid()
		change(c)
		if _, err := c.Marshal(); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q, got %v", want, err)
		}
	}
}

func TestValidHostName(t *testing.T) {
	for name, want := range map[string]bool{
		"kbs.example": true, "a": true, "": false, ".a": false, "-a": false, "a b": false, "ä": false, "a\n": false,
		strings.Repeat("a", 253): true, strings.Repeat("a", 254): false,
	} {
		if got := ValidHostName(name); got != want {
			t.Errorf("%q: %t", name, got)
		}
	}
}

func TestParseIsStrict(t *testing.T) {
	doc, err := valid().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	text := string(doc)
	for name, tc := range map[string]struct{ doc, want string }{
		"unknown field":      {strings.Replace(text, `"tee"`, `"tea": 1, "tee"`, 1), `unknown field "tea"`},
		"duplicate":          {strings.Replace(text, `"tee"`, `"tee": "snp", "tee"`, 1), "stands twice"},
		"duplicate, by case": {strings.Replace(text, `"tee"`, `"TEE": "sample", "tee"`, 1), "stands twice"},
		"duplicate, nested":  {strings.Replace(text, `"key_path"`, `"key_path": "a/b/c", "key_path"`, 1), "stands twice"},
		"trailing data":      {text + "{}", "data after the document"},
		"truncated":          {text[:len(text)/2], "EOF"},
		"empty":              {"", "EOF"},
		"wrong type":         {strings.Replace(text, `"version": 1`, `"version": "1"`, 1), "cannot unmarshal"},
		"too large":          {text + strings.Repeat(" ", 2*MaxSize), "bytes, more than"},
		"too deep":           {strings.Replace(text, `"serial": "crypt_root"`, `"serial": `+strings.Repeat("[", 100)+strings.Repeat("]", 100), 1), "nested too deeply"},
	} {
		if _, err := Parse([]byte(tc.doc)); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: want %q, got %v", name, tc.want, err)
		}
	}
}

func TestHandover(t *testing.T) {
	doc, err := valid().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(Handover{Config: doc, ScratchDevice: "/dev/dm-2", DNS: []string{"10.0.2.3"}})
	if err != nil {
		t.Fatal(err)
	}
	h, err := ParseHandover(b)
	if err != nil {
		t.Fatal(err)
	}
	if c, err := Parse(h.Config); err != nil || c.CVMID != valid().CVMID {
		t.Errorf("%v %v", c, err)
	}
	if _, err := ParseHandover(bytes.Replace(b, []byte(`"interface"`), []byte(`"scratch_device":"/dev/vda","interface"`), 1)); !errors.Is(err, ErrInvalid) {
		t.Errorf("a duplicate in the handover: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	doc, err := valid().Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(doc)
	f.Add([]byte(`{"version":1,"Version":1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := Parse(b)
		if err != nil {
			return
		}
		again, err := c.Marshal()
		if err != nil {
			t.Fatalf("accepted, but cannot be written: %v", err)
		}
		if _, err := Parse(again); err != nil {
			t.Fatalf("what was accepted is refused when written again: %v", err)
		}
	})
}
