package kbs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"coffer/internal/snp"
)

const (
	kdsTime    = 10 * time.Second
	kdsMaxBody = 64 << 10
	kdsAtOnce  = 4           // fetches
	kdsAgain   = time.Minute // before a URL that failed is tried again
	kdsFailed  = 1000        // URLs remembered
)

// kds fetches VCEKs from AMD's key distribution service, or a mirror of it. What
// it returns proves nothing until it is verified. Anybody can make the server
// ask, with a made-up report: fetches are few at a time, and a failure is
// remembered.
type kds struct {
	base  string
	http  *http.Client
	now   func() time.Time
	slots chan struct{}

	mu     sync.Mutex
	failed map[string]failure // by path
}

// failure is one that counts for a while.
type failure struct {
	until time.Time
	err   error
}

// errUnavailable says that there is no verdict now: a guest may ask again.
var errUnavailable = errors.New("no verdict is possible now")

// newKDS is nil without an address.
func newKDS(address string, now func() time.Time) (*kds, error) {
	if address == "" {
		return nil, nil
	}
	u, err := url.Parse(address)
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("KDS address %q: must be https://host or http://host", address)
	}
	// The certificate is verified by AMD's roots whatever way it came: http will do.
	return &kds{base: strings.TrimRight(address, "/"), now: now, slots: make(chan struct{}, kdsAtOnce), failed: map[string]failure{},
		http: &http.Client{Timeout: kdsTime, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}}, nil
}

// vcek fetches the VCEK of the report's chip and TCB, in DER.
func (k *kds) vcek(ctx context.Context, r *snp.Report) ([]byte, error) {
	path, err := r.VCEKPath()
	if err != nil {
		return nil, fmt.Errorf("no VCEK in the evidence: %w", err)
	}
	select {
	case k.slots <- struct{}{}:
		defer func() { <-k.slots }()
	default:
		return nil, fmt.Errorf("KDS: %w: too many certificates are being fetched", errUnavailable)
	}
	if f, ok := k.failure(path); ok {
		return nil, fmt.Errorf("KDS: it failed a moment ago, and is not asked again before %s: %w", f.until.UTC().Format(time.TimeOnly), f.err)
	}
	der, err := k.get(ctx, path)
	if err != nil {
		k.remember(path, err)
		return nil, fmt.Errorf("KDS: %w", err)
	}
	return der, nil
}

func (k *kds) get(ctx context.Context, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, k.base+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := k.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errUnavailable, err)
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusBadRequest, http.StatusNotFound: // no such chip
		return nil, fmt.Errorf("%s: HTTP %d", path, resp.StatusCode)
	default:
		return nil, fmt.Errorf("%w: %s: HTTP %d", errUnavailable, path, resp.StatusCode)
	}
	der, err := io.ReadAll(io.LimitReader(resp.Body, kdsMaxBody+1))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errUnavailable, err)
	}
	if len(der) > kdsMaxBody {
		return nil, fmt.Errorf("%s: the answer is larger than %d bytes", path, kdsMaxBody)
	}
	return der, nil
}

func (k *kds) failure(path string) (f failure, failed bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f, failed = k.failed[path]
	return f, failed && k.now().Before(f.until)
}

func (k *kds) remember(path string, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.failed) >= kdsFailed {
		clear(k.failed)
	}
	k.failed[path] = failure{k.now().Add(kdsAgain), err}
}
