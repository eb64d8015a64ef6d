package gpu

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	"coffer/internal/strict"
)

// MaxDevices is the number of devices that evidence can hold.
const MaxDevices = 16

// DeviceNonce is the nonce that GPUs are asked with for a digest over the
// handshake with a KBS: its first 32 bytes, as Trustee has it.
func DeviceNonce(digest [48]byte) [32]byte { return [32]byte(digest[:32]) }

// Trustee's form of evidence, as additional evidence of a CPU's.
type additional struct {
	NVIDIA *struct {
		List []entry `json:"device_evidence_list"`
	} `json:"nvidia"`
}

type entry struct {
	Arch        string `json:"arch"`
	UUID        string `json:"uuid,omitempty"`
	Evidence    string `json:"evidence"`    // base64; older clients send hex
	Certificate string `json:"certificate"` // base64 of the PEM
}

// MarshalEvidence writes devices as Trustee's additional_evidence.
func MarshalEvidence(devices []Evidence) (string, error) {
	var list []entry
	for _, d := range devices {
		list = append(list, entry{d.Arch, d.UUID, base64.StdEncoding.EncodeToString(d.Report), base64.StdEncoding.EncodeToString(d.Chain)})
	}
	b, err := json.Marshal(map[string]any{"nvidia": map[string]any{"device_evidence_list": list}})
	return string(b), err
}

// ParseEvidence reads what MarshalEvidence writes, strictly.
func ParseEvidence(text string) ([]Evidence, error) {
	var a additional
	if err := strict.JSON([]byte(text), &a); err != nil {
		return nil, fmt.Errorf("additional evidence: %w", err)
	}
	if a.NVIDIA == nil || len(a.NVIDIA.List) == 0 || len(a.NVIDIA.List) > MaxDevices {
		return nil, fmt.Errorf("additional evidence: no list of 1 to %d NVIDIA devices", MaxDevices)
	}
	var devices []Evidence
	for i, e := range a.NVIDIA.List {
		report, err := hex.DecodeString(e.Evidence)
		if err != nil {
			report, err = base64.StdEncoding.DecodeString(e.Evidence)
		}
		chain, chainErr := base64.StdEncoding.DecodeString(e.Certificate)
		if err = errors.Join(err, chainErr); err != nil {
			return nil, fmt.Errorf("additional evidence: device %d: %w", i, err)
		}
		devices = append(devices, Evidence{Arch: e.Arch, UUID: e.UUID, Report: report, Chain: chain})
	}
	return devices, nil
}
