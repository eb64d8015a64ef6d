// Package ocsp asks an OCSP responder (RFC 6960, RFC 8954) whether certificates
// of an NVIDIA chain are revoked.
//
// An answer counts only if it is for the very certificate, signed by its issuer
// or by a responder that chains to the same pinned root, in date, and holds the
// nonce of the question. An answer that was accepted so may be kept and used
// again until it is too old. NVIDIA's service says "good" of serial numbers it
// has never seen: this tells what is revoked, not what is genuine.
package ocsp

import (
	"bytes"
	"context"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"slices"
	"time"

	"coffer/internal/strict"
)

// URL is NVIDIA's responder. Certificates name the same host by http.
const URL = "https://ocsp.ndis.nvidia.com"

// maxSize is the longest answer that is read.
const maxSize = 64 << 10

// skew is how far the responder's clock may be ahead of ours.
const skew = 5 * time.Minute

var (
	// ErrUnreachable is a responder that gave no answer.
	ErrUnreachable = errors.New("OCSP responder gave no answer")
	// ErrFormat is an answer that cannot be read, or for something else.
	ErrFormat = errors.New("OCSP answer is malformed")
	// ErrResponder is an answer whose signer may not give it.
	ErrResponder = errors.New("OCSP answer's signer is not trusted")
	// ErrNonce is an answer to another question.
	ErrNonce = errors.New("OCSP answer has not the nonce of the question")
	// ErrStale is an answer that is not, or no longer, in date.
	ErrStale = errors.New("OCSP answer is not in date")
	// ErrRevoked is a revoked certificate.
	ErrRevoked = errors.New("certificate is revoked")
	// ErrHold is a certificate that is revoked with the reason "on hold".
	ErrHold = errors.New("certificate is on hold")
	// ErrUnknown is a certificate that the responder does not know.
	ErrUnknown = errors.New("certificate is unknown to the OCSP responder")
)

// Store keeps answers. Its content is not trusted: answers are signed.
type Store interface {
	Get(key string) ([]byte, bool)
	Put(key string, answer []byte) error
}

// Client asks about certificates.
type Client struct {
	URL    string // of the responder
	Key    string // service key, sent as a bearer token where set
	HTTP   *http.Client
	Now    func() time.Time
	Rand   io.Reader
	Cache  Store         // nil: every question is asked
	MaxAge time.Duration // of a kept answer, from its thisUpdate on
}

// Status is what is known of a certificate that is not revoked.
type Status struct {
	Cached     bool
	Until      time.Time // nextUpdate; zero where the responder gave none
	ThisUpdate time.Time
}

// Check asks about chain[i], which chain[i+1] issued; the last of chain is the
// pinned root. The error is one of this package's where it is about the answer.
func (c *Client) Check(ctx context.Context, chain []*x509.Certificate, i int) (Status, error) {
	q, err := newQuestion(chain, i, c.Rand)
	if err != nil {
		return Status{}, err
	}
	if c.Cache != nil {
		if kept, ok := c.Cache.Get(q.key()); ok {
			a, err := q.read(kept, false, c.Now())
			if err == nil && c.Now().Sub(a.thisUpdate) <= c.MaxAge {
				return Status{Cached: true, Until: a.nextUpdate, ThisUpdate: a.thisUpdate}, a.verdict(q.cert)
			}
		}
	}
	raw, err := c.ask(ctx, q)
	if err != nil {
		return Status{}, fmt.Errorf("%w: %s about %s: %w", ErrUnreachable, c.URL, q.cert.Subject.CommonName, err)
	}
	a, err := q.read(raw, true, c.Now())
	if err != nil {
		return Status{}, fmt.Errorf("%s about %s: %w", c.URL, q.cert.Subject.CommonName, err)
	}
	if c.Cache != nil {
		if err := c.Cache.Put(q.key(), raw); err != nil {
			return Status{}, fmt.Errorf("keep OCSP answer: %w", err)
		}
	}
	return Status{Until: a.nextUpdate, ThisUpdate: a.thisUpdate}, a.verdict(q.cert)
}

func (c *Client) ask(ctx context.Context, q *question) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.URL, bytes.NewReader(q.der))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/ocsp-request")
	req.Header.Set("Accept", "application/ocsp-response")
	if c.Key != "" {
		req.Header.Set("Authorization", "Bearer "+c.Key)
	}
	resp, err := c.HTTP.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("it answered %s", resp.Status)
	}
	return strict.ReadAll(resp.Body, maxSize)
}

var (
	oidNonce  = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 48, 1, 2}
	oidBasic  = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 48, 1, 1}
	oidSHA384 = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 2}
)

const nonceSize = 32

// The ASN.1 of RFC 6960.
type (
	certID struct {
		Hash                pkix.AlgorithmIdentifier
		NameHash, IssuerKey []byte
		Serial              *big.Int
	}
	request struct {
		TBS struct {
			Requests   []struct{ Cert certID }
			Extensions []pkix.Extension `asn1:"optional,explicit,tag:2"`
		}
	}
	response struct {
		Status asn1.Enumerated
		Bytes  struct {
			Type  asn1.ObjectIdentifier
			Value []byte
		} `asn1:"optional,explicit,tag:0"`
	}
	basicResponse struct {
		TBS       asn1.RawValue
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
		Certs     []asn1.RawValue `asn1:"optional,explicit,tag:0"`
	}
	responseData struct {
		Version    int           `asn1:"optional,default:0,explicit,tag:0"`
		Responder  asn1.RawValue // a choice of name and key hash; the signature tells
		ProducedAt time.Time     `asn1:"generalized"`
		Responses  []singleResponse
		Extensions []pkix.Extension `asn1:"optional,explicit,tag:1"`
	}
	singleResponse struct {
		Cert       certID
		Good       asn1.Flag        `asn1:"optional,tag:0"`
		Revoked    revokedInfo      `asn1:"optional,tag:1"`
		Unknown    asn1.Flag        `asn1:"optional,tag:2"`
		ThisUpdate time.Time        `asn1:"generalized"`
		NextUpdate time.Time        `asn1:"generalized,optional,explicit,tag:0"`
		Extensions []pkix.Extension `asn1:"optional,explicit,tag:1"`
	}
	revokedInfo struct {
		At     time.Time       `asn1:"generalized"`
		Reason asn1.Enumerated `asn1:"optional,explicit,tag:0"`
	}
)

// reasonHold is CRLReason certificateHold.
const reasonHold = 6

// question is one request.
type question struct {
	cert  *x509.Certificate
	above []*x509.Certificate // its issuer, and on to the root
	id    certID
	nonce []byte // the extension's value
	der   []byte
}

func newQuestion(chain []*x509.Certificate, i int, random io.Reader) (*question, error) {
	if i < 0 || i+1 >= len(chain) {
		return nil, fmt.Errorf("certificate %d of %d has no issuer to ask about", i, len(chain))
	}
	issuer := chain[i+1]
	var key struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}
	if _, err := asn1.Unmarshal(issuer.RawSubjectPublicKeyInfo, &key); err != nil {
		return nil, fmt.Errorf("public key of %s: %w", issuer.Subject.CommonName, err)
	}
	nameHash, keyHash := sha512.Sum384(issuer.RawSubject), sha512.Sum384(key.Key.RightAlign())
	q := &question{cert: chain[i], above: chain[i+1:], id: certID{
		Hash:     pkix.AlgorithmIdentifier{Algorithm: oidSHA384, Parameters: asn1.NullRawValue},
		NameHash: nameHash[:], IssuerKey: keyHash[:], Serial: chain[i].SerialNumber,
	}}
	nonce := make([]byte, nonceSize)
	if _, err := io.ReadFull(random, nonce); err != nil {
		return nil, fmt.Errorf("nonce: %w", err)
	}
	var err error
	if q.nonce, err = asn1.Marshal(nonce); err != nil {
		return nil, err
	}
	var req request
	req.TBS.Requests = []struct{ Cert certID }{{q.id}}
	req.TBS.Extensions = []pkix.Extension{{Id: oidNonce, Critical: true, Value: q.nonce}}
	if q.der, err = asn1.Marshal(req); err != nil {
		return nil, fmt.Errorf("OCSP request: %w", err)
	}
	return q, nil
}

// key names the answer in a Store.
func (q *question) key() string {
	return fmt.Sprintf("%x", sha512.Sum384(q.cert.Raw))[:64]
}

// answer is what a response says of the certificate.
type answer struct {
	single                 singleResponse
	thisUpdate, nextUpdate time.Time
}

// read reads and checks a response to q: form, signature, subject, nonce where
// asked for, and dates.
func (q *question) read(raw []byte, withNonce bool, now time.Time) (*answer, error) {
	basic, data, err := parse(raw)
	if err != nil {
		return nil, err
	}
	if err := q.checkSigner(basic, now); err != nil {
		return nil, err
	}
	// The nonce first: an answer to another question is nothing more.
	at := slices.IndexFunc(data.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(oidNonce) })
	if withNonce && (at < 0 || !bytes.Equal(data.Extensions[at].Value, q.nonce)) {
		return nil, ErrNonce
	}
	if len(data.Responses) != 1 {
		return nil, fmt.Errorf("%w: it is about %d certificates, one was asked about", ErrFormat, len(data.Responses))
	}
	a := &answer{single: data.Responses[0]}
	a.thisUpdate, a.nextUpdate = a.single.ThisUpdate, a.single.NextUpdate
	id := a.single.Cert
	switch {
	case !id.Hash.Algorithm.Equal(q.id.Hash.Algorithm) || !bytes.Equal(id.NameHash, q.id.NameHash) || !bytes.Equal(id.IssuerKey, q.id.IssuerKey) || id.Serial == nil || id.Serial.Cmp(q.id.Serial) != 0:
		return nil, fmt.Errorf("%w: it is about another certificate than was asked", ErrFormat)
	case slices.ContainsFunc(a.single.Extensions, func(e pkix.Extension) bool { return e.Critical }):
		return nil, fmt.Errorf("%w: it has an unknown critical extension", ErrFormat)
	case now.Add(skew).Before(a.thisUpdate):
		return nil, fmt.Errorf("%w: it is of %s, now is %s", ErrStale, a.thisUpdate.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	case !a.nextUpdate.IsZero() && now.After(a.nextUpdate.Add(skew)):
		return nil, fmt.Errorf("%w: it was good until %s, now is %s", ErrStale, a.nextUpdate.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	return a, nil
}

// verdict turns the status into an error, nil for "good".
func (a *answer) verdict(cert *x509.Certificate) error {
	s := a.single
	switch {
	case bool(s.Good):
		return nil
	case bool(s.Unknown):
		return fmt.Errorf("%w: %s", ErrUnknown, cert.Subject)
	case s.Revoked.Reason == reasonHold:
		return fmt.Errorf("%w: %s since %s", ErrHold, cert.Subject, s.Revoked.At.UTC().Format(time.RFC3339))
	}
	return fmt.Errorf("%w: %s on %s, reason %d", ErrRevoked, cert.Subject, s.Revoked.At.UTC().Format(time.RFC3339), s.Revoked.Reason)
}

func parse(raw []byte) (*basicResponse, *responseData, error) {
	var outer response
	if err := exactly(raw, &outer); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	if outer.Status != 0 {
		return nil, nil, fmt.Errorf("%w: the responder refused the question with status %d", ErrUnreachable, outer.Status)
	}
	if !outer.Bytes.Type.Equal(oidBasic) {
		return nil, nil, fmt.Errorf("%w: response type %s", ErrFormat, outer.Bytes.Type)
	}
	var basic basicResponse
	if err := exactly(outer.Bytes.Value, &basic); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	var data responseData
	if err := exactly(basic.TBS.FullBytes, &data); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	return &basic, &data, nil
}

// checkSigner checks the response's signature: made by the certificate's issuer,
// or by a responder whose certificate is included, is meant for OCSP and chains
// to the pinned root. Only what stands above the certificate in question may have
// issued the responder's: a stolen key must not vouch for itself.
func (q *question) checkSigner(basic *basicResponse, now time.Time) error {
	algorithm, err := signatureAlgorithm(basic.Algorithm)
	if err != nil {
		return err
	}
	signature := basic.Signature.RightAlign()
	issuer := q.above[0]
	if issuer.CheckSignature(algorithm, basic.TBS.FullBytes, signature) == nil {
		return nil
	}
	if len(basic.Certs) == 0 {
		return fmt.Errorf("%w: %s did not sign it, and it names no other signer", ErrResponder, issuer.Subject.CommonName)
	}
	signer, err := x509.ParseCertificate(basic.Certs[0].FullBytes)
	if err != nil {
		return fmt.Errorf("%w: certificate of its signer: %w", ErrFormat, err)
	}
	roots, others := x509.NewCertPool(), x509.NewCertPool()
	for _, c := range q.above {
		others.AddCert(c)
	}
	roots.AddCert(q.above[len(q.above)-1])
	usage := []x509.ExtKeyUsage{x509.ExtKeyUsageOCSPSigning}
	if _, err := signer.Verify(x509.VerifyOptions{Roots: roots, Intermediates: others, CurrentTime: now, KeyUsages: usage}); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrResponder, signer.Subject, err)
	}
	if !slices.Contains(signer.ExtKeyUsage, x509.ExtKeyUsageOCSPSigning) {
		return fmt.Errorf("%w: %s is not meant for OCSP", ErrResponder, signer.Subject)
	}
	if err := signer.CheckSignature(algorithm, basic.TBS.FullBytes, signature); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrResponder, signer.Subject, err)
	}
	return nil
}

// signatureAlgorithm knows what NVIDIA's P-384 world and its neighbours sign with.
func signatureAlgorithm(id pkix.AlgorithmIdentifier) (x509.SignatureAlgorithm, error) {
	for _, a := range []struct {
		oid  asn1.ObjectIdentifier
		algo x509.SignatureAlgorithm
	}{
		{asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 3}, x509.ECDSAWithSHA384},
		{asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}, x509.ECDSAWithSHA256},
		{asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 4}, x509.ECDSAWithSHA512},
		{asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 12}, x509.SHA384WithRSA},
		{asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 11}, x509.SHA256WithRSA},
	} {
		if id.Algorithm.Equal(a.oid) {
			return a.algo, nil
		}
	}
	return 0, fmt.Errorf("%w: unknown signature algorithm %s", ErrFormat, id.Algorithm)
}

// exactly reads der, all of it, into v.
func exactly(der []byte, v any) error {
	rest, err := asn1.Unmarshal(der, v)
	if err == nil && len(rest) > 0 {
		err = fmt.Errorf("%d bytes are left over", len(rest))
	}
	return err
}
