// Package rim reads NVIDIA's reference integrity manifests (RIMs): signed SWID
// tags (ISO 19770-2:2015 with TCG attributes) that list, for one version of a
// driver or VBIOS, the measurements a device may have. It also finds them: in a
// folder of pinned files, and at NVIDIA's RIM service.
//
// It promises that the values it returns are read from the very tree whose digest
// the signature covers, from one place in it; that RIM and signature have the one
// form NVIDIA uses, exactly; and that Verify accepts only what chains to the root
// it is given. The RIM's id is not signed: the caller compares product, edition
// and version, and asks whether certificates are revoked.
package rim

import (
	"crypto/ecdsa"
	"crypto/sha512"
	"crypto/subtle"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"strconv"
	"strings"
	"time"

	"coffer/internal/gpu/certs"
)

// maxSize is the largest RIM that is read; NVIDIA's have up to 27 kB.
const maxSize = 1 << 20

// The namespaces and algorithms of a RIM.
const (
	nsSWID = "http://standards.iso.org/iso/19770/-2/2015/schema.xsd"
	nsTCG  = "https://trustedcomputinggroup.org/resource/tcg-reference-integrity-manifest-rim-information-model/"
	nsHash = "http://www.w3.org/2001/04/xmlenc#sha384"
	nsSig  = "http://www.w3.org/2000/09/xmldsig#"

	algC14N      = "http://www.w3.org/2006/12/xml-c14n11"
	algEnveloped = "http://www.w3.org/2000/09/xmldsig#enveloped-signature"
	algECDSA     = "http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384"
	algSHA384    = "http://www.w3.org/2001/04/xmldsig-more#sha384"
)

const (
	digestSize = 48
	maxIndex   = 63
	maxCerts   = 6
)

var (
	// ErrFormat is a RIM that has not the exact form.
	ErrFormat = errors.New("RIM has not the exact form")
	// ErrDigest is a RIM whose content was changed after it was signed.
	ErrDigest = errors.New("RIM's content is not what was signed")
	// ErrSignature is a RIM whose signature its own certificate did not make.
	ErrSignature = errors.New("RIM's signature is wrong")
	// ErrChain is a RIM whose signer does not chain to the root.
	ErrChain = errors.New("RIM's signer is not trusted")
	// ErrExpired is a RIM whose signer's chain is not valid at this time. They
	// live two years: fetch the RIM anew.
	ErrExpired = errors.New("RIM's signer is not valid at this time")
)

// RIM is a manifest that was read, not yet verified.
type RIM struct {
	TagID   string
	Product string // "GH100", "GB100", "LS10"
	Edition string // "GPU", "SWITCH"
	Version string // of the driver or VBIOS it is for
	OEMID   string // "5703", NVIDIA
	Entries []Entry
	Chain   []*x509.Certificate // of the signer, leaf to root

	root, signature, signedInfo *element
	digest, value               []byte
}

// Entry is one measurement: a device's value must be one of Values where Active.
type Entry struct {
	Index  int // 0 to 63; SPDM's block index less one
	Active bool
	Values [][]byte // SHA-384, one or more
}

// Parse reads a RIM. It checks form only.
func Parse(data []byte) (*RIM, error) {
	if len(data) > maxSize {
		return nil, fmt.Errorf("%w: %d bytes, at most %d are read", ErrFormat, len(data), maxSize)
	}
	root, err := parseXML(data)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	r := &RIM{root: root}
	for _, read := range []func() error{r.readParts, r.readSignature} {
		if err := read(); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrFormat, err)
		}
	}
	return r, nil
}

// readParts reads the root element and the parts below it, each there once.
func (r *RIM) readParts() error {
	if !r.root.is(nsSWID, "SoftwareIdentity") {
		return fmt.Errorf("the root is <%s>, want <SoftwareIdentity>", r.root.local)
	}
	// A patch, a supplement or a corpus does not speak for the whole.
	for _, flag := range []string{"corpus", "patch", "supplemental"} {
		if v, ok := r.root.attr("", flag); ok && v != "false" {
			return fmt.Errorf("attribute %s is %q", flag, v)
		}
	}
	r.TagID, _ = r.root.attr("", "tagId")
	list, err := r.root.elements()
	if err != nil {
		return err
	}
	parts := map[string]*element{}
	for _, e := range list {
		want := nsSWID
		if e.local == "Signature" {
			want = nsSig
		}
		if parts[e.local] != nil || e.space != want {
			return fmt.Errorf("<%s> is there twice or in another namespace", e.local)
		}
		parts[e.local] = e
	}
	if r.signature = parts["Signature"]; len(list) != 4 || parts["Entity"] == nil || parts["Meta"] == nil || parts["Payload"] == nil || r.signature == nil {
		return errors.New("the root does not hold Entity, Meta, Payload and Signature")
	}
	if err := r.readMeta(parts["Meta"]); err != nil {
		return err
	}
	return r.readPayload(parts["Payload"])
}

func (r *RIM) readMeta(meta *element) error {
	for _, a := range []struct {
		to          *string
		space, name string
	}{
		{&r.Version, "", "colloquialVersion"}, {&r.Product, "", "product"}, {&r.Edition, "", "edition"}, {&r.OEMID, nsTCG, "FirmwareManufacturerId"},
	} {
		if *a.to, _ = meta.attr(a.space, a.name); *a.to == "" {
			return fmt.Errorf("<Meta> has no %s", a.name)
		}
	}
	if name, _ := r.root.attr("", "name"); name != r.Product {
		return fmt.Errorf("name %q is not the product %q", name, r.Product)
	}
	return nil
}

func (r *RIM) readPayload(payload *element) error {
	list, err := payload.elements()
	if err != nil {
		return err
	}
	seen := [maxIndex + 1]bool{}
	for _, e := range list {
		entry, err := readEntry(e)
		if err != nil {
			return err
		}
		if seen[entry.Index] {
			return fmt.Errorf("measurement %d is there twice", entry.Index)
		}
		seen[entry.Index] = true
		r.Entries = append(r.Entries, entry)
	}
	return nil
}

func readEntry(e *element) (Entry, error) {
	if kind, _ := e.attr("", "type"); !e.is(nsSWID, "Resource") || kind != "Measurement" || len(e.children) > 0 {
		return Entry{}, fmt.Errorf("<%s type=%q> is no measurement", e.local, kind)
	}
	index, err := number(e, "index", 0, maxIndex)
	if err != nil {
		return Entry{}, err
	}
	alternatives, err := number(e, "alternatives", 1, maxAttrs)
	if err == nil {
		_, err = number(e, "size", digestSize, digestSize)
	}
	if err != nil {
		return Entry{}, fmt.Errorf("measurement %d: %w", index, err)
	}
	entry := Entry{Index: index}
	switch active, _ := e.attr("", "active"); active {
	case "True":
		entry.Active = true
	case "False":
	default:
		return Entry{}, fmt.Errorf("measurement %d: active is %q, neither True nor False", index, active)
	}
	hashes := 0
	for _, a := range e.attrs {
		if a.space == nsHash {
			hashes++
		}
	}
	for i := range alternatives {
		text, _ := e.attr(nsHash, "Hash"+strconv.Itoa(i))
		value, err := hex.DecodeString(text)
		if err != nil || len(value) != digestSize || hashes != alternatives {
			return Entry{}, fmt.Errorf("measurement %d has not the %d hashes of %d bytes it announces", index, alternatives, digestSize)
		}
		entry.Values = append(entry.Values, value)
	}
	return entry, nil
}

// number reads a decimal attribute in its one spelling.
func number(e *element, name string, least, most int) (int, error) {
	text, _ := e.attr("", name)
	n, err := strconv.Atoi(text)
	if err != nil || strconv.Itoa(n) != text || n < least || n > most {
		return 0, fmt.Errorf("%s is %q, want a number from %d to %d", name, text, least, most)
	}
	return n, nil
}

// readSignature reads the signature, whose form has no choices.
func (r *RIM) readSignature() error {
	var value, key, reference, transforms, digestMethod, digestValue, x509Data *element
	var c14n, signWith, enveloped, again *element
	for _, step := range []struct {
		in    **element
		names []string
		out   []**element
	}{
		{&r.signature, []string{"SignedInfo", "SignatureValue", "KeyInfo"}, []**element{&r.signedInfo, &value, &key}},
		{&r.signedInfo, []string{"CanonicalizationMethod", "SignatureMethod", "Reference"}, []**element{&c14n, &signWith, &reference}},
		{&reference, []string{"Transforms", "DigestMethod", "DigestValue"}, []**element{&transforms, &digestMethod, &digestValue}},
		{&transforms, []string{"Transform", "Transform"}, []**element{&enveloped, &again}},
		{&key, []string{"X509Data"}, []**element{&x509Data}},
	} {
		list, err := (*step.in).elements()
		if err != nil {
			return err
		}
		if len(list) != len(step.names) {
			return fmt.Errorf("<%s> holds %d elements, want %d", (*step.in).local, len(list), len(step.names))
		}
		for i, e := range list {
			if !e.is(nsSig, step.names[i]) {
				return fmt.Errorf("<%s> holds <%s>, want <%s>", (*step.in).local, e.local, step.names[i])
			}
			*step.out[i] = e
		}
	}
	for _, a := range []struct {
		e    *element
		want string
	}{{c14n, algC14N}, {signWith, algECDSA}, {enveloped, algEnveloped}, {again, algC14N}, {digestMethod, algSHA384}} {
		if got, _ := a.e.attr("", "Algorithm"); got != a.want || len(a.e.children) > 0 {
			return fmt.Errorf("algorithm of <%s> is %q, want %q", a.e.local, got, a.want)
		}
	}
	if uri, ok := reference.attr("", "URI"); !ok || uri != "" || len(reference.attrs) != 1 {
		return fmt.Errorf("the signature covers %q, not the whole document", uri)
	}
	var err error
	if r.digest, err = binary(digestValue, digestSize); err != nil {
		return err
	}
	if r.value, err = binary(value, 2*digestSize); err != nil {
		return err
	}
	return r.readChain(x509Data)
}

func (r *RIM) readChain(data *element) error {
	list, err := data.elements()
	if err != nil {
		return err
	}
	if len(list) < 2 || len(list) > maxCerts {
		return fmt.Errorf("%d certificates, want 2 to %d", len(list), maxCerts)
	}
	for i, e := range list {
		if !e.is(nsSig, "X509Certificate") {
			return fmt.Errorf("<X509Data> holds <%s>", e.local)
		}
		der, err := binary(e, 0)
		if err != nil {
			return err
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return fmt.Errorf("certificate %d: %w", i, err)
		}
		r.Chain = append(r.Chain, cert)
	}
	return nil
}

// binary reads base64 text, size bytes of it unless size is 0.
func binary(e *element, size int) ([]byte, error) {
	text, err := e.text()
	if err != nil {
		return nil, err
	}
	b, err := base64.StdEncoding.Strict().DecodeString(strings.Join(strings.Fields(text), ""))
	if err == nil && size != 0 && len(b) != size {
		err = fmt.Errorf("%d bytes, want %d", len(b), size)
	}
	if err != nil {
		return nil, fmt.Errorf("<%s>: %w", e.local, err)
	}
	return b, nil
}

// Active returns the number of entries that a device is compared with.
func (r *RIM) Active() int {
	n := 0
	for _, e := range r.Entries {
		if e.Active {
			n++
		}
	}
	return n
}

// Verify checks the signature, and that its chain is valid at now; only the latter
// can be ErrExpired.
func (r *RIM) Verify(root *x509.Certificate, now time.Time) error {
	if err := r.VerifySignature(root); err != nil {
		return err
	}
	return r.ValidAt(now)
}

// ValidAt checks that the signer's chain is valid at now.
func (r *RIM) ValidAt(now time.Time) error {
	if err := certs.ValidAt(r.Chain, now); err != nil {
		return fmt.Errorf("%w: %w", ErrExpired, err)
	}
	return nil
}

// VerifySignature checks digest, signature and chain, at no particular time.
func (r *RIM) VerifySignature(root *x509.Certificate) error {
	digest := sha512.Sum384(r.root.canonical(r.signature))
	if subtle.ConstantTimeCompare(digest[:], r.digest) != 1 {
		return fmt.Errorf("%w: digest %x, signed is %x", ErrDigest, digest, r.digest)
	}
	key, ok := r.Chain[0].PublicKey.(*ecdsa.PublicKey)
	signed := sha512.Sum384(r.signedInfo.canonical(nil))
	a, b := new(big.Int).SetBytes(r.value[:digestSize]), new(big.Int).SetBytes(r.value[digestSize:])
	if !ok || !ecdsa.Verify(key, signed[:], a, b) {
		return ErrSignature
	}
	if err := certs.VerifyPath(r.Chain, root); err != nil {
		return fmt.Errorf("%w: %w", ErrChain, err)
	}
	return nil
}
