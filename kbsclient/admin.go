package kbsclient

import (
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"time"
)

// Admin makes the calls that need an admin token.
type Admin struct {
	c     *Client
	token func() (string, error)
}

// tokenLife is how long a signed admin token lives: for one call, with room for
// clocks that differ.
const tokenLife = 10 * time.Minute

// NewAdmin signs a token for each call with key. The token suits T and H.
func NewAdmin(cfg Config, key ed25519.PrivateKey) (*Admin, error) {
	c, err := New(cfg)
	if err != nil {
		return nil, err
	}
	return c.admin(key)
}

func (c *Client) admin(key ed25519.PrivateKey) (*Admin, error) {
	if len(key) != ed25519.PrivateKeySize {
		return nil, errors.New("the admin key is no Ed25519 key")
	}
	return &Admin{c: c, token: func() (string, error) {
		now := c.cfg.Now()
		return signToken(key, adminClaims{
			IssuedAt: now.Unix(), Expires: now.Add(tokenLife).Unix(), NotBefore: now.Unix(),
			Issuer: c.cfg.AdminIssuer, Audience: c.cfg.AdminAudience, Role: c.cfg.AdminRole,
		})
	}}, nil
}

// NewAdminToken presents a token that somebody else signed, as H's own tool
// does; an empty one presents none.
func NewAdminToken(cfg Config, token string) (*Admin, error) {
	c, err := New(cfg)
	if err != nil {
		return nil, err
	}
	return &Admin{c: c, token: func() (string, error) { return token, nil }}, nil
}

// ParseAdminKey reads an Ed25519 key in PKCS#8 PEM, as `openssl genpkey
// -algorithm Ed25519` writes it.
func ParseAdminKey(text []byte) (ed25519.PrivateKey, error) {
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, errors.New("admin key: no PEM block PRIVATE KEY (PKCS#8) found")
	}
	defer clear(block.Bytes)
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("admin key: %w", err)
	}
	ed, ok := key.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("admin key: a %T; Trustee takes Ed25519 only", key)
	}
	return ed, nil
}

// adminClaims is what T (times) and H (the rest, and exp) look at.
type adminClaims struct {
	IssuedAt  int64  `json:"iat"`
	Expires   int64  `json:"exp"`
	NotBefore int64  `json:"nbf"`
	Issuer    string `json:"iss,omitempty"`
	Audience  string `json:"aud,omitempty"`
	Role      string `json:"role,omitempty"`
}

func signToken(key ed25519.PrivateKey, claims adminClaims) (string, error) {
	payload, err := json.Marshal(claims)
	if err != nil {
		return "", err
	}
	text := b64url.EncodeToString([]byte(`{"alg":"EdDSA","typ":"JWT"}`)) + "." + b64url.EncodeToString(payload)
	return text + "." + b64url.EncodeToString(ed25519.Sign(key, []byte(text))), nil
}

// do makes an admin call.
func (a *Admin) do(ctx context.Context, r call) ([]byte, error) {
	token, err := a.token()
	if err != nil {
		return nil, fmt.Errorf("%s: admin token: %w", r.op, err)
	}
	if r.header == nil {
		r.header = http.Header{}
	}
	if token != "" {
		r.header.Set("Authorization", "Bearer "+token) // T wants the capital B
	}
	r.kind = opAdmin
	answer, err := a.c.do(ctx, r)
	if err != nil {
		return nil, err
	}
	return answer.body, nil
}

func (a *Admin) postJSON(ctx context.Context, op, path string, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	_, err = a.do(ctx, call{op: op, method: http.MethodPost, path: path, header: jsonHeader(""), body: body, limit: maxErrorBody})
	return err
}

// SetResource stores data, byte for byte, as repository/type/tag. It replaces
// what is there. A KBS with Vault behind it stores UTF-8 text only.
func (a *Admin) SetResource(ctx context.Context, path string, data []byte) error {
	op := "set resource " + path
	if err := checkPath(path); err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	_, err := a.do(ctx, call{op: op, method: http.MethodPost, path: "/resource/" + path,
		header: http.Header{"Content-Type": {"application/octet-stream"}}, body: data, limit: maxErrorBody})
	return err
}

// DeleteResource removes a resource. T cannot: ErrNotSupported.
func (a *Admin) DeleteResource(ctx context.Context, path string) error {
	op := "delete resource " + path
	if err := checkPath(path); err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	_, err := a.do(ctx, call{op: op, method: http.MethodDelete, path: "/resource/" + path, limit: maxErrorBody})
	return err
}

// SetResourcePolicy replaces the KBS's one resource policy. A refused text
// leaves the old one in force. T takes a text with `if` and without `import
// rego.v1`, and then releases everything to everyone: never send it one.
func (a *Admin) SetResourcePolicy(ctx context.Context, rego []byte) error {
	return a.postJSON(ctx, "set resource policy", "/resource-policy",
		map[string]string{"policy": b64url.EncodeToString(rego)})
}

// ResourcePolicy reads the resource policy back. H cannot: ErrNotSupported.
func (a *Admin) ResourcePolicy(ctx context.Context) ([]byte, error) {
	const op = "get resource policy"
	body, err := a.do(ctx, call{op: op, method: http.MethodGet, path: "/resource-policy", limit: maxPolicy})
	if err != nil {
		return nil, err
	}
	if len(body) > 0 && body[0] == '[' { // H lists the policies' names
		return nil, fmt.Errorf("%s: %w", op, ErrNotSupported)
	}
	rego, err := b64url.DecodeString(string(body))
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", op, ErrProtocol, err)
	}
	return rego, nil
}

// SetAttestationPolicy replaces the attestation policy id; the one for CPUs is
// "default_cpu". T and H differ in the rules they read.
func (a *Admin) SetAttestationPolicy(ctx context.Context, id string, rego []byte) error {
	return a.postJSON(ctx, "set attestation policy "+id, "/attestation-policy",
		map[string]string{"type": "rego", "policy_id": id, "policy": b64url.EncodeToString(rego)})
}

// SetReferenceValue registers value, any JSON value, under name.
func (a *Admin) SetReferenceValue(ctx context.Context, name string, value any) error {
	op := "set reference value " + name
	payload, err := json.Marshal(map[string]any{name: value})
	if err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	return a.postJSON(ctx, op, "/reference-value",
		struct {
			Version string `json:"version"`
			Type    string `json:"type"`
			Payload []byte `json:"payload"` // base64 by encoding/json
		}{"0.1.0", "sample", payload})
}

// ReferenceValues is T's JSON object of all reference values.
func (a *Admin) ReferenceValues(ctx context.Context) (json.RawMessage, error) {
	return a.getJSON(ctx, "get reference values", "/reference-value")
}

// ReferenceValue is one reference value at H.
func (a *Admin) ReferenceValue(ctx context.Context, id string) (json.RawMessage, error) {
	return a.getJSON(ctx, "get reference value "+id, "/reference-value/"+id)
}

func (a *Admin) getJSON(ctx context.Context, op, path string) (json.RawMessage, error) {
	body, err := a.do(ctx, call{op: op, method: http.MethodGet, path: path, limit: maxPolicy})
	if err != nil {
		return nil, err
	}
	if !json.Valid(body) {
		return nil, fmt.Errorf("%s: %w: no JSON", op, ErrProtocol)
	}
	return body, nil
}
