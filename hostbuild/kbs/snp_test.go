package kbs

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"coffer/hostbuild/policy"
	"coffer/internal/snp"
	"coffer/test/simsnp"
)

func newChip(t testing.TB, p simsnp.Params) *simsnp.Chip {
	t.Helper()
	c, err := simsnp.New(p)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

var measurement = [48]byte(bytes.Repeat([]byte{0xa5}, 48))

// evidence is a signed report over the guest's session, changed by edit first.
func (g *guest) evidence(c *simsnp.Chip, certs []snp.Cert, edit func(*snp.Report)) json.RawMessage {
	g.t.Helper()
	var data [64]byte
	d := g.digest()
	copy(data[:], d[:])
	r, err := c.Report(measurement, data, 0)
	if err != nil {
		g.t.Fatal(err)
	}
	if edit != nil {
		edit(r)
		if err := c.Sign(r); err != nil {
			g.t.Fatal(err)
		}
	}
	raw, err := snp.EvidenceJSON(r.Marshal(), certs)
	if err != nil {
		g.t.Fatal(err)
	}
	return raw
}

func rules(t testing.TB, rs ...policy.Rule) string {
	t.Helper()
	var all policy.Rules
	for _, r := range rs {
		if err := all.Put(r); err != nil {
			t.Fatal(err)
		}
	}
	return string(policy.Render(all))
}

func TestSNPFlow(t *testing.T) {
	chip := newChip(t, simsnp.Params{})
	dialects(t, func(t *testing.T, d Dialect) {
		r := newRig(t, Options{Dialect: d, AllowSimulated: true, SimulatedRoots: chip.RootsPEM()})
		r.mustAdmin("POST", "/kbs/v0/resource/"+keyPath, []byte(secret))
		r.mustAdmin("POST", "/kbs/v0/resource/keys/root/two", []byte("other"))
		rule := policy.Rule{CVMID: "one", Paths: []string{keyPath}, Digests: [][48]byte{measurement}, Simulated: true}
		two := policy.Rule{CVMID: "two", Paths: []string{"keys/root/two"}, Digests: [][48]byte{{1}}, Simulated: true}
		r.setPolicy(rules(t, rule, two))

		g := r.guest("snp").auth()
		a := g.attest(g.attestBody(g.evidence(chip, chip.Certs(), nil), ""))
		if a.status != 200 {
			t.Fatalf("attest: %d %s\n%s", a.status, a.body, r.log)
		}
		if a := g.get(keyPath); a.status != 200 || decrypt(t, a.body, g.key) != secret {
			t.Fatalf("get: %d %s\n%s", a.status, a.body, r.log)
		}
		l := r.log.last(t)
		if l["msg"] != "released" || l["measurement"] != hex.EncodeToString(measurement[:]) || l["chip_id"] != hex.EncodeToString(chip.ChipID[:]) || l["simulated"] != true || l["path"] != keyPath {
			t.Errorf("audit line %v", l)
		}
		if ms, _ := l["ms"].(float64); ms <= 0 || !strings.HasPrefix(fmt.Sprint(l["remote"]), "127.0.0.1:") {
			t.Errorf("audit line %v tells neither who asked nor how long it took", l)
		}
		if a := g.get("keys/root/two"); a.errType() != "PolicyDeny" {
			t.Errorf("another CVM's key: %d %s, want PolicyDeny", a.status, a.body)
		}
		checkSNPClaims(t, d, tokenIn(t, a), chip)

		// The rule's removal is a revocation, for the session and for its token.
		r.setPolicy(rules(t, two))
		if a := g.get(keyPath); a.errType() != "PolicyDeny" {
			t.Errorf("after the rule's removal: %d %s, want PolicyDeny", a.status, a.body)
		}
		if a := r.do("GET", "/kbs/v0/resource/"+keyPath, nil, "Authorization", "Bearer "+tokenIn(t, a)); a.errType() != "PolicyDeny" {
			t.Errorf("bearer token after the rule's removal: %d %s, want PolicyDeny", a.status, a.body)
		}
		// A rule for hardware gives a simulated chip nothing.
		rule.Simulated = false
		r.setPolicy(rules(t, rule, two))
		if a := g.get(keyPath); a.errType() != "PolicyDeny" {
			t.Errorf("simulated chip under a rule for hardware: %d %s, want PolicyDeny", a.status, a.body)
		}
	})
}

// checkSNPClaims compares with what Trustee's tokens were seen to hold.
func checkSNPClaims(t *testing.T, d Dialect, token string, chip *simsnp.Chip) {
	t.Helper()
	payload, err := b64.DecodeString(strings.Split(token, ".")[1])
	if err != nil {
		t.Fatal(err)
	}
	var claims map[string]any
	if err := json.Unmarshal(payload, &claims); err != nil {
		t.Fatal(err)
	}
	report := evidenceOf(claims)["snp"].(map[string]any)
	names := "{measurement,platform_smt_enabled,platform_tsme_enabled,policy_abi_major,policy_abi_minor,policy_debug_allowed,policy_migrate_ma," +
		"policy_single_socket,policy_smt_allowed,reported_tcb_bootloader,reported_tcb_microcode,reported_tcb_snp,reported_tcb_tee}"
	want := base64.StdEncoding.EncodeToString(measurement[:])
	if d == DialectH {
		names = "{chip_id," + names[1:]
		want = hex.EncodeToString(measurement[:])
		if report["chip_id"] != hex.EncodeToString(chip.ChipID[:]) {
			t.Errorf("chip_id %v", report["chip_id"])
		}
	}
	if got := keysOf(report); got != names {
		t.Errorf("claims %s, want %s", got, names)
	}
	if report["measurement"] != want || report["policy_debug_allowed"] != false || report["reported_tcb_microcode"] != float64(chip.TCB.Microcode) {
		t.Errorf("claims %v", report)
	}
	if got := keysOf(evidenceOf(claims)); !strings.HasPrefix(got, "{init_data,init_data_claims,product,report_data,runtime_data_claims{additional-evidence,nonce,tee-pubkey{alg,crv,kty,x,y}},simulated,snp{") {
		t.Errorf("annotated evidence %s", got)
	}
}

func TestSNPRefuses(t *testing.T) {
	chip, stranger := newChip(t, simsnp.Params{}), newChip(t, simsnp.Params{})
	vlek := newChip(t, simsnp.Params{VLEK: true})
	r := newRig(t, Options{Dialect: DialectT, AllowSimulated: true, SimulatedRoots: append(chip.RootsPEM(), vlek.RootsPEM()...)})
	r.setPolicy(allowAll)
	tests := []struct {
		name     string
		evidence func(g *guest) json.RawMessage
		reason   string
	}{
		{"another chip's chain", func(g *guest) json.RawMessage { return g.evidence(stranger, stranger.Certs(), nil) }, "chain"},
		{"another chip's report", func(g *guest) json.RawMessage { return g.evidence(stranger, chip.Certs(), nil) }, "signature"},
		{"VLEK", func(g *guest) json.RawMessage { return g.evidence(vlek, vlek.Certs(), nil) }, "VLEK"},
		{"masked chip id", func(g *guest) json.RawMessage {
			return g.evidence(chip, chip.Certs(), func(r *snp.Report) { r.ChipID = [64]byte{} })
		}, "chip id"},
		{"no certificates", func(g *guest) json.RawMessage { return g.evidence(chip, nil, nil) }, "no VCEK in the evidence"},
		{"VMPL 1", func(g *guest) json.RawMessage {
			return g.evidence(chip, chip.Certs(), func(r *snp.Report) { r.VMPL = 1 })
		}, "VMPL 1"},
		{"another key", func(g *guest) json.RawMessage {
			return g.evidence(chip, chip.Certs(), func(r *snp.Report) { r.ReportData[0] ^= 1 })
		}, "report data"},
		{"not padded with zeros", func(g *guest) json.RawMessage {
			return g.evidence(chip, chip.Certs(), func(r *snp.Report) { r.ReportData[63] = 1 })
		}, "report data"},
		{"debug guest", func(g *guest) json.RawMessage {
			return g.evidence(chip, chip.Certs(), func(r *snp.Report) { r.Policy |= snp.PolicyDebug })
		}, "debugging"},
		{"migration agent", func(g *guest) json.RawMessage {
			return g.evidence(chip, chip.Certs(), func(r *snp.Report) { r.Policy |= snp.PolicyMigrateMA })
		}, "migration agent"},
		{"other TCB than the certificate", func(g *guest) json.RawMessage {
			return g.evidence(chip, chip.Certs(), func(r *snp.Report) { r.ReportedTCB.SNP-- })
		}, "TCB"},
		{"version 5 at T", func(g *guest) json.RawMessage {
			return g.evidence(chip, chip.Certs(), func(r *snp.Report) { r.Version = 5 })
		}, "version"},
		{"sample evidence in an snp session", func(g *guest) json.RawMessage { return sampleEvidence(g.digest()) }, "attestation_report"},
		{"flipped bit", func(g *guest) json.RawMessage {
			return bytes.Replace(g.evidence(chip, chip.Certs(), nil), []byte(`"measurement":[165`), []byte(`"measurement":[164`), 1)
		}, "signature"},
		{"certificates too short", func(g *guest) json.RawMessage {
			b, err := os.ReadFile(filepath.Join("testdata", "snp-evidence-v3.json"))
			if err != nil {
				g.t.Fatal(err)
			}
			return b
		}, "8 bytes are no certificate"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := r.guest("snp").auth()
			a := g.attest(g.attestBody(tt.evidence(g), ""))
			if a.status != 401 || a.errType() != "AttestationError" {
				t.Errorf("attest: %d %s", a.status, a.body)
			}
			if l := r.log.last(t); l["msg"] != "refused" || !strings.Contains(fmt.Sprint(l["reason"]), tt.reason) || l["reason"] == nil {
				t.Errorf("audit line %v, want the reason %q", l, tt.reason)
			}
			if a := g.get(keyPath); a.errType() != "TokenNotFound" {
				t.Errorf("get: %d %s", a.status, a.body)
			}
		})
	}
}

// TestSNPSimulatedRootsAreNotBuiltIn: a simulated chip means nothing to a
// server that was not given its roots, even where `sample` is allowed.
func TestSNPSimulatedRootsAreNotBuiltIn(t *testing.T) {
	chip := newChip(t, simsnp.Params{})
	for _, allow := range []bool{false, true} {
		r := newRig(t, Options{AllowSimulated: allow})
		g := r.guest("snp").auth()
		if a := g.attest(g.attestBody(g.evidence(chip, chip.Certs(), nil), "")); a.status != 401 {
			t.Errorf("allow %v: %d %s", allow, a.status, a.body)
		}
	}
}

func TestVCEKStore(t *testing.T) {
	for _, product := range []string{"Genoa", "Turin"} {
		t.Run(product, func(t *testing.T) {
			chip := newChip(t, simsnp.Params{Product: product})
			r := newRig(t, Options{AllowSimulated: true, SimulatedRoots: chip.RootsPEM(), MinTCB: map[string]snp.TCB{product: {}}})
			attest := func() answer {
				g := r.guest("snp").auth()
				return g.attest(g.attestBody(g.evidence(chip, nil, nil), ""))
			}
			if a := attest(); a.status != 401 {
				t.Fatalf("without the file: %d", a.status)
			}
			tcb, id, fmc := chip.TCB, chip.ChipID[:], ""
			if product == "Turin" {
				id, fmc = id[:8], fmt.Sprintf("_fmc%02d", *tcb.FMC)
			}
			dir := filepath.Join(r.dir, vcekDir, hex.EncodeToString(id))
			if err := os.MkdirAll(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			var der []byte
			for _, c := range chip.Certs() {
				if c.Type == snp.VCEK {
					der = c.Data
				}
			}
			for _, name := range []string{"vcek.der", fmt.Sprintf("bl%02d_tee%02d_snp%02d_ucode%02d%s_vcek.der", tcb.Bootloader, tcb.TEE, tcb.SNP, tcb.Microcode, fmc)} {
				file := filepath.Join(dir, name)
				if err := os.WriteFile(file, der, 0o600); err != nil {
					t.Fatal(err)
				}
				if a := attest(); a.status != 200 {
					t.Errorf("with %s: %d %s", name, a.status, r.log)
				}
				os.Remove(file)
			}
		})
	}
}

// TestAppraisal has the table measured on Trustee's default policy.
func TestAppraisal(t *testing.T) {
	claims := map[string]any{"measurement": "m", "policy_debug_allowed": false, "policy_migrate_ma": false, "reported_tcb_bootloader": uint8(10), "reported_tcb_tee": uint8(1),
		"reported_tcb_snp": uint8(23), "reported_tcb_microcode": uint8(84), "platform_smt_enabled": true, "platform_tsme_enabled": false,
		"policy_abi_major": uint64(0), "policy_abi_minor": uint64(0), "policy_single_socket": false, "policy_smt_allowed": true}
	debug := map[string]any{}
	for k, v := range claims {
		debug[k] = v
	}
	debug["policy_debug_allowed"] = true
	launch := `"snp_launch_measurement":["x","m"]`
	tcb := launch + `,"snp_bootloader":[10],"snp_microcode":[84],"snp_snp_svn":[22,23],"snp_tee_svn":[1]`
	all := tcb + `,"snp_smt_enabled":true,"snp_tsme_enabled":false,"snp_guest_abi_major":0,"snp_guest_abi_minor":0,"snp_single_socket":false,"snp_smt_allowed":true`
	tests := []struct {
		name, refs string
		claims     map[string]any
		want       appraisal
		status     string
	}{
		{"no values", "", claims, appraisal{33, 97, 3}, "contraindicated"},
		{"launch", launch, claims, appraisal{3, 97, 3}, "contraindicated"},
		{"TCB", tcb, claims, appraisal{3, 2, 3}, "affirming"},
		{"all", all, claims, appraisal{3, 2, 2}, "affirming"},
		{"debug", all, debug, appraisal{3, 2, 36}, "warning"},
	}
	for _, tt := range tests {
		refs := map[string]any{}
		if err := json.Unmarshal([]byte("{"+tt.refs+"}"), &refs); err != nil {
			t.Fatal(err)
		}
		if got := appraiseSNP(tt.claims, refs); got != tt.want || got.status() != tt.status {
			t.Errorf("%s: %v %s, want %v %s", tt.name, got, got.status(), tt.want, tt.status)
		}
	}
	refs := map[string]any{"svn": []any{"1"}, "launch_digest": []any{"abcde"}, "major_version": 1.0, "minimum_minor_version": 4.0}
	if got := appraiseSample("1", refs, DialectT); got != (appraisal{3, 2, 36}) {
		t.Errorf("sample: %v", got)
	}
	if got := appraiseSample("1", nil, DialectT); got != (appraisal{33, 97, 36}) {
		t.Errorf("sample without values: %v", got)
	}
	if got := appraiseSample("1", nil, DialectH); got != (appraisal{33, 97, 2}) {
		t.Errorf("sample at H: %v", got)
	}
}

// TestGenerations: each product and version, in both dialects.
func TestGenerations(t *testing.T) {
	for _, p := range []struct {
		name, product string
		family, model uint8
	}{{"Milan", "Milan", 0x19, 0x01}, {"Genoa", "Genoa", 0x19, 0x11}, {"Bergamo and Siena", "Genoa", 0x19, 0xa0}, {"Turin", "Turin", 0x1a, 0x02}} {
		t.Run(p.name, func(t *testing.T) {
			chip := newChip(t, simsnp.Params{Product: p.product})
			dialects(t, func(t *testing.T, d Dialect) {
				r := newRig(t, Options{Dialect: d, AllowSimulated: true, SimulatedRoots: chip.RootsPEM(), MinTCB: map[string]snp.TCB{p.product: chip.TCB}})
				for version := uint32(3); version <= 5; version++ {
					g := r.guest("snp").auth()
					raw := g.evidence(chip, chip.Certs(), func(r *snp.Report) { r.Version, r.CPUFamily, r.CPUModel = version, p.family, p.model })
					a := g.attest(g.attestBody(raw, ""))
					want := 200
					if version == 5 && d == DialectT {
						want = 401
					}
					if a.status != want {
						t.Errorf("version %d: %d, want %d\n%v", version, a.status, want, r.log.last(t))
					}
					if a.status != 200 {
						continue
					}
					claims, err := r.server.tokens.verify(tokenIn(t, a), time.Now())
					if err != nil || evidenceOf(claims)["product"] != p.product {
						t.Errorf("version %d: product %v (%v), want %s", version, evidenceOf(claims)["product"], err, p.product)
					}
				}
			})
		})
	}
}

func TestMinTCB(t *testing.T) {
	chip := newChip(t, simsnp.Params{})
	for _, tt := range []struct {
		name   string
		min    map[string]snp.TCB
		status int
		reason string
	}{
		{"default", nil, 200, ""},
		{"reached", map[string]snp.TCB{"Genoa": chip.TCB}, 200, ""},
		{"above", map[string]snp.TCB{"Genoa": {Bootloader: 10, SNP: 24, Microcode: 84}}, 401, "TCB"},
		{"other product only", map[string]snp.TCB{"Turin": {}}, 401, "no minimum"},
	} {
		r := newRig(t, Options{AllowSimulated: true, SimulatedRoots: chip.RootsPEM(), MinTCB: tt.min})
		g := r.guest("snp").auth()
		a := g.attest(g.attestBody(g.evidence(chip, chip.Certs(), nil), ""))
		if l := r.log.last(t); a.status != tt.status || !strings.Contains(fmt.Sprint(l["reason"]), tt.reason) {
			t.Errorf("%s: %d %v, want %d %q", tt.name, a.status, l["reason"], tt.status, tt.reason)
		}
	}
}
