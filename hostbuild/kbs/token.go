package kbs

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"path/filepath"
	"strings"
	"time"
)

const (
	tokenLife   = 5 * time.Minute
	tokenLeeway = time.Minute // as Trustee
	cpuSubmod   = "cpu0"
	annotated   = "ear.veraison.annotated-evidence"
	eatProfile  = "tag:github.com,2024:confidential-containers/Trustee"
	issuer      = "coffer-kbs"
)

// signer makes and verifies attestation tokens: EAR as ES256 JWT.
type signer struct {
	key     *ecdsa.PrivateKey
	dialect Dialect
	header  string // encoded
}

func loadSigner(dir string, d Dialect) (*signer, error) {
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, tokenCertFile), filepath.Join(dir, tokenKeyFile))
	if err != nil {
		return nil, err
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s: not an EC key", tokenKeyFile)
	}
	x, y, err := coordinates(&key.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", tokenKeyFile, err)
	}
	if x[0] == 0 || y[0] == 0 {
		return nil, fmt.Errorf("%s: x or y of the key begins with a zero byte, and older Trustee then refuses every token; make a new key", tokenKeyFile)
	}
	chain := make([]string, len(pair.Certificate))
	for i, der := range pair.Certificate {
		if d == DialectT {
			chain[i] = base64.RawURLEncoding.EncodeToString(der)
		} else {
			chain[i] = base64.StdEncoding.EncodeToString(der)
		}
	}
	type jwk struct {
		ALG string   `json:"alg"`
		X5C []string `json:"x5c"`
		KTY string   `json:"kty"`
		CRV string   `json:"crv"`
		X   string   `json:"x"`
		Y   string   `json:"y"`
	}
	header, err := json.Marshal(struct {
		Typ string `json:"typ"`
		Alg string `json:"alg"`
		JWK jwk    `json:"jwk"`
	}{"JWT", "ES256", jwk{"ES256", chain, "EC", "P-256", b64.EncodeToString(x), b64.EncodeToString(y)}})
	if err != nil {
		return nil, err
	}
	return &signer{key: key, dialect: d, header: b64.EncodeToString(header)}, nil
}

// issue makes the token about verified evidence, and that of devices beside it.
func (s *signer) issue(evidence map[string]any, a appraisal, devices []map[string]any, simulated bool, now time.Time) (string, error) {
	submods := map[string]any{cpuSubmod: s.submod(evidence, a)}
	for i, d := range devices {
		submods[fmt.Sprintf("gpu%d", i)] = s.submod(d, appraiseDevice)
	}
	build := "coffer kbs"
	if simulated {
		build += " (simulated evidence)"
	}
	payload := map[string]any{
		"eat_profile":     eatProfile,
		"iat":             now.Unix(),
		"exp":             now.Add(tokenLife).Unix(),
		"ear.verifier-id": map[string]any{"developer": "coffer", "build": build},
		"submods":         submods,
	}
	if s.dialect == DialectH {
		payload["iss"] = issuer
	}
	b, err := json.Marshal(payload)
	if err != nil {
		return "", err
	}
	signed := s.header + "." + b64.EncodeToString(b)
	digest := sha256.Sum256([]byte(signed))
	r, ss, err := ecdsa.Sign(rand.Reader, s.key, digest[:])
	if err != nil {
		return "", err
	}
	sig := make([]byte, 64)
	r.FillBytes(sig[:32])
	ss.FillBytes(sig[32:])
	return signed + "." + b64.EncodeToString(sig), nil
}

// submod is the part of a token about one piece of evidence.
func (s *signer) submod(evidence map[string]any, a appraisal) map[string]any {
	vector := map[string]any{"executables": a.executables, "hardware": a.hardware, "configuration": a.configuration}
	submod := map[string]any{
		"ear.status":                 a.status(),
		"ear.trustworthiness-vector": vector,
		"ear.appraisal-policy-id":    "default",
		annotated:                    evidence,
	}
	if s.dialect == DialectH {
		submod["ear.trustee.identifiers"] = map[string]any{"validated": map[string]any{}}
		for _, name := range []string{"instance-identity", "file-system", "runtime-opaque", "storage-opaque", "sourced-data"} {
			vector[name] = 0
		}
	}
	return submod
}

// verify returns the claims of a token that this server signed and that has not
// expired. The key in the token's own header counts for nothing.
func (s *signer) verify(token string, now time.Time) (map[string]any, error) {
	i := strings.LastIndexByte(token, '.')
	if i < 0 {
		return nil, errors.New("not a token")
	}
	signed := token[:i]
	header, _, ok := strings.Cut(signed, ".")
	sig, err := b64.DecodeString(token[i+1:])
	if !ok || err != nil || len(sig) != 64 {
		return nil, errors.New("not a token")
	}
	var h struct {
		Alg string `json:"alg"`
	}
	if b, err := b64.DecodeString(header); err != nil || json.Unmarshal(b, &h) != nil || h.Alg != "ES256" {
		return nil, errors.New("not an ES256 token")
	}
	digest := sha256.Sum256([]byte(signed))
	if !ecdsa.Verify(&s.key.PublicKey, digest[:], new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:])) {
		return nil, errors.New("the signature is not this server's")
	}
	return s.read(token, now)
}

// read is verify for a token that is known to be this server's.
func (s *signer) read(token string, now time.Time) (map[string]any, error) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return nil, errors.New("not a token")
	}
	b, err := b64.DecodeString(parts[1])
	if err != nil {
		return nil, err
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber()
	var claims map[string]any
	if err := dec.Decode(&claims); err != nil {
		return nil, err
	}
	n, _ := claims["exp"].(json.Number)
	exp, err := n.Int64()
	if err != nil {
		return nil, errors.New("the token has no exp")
	}
	if !now.Before(time.Unix(exp, 0).Add(tokenLeeway)) {
		return nil, errors.New("the token has expired")
	}
	return claims, nil
}

// evidenceOf returns the annotated evidence of a token's CPU.
func evidenceOf(claims map[string]any) map[string]any {
	submods, _ := claims["submods"].(map[string]any)
	cpu, _ := submods[cpuSubmod].(map[string]any)
	evidence, _ := cpu[annotated].(map[string]any)
	return evidence
}

// keyOf returns the key that the token's evidence binds.
func keyOf(claims map[string]any) (teeKey, error) {
	runtime, _ := evidenceOf(claims)["runtime_data_claims"].(map[string]any)
	b, err := json.Marshal(runtime["tee-pubkey"])
	var k teeKey
	if err == nil {
		err = json.Unmarshal(b, &k)
	}
	if err != nil || k.KTY == "" {
		return teeKey{}, errors.New("the token names no tee-pubkey")
	}
	return k, nil
}
