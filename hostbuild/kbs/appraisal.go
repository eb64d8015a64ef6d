package kbs

import (
	"encoding/json"
	"reflect"
)

// appraisal is the trustworthiness vector that Trustee's default policy gives.
// It informs; what decides about a resource is the resource policy.
type appraisal struct{ executables, hardware, configuration int }

// status is the worst tier of the vector.
func (a appraisal) status() string {
	switch worst := max(a.executables, a.hardware, a.configuration); {
	case worst >= 96:
		return "contraindicated"
	case worst >= 32:
		return "warning"
	default:
		return "affirming"
	}
}

const (
	executablesKnown, executablesUnknown = 3, 33
	hardwareKnown, hardwareUnknown       = 2, 97
	configKnown, configSafe, configOpen  = 2, 3, 36
)

func appraiseSNP(claims, refs map[string]any) appraisal {
	a := appraisal{executablesUnknown, hardwareUnknown, configSafe}
	if matches(refs, "snp_launch_measurement", claims["measurement"]) {
		a.executables = executablesKnown
	}
	if matches(refs, "snp_bootloader", claims["reported_tcb_bootloader"]) && matches(refs, "snp_microcode", claims["reported_tcb_microcode"]) &&
		matches(refs, "snp_snp_svn", claims["reported_tcb_snp"]) && matches(refs, "snp_tee_svn", claims["reported_tcb_tee"]) {
		a.hardware = hardwareKnown
	}
	switch {
	case claims["policy_debug_allowed"] != false || claims["policy_migrate_ma"] != false:
		a.configuration = configOpen
	case matches(refs, "snp_smt_enabled", claims["platform_smt_enabled"]) && matches(refs, "snp_tsme_enabled", claims["platform_tsme_enabled"]) &&
		matches(refs, "snp_guest_abi_major", claims["policy_abi_major"]) && matches(refs, "snp_guest_abi_minor", claims["policy_abi_minor"]) &&
		matches(refs, "snp_single_socket", claims["policy_single_socket"]) && matches(refs, "snp_smt_allowed", claims["policy_smt_allowed"]):
		a.configuration = configKnown
	}
	return a
}

func appraiseSample(svn string, refs map[string]any, d Dialect) appraisal {
	a := appraisal{executablesUnknown, hardwareUnknown, configOpen}
	if d == DialectH {
		a.configuration = configKnown
	}
	if matches(refs, "launch_digest", "abcde") {
		a.executables = executablesKnown
	}
	minimum, ok := refs["minimum_minor_version"].(float64)
	if matches(refs, "svn", svn) && matches(refs, "major_version", 1) && ok && minimum <= 4 {
		a.hardware = hardwareKnown
	}
	return a
}

// matches reports whether the reference value, one or a list, holds the claim.
func matches(refs map[string]any, name string, claim any) bool {
	ref, ok := refs[name]
	if !ok {
		return false
	}
	list, ok := ref.([]any)
	if !ok {
		list = []any{ref}
	}
	b, _ := json.Marshal(claim)
	var v any
	if json.Unmarshal(b, &v) != nil {
		return false
	}
	for _, r := range list {
		if reflect.DeepEqual(r, v) {
			return true
		}
	}
	return false
}
