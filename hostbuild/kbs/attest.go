package kbs

import (
	"bytes"
	"context"
	"crypto/sha512"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"coffer/internal/snp"
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

const teeSample = "sample"

// attestOnce verifies an attestation in a session and returns its token.
func (s *Server) attestOnce(ctx context.Context, sess *session, a attestation) (string, facts, error) {
	f := facts{tee: sess.tee}
	b, err := a.parse()
	if err != nil {
		return "", f, err
	}
	if b.nonce != sess.nonce {
		return "", f, errors.New("the nonce is not this session's")
	}
	init, err := parseInitData(a.initData)
	if err != nil {
		return "", f, err
	}
	if b.additional != "" && s.devices == nil {
		return "", f, errors.New("additional (device) evidence is not supported by this server: send an empty string, or start it with a folder of RIMs (--gpu-rim-dir)")
	}
	digest := b.digest()
	evidence := map[string]any{"runtime_data_claims": map[string]any{
		"additional-evidence": b.additional, "nonce": b.nonce, "tee-pubkey": b.key}}
	var look appraisal
	refs, err := s.store.references()
	if err != nil {
		return "", f, err
	}
	switch sess.tee {
	case teeSample:
		look, err = s.verifySample(b.primary, digest, evidence, refs)
		f.simulated = true
	case "snp":
		look, err = s.verifySNP(ctx, b.primary, digest, init, evidence, refs, &f)
	default:
		err = fmt.Errorf("tee %q is not supported by this server", sess.tee)
	}
	if err != nil {
		return "", f, err
	}
	if f.simulated {
		evidence["simulated"] = true
	}
	devices, err := s.verifyDevices(ctx, b)
	if err != nil {
		return "", f, err
	}
	token, err := s.tokens.issue(evidence, look, devices, f.simulated, s.now())
	return token, f, err
}

// verifySample checks Trustee's test evidence and adds its claims to evidence.
func (s *Server) verifySample(primary json.RawMessage, digest [48]byte, evidence map[string]any, refs map[string]any) (appraisal, error) {
	if !s.simulated {
		return appraisal{}, errors.New("sample evidence proves nothing and is not allowed here (--allow-simulated)")
	}
	m, err := members(primary)
	if err != nil {
		return appraisal{}, fmt.Errorf("sample evidence: %w", err)
	}
	var svn, data string
	if err := errors.Join(member(m, "svn", &svn), member(m, "report_data", &data)); err != nil {
		return appraisal{}, fmt.Errorf("sample evidence: %w", err)
	}
	got, err := base64.StdEncoding.Strict().DecodeString(data)
	if err != nil || !bytes.Equal(got, digest[:]) {
		return appraisal{}, errors.New("sample evidence: report_data is not the digest of nonce and key")
	}
	claims := map[string]any{"svn": svn, "launch_digest": "abcde", "platform_version": map[string]any{"major": 1, "minor": 4}}
	if s.dialect == DialectH {
		claims["debug"] = false
	}
	evidence["report_data"] = data
	evidence[teeSample] = claims
	return appraiseSample(svn, refs, s.dialect), nil
}

// verifySNP checks an SNP report and adds its claims to evidence.
func (s *Server) verifySNP(ctx context.Context, primary json.RawMessage, digest [48]byte, init *initData, evidence map[string]any, refs map[string]any, f *facts) (appraisal, error) {
	raw, certs, err := snp.ParseEvidenceJSON(primary)
	if err != nil {
		return appraisal{}, err
	}
	r, err := snp.ParseReport(raw)
	if err != nil {
		return appraisal{}, err
	}
	f.measurement, f.chipID = hex.EncodeToString(r.Measurement[:]), hex.EncodeToString(r.ChipID[:])
	if r.VMPL != 0 {
		return appraisal{}, fmt.Errorf("the report is of VMPL %d: only VMPL 0, init and agent, may ask for keys", r.VMPL)
	}
	var want [64]byte
	copy(want[:], digest[:])
	res, err := s.verify(ctx, r, certs, want)
	if err != nil {
		return appraisal{}, err
	}
	f.simulated = res.Simulated
	if init != nil && init.hostData != r.HostData {
		return appraisal{}, errors.New("the digest of the init-data is not the report's HOST_DATA")
	}
	encode := base64.StdEncoding.EncodeToString
	if s.dialect == DialectH {
		encode = hex.EncodeToString
	}
	claims := map[string]any{
		"measurement":             encode(r.Measurement[:]),
		"policy_abi_major":        r.Policy >> 8 & 0xff,
		"policy_abi_minor":        r.Policy & 0xff,
		"policy_smt_allowed":      r.Policy&snp.PolicySMT != 0,
		"policy_migrate_ma":       r.Policy&snp.PolicyMigrateMA != 0,
		"policy_debug_allowed":    r.Policy&snp.PolicyDebug != 0,
		"policy_single_socket":    r.Policy&snp.PolicySingleSocket != 0,
		"reported_tcb_bootloader": r.ReportedTCB.Bootloader,
		"reported_tcb_tee":        r.ReportedTCB.TEE,
		"reported_tcb_snp":        r.ReportedTCB.SNP,
		"reported_tcb_microcode":  r.ReportedTCB.Microcode,
		"platform_smt_enabled":    r.PlatformInfo&1 != 0,
		"platform_tsme_enabled":   r.PlatformInfo&2 != 0,
	}
	if s.dialect == DialectH {
		claims["chip_id"] = f.chipID
	}
	evidence["report_data"] = encode(r.ReportData[:])
	evidence["init_data"] = encode(r.HostData[:])
	evidence["init_data_claims"] = nil
	if init != nil {
		evidence["init_data_claims"] = init.claims
	}
	evidence["product"] = res.Product
	evidence["snp"] = claims
	return appraiseSNP(claims, refs), nil
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
	if dec.More() {
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
