package gpusim

import (
	"context"
	"crypto/sha512"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"coffer/internal/gpu"
	"coffer/internal/gpu/rim"
)

// RIM is a manifest before it is signed.
type RIM struct {
	ID                        string
	Product, Edition, Version string
	Entries                   []rim.Entry
	Edit                      func(xml string) string // of what is signed; nil leaves it
}

// DriverRIM returns the manifest that the device's driver matches.
func (d *Device) DriverRIM() *RIM {
	active := []int{7}
	if d.Arch == gpu.Blackwell {
		active = []int{14}
	}
	for i := 21; i <= 40; i++ {
		active = append(active, i)
	}
	return d.manifest(d.driverID(), d.Driver, active)
}

// VBIOSRIM returns the manifest that the device's VBIOS matches.
func (d *Device) VBIOSRIM() *RIM {
	last, except := 12, 7
	switch d.Arch {
	case gpu.Blackwell:
		last, except = 20, 14
	case gpu.LS10:
		last, except = 30, -1
	}
	var active []int
	for i := range last + 1 {
		if i != except {
			active = append(active, i)
		}
	}
	return d.manifest(d.vbiosID(), d.VBIOS, active)
}

func (d *Device) manifest(id, version string, active []int) *RIM {
	m := &RIM{ID: id, Product: d.Chip, Edition: "GPU", Version: version}
	if d.Arch == gpu.LS10 {
		m.Edition = "SWITCH"
	}
	for i := range 64 {
		e := rim.Entry{Index: i, Values: [][]byte{make([]byte, 48)}}
		if slices.Contains(active, i) {
			e.Active, e.Values[0] = true, d.Measurements[i]
			if i%3 == 0 {
				e.Values = [][]byte{make([]byte, 48), d.Measurements[i]}
			}
		}
		m.Entries = append(m.Entries, e)
	}
	return m
}

const (
	inScope    = `xmlns="http://standards.iso.org/iso/19770/-2/2015/schema.xsd" xmlns:h="http://www.w3.org/2001/04/xmlenc#sha384"`
	signedInfo = `<ds:CanonicalizationMethod Algorithm="http://www.w3.org/2006/12/xml-c14n11"></ds:CanonicalizationMethod>` +
		`<ds:SignatureMethod Algorithm="http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384"></ds:SignatureMethod>` +
		`<ds:Reference URI=""><ds:Transforms><ds:Transform Algorithm="http://www.w3.org/2000/09/xmldsig#enveloped-signature"></ds:Transform>` +
		`<ds:Transform Algorithm="http://www.w3.org/2006/12/xml-c14n11"></ds:Transform></ds:Transforms>` +
		`<ds:DigestMethod Algorithm="http://www.w3.org/2001/04/xmldsig-more#sha384"></ds:DigestMethod><ds:DigestValue>%s</ds:DigestValue></ds:Reference>`
)

// Sign returns the manifest, signed by chain[0]. The text is canonical as it
// stands: attributes sorted, no element abbreviated.
func (m *RIM) Sign(chain []*Authority) []byte {
	var b strings.Builder
	fmt.Fprintf(&b, `<SoftwareIdentity %s corpus="false" name="%s" patch="false" supplemental="false" tagId="sim-%s" tagVersion="0" version="1.0">`, inScope, m.Product, m.ID)
	b.WriteString("\n" + `<Entity name="Simulated" role="softwareCreator tagCreator"></Entity>`)
	fmt.Fprintf(&b, "\n"+`<Meta xmlns:t="https://trustedcomputinggroup.org/resource/tcg-reference-integrity-manifest-rim-information-model/" colloquialVersion="%s" edition="%s" product="%s" revision="r1" t:FirmwareManufacturerId="5703"></Meta>`, m.Version, m.Edition, m.Product)
	b.WriteString("\n<Payload>")
	for _, e := range m.Entries {
		active := map[bool]string{true: "True", false: "False"}[e.Active]
		fmt.Fprintf(&b, "\n"+`<Resource active="%s" alternatives="%d" index="%d" name="Measurement_%d" size="48" type="Measurement"`, active, len(e.Values), e.Index, e.Index)
		for i, v := range e.Values {
			fmt.Fprintf(&b, ` h:Hash%d="%s"`, i, hex.EncodeToString(v))
		}
		b.WriteString("></Resource>")
	}
	b.WriteString("\n</Payload>\n</SoftwareIdentity>")
	text := b.String()
	if m.Edit != nil {
		text = m.Edit(text)
	}
	digest := sha512.Sum384([]byte(text))
	info := fmt.Sprintf(signedInfo, base64.StdEncoding.EncodeToString(digest[:]))
	// As the root of its own subset SignedInfo shows every namespace in scope.
	scope := strings.Replace(inScope, ` xmlns:h=`, ` xmlns:ds="http://www.w3.org/2000/09/xmldsig#" xmlns:h=`, 1)
	value := rawSignature(chain[0].Key, []byte("<ds:SignedInfo "+scope+">"+info+"</ds:SignedInfo>"))
	var keys strings.Builder
	for _, a := range chain {
		keys.WriteString("<ds:X509Certificate>" + base64.StdEncoding.EncodeToString(a.Cert.Raw) + "</ds:X509Certificate>")
	}
	signature := `<ds:Signature xmlns:ds="http://www.w3.org/2000/09/xmldsig#"><ds:SignedInfo>` + info + "</ds:SignedInfo><ds:SignatureValue>" +
		base64.StdEncoding.EncodeToString(value) + "</ds:SignatureValue><ds:KeyInfo><ds:X509Data>" + keys.String() + "</ds:X509Data></ds:KeyInfo></ds:Signature>"
	at := strings.LastIndex(text, "</SoftwareIdentity>")
	return []byte(text[:at] + signature + text[at:])
}

// RIMs is signed manifests by id: a rim.Source, a folder, and a RIM service.
type RIMs map[string][][]byte

// Add signs manifests and adds them.
func (s RIMs) Add(chain []*Authority, manifests ...*RIM) RIMs {
	for _, m := range manifests {
		s[m.ID] = append(s[m.ID], m.Sign(chain))
	}
	return s
}

// NewRIMs returns what a device needs to be verified.
func (w *World) NewRIMs(d *Device) RIMs {
	s := RIMs{}.Add(w.RIMChain, d.VBIOSRIM())
	if d.Arch != gpu.LS10 {
		s.Add(w.RIMChain, d.DriverRIM())
	}
	return s
}

// RIMs implements rim.Source.
func (s RIMs) RIMs(_ context.Context, id string) (files []rim.File, err error) {
	for i, data := range s[id] {
		files = append(files, rim.File{Name: fmt.Sprintf("%s[%d]", id, i), Data: data})
	}
	if files == nil {
		err = fmt.Errorf("%w: %s", rim.ErrNotFound, id)
	}
	return files, err
}

// Write writes the manifests to a folder as rim.Dir finds them.
func (s RIMs) Write(dir string) error {
	for id, list := range s {
		for i, data := range list {
			name := id + ".xml"
			if i > 0 {
				name = fmt.Sprintf("%s.%d.xml", id, i+1)
			}
			if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

// ServeHTTP is NVIDIA's RIM service.
func (s RIMs) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	id := strings.TrimPrefix(r.URL.Path, "/v1/rim/")
	if id == "ids" {
		ids := []string{}
		for id := range s {
			ids = append(ids, id)
		}
		slices.Sort(ids)
		json.NewEncoder(w).Encode(map[string]any{"ids": ids, "request_id": "sim"})
		return
	}
	list := s[id]
	if list == nil {
		http.Error(w, `{"error":"not found"}`, http.StatusNotFound)
		return
	}
	json.NewEncoder(w).Encode(map[string]any{"id": id, "rim": list[0], "rim_format": "TCG", "request_id": "sim"})
}
