// Package certs judges the certificate chains of NVIDIA devices and of the
// signers of reference integrity manifests (RIMs). NVIDIA's two roots are built
// in.
//
// A chain is accepted only as a whole and in order: every certificate signed by
// the next, the last one the pinned root byte for byte, all with P-384 keys. Go's
// path building alone would accept a chain that is only the root, or one without
// the key that signs reports. It does not ask whether a certificate is revoked.
package certs

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	_ "embed"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"time"
)

//go:embed nvidia-device-root.pem
var deviceRoot []byte

//go:embed nvidia-rim-root.pem
var rimRoot []byte

// maxSize is the longest chain that is read, in bytes of PEM; NVML's buffer has 5120.
const maxSize = 16 << 10

// deviceLength is the number of certificates of a device's chain: attestation
// key, identity key, provisioner, family, root.
const deviceLength = 5

var (
	// ErrStructure is a chain that has not the exact form.
	ErrStructure = errors.New("certificate chain has not the exact form")
	// ErrRoot is a chain that ends in another root than the pinned one.
	ErrRoot = errors.New("certificate chain does not end in the pinned root")
	// ErrSignature is a chain in which a certificate is not signed by the next.
	ErrSignature = errors.New("certificate is not signed by the next of its chain")
	// ErrTime is a chain that is not valid at this time.
	ErrTime = errors.New("certificate is not valid at this time")
)

// DeviceRoot returns "NVIDIA Device Identity CA".
func DeviceRoot() *x509.Certificate { return mustRoot(deviceRoot) }

// RIMRoot returns "NVIDIA CoRIM signing Root CA".
func RIMRoot() *x509.Certificate { return mustRoot(rimRoot) }

func mustRoot(text []byte) *x509.Certificate {
	chain, err := ParsePEM(text)
	if err != nil || len(chain) != 1 {
		panic(fmt.Sprintf("built-in root: %d certificates, %v", len(chain), err))
	}
	return chain[0]
}

// ParsePEM reads a chain of PEM certificates with nothing between them but white
// space. NULs at the end, the rest of a C buffer, are left out.
func ParsePEM(text []byte) ([]*x509.Certificate, error) {
	if len(text) > maxSize {
		return nil, fmt.Errorf("%w: %d bytes, at most %d are read", ErrStructure, len(text), maxSize)
	}
	var chain []*x509.Certificate
	for text = bytes.TrimSpace(bytes.TrimRight(text, "\x00")); len(text) > 0; text = bytes.TrimSpace(text) {
		if !bytes.HasPrefix(text, []byte("-----BEGIN CERTIFICATE-----")) {
			return nil, fmt.Errorf("%w: something that is no PEM certificate follows certificate %d", ErrStructure, len(chain))
		}
		block, rest := pem.Decode(text)
		if block == nil || len(block.Headers) > 0 {
			return nil, fmt.Errorf("%w: certificate %d is not PEM", ErrStructure, len(chain))
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%w: certificate %d: %w", ErrStructure, len(chain), err)
		}
		chain, text = append(chain, cert), rest
	}
	return chain, nil
}

// VerifyPath checks a chain from leaf to root: form, root and signatures. The
// leaf must be able to sign data, not certificates. It does not look at the time;
// see ValidAt.
func VerifyPath(chain []*x509.Certificate, root *x509.Certificate) error {
	if len(chain) < 2 {
		return fmt.Errorf("%w: %d certificates", ErrStructure, len(chain))
	}
	for i, c := range chain {
		key, ok := c.PublicKey.(*ecdsa.PublicKey)
		switch {
		case !ok || key.Curve != elliptic.P384():
			return fmt.Errorf("%w: %s has no P-384 key", ErrStructure, describe(i, c))
		case len(c.UnhandledCriticalExtensions) > 0:
			return fmt.Errorf("%w: %s has the unknown critical extension %s", ErrStructure, describe(i, c), c.UnhandledCriticalExtensions[0])
		case i == 0 && (c.IsCA || c.KeyUsage&x509.KeyUsageDigitalSignature == 0):
			return fmt.Errorf("%w: %s is not the certificate of a signing key", ErrStructure, describe(i, c))
		case i > 0 && (!c.BasicConstraintsValid || !c.IsCA || c.MaxPathLen == 0 && c.MaxPathLenZero && i > 1 || c.MaxPathLen > 0 && i-1 > c.MaxPathLen):
			return fmt.Errorf("%w: %s may not issue what stands below it", ErrStructure, describe(i, c))
		}
	}
	last := len(chain) - 1
	if !chain[last].Equal(root) {
		return fmt.Errorf("%w: %s, want %s", ErrRoot, describe(last, chain[last]), root.Subject)
	}
	for i, c := range chain[:last] {
		if !bytes.Equal(c.RawIssuer, chain[i+1].RawSubject) {
			return fmt.Errorf("%w: %s was issued by another than %s", ErrSignature, describe(i, c), describe(i+1, chain[i+1]))
		}
		if err := c.CheckSignatureFrom(chain[i+1]); err != nil {
			return fmt.Errorf("%w: %s: %w", ErrSignature, describe(i, c), err)
		}
	}
	return nil
}

// ValidAt checks that every certificate of chain is valid at now.
func ValidAt(chain []*x509.Certificate, now time.Time) error {
	from, to := Validity(chain)
	switch {
	case now.Before(from):
		return fmt.Errorf("%w: the chain of %s begins to be valid on %s, now is %s", ErrTime, chain[0].Subject.CommonName, stamp(from), stamp(now))
	case now.After(to):
		return fmt.Errorf("%w: the chain of %s expired on %s, now is %s", ErrTime, chain[0].Subject.CommonName, stamp(to), stamp(now))
	}
	return nil
}

// Validity returns the time in which all of chain is valid.
func Validity(chain []*x509.Certificate) (from, to time.Time) {
	from, to = chain[0].NotBefore, chain[0].NotAfter
	for _, c := range chain[1:] {
		if c.NotBefore.After(from) {
			from = c.NotBefore
		}
		if c.NotAfter.Before(to) {
			to = c.NotAfter
		}
	}
	return from, to
}

// Device is what a device's chain says of it.
type Device struct {
	Chain  []*x509.Certificate // leaf to root, five
	Key    *ecdsa.PublicKey    // signs reports
	Chip   string              // "GH100", "GB100", "LS10"
	Serial string              // of the leaf, decimal: NVIDIA's ueid
	Model  string              // the identity key's common name: NVIDIA's hwmodel
	FWID   [48]byte            // digest of the firmware that holds Key
}

// VerifyDevice checks a device's chain at now.
func VerifyDevice(chain []*x509.Certificate, root *x509.Certificate, now time.Time) (*Device, error) {
	if len(chain) != deviceLength {
		return nil, fmt.Errorf("%w: %d certificates, a device has %d", ErrStructure, len(chain), deviceLength)
	}
	if err := VerifyPath(chain, root); err != nil {
		return nil, err
	}
	if err := ValidAt(chain, now); err != nil {
		return nil, err
	}
	leaf := chain[0]
	fwid, err := FWID(leaf)
	if err != nil {
		return nil, err
	}
	// "GH100 A01 GSP FMC LF", "GB100 A01 GSP FMC LF", "LS_10 A01 FSP FMC LF"
	chip, _, _ := strings.Cut(leaf.Subject.CommonName, " ")
	return &Device{
		Chain: chain, Key: leaf.PublicKey.(*ecdsa.PublicKey),
		Chip: strings.ReplaceAll(chip, "_", ""), Serial: leaf.SerialNumber.String(),
		Model: chain[1].Subject.CommonName, FWID: fwid,
	}, nil
}

// The TCG extensions that hold the FWID, and the digest algorithm in them.
var (
	oidCompositeID = asn1.ObjectIdentifier{2, 23, 133, 5, 4, 1}
	oidTCBInfo     = asn1.ObjectIdentifier{2, 23, 133, 5, 4, 1, 1}
	oidSHA384      = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 2}
)

type fwid struct {
	Algorithm asn1.ObjectIdentifier
	Digest    []byte
}

// FWID returns the firmware digest of an attestation key's certificate: from
// DICE's CompositeDeviceID (Hopper) or DiceTcbInfo (Blackwell), of which the
// first of two FWIDs counts.
func FWID(c *x509.Certificate) ([48]byte, error) {
	var found []fwid
	for _, e := range c.Extensions {
		var id fwid
		var err error
		switch {
		case e.Id.Equal(oidCompositeID):
			id, err = compositeFWID(e.Value)
		case e.Id.Equal(oidTCBInfo):
			id, err = tcbInfoFWID(e.Value)
		default:
			continue
		}
		if err != nil {
			return [48]byte{}, fmt.Errorf("%w: extension %s of %s: %w", ErrStructure, e.Id, c.Subject.CommonName, err)
		}
		found = append(found, id)
	}
	switch {
	case len(found) != 1:
		return [48]byte{}, fmt.Errorf("%w: %s has %d extensions with a firmware digest, want 1", ErrStructure, c.Subject.CommonName, len(found))
	case !found[0].Algorithm.Equal(oidSHA384) || len(found[0].Digest) != 48:
		return [48]byte{}, fmt.Errorf("%w: %s has a firmware digest of algorithm %s and %d bytes, want SHA-384", ErrStructure, c.Subject.CommonName, found[0].Algorithm, len(found[0].Digest))
	}
	return [48]byte(found[0].Digest), nil
}

func compositeFWID(der []byte) (fwid, error) {
	var id struct {
		Version   int
		PublicKey asn1.RawValue
		FWID      fwid
	}
	err := exactly(der, &id)
	return id.FWID, err
}

// tcbInfoFWID reads field [6] of a DiceTcbInfo, a list of FWIDs.
func tcbInfoFWID(der []byte) (id fwid, err error) {
	var fields []asn1.RawValue
	if err := exactly(der, &fields); err != nil {
		return fwid{}, err
	}
	for _, f := range fields {
		if f.Class == asn1.ClassContextSpecific && f.Tag == 6 {
			_, err := asn1.Unmarshal(f.Bytes, &id)
			return id, err
		}
	}
	return fwid{}, errors.New("DiceTcbInfo has no FWIDs")
}

// exactly reads der, all of it, into v.
func exactly(der []byte, v any) error {
	rest, err := asn1.Unmarshal(der, v)
	if err == nil && len(rest) > 0 {
		err = fmt.Errorf("%d bytes are left over", len(rest))
	}
	return err
}

func describe(i int, c *x509.Certificate) string {
	return fmt.Sprintf("certificate %d (%s)", i, c.Subject.CommonName)
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
