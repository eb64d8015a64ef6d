package kbs

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"coffer/internal/snp"
	"coffer/test/simsnp"
)

func derOf(c *simsnp.Chip) []byte {
	for _, cert := range c.Certs() {
		if cert.Type == snp.VCEK {
			return cert.Data
		}
	}
	return nil
}

// attestWithout attests with a report and no certificates.
func (r *rig) attestWithout(chip *simsnp.Chip) answer {
	r.t.Helper()
	g := r.guest("snp").auth()
	return g.attest(g.attestBody(g.evidence(chip, nil, nil), ""))
}

func TestKDS(t *testing.T) {
	for product, query := range map[string]string{
		"Genoa": "blSPL=10&teeSPL=00&snpSPL=23&ucodeSPL=84",
		"Turin": "fmcSPL=01&blSPL=01&teeSPL=01&snpSPL=04&ucodeSPL=71",
	} {
		t.Run(product, func(t *testing.T) {
			chip := newChip(t, simsnp.Params{Product: product})
			id := chip.ChipID[:]
			if product == "Turin" {
				id = id[:8]
			}
			var asked atomic.Int32
			var answer atomic.Pointer[[]byte] // nil: the status
			var status atomic.Int32
			mirror := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
				asked.Add(1)
				if want := "/mirror/vcek/v1/" + product + "/" + hex.EncodeToString(id) + "?" + query; q.URL.RequestURI() != want {
					t.Errorf("asked for %s, want %s", q.URL.RequestURI(), want)
				}
				if b := answer.Load(); b != nil {
					w.Write(*b)
					return
				}
				w.WriteHeader(int(status.Load()))
			}))
			defer mirror.Close()
			r := newRig(t, Options{AllowSimulated: true, SimulatedRoots: chip.RootsPEM(), MinTCB: map[string]snp.TCB{product: {}}, KDS: mirror.URL + "/mirror/"})
			expect := func(what string, status int, asks int32, reason string) {
				t.Helper()
				asked.Store(0)
				a := r.attestWithout(chip)
				if a.status != status || asked.Load() != asks || !strings.Contains(fmt.Sprint(r.log.last(t)["reason"]), reason) {
					t.Errorf("%s: %d, asked %d times, %v; want %d, %d times, %q", what, a.status, asked.Load(), r.log.last(t)["reason"], status, asks, reason)
				}
			}
			status.Store(http.StatusTooManyRequests)
			expect("mirror that is busy", 503, 1, "HTTP 429")
			expect("right after a failure", 503, 0, "failed a moment ago")
			r.clock.add(kdsAgain)
			status.Store(http.StatusNotFound)
			expect("mirror that knows no such chip", 401, 1, "HTTP 404")
			expect("right after a failure", 401, 0, "failed a moment ago")
			r.clock.add(kdsAgain)
			big := bytes.Repeat([]byte{1}, kdsMaxBody+1)
			answer.Store(&big)
			expect("endless answer", 401, 1, "larger than")
			r.clock.add(kdsAgain)
			other := derOf(newChip(t, simsnp.Params{Product: product}))
			answer.Store(&other)
			expect("another chip's certificate", 401, 1, "chain")
			files, _ := filepath.Glob(filepath.Join(r.dir, vcekDir, "*", "*"))
			if len(files) != 0 {
				t.Errorf("kept what did not verify: %v", files)
			}
			der := derOf(chip)
			answer.Store(&der)
			old := filepath.Join(r.dir, vcekDir, hex.EncodeToString(id), "vcek.der")
			if err := os.MkdirAll(filepath.Dir(old), 0o700); err != nil {
				t.Fatal(err)
			}
			tcb := chip.TCB
			tcb.Microcode--
			if err := os.WriteFile(old, derOf(newChip(t, simsnp.Params{Product: product, TCB: &tcb})), 0o600); err != nil {
				t.Fatal(err)
			}
			expect("good mirror, and a VCEK of older firmware", 200, 1, "")
			mirror.Close()
			expect("kept certificate", 200, 0, "")
			if err := os.RemoveAll(filepath.Dir(old)); err != nil {
				t.Fatal(err)
			}
			expect("mirror that is away", 503, 0, "connection refused")
		})
	}
	if _, err := newKDS("ftp://kds.example", time.Now); err == nil {
		t.Error("an ftp address was accepted")
	}
	chip := newChip(t, simsnp.Params{})
	// More guests at once than fetches: the others may ask again.
	k, err := newKDS("http://kds.example", time.Now)
	if err != nil {
		t.Fatal(err)
	}
	k.slots = make(chan struct{})
	r, err := chip.Report(measurement, [64]byte{}, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := k.vcek(t.Context(), r); !errors.Is(err, errUnavailable) {
		t.Errorf("no slot: %v", err)
	}
}
