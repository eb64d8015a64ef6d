package kbsclient

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// dial opens a TCP connection. The HTTP transport lets a dial outlive its
// request, so it is bounded here again.
func (c *Client) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.CallTimeout)
	defer cancel()
	conn, err := c.cfg.Dial(ctx, network, addr)
	if err != nil {
		return nil, &networkError{host: c.host, stage: stageConnect, err: err}
	}
	return conn, nil
}

// dialTLS resumes the TLS session of an earlier connection where the KBS lets it.
// Then it does without the key exchange that resists quantum computers, the
// costliest part of a connection: the keys depend on the first connection's, too,
// and those are of such an exchange. Where the KBS does not resume, the
// connection is made anew with it.
func (c *Client) dialTLS(ctx context.Context, network, addr string) (net.Conn, error) {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	if _, ok := c.resumable.Get(host); ok {
		conn, err := c.handshake(ctx, network, addr, host, []tls.CurveID{tls.CurveP256, tls.CurveP384})
		switch {
		case errors.Is(err, ErrUnreachable):
			return nil, err
		case err == nil && conn.ConnectionState().DidResume:
			return conn, nil
		case err == nil:
			conn.Close()
		}
	}
	return c.handshake(ctx, network, addr, host, nil)
}

// handshake makes a connection with one of the key exchanges; nil: Go's defaults.
func (c *Client) handshake(ctx context.Context, network, addr, host string, exchanges []tls.CurveID) (*tls.Conn, error) {
	raw, err := c.dial(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	conn := tls.Client(raw, &tls.Config{
		MinVersion:         tls.VersionTLS12, // T speaks nothing newer
		ServerName:         host,
		RootCAs:            c.roots,
		Time:               c.cfg.Now,
		CurvePreferences:   exchanges,
		ClientSessionCache: c.resumable,
	})
	ctx, cancel := context.WithTimeout(ctx, c.cfg.CallTimeout)
	defer cancel()
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, c.handshakeError(err, host)
	}
	return conn, nil
}

func (c *Client) handshakeError(err error, host string) error {
	if bad := (*tls.CertificateVerificationError)(nil); errors.As(err, &bad) {
		return c.certificateError(bad, host)
	}
	if record := (tls.RecordHeaderError{}); errors.As(err, &record) {
		return fmt.Errorf("%w: %s does not answer with TLS; is the port right, or does the KBS run with insecure_http?", ErrTLS, c.host)
	}
	// An alert comes as a net.OpError too, and is no trouble of the network.
	op := (*net.OpError)(nil)
	alert := errors.As(err, &op) && (op.Op == "remote error" || op.Op == "local error")
	if !alert && isNetwork(err) {
		return &networkError{host: c.host, stage: stageConnect, err: fmt.Errorf("TLS handshake: %w", err)}
	}
	return fmt.Errorf("%w with %s: %w", ErrTLS, c.host, err)
}

// certificateError tells a certificate that is wrong from one that is right but
// for the time.
func (c *Client) certificateError(bad *tls.CertificateVerificationError, host string) error {
	chain := bad.UnverifiedCertificates
	now := c.cfg.Now()
	if len(chain) == 0 {
		return fmt.Errorf("%w with %s: %w", ErrTLS, c.host, bad)
	}
	leaf := chain[0]
	opts := x509.VerifyOptions{DNSName: host, Roots: c.roots, Intermediates: x509.NewCertPool()}
	for _, cert := range chain[1:] {
		opts.Intermediates.AddCert(cert)
	}
	// If the certificates have a common moment at which they verify, one of
	// the ends of their validity is such a moment.
	for _, cert := range append(chain[:len(chain):len(chain)], c.pinned...) {
		for _, opts.CurrentTime = range []time.Time{cert.NotBefore, cert.NotAfter} {
			verified, err := leaf.Verify(opts)
			if err != nil {
				continue
			}
			e := &ClockError{Host: c.host, Now: now, NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter}
			for _, v := range verified[0] {
				if v.NotBefore.After(e.NotBefore) {
					e.NotBefore = v.NotBefore
				}
				if v.NotAfter.Before(e.NotAfter) {
					e.NotAfter = v.NotAfter
				}
			}
			return e
		}
	}
	reason := bad.Err.Error()
	if invalid := (x509.CertificateInvalidError{}); errors.As(bad.Err, &invalid) && invalid.Reason == x509.Expired {
		reason = "x509: certificate is outside its validity, and not one of ours at any time"
	}
	return fmt.Errorf("%w: the certificate of %s is not trusted: %s (subject %q, issuer %q, valid %s; this machine's time is %s)",
		ErrTLS, c.host, reason, leaf.Subject, leaf.Issuer, window(leaf.NotBefore, leaf.NotAfter), stamp(now))
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func window(from, to time.Time) string { return stamp(from) + " to " + stamp(to) }

// transportError sorts what http.Transport and a body reader return for a call
// that got as far as stage.
func (c *Client) transportError(ctx context.Context, err error, reached stage) error {
	if n := (*networkError)(nil); errors.As(err, &n) || errors.Is(err, ErrTLS) {
		return err
	}
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		err = fmt.Errorf("%w (a call may take %s)", ctx.Err(), c.cfg.CallTimeout)
	}
	if ctx.Err() != nil || reached != stageAnswered || isNetwork(err) {
		return &networkError{host: c.host, stage: reached, err: err}
	}
	return fmt.Errorf("%w: %s answers with broken HTTP: %w", ErrProtocol, c.host, err)
}

func isNetwork(err error) bool {
	return errors.As(err, new(net.Error)) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, net.ErrClosed) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)
}

// networkError is a failure below HTTP. It matches ErrUnreachable.
type networkError struct {
	host  string
	stage stage
	err   error
}

type stage int

const (
	stageConnect  stage = iota // no usable connection
	stageSent                  // connected, but no byte of an answer
	stageAnswered              // the answer broke off
)

// attempts is how many times a call is made in all. Trustee closes the
// connection without an answer when it was idle for 5 s, and when a request
// makes it panic: the first goes away with one more attempt, the second stays.
func (e *networkError) attempts() int {
	switch e.stage {
	case stageConnect:
		return 3
	case stageSent:
		return 2
	}
	return 1
}

func (e *networkError) Error() string {
	switch e.stage {
	case stageConnect:
		return fmt.Sprintf("no connection to the KBS at %s: %v", e.host, e.err)
	case stageSent:
		return fmt.Sprintf("the KBS at %s took the request and gave no answer: %v", e.host, e.err)
	}
	return fmt.Sprintf("the answer of the KBS at %s broke off: %v", e.host, e.err)
}

func (e *networkError) Unwrap() []error { return []error{ErrUnreachable, e.err} }
