package snpguest

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"coffer/internal/snp"
	"coffer/internal/snp/verify"
	"coffer/internal/strict"
)

// encode is DER as a file of that encoding holds it.
func encode(encoding, pemType string, der []byte) []byte {
	if encoding == "pem" {
		return pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: der})
	}
	return der
}

// writeCert writes <dir>/<name>.<encoding>.
func writeCert(dir, name, encoding string, der []byte) error {
	if _, err := x509.ParseCertificate(der); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if err := os.WriteFile(filepath.Join(dir, name+"."+encoding), encode(encoding, "CERTIFICATE", der), 0o666); err != nil {
		return fmt.Errorf("Unable to create %s certificate: %w", name, err)
	}
	return nil
}

// makeDir makes the last level of a folder's path.
func makeDir(dir string) error {
	if err := os.Mkdir(dir, 0o777); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("Could not create certs folder: %w", err)
	}
	return nil
}

// readCert reads <dir>/<name>.pem, else .der.
func readCert(dir, name string) (*x509.Certificate, error) {
	for _, encoding := range []string{"pem", "der"} {
		b, err := strict.ReadFile(filepath.Join(dir, name+"."+encoding), maxFile)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("Could not open provided %s file: %w", name, err)
		}
		if block, _ := pem.Decode(b); block != nil {
			b = block.Bytes
		}
		c, err := x509.ParseCertificate(b)
		if err != nil {
			return nil, fmt.Errorf("%s.%s: %w", name, encoding, err)
		}
		return c, nil
	}
	return nil, fmt.Errorf("%s certificate not found in directory", name)
}

// readVEK reads the VLEK of a folder, else its VCEK, and names it.
func readVEK(dir string) (*x509.Certificate, snp.CertType, error) {
	vek, err := readCert(dir, "vlek")
	if err == nil {
		return vek, snp.VLEK, nil
	}
	for _, encoding := range []string{"pem", "der"} {
		if _, statErr := os.Stat(filepath.Join(dir, "vlek."+encoding)); statErr == nil {
			return nil, "", err
		}
	}
	vek, err = readCert(dir, "vcek")
	return vek, snp.VCEK, err
}

var models = []string{"milan", "genoa", "bergamo", "siena", "turin"}

// productOf is the product line that a model word belongs to.
func productOf(model string) (string, error) {
	word, err := oneOf("processor-model", model, models...)
	if err != nil {
		return "", err
	}
	switch word {
	case "milan":
		return "Milan", nil
	case "turin":
		return "Turin", nil
	}
	return "Genoa", nil
}

// reportProduct is the product line of a report; see virtee's get_processor_model.
func reportProduct(r *snp.Report) (string, error) {
	if r.Version < 3 && turinTCB(r) {
		return "Turin", nil
	}
	if r.Version < 3 {
		return "", errors.New("Attestation report could be either Milan or Genoa. Update firmware to get a new version of the report.")
	}
	return r.Product()
}

// caArgs are the arguments of fetch ca and fetch crl.
func caArgs(a *args) (encoding, dir, product string, signer snp.CertType, err error) {
	fromReport := a.has("report")
	most, names := 3, "<encoding> <certs-dir> <processor-model>"
	if fromReport {
		most, names = 2, "<encoding> <certs-dir>"
	}
	if err = a.want(most, most, names); err != nil {
		return
	}
	if encoding, err = oneOf("encoding", a.positional[0], "pem", "der"); err != nil {
		return
	}
	dir = a.positional[1]
	endorser, err := oneOf("endorser", a.or("endorser", "vcek"), "vcek", "vlek")
	if err != nil {
		return
	}
	signer = snp.CertType(strings.ToUpper(endorser))
	if !fromReport {
		product, err = productOf(a.positional[2])
		return
	}
	rep, err := readReport(a.or("report", ""))
	if err == nil {
		product, err = reportProduct(rep)
	}
	return
}

// rootsOf are the trusted roots of a product. A simulated build has its own chip
// in place of AMD's, whatever product is asked for: no other report exists there.
func (r *run) rootsOf(product string) (*verify.Roots, error) {
	all, err := r.trustedRoots()
	if err != nil {
		return nil, err
	}
	if i := slices.IndexFunc(all, func(x verify.Roots) bool { return x.Simulated }); i >= 0 {
		return &all[i], nil
	}
	i := slices.IndexFunc(all, func(x verify.Roots) bool { return x.Product == product })
	if i < 0 {
		return nil, fmt.Errorf("no roots of %s are known", product)
	}
	return &all[i], nil
}

func fetchCA(r *run, a *args) error {
	encoding, dir, product, signer, err := caArgs(a)
	if err != nil {
		return err
	}
	roots, err := r.rootsOf(product)
	if err != nil {
		return err
	}
	intermediate, name := roots.ASK, "ask"
	if signer == snp.VLEK {
		intermediate, name = roots.ASVK, "asvk"
	}
	if intermediate == nil {
		return fmt.Errorf("no %s of %s is known", strings.ToUpper(name), roots.Product)
	}
	if err := makeDir(dir); err != nil {
		return err
	}
	if err := writeCert(dir, "ark", encoding, roots.ARK.Raw); err != nil {
		return err
	}
	return writeCert(dir, name, encoding, intermediate.Raw)
}

func fetchCRL(r *run, a *args) error {
	encoding, dir, product, signer, err := caArgs(a)
	if err != nil {
		return err
	}
	roots, err := r.rootsOf(product)
	if err != nil {
		return err
	}
	der, err := r.ask("/v1/snp/crl", url.Values{"product": {roots.Product}, "endorser": {strings.ToLower(string(signer))}}, nil)
	if err != nil {
		return fmt.Errorf("Unable to fetch CRL: %w", err)
	}
	list, err := x509.ParseRevocationList(der)
	if err == nil {
		err = list.CheckSignatureFrom(roots.ARK)
	}
	if err != nil {
		return fmt.Errorf("CRL of %s: %w", roots.Product, err)
	}
	if err := makeDir(dir); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "crl."+encoding), encode(encoding, "X509 CRL", der), 0o666)
}

func fetchVCEK(r *run, a *args) error {
	if err := a.want(3, 3, "<encoding> <certs-dir> <att-report-path>"); err != nil {
		return err
	}
	encoding, err := oneOf("encoding", a.positional[0], "pem", "der")
	if err != nil {
		return err
	}
	if a.has("processor-model") {
		if _, err := productOf(a.or("processor-model", "")); err != nil {
			return err
		}
	}
	rep, err := readReport(a.positional[2])
	if err != nil {
		return err
	}
	if rep.ChipID == [64]byte{} {
		return errors.New("Hardware ID is 0s on attestation report. Confirm that MASK_CHIP_ID is set to 0.")
	}
	der, err := r.ask("/v1/snp/vcek", nil, rep.Marshal())
	if err != nil {
		return fmt.Errorf("Unable to fetch VCEK: %w", err)
	}
	if err := makeDir(a.positional[1]); err != nil {
		return err
	}
	return writeCert(a.positional[1], "vcek", encoding, der)
}

// certificates writes what the host has given to the guest.
func certificates(r *run, a *args) error {
	if err := a.want(2, 2, "<encoding> <certs-dir>"); err != nil {
		return err
	}
	encoding, err := oneOf("encoding", a.positional[0], "pem", "der")
	if err != nil {
		return err
	}
	table, err := r.ask("/v1/snp/certificates", nil, nil)
	if err != nil {
		return fmt.Errorf("Failed to get extended report. %w", err)
	}
	certs, err := snp.ParseCertTable(table)
	if err != nil {
		return err
	}
	dir := a.positional[1]
	if err := makeDir(dir); err != nil {
		return err
	}
	if len(certs) == 0 {
		fmt.Fprintln(r.Stderr, "No certificates were loaded by the host...")
	}
	vlek := false // as virtee does, an ASK that comes after a VLEK is its issuer
	for _, c := range certs {
		name := strings.ToLower(string(c.Type))
		vlek = vlek || c.Type == snp.VLEK
		if c.Type == snp.ASK && vlek {
			name = "asvk"
		}
		if err := writeCert(dir, name, encoding, c.Data); err != nil {
			return err
		}
	}
	return nil
}
