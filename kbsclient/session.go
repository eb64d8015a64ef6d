package kbsclient

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"regexp"
)

// ProtocolVersion is the version of the handshake; Trustee takes no other.
const ProtocolVersion = "0.4.0"

// Attester gives evidence.
type Attester interface {
	// TEE is the KBS's name of the kind of evidence: "snp", "sample".
	TEE() string
	// Evidence is the primary_evidence, a JSON object, over digest: for snp the
	// report data is the digest and 16 zero bytes.
	Evidence(ctx context.Context, digest [48]byte) (json.RawMessage, error)
}

// DeviceAttester is an Attester with further devices, such as GPUs.
type DeviceAttester interface {
	// AdditionalEvidence is "" or the text of a JSON object from TEE name to
	// evidence over digest (nvidia: the SPDM nonce is its first 32 bytes). It is
	// sent and hashed byte for byte. nvidia is never sent to T, which crashes on
	// it: the handshake fails with ErrOldKBS.
	AdditionalEvidence(ctx context.Context, digest [48]byte) (string, error)
}

// Option changes one handshake.
type Option func(*options)

type options struct {
	initData string
	key      teeKey
}

// WithInitData sends init-data: TOML text with version, algorithm and a table
// [data]. The KBS compares its digest with the report's HOST_DATA; see HostData.
func WithInitData(toml string) Option { return func(o *options) { o.initData = toml } }

// WithTEEKey uses the given key, which stays the caller's, instead of a fresh one.
func WithTEEKey(k *TEEKey) Option { return func(o *options) { o.key = k.key } }

// Session is an attested session. The KBS keeps it for some minutes (5 by
// default), then Resource fails with ErrTokenNotFound.
type Session struct {
	c      *Client
	key    teeKey
	ownKey bool
	cookie string
	bearer bool // present the token instead of a cookie
	token  string
	claims *Claims
}

// Resume is a session for a token of an earlier one whose key was k. Resources
// are asked for with the token as bearer, for which a KBS may find it too long.
func (c *Client) Resume(token string, k *TEEKey) (*Session, error) {
	claims, err := ParseToken(token)
	if err != nil {
		return nil, err
	}
	return &Session{c: c, key: k.key, bearer: true, token: token, claims: claims}, nil
}

type authRequest struct {
	Version     string `json:"version"`
	TEE         string `json:"tee"`
	ExtraParams struct {
		Hashes []string `json:"supported-hash-algorithms"`
	} `json:"extra-params"`
}

type challenge struct {
	Nonce       string          `json:"nonce"`
	ExtraParams json.RawMessage `json:"extra-params"`
}

type attestRequest struct {
	InitData    *initData `json:"init-data"`
	RuntimeData struct {
		Nonce     string `json:"nonce"`
		TEEPubKey object `json:"tee-pubkey"`
	} `json:"runtime-data"`
	TEEEvidence struct {
		Primary    json.RawMessage `json:"primary_evidence"`
		Additional string          `json:"additional_evidence"`
	} `json:"tee-evidence"`
}

type initData struct {
	Format string `json:"format"`
	Body   string `json:"body"`
}

// Attest makes a handshake with a fresh key: it asks for a challenge, collects
// evidence over challenge and key, and has the KBS verify it.
//
// Success means that the evidence is genuine and fresh, no more: see the
// package comment.
func (c *Client) Attest(ctx context.Context, a Attester, opts ...Option) (*Session, error) {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.AttestTimeout)
	defer cancel()
	var o options
	for _, opt := range opts {
		opt(&o)
	}
	s := &Session{c: c, key: o.key}
	if s.key == nil {
		key, err := generateECKey(c.cfg.Rand)
		if err != nil {
			return nil, err
		}
		s.key, s.ownKey = key, true
	}
	if err := s.attest(ctx, a, o.initData); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func (s *Session) attest(ctx context.Context, a Attester, initDataTOML string) error {
	nonce, err := s.auth(ctx, a.TEE())
	if err != nil {
		return err
	}
	var req attestRequest
	pub := s.key.public()
	req.RuntimeData.Nonce, req.RuntimeData.TEEPubKey = nonce, pub
	if initDataTOML != "" {
		req.InitData = &initData{Format: "toml", Body: initDataTOML}
	}

	// The devices come first: the CPU's evidence covers theirs.
	if devices, ok := a.(DeviceAttester); ok {
		digest, err := deviceDigest(nonce, pub)
		if err != nil {
			return err
		}
		additional, err := devices.AdditionalEvidence(ctx, digest)
		if err != nil {
			return fmt.Errorf("evidence of additional devices: %w", err)
		}
		if additional != "" && !isObject([]byte(additional)) {
			return errors.New("evidence of additional devices is no JSON object")
		}
		if hasMember(additional, "nvidia") {
			if err := s.c.takesNVIDIA(ctx); err != nil {
				return err
			}
		}
		req.TEEEvidence.Additional = additional
	}
	digest, err := primaryDigest(req.TEEEvidence.Additional, nonce, pub)
	if err != nil {
		return err
	}
	if req.TEEEvidence.Primary, err = a.Evidence(ctx, digest); err != nil {
		return fmt.Errorf("evidence: %w", err)
	}
	if !isObject(req.TEEEvidence.Primary) {
		return errors.New("evidence is no JSON object")
	}
	body, err := json.Marshal(req)
	if err != nil {
		return fmt.Errorf("attest: %w", err)
	}
	return s.attestWith(ctx, body, nonce)
}

// newTEE is a name of a TEE that a KBS knows if it verifies nvidia evidence:
// Trustee took it up in the same month of 2025, a little later.
const newTEE = "az-snp-vtpm"

// takesNVIDIA fails where the KBS is of a generation that crashes at nvidia
// evidence. It asks for a challenge that nobody answers.
func (c *Client) takesNVIDIA(ctx context.Context) error {
	_, err := (&Session{c: c}).auth(ctx, newTEE)
	if errors.Is(err, ErrAttestationRefused) {
		return fmt.Errorf("evidence of GPUs is not sent to %s: %w", c.host, ErrOldKBS)
	}
	return err
}

// auth asks for a challenge and keeps the session's cookie.
func (s *Session) auth(ctx context.Context, tee string) (nonce string, err error) {
	req := authRequest{Version: ProtocolVersion, TEE: tee}
	req.ExtraParams.Hashes = []string{"sha384"} // the length that Attester knows
	body, err := json.Marshal(req)
	if err != nil {
		return "", err
	}
	a, err := s.c.do(ctx, call{op: "request a challenge", kind: opAttest, method: http.MethodPost, path: "/auth",
		header: jsonHeader(""), body: body, limit: maxChallenge})
	if err != nil {
		return "", err
	}
	if nonce, err = parseChallenge(a.body); err != nil {
		return "", fmt.Errorf("request a challenge: %w: %w", ErrProtocol, err)
	}
	if s.cookie = sessionCookie(a.header); s.cookie == "" {
		return "", fmt.Errorf("request a challenge: %w: no session cookie", ErrProtocol)
	}
	return nonce, nil
}

func (s *Session) attestWith(ctx context.Context, body []byte, nonce string) error {
	a, err := s.c.do(ctx, call{op: "attest", kind: opAttest, method: http.MethodPost, path: "/attest",
		header: jsonHeader(s.cookie), body: body, limit: maxToken})
	if err != nil {
		return err
	}
	var answer struct {
		Token string `json:"token"`
	}
	if err := json.Unmarshal(a.body, &answer); err != nil {
		return fmt.Errorf("attest: %w: %w", ErrProtocol, err)
	}
	if s.claims, err = ParseToken(answer.Token); err != nil {
		return fmt.Errorf("attest: %w: %w", ErrProtocol, err)
	}
	if s.claims.nonce != "" && s.claims.nonce != nonce {
		return fmt.Errorf("attest: %w: the token is of another handshake", ErrProtocol)
	}
	s.token = answer.Token
	if cookie := sessionCookie(a.header); cookie != "" {
		s.cookie = cookie
	}
	return nil
}

// Token is the attestation token, a signed JWT. It proves nothing to whom does
// not verify its signature, and is as good as a password to the KBS when it is
// presented with the session's key.
func (s *Session) Token() string { return s.token }

// Claims is what the token says.
func (s *Session) Claims() *Claims { return s.claims }

// Resource fetches and decrypts the resource repository/type/tag. The caller
// wipes it.
func (s *Session) Resource(ctx context.Context, path string) ([]byte, error) {
	op := "get resource " + path
	if err := checkPath(path); err != nil {
		return nil, fmt.Errorf("%s: %w", op, err)
	}
	get := func(name, value string) (*answer, error) {
		return s.c.do(ctx, call{op: op, kind: opResource, method: http.MethodGet, path: "/resource/" + path,
			header: http.Header{name: {value}}, limit: maxResource})
	}
	var a *answer
	var err error
	if !s.bearer { // a bearer beside it may be too long for the KBS
		a, err = get("Cookie", cookieName+"="+s.cookie)
	}
	if s.bearer || errors.Is(err, ErrTokenNotFound) && len(s.token) <= maxBearer {
		// A KBS that was restarted has forgotten the session; its token still counts.
		var again error
		if a, again = get("Authorization", "Bearer "+s.token); s.bearer || !errors.Is(again, ErrTokenInvalid) {
			err = again
		}
	}
	if err != nil {
		return nil, err
	}
	plain, err := decryptJWE(a.body, s.key)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", op, ErrProtocol, err)
	}
	return plain, nil
}

// Close wipes the session's key. Copies that the Go runtime made of it while it
// was in use cannot be reached.
func (s *Session) Close() {
	if s.ownKey {
		s.key.wipe()
	}
}

const (
	cookieName = "kbs-session-id"
	maxBearer  = 32 << 10 // bytes of a token that fits a KBS's request head
	maxCookie  = 128      // bytes of a session's name
	minNonce   = 16       // bytes of a challenge's text
	maxNonce   = 1000
)

// No counted repetitions: a guest's start would wait for their compilation.
var (
	cookieValue  = regexp.MustCompile(`^[A-Za-z0-9_-]+$`)
	resourcePath = regexp.MustCompile(`^[a-zA-Z0-9_-][a-zA-Z0-9_.-]*(/[a-zA-Z0-9_-][a-zA-Z0-9_.-]*){2}$`)
	nonceText    = regexp.MustCompile(`^[A-Za-z0-9+/=_-]+$`)
)

func checkPath(path string) error {
	if !resourcePath.MatchString(path) {
		return fmt.Errorf("%q is not repository/type/tag of letters, digits, '_', '-' and '.' (not in front)", path)
	}
	return nil
}

// sessionCookie is the value of the KBS's cookie, "" if there is none. Its
// attributes are ignored: it expires by the KBS's clock, and the KBS says so.
func sessionCookie(h http.Header) string {
	for _, c := range (&http.Response{Header: h}).Cookies() {
		if c.Name == cookieName && len(c.Value) <= maxCookie && cookieValue.MatchString(c.Value) {
			return c.Value
		}
	}
	return ""
}

func jsonHeader(cookie string) http.Header {
	h := http.Header{"Content-Type": {"application/json"}}
	if cookie != "" {
		h.Set("Cookie", cookieName+"="+cookie)
	}
	return h
}

// parseChallenge gives the nonce. extra-params is "" at Trustee; where it names
// a hash it must be the one we have.
func parseChallenge(body []byte) (nonce string, err error) {
	var ch challenge
	if err := json.Unmarshal(body, &ch); err != nil {
		return "", fmt.Errorf("challenge: %w", err)
	}
	if n := len(ch.Nonce); n < minNonce || n > maxNonce || !nonceText.MatchString(ch.Nonce) {
		return "", errors.New("challenge: the nonce is no base64 text")
	}
	if isObject(ch.ExtraParams) {
		var extra struct {
			Hash string `json:"selected-hash-algorithm"`
		}
		if err := json.Unmarshal(ch.ExtraParams, &extra); err != nil {
			return "", fmt.Errorf("challenge: extra-params: %w", err)
		}
		if extra.Hash != "" && extra.Hash != "sha384" {
			return "", fmt.Errorf("challenge: hash algorithm %q, offered sha384", printable(extra.Hash))
		}
	}
	return ch.Nonce, nil
}

// hasMember reports whether text is an object with that member.
func hasMember(text, name string) bool {
	var m map[string]json.RawMessage
	return json.Unmarshal([]byte(text), &m) == nil && m[name] != nil
}

func isObject(b []byte) bool {
	b = bytes.TrimLeft(b, " \t\r\n")
	return len(b) > 0 && b[0] == '{' && json.Valid(b)
}
