package kbs

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	"coffer/internal/snp"
)

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
