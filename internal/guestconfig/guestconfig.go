// Package guestconfig is the one document that tells a guest what it is: which
// KBS to ask, which disk to trust, what to run and what to do when attestation
// fails. The builder writes it into the initrd, so the SNP launch digest covers
// every byte of it; init and agent trust nothing else.
//
// The form is JSON, versioned and strict: an unknown field, a duplicate field,
// trailing data or a value out of range is refused. It holds no secret.
package guestconfig

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"coffer/internal/strict"
	"coffer/internal/treedigest"
)

// Version is the version of the document that this package reads and writes.
const Version = 1

// MaxSize bounds the document in bytes.
const MaxSize = 1 << 20

// Places that builder, init and agent agree on.
const (
	// InitrdPath is where the document lies in the initrd.
	InitrdPath = "etc/coffer/guest.json"
	// ProgramsPath is the EROFS, in the verity root, that becomes its /bin.
	ProgramsPath = "/programs.erofs"
	// NVIDIAPath is the EROFS, in the verity root of a guest with a driver, that
	// becomes its /usr.
	NVIDIAPath = "/nvidia.erofs"
	// AgentPath is the program that init starts and watches, in the verity root.
	AgentPath = "/bin/agent"
	// HandoverPath is where init leaves a Handover for the agent.
	HandoverPath = "/run/coffer/handover.json"
	// ResolvConfPath and HostsPath are what /etc/resolv.conf and /etc/hosts
	// of the verity root point to.
	ResolvConfPath = "/run/coffer/resolv.conf"
	HostsPath      = "/run/coffer/hosts"
	// ImageMetaPath is the OCI layout tar of index, manifest and config.
	ImageMetaPath = "/image/meta.tar"
	// ImageLayersPath is containerd's layer cache: sha256/<2 hex>/<diffID hex>.erofs.
	ImageLayersPath = "/image/layers"
)

// Platforms a guest can run on.
const (
	PlatformSNP       = "snp"
	PlatformSimulated = "simulated"
)

// Failure actions of the attestation loop.
const (
	ActionStopJob  = "stop_job"
	ActionShutdown = "shutdown"
	ActionLog      = "log"
	// ActionGPUDisable takes the GPUs' leave to work back, until the guest restarts;
	// the workload goes on.
	ActionGPUDisable = "gpu_disable"
)

// How much of user_config the guest vouches for. The host can write to that drive.
const (
	IntegrityPinned   = "pinned"   // all of it, as it was built; anything else is refused
	IntegrityRequired = "required" // the files that are named; the site may change the rest
	IntegrityOff      = "off"      // nothing
)

// Config is the guest config.
type Config struct {
	Version   int    `json:"version"`
	CVMID     string `json:"cvm_id"`     // cvm_<12 lower-case hex>
	Platform  string `json:"platform"`   // PlatformSNP or PlatformSimulated
	TEE       string `json:"tee"`        // the KBS's name of the evidence: "snp", or "sample" on the simulated platform
	BuildTime int64  `json:"build_time"` // Unix seconds; the guest's clock never stands before it

	KBS         KBS         `json:"kbs"`
	Disk        Disk        `json:"disk"`
	Network     Network     `json:"network"`
	Attestation Attestation `json:"attestation"`
	Workload    Workload    `json:"workload"`
	UserConfig  UserConfig  `json:"user_config"`
	Peers       Peers       `json:"peers,omitzero"`
	API         API         `json:"api,omitzero"`
	GPU         *GPU        `json:"gpu,omitempty"`
	VCEKs       [][]byte    `json:"vceks,omitempty"` // certificates of chips, DER, for hosts that give none
	// ACPITables are signatures of tables that the host may give, besides those
	// that every q35 machine has.
	ACPITables []string `json:"acpi_tables,omitempty"`
}

// Peers is what the workload's snpguest accepts of other CVMs' reports, beyond
// what it always asks for.
type Peers struct {
	MinTCB       map[string]TCB `json:"min_tcb,omitempty"`      // by product; replaces the built-in minimum
	Measurements []string       `json:"measurements,omitempty"` // hex; none: any
	AllowVLEK    bool           `json:"allow_vlek,omitempty"`
}

// TCB is the lowest security version of each part.
type TCB struct {
	FMC        *uint8 `json:"fmc,omitempty"` // Turin alone
	Bootloader uint8  `json:"bootloader"`
	TEE        uint8  `json:"tee"`
	SNP        uint8  `json:"snp"`
	Microcode  uint8  `json:"microcode"`
}

// API is what the agent serves to the workload beyond evidence and status.
type API struct {
	// Resources are the KBS's resources that the workload may ask for.
	Resources []string `json:"resources,omitempty"`
	// LoopbackPort serves the CoCo-compatible part on 127.0.0.1; 0: nowhere.
	LoopbackPort uint16 `json:"loopback_port,omitempty"`
	// KDS is where certificates of chips are fetched, https://host; "": nowhere.
	KDS string `json:"kds,omitempty"`
}

// KBS says where the key is.
type KBS struct {
	URL        string `json:"url"`         // https://host:port, no path
	CA         string `json:"ca"`          // PEM; the only roots that are accepted
	KeyPath    string `json:"key_path"`    // <repository>/<type>/<tag> of the LUKS passphrase
	CanaryPath string `json:"canary_path"` // resource fetched by each attestation round
}

// Disk pins crypt_root. All sizes and offsets are bytes.
type Disk struct {
	Serial       string  `json:"serial"`        // virtio-blk serial; a hint, the header decides
	HeaderSHA256 string  `json:"header_sha256"` // hex, of the first DataOffset bytes
	DataOffset   int64   `json:"data_offset"`   // where the LUKS payload begins
	PayloadSize  int64   `json:"payload_size"`  // length of the LUKS payload
	Verity       Verity  `json:"verity"`
	Scratch      Scratch `json:"scratch"`
}

// Verity describes the read-only root at the beginning of the payload.
// Blocks are 4096 bytes, the hash is SHA-256, the format version 1.
type Verity struct {
	RootHash       string `json:"root_hash"` // hex, 32 bytes
	Salt           string `json:"salt"`      // hex, 32 bytes
	DataBlocks     int64  `json:"data_blocks"`
	HashStartBlock int64  `json:"hash_start_block"` // first block of the tree, counted from the payload's start
}

// Scratch is the writable ext4 behind the verity tree, as a part of the payload.
type Scratch struct {
	Offset int64 `json:"offset"`
	Size   int64 `json:"size"`
}

// Network is what the guest may reach and be reached by.
type Network struct {
	Static          *Static           `json:"static,omitempty"` // nil: DHCP
	AllowedPorts    []Port            `json:"allowed_ports"`
	AllowedOutPorts []Port            `json:"allowed_out_ports"`
	Hosts           map[string]string `json:"hosts,omitempty"` // name to address
}

// Static is an address that needs no DHCP.
type Static struct {
	Address string   `json:"address"` // CIDR
	Gateway string   `json:"gateway"`
	DNS     []string `json:"dns,omitempty"`
}

// Port is one allowed port.
type Port struct {
	Port  uint16 `json:"port"`
	Proto string `json:"proto"` // "tcp" or "udp"
}

// Attestation is the loop's settings. Times are seconds.
type Attestation struct {
	CheckFrequency    int    `json:"check_frequency"`
	MaxStaleness      int    `json:"max_staleness"`
	FailureAction     string `json:"failure_action"`
	RestartOnRecovery bool   `json:"restart_on_recovery"`
}

// Workload is how the container runs.
type Workload struct {
	ImageName   string   `json:"image_name"`            // name of the image in ImageMetaPath's index
	ImageDigest string   `json:"image_digest"`          // sha256:<hex> of the manifest
	Args        []string `json:"args,omitempty"`        // replaces the image's Cmd, not its entry point
	Env         []string `json:"env,omitempty"`         // added to the image's, NAME=value
	MemoryMiB   int64    `json:"memory_mib"`            // 0: no limit of its own
	CPUPercent  int64    `json:"cpu_percent,omitempty"` // of one vCPU; 0: no limit of its own
	PidsMax     int64    `json:"pids_max"`
	TmpMiB      int64    `json:"tmp_mib"`           // size of /tmp, in RAM
	Restart     string   `json:"restart,omitempty"` // RestartNever where it is ""
	Profile     Profile  `json:"profile,omitzero"`
}

// MaxCPUPercent is 512 vCPUs.
const MaxCPUPercent = 51200

// What happens when the workload ends by itself.
const (
	RestartNever     = "never"      // the guest ends
	RestartOnFailure = "on-failure" // it starts again, unless it ended as it should
	RestartAlways    = "always"     // it starts again
)

// Profile is what one kind of workload needs beyond a container. The zero value
// asks for nothing.
type Profile struct {
	Name string `json:"name"` // for the log
	// Remove are files that are removed before each start: patterns of
	// path.Match, relative to /vault.
	Remove []string `json:"remove,omitempty"`
	// Writable are folders that every user of the container can write to; new at
	// each boot.
	Writable []string `json:"writable,omitempty"`
	// Certs is the one of Writable that AMD's certificates are put in, as
	// ark.pem, ask.pem and vcek.pem.
	Certs string `json:"certs,omitempty"`
	// StopFile asks for an orderly end by its existence, relative to /vault; ""
	// means the image's stop signal. StopSeconds is how long the end may take.
	StopFile    string `json:"stop_file,omitempty"`
	StopSeconds int    `json:"stop_seconds,omitempty"`
	// Lasting is a workload that does not end by itself: an end that nobody asked
	// for is a failure, even with exit code 0.
	Lasting bool `json:"lasting,omitempty"`
}

// UserConfig pins the drive user_config.
type UserConfig struct {
	Integrity string          `json:"integrity"`
	Files     treedigest.Tree `json:"files,omitempty"` // of the drive; all of them where it is pinned
}

// Handover is what init leaves for the agent in HandoverPath.
type Handover struct {
	Config        json.RawMessage `json:"config"`         // the guest config, as it stood in the initrd
	ScratchDevice string          `json:"scratch_device"` // block device of Disk.Scratch
	LaunchDigest  string          `json:"launch_digest"`  // hex, as the chip reports it; empty for "sample"
	Interface     string          `json:"interface"`      // the network interface that is up
	DNS           []string        `json:"dns"`            // resolvers in use
	BootLog       []string        `json:"boot_log"`       // init's console lines
}

// ErrInvalid is wrapped by every error of Parse and Validate.
var ErrInvalid = errors.New("guest config is invalid")

// Parse reads a document strictly.
func Parse(data []byte) (*Config, error) {
	var c Config
	if err := decodeStrict(data, &c); err != nil {
		return nil, err
	}
	if err := c.Validate(); err != nil {
		return nil, err
	}
	return &c, nil
}

// ParseHandover reads a Handover strictly.
func ParseHandover(data []byte) (*Handover, error) {
	var h Handover
	if err := decodeStrict(data, &h); err != nil {
		return nil, err
	}
	return &h, nil
}

func decodeStrict(data []byte, v any) error {
	if len(data) > 2*MaxSize {
		return fmt.Errorf("%w: %d bytes, more than %d", ErrInvalid, len(data), 2*MaxSize)
	}
	if err := noDuplicates(json.NewDecoder(bytes.NewReader(data)), 0); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if err := strict.JSON(data, v); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return nil
}

// noDuplicates walks one JSON value. Names are compared without case, because
// encoding/json matches fields that way.
func noDuplicates(d *json.Decoder, depth int) error {
	if depth > 32 {
		return errors.New("nested too deeply")
	}
	t, err := d.Token()
	if err != nil {
		return err
	}
	delim, ok := t.(json.Delim)
	if !ok {
		return nil
	}
	seen := map[string]bool{}
	for d.More() {
		if delim == '{' {
			k, err := d.Token()
			if err != nil {
				return err
			}
			name := strings.ToLower(k.(string))
			if seen[name] {
				return fmt.Errorf("field %q stands twice", k)
			}
			seen[name] = true
		}
		if err := noDuplicates(d, depth+1); err != nil {
			return err
		}
	}
	_, err = d.Token()
	return err
}

// Marshal validates and writes the document. The same Config gives the same bytes.
func (c *Config) Marshal() ([]byte, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	b, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return nil, err
	}
	if len(b) >= MaxSize {
		return nil, fmt.Errorf("%w: %d bytes, more than %d", ErrInvalid, len(b), MaxSize)
	}
	return append(b, '\n'), nil
}

var (
	cvmID    = regexp.MustCompile(`^cvm_[0-9a-f]{12}$`)
	resource = regexp.MustCompile(`^[a-zA-Z0-9_-][a-zA-Z0-9_.-]*/[a-zA-Z0-9_-][a-zA-Z0-9_.-]*/[a-zA-Z0-9_-][a-zA-Z0-9_.-]*$`)
	digest   = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
	acpiName = regexp.MustCompile(`^[A-Z0-9_]{4}$`)
	hostName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]*$`)
)

// What guests that have NFS or GPUs need, as the load list of the initrd's modules
// calls it.
const (
	FeatureNFS = "nfs"
	FeatureGPU = "gpu"
)

// NFS reports whether the guest may mount NFS: the port is open to it. Its
// kernel modules are loaded only then.
func (c *Config) NFS() bool {
	return slices.Contains(c.Network.AllowedOutPorts, Port{Port: 2049, Proto: "tcp"})
}

const (
	maxResources = 64
	// MaxVCEKs and maxVCEK bound VCEKs, and one of them in bytes.
	MaxVCEKs = 64
	maxVCEK  = 4 << 10
)

// faults are what is wrong with a profile.
func (p Profile) faults() (faults []string) {
	fault := func(format string, a ...any) { faults = append(faults, fmt.Sprintf(format, a...)) }
	for _, pattern := range p.Remove {
		if _, err := path.Match(pattern, ""); err != nil || !filepath.IsLocal(pattern) {
			fault("remove: %q is no pattern of files below /vault", pattern)
		}
	}
	for _, dir := range p.Writable {
		if !path.IsAbs(dir) || path.Clean(dir) != dir || dir == "/" {
			fault("writable: %q is not the clean path of a folder", dir)
		}
	}
	if p.Certs != "" && !slices.Contains(p.Writable, p.Certs) {
		fault("certs: %q is none of writable", p.Certs)
	}
	if p.StopFile != "" && !filepath.IsLocal(p.StopFile) {
		fault("stop_file: %q is not below /vault", p.StopFile)
	}
	if p.StopSeconds < 0 || p.StopSeconds > 300 || (p.StopFile != "") != (p.StopSeconds > 0) {
		fault("stop_seconds %d: 1 to 300 with a stop_file, else 0", p.StopSeconds)
	}
	return faults
}

// ValidCVMID reports whether id has the form cvm_<12 lower-case hex>.
func ValidCVMID(id string) bool { return cvmID.MatchString(id) }

// ValidACPITable reports whether name is the signature of an ACPI table.
func ValidACPITable(name string) bool { return acpiName.MatchString(name) }

// ValidHostName reports whether name can stand in /etc/hosts.
func ValidHostName(name string) bool { return len(name) <= 253 && hostName.MatchString(name) }

// ValidResourcePath reports whether p has the three segments a KBS accepts.
func ValidResourcePath(p string) bool { return resource.MatchString(p) }

// Validate checks every value. It returns all faults, joined.
func (c *Config) Validate() error {
	var errs []error
	check := func(ok bool, format string, a ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf("%w: "+format, append([]any{ErrInvalid}, a...)...))
		}
	}
	isHex := func(s string, n int) bool {
		b, err := hex.DecodeString(s)
		return err == nil && len(b) == n && s == strings.ToLower(s)
	}
	check(c.Version == Version, "version is %d, this guest reads %d", c.Version, Version)
	check(cvmID.MatchString(c.CVMID), "cvm_id %q is not cvm_<12 hex>", c.CVMID)
	switch c.Platform {
	case PlatformSNP:
		check(c.TEE == "snp", "tee %q on platform snp", c.TEE)
	case PlatformSimulated:
		check(c.TEE == "snp" || c.TEE == "sample", "tee %q on platform simulated", c.TEE)
	default:
		check(false, "platform %q is not snp or simulated", c.Platform)
	}
	check(c.BuildTime > 0, "build_time is missing")

	u, err := url.Parse(c.KBS.URL)
	check(err == nil && u.Scheme == "https" && u.Host != "" && u.User == nil && (u.Path == "" || u.Path == "/") && u.RawQuery == "",
		"kbs.url %q is not https://host:port", c.KBS.URL)
	check(strings.Contains(c.KBS.CA, "BEGIN CERTIFICATE"), "kbs.ca holds no certificate")
	check(resource.MatchString(c.KBS.KeyPath), "kbs.key_path %q is not repository/type/tag", c.KBS.KeyPath)
	check(resource.MatchString(c.KBS.CanaryPath), "kbs.canary_path %q is not repository/type/tag", c.KBS.CanaryPath)
	check(c.KBS.KeyPath != c.KBS.CanaryPath, "kbs.canary_path is the key's own path")

	d := &c.Disk
	const block = 4096
	check(isHex(d.HeaderSHA256, 32), "disk.header_sha256 is not 64 hex characters")
	check(d.DataOffset >= 2*16384+258048 && d.DataOffset%block == 0 && d.DataOffset <= 64<<20, "disk.data_offset %d is out of range", d.DataOffset)
	check(d.PayloadSize > 0 && d.PayloadSize%block == 0 && d.PayloadSize < 1<<50, "disk.payload_size %d is out of range", d.PayloadSize)
	check(isHex(d.Verity.RootHash, 32), "disk.verity.root_hash is not 64 hex characters")
	check(isHex(d.Verity.Salt, 32), "disk.verity.salt is not 64 hex characters")
	check(d.Verity.DataBlocks > 0 && d.Verity.DataBlocks < d.PayloadSize/block, "disk.verity.data_blocks %d is out of range", d.Verity.DataBlocks)
	check(d.Verity.HashStartBlock > d.Verity.DataBlocks && d.Verity.HashStartBlock < d.PayloadSize/block, "disk.verity.hash_start_block %d is out of range", d.Verity.HashStartBlock)
	check(d.Scratch.Offset%block == 0 && d.Scratch.Offset > d.Verity.HashStartBlock*block, "disk.scratch.offset %d is out of range", d.Scratch.Offset)
	check(d.Scratch.Size > 0 && d.Scratch.Size%block == 0 && d.Scratch.Offset+d.Scratch.Size <= d.PayloadSize, "disk.scratch.size %d is out of range", d.Scratch.Size)

	if s := c.Network.Static; s != nil {
		_, err := netip.ParsePrefix(s.Address)
		check(err == nil, "network.static.address %q is not address/bits", s.Address)
		_, err = netip.ParseAddr(s.Gateway)
		check(err == nil, "network.static.gateway %q is not an address", s.Gateway)
		for _, a := range s.DNS {
			_, err := netip.ParseAddr(a)
			check(err == nil, "network.static.dns %q is not an address", a)
		}
	}
	for _, p := range slices.Concat(c.Network.AllowedPorts, c.Network.AllowedOutPorts) {
		check(p.Port > 0 && (p.Proto == "tcp" || p.Proto == "udp"), "network: port %d/%s is not 1..65535/tcp or udp", p.Port, p.Proto)
	}
	for name, addr := range c.Network.Hosts {
		check(ValidHostName(name), "network.hosts: %q is not a host name", name)
		_, err := netip.ParseAddr(addr)
		check(err == nil, "network.hosts: %q of %s is not an address", addr, name)
	}

	a := &c.Attestation
	check(a.CheckFrequency >= 1 && a.CheckFrequency <= 86400, "attestation.check_frequency %d is not 1..86400 seconds", a.CheckFrequency)
	check(a.MaxStaleness >= a.CheckFrequency && a.MaxStaleness <= 7*86400, "attestation.max_staleness %d is not check_frequency..604800 seconds", a.MaxStaleness)
	check(slices.Contains([]string{ActionStopJob, ActionShutdown, ActionLog, ActionGPUDisable}, a.FailureAction), "attestation.failure_action %q is not stop_job, shutdown, log or gpu_disable", a.FailureAction)
	check(a.FailureAction != ActionGPUDisable || c.GPU != nil, "attestation.failure_action gpu_disable without gpu")

	w := &c.Workload
	check(w.ImageName != "" && len(w.ImageName) < 512, "workload.image_name is missing or too long")
	check(digest.MatchString(w.ImageDigest), "workload.image_digest %q is not sha256:<hex>", w.ImageDigest)
	for _, e := range w.Env {
		check(strings.Index(e, "=") > 0, "workload.env %q is not NAME=value", e)
	}
	check(slices.Contains([]string{"", RestartNever, RestartOnFailure, RestartAlways}, w.Restart), "workload.restart %q is not never, on-failure or always", w.Restart)
	for _, fault := range w.Profile.faults() {
		check(false, "workload.profile: %s", fault)
	}
	for _, fault := range c.GPU.faults(c.Platform) {
		check(false, "gpu: %s", fault)
	}
	for product, t := range c.Peers.MinTCB {
		check(slices.Contains([]string{"Milan", "Genoa", "Turin"}, product), "peers.min_tcb: %q is not Milan, Genoa or Turin", product)
		check(t.FMC == nil || product == "Turin", "peers.min_tcb: %s has no fmc", product)
	}
	for _, m := range c.Peers.Measurements {
		check(isHex(m, 48), "peers.measurements: %q is not 96 hex characters", m)
	}
	check(len(c.VCEKs) <= MaxVCEKs, "vceks: %d, at most %d", len(c.VCEKs), MaxVCEKs)
	for i, der := range c.VCEKs {
		_, err := x509.ParseCertificate(der)
		check(err == nil && len(der) <= maxVCEK, "vceks[%d] is no certificate of at most %d bytes", i, maxVCEK)
	}
	check(len(c.API.Resources) <= maxResources, "api.resources: %d, at most %d", len(c.API.Resources), maxResources)
	for _, r := range c.API.Resources {
		check(resource.MatchString(r), "api.resources: %q is not repository/type/tag", r)
		check(path.Dir(r) != path.Dir(c.KBS.KeyPath) && r != c.KBS.CanaryPath, "api.resources: %q: the workload gets no disk's key and no canary", r)
		check(c.GPU == nil || c.GPU.VaultKeyPath == "" || path.Dir(r) != path.Dir(c.GPU.VaultKeyPath), "api.resources: %q: the workload gets no key of /vault", r)
	}
	for _, t := range c.ACPITables {
		check(ValidACPITable(t), "acpi_tables: %q is not a table's signature", t)
	}
	if c.API.KDS != "" {
		u, err := url.Parse(c.API.KDS)
		check(err == nil && u.Scheme == "https" && u.Host != "" && u.User == nil && u.Path == "" && u.RawQuery == "", "api.kds %q is not https://host", c.API.KDS)
	}
	check(w.MemoryMiB >= 0 && w.CPUPercent >= 0 && w.CPUPercent <= MaxCPUPercent && w.PidsMax > 0 && w.TmpMiB > 0,
		"workload: memory_mib, cpu_percent, pids_max or tmp_mib is out of range")

	uc := &c.UserConfig
	switch uc.Integrity {
	case IntegrityPinned:
	case IntegrityRequired:
		check(len(uc.Files) > 0, "user_config.files is empty, and they are required")
	case IntegrityOff:
		check(len(uc.Files) == 0, "user_config.files are listed, and integrity is off")
	default:
		check(false, "user_config.integrity %q is not pinned, required or off", uc.Integrity)
	}
	if err := uc.Files.Validate(); err != nil {
		check(false, "user_config.files: %v", err)
	}
	return errors.Join(errs...)
}
