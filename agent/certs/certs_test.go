package certs_test

import (
	"bytes"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"coffer/agent/certs"
	"coffer/internal/snp"
	"coffer/internal/snp/verify"
	"coffer/test/simsnp"
)

type chip struct {
	*simsnp.Chip
	roots  []verify.Roots
	report *snp.Report
	vcek   []byte
}

func newChip(t *testing.T, product string) *chip {
	t.Helper()
	c, err := simsnp.New(simsnp.Params{Product: product})
	if err != nil {
		t.Fatal(err)
	}
	out := &chip{Chip: c}
	if out.roots, err = verify.LoadRoots(c.RootsPEM()); err != nil {
		t.Fatal(err)
	}
	if out.report, err = c.Report([48]byte{1}, [64]byte{2}, 1); err != nil {
		t.Fatal(err)
	}
	for _, cert := range c.Certs() {
		if cert.Type == snp.VCEK {
			out.vcek = cert.Data
		}
	}
	return out
}

// kds answers requests by their path and query.
type kds struct {
	answers map[string][]byte
	asked   []string
	status  int
}

func (k *kds) RoundTrip(r *http.Request) (*http.Response, error) {
	k.asked = append(k.asked, r.URL.String())
	body, ok := k.answers[r.URL.RequestURI()]
	status := k.status
	if status == 0 {
		status = http.StatusOK
	}
	if !ok {
		status = http.StatusNotFound
	}
	return &http.Response{StatusCode: status, Body: io.NopCloser(bytes.NewReader(body)), Header: http.Header{}}, nil
}

func (c *chip) store(change func(*certs.Config)) *certs.Store {
	cfg := certs.Config{Roots: c.roots, Now: time.Now}
	if change != nil {
		change(&cfg)
	}
	return certs.New(cfg)
}

func (c *chip) find(t *testing.T, s *certs.Store, want string) {
	t.Helper()
	der, from, err := s.VCEK(t.Context(), c.report)
	if want == "" {
		if !errors.Is(err, certs.ErrUnknown) {
			t.Errorf("found in %s, %v", from, err)
		}
		return
	}
	if err != nil || from != want || !bytes.Equal(der, c.vcek) {
		t.Errorf("from %q, %v; want from %q", from, err, want)
	}
}

func TestFromTheHost(t *testing.T) {
	c, other := newChip(t, "Genoa"), newChip(t, "Genoa")
	s := c.store(nil)
	c.find(t, s, "")
	for name, given := range map[string][]snp.Cert{
		"nothing":            nil,
		"another chip's":     other.Certs(),
		"garbage":            {{Type: snp.VCEK, Data: bytes.Repeat([]byte{0x30}, 500)}},
		"under another name": {{Type: snp.ASK, Data: c.vcek}},
	} {
		if err := s.Add(c.report, given); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
	c.find(t, s, "")
	if err := s.Add(c.report, c.Certs()); err != nil {
		t.Fatal(err)
	}
	c.find(t, s, "cache")
	changed := *c.report
	changed.Measurement[0]++
	if _, _, err := s.VCEK(t.Context(), &changed); err == nil {
		t.Error("a certificate was given for a report that its key did not sign")
	}
}

// What was found once is there at the next boot, unless somebody changed it.
func TestCache(t *testing.T) {
	c := newChip(t, "Genoa")
	dir := filepath.Join(t.TempDir(), "certs")
	with := func(cfg *certs.Config) { cfg.Cache = dir }
	if err := c.store(with).Add(c.report, c.Certs()); err != nil {
		t.Fatal(err)
	}
	c.find(t, c.store(with), "cache")
	files, _ := filepath.Glob(dir + "/*")
	if len(files) != 1 {
		t.Fatalf("files %v", files)
	}
	if err := os.WriteFile(files[0], []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	c.find(t, c.store(with), "")
}

func TestFolder(t *testing.T) {
	c, other := newChip(t, "Genoa"), newChip(t, "Genoa")
	dir := t.TempDir()
	write := func(name string, data []byte) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	// The folder is the host's to fill.
	outside := filepath.Join(t.TempDir(), "vcek.der")
	if err := os.WriteFile(outside, c.vcek, 0o644); err != nil {
		t.Fatal(err)
	}
	write("other.der", other.vcek)
	write("huge.der", make([]byte, 1<<20))
	write("empty.pem", nil)
	write("vcek.txt", c.vcek)
	if err := errors.Join(os.Symlink(outside, dir+"/link.der"), syscall.Mkfifo(dir+"/pipe.pem", 0o644), os.Mkdir(dir+"/dir.der", 0o755)); err != nil {
		t.Fatal(err)
	}
	with := func(cfg *certs.Config) { cfg.Folders = []string{"/nonexistent", dir} }
	c.find(t, c.store(with), "")
	// The folder itself leads out of its drive.
	link := filepath.Join(t.TempDir(), "amd_certs")
	if err := os.Symlink(filepath.Dir(outside), link); err != nil {
		t.Fatal(err)
	}
	c.find(t, c.store(func(cfg *certs.Config) { cfg.Folders = []string{link} }), "")
	write("vcek.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.vcek}))
	s := c.store(with)
	c.find(t, s, dir)
	c.find(t, s, "cache")
}

func TestKDS(t *testing.T) {
	for product, path := range map[string]string{
		"Genoa": "/vcek/v1/Genoa/%x?blSPL=10&teeSPL=00&snpSPL=23&ucodeSPL=84",
		"Milan": "/vcek/v1/Milan/%x?blSPL=04&teeSPL=00&snpSPL=24&ucodeSPL=219",
		"Turin": "/vcek/v1/Turin/%x?fmcSPL=01&blSPL=01&teeSPL=01&snpSPL=04&ucodeSPL=71",
	} {
		t.Run(product, func(t *testing.T) {
			c := newChip(t, product)
			id := c.report.ChipID[:]
			if product == "Turin" {
				id = id[:8]
			}
			k := &kds{answers: map[string][]byte{fmt.Sprintf(path, id): c.vcek}}
			s := c.store(func(cfg *certs.Config) { cfg.KDS, cfg.HTTP = "https://kds.example", k })
			c.find(t, s, "https://kds.example")
			c.find(t, s, "cache")
			if len(k.asked) != 1 || !strings.HasPrefix(k.asked[0], "https://kds.example/vcek/v1/"+product) {
				t.Errorf("asked %v", k.asked)
			}
		})
	}
}

// The KDS throttles; what it has just not given is not asked for again at once.
func TestKDSFails(t *testing.T) {
	c, other := newChip(t, "Genoa"), newChip(t, "Genoa")
	now := time.Now()
	k := &kds{}
	s := c.store(func(cfg *certs.Config) {
		cfg.KDS, cfg.HTTP, cfg.Now = "https://kds.example", k, func() time.Time { return now }
	})
	c.find(t, s, "")
	c.find(t, s, "")
	if len(k.asked) != 1 {
		t.Errorf("asked %d times", len(k.asked))
	}
	path := strings.TrimPrefix(k.asked[0], "https://kds.example")
	now = now.Add(2 * time.Minute)
	k.answers = map[string][]byte{path: other.vcek} // a mirror that lies
	c.find(t, s, "")
	now = now.Add(2 * time.Minute)
	k.answers[path] = bytes.Repeat([]byte{1}, 1<<20)
	c.find(t, s, "")
	now = now.Add(2 * time.Minute)
	k.answers[path], k.status = c.vcek, http.StatusFound
	c.find(t, s, "")
	now = now.Add(2 * time.Minute)
	k.status = 0
	c.find(t, s, "https://kds.example")
}

func TestCRL(t *testing.T) {
	c := newChip(t, "Genoa")
	k := &kds{answers: map[string][]byte{"/vcek/v1/Genoa/crl": []byte("no list")}}
	s := c.store(func(cfg *certs.Config) { cfg.KDS, cfg.HTTP = "https://kds.example", k })
	if _, err := s.CRL(t.Context(), "Genoa", false); err == nil {
		t.Error("garbage was taken for a list")
	}
	if _, err := s.CRL(t.Context(), "../x", false); !errors.Is(err, certs.ErrUnknown) || len(k.asked) != 1 {
		t.Errorf("%v, asked %v", err, k.asked)
	}
}
