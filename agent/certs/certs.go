// Package certs finds the certificates of the chips that sign attestation
// reports: the one that the guest runs on, and those of other CVMs. It looks at
// what the host gave, what an earlier boot has left on the encrypted disk, what
// lies in folders of the user's drives, and last at AMD's key distribution
// service (KDS) or a mirror of it.
//
// Wherever a certificate comes from, it is checked before it is used: it chains
// to AMD's pinned roots, it signed the very report, and chip and TCB are the
// report's. So a hostile source can withhold a certificate and nothing more, and
// the TLS of the KDS does not matter.
package certs

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"coffer/internal/snp"
	"coffer/internal/snp/verify"
	"coffer/internal/strict"
)

// ErrUnknown means that no source has the certificate.
var ErrUnknown = errors.New("no certificate of the chip that signed the report is known")

// Config says where to look.
type Config struct {
	Cache   string         // folder that keeps certificates, "": none
	Folders []string       // folders with .pem and .der files of the user, in the roots of drives
	KDS     string         // https://host of AMD's service or a mirror, "": not asked
	Roots   []verify.Roots // what certificates must chain to
	HTTP    http.RoundTripper
	Now     func() time.Time
}

// Store finds certificates and keeps them. It is safe for concurrent use.
type Store struct {
	cfg Config

	mu     sync.Mutex
	known  map[string][]byte    // by name; DER
	failed map[string]time.Time // when the KDS failed to give one
	kds    chan struct{}        // holds one token while the KDS is asked
}

// Bounds.
const (
	maxCert  = 16 << 10
	maxCRL   = 1 << 20
	maxFiles = 256 // in a folder of the user
	maxKnown = 1024
	kdsTime  = 10 * time.Second
	kdsRetry = time.Minute // the KDS throttles, and a peer can name any chip
)

// New makes a store.
func New(cfg Config) *Store {
	if cfg.HTTP == nil {
		cfg.HTTP = &http.Transport{DisableKeepAlives: true, MaxResponseHeaderBytes: 16 << 10}
	}
	return &Store{cfg: cfg, known: map[string][]byte{}, failed: map[string]time.Time{}, kds: make(chan struct{}, 1)}
}

// Roots are what certificates must chain to.
func (s *Store) Roots() []verify.Roots { return s.cfg.Roots }

// name is what identifies the certificate of a report's chip at its TCB.
func name(r *snp.Report, product string) string {
	t := r.ReportedTCB
	fmc := uint8(0)
	if t.FMC != nil {
		fmc = *t.FMC
	}
	return fmt.Sprintf("%s-%x-%d-%d-%d-%d-%d.der", product, r.ChipID, fmc, t.Bootloader, t.TEE, t.SNP, t.Microcode)
}

func (s *Store) fits(r *snp.Report, der []byte) error {
	return verify.CheckVEK(r, der, verify.Options{Roots: s.cfg.Roots, Now: s.cfg.Now(), AllowVLEK: true, AllowMaskedChipID: true})
}

// Add keeps a certificate that the host gave along with the report, if it is
// good for it.
func (s *Store) Add(r *snp.Report, certs []snp.Cert) error {
	product, err := r.Product()
	if err != nil {
		return err
	}
	err = ErrUnknown
	for _, c := range certs {
		if c.Type != snp.VCEK && c.Type != snp.VLEK {
			continue
		}
		if err = s.fits(r, c.Data); err == nil {
			s.keep(name(r, product), c.Data)
			return nil
		}
	}
	return err
}

// keep remembers a certificate, over the next boot as well.
func (s *Store) keep(name string, der []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.known) < maxKnown {
		s.known[name] = der
	}
	if s.cfg.Cache == "" {
		return
	}
	// Losing one costs another look-up.
	root, err := openCache(s.cfg.Cache)
	if err != nil {
		return
	}
	defer root.Close()
	if root.WriteFile("new", der, 0o600) == nil {
		root.Rename("new", name)
	}
}

func openCache(dir string) (*os.Root, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	return os.OpenRoot(dir)
}

// VCEK is the certificate, as DER, of the key that signed the report.
func (s *Store) VCEK(ctx context.Context, r *snp.Report) (der []byte, source string, err error) {
	product, err := r.Product()
	if err != nil {
		return nil, "", err
	}
	name := name(r, product)
	s.mu.Lock()
	der = s.known[name]
	s.mu.Unlock()
	if der != nil && s.fits(r, der) == nil {
		return der, "cache", nil
	}
	if der = s.cached(r, name); der != nil {
		return der, "cache", nil
	}
	for _, dir := range s.cfg.Folders {
		if der = s.inFolder(r, dir); der != nil {
			s.keep(name, der)
			return der, dir, nil
		}
	}
	if s.cfg.KDS == "" {
		return nil, "", ErrUnknown
	}
	if der, err = s.fetchVCEK(ctx, r, name); err != nil {
		return nil, "", fmt.Errorf("%w; %s: %w", ErrUnknown, s.cfg.KDS, err)
	}
	s.keep(name, der)
	return der, s.cfg.KDS, nil
}

func (s *Store) cached(r *snp.Report, name string) []byte {
	if s.cfg.Cache == "" {
		return nil
	}
	root, err := openCache(s.cfg.Cache)
	if err != nil {
		return nil
	}
	defer root.Close()
	der, err := readIn(root, name)
	if err != nil || s.fits(r, der) != nil {
		return nil
	}
	return der
}

// inFolder looks through a folder that the host or the workload may have filled.
func (s *Store) inFolder(r *snp.Report, dir string) []byte {
	drive, err := os.OpenRoot(filepath.Dir(dir))
	if err != nil {
		return nil
	}
	defer drive.Close()
	root, err := drive.OpenRoot(filepath.Base(dir)) // no link leads out of the drive
	if err != nil {
		return nil
	}
	defer root.Close()
	d, err := root.Open(".")
	if err != nil {
		return nil
	}
	defer d.Close()
	names, err := d.Readdirnames(maxFiles)
	if err != nil {
		return nil
	}
	slices.Sort(names)
	for _, n := range names {
		if !strings.HasSuffix(n, ".pem") && !strings.HasSuffix(n, ".der") {
			continue
		}
		b, err := readIn(root, n)
		if err != nil {
			continue
		}
		if block, _ := pem.Decode(b); block != nil {
			b = block.Bytes
		}
		if s.fits(r, b) == nil {
			return b
		}
	}
	return nil
}

// readIn reads a small regular file. It does not wait for a pipe's other end.
func readIn(root *os.Root, name string) ([]byte, error) {
	fi, err := root.Lstat(name)
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() || fi.Size() > maxCert {
		return nil, fmt.Errorf("%s is no small file", name)
	}
	f, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxCert))
}

// fetchVCEK asks the KDS, one request at a time, and not for what it has just
// failed to give.
func (s *Store) fetchVCEK(ctx context.Context, r *snp.Report, name string) ([]byte, error) {
	path, err := r.VCEKPath()
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	last, failed := s.failed[name]
	s.mu.Unlock()
	if failed && s.cfg.Now().Sub(last).Abs() < kdsRetry {
		return nil, errors.New("it did not have it a minute ago")
	}
	der, err := s.get(ctx, path, maxCert)
	if err == nil {
		err = s.fits(r, der)
	}
	if err != nil && ctx.Err() == nil {
		s.mu.Lock()
		if len(s.failed) >= maxKnown {
			clear(s.failed)
		}
		s.failed[name] = s.cfg.Now()
		s.mu.Unlock()
	}
	return der, err
}

func (s *Store) get(ctx context.Context, path string, limit int64) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, kdsTime)
	defer cancel()
	select {
	case s.kds <- struct{}{}:
		defer func() { <-s.kds }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.cfg.KDS+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := s.cfg.HTTP.RoundTrip(req) // no redirects
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("status %d", resp.StatusCode)
	}
	return strict.ReadAll(resp.Body, limit)
}

// CRL is the revocation list of a product, as DER, signed by its ARK.
func (s *Store) CRL(ctx context.Context, product string, vlek bool) ([]byte, error) {
	i := slices.IndexFunc(s.cfg.Roots, func(r verify.Roots) bool { return r.Product == product })
	if i < 0 || s.cfg.KDS == "" {
		return nil, fmt.Errorf("no revocation list of %s is to be had: %w", product, ErrUnknown)
	}
	kind := "vcek"
	if vlek {
		kind = "vlek"
	}
	der, err := s.get(ctx, "/"+kind+"/v1/"+product+"/crl", maxCRL)
	if err != nil {
		return nil, fmt.Errorf("revocation list of %s: %s: %w", product, s.cfg.KDS, err)
	}
	list, err := x509.ParseRevocationList(der)
	if err == nil {
		err = list.CheckSignatureFrom(s.cfg.Roots[i].ARK)
	}
	if err != nil {
		return nil, fmt.Errorf("revocation list of %s: %w", product, err)
	}
	return der, nil
}
