package gpusim

import (
	"crypto"
	"crypto/rand"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"io"
	"math/big"
	"net/http"
	"sync/atomic"
	"time"
)

// Responder is an OCSP responder. Its fields are set before it is used.
type Responder struct {
	Signers  map[string]*Authority // who signs answers, by the SHA-384 of the issuer's subject
	Bare     bool                  // the signer's certificate is left out
	Now      time.Time             // thisUpdate; an hour later is nextUpdate
	Reasons  map[string]int        // serial number (decimal) to reason; -1 is "unknown"
	NoNonce  bool                  // the answer has none, as NVIDIA's cache "Trust Outpost" gives
	Nonce    []byte                // replaces the question's
	Refuse   int                   // OCSPResponseStatus other than 0
	OtherKey *Authority            // signs in place of the signer, whose certificate stays

	asked atomic.Int64
}

// NewResponder makes a responder for RIMs and devices, which has a key of its own
// below either root.
func (w *World) NewResponder(devices ...*Device) *Responder {
	r := &Responder{Now: Now, Signers: map[string]*Authority{}}
	r.For(w.RIMChain, w.RIMRoot.OCSPSigner())
	signer := w.DeviceRoot.OCSPSigner()
	for _, d := range devices {
		r.For(d.Chain, signer)
	}
	return r
}

// For makes signer answer for what the authorities of chain issued.
func (r *Responder) For(chain []*Authority, signer *Authority) {
	for _, a := range chain[1:] {
		hash := sha512.Sum384(a.Cert.RawSubject)
		r.Signers[string(hash[:])] = signer
	}
}

// Asked returns the number of questions so far.
func (r *Responder) Asked() int { return int(r.asked.Load()) }

type (
	certID struct {
		Hash                pkix.AlgorithmIdentifier
		NameHash, IssuerKey []byte
		Serial              *big.Int
	}
	ocspRequest struct {
		TBS struct {
			Requests   []struct{ Cert certID }
			Extensions []pkix.Extension `asn1:"optional,explicit,tag:2"`
		}
	}
	revoked struct {
		At     time.Time       `asn1:"generalized"`
		Reason asn1.Enumerated `asn1:"explicit,tag:0"`
	}
	single struct {
		Cert       certID
		Status     asn1.RawValue
		ThisUpdate time.Time `asn1:"generalized"`
		NextUpdate time.Time `asn1:"generalized,explicit,tag:0"`
	}
)

// ServeHTTP answers a POST.
func (r *Responder) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	r.asked.Add(1)
	body, err := io.ReadAll(req.Body)
	if err != nil || req.Header.Get("Content-Type") != "application/ocsp-request" {
		http.Error(w, "no question", http.StatusBadRequest)
		return
	}
	w.Write(r.Answer(body))
}

// Answer answers a request.
func (r *Responder) Answer(question []byte) []byte {
	var q ocspRequest
	if rest, err := asn1.Unmarshal(question, &q); err != nil || len(rest) > 0 || len(q.TBS.Requests) != 1 {
		return must(asn1.Marshal(struct{ Status asn1.Enumerated }{1}))
	}
	if r.Refuse != 0 {
		return must(asn1.Marshal(struct{ Status asn1.Enumerated }{asn1.Enumerated(r.Refuse)}))
	}
	id := q.TBS.Requests[0].Cert
	status := asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 0}
	if reason, ok := r.Reasons[id.Serial.String()]; ok {
		status.Tag = 2
		if reason >= 0 {
			der := must(asn1.Marshal(revoked{r.Now.Add(-24 * time.Hour), asn1.Enumerated(reason)}))
			var sequence asn1.RawValue
			must(asn1.Unmarshal(der, &sequence))
			status = asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 1, IsCompound: true, Bytes: sequence.Bytes}
		}
	}
	var extensions []pkix.Extension
	for _, e := range q.TBS.Extensions {
		if r.Nonce != nil {
			e.Value = r.Nonce
		}
		if !r.NoNonce {
			extensions = append(extensions, pkix.Extension{Id: e.Id, Value: e.Value})
		}
	}
	signer := r.Signers[string(id.NameHash)]
	if signer == nil {
		return must(asn1.Marshal(struct{ Status asn1.Enumerated }{6})) // unauthorized
	}
	keyHash := sha512.Sum384(signer.Cert.RawSubject)
	tbs := must(asn1.Marshal(struct {
		Responder  asn1.RawValue
		ProducedAt time.Time `asn1:"generalized"`
		Responses  []single
		Extensions []pkix.Extension `asn1:"optional,explicit,tag:1"`
	}{
		asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 2, IsCompound: true, Bytes: must(asn1.Marshal(keyHash[:20]))},
		r.Now, []single{{id, status, r.Now, r.Now.Add(time.Hour)}}, extensions,
	}))
	key := signer.Key
	if r.OtherKey != nil {
		key = r.OtherKey.Key
	}
	digest := sha512.Sum384(tbs)
	signature := must(key.Sign(rand.Reader, digest[:], crypto.SHA384))
	basic := struct {
		TBS       asn1.RawValue
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
		Certs     []asn1.RawValue `asn1:"optional,explicit,tag:0"`
	}{
		TBS: asn1.RawValue{FullBytes: tbs}, Algorithm: pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 3}},
		Signature: asn1.BitString{Bytes: signature, BitLength: len(signature) * 8},
	}
	if !r.Bare {
		basic.Certs = []asn1.RawValue{{FullBytes: signer.Cert.Raw}}
	}
	return must(asn1.Marshal(struct {
		Status asn1.Enumerated
		Bytes  struct {
			Type  asn1.ObjectIdentifier
			Value []byte
		} `asn1:"explicit,tag:0"`
	}{Bytes: struct {
		Type  asn1.ObjectIdentifier
		Value []byte
	}{asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 48, 1, 1}, must(asn1.Marshal(basic))}}))
}

// OCSPSigner makes a responder's key below a.
func (a *Authority) OCSPSigner() *Authority {
	return a.Issue("Simulated OCSP Responder", false, Forever, func(t *x509.Certificate) {
		t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageOCSPSigning}
	})
}
