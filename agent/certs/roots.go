//go:build !simulated

package certs

import (
	"coffer/internal/snp"
	"coffer/internal/snp/verify"
)

// TrustedRoots are AMD's, whatever the host says.
func TrustedRoots([]snp.Cert) []verify.Roots { return verify.AMDRoots() }
