package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"coffer/internal/snp"
	"coffer/kbsclient"
	"coffer/test/simsnp"
)

// rounds is how often the key is fetched.
const rounds = 200

// keyRelease fetches the bundle's key as its guest does: a fresh key pair, auth,
// a signed report, attest, resource, decrypt. The floor is the same bytes over a
// bare TLS connection made anew, which no protocol can avoid.
func (b *bench) keyRelease(ctx context.Context) error {
	ca, err := os.ReadFile(filepath.Join(b.kbs.Dir, "ca.pem"))
	if err != nil {
		return err
	}
	chip, err := simsnp.Load(filepath.Join(b.env.Dir, "chip"))
	if err != nil {
		return err
	}
	m, err := manifestOf(b.bundle.Dir)
	if err != nil {
		return err
	}
	client, err := kbsclient.New(kbsclient.Config{URL: "https://" + b.kbs.Listen, RootCAs: ca})
	if err != nil {
		return err
	}
	a := &attester{chip: chip, digest: m.digest}
	release := func() error {
		s, err := client.Attest(ctx, a)
		if err != nil {
			return err
		}
		defer s.Close()
		key, err := s.Resource(ctx, m.keyPath)
		clear(key)
		return err
	}
	if err := release(); err != nil { // the server's caches are warm in real life, too
		return err
	}
	floors, err := bareTLS(rounds)
	if err != nil {
		return err
	}
	var times []float64
	for range rounds {
		t := time.Now()
		if err := release(); err != nil {
			return err
		}
		times = append(times, time.Since(t).Seconds()*1e3)
	}
	figure("key_release_p50", percentile(times, 50), "ms", percentile(floors, 50))
	figure("key_release_p99", percentile(times, 99), "ms", percentile(floors, 99))
	return nil
}

func percentile(s []float64, p int) float64 {
	s = slices.Clone(s)
	slices.Sort(s)
	return s[min(len(s)*p/100, len(s)-1)]
}

type attester struct {
	chip   *simsnp.Chip
	digest [48]byte
}

func (a *attester) TEE() string { return "snp" }

func (a *attester) Evidence(_ context.Context, digest [48]byte) (json.RawMessage, error) {
	var data [64]byte
	copy(data[:], digest[:])
	r, err := a.chip.Report(a.digest, data, 0)
	if err != nil {
		return nil, err
	}
	return snp.EvidenceJSON(r.Marshal(), a.chip.Certs())
}

type release struct {
	digest  [48]byte
	keyPath string
}

// bareTLS measures a TLS connection that carries as much as a key release:
// 16 KiB of evidence one way, 4 KiB of token and key the other.
func bareTLS(n int) (ms []float64, err error) {
	cert, roots, err := serverCert()
	if err != nil {
		return nil, err
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{cert}})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	const up, down = 16 << 10, 4 << 10
	served := make(chan error, 1)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				served <- nil
				return
			}
			if err := serveBytes(c, up, down); err != nil {
				served <- err
				return
			}
		}
	}()
	for range n {
		t := time.Now()
		if err := askBytes(l.Addr(), roots, up, down); err != nil {
			return nil, err
		}
		ms = append(ms, time.Since(t).Seconds()*1e3)
	}
	l.Close()
	return ms, <-served
}

func serveBytes(c net.Conn, up, down int64) error {
	defer c.Close()
	if _, err := io.CopyN(io.Discard, c, up); err != nil {
		return err
	}
	_, err := c.Write(make([]byte, down))
	return err
}

func askBytes(addr net.Addr, roots *x509.CertPool, up, down int64) (err error) {
	c, err := tls.Dial("tcp", addr.String(), &tls.Config{RootCAs: roots, ServerName: "127.0.0.1"})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	if _, err := c.Write(make([]byte, up)); err != nil {
		return err
	}
	if n, err := io.CopyN(io.Discard, c, down); err != nil {
		return fmt.Errorf("%d bytes: %w", n, err)
	}
	return nil
}
