// Package kbsclient speaks the wire protocol of Trustee's Key Broker Service
// (KBS), version 0.4.0: the RCAR handshake (request, challenge, attestation,
// response), the fetch of a resource and the admin calls. It works unchanged
// with Trustee of July 2025 (T, the one NVIDIA FLARE pins) and of August 2026
// (H), and knows nothing of SNP, GPUs or disks: evidence is an opaque JSON value
// that an Attester gives for a digest.
//
// What it promises:
//
//   - Given CA certificates replace the system's roots. TLS 1.2 and 1.3.
//   - Every call has a deadline, every answer a maximum size, every retry a
//     limit. Only network errors are retried, never an answer of the KBS.
//   - A redirect is never followed, a proxy never asked, a cookie jar never
//     used: the KBS's session cookie expires by the server's clock, which a
//     guest without trusted time must not judge.
//   - A resource is decrypted only with the algorithm that the handshake's key
//     asked for. The content key and the key-encryption key are wiped.
//   - Errors tell what happened by errors.Is and errors.As: see [Error] and the
//     Err variables. None of them carries a token, a key or a resource.
//
// What it does not promise: that evidence was *good*. Trustee answers /attest
// with 200 for any genuine evidence; only a resource gated by policy, or the
// status in the token ([Session.Claims]), says that the policy accepts it.
package kbsclient

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strings"
	"sync/atomic"
	"time"
)

// Bounds of what is read from the KBS, in bytes.
const (
	maxHeader    = 64 << 10
	maxErrorBody = 64 << 10
	maxChallenge = 64 << 10
	maxToken     = 4 << 20 // a token repeats the GPUs' evidence
	maxResource  = 4 << 20 // Trustee's own limit of 2 MiB is 2.8 MB as a JWE
	maxPolicy    = 4 << 20
)

// Config says where the KBS is and how to reach it. The zero value of every
// field but URL is usable.
type Config struct {
	// URL is the KBS's address, such as https://kbs.example:8999. A path is
	// kept as a prefix of /kbs/v0.
	URL string
	// RootCAs are PEM certificates. They replace the system's roots.
	RootCAs []byte
	// AllowHTTP permits an http URL. Without TLS anybody on the way can hand
	// out a resource of their own, so no guest may set it.
	AllowHTTP bool

	// CallTimeout bounds one call with its retries; default 20 s.
	CallTimeout time.Duration
	// AttestTimeout bounds a whole handshake with the collection of evidence;
	// default three times CallTimeout.
	AttestTimeout time.Duration

	// Now is the clock that certificates and admin tokens are judged by;
	// default time.Now.
	Now func() time.Time
	// Rand is the source of handshake keys; default crypto/rand.
	Rand io.Reader
	// Dial opens connections; default a net.Dialer.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	// UserAgent is sent with every request; default "coffer-kbsclient".
	UserAgent string

	// AdminIssuer, AdminAudience and AdminRole are claims of the tokens that
	// an Admin signs. T ignores them, H compares them with its configuration.
	// Defaults: "coffer", "kbs", "admin".
	AdminIssuer, AdminAudience, AdminRole string
}

// Client talks to one KBS. It is safe for concurrent use.
type Client struct {
	cfg       Config
	base      string // URL up to and with /kbs/v0
	host      string // host:port as it stands in the URL
	roots     *x509.CertPool
	pinned    []*x509.Certificate
	transport *http.Transport
	backoff   time.Duration          // before the first retry; doubled for the second
	resumable tls.ClientSessionCache // of sessions that these very roots verified
	last      atomic.Pointer[Answered]
}

// Answered is what the KBS's clock showed in an answer: at some moment after the
// request was sent and before the head of the answer came. It is as authentic as
// the answer, and moves by whole seconds.
type Answered struct {
	Date       time.Time // zero: the answer did not tell
	Sent, Came time.Time // by this machine's clock; they hold a monotonic reading
}

// LastAnswer is of the last answer that came from the KBS, whatever its status; the
// zero value before the first.
func (c *Client) LastAnswer() Answered {
	if a := c.last.Load(); a != nil {
		return *a
	}
	return Answered{}
}

// New checks cfg and makes a client. It opens no connection.
func New(cfg Config) (*Client, error) {
	u, err := url.Parse(cfg.URL)
	if err != nil {
		return nil, fmt.Errorf("KBS URL: %w", err)
	}
	switch {
	case u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "":
		return nil, fmt.Errorf("KBS URL %q is not of the form https://host:port", u.Redacted())
	case u.Scheme == "http" && !cfg.AllowHTTP:
		return nil, fmt.Errorf("KBS URL %q: plain http gives no proof of who answers; use https", cfg.URL)
	case u.Scheme != "https" && u.Scheme != "http":
		return nil, fmt.Errorf("KBS URL %q: the scheme must be https", cfg.URL)
	}
	cfg.CallTimeout = cmp.Or(cfg.CallTimeout, 20*time.Second)
	cfg.AttestTimeout = cmp.Or(cfg.AttestTimeout, 3*cfg.CallTimeout)
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Rand == nil {
		cfg.Rand = rand.Reader
	}
	if cfg.Dial == nil {
		cfg.Dial = (&net.Dialer{}).DialContext
	}
	cfg.UserAgent = cmp.Or(cfg.UserAgent, "coffer-kbsclient")
	cfg.AdminIssuer = cmp.Or(cfg.AdminIssuer, "coffer")
	cfg.AdminAudience = cmp.Or(cfg.AdminAudience, "kbs")
	cfg.AdminRole = cmp.Or(cfg.AdminRole, "admin")

	c := &Client{
		cfg:     cfg,
		base:    strings.TrimRight(cfg.URL, "/") + "/kbs/v0",
		host:    u.Host,
		backoff: 250 * time.Millisecond,
	}
	if len(cfg.RootCAs) > 0 {
		if c.pinned, err = parseCertificates(cfg.RootCAs); err != nil {
			return nil, fmt.Errorf("CA certificates of the KBS: %w", err)
		}
		c.roots = x509.NewCertPool()
		for _, cert := range c.pinned {
			c.roots.AddCert(cert)
		}
	}
	c.resumable = tls.NewLRUClientSessionCache(4)
	c.transport = &http.Transport{
		DialContext:            c.dial,
		DialTLSContext:         c.dialTLS,
		MaxResponseHeaderBytes: maxHeader,
		DisableCompression:     true,
		// Trustee closes an idle connection after 5 s; be the first.
		IdleConnTimeout: 4 * time.Second,
	}
	return c, nil
}

// CloseIdle closes the connections that are kept for a next call.
func (c *Client) CloseIdle() { c.transport.CloseIdleConnections() }

func parseCertificates(text []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for {
		var block *pem.Block
		block, text = pem.Decode(text)
		switch {
		case block == nil && len(certs) == 0:
			return nil, errors.New("no PEM block CERTIFICATE found")
		case block == nil:
			return certs, nil
		case block.Type != "CERTIFICATE":
			return nil, fmt.Errorf("PEM block %q among the certificates", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		certs = append(certs, cert)
	}
}

// call is one request to the KBS.
type call struct {
	op     string // for error texts: "get resource keys/root/x"
	kind   opKind
	method string
	path   string // behind /kbs/v0, with its slash
	header http.Header
	body   []byte
	limit  int64 // of the answer's body
}

type answer struct {
	header http.Header
	body   []byte
}

// do makes the call and gives the answer with status 200. Any other status is
// an *Error.
func (c *Client) do(ctx context.Context, r call) (*answer, error) {
	callCtx, cancel := context.WithTimeout(ctx, c.cfg.CallTimeout)
	defer cancel()
	for attempt := 1; ; attempt++ {
		a, err := c.once(callCtx, r)
		if err == nil {
			return a, nil
		}
		if errors.Is(ctx.Err(), context.Canceled) { // the caller's wish, no news about the KBS
			return nil, fmt.Errorf("%s: %w", r.op, context.Cause(ctx))
		}
		var n *networkError
		if !errors.As(err, &n) || attempt >= n.attempts() || callCtx.Err() != nil {
			if errors.As(err, new(*Error)) {
				return nil, err // names the operation itself
			}
			return nil, fmt.Errorf("%s: %w", r.op, err)
		}
		wait := c.backoff << (attempt - 1)
		select {
		case <-time.After(wait/2 + mathrand.N(wait)):
		case <-callCtx.Done():
		}
	}
}

func (c *Client) once(ctx context.Context, r call) (*answer, error) {
	var reached atomic.Int32 // how far the call got: a stage
	trace := &httptrace.ClientTrace{
		GotConn:              func(httptrace.GotConnInfo) { reached.Store(int32(stageSent)) },
		GotFirstResponseByte: func() { reached.Store(int32(stageAnswered)) },
	}
	req, err := http.NewRequestWithContext(httptrace.WithClientTrace(ctx, trace), r.method, c.base+r.path, bytes.NewReader(r.body))
	if err != nil {
		return nil, err
	}
	for name, values := range r.header {
		req.Header[name] = values
	}
	req.Header.Set("User-Agent", c.cfg.UserAgent)

	// RoundTrip instead of an http.Client: no redirects, no cookies.
	sent := time.Now()
	resp, err := c.transport.RoundTrip(req)
	if err != nil {
		return nil, c.transportError(ctx, err, stage(reached.Load()))
	}
	defer resp.Body.Close()
	c.last.Store(&Answered{Date: date(resp.Header), Sent: sent, Came: time.Now()})
	limit := r.limit
	if resp.StatusCode != http.StatusOK {
		limit = maxErrorBody
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	switch {
	case int64(len(body)) > limit:
		return nil, fmt.Errorf("the answer of the KBS at %s: %w (limit %d bytes)", c.host, ErrTooLarge, limit)
	case err != nil:
		return nil, c.transportError(ctx, err, stageAnswered)
	case ctx.Err() != nil: // closing on the deadline can make a server end its answer in good order
		return nil, c.transportError(ctx, ctx.Err(), stageAnswered)
	case resp.StatusCode != http.StatusOK:
		return nil, newError(r, resp, body, c.cfg.Now())
	}
	return &answer{header: resp.Header, body: body}, nil
}

// date is the time at which an answer was made, in the one form that servers may
// send; zero where that is missing, given twice or anything else.
func date(h http.Header) time.Time {
	values := h.Values("Date")
	if len(values) != 1 {
		return time.Time{}
	}
	t, err := time.Parse(http.TimeFormat, values[0])
	if err != nil {
		return time.Time{}
	}
	return t
}
