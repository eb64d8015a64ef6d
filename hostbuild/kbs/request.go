package kbs

import (
	"bytes"
	"crypto/sha512"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
)

const protocolVersion = "0.4.0"

// Errors of /auth whose words a client sees.
var (
	errRequest      = errors.New("deserialize Request")
	errVersionForm  = errors.New("failed to parse KBS version")
	errNoChallenger = errors.New("Attestation Service generate challenge failed")
)

// tees are the names that Trustee's /auth takes.
func (d Dialect) tees() []string {
	common := []string{"nvidia", "sgx", "snp", "tdx", "cca", "csv", "se", "hygondcu", "tpm", teeSample, "sampledevice"}
	if d == DialectT {
		return append(common, "azsnpvtpm", "aztdxvtpm", "sev")
	}
	return append(common, "az-snp-vtpm", "az-tdx-vtpm", "nvidiadpu", "nvidia-dpu")
}

// parseAuth reads the body of /auth and returns the TEE's name.
func parseAuth(body []byte, d Dialect) (tee string, err error) {
	m, err := members(body)
	if err != nil {
		return "", fmt.Errorf("%w: %w", errRequest, err)
	}
	var version string
	for name, to := range map[string]any{"version": &version, "tee": &tee, "extra-params": new(json.RawMessage)} {
		if err := member(m, name, to); err != nil {
			return "", fmt.Errorf("%w: %w", errRequest, err)
		}
	}
	if !slices.Contains(d.tees(), tee) {
		return "", fmt.Errorf("%w: unknown tee %.40q", errRequest, tee)
	}
	base, _, _ := strings.Cut(version, "+")
	core, _, _ := strings.Cut(base, "-")
	if parts := strings.Split(core, "."); len(version) > 64 || len(parts) != 3 || slices.ContainsFunc(parts, notNumber) {
		return "", errVersionForm
	}
	if base != protocolVersion {
		return "", fmt.Errorf("KBS Client Protocol Version Mismatch: expect =%s while the request is %s", protocolVersion, version)
	}
	if tee == "se" {
		return "", errNoChallenger
	}
	return tee, nil
}

func notNumber(s string) bool {
	return s == "" || strings.Trim(s, "0123456789") != "" || len(s) > 1 && s[0] == '0'
}

// attestation is the body of /attest.
type attestation struct {
	runtime, evidence, initData json.RawMessage
}

func parseAttestation(body []byte) (a attestation, err error) {
	m, err := members(body)
	if err != nil {
		return a, err
	}
	if err := member(m, "runtime-data", &a.runtime); err != nil {
		return a, err
	}
	if err := member(m, "tee-evidence", &a.evidence); err != nil {
		return a, err
	}
	a.initData = m["init-data"]
	return a, nil
}

// bound is what evidence must be about, and what of it a token repeats.
type bound struct {
	nonce      string
	key        map[string]string // tee-pubkey, the members that count
	additional string
	primary    json.RawMessage
}

// parse reads the members of an attestation that count.
func (a attestation) parse() (b bound, err error) {
	runtime, err := members(a.runtime)
	if err != nil {
		return b, fmt.Errorf("runtime-data: %w", err)
	}
	if err := member(runtime, "nonce", &b.nonce); err != nil {
		return b, fmt.Errorf("runtime-data: %w", err)
	}
	key, err := members(runtime["tee-pubkey"])
	if err != nil {
		return b, fmt.Errorf("tee-pubkey: %w", err)
	}
	b.key = map[string]string{}
	names := []string{"kty", "alg"}
	for i := 0; i < len(names); i++ {
		var v string
		if err := member(key, names[i], &v); err != nil {
			return b, fmt.Errorf("tee-pubkey: %w", err)
		}
		b.key[names[i]] = v
		if names[i] != "kty" {
			continue
		}
		switch v {
		case "EC":
			names = append(names, "crv", "x", "y")
		case "RSA":
			names = append(names, "n", "e")
		default:
			return b, fmt.Errorf("tee-pubkey: kty %.40q", v)
		}
	}
	evidence, err := members(a.evidence)
	if err != nil {
		return b, fmt.Errorf("tee-evidence: %w", err)
	}
	if err := member(evidence, "primary_evidence", &b.primary); err != nil {
		return b, fmt.Errorf("tee-evidence: %w", err)
	}
	if err := member(evidence, "additional_evidence", &b.additional); err != nil {
		return b, fmt.Errorf("tee-evidence: %w", err)
	}
	return b, nil
}

// digest is the SHA-384 that the evidence must carry: over the canonical JSON
// (RFC 8785) of additional evidence, nonce and key.
func (b bound) digest() [48]byte {
	return sha512.Sum384([]byte(`{"additional-evidence":` + canonical(b.additional) +
		`,"nonce":` + canonical(b.nonce) + `,"tee-pubkey":` + b.canonicalKey() + `}`))
}

func (b bound) canonicalKey() string {
	var key bytes.Buffer
	for i, name := range sortedKeys(b.key) {
		if i > 0 {
			key.WriteByte(',')
		}
		key.WriteString(canonical(name) + ":" + canonical(b.key[name]))
	}
	return "{" + key.String() + "}"
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// canonical writes a string as RFC 8785 does.
func canonical(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r == '\b':
			b.WriteString(`\b`)
		case r == '\t':
			b.WriteString(`\t`)
		case r == '\n':
			b.WriteString(`\n`)
		case r == '\f':
			b.WriteString(`\f`)
		case r == '\r':
			b.WriteString(`\r`)
		case r < 0x20:
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
	return b.String()
}

// members reads a JSON object, and nothing behind it. Names count exactly, and
// once.
func members(raw []byte) (map[string]json.RawMessage, error) {
	dec := json.NewDecoder(bytes.NewReader(raw))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return nil, errors.New("not a JSON object")
	}
	m := map[string]json.RawMessage{}
	for dec.More() {
		t, err := dec.Token()
		if err != nil {
			return nil, err
		}
		name, _ := t.(string)
		if _, ok := m[name]; ok {
			return nil, fmt.Errorf("member %.40q stands twice", name)
		}
		var v json.RawMessage
		if err := dec.Decode(&v); err != nil {
			return nil, err
		}
		m[name] = v
	}
	if _, err := dec.Token(); err != nil {
		return nil, err
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, errors.New("more behind the JSON object")
	}
	return m, nil
}

// member reads a required member; null counts as missing, unless raw JSON is
// asked for.
func member(m map[string]json.RawMessage, name string, to any) error {
	raw, ok := m[name]
	if !ok {
		return fmt.Errorf("member %q is missing", name)
	}
	if r, ok := to.(*json.RawMessage); ok {
		*r = raw
		return nil
	}
	if string(raw) == "null" || json.Unmarshal(raw, to) != nil {
		return fmt.Errorf("member %q is not a string", name)
	}
	return nil
}

// parseReferences reads a message of reference values.
func parseReferences(body []byte) (map[string]any, error) {
	m, err := members(body)
	if err != nil {
		return nil, err
	}
	var version, kind, payload string
	if err := errors.Join(member(m, "version", &version), member(m, "type", &kind), member(m, "payload", &payload)); err != nil {
		return nil, err
	}
	if version != "0.1.0" || kind != "sample" {
		return nil, fmt.Errorf("version %.20q and type %.20q: must be 0.1.0 and sample", version, kind)
	}
	b, err := base64.StdEncoding.Strict().DecodeString(payload)
	if err != nil {
		return nil, err
	}
	values, err := members(b)
	if err != nil {
		return nil, err
	}
	out := map[string]any{}
	for name, raw := range values {
		var v any
		if err := json.Unmarshal(raw, &v); err != nil {
			return nil, err
		}
		out[name] = v
	}
	return out, nil
}
