// Package config reads CONFIG.yaml, the description of one CVM: the keys of
// NVIDIA FLARE's deployment guide, which NVFlare's OnPremPackager passes on, and
// a few of Coffer's own. docs/reference.md lists them all.
//
// Read returns all faults at once, each with line and column. It looks at the
// document only, never at the files that the document names.
package config

import (
	"net/netip"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"coffer/hostbuild/policy"
	"coffer/hostbuild/yamlcheck"
	"coffer/internal/guestconfig"
	"coffer/internal/measure"
)

// gb is the unit of the drive sizes.
const gb = 1 << 30

// Config is one CVM as its owner describes it.
type Config struct {
	Role          string
	DockerArchive string // absolute
	DockerImage   string // which image of the archive, "" for the only one

	RootCompression string // of the image's layers: "lz4", "zstd", "" for none

	RootDriveSize, ApplogDriveSize, UserConfigDriveSize, UserDataDriveSize int64 // bytes

	UserConfig map[string]string // name below /user_config to absolute host path
	Integrity  string            // of the drive user_config, as guestconfig names it
	Required   []string          // files below /user_config, with guestconfig.IntegrityRequired

	Network     guestconfig.Network
	Attestation guestconfig.Attestation
	Workload    guestconfig.Workload // without image and profile
	Profile     string               // name of a workload profile, "" to choose by what the CVM runs
	Peers       guestconfig.Peers
	ACPITables  []string // signatures that the host may give besides q35's own
	API         guestconfig.API
	GPU         *GPU   // nil: no GPUs
	VCEKs       string // folder of chips' certificates that go into the bundle, absolute; "": none

	Issuers []Issuer

	VCPUs     []int    // allowed numbers of vCPUs, the first is the default
	CPUModels []string // allowed QEMU CPU models, the first is the default
	MemoryMiB int64
	MinTCB    policy.TCB // the oldest firmware that gets the key

	Warnings []string
}

// Issuer is an entry of cc_issuers. Only NVFlare acts on it.
type Issuer struct{ ID, Path string }

var userConfigName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$`)

// Read reads the file at path.
func Read(path string) (*Config, error) {
	doc, m, err := yamlcheck.Read(path)
	if err != nil {
		return nil, err
	}
	return build(doc, m)
}

// Parse reads data; file names it in messages.
func Parse(file string, data []byte) (*Config, error) {
	doc, m, err := yamlcheck.Parse(file, data)
	if err != nil {
		return nil, err
	}
	return build(doc, m)
}

// everything holds what further keys are asked for beside, in, or in each of.
const everything = `
user_config: {any: /}
user_config_integrity: {required: [any]}
hosts_entries: {any: ""}
host_entries: {any: ""}
network: {address: "", gateway: any}
workload: {env: {any: ""}}
peers: {min_tcb: {Turin: {fmc: 0}}}
cc_issuers: [{id: any}]
`

// Keys lists all keys of a CONFIG.yaml.
func Keys() []*yamlcheck.Key {
	doc, m, err := yamlcheck.Parse("", []byte(everything))
	if err != nil {
		panic(err) // of a constant
	}
	_, _ = build(doc, m) // what is wrong with the values does not matter
	return doc.Asked()
}

func build(doc *yamlcheck.Doc, m *yamlcheck.Map) (*Config, error) {
	c := &Config{UserConfig: map[string]string{}}

	if m.Has("include") {
		m.Faultf("include", "NVFlare resolves include: only for itself and hands it over unresolved; write the keys into this file")
		return c, doc.Err() // other faults may be for what is missing here
	}
	if v := m.String("compute_env", "onprem_cvm"); v != "onprem_cvm" {
		m.Faultf("compute_env", "%q switches confidential computing off at NVFlare; only onprem_cvm is a CVM", v)
	}
	m.OneOf("cc_cpu_mechanism", "amd_sev_snp", "amd_sev_snp")
	c.Role = m.OneOf("role", "", "server", "client")

	m.Required("docker_archive", "the image, saved by `docker save NAME | gzip > app.tar.gz`")
	c.DockerArchive = m.Path("docker_archive")
	c.DockerImage = m.String("docker_image", "")

	if c.RootCompression = m.OneOf("root_compression", "none", "none", "lz4", "zstd"); c.RootCompression == "none" {
		c.RootCompression = ""
	}
	c.RootDriveSize = m.Int("root_drive_size", 10, 1, 65536) * gb
	c.ApplogDriveSize = m.Int("applog_drive_size", 1, 1, 65536) * gb
	c.UserConfigDriveSize = m.Int("user_config_drive_size", 1, 1, 65536) * gb
	c.UserDataDriveSize = m.Int("user_data_drive_size", 1, 1, 65536) * gb

	uc := m.Map("user_config")
	for _, name := range uc.Keys() {
		if !userConfigName.MatchString(name) || name == "lost+found" {
			uc.Faultf(name, "is not a plain folder name")
			continue
		}
		c.UserConfig[name] = uc.Path(name)
	}
	c.Integrity, c.Required = integrity(m)

	c.Network = network(m)
	c.Attestation = attestation(m)
	c.GPU = gpu(m, c.Network)
	if c.Attestation.FailureAction == guestconfig.ActionGPUDisable && c.GPU == nil {
		m.Faultf("cc_attestation", "failure_action gpu_disable needs GPUs: cc_gpu_mechanism, or the section gpu")
	}
	workload(c, m.Map("workload"))
	c.Peers = peers(m.Map("peers"))
	c.ACPITables = m.Strings("acpi_tables")
	for i, t := range c.ACPITables {
		if !guestconfig.ValidACPITable(t) {
			m.FaultItemf("acpi_tables", i, "%q is not the signature of an ACPI table, four capital letters such as SSDT", t)
		}
	}
	c.VCEKs = m.Path("vceks")
	c.API.KDS = m.String("kds_url", "")
	if !m.Has("kds_url") && slices.Contains(c.Network.AllowedOutPorts, guestconfig.Port{Port: 443, Proto: "tcp"}) {
		c.API.KDS = amdKDS
	}

	for _, im := range m.Maps("cc_issuers") {
		is := Issuer{ID: im.Required("id", "the issuer's id"), Path: im.Required("path", "the issuer's Python class")}
		im.Int("token_expiration", 0, 1, 1<<31)
		im.Map("args").Keys()
		im.Finish()
		c.Issuers = append(c.Issuers, is)
	}
	m.Strings("class_allow_list") // read by NVFlare alone

	machine(m, c)

	m.Finish()
	c.Warnings = doc.Warnings()
	return c, doc.Err()
}

// integrity reads user_config_integrity: pinned, off, or {required: [files]}.
func integrity(m *yamlcheck.Map) (kind string, files []string) {
	const key = "user_config_integrity"
	if m.IsMap(key) {
		r := m.Map(key)
		defer r.Finish()
		files = r.Strings("required")
		if len(files) == 0 {
			r.Faultf("required", "names no file")
		}
		for i, f := range files {
			files[i] = strings.TrimPrefix(f, "/user_config/")
			if !filepath.IsLocal(files[i]) || path.Clean(files[i]) != files[i] {
				r.FaultItemf("required", i, "%q is not a file's path below /user_config, such as nvflare/startup/sub_start.sh", f)
			}
		}
		return guestconfig.IntegrityRequired, files
	}
	switch s := m.String(key, guestconfig.IntegrityPinned); s {
	case guestconfig.IntegrityPinned:
	case "off", "false": // what NVFlare's YAML makes of a bare off
		return guestconfig.IntegrityOff, nil
	default:
		m.Faultf(key, "%q is not pinned, off or {required: [files]}", s)
	}
	return guestconfig.IntegrityPinned, nil
}

// machine reads what the VM is made of.
func machine(m *yamlcheck.Map, c *Config) {
	c.CPUModels = m.Strings("cpu_models")
	for i, model := range c.CPUModels {
		if known := measure.CPUModels(); !slices.Contains(known, model) {
			m.FaultItemf("cpu_models", i, "%q is no CPU model whose launch digest can be computed%s; known are %s", model, suggestion(model, known), strings.Join(known, ", "))
		}
		if slices.Contains(c.CPUModels[:i], model) {
			m.FaultItemf("cpu_models", i, "%q stands twice", model)
		}
	}
	if len(c.CPUModels) == 0 {
		c.CPUModels = []string{"EPYC-v4"}
	}
	for i, s := range m.Strings("vcpus") {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 || n > 255 || slices.Contains(c.VCPUs, n) {
			m.FaultItemf("vcpus", i, "%q is not a number from 1 to 255, or stands twice", s)
			continue
		}
		c.VCPUs = append(c.VCPUs, n)
	}
	if len(c.VCPUs) == 0 {
		c.VCPUs = []int{2}
	}
	c.MemoryMiB = m.Int("memory_mib", 2048, 512, 16<<20)
	if w := c.Workload.MemoryMiB; w > c.MemoryMiB {
		m.Faultf("memory_mib", "the VM has %d MiB, and workload.memory_mib is %d", c.MemoryMiB, w)
	}
	tcb := m.Map("min_tcb")
	for _, part := range []struct {
		key  string
		into *uint8
	}{{"bootloader", &c.MinTCB.Bootloader}, {"tee", &c.MinTCB.TEE}, {"snp", &c.MinTCB.SNP}, {"microcode", &c.MinTCB.Microcode}} {
		*part.into = uint8(tcb.Int(part.key, 0, 0, 255))
	}
	tcb.Finish()
}

func suggestion(word string, known []string) string {
	if s := yamlcheck.Nearest(word, known); s != "" {
		return ": did you mean " + s + "?"
	}
	return ""
}

func network(m *yamlcheck.Map) guestconfig.Network {
	n := guestconfig.Network{
		AllowedPorts:    ports(m, "allowed_ports"),
		AllowedOutPorts: ports(m, "allowed_out_ports"),
		Hosts:           map[string]string{},
	}
	for _, key := range []string{"hosts_entries", "host_entries"} { // the guide has both
		h := m.Map(key)
		for _, name := range h.Keys() {
			if !guestconfig.ValidHostName(name) {
				h.Faultf(name, "is not a host's name")
			}
			n.Hosts[name] = address(h, name)
		}
	}
	s := m.Map("network")
	defer s.Finish()
	if !s.Has("address") {
		for _, key := range []string{"gateway", "dns"} {
			if s.Has(key) {
				s.Faultf(key, "works only with network.address; without it the guest asks DHCP")
			}
		}
		return n
	}
	n.Static = &guestconfig.Static{Address: s.String("address", ""), DNS: s.Strings("dns")}
	prefix, err := netip.ParsePrefix(n.Static.Address)
	if err != nil {
		s.Faultf("address", "%q is not address/bits, such as 192.0.2.7/24", n.Static.Address)
	}
	if s.Required("gateway", "the router's address") != "" {
		n.Static.Gateway = address(s, "gateway")
		if gw, gerr := netip.ParseAddr(n.Static.Gateway); err == nil && gerr == nil && !prefix.Contains(gw) {
			s.Faultf("gateway", "%s is not in %s", gw, prefix.Masked())
		}
	}
	for i, a := range n.Static.DNS {
		if _, err := netip.ParseAddr(a); err != nil {
			s.FaultItemf("dns", i, "%q is not an address", a)
		}
	}
	return n
}

// address reads an IP address.
func address(m *yamlcheck.Map, key string) string {
	s := m.String(key, "")
	if _, err := netip.ParseAddr(s); err != nil {
		m.Faultf(key, "%q is not an address", s)
	}
	return s
}

func ports(m *yamlcheck.Map, key string) []guestconfig.Port {
	out := []guestconfig.Port{}
	for i, s := range m.Strings(key) {
		num, proto, ok := strings.Cut(s, "/")
		if !ok {
			proto = "tcp"
		}
		n, err := strconv.ParseUint(num, 10, 16)
		p := guestconfig.Port{Port: uint16(n), Proto: proto}
		if err != nil || n == 0 || (proto != "tcp" && proto != "udp") {
			m.FaultItemf(key, i, "%q is not a port such as 8002 or 53/udp", s)
			continue
		}
		if !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	return out
}

func attestation(m *yamlcheck.Map) guestconfig.Attestation {
	a := m.Map("cc_attestation")
	defer a.Finish()
	freq := a.Int("check_frequency", 600, 1, 86400)
	stale := a.Int("max_staleness", min(3*freq, 7*86400), 1, 7*86400)
	if stale < freq {
		a.Faultf("max_staleness", "%d is less than check_frequency %d", stale, freq)
	}
	return guestconfig.Attestation{
		CheckFrequency:    int(freq),
		MaxStaleness:      int(stale),
		FailureAction:     a.OneOf("failure_action", guestconfig.ActionStopJob, guestconfig.ActionStopJob, guestconfig.ActionShutdown, guestconfig.ActionLog, guestconfig.ActionGPUDisable),
		RestartOnRecovery: a.Bool("restart_on_recovery", false),
	}
}

// amdKDS is where AMD gives out the certificates of chips.
const amdKDS = "https://kdsintf.amd.com"

func workload(c *Config, m *yamlcheck.Map) {
	defer m.Finish()
	w := guestconfig.Workload{
		Restart:    m.OneOf("restart", guestconfig.RestartNever, guestconfig.RestartNever, guestconfig.RestartOnFailure, guestconfig.RestartAlways),
		Args:       m.Strings("args"),
		MemoryMiB:  m.Int("memory_mib", 0, 0, 16<<20),
		CPUPercent: m.Int("cpu_percent", 0, 0, guestconfig.MaxCPUPercent),
		PidsMax:    m.Int("pids_max", 4096, 16, 1<<22),
		TmpMiB:     m.Int("tmp_mib", 256, 1, 1<<20),
	}
	env := m.Map("env")
	for _, k := range env.Keys() {
		v := env.String(k, "")
		if k == "" || strings.ContainsAny(k, "=\x00") {
			env.Faultf(k, "is not a variable's name")
		} else if strings.Contains(v, "\x00") {
			env.Faultf(k, "%q holds a zero byte", v)
		}
		w.Env = append(w.Env, k+"="+v)
	}
	for i, a := range w.Args {
		if strings.Contains(a, "\x00") {
			m.FaultItemf("args", i, "%q holds a zero byte", a)
		}
	}
	c.Workload = w
	c.Profile = m.OneOf("profile", "", ProfileNames()...)
	c.API.Resources = m.Strings("kbs_resources")
	for _, r := range c.API.Resources {
		if !guestconfig.ValidResourcePath(r) || strings.HasPrefix(r, "keys/root/") || strings.HasPrefix(r, "keys/canary/") || strings.HasPrefix(r, "keys/vault/") {
			m.Faultf("kbs_resources", "%q is not repository/type/tag, or is what a CVM's disk is opened by", r)
		}
	}
	c.API.LoopbackPort = uint16(m.Int("api_port", 0, 0, 65535))
}

// peers is what the workload's snpguest accepts of other CVMs.
func peers(m *yamlcheck.Map) guestconfig.Peers {
	defer m.Finish()
	p := guestconfig.Peers{Measurements: m.Strings("measurements"), AllowVLEK: m.Bool("allow_vlek", false)}
	min := m.Map("min_tcb")
	for _, product := range min.Keys() {
		t := min.Map(product)
		part := func(name string) uint8 { return uint8(t.Int(name, 0, 0, 255)) }
		tcb := guestconfig.TCB{Bootloader: part("bootloader"), TEE: part("tee"), SNP: part("snp"), Microcode: part("microcode")}
		if t.Has("fmc") {
			fmc := part("fmc")
			tcb.FMC = &fmc
		}
		t.Finish()
		if product != "Milan" && product != "Genoa" && product != "Turin" {
			min.Faultf(product, "is not Milan, Genoa or Turin")
		}
		if p.MinTCB == nil {
			p.MinTCB = map[string]guestconfig.TCB{}
		}
		p.MinTCB[product] = tcb
	}
	return p
}
