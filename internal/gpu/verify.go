package gpu

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"coffer/internal/gpu/certs"
	"coffer/internal/gpu/ocsp"
	"coffer/internal/gpu/rim"
	"coffer/internal/gpu/spdm"
)

// Verifier judges devices. It is safe for concurrent use, and must not be copied.
type Verifier struct {
	DeviceRoot *x509.Certificate // certs.DeviceRoot()
	RIMRoot    *x509.Certificate // certs.RIMRoot()
	RIMs       rim.Source
	OCSP       *ocsp.Client // not used where Policy.OCSP is off
	Policy     Policy
	Now        func() time.Time

	// RIMs whose signature was right, by SHA-256. The same few are asked for in
	// every round, and of a round of one GPU they are two thirds of the work.
	mu     sync.Mutex
	signed map[[sha256.Size]byte]*rim.RIM
}

const maxSigned = 32

// recall returns a RIM of known good signature.
func (v *Verifier) recall(sum [sha256.Size]byte) *rim.RIM {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.signed[sum]
}

func (v *Verifier) remember(sum [sha256.Size]byte, r *rim.RIM) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.signed == nil || len(v.signed) >= maxSigned {
		v.signed = map[[sha256.Size]byte]*rim.RIM{}
	}
	v.signed[sum] = r
}

// VerifyAll judges all the GPUs of a machine, each asked with the same nonce: each
// for itself, and that they are as many as expected, different, and of one kind
// and mode. It returns what was found of each that was looked at.
func (v *Verifier) VerifyAll(ctx context.Context, devices []Evidence, nonce [32]byte) ([]*Result, error) {
	if n := len(devices); n == 0 || v.Policy.Count != 0 && n != v.Policy.Count {
		return nil, fail(CodeCount, "%d GPUs gave evidence, want %s", n, cmp.Or(strings.TrimLeft(strconv.Itoa(v.Policy.Count), "0"), "at least 1"))
	}
	var results []*Result
	for i, d := range devices {
		r, err := v.Verify(ctx, d, nonce)
		results = append(results, r)
		if err != nil {
			return results, fmt.Errorf("GPU %d: %w", i, err)
		}
		for j, other := range results[:i] {
			switch {
			case other.Serial == r.Serial:
				return results, fail(CodeDuplicate, "GPU %d and GPU %d are the same device, serial %s", j, i, r.Serial)
			case other.Arch != r.Arch || other.PPCIE != r.PPCIE || other.FeatureFlag != r.FeatureFlag:
				return results, fail(CodeMixed, "GPU %d is %s in mode %s, GPU %d is %s in mode %s", j, other.Arch, other.mode(), i, r.Arch, r.mode())
			}
		}
	}
	return results, nil
}

// Verify judges one device that was asked with nonce. The result is never nil; the
// error, if any, is the first check that failed, of type *Error.
func (v *Verifier) Verify(ctx context.Context, e Evidence, nonce [32]byte) (*Result, error) {
	c := &checks{Verifier: v, e: e, nonce: nonce, now: v.Now(), Result: &Result{UUID: e.UUID, FeatureFlag: -1}}
	for _, check := range []func(context.Context) error{
		c.report, c.chain, c.arch, c.fwid, c.revocation, c.signature, c.versions, c.mode, c.rims,
	} {
		if err := check(ctx); err != nil {
			return c.Result, err
		}
	}
	c.Verified = true
	return c.Result, nil
}

// checks is one device on its way through the checks.
type checks struct {
	*Verifier
	*Result
	e      Evidence
	nonce  [32]byte
	now    time.Time
	spdm   *spdm.Report
	device *certs.Device
}

func (c *checks) report(context.Context) (err error) {
	c.spdm, err = spdm.Parse(c.e.Report)
	switch {
	case errors.Is(err, spdm.ErrRequest):
		return fail(CodeReportRequest, "%w", err)
	case err != nil:
		return fail(CodeReportFormat, "%w", err)
	}
	c.Parsed, c.Nonce = true, hex.EncodeToString(c.spdm.Nonce[:])
	if subtle.ConstantTimeCompare(c.spdm.Nonce[:], c.nonce[:]) != 1 {
		return fail(CodeNonce, "the report is for nonce %x, asked was %x: an old report, or another's", c.spdm.Nonce, c.nonce)
	}
	c.NonceMatch = true
	return nil
}

func (c *checks) chain(context.Context) error {
	c.Chain.Status = "invalid"
	chain, err := certs.ParsePEM(c.e.Chain)
	if err == nil {
		c.device, err = certs.VerifyDevice(chain, c.DeviceRoot, c.now)
	}
	switch {
	case errors.Is(err, certs.ErrRoot):
		return fail(CodeChainRoot, "device: %w", err)
	case errors.Is(err, certs.ErrSignature):
		return fail(CodeChainSignature, "device: %w", err)
	case errors.Is(err, certs.ErrTime):
		c.Chain.Status = "expired"
		return fail(CodeChainTime, "device: %w", err)
	case err != nil:
		return fail(CodeChainStructure, "device: %w", err)
	}
	_, to := certs.Validity(chain)
	c.Chain.Status, c.Chain.Expires = "valid", to
	c.Serial, c.Model = c.device.Serial, c.device.Model
	return nil
}

func (c *checks) arch(context.Context) error {
	switch chip := c.device.Chip; {
	case chip == "GH100":
		c.Arch = Hopper
	case strings.HasPrefix(chip, "GB"):
		c.Arch = Blackwell
	case chip == "LS10":
		c.Arch = LS10
	default:
		return fail(CodeArch, "chip %q is not known", chip)
	}
	switch {
	case c.e.Arch != "" && !strings.EqualFold(c.e.Arch, c.Arch):
		return fail(CodeArch, "NVML says %s, the device's certificate %s", c.e.Arch, c.Arch)
	case c.Policy.Archs != nil && !slices.Contains(c.Policy.Archs, c.Arch):
		return fail(CodeArch, "%s is not one of the allowed %s", c.Arch, strings.Join(c.Policy.Archs, ", "))
	}
	c.ArchMatch = true
	return nil
}

// fwid compares the firmware that the report names with the one whose key the
// certificate is for. Drivers 535 and 545 and LS10 switches name none.
func (c *checks) fwid(context.Context) error {
	named, ok := c.spdm.Field(spdm.FWID)
	switch {
	case !ok && c.Arch == LS10:
	case !ok && c.Policy.AllowMissingFWID:
		c.warn("the report names no firmware (FWID)")
	case !ok:
		return fail(CodeFWIDMissing, "the report names no firmware (FWID); drivers from 550 on do")
	case subtle.ConstantTimeCompare(named, c.device.FWID[:]) != 1:
		return fail(CodeFWID, "the report names firmware %x, the certificate %x", named, c.device.FWID)
	}
	c.FWIDMatch = true
	return nil
}

// revocation asks about the device's identity, provisioner and family
// certificates, as NVIDIA does: responders know neither the leaf nor the root.
func (c *checks) revocation(ctx context.Context) error {
	code, err := c.askOCSP(ctx, c.device.Chain, []int{1, 2, 3}, &c.Chain)
	if err != nil {
		return fail(code, "device: %w", err)
	}
	return nil
}

func (c *checks) askOCSP(ctx context.Context, chain []*x509.Certificate, which []int, state *ChainState) (Code, error) {
	if c.Policy.OCSP == OCSPOff {
		return "", nil
	}
	if c.OCSP == nil || c.Policy.OCSP != OCSPRequire && c.Policy.OCSP != OCSPAllowCached {
		return CodeInternal, fmt.Errorf("OCSP mode %q without a responder", c.Policy.OCSP)
	}
	client := *c.OCSP
	if c.Policy.OCSP == OCSPRequire {
		client.Cache = nil
	}
	for _, i := range which {
		status, err := client.Check(ctx, chain, i)
		state.Cached = state.Cached || status.Cached
		switch {
		case errors.Is(err, ocsp.ErrHold) && c.Policy.AllowHold:
			c.warn("%s", err)
		case errors.Is(err, ocsp.ErrHold):
			state.Status, state.OCSP, state.Reason = "revoked", "revoked", "certificateHold"
			return CodeOCSPHold, err
		case errors.Is(err, ocsp.ErrRevoked):
			state.Status, state.OCSP, state.Reason = "revoked", "revoked", err.Error()
			return CodeOCSPRevoked, err
		case errors.Is(err, ocsp.ErrUnknown):
			state.OCSP = "unknown"
			return CodeOCSPUnknown, err
		case errors.Is(err, ocsp.ErrUnreachable):
			return CodeOCSPUnreachable, err
		case errors.Is(err, ocsp.ErrNonce):
			return CodeOCSPNonce, err
		case errors.Is(err, ocsp.ErrStale):
			return CodeOCSPStale, err
		case errors.Is(err, ocsp.ErrResponder):
			return CodeOCSPResponder, err
		case errors.Is(err, ocsp.ErrFormat):
			return CodeOCSPFormat, err
		case err != nil:
			return CodeInternal, err
		}
	}
	state.OCSP = "good"
	return "", nil
}

func (c *checks) signature(context.Context) error {
	if err := c.spdm.VerifySignature(c.device.Key); err != nil {
		return fail(CodeReportSignature, "%w", err)
	}
	c.Signature = true
	return nil
}

// versions reads what the report says of driver and VBIOS, and compares it with
// NVML's words and the policy.
func (c *checks) versions(context.Context) (err error) {
	if c.VBIOS, err = c.spdm.VBIOS(); err == nil && c.Arch != LS10 {
		c.Driver, err = c.spdm.Text(spdm.DriverVersion)
	}
	if err != nil {
		return fail(CodeReportFormat, "%w", err)
	}
	c.SwitchPDIs = c.spdm.PDIs(spdm.SwitchPDI)
	p := c.Policy
	switch {
	case c.e.Driver != "" && c.e.Driver != c.Driver:
		return fail(CodeDriverVersion, "NVML says driver %s, the report %s", c.e.Driver, c.Driver)
	case c.e.VBIOS != "" && !strings.EqualFold(c.e.VBIOS, c.VBIOS):
		return fail(CodeVBIOSVersion, "NVML says VBIOS %s, the report %s", c.e.VBIOS, c.VBIOS)
	case c.Arch != LS10 && (p.Drivers != nil && !slices.Contains(p.Drivers, c.Driver) || !between(c.Driver, p.MinDriver, p.MaxDriver)):
		return fail(CodeDriverPolicy, "driver %s is not allowed (versions %q, from %q to %q)", c.Driver, p.Drivers, p.MinDriver, p.MaxDriver)
	case p.VBIOSes != nil && !slices.ContainsFunc(p.VBIOSes, func(s string) bool { return strings.EqualFold(s, c.VBIOS) }):
		return fail(CodeVBIOSPolicy, "VBIOS %s is not one of %s", c.VBIOS, strings.Join(p.VBIOSes, ", "))
	}
	return nil
}

// between reports whether version lies in the limits, either of which may be empty.
func between(version, least, most string) bool {
	v, ok := numbers(version)
	for _, limit := range []struct {
		text string
		sign int
	}{{least, -1}, {most, 1}} {
		if limit.text == "" {
			continue
		}
		l, isVersion := numbers(limit.text)
		if !ok || !isVersion || slices.Compare(v, l) == limit.sign {
			return false
		}
	}
	return true
}

func numbers(version string) ([]int, bool) {
	var list []int
	for part := range strings.SplitSeq(version, ".") {
		n, err := strconv.Atoi(part)
		if err != nil {
			return nil, false
		}
		list = append(list, n)
	}
	return list, true
}

// mode reads the report's multi-GPU mode.
func (c *checks) mode(context.Context) error {
	if b, ok := c.spdm.Byte(spdm.PPCIEStatus); ok {
		c.PPCIE = b != spdm.Disabled
	}
	if flag, ok := c.spdm.Field(spdm.FeatureFlag); ok {
		if len(flag) != 2 {
			return fail(CodeReportFormat, "feature flag %x has not 2 bytes", flag)
		}
		c.FeatureFlag = int(flag[0]) | int(flag[1])<<8
		c.PPCIE = c.PPCIE || c.FeatureFlag == featurePPCIE
	}
	switch {
	case c.PPCIE && !c.Policy.AllowPPCIE:
		return fail(CodeFeature, "the report is of a GPU in protected-PCIe mode, whose NVSwitches would have to be attested too")
	case c.FeatureFlag > featurePPCIE:
		return fail(CodeFeature, "the report is of a GPU in the unknown mode %d", c.FeatureFlag)
	}
	return nil
}

// featurePPCIE is the last of the feature flags that are known: single GPU, several
// GPUs with NVLink encryption, protected PCIe.
const featurePPCIE = 2

func (r *Result) mode() string {
	return fmt.Sprintf("%d (protected PCIe %t)", r.FeatureFlag, r.PPCIE)
}

func (c *checks) warn(format string, args ...any) {
	c.Warnings = append(c.Warnings, fmt.Sprintf(format, args...))
}

// switchBoard is the board of every LS10, whose reports do not name it.
const switchBoard = "5612_0002_890"

// ids returns the ids of the device's RIMs; a switch has no driver's.
func (c *checks) ids() (driver, vbios string, err error) {
	plain := strings.ReplaceAll(c.VBIOS, ".", "")
	if c.Arch == LS10 {
		return "", "NV_SWITCH_BIOS_" + switchBoard + "_" + plain, nil
	}
	var board [3]string
	for i, t := range []spdm.FieldType{spdm.Project, spdm.ProjectSKU, spdm.ChipSKU} {
		if board[i], err = c.spdm.Text(t); err != nil {
			return "", "", err
		}
	}
	vbios = strings.ToUpper("NV_GPU_VBIOS_" + strings.Join(board[:], "_") + "_" + plain)
	if c.Arch == Hopper {
		return "NV_GPU_DRIVER_GH100_" + c.Driver, vbios, nil
	}
	chip := "GB100"
	if _, ok := c.spdm.Field(spdm.ChipInfo); ok {
		if chip, err = c.spdm.Text(spdm.ChipInfo); err != nil {
			return "", "", err
		}
	}
	return "NV_GPU_CC_DRIVER_" + chip + "_" + c.Driver, vbios, nil
}

// rims finds and verifies the RIMs and compares the measurements.
func (c *checks) rims(ctx context.Context) (err error) {
	if c.DriverRIM.ID, c.VBIOSRIM.ID, err = c.ids(); err != nil {
		return fail(CodeReportFormat, "%w", err)
	}
	skip := -1
	if c.Arch != LS10 {
		// Measurement 35 is of NVDEC0, and means nothing while that is disabled.
		switch status, _ := c.spdm.Byte(spdm.NVDEC0Status); status {
		case spdm.Disabled:
			skip = 35
		case spdm.Enabled:
		default:
			return fail(CodeNVDEC, "NVDEC0 status %#x is neither enabled (0xaa) nor disabled (0x55)", status)
		}
	}
	var driver, vbios *candidate
	if c.Arch != LS10 {
		if driver, err = c.find(ctx, Driver, c.Driver, &c.DriverRIM, skip); err != nil {
			return err
		}
	}
	if vbios, err = c.find(ctx, VBIOS, c.VBIOS, &c.VBIOSRIM, skip); err != nil {
		return err
	}
	c.OEMID = vbios.rim.OEMID
	if driver != nil {
		if both := conflict(driver.rim, vbios.rim); len(both) > 0 {
			return fail(CodeConflict, "driver RIM %s and VBIOS RIM %s both set measurements %v", c.DriverRIM.ID, c.VBIOSRIM.ID, both)
		}
		c.Mismatches = append(c.Mismatches, driver.mismatches...)
	}
	c.NoConflict = true
	if c.Mismatches = append(c.Mismatches, vbios.mismatches...); len(c.Mismatches) > 0 {
		return fail(CodeMeasurement, "%s", describe(c.Mismatches))
	}
	return nil
}

// candidate is a verified RIM and how the device compares with it.
type candidate struct {
	rim        *rim.RIM
	mismatches []Mismatch
}

// find returns the RIM of an id that the device matches, or the one it comes
// nearest to. Entries of two files are never mixed.
func (c *checks) find(ctx context.Context, source Source, version string, state *RIMState, skip int) (*candidate, error) {
	files, err := c.RIMs.RIMs(ctx, state.ID)
	switch {
	case errors.Is(err, rim.ErrNotFound):
		return nil, fail(codeRIMMissing.of(source), "%w", err)
	case err != nil:
		return nil, fail(codeRIMFetch.of(source), "%w", err)
	}
	var best *candidate
	var failed []error
	id := state.ID
	for _, file := range files {
		found := RIMState{ID: id, File: file.Name, SHA256: file.SHA256, Fetched: true}
		r, err := c.verifyRIM(ctx, source, version, file, &found)
		if err != nil {
			if failed = append(failed, err); best == nil {
				*state = found
			}
			continue
		}
		if m := compare(c.spdm.Measurements, r, source, skip); best == nil || len(m) < len(best.mismatches) {
			best, *state = &candidate{r, m}, found
		}
		if len(best.mismatches) == 0 {
			break
		}
	}
	if best == nil {
		return nil, errors.Join(failed...)
	}
	return best, nil
}

// floors are the least numbers of active measurements, so that a signed but nearly
// empty RIM passes nobody. Hopper's and LS10's are those of NVIDIA's files; of
// Blackwell a VBIOS RIM with 20 is known and no driver RIM at all.
var floors = map[string]map[Source]int{
	Hopper:    {Driver: 20, VBIOS: 12},
	Blackwell: {Driver: 10, VBIOS: 12},
	LS10:      {VBIOS: 31},
}

func (c *checks) verifyRIM(ctx context.Context, source Source, version string, file rim.File, state *RIMState) (*rim.RIM, error) {
	no := func(code Code, err error) (*rim.RIM, error) {
		return nil, fail(code.of(source), "%s RIM %s: %w", source, file.Name, err)
	}
	sum := sha256.Sum256(file.Data)
	r := c.recall(sum)
	isSigned := r != nil
	if !isSigned {
		var err error
		if r, err = rim.Parse(file.Data); err != nil {
			return no(codeRIMFormat, err)
		}
	}
	state.Format = true
	edition := "GPU"
	if c.Arch == LS10 {
		edition = "SWITCH"
	}
	if r.Product != c.device.Chip || r.Edition != edition {
		return no(codeRIMProduct, fmt.Errorf("it is for %s %s, the device is a %s %s", r.Edition, r.Product, edition, c.device.Chip))
	}
	if !strings.EqualFold(r.Version, version) {
		return no(codeRIMVersion, fmt.Errorf("it is for version %s, the device has %s", r.Version, version))
	}
	state.Version, state.Chain.Status = true, "invalid"
	if !isSigned {
		err := r.VerifySignature(c.RIMRoot)
		switch {
		case errors.Is(err, rim.ErrDigest):
			return no(codeRIMDigest, err)
		case errors.Is(err, rim.ErrSignature):
			return no(codeRIMSignature, err)
		case err != nil:
			return no(codeRIMChain, err)
		}
		c.remember(sum, r)
	}
	state.Chain.Status = "valid"
	if err := r.ValidAt(c.now); err != nil {
		if state.Chain.Status = "expired"; !c.Policy.AllowExpiredRIM || !file.Pinned {
			return no(codeRIMExpired, err)
		}
		c.warn("%s RIM %s: %s; accepted, since its digest is pinned", source, file.Name, err)
	}
	_, state.Chain.Expires = certs.Validity(r.Chain)
	state.Signature = true
	var which []int
	for i := range r.Chain[1:] {
		which = append(which, i)
	}
	if code, err := c.askOCSP(ctx, r.Chain, which, &state.Chain); err != nil {
		return no(code, err)
	}
	if n, least := r.Active(), floors[c.Arch][source]; n < least {
		return no(codeRIMFloor, fmt.Errorf("it has %d measurements to compare, want at least %d", n, least))
	}
	state.Usable = true
	return r, nil
}

// conflict returns the indices that both RIMs claim.
func conflict(a, b *rim.RIM) (both []int) {
	for _, e := range a.Entries {
		if e.Active && slices.ContainsFunc(b.Entries, func(f rim.Entry) bool { return f.Active && f.Index == e.Index }) {
			both = append(both, e.Index)
		}
	}
	return both
}

// compare returns every active entry that none of its values fit; skip is an index
// to leave out.
func compare(measured [][]byte, r *rim.RIM, source Source, skip int) (list []Mismatch) {
	for _, e := range r.Entries {
		if !e.Active || e.Index == skip {
			continue
		}
		var value []byte
		if e.Index < len(measured) {
			value = measured[e.Index]
		}
		if !slices.ContainsFunc(e.Values, func(v []byte) bool { return bytes.Equal(v, value) }) {
			list = append(list, Mismatch{
				Index: e.Index, Source: source,
				GoldenSize: len(e.Values[0]), GoldenValue: hex.EncodeToString(e.Values[0]),
				RuntimeSize: len(value), RuntimeValue: hex.EncodeToString(value),
			})
		}
	}
	return list
}

// describe names the measurements that differ, and a likely cause where there is one.
func describe(list []Mismatch) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d measurements differ from the reference:", len(list))
	for _, source := range []Source{Driver, VBIOS} {
		var indices []string
		for _, m := range list {
			if m.Source == source {
				indices = append(indices, strconv.Itoa(m.Index))
			}
		}
		if indices != nil {
			fmt.Fprintf(&b, " %s %s;", source, strings.Join(indices, ", "))
		}
	}
	text := strings.TrimSuffix(b.String(), ";")
	if len(list) == 1 && list[0].Index == 9 && list[0].Source == VBIOS {
		text += " (only index 9: most likely the VBIOS RIM is older than the driver, since RIMs of one id are re-issued: `hostbuild rim fetch` it anew; or the GPU was left in an old state: stop the VM fully and start it, a reboot is not enough)"
	}
	return text
}
