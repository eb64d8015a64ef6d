// Package policy writes and checks the resource policy of a KBS: the one text
// that decides which confidential VM may read which resource.
//
// A Rule binds resource paths to the launch digests of one CVM. Render gives a
// text in Rego that answers the same on Trustee before v0.17 (Rego v0, string
// path, base64 claims), on newer Trustee (Rego v1, path as a list, hexadecimal
// claims) and on the embedded KBS. It denies all but what a rule allows; it
// always refuses debug guests and guests with a migration agent.
//
// A Folder holds the master copy, policy.rego: hostbuild owns the block between
// two marker lines, people own the rest, and their bytes are never touched. The
// block is written in the part of Rego that means the same in v0 and v1, with
// and without imports, so that it fits below any text of theirs.
//
// The package does not know a KBS: uploading is the caller's function.
package policy

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
)

// TEEs whose evidence a rule can accept.
const (
	TEESNP    = "snp"    // AMD SEV-SNP reports
	TEESample = "sample" // Trustee's test TEE: no hardware, no measurement
)

// TCB are the lowest security version numbers a rule accepts. Trustee's claims
// hold no more: Turin's FMC is up to whoever verifies the report.
type TCB struct {
	Bootloader uint8 `json:"bootloader"`
	TEE        uint8 `json:"tee"`
	SNP        uint8 `json:"snp"`
	Microcode  uint8 `json:"microcode"`
}

// KeyPath, CanaryPath and VaultKeyPath are a CVM's own resources: the key of its
// disk, what each round fetches, and the key of /vault where only verified GPUs
// open it.
func KeyPath(cvmID string) string      { return "keys/root/" + cvmID }
func CanaryPath(cvmID string) string   { return "keys/canary/" + cvmID }
func VaultKeyPath(cvmID string) string { return "keys/vault/" + cvmID }

// Rule lets one CVM read its resources.
type Rule struct {
	CVMID   string     // names the rule; one rule for each CVM
	Paths   []string   // <repository>/<type>/<tag>, as KeyPath
	Digests [][48]byte // launch digests, any of which is accepted; none with TEE "sample"
	TEE     string     // TEESNP (also when empty) or TEESample

	// GPUPaths are those of Paths that are for evidence with verified GPUs alone:
	// every one of them must be affirmed. How many there have to be is up to the
	// guest, which is measured.
	GPUPaths []string

	// MinTCB is what a report must reach, by product ("Genoa"); empty asks for
	// nothing. Products that it lacks are refused. Trustee does not say of which
	// product a chip is, so there a report must reach the minimum of any product
	// named here; the embedded KBS says it.
	MinTCB map[string]TCB

	// Simulated also accepts SNP reports of a simulated chip, and simulated GPUs,
	// which the embedded KBS marks in its tokens. Without it such a report gets nothing, whatever
	// measurement it claims. A rule with TEE "sample" needs no such mark.
	Simulated bool
}

// Rules are the rules of one policy, ordered by CVMID.
type Rules []Rule

var (
	cvmIDForm   = regexp.MustCompile(`^[a-zA-Z0-9_-][a-zA-Z0-9_.-]{0,127}$`)
	productForm = regexp.MustCompile(`^[A-Za-z0-9]{1,32}$`)
	segment     = `[a-zA-Z0-9_-]+[a-zA-Z0-9_.-]*`
	pathForm    = regexp.MustCompile(`^` + segment + `/` + segment + `/` + segment + `$`)
)

// Put adds r, or replaces the rule of the same CVM. A path belongs to one CVM only.
func (rs *Rules) Put(r Rule) error {
	r = r.normal()
	if err := r.validate(); err != nil {
		return fmt.Errorf("policy rule of CVM %q: %w", r.CVMID, err)
	}
	for _, o := range *rs {
		if o.CVMID == r.CVMID {
			continue
		}
		for _, p := range r.Paths {
			if slices.Contains(o.Paths, p) {
				return fmt.Errorf("policy rule of CVM %q: path %s belongs to CVM %s already; remove that rule first", r.CVMID, p, o.CVMID)
			}
		}
	}
	i, found := rs.find(r.CVMID)
	if found {
		(*rs)[i] = r
	} else {
		*rs = slices.Insert(*rs, i, r)
	}
	return nil
}

// Remove takes the CVM's rule away and reports whether there was one.
func (rs *Rules) Remove(cvmID string) bool {
	i, found := rs.find(cvmID)
	if found {
		*rs = slices.Delete(*rs, i, i+1)
	}
	return found
}

// Get returns the CVM's rule.
func (rs Rules) Get(cvmID string) (Rule, bool) {
	if i, found := rs.find(cvmID); found {
		return rs[i], true
	}
	return Rule{}, false
}

func (rs Rules) find(cvmID string) (int, bool) {
	return slices.BinarySearchFunc(rs, cvmID, func(r Rule, id string) int { return strings.Compare(r.CVMID, id) })
}

// normal is r as a policy text holds it: sorted, with a named TEE.
func (r Rule) normal() Rule {
	if r.TEE == "" {
		r.TEE = TEESNP
	}
	r.Paths = slices.Sorted(slices.Values(r.Paths))
	r.GPUPaths = slices.Sorted(slices.Values(r.GPUPaths))
	r.Digests = slices.SortedFunc(slices.Values(r.Digests), func(a, b [48]byte) int { return bytes.Compare(a[:], b[:]) })
	r.Digests = slices.Compact(r.Digests)
	return r
}

func (r Rule) validate() error {
	switch {
	case !cvmIDForm.MatchString(r.CVMID):
		return errors.New("the id must be letters, digits, '-', '_' or '.', at most 128, not beginning with '.'")
	case len(r.Paths) == 0:
		return errors.New("no resource path")
	case r.TEE != TEESNP && r.TEE != TEESample:
		return fmt.Errorf("TEE %q: must be %q or %q", r.TEE, TEESNP, TEESample)
	case r.TEE == TEESNP && len(r.Digests) == 0:
		return errors.New("no launch digest: the rule would never allow anything")
	case r.TEE == TEESample && len(r.Digests) != 0:
		return errors.New("sample evidence carries no measurement, so the rule cannot bind it to a launch digest; give no digests")
	case r.TEE == TEESample && len(r.MinTCB) != 0:
		return errors.New("sample evidence carries no TCB; give no minimum")
	}
	for product := range r.MinTCB {
		if !productForm.MatchString(product) || product == anyProduct {
			return fmt.Errorf("product %q: must be a name such as Genoa", product)
		}
	}
	for i, p := range r.Paths {
		if !pathForm.MatchString(p) {
			return fmt.Errorf("path %q: must be <repository>/<type>/<tag> of letters, digits, '-', '_' and '.', none beginning with '.'", p)
		}
		if slices.Contains(r.Paths[:i], p) {
			return fmt.Errorf("path %s is named twice", p)
		}
	}
	for i, p := range r.GPUPaths {
		if !slices.Contains(r.Paths, p) || slices.Contains(r.GPUPaths[:i], p) {
			return fmt.Errorf("path %s, which needs GPUs, is none of the rule's or named twice", p)
		}
	}
	for _, d := range r.Digests {
		if d == ([48]byte{}) {
			return errors.New("a launch digest is all zero")
		}
	}
	return nil
}

const head = `# Resource policy of the KBS, master copy. hostbuild keeps its rules between the two
# marker lines below and leaves all else as it is. Write rules of your own outside of
# them, bind each to data["resource-path"], and keep the import: without it old Trustee
# reads "allow if { ... }" as "allow", always.
package policy

import rego.v1

default allow := false

`

const (
	beginMark = "# BEGIN coffer rules v1: written by hostbuild; do not edit up to the END line"
	sumMark   = "# SHA-256 of what follows, up to the END line: "
	endMark   = "# END coffer rules v1"
	pathsVar  = "coffer_paths := "
	cvmsVar   = "coffer_cvms := "
)

// anyProduct stands in a rule without minimums.
const anyProduct = "any"

// tail is the part of the block that is the same for all rules. It has no `if`,
// no `in` and no rule bodies, which v0 and v1 write differently: the last line is
// undefined where nothing is granted.
const tail = `# Trustee before v0.17 gives "resource/<repository>/<type>/<tag>", newer Trustee the plugin and a list.
coffer_asked := array.concat(
	[path | path := data["resource-path"]; is_string(path)],
	[path | parts := data["resource-path"]; is_array(parts); path := concat("/", array.concat([data.plugin], parts))],
)

coffer_evidence := input.submods.cpu0["ear.veraison.annotated-evidence"]

# One entry for each device, [affirmed, simulated], and what they are together:
# "none" is always true, "gpus" and "simulated gpus" only if all are affirmed.
coffer_devices := [device |
	submod := input.submods[name]
	name != "cpu0"
	device := [
		[true | startswith(name, "gpu"); submod["ear.status"] == "affirming"],
		[true | submod["ear.veraison.annotated-evidence"].simulated == true],
	]
]

coffer_gpus := array.concat(
	["none"],
	[state |
		count(coffer_devices) > 0
		count([device | device := coffer_devices[_]; device[0] == []]) == 0
		simulated := count([device | device := coffer_devices[_]; device[1] != []])
		state := ["gpus", "simulated gpus"][min([simulated, 1])]
	],
)

coffer_grants := array.concat(
	[true |
		path := coffer_asked[_]
		rule := coffer_cvms[coffer_paths[path]]
		object.get(rule.gpus, path, ["none"])[_] == coffer_gpus[_]
		rule.tee == "snp"
		claims := coffer_evidence.snp
		rule.digests[_] == claims.measurement
		claims.policy_debug_allowed == false
		claims.policy_migrate_ma == false
		rule.simulated[_] == object.get(coffer_evidence, "simulated", false)
		least := rule.tcb[family]
		{"any", object.get(coffer_evidence, "product", family)}[family]
		claims.reported_tcb_bootloader >= least.bootloader
		claims.reported_tcb_tee >= least.tee
		claims.reported_tcb_snp >= least.snp
		claims.reported_tcb_microcode >= least.microcode
	],
	[true |
		path := coffer_asked[_]
		rule := coffer_cvms[coffer_paths[path]]
		object.get(rule.gpus, path, ["none"])[_] == coffer_gpus[_]
		rule.tee == "sample"
		coffer_evidence.sample.svn == "1"
	],
)

allow := coffer_grants[0]
`

// ruleText is a rule as it stands in the block. Objects and lists of JSON are
// objects and arrays of Rego.
type ruleText struct {
	Paths     []string            `json:"paths"`
	TEE       string              `json:"tee"`
	Simulated []bool              `json:"simulated"` // accepted values of the evidence's mark
	TCB       map[string]TCB      `json:"tcb"`       // by product, or anyProduct alone
	GPUs      map[string][]string `json:"gpus"`      // by path: what its devices may be
	Digests   []string            `json:"digests"`   // each in base64 (old Trustee) and in hexadecimal (new)
}

// Render returns a whole policy: denied is what no rule allows.
func Render(rules []Rule) []byte {
	return append([]byte(head), renderBlock(rules)...)
}

func renderBlock(rules []Rule) []byte {
	paths := map[string]string{}
	cvms := map[string]ruleText{}
	for _, r := range rules {
		r = r.normal()
		t := ruleText{Paths: r.Paths, TEE: r.TEE, TCB: r.MinTCB, Simulated: []bool{false}, GPUs: map[string][]string{}, Digests: []string{}}
		if len(t.TCB) == 0 {
			t.TCB = map[string]TCB{anyProduct: {}}
		}
		if r.Simulated {
			t.Simulated = append(t.Simulated, true)
		}
		for _, p := range r.GPUPaths {
			t.GPUs["resource/"+p] = []string{"gpus", "simulated gpus"}[:len(t.Simulated)]
		}
		for _, d := range r.Digests {
			t.Digests = append(t.Digests, base64.StdEncoding.EncodeToString(d[:]), hex.EncodeToString(d[:]))
		}
		cvms[r.CVMID] = t
		for _, p := range r.Paths {
			paths["resource/"+p] = r.CVMID
		}
	}
	return seal(slices.Concat([]byte(pathsVar), object(paths), []byte("\n\n"+cvmsVar), object(cvms), []byte("\n\n"+tail)))
}

// seal makes a block of what it says. The digest tells an edit from the block of
// another version of hostbuild.
func seal(body []byte) []byte {
	return fmt.Appendf(nil, "%s\n%s%x\n%s%s\n", beginMark, sumMark, sha256.Sum256(body), body, endMark)
}

// unseal returns what a block says, and whether its digest is right.
func unseal(block []byte) (body []byte, ok bool) {
	_, body, _ = bytes.Cut(block, []byte("\n"+sumMark))
	_, body, _ = bytes.Cut(body, []byte("\n"))
	body = bytes.TrimSuffix(body, []byte(endMark+"\n"))
	return body, bytes.Equal(seal(body), block)
}

// object writes JSON with sorted keys, which is also Rego.
func object(v any) []byte {
	b, err := json.MarshalIndent(v, "", "\t")
	if err != nil {
		panic(err) // strings, numbers and lists only
	}
	return b
}

// ErrBlock says that the part of a policy that hostbuild owns is not as
// hostbuild writes it.
var ErrBlock = errors.New("the block of coffer rules is damaged")

// parseBlock reads a block that renderBlock wrote, of this version of hostbuild or
// of an earlier one.
func parseBlock(block []byte) (Rules, error) {
	body, sealed := unseal(block)
	_, rest, ok := bytes.Cut(body, []byte("\n"+cvmsVar))
	if !ok {
		return nil, fmt.Errorf("%w: no line %q", ErrBlock, cvmsVar)
	}
	dec := json.NewDecoder(bytes.NewReader(rest))
	dec.DisallowUnknownFields()
	var cvms map[string]ruleText
	if err := dec.Decode(&cvms); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			err = errors.New("it ends too early")
		} else if sealed {
			err = fmt.Errorf("another version of hostbuild wrote it, use that one: %w", err)
		}
		return nil, fmt.Errorf("%w: %s: %w", ErrBlock, cvmsVar, err)
	}
	var rules Rules
	for id, t := range cvms {
		r := Rule{CVMID: id, Paths: t.Paths, TEE: t.TEE, MinTCB: t.TCB, Simulated: len(t.Simulated) == 2}
		for p := range t.GPUs {
			r.GPUPaths = append(r.GPUPaths, strings.TrimPrefix(p, "resource/"))
		}
		if _, ok := t.TCB[anyProduct]; ok {
			r.MinTCB = nil
		}
		for i := 1; i < len(t.Digests); i += 2 {
			d, err := hex.DecodeString(t.Digests[i])
			if err != nil || len(d) != 48 {
				return nil, fmt.Errorf("%w: CVM %q: %q is no launch digest", ErrBlock, id, t.Digests[i])
			}
			r.Digests = append(r.Digests, [48]byte(d))
		}
		if err := rules.Put(r); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrBlock, err)
		}
	}
	if sealed {
		return rules, nil
	}
	want, _ := unseal(renderBlock(rules))
	line := 3 // the first of the body
	for i := 0; i < len(body) && i < len(want) && body[i] == want[i]; i++ {
		if body[i] == '\n' {
			line++
		}
	}
	return nil, fmt.Errorf("%w: its line %d is not what hostbuild wrote; undo the edit, or move the text out of the markers", ErrBlock, line)
}
