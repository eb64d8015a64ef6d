// Package kbs is the embedded key broker: a server of Trustee's KBS protocol
// 0.4.0 for people who run no Trustee, for the demo and for tests. A client
// cannot tell it from Trustee in what it may rely on: routes, status codes,
// error types, JSON shapes, cookie and token are those measured on real servers
// of two generations (see Dialect).
//
// What it promises: a resource is released only to a bearer of a token that
// this server signed, after it verified an SNP report over a nonce of its own
// (or Trustee's `sample` evidence, in a simulation), and only when the resource
// policy says so; the answer is encrypted to the key that the report binds. Each
// decision is one audit line, and no line holds a secret.
//
// Where it is stricter than Trustee, on purpose:
//   - HTTPS only, and every administrative call needs the admin key, the
//     attestation policy included.
//   - An admin token must have exp, and clocks may differ by a minute only.
//   - Bearer tokens count only with this server's own signature.
//   - Without a resource policy everything is denied.
//   - A policy that old Trustee would read as "allow all" is refused (DialectT),
//     or named in the log (DialectH, which reads it as it is meant).
//   - `sample` evidence and simulated chips need Options.AllowSimulated, and
//     every token about them says `simulated`.
//   - Reports signed by a VLEK, or that mask the chip's id, are refused: nothing
//     then says which chip it was.
//   - RSA1_5 is refused, and so is additional (device) evidence unless
//     Options.Devices judges it; every device must pass.
//   - Tokens about SNP reports name the chip's product, beside Trustee's claims.
//
// What it does not know: it evaluates no attestation policy (the appraisal in a
// token is Trustee's default one) and keeps no state in memory but sessions of
// five minutes. A VCEK comes with the evidence, from the folder vcek/, or from
// the KDS that Options names.
package kbs

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"coffer/internal/snp"
	"coffer/internal/snp/verify"
)

// Dialect names the generation of Trustee whose wire forms the server speaks.
type Dialect string

// The two dialects. They differ in claims (base64 or hexadecimal), in what the
// resource policy sees, in Rego's version, and in some administrative routes.
const (
	DialectT Dialect = "T" // 2025-07, the commit that NVFlare pins
	DialectH Dialect = "H" // 2026-08
)

// Options configures a server.
type Options struct {
	Dir     string   // made by Init: keys, certificates, policy and resources
	Dialect Dialect  // empty: DialectH
	Hosts   []string // for Init: names and IP addresses of the server's certificate

	// AllowSimulated accepts `sample` evidence, and reports of chips whose roots
	// stand in SimulatedRoots (PEM, as the simulated platform writes them).
	AllowSimulated bool
	SimulatedRoots []byte

	// MinTCB is the lowest firmware that SNP reports may show, by product; nil:
	// verify.DefaultMinTCB, which has Genoa only.
	MinTCB map[string]snp.TCB

	// KDS is the address of AMD's key distribution service or of a mirror, such
	// as https://kdsintf.amd.com, to fetch VCEKs from that evidence lacks; they
	// are kept in the folder vcek/. Empty: nothing is fetched.
	KDS string

	// Devices judges evidence of GPUs beside the CPU's; nil: it is refused.
	// SimulatedDevices says that it trusts other roots than NVIDIA's, which needs
	// AllowSimulated; claims about such devices say "simulated".
	Devices          Devices
	SimulatedDevices bool

	// Rate is how many requests a second one address may send; 0: any number.
	Rate float64

	// AdminIssuer and AdminAudience are what admin tokens must name as iss and
	// aud in dialect H; empty: they are not looked at.
	AdminIssuer, AdminAudience string

	Logger *slog.Logger     // audit and startup lines; nil: slog.Default()
	Now    func() time.Time // nil: time.Now
}

const (
	maxBody        = 2 << 20
	maxHeader      = 128 << 10
	headerTime     = 5 * time.Second
	requestTime    = 30 * time.Second
	idleTime       = 5 * time.Second // as Trustee
	stopTime       = 5 * time.Second
	policyTime     = 2 * time.Second
	maxInFlight    = 256
	maxConnections = 1024
)

// verifyReport checks an SNP report by the evidence's certificates and for the
// report data.
type verifyReport func(ctx context.Context, r *snp.Report, certs []snp.Cert, reportData [64]byte) (*verify.Result, error)

// Server is one key broker. Its methods may be called concurrently.
type Server struct {
	dialect          Dialect
	simulated        bool // simulated evidence is allowed
	simulatedDevices bool
	log              *slog.Logger
	now              func() time.Time
	tls              tls.Certificate
	admin            adminVerifier
	tokens           *signer
	sessions         *sessions
	store            *store
	engine           *engine
	verify           verifyReport
	devices          Devices
	metrics          *metrics
	limiter          limiter
	inFlight         *share
}

// New opens the folder that Init made.
func New(o Options) (*Server, error) {
	s := &Server{dialect: o.Dialect, simulated: o.AllowSimulated, log: o.Logger, now: o.Now, metrics: newMetrics(), inFlight: newShare(maxInFlight), devices: o.Devices, simulatedDevices: o.SimulatedDevices}
	if s.dialect == "" {
		s.dialect = DialectH
	}
	if s.dialect != DialectT && s.dialect != DialectH {
		return nil, fmt.Errorf("kbs: dialect %q: must be %q or %q", o.Dialect, DialectT, DialectH)
	}
	if s.log == nil {
		s.log = slog.Default()
	}
	if s.now == nil {
		s.now = time.Now
	}
	if o.SimulatedDevices && !o.AllowSimulated {
		return nil, errors.New("kbs: roots of simulated GPUs are given, but simulated evidence is not allowed; allow it explicitly (--allow-simulated), or leave the roots out")
	}
	if len(o.SimulatedRoots) != 0 && !o.AllowSimulated {
		return nil, errors.New("kbs: simulated roots are given, but simulated evidence is not allowed; allow it explicitly (--allow-simulated), or leave the roots out")
	}
	if err := s.open(o); err != nil {
		return nil, fmt.Errorf("kbs: open %s (made by `hostbuild kbs init`): %w", o.Dir, err)
	}
	if o.Rate < 0 {
		return nil, fmt.Errorf("kbs: rate %g: must not be negative", o.Rate)
	}
	s.limiter = limiter{rate: o.Rate, now: s.now, buckets: map[string]*bucket{}}
	s.admin.issuer, s.admin.audience = o.AdminIssuer, o.AdminAudience
	s.engine = newEngine(s.dialect)
	key, err := s.store.sessionKey()
	if err != nil {
		return nil, fmt.Errorf("kbs: %s: %w", sessionKeyFile, err)
	}
	s.sessions = newSessions(key, s.dialect.tees(), s.now)
	if s.simulated {
		s.log.Warn("SIMULATED evidence is accepted: this server must not guard real secrets",
			"simulated", true, "simulated_roots", len(o.SimulatedRoots) != 0, "dialect", string(s.dialect))
	}
	return s, nil
}

func (s *Server) open(o Options) error {
	for _, name := range []string{serverKeyFile, tokenKeyFile, repositoryDir} {
		fi, err := os.Stat(filepath.Join(o.Dir, name))
		if name == repositoryDir && errors.Is(err, fs.ErrNotExist) {
			continue // a backup may leave out empty folders
		}
		if err != nil {
			return err
		}
		if fi.Mode().Perm()&0o077 != 0 {
			return fmt.Errorf("%s can be read by others (mode %v): chmod go= it", name, fi.Mode().Perm())
		}
	}
	var err error
	if s.tls, err = tls.LoadX509KeyPair(filepath.Join(o.Dir, serverCertFile), filepath.Join(o.Dir, serverKeyFile)); err != nil {
		return err
	}
	if s.admin, err = loadAdmin(filepath.Join(o.Dir, adminPubFile)); err != nil {
		return err
	}
	if s.tokens, err = loadSigner(o.Dir, s.dialect); err != nil {
		return err
	}
	if s.store, err = openStore(o.Dir); err != nil {
		return err
	}
	s.verify, err = reportVerifier(o, s.dialect, s.store, s.now, s.log)
	return err
}

// Serve answers HTTPS on ln until ctx ends, and closes ln. It lets requests in
// progress finish for a few seconds, and returns nil after an orderly stop.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	srv := &http.Server{
		Handler:           http.HandlerFunc(s.serve),
		TLSConfig:         &tls.Config{Certificates: []tls.Certificate{s.tls}, MinVersion: tls.VersionTLS12},
		ReadHeaderTimeout: headerTime,
		ReadTimeout:       requestTime,
		WriteTimeout:      requestTime,
		IdleTimeout:       idleTime,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	s.log.Info("serving", "action", "start", "address", ln.Addr().String(), "dialect", string(s.dialect), "simulated", s.simulated)
	stopped := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() {
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTime)
		defer cancel()
		err := srv.Shutdown(grace)
		if err != nil {
			srv.Close()
		}
		stopped <- err
	})
	err := srv.ServeTLS(&limited{Listener: ln, share: newShare(maxConnections)}, "", "")
	if stop() {
		return fmt.Errorf("kbs: serve %s: %w", ln.Addr(), err)
	}
	if err := <-stopped; err != nil {
		return fmt.Errorf("kbs: stop: requests were cut off: %w", err)
	}
	return nil
}
