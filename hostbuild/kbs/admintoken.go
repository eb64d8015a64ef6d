package kbs

import (
	"crypto/ed25519"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

const (
	adminLeeway   = time.Minute
	maxAdminToken = 16 << 10
	adminRole     = "admin"
)

// errNoBearer says that a request carries no `Authorization: Bearer`, a word
// that Trustee takes in this case only.
var errNoBearer = errors.New("Failed to parse HTTP Auth Bearer header")

// adminVerifier holds the public key of the administrators.
type adminVerifier struct {
	key              ed25519.PublicKey
	issuer, audience string // wanted in dialect H, unless empty
}

func loadAdmin(file string) (adminVerifier, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return adminVerifier{}, err
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return adminVerifier{}, fmt.Errorf("%s: no PEM", adminPubFile)
	}
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return adminVerifier{}, fmt.Errorf("%s: %w", adminPubFile, err)
	}
	pub, ok := key.(ed25519.PublicKey)
	if !ok {
		return adminVerifier{}, fmt.Errorf("%s: not an Ed25519 key", adminPubFile)
	}
	return adminVerifier{key: pub}, nil
}

// bearer returns the token of an Authorization header.
func bearer(header string) (string, error) {
	tok, ok := strings.CutPrefix(header, "Bearer ")
	if !ok || tok == "" {
		return "", errNoBearer
	}
	return tok, nil
}

// check verifies the token of an Authorization header: EdDSA with the admin key,
// exp required, exp, nbf and iat with a minute's leeway; dialect H also wants the
// role `admin`, and issuer and audience where they are configured. Trustee's older
// server lives with tokens that never expire; this one does not.
func (v adminVerifier) check(header string, d Dialect, now time.Time) error {
	tok, err := bearer(header)
	if err != nil {
		return err
	}
	if len(tok) > maxAdminToken {
		return errors.New("the token is too long")
	}
	parsed, err := jwt.ParseSigned(tok, []jose.SignatureAlgorithm{jose.EdDSA})
	if err != nil {
		return err
	}
	var claims struct {
		Exp  *jwt.NumericDate `json:"exp"`
		Nbf  *jwt.NumericDate `json:"nbf"`
		Iat  *jwt.NumericDate `json:"iat"`
		Role *string          `json:"role"`
		Iss  string           `json:"iss"`
		Aud  jwt.Audience     `json:"aud"`
	}
	if err := parsed.Claims(v.key, &claims); err != nil {
		return err
	}
	switch {
	case claims.Exp == nil:
		return errors.New("the token has no exp")
	case now.Add(-adminLeeway).After(claims.Exp.Time()):
		return errors.New("the token has expired")
	case claims.Nbf != nil && now.Add(adminLeeway).Before(claims.Nbf.Time()):
		return errors.New("the token is not valid yet (nbf)")
	case claims.Iat != nil && now.Add(adminLeeway).Before(claims.Iat.Time()):
		return errors.New("the token is from the future (iat)")
	}
	if d == DialectH {
		if claims.Role == nil {
			return errors.New("missing the claim `role`")
		}
		if *claims.Role != adminRole {
			return fmt.Errorf("role %.40q is not allowed", *claims.Role)
		}
		if v.issuer != "" && claims.Iss != v.issuer {
			return fmt.Errorf("issuer %.40q is not %q", claims.Iss, v.issuer)
		}
		if v.audience != "" && !claims.Aud.Contains(v.audience) {
			return fmt.Errorf("the audience is not %q", v.audience)
		}
	}
	return nil
}
