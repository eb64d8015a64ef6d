package kbs

import (
	"context"
	"crypto/sha512"
	"fmt"

	"coffer/internal/gpu"
)

// Devices judges the additional (device) evidence of an attestation; a
// *gpu.Verifier is one. Every device must pass, each asked with nonce.
type Devices interface {
	VerifyAll(ctx context.Context, devices []gpu.Evidence, nonce [32]byte) ([]*gpu.Result, error)
}

// deviceDigest is what devices are asked with: the SHA-384 over the canonical JSON
// of nonce and key, which the CPU's evidence repeats together with theirs.
func (b bound) deviceDigest() [48]byte {
	return sha512.Sum384([]byte(`{"nonce":` + canonical(b.nonce) + `,"tee-pubkey":` + b.canonicalKey() + `}`))
}

// verifyDevices checks the additional evidence and returns what a token says of
// each device, in order: its submods gpu0, gpu1 and so on.
func (s *Server) verifyDevices(ctx context.Context, b bound) ([]map[string]any, error) {
	if b.additional == "" {
		return nil, nil
	}
	list, err := gpu.ParseEvidence(b.additional)
	if err != nil {
		return nil, err
	}
	results, err := s.devices.VerifyAll(ctx, list, gpu.DeviceNonce(b.deviceDigest()))
	switch {
	case gpu.CodeOf(err).Unreachable():
		return nil, fmt.Errorf("%w: device evidence: %w", errUnavailable, err)
	case err != nil:
		return nil, fmt.Errorf("device evidence: %w", err)
	}
	var devices []map[string]any
	for _, r := range results {
		claims := r.Claims()
		claims["arch"], claims["uuid"] = r.Arch, r.UUID
		evidence := map[string]any{"nvidia": claims}
		if s.simulatedDevices {
			evidence["simulated"] = true
		}
		devices = append(devices, evidence)
	}
	return devices, nil
}

// appraiseDevice is of a device that passed every check.
var appraiseDevice = appraisal{executables: executablesKnown, hardware: hardwareKnown, configuration: configKnown}
