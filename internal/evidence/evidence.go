// Package evidence is where a guest's attestation evidence comes from: the SNP
// firmware through the kernel's configfs-tsm, or, in a program built with the
// tag "simulated", the simulated platform behind a virtio port. A program holds
// exactly one of the two: the tag decides, not the guest config.
//
// Requests are serialised: the SNP guest driver gives up its key for good after
// certain overlaps. The package promises that a report it returns carries the
// report data and the VMPL that were asked for. It does not verify signatures
// and knows nothing of a KBS beyond the form of its evidence.
package evidence

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"coffer/internal/snp"
)

// Names that a KBS gives to kinds of evidence.
const (
	TEESNP    = "snp"
	TEESample = "sample" // Trustee's own test TEE; simulated platform only
)

var (
	// ErrPlatform is returned by Open for a platform or TEE that this build
	// cannot give evidence of.
	ErrPlatform = errors.New("this build has no evidence source for the platform")
	// ErrNoReport is returned by Report where the TEE has no hardware report.
	ErrNoReport = errors.New("the sample TEE has no attestation report")
	// ErrNoDevice means that the platform's device is not there, or no more.
	ErrNoDevice = errors.New("no attestation device")
	// ErrKeyDisabled means that the kernel has given up the guest's key to the
	// firmware for good, to keep it from being used twice.
	ErrKeyDisabled = errors.New("the guest's key to the firmware (VMPCK) is disabled until it is started anew")
	// ErrReport is wrapped by the error about a report that is not an answer
	// to the request.
	ErrReport = errors.New("attestation report does not answer the request")
)

// Source gives evidence. It is safe for concurrent use.
type Source interface {
	// TEE is the KBS's name of the evidence: TEESNP or TEESample.
	TEE() string
	// Simulated reports whether the evidence is made up.
	Simulated() bool
	// Report returns the raw report (snp.ReportSize bytes) over reportData at
	// the VMPL, and the host's certificate table, which may be empty.
	Report(ctx context.Context, reportData [64]byte, vmpl int) (report, certTable []byte, err error)
	// Evidence returns the KBS's primary_evidence bound to a SHA-384 digest,
	// at VMPL 0.
	Evidence(ctx context.Context, digest [48]byte) (json.RawMessage, error)
}

// fetch makes one report; calls never overlap.
type fetch func(ctx context.Context, reportData [64]byte, vmpl int) (report, certTable []byte, err error)

type source struct {
	tee       string
	simulated bool
	fetch     fetch
	derive    func(KeyRequest) ([]byte, error) // nil: cannot
	busy      chan struct{}                    // holds one token while a fetch or derive runs
	carried   []*x509.Certificate
}

// Carry gives a source certificates of chips, in DER: where one of them has signed
// a report, it takes the place of the one that the host says. It is called before the
// source is used. A source of another package has no use for them.
func Carry(s Source, certs [][]byte) error {
	own, ok := s.(*source)
	for _, der := range certs {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return fmt.Errorf("certificate of a chip: %w", err)
		}
		if ok {
			own.carried = append(own.carried, c)
		}
	}
	return nil
}

// table is the certificate table for a report to which the host gave one.
func (s *source) table(report, host []byte) []byte {
	r, err := snp.ParseReport(report)
	if err != nil {
		return host
	}
	for _, c := range s.carried {
		if r.SignedBy(c) {
			certs, _ := snp.ParseCertTable(host) // it may be anything
			certs = slices.DeleteFunc(certs, func(c snp.Cert) bool { return c.Type == snp.VCEK || c.Type == snp.VLEK })
			return snp.MarshalCertTable(append(certs, snp.Cert{Type: snp.VCEK, Data: c.Raw}))
		}
	}
	return host
}

func newSource(tee string, simulated bool, f fetch) *source {
	return &source{tee: tee, simulated: simulated, fetch: f, busy: make(chan struct{}, 1)}
}

func (s *source) TEE() string     { return s.tee }
func (s *source) Simulated() bool { return s.simulated }

func (s *source) Report(ctx context.Context, reportData [64]byte, vmpl int) ([]byte, []byte, error) {
	if s.tee != TEESNP {
		return nil, nil, ErrNoReport
	}
	if vmpl < 0 || vmpl > 3 {
		return nil, nil, fmt.Errorf("attestation report: VMPL %d is not 0..3", vmpl)
	}
	select {
	case s.busy <- struct{}{}:
	case <-ctx.Done():
		return nil, nil, fmt.Errorf("attestation report: an earlier request is still running: %w", ctx.Err())
	}
	type answer struct {
		report, certs []byte
		err           error
	}
	done := make(chan answer, 1)
	go func() { // the read sits in the kernel and knows no context
		defer func() { <-s.busy }()
		r, c, err := s.fetch(ctx, reportData, vmpl)
		if err == nil {
			err = check(r, reportData, vmpl)
		}
		done <- answer{r, c, err}
	}()
	select {
	case a := <-done:
		if a.err != nil {
			return nil, nil, fmt.Errorf("attestation report at VMPL %d: %w", vmpl, a.err)
		}
		return a.report, s.table(a.report, a.certs), nil
	case <-ctx.Done():
		return nil, nil, fmt.Errorf("attestation report at VMPL %d: no answer: %w", vmpl, ctx.Err())
	}
}

func check(report []byte, reportData [64]byte, vmpl int) error {
	r, err := snp.ParseReport(report)
	if err != nil {
		return err
	}
	if !bytes.Equal(r.ReportData[:], reportData[:]) {
		return fmt.Errorf("%w: it carries other report data", ErrReport)
	}
	if r.VMPL != uint32(vmpl) {
		return fmt.Errorf("%w: it is of VMPL %d", ErrReport, r.VMPL)
	}
	return nil
}

func (s *source) Evidence(ctx context.Context, digest [48]byte) (json.RawMessage, error) {
	if s.tee == TEESample {
		return json.Marshal(map[string]string{
			"svn":         "1",
			"report_data": base64.StdEncoding.EncodeToString(digest[:]),
		})
	}
	var reportData [64]byte
	copy(reportData[:], digest[:])
	report, table, err := s.Report(ctx, reportData, 0)
	if err != nil {
		return nil, err
	}
	certs, err := snp.ParseCertTable(table)
	if err != nil {
		return nil, fmt.Errorf("certificate table of the host: %w", err)
	}
	return snp.EvidenceJSON(report, certs)
}
