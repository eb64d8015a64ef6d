//go:build simulated

package snpguest

import "coffer/internal/snp/verify"

// trustedRoots are AMD's and those of the simulated chip, which the agent knows.
func (r *run) trustedRoots() ([]verify.Roots, error) {
	if r.Roots != nil {
		return r.Roots, nil
	}
	pem, err := r.ask("/v1/snp/roots", nil, nil)
	if err != nil {
		return nil, err
	}
	simulated, err := verify.LoadRoots(pem)
	if err != nil {
		return nil, err
	}
	return append(simulated, verify.AMDRoots()...), nil
}
