//go:build simulated

package certs

import (
	"encoding/pem"

	"coffer/internal/snp"
	"coffer/internal/snp/verify"
)

// TrustedRoots are those of the simulated chip, from the certificates that came
// with its report, and AMD's.
func TrustedRoots(certs []snp.Cert) []verify.Roots {
	var text []byte
	for _, c := range certs {
		if c.Type == snp.ARK || c.Type == snp.ASK {
			text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Data})...)
		}
	}
	simulated, err := verify.LoadRoots(text)
	if err != nil {
		return verify.AMDRoots()
	}
	return append(simulated, verify.AMDRoots()...)
}
