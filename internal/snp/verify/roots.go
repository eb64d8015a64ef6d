package verify

import (
	"crypto/x509"
	_ "embed"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
)

//go:embed amd.pem
var amdPEM []byte

// ErrRoots is what LoadRoots' errors wrap.
var ErrRoots = errors.New("invalid SNP roots")

// Roots are the pinned certificates of one product: the root (ARK), and the
// intermediates that sign VCEKs (ASK) and VLEKs (ASVK). ASK or ASVK can be nil.
type Roots struct {
	Product        string // "Milan", "Genoa" or "Turin"
	ARK, ASK, ASVK *x509.Certificate
	Simulated      bool // not AMD's
}

// AMDRoots returns AMD's own roots, which are part of the program.
func AMDRoots() []Roots {
	roots, err := parseRoots(amdPEM)
	if err != nil {
		panic("embedded AMD roots: " + err.Error()) // a defect of the build; TestAMDRoots
	}
	return roots
}

// LoadRoots reads the roots of simulated chips from PEM: for each chip an ARK
// and the ASK or ASVK that it signed, named as AMD names its own. They come
// back as Simulated, whatever they are.
func LoadRoots(pem []byte) ([]Roots, error) {
	roots, err := parseRoots(pem)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRoots, err)
	}
	for i := range roots {
		roots[i].Simulated = true
	}
	return roots, nil
}

func parseRoots(rest []byte) ([]Roots, error) {
	var roots []Roots
	var intermediates []*x509.Certificate
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("holds a PEM block of type %q", block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		if product, ok := strings.CutPrefix(c.Subject.CommonName, "ARK-"); !ok {
			intermediates = append(intermediates, c)
		} else if err := c.CheckSignatureFrom(c); err != nil {
			return nil, fmt.Errorf("%s is not self-signed: %w", c.Subject.CommonName, err)
		} else {
			roots = append(roots, Roots{Product: product, ARK: c})
		}
	}
	for _, c := range intermediates {
		if !adopt(roots, c) {
			return nil, fmt.Errorf("%q is neither an ARK nor an ASK or ASVK that an ARK here signed", c.Subject.CommonName)
		}
	}
	if len(roots) == 0 {
		return nil, errors.New("holds no ARK certificate")
	}
	for _, r := range roots {
		if r.ASK == nil && r.ASVK == nil {
			return nil, fmt.Errorf("holds no ASK for ARK-%s", r.Product)
		}
	}
	return roots, nil
}

// adopt gives the intermediate certificate c to the root that signed it.
func adopt(roots []Roots, c *x509.Certificate) bool {
	for i := range roots {
		r := &roots[i]
		if c.CheckSignatureFrom(r.ARK) != nil {
			continue
		}
		switch c.Subject.CommonName {
		case "SEV-" + r.Product:
			r.ASK = c
			return true
		case "SEV-VLEK-" + r.Product:
			r.ASVK = c
			return true
		}
	}
	return false
}
