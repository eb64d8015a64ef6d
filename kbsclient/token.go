package kbsclient

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Claims is what an attestation token (EAR) says, as far as it is the same at T
// and H. The token's signature is not verified here: a token from Attest came
// over TLS from the KBS that made it.
type Claims struct {
	Issued, Expires time.Time // zero if absent
	// Submods are the appraised parts by name: cpu0, gpu0, ...
	Submods map[string]Submod

	nonce string // that the evidence was made for, "" if the token has none
}

// Submod is the verdict on one part.
type Submod struct {
	// Status is "none", "affirming", "warning" or "contraindicated", as the
	// KBS's attestation policy has it.
	Status string `json:"ear.status"`
}

// ParseToken reads the claims of a compact JWT.
func ParseToken(token string) (*Claims, error) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 || parts[2] == "" {
		return nil, errors.New("token: not three parts")
	}
	for _, part := range []string{parts[0], parts[2]} {
		if _, err := b64url.DecodeString(part); err != nil {
			return nil, fmt.Errorf("token: %w", err)
		}
	}
	payload, err := b64url.DecodeString(parts[1])
	if err != nil {
		return nil, fmt.Errorf("token: %w", err)
	}
	var p struct {
		IssuedAt int64 `json:"iat"`
		Expires  int64 `json:"exp"`
		Submods  map[string]struct {
			Submod
			Evidence struct {
				RuntimeData struct {
					Nonce string `json:"nonce"`
				} `json:"runtime_data_claims"`
			} `json:"ear.veraison.annotated-evidence"`
		} `json:"submods"`
	}
	if err := json.Unmarshal(payload, &p); err != nil {
		return nil, fmt.Errorf("token: %w", err)
	}
	c := &Claims{Submods: map[string]Submod{}, nonce: p.Submods["cpu0"].Evidence.RuntimeData.Nonce}
	if p.IssuedAt != 0 {
		c.Issued = time.Unix(p.IssuedAt, 0)
	}
	if p.Expires != 0 {
		c.Expires = time.Unix(p.Expires, 0)
	}
	for name, m := range p.Submods {
		c.Submods[name] = m.Submod
	}
	return c, nil
}
