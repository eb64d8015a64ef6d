// Package nras has NVIDIA's Remote Attestation Service judge GPUs, and believes
// its answer only as far as its tokens prove it: signed (ES384) with a key of the
// service's published set, in date, about the nonce that was asked, one sub-token
// for each device whose digest the overall token holds, and each of them with
// every check passed.
//
// It trusts the service, and whoever can serve its address with a certificate that
// the HTTP client accepts. Using the service commercially needs a licence of
// NVIDIA.
package nras

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"coffer/internal/gpu"
	"coffer/internal/strict"
)

// URL is NVIDIA's service.
const URL = "https://nras.attestation.nvidia.com"

// maxSize is the longest answer that is read.
const maxSize = 1 << 20

// leeway is how far the service's clock may differ from ours.
const leeway = 2 * time.Minute

// The codes of errors.
const (
	CodeUnreachable gpu.Code = gpu.CodeNRASUnreachable // no answer, or one of a service that is in trouble
	CodeRefused     gpu.Code = "nras-refused"          // it takes the evidence for bad, or the request for wrong
	CodeToken       gpu.Code = "nras-token"            // its tokens do not prove what they say
	CodeDenied      gpu.Code = "nras-denied"           // they prove that a check failed
)

// Client asks the service. It is safe for concurrent use, and must not be copied.
type Client struct {
	URL       string // URL, or another instance
	Key       string // service key, sent as a bearer token where set
	AllowHold bool   // certificates on hold
	HTTP      *http.Client
	Now       func() time.Time

	mu   sync.Mutex
	keys map[string]*ecdsa.PublicKey // by kid
}

// VerifyAll has the service judge devices of one architecture, each asked with
// nonce. It implements gpus.Judge.
func (c *Client) VerifyAll(ctx context.Context, devices []gpu.Evidence, nonce [32]byte) ([]*gpu.Result, error) {
	if len(devices) == 0 {
		return nil, fail(gpu.CodeCount, "no GPU gave evidence")
	}
	type evidence struct {
		Evidence    []byte `json:"evidence"`
		Certificate []byte `json:"certificate"`
	}
	request := struct {
		Nonce   string     `json:"nonce"`
		Arch    string     `json:"arch"`
		Version string     `json:"claims_version"`
		List    []evidence `json:"evidence_list"`
	}{Nonce: hex.EncodeToString(nonce[:]), Arch: devices[0].Arch, Version: "3.0"}
	for i, d := range devices {
		if d.Arch != request.Arch {
			return nil, fail(gpu.CodeMixed, "GPU 0 is %s, GPU %d is %s", request.Arch, i, d.Arch)
		}
		request.List = append(request.List, evidence{d.Report, d.Chain})
	}
	body, err := json.Marshal(request)
	if err != nil {
		return nil, err
	}
	answer, err := c.do(ctx, http.MethodPost, "/v4/attest/gpu", body)
	if err != nil {
		return nil, err
	}
	overall, subs, err := split(answer)
	if err != nil {
		return nil, fail(CodeToken, "answer of %s: %w", c.URL, err)
	}
	return c.judge(ctx, overall, subs, request.Nonce, devices)
}

// split reads [["JWT", overall], {"GPU-0": token, ...}].
func split(answer []byte) (overall string, subs map[string]string, err error) {
	var parts []json.RawMessage
	var first []string
	if err := json.Unmarshal(answer, &parts); err != nil {
		return "", nil, err
	}
	if len(parts) != 2 {
		return "", nil, fmt.Errorf("a list of %d, want an overall token and those of devices", len(parts))
	}
	if err := errors.Join(json.Unmarshal(parts[0], &first), json.Unmarshal(parts[1], &subs)); err != nil {
		return "", nil, err
	}
	if len(first) != 2 || first[0] != "JWT" {
		return "", nil, errors.New("no overall token")
	}
	return first[1], subs, nil
}

// checks are the claims of a device that must be true.
var checks = []string{
	"x-nvidia-gpu-arch-check",
	"x-nvidia-gpu-attestation-report-parsed",
	"x-nvidia-gpu-attestation-report-nonce-match",
	"x-nvidia-gpu-attestation-report-signature-verified",
	"x-nvidia-gpu-attestation-report-cert-chain-fwid-match",
	"x-nvidia-gpu-driver-rim-fetched",
	"x-nvidia-gpu-driver-rim-signature-verified",
	"x-nvidia-gpu-driver-rim-version-match",
	"x-nvidia-gpu-driver-rim-measurements-available",
	"x-nvidia-gpu-vbios-rim-fetched",
	"x-nvidia-gpu-vbios-rim-signature-verified",
	"x-nvidia-gpu-vbios-rim-version-match",
	"x-nvidia-gpu-vbios-rim-measurements-available",
	"x-nvidia-gpu-vbios-index-no-conflict",
	"secboot",
}

func (c *Client) judge(ctx context.Context, overall string, subs map[string]string, nonce string, devices []gpu.Evidence) ([]*gpu.Result, error) {
	claims, err := c.verify(ctx, overall, nonce)
	if err != nil {
		return nil, err
	}
	var submods map[string][]json.RawMessage
	if err := json.Unmarshal(claims["submods"], &submods); err != nil {
		return nil, fail(CodeToken, "overall token: submods: %w", err)
	}
	if len(submods) != len(devices) || len(subs) != len(devices) {
		return nil, fail(CodeToken, "%d devices were sent, the answer is about %d with %d tokens", len(devices), len(submods), len(subs))
	}
	if string(claims["x-nvidia-overall-att-result"]) != "true" {
		return nil, fail(CodeDenied, "the overall result is %s", claims["x-nvidia-overall-att-result"])
	}
	var results []*gpu.Result
	for i, d := range devices {
		name := "GPU-" + strconv.Itoa(i)
		sum := sha256.Sum256([]byte(subs[name]))
		var kind string
		var digest []string
		if len(submods[name]) == 2 {
			err = errors.Join(json.Unmarshal(submods[name][0], &kind), json.Unmarshal(submods[name][1], &digest))
		}
		if err != nil || kind != "DIGEST" || len(digest) != 2 || strings.ReplaceAll(digest[0], "-", "") != "SHA256" || !strings.EqualFold(digest[1], hex.EncodeToString(sum[:])) {
			return nil, fail(CodeToken, "the overall token is not about the token of %s", name)
		}
		claims, err := c.verify(ctx, subs[name], nonce)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		r, err := result(claims, d)
		if err != nil {
			return append(results, r), fmt.Errorf("GPU %d: %w", i, err)
		}
		results = append(results, r)
	}
	return results, nil
}

// result reads the claims of a device, whose evidence they must be about.
func result(claims map[string]json.RawMessage, d gpu.Evidence) (*gpu.Result, error) {
	text := func(name string) (s string) {
		_ = json.Unmarshal(claims[name], &s) // what is no text is not what is wanted
		return s
	}
	for _, name := range checks {
		if string(claims[name]) != "true" {
			return nil, fail(CodeDenied, "claim %s is %s", name, claims[name])
		}
	}
	if got := text("measres"); got != "success" {
		return nil, fail(CodeDenied, "claim measres is %q: %s", got, claims["x-nvidia-mismatch-measurement-records"])
	}
	if got := text("dbgstat"); got != "disabled" {
		return nil, fail(CodeDenied, "claim dbgstat is %q", got)
	}
	serial, err := gpu.Serial(d.Chain)
	if err != nil {
		return nil, fail(gpu.CodeChainStructure, "%w", err)
	}
	if got := text("ueid"); got != serial {
		return nil, fail(CodeToken, "the token is about device %s, asked was about %s", got, serial)
	}
	r := &gpu.Result{
		Arch: d.Arch, UUID: d.UUID, Serial: serial, Model: text("hwmodel"), OEMID: text("oemid"), Nonce: text("eat_nonce"),
		Driver: text("x-nvidia-gpu-driver-version"), VBIOS: text("x-nvidia-gpu-vbios-version"), FeatureFlag: -1, Verified: true,
	}
	if w := text("x-nvidia-attestation-warning"); w != "" {
		r.Warnings = []string{w}
	}
	return r, nil
}

// verify checks a token of the service and returns its claims.
func (c *Client) verify(ctx context.Context, token, nonce string) (map[string]json.RawMessage, error) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return nil, fail(CodeToken, "not a token: %.40q", token)
	}
	var header struct {
		Alg, Kid string
		Crit     []string
	}
	var claims map[string]json.RawMessage
	var signature []byte
	var decoded [3][]byte
	for i, p := range parts {
		b, err := base64.RawURLEncoding.DecodeString(p)
		if err != nil {
			return nil, fail(CodeToken, "not a token: %w", err)
		}
		decoded[i] = b
	}
	if err := errors.Join(json.Unmarshal(decoded[0], &header), json.Unmarshal(decoded[1], &claims)); err != nil {
		return nil, fail(CodeToken, "not a token: %w", err)
	}
	if signature = decoded[2]; header.Alg != "ES384" || len(header.Crit) > 0 || len(signature) != 96 {
		return nil, fail(CodeToken, "token of algorithm %q, want ES384", header.Alg)
	}
	key, err := c.key(ctx, header.Kid)
	if err != nil {
		return nil, err
	}
	digest := sha512.Sum384([]byte(parts[0] + "." + parts[1]))
	if !ecdsa.Verify(key, digest[:], new(big.Int).SetBytes(signature[:48]), new(big.Int).SetBytes(signature[48:])) {
		return nil, fail(CodeToken, "the token's signature is wrong")
	}
	return claims, c.checkClaims(claims, nonce)
}

func (c *Client) checkClaims(claims map[string]json.RawMessage, nonce string) error {
	var issuer, about string
	var begin, end int64
	if err := errors.Join(
		json.Unmarshal(claims["iss"], &issuer), json.Unmarshal(claims["eat_nonce"], &about),
		json.Unmarshal(claims["nbf"], &begin), json.Unmarshal(claims["exp"], &end),
	); err != nil {
		return fail(CodeToken, "the token lacks iss, eat_nonce, nbf or exp: %w", err)
	}
	now := c.Now()
	switch {
	case issuer != strings.TrimSuffix(c.URL, "/"):
		return fail(CodeToken, "the token is of %q, asked was %q", issuer, c.URL)
	case !strings.EqualFold(about, nonce):
		return fail(CodeToken, "the token is about nonce %.80q, asked was %s", about, nonce)
	case now.Add(leeway).Before(time.Unix(begin, 0)) || now.Add(-leeway).After(time.Unix(end, 0)):
		return fail(CodeToken, "the token is valid from %s to %s, now is %s", time.Unix(begin, 0).UTC(), time.Unix(end, 0).UTC(), now.UTC())
	}
	return nil
}

// key returns a key of the service's set, which is fetched for a kid that is new.
func (c *Client) key(ctx context.Context, kid string) (*ecdsa.PublicKey, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if k, ok := c.keys[kid]; ok {
		return k, nil
	}
	body, err := c.do(ctx, http.MethodGet, "/.well-known/jwks.json", nil)
	if err != nil {
		return nil, err
	}
	var set struct {
		Keys []struct{ Kty, Crv, Kid, X, Y string }
	}
	if err := json.Unmarshal(body, &set); err != nil {
		return nil, fail(CodeToken, "keys of %s: %w", c.URL, err)
	}
	keys := map[string]*ecdsa.PublicKey{}
	for _, k := range set.Keys {
		x, errX := base64.RawURLEncoding.DecodeString(k.X)
		y, errY := base64.RawURLEncoding.DecodeString(k.Y)
		if k.Kty != "EC" || k.Crv != "P-384" || errX != nil || errY != nil || len(x) != 48 || len(y) != 48 {
			continue
		}
		if key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P384(), bytes.Join([][]byte{{4}, x, y}, nil)); err == nil {
			keys[k.Kid] = key
		}
	}
	c.keys = keys
	if k, ok := keys[kid]; ok {
		return k, nil
	}
	return nil, fail(CodeToken, "the token is signed with key %q, which %s does not publish", kid, c.URL)
}

func (c *Client) do(ctx context.Context, method, path string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, strings.TrimSuffix(c.URL, "/")+path, bytes.NewReader(body))
	if err != nil {
		return nil, fail(CodeUnreachable, "%w", err)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if c.Key != "" {
		req.Header.Set("Authorization", "Bearer "+c.Key)
	}
	if c.AllowHold {
		req.Header.Set("X-NVIDIA-OCSP-ALLOW-CERT-HOLD", "true")
	}
	resp, err := c.HTTP.Do(req)
	if err != nil {
		return nil, fail(CodeUnreachable, "%w", err)
	}
	defer resp.Body.Close()
	answer, err := strict.ReadAll(resp.Body, maxSize)
	switch status := resp.StatusCode; {
	case err != nil:
		return nil, fail(CodeUnreachable, "%s: %w", path, err)
	case status == http.StatusOK:
		return answer, nil
	case status >= 500 || status == http.StatusTooManyRequests || status == http.StatusUnauthorized || status == http.StatusForbidden || body == nil:
		// A key that is missing or has run out says nothing about the device either.
		return nil, fail(CodeUnreachable, "%s answered %s: %.300q", req.URL, resp.Status, answer)
	default:
		return nil, fail(CodeRefused, "%s answered %s: %.300q", req.URL, resp.Status, answer)
	}
}

func fail(code gpu.Code, format string, args ...any) error {
	return &gpu.Error{Code: code, Err: fmt.Errorf(format, args...)}
}
