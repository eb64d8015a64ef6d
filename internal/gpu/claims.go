package gpu

import (
	"strings"
	"time"
)

// Claims returns the result in the claim names of NVIDIA's verifiers, version 3.0,
// as they stand in tokens of NRAS and are used by policies of Trustee. Values are
// what encoding/json takes.
func (r *Result) Claims() map[string]any {
	kind, bios := "gpu", "vbios"
	if r.Arch == LS10 {
		kind, bios = "switch", "bios"
	}
	name := func(s string) string { return "x-nvidia-" + kind + "-" + s }
	claims := map[string]any{
		"measres":   "fail",
		"secboot":   nil,
		"dbgstat":   nil,
		"hwmodel":   r.Model,
		"ueid":      r.Serial,
		"oemid":     r.OEMID,
		"eat_nonce": r.Nonce,

		"x-nvidia-device-type":                  kind,
		name("claims-version"):                  "3.0",
		name("arch-check"):                      r.ArchMatch,
		name("attestation-report-parsed"):       r.Parsed,
		name("attestation-report-nonce-match"):  r.NonceMatch,
		name("attestation-report-cert-chain"):   r.Chain.claims(),
		name(bios + "-version"):                 r.VBIOS,
		"x-nvidia-mismatch-measurement-records": r.Mismatches,
		"x-nvidia-attestation-warning":          nil,

		name("attestation-report-cert-chain-fwid-match"): r.FWIDMatch,
		name("attestation-report-signature-verified"):    r.Signature,
	}
	r.VBIOSRIM.addClaims(claims, name(bios+"-rim-"))
	if kind == "gpu" {
		claims[name("driver-version")] = r.Driver
		claims[name("vbios-index-no-conflict")] = r.NoConflict
		r.DriverRIM.addClaims(claims, name("driver-rim-"))
	}
	if r.SwitchPDIs != nil {
		claims[name("switch-pdis")] = r.SwitchPDIs
	}
	if r.Mismatches == nil {
		claims["x-nvidia-mismatch-measurement-records"] = nil
	}
	if r.Warnings != nil {
		claims["x-nvidia-attestation-warning"] = strings.Join(r.Warnings, "; ")
	}
	if r.Verified {
		claims["measres"], claims["secboot"], claims["dbgstat"] = "success", true, "disabled"
	}
	return claims
}

func (s *RIMState) addClaims(claims map[string]any, prefix string) {
	claims[prefix+"fetched"] = s.Fetched
	claims[prefix+"schema-validated"] = s.Format
	claims[prefix+"version-match"] = s.Version
	claims[prefix+"signature-verified"] = s.Signature
	claims[prefix+"measurements-available"] = s.Usable
	claims[prefix+"cert-chain"] = s.Chain.claims()
}

func (s *ChainState) claims() map[string]any {
	claims := map[string]any{
		"x-nvidia-cert-status":            nil,
		"x-nvidia-cert-expiration-date":   nil,
		"x-nvidia-cert-ocsp-status":       nil,
		"x-nvidia-cert-revocation-reason": nil,
	}
	if s.Status != "" {
		claims["x-nvidia-cert-status"] = s.Status
	}
	if !s.Expires.IsZero() {
		claims["x-nvidia-cert-expiration-date"] = s.Expires.UTC().Format(time.RFC3339)
	}
	if s.OCSP != "" {
		claims["x-nvidia-cert-ocsp-status"] = s.OCSP
		claims["x-nvidia-cert-ocsp-nonce-matches"] = !s.Cached
	}
	if s.Reason != "" {
		claims["x-nvidia-cert-revocation-reason"] = s.Reason
	}
	return claims
}
