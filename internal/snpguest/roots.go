//go:build !simulated

package snpguest

import "coffer/internal/snp/verify"

// trustedRoots are AMD's. No other is trusted by a production build.
func (r *run) trustedRoots() ([]verify.Roots, error) {
	if r.Roots != nil {
		return r.Roots, nil
	}
	return verify.AMDRoots(), nil
}
