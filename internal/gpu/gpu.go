// Package gpu judges the attestation evidence of NVIDIA GPUs (Hopper, Blackwell)
// and LS10 switches without asking NVIDIA's attestation service: the device's
// certificate chain, its signed report, and the measurements in it against
// NVIDIA's signed reference manifests (RIMs).
//
// It promises that a verified device signed a report over the caller's nonce with
// a key whose firmware is the one the report names, that every measurement the
// RIMs of its driver and VBIOS speak of has one of their values, and that each
// check that fails has a code of its own that does not change. What was found is
// told in the claim names that NVIDIA's own verifiers use (version 3.0).
//
// It does not know in which machine the device sits: who asks binds the nonce to
// evidence of the CPU. It reads no clock and no network but by what it is given.
package gpu

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"coffer/internal/gpu/certs"
)

// Code names the check that failed. Codes are part of the interface: policies and
// operators match on them.
type Code string

// The checks, in the order in which they are made. Those of a RIM begin with
// "driver-rim-" or "vbios-rim-".
const (
	CodeCCOff       Code = "settings-cc-off"      // confidential computing is off
	CodeEnvironment Code = "settings-environment" // a simulation, not production
	CodeDevTools    Code = "settings-devtools"    // debugging is possible
	CodeCPU         Code = "settings-cpu"         // the driver sees another kind of CVM
	CodePPCIE       Code = "settings-ppcie"       // protected PCIe, but its switches are not attested
	CodeMode        Code = "settings-mode"        // unknown multi-GPU mode
	CodeCount       Code = "device-count"         // not the expected number of devices
	CodeMixed       Code = "device-mixed"         // devices differ in kind or mode
	CodeDuplicate   Code = "device-duplicate"     // two reports of one device

	CodeReportFormat  Code = "report-format"
	CodeReportRequest Code = "report-request" // it answers a request for less than everything
	CodeNonce         Code = "report-nonce"

	CodeChainStructure Code = "chain-structure"
	CodeChainRoot      Code = "chain-root"
	CodeChainSignature Code = "chain-signature"
	CodeChainTime      Code = "chain-time"
	CodeArch           Code = "arch" // certificate, NVML and policy disagree
	CodeFWIDMissing    Code = "fwid-missing"
	CodeFWID           Code = "fwid-mismatch"

	CodeOCSPUnreachable Code = "ocsp-unreachable" // these end codes of RIMs too
	CodeOCSPFormat      Code = "ocsp-format"
	CodeOCSPResponder   Code = "ocsp-responder"
	CodeOCSPNonce       Code = "ocsp-nonce"
	CodeOCSPStale       Code = "ocsp-stale"
	CodeOCSPRevoked     Code = "ocsp-revoked"
	CodeOCSPHold        Code = "ocsp-hold"
	CodeOCSPUnknown     Code = "ocsp-unknown"

	CodeReportSignature Code = "report-signature"
	CodeDriverVersion   Code = "driver-version" // report and NVML disagree
	CodeVBIOSVersion    Code = "vbios-version"
	CodeDriverPolicy    Code = "driver-not-allowed"
	CodeVBIOSPolicy     Code = "vbios-not-allowed"
	CodeFeature         Code = "report-mode" // the report's mode is not one that is allowed

	codeRIMMissing   Code = "missing"
	codeRIMFetch     Code = "fetch"
	codeRIMFormat    Code = "format"
	codeRIMProduct   Code = "product"
	codeRIMVersion   Code = "version"
	codeRIMDigest    Code = "digest"
	codeRIMSignature Code = "signature"
	codeRIMChain     Code = "chain"
	codeRIMExpired   Code = "expired"
	codeRIMFloor     Code = "floor" // too few measurements to mean anything

	CodeNVDEC       Code = "nvdec-status"
	CodeConflict    Code = "rim-index-conflict"
	CodeMeasurement Code = "measurement-mismatch"

	CodeNRASUnreachable Code = "nras-unreachable" // see package nras

	CodeInternal Code = "internal" // the question could not be put
)

// Unreachable reports whether the check could not be made since a service gave no
// usable answer: it says nothing about the device.
func (c Code) Unreachable() bool {
	for _, end := range []Code{CodeOCSPUnreachable, CodeOCSPFormat, CodeOCSPResponder, CodeOCSPNonce, CodeOCSPStale, codeRIMFetch, CodeNRASUnreachable} {
		if strings.HasSuffix(string(c), string(end)) {
			return true
		}
	}
	return false
}

// of returns the code of a check of one of the RIMs.
func (c Code) of(s Source) Code { return Code(string(s) + "-rim-" + string(c)) }

// Error is a check that failed.
type Error struct {
	Code Code
	Err  error
}

func (e *Error) Error() string { return fmt.Sprintf("%s [%s]", e.Err, e.Code) }

func (e *Error) Unwrap() error { return e.Err }

func fail(code Code, format string, args ...any) error {
	return &Error{code, fmt.Errorf(format, args...)}
}

// CodeOf returns the code of the check that failed, "" for nil.
func CodeOf(err error) Code {
	var e *Error
	switch {
	case err == nil:
		return ""
	case errors.As(err, &e):
		return e.Code
	}
	return CodeInternal
}

// Source is where an expected value comes from.
type Source string

// The two RIMs; that of a switch is a VBIOS RIM.
const (
	Driver Source = "driver"
	VBIOS  Source = "vbios"
)

// The architectures, as NVML and NVIDIA's services name them.
const (
	Hopper    = "HOPPER"
	Blackwell = "BLACKWELL"
	LS10      = "LS10"
)

// Evidence is what a device gave. Arch, UUID, Driver and VBIOS are what NVML says
// of it; where they are set they must agree with what is signed.
type Evidence struct {
	Arch   string
	UUID   string
	Driver string
	VBIOS  string
	Report []byte // request and response, as NVML returns them
	Chain  []byte // PEM, leaf to root
}

// Serial returns the serial number of the key's certificate in a chain, decimal: a
// device's identity, once the chain is verified.
func Serial(chain []byte) (string, error) {
	list, err := certs.ParsePEM(chain)
	if err == nil && len(list) == 0 {
		err = errors.New("no certificate")
	}
	if err != nil {
		return "", err
	}
	return list[0].SerialNumber.String(), nil
}

// Settings is NVML's view of the system; see nvmlSystemConfComputeSettings.
type Settings struct {
	CPU         uint32 `json:"cpu"`         // 3 SEV-SNP
	Environment uint32 `json:"environment"` // 0 unavailable, 1 simulation, 2 production
	Feature     uint32 `json:"feature"`     // 1: confidential computing is on
	DevTools    uint32 `json:"devtools"`    // 1: debugging is possible
	MultiGPU    uint32 `json:"multi_gpu"`   // 0 none, 1 protected PCIe, 2 NVLink encryption
}

// Values of Settings.
const (
	CPUSEVSNP      = 3
	EnvironmentOn  = 2
	MultiGPUNone   = 0
	MultiGPUPPCIE  = 1
	MultiGPUNVLink = 2
)

// OCSP says how revocation is asked about.
type OCSP string

// The modes of OCSP.
const (
	OCSPRequire     OCSP = "require"      // ask each time
	OCSPAllowCached OCSP = "allow_cached" // an answer may be used until it is too old
	OCSPOff         OCSP = "off"
)

// Policy says what to accept. Its zero value is the strict one, but that OCSP must
// be set.
type Policy struct {
	Archs            []string // nil: Hopper, Blackwell and LS10
	Drivers          []string // exact versions; nil: any that MinDriver and MaxDriver allow
	MinDriver        string
	MaxDriver        string
	VBIOSes          []string // nil: any
	AllowMissingFWID bool     // reports of drivers 535 and 545 have none
	AllowPPCIE       bool     // the caller attests the switches too
	OCSP             OCSP
	AllowHold        bool // certificates on hold
	AllowExpiredRIM  bool // of a pinned file: the pin is the trust then
	Count            int  // of GPUs; 0: any number but none
}

// CheckSettings judges the system's settings before any device is asked.
func (p Policy) CheckSettings(s Settings) error {
	ppcie := s.MultiGPU == MultiGPUPPCIE // Feature is reported off then
	switch {
	case s.MultiGPU > MultiGPUNVLink:
		return fail(CodeMode, "unknown multi-GPU mode %d", s.MultiGPU)
	case ppcie && !p.AllowPPCIE:
		return fail(CodePPCIE, "the GPUs are in protected-PCIe mode, whose NVSwitches would have to be attested too")
	case s.Feature != 1 && !ppcie:
		return fail(CodeCCOff, "confidential computing is off on the GPUs: turn it on on the host (nvidia_gpu_tools.py --set-cc-mode=on) and restart the VM")
	case s.DevTools != 0:
		return fail(CodeDevTools, "the GPUs are in DevTools mode, in which they can be debugged and are ready without attestation")
	case s.Environment != EnvironmentOn:
		return fail(CodeEnvironment, "the GPUs' environment is %d, want production (%d)", s.Environment, EnvironmentOn)
	case s.CPU != CPUSEVSNP:
		return fail(CodeCPU, "the driver sees CPU kind %d, want SEV-SNP (%d)", s.CPU, CPUSEVSNP)
	}
	return nil
}

// Mismatch is a measurement that has none of the values its RIM allows, in
// NVIDIA's words.
type Mismatch struct {
	Index        int    `json:"index"`
	GoldenSize   int    `json:"goldenSize"`
	GoldenValue  string `json:"goldenValue"` // the first of the allowed values, hex
	RuntimeSize  int    `json:"runtimeSize"`
	RuntimeValue string `json:"runtimeValue"`
	Source       Source `json:"measurementSource"`
}

// ChainState is what was found of a certificate chain.
type ChainState struct {
	Expires time.Time // zero where the chain was not verified
	Status  string    // valid, invalid, expired, revoked
	OCSP    string    // good, revoked, unknown; "" where there is no answer
	Cached  bool      // an answer was a kept one, its nonce that of an earlier question
	Reason  string    // of a revocation
}

// RIMState is what was found of a RIM.
type RIMState struct {
	ID        string
	File      string // the one that counted
	SHA256    string
	Fetched   bool
	Format    bool // has the exact form
	Version   bool
	Signature bool
	Usable    bool // has measurements to compare with
	Chain     ChainState
}

// Result is what was found of a device. It is filled as far as the checks went.
type Result struct {
	Arch   string
	Serial string // of the leaf certificate, decimal: the device's identity
	Model  string
	OEMID  string
	Driver string
	VBIOS  string
	Nonce  string // hex, the report's
	UUID   string

	Parsed, NonceMatch, ArchMatch, FWIDMatch, Signature bool
	Chain                                               ChainState
	DriverRIM, VBIOSRIM                                 RIMState
	NoConflict                                          bool
	Mismatches                                          []Mismatch
	Verified                                            bool // every check passed
	Warnings                                            []string
	SwitchPDIs                                          []string
	PPCIE                                               bool
	FeatureFlag                                         int // 0 single GPU, 1 several with NVLink encryption, 2 protected PCIe; -1 not told
}
