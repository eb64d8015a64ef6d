package snpguest

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"coffer/internal/guestconfig"
	"coffer/internal/snp"
	"coffer/internal/snp/verify"
)

func verifyCerts(r *run, a *args) error {
	if err := a.want(1, 1, "<certs-dir>"); err != nil {
		return err
	}
	dir := a.positional[0]
	ark, err := readCert(dir, "ark")
	if err != nil {
		return err
	}
	vek, kind, err := readVEK(dir)
	if err != nil {
		return err
	}
	name := "ask"
	if kind == snp.VLEK {
		name = "asvk"
	}
	ask, err := readCert(dir, name)
	if err != nil {
		return err
	}
	roots, err := r.trustedRoots()
	if err != nil {
		return err
	}
	if ark.CheckSignature(ark.SignatureAlgorithm, ark.RawTBSCertificate, ark.Signature) != nil {
		return errors.New("The AMD ARK is not self-signed!")
	}
	if !slices.ContainsFunc(roots, func(x verify.Roots) bool { return bytes.Equal(x.ARK.Raw, ark.Raw) }) {
		return errors.New("The ARK is not AMD's")
	}
	r.printf("The AMD ARK was self-signed!\n")
	name = strings.ToUpper(name)
	if ark.CheckSignature(ask.SignatureAlgorithm, ask.RawTBSCertificate, ask.Signature) != nil {
		return fmt.Errorf("The AMD %s was not signed by the AMD ARK!", name)
	}
	r.printf("The AMD %s was signed by the AMD ARK!\n", name)
	if ask.CheckSignature(vek.SignatureAlgorithm, vek.RawTBSCertificate, vek.Signature) != nil {
		return fmt.Errorf("The %s was not signed by the AMD %s!", kind, name)
	}
	r.printf("The %s was signed by the AMD %s!\n", kind, name)
	return nil
}

func verifyAttestation(r *run, a *args) error {
	if err := a.want(2, 2, "<certs-dir> <att-report-path>"); err != nil {
		return err
	}
	if a.has("tcb") && a.has("signature") {
		return usageError("the argument '--tcb' cannot be used with '--signature'")
	}
	if a.has("processor-model") {
		if _, err := productOf(a.or("processor-model", "")); err != nil {
			return err
		}
	}
	rep, err := readReport(a.positional[1])
	if err != nil {
		return err
	}
	product, err := reportProduct(rep)
	if err != nil {
		return err
	}
	vek, kind, err := readVEK(a.positional[0])
	if err != nil {
		return err
	}
	if !a.has("signature") {
		if err := r.verifyTCB(rep, vek, product); err != nil {
			return err
		}
	}
	if !a.has("tcb") {
		if verify.Signature(rep, vek) != nil {
			return errors.New("VEK did NOT sign the Attestation Report!")
		}
	}
	// virtee's program is content here.
	if !a.has("tcb") && !a.has("signature") {
		if err := r.verifyAll(rep, []snp.Cert{{Type: kind, Data: vek.Raw}}); err != nil {
			return err
		}
	}
	if !a.has("tcb") {
		r.printf("VEK signed the Attestation Report!\n")
	}
	return nil
}

// verifyTCB compares the report's TCB with the certificate's, part by part.
func (r *run) verifyTCB(rep *snp.Report, vek *x509.Certificate, product string) error {
	cert, err := verify.CertTCB(vek)
	if err != nil {
		return err
	}
	t := rep.ReportedTCB
	for _, p := range []struct {
		name      string
		got, want uint8
	}{{"Boot Loader", t.Bootloader, cert.Bootloader}, {"TEE", t.TEE, cert.TEE}, {"SNP", t.SNP, cert.SNP}, {"Microcode", t.Microcode, cert.Microcode}} {
		if p.got != p.want {
			return fmt.Errorf("Report TCB %s and Certificate %s mismatch encountered.", p.name, p.name)
		}
		r.printf("Reported TCB %s from certificate matches the attestation report.\n", p.name)
	}
	if product != "Turin" {
		return nil
	}
	switch {
	case rep.Version < 3:
		return errors.New("Turin Attestation is not supported in version 2 of the report.")
	case t.FMC == nil || cert.FMC == nil || *t.FMC != *cert.FMC:
		return errors.New("Report TCB FMC and Certificate FMC mismatch encountered.")
	}
	r.printf("Reported TCB FMC from certificate matches the attestation report.\n")
	return nil
}

// verifyAll is what virtee's program leaves out.
func (r *run) verifyAll(rep *snp.Report, certs []snp.Cert) error {
	roots, err := r.trustedRoots()
	if err != nil {
		return err
	}
	peers, err := r.peers()
	if err != nil {
		return err
	}
	minimum := verify.DefaultMinTCB()
	for product, t := range peers.MinTCB {
		minimum[product] = snp.TCB{FMC: t.FMC, Bootloader: t.Bootloader, TEE: t.TEE, SNP: t.SNP, Microcode: t.Microcode}
	}
	if _, err := verify.Verify(rep, certs, verify.Options{
		Roots: roots, Now: r.Now, MaxVMPL: 3, MinTCB: minimum, AllowVLEK: peers.AllowVLEK,
	}); err != nil {
		return err
	}
	if len(peers.Measurements) > 0 && !slices.Contains(peers.Measurements, hex.EncodeToString(rep.Measurement[:])) {
		return fmt.Errorf("measurement %x is none of the %d that this CVM's configuration accepts", rep.Measurement, len(peers.Measurements))
	}
	return nil
}

// peers is what the guest config says about other CVMs. Outside of a guest the
// strict defaults hold.
func (r *run) peers() (*guestconfig.Peers, error) {
	text, err := r.ask("/v1/peers", nil, nil)
	if errors.Is(err, errNoAgent) {
		return &guestconfig.Peers{}, nil
	}
	if err != nil {
		return nil, err
	}
	var p guestconfig.Peers
	if err := json.Unmarshal(text, &p); err != nil {
		return nil, fmt.Errorf("the agent's answer: %w", err)
	}
	return &p, nil
}
