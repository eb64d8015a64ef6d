// Package api is what the agent serves to the workload: HTTP and JSON over a
// unix socket, and the part that is compatible with Confidential Containers
// (CoCo) on a loopback port as well. docs/api.yaml describes it; every path in it
// is served, and no other.
//
// The workload is not trusted with what is the guest's own. It gets reports of
// VMPL 1 to 3 (evidence of VMPL 0 is what the key of the disk is given to), and
// the KBS's token without the key that belongs to it: with both it could fetch
// any resource that the KBS's policy gives to this guest. Resources are fetched
// for it, by exact name, as far as the guest config lists them.
//
// Requests are bounded in size, time, number and rate, so that a workload that
// asks all the time holds up no attestation round: those do not pass through here.
package api

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/netutil"

	"coffer/internal/evidence"
	"coffer/internal/guestconfig"
	"coffer/internal/snp"
	"coffer/internal/snp/verify"
	"coffer/kbsclient"
)

// Source gives reports.
type Source interface {
	TEE() string
	Simulated() bool
	Report(ctx context.Context, reportData [64]byte, vmpl int) (report, certTable []byte, err error)
}

// Deriver derives keys from the chip's. A Source may be one.
type Deriver interface {
	DeriveKey(ctx context.Context, q evidence.KeyRequest) ([]byte, error)
}

// KBS makes a handshake and fetches a resource, which the caller wipes.
type KBS interface {
	Fetch(ctx context.Context, path string) (resource []byte, token string, err error)
}

// Chips finds chip certificates.
type Chips interface {
	VCEK(ctx context.Context, r *snp.Report) (der []byte, source string, err error)
	CRL(ctx context.Context, product string, vlek bool) ([]byte, error)
	Roots() []verify.Roots
}

// Config is what the server tells and whom it asks.
type Config struct {
	Guest        *guestconfig.Config
	LaunchDigest string // hex; "" where there is none
	Source       Source
	KBS          KBS
	Chips        func() Chips         // nil until they are known; may wait
	Now          func() time.Duration // monotonic
	Wall         func() time.Time
}

// Bounds.
const (
	maxBody     = 64 << 10
	maxHeader   = 16 << 10
	maxConns    = 32
	readTime    = 10 * time.Second
	idleTime    = 30 * time.Second
	reportTime  = 8 * time.Second
	kbsTime     = 45 * time.Second
	tokenMargin = 30 * time.Second // a token is given only while it lives so long
)

// Server answers. It is safe for concurrent use.
type Server struct {
	cfg     Config
	handler http.Handler
	coco    http.Handler
	http    []*http.Server

	reports, calls limiter // of the chip, of the KBS and the KDS

	mu      sync.Mutex
	rounds  map[string]int // by verdict
	round   json.RawMessage
	roundAt time.Duration
	passAt  time.Duration
	lost    time.Duration
	passed  bool
	token   string
}

// New makes a server; Serve serves it.
func New(cfg Config) *Server {
	s := &Server{cfg: cfg, rounds: map[string]int{}}
	// The host throttles a guest's requests to its chip.
	s.reports = limiter{now: cfg.Now, every: 500 * time.Millisecond, burst: 20, slot: make(chan struct{}, 1)}
	s.calls = limiter{now: cfg.Now, every: 2 * time.Second, burst: 10, slot: make(chan struct{}, 2)}

	coco, all := http.NewServeMux(), http.NewServeMux()
	all.Handle("/aa/", coco)
	all.Handle("/cdh/", coco)
	for pattern, f := range s.routes() {
		mux := all
		if _, path, _ := strings.Cut(pattern, " "); !strings.HasPrefix(path, "/v1/") {
			mux = coco
		}
		route(mux, pattern, f)
	}
	s.handler = all
	s.coco = onlyLoopback(coco)
	return s
}

// routes is all that is served.
func (s *Server) routes() map[string]func(*http.Request) (*answer, error) {
	return map[string]func(*http.Request) (*answer, error){
		"GET /aa/token":    s.cocoToken,
		"GET /aa/evidence": s.cocoEvidence,
		"GET /cdh/resource/{repository}/{type}/{tag}": s.resource,

		"GET /v1/info":      s.info,
		"GET /v1/status":    s.status,
		"GET /v1/metrics":   s.metrics,
		"GET /v1/keys":      s.keys,
		"GET /v1/peers":     s.peers,
		"GET /v1/token":     s.ownToken,
		"POST /v1/evidence": s.evidence,
		"GET /v1/resource/{repository}/{type}/{tag}": s.resource,

		"POST /v1/snp/report":      s.snpReport,
		"GET /v1/snp/certificates": s.snpCertificates,
		"POST /v1/snp/vcek":        s.snpVCEK,
		"GET /v1/snp/crl":          s.snpCRL,
		"POST /v1/snp/key":         s.snpKey,
		"GET /v1/snp/roots":        s.snpRoots,
	}
}

// Routes lists method and path of all that is served, sorted.
func Routes() []string { return slices.Sorted(maps.Keys((&Server{}).routes())) }

// Handler answers everything; Loopback the CoCo-compatible part alone.
func (s *Server) Handler() http.Handler  { return s.handler }
func (s *Server) Loopback() http.Handler { return s.coco }

// Serve serves a listener until Close.
func (s *Server) Serve(l net.Listener, h http.Handler) {
	server := &http.Server{
		Handler: h, MaxHeaderBytes: maxHeader, ReadHeaderTimeout: readTime, ReadTimeout: readTime,
		WriteTimeout: kbsTime + readTime, IdleTimeout: idleTime, ErrorLog: nil,
	}
	server.ErrorLog = quiet()
	s.mu.Lock()
	s.http = append(s.http, server)
	s.mu.Unlock()
	server.Serve(netutil.LimitListener(l, maxConns))
}

// Close ends all connections.
func (s *Server) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, h := range s.http {
		h.Close()
	}
}

// SetRound tells of an attestation round: its record, its verdict ("pass",
// "negative" or "unknown"), the token that a passed one got, and the time that the
// guest's clock was found not to have counted.
func (s *Server) SetRound(record json.RawMessage, verdict, token string, lost time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rounds[verdict]++
	s.lost += lost
	s.round, s.roundAt = record, s.cfg.Now()
	if verdict == verdicts[0] {
		s.passed, s.passAt, s.token = true, s.roundAt, token
	} else {
		s.token = ""
	}
}

// failure is an error with its HTTP status.
type failure struct {
	status int
	err    error
}

func (f *failure) Error() string { return f.err.Error() }

func failf(status int, format string, a ...any) error {
	return &failure{status, fmt.Errorf(format, a...)}
}

// answer is a body and its type.
type answer struct {
	kind string
	body []byte
	wipe bool
}

func octets(b []byte) (*answer, error) {
	return &answer{kind: "application/octet-stream", body: b}, nil
}

func object(v any) (*answer, error) {
	b, err := json.Marshal(v)
	return &answer{kind: "application/json", body: append(b, '\n')}, err
}

func route(mux *http.ServeMux, pattern string, f func(*http.Request) (*answer, error)) {
	mux.HandleFunc(pattern, func(w http.ResponseWriter, req *http.Request) {
		req.Body = http.MaxBytesReader(w, req.Body, maxBody)
		a, err := f(req)
		h := w.Header()
		h.Set("Cache-Control", "no-store")
		h.Set("X-Content-Type-Options", "nosniff")
		if err != nil {
			f := &failure{status: http.StatusInternalServerError, err: err}
			if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
				f.status = http.StatusRequestEntityTooLarge
			}
			errors.As(err, &f)
			if f.status == http.StatusTooManyRequests {
				h.Set("Retry-After", "2")
			}
			h.Set("Content-Type", "application/json")
			w.WriteHeader(f.status)
			json.NewEncoder(w).Encode(map[string]string{"error": f.Error()})
			return
		}
		h.Set("Content-Type", a.kind)
		h.Set("Content-Length", strconv.Itoa(len(a.body)))
		w.Write(a.body)
		if a.wipe {
			clear(a.body)
		}
	})
}

// onlyLoopback refuses requests that were sent to another name: a browser or a
// proxy in the workload that was talked into it.
func onlyLoopback(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		host := req.Host
		if h, _, err := net.SplitHostPort(host); err == nil {
			host = h
		}
		if addr, err := netip.ParseAddr(strings.Trim(host, "[]")); host != "localhost" && (err != nil || !addr.IsLoopback()) {
			http.Error(w, `{"error":"this is a loopback service"}`, http.StatusForbidden)
			return
		}
		h.ServeHTTP(w, req)
	})
}

// sevStatus is the SEV_STATUS register of a guest that was launched with the
// features that its launch digest covers: SEV, SEV-ES and SNP, and no other.
const sevStatus = 7

func (s *Server) info(*http.Request) (*answer, error) {
	g := s.cfg.Guest
	info := map[string]any{
		"cvm_id": g.CVMID, "platform": g.Platform, "tee": s.cfg.Source.TEE(), "simulated": s.cfg.Source.Simulated(),
		"launch_digest": s.cfg.LaunchDigest, "image_digest": g.Workload.ImageDigest, "kbs_url": g.KBS.URL, "sev_status": 0,
	}
	if s.cfg.Source.TEE() == evidence.TEESNP {
		info["sev_status"] = sevStatus
	}
	return object(info)
}

func (s *Server) status(*http.Request) (*answer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.round == nil {
		return nil, failf(http.StatusServiceUnavailable, "no attestation round has ended yet")
	}
	now, a := s.cfg.Now(), s.cfg.Guest.Attestation
	status := map[string]any{
		"last_round": s.round, "last_round_seconds_ago": seconds(now - s.roundAt), "last_pass_seconds_ago": nil,
		"check_frequency": a.CheckFrequency, "max_staleness": a.MaxStaleness, "failure_action": a.FailureAction,
	}
	if s.passed {
		status["last_pass_seconds_ago"] = seconds(now - s.passAt)
	}
	return object(status)
}

func seconds(d time.Duration) float64 { return float64(d.Milliseconds()) / 1000 }

// keys are public: who vouches for the KBS, and who for the chips.
func (s *Server) keys(*http.Request) (*answer, error) {
	type root struct {
		Product   string `json:"product"`
		ARK       string `json:"ark"`
		ASK       string `json:"ask,omitempty"`
		ASVK      string `json:"asvk,omitempty"`
		Simulated bool   `json:"simulated"`
	}
	var roots []root
	if chips := s.cfg.Chips(); chips != nil {
		for _, r := range chips.Roots() {
			out := root{Product: r.Product, ARK: pemText(r.ARK.Raw), Simulated: r.Simulated}
			if r.ASK != nil {
				out.ASK = pemText(r.ASK.Raw)
			}
			if r.ASVK != nil {
				out.ASVK = pemText(r.ASVK.Raw)
			}
			roots = append(roots, out)
		}
	}
	return object(map[string]any{"kbs_ca": s.cfg.Guest.KBS.CA, "snp_roots": roots})
}

func pemText(der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func (s *Server) peers(*http.Request) (*answer, error) { return object(s.cfg.Guest.Peers) }

// report asks the chip, as often as the limit allows.
func (s *Server) report(ctx context.Context, data [64]byte, vmpl int) (report, table []byte, err error) {
	if s.cfg.Source.TEE() != evidence.TEESNP {
		return nil, nil, failf(http.StatusNotImplemented, "this CVM runs on sample evidence: it has no attestation reports")
	}
	ctx, cancel := context.WithTimeout(ctx, reportTime)
	defer cancel()
	done, err := s.reports.take(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer done()
	report, table, err = s.cfg.Source.Report(ctx, data, vmpl)
	if err != nil {
		return nil, nil, failf(http.StatusBadGateway, "%w", err)
	}
	return report, table, nil
}

// vmplOf refuses VMPL 0.
func vmplOf(vmpl int) error {
	if vmpl == 0 {
		return failf(http.StatusForbidden, "VMPL 0 is the agent's own: what a VMPL 0 report says, the key of this CVM's disk is given to")
	}
	if vmpl < 0 || vmpl > 3 {
		return failf(http.StatusBadRequest, "VMPL %d is not 1, 2 or 3", vmpl)
	}
	return nil
}

func (s *Server) snpReport(req *http.Request) (*answer, error) {
	vmpl := 1
	if text := req.URL.Query().Get("vmpl"); text != "" {
		var err error
		if vmpl, err = strconv.Atoi(text); err != nil {
			return nil, failf(http.StatusBadRequest, "vmpl %q is no number", text)
		}
	}
	if err := vmplOf(vmpl); err != nil {
		return nil, err
	}
	body, err := io.ReadAll(req.Body)
	if err != nil {
		return nil, err
	}
	if len(body) != 64 {
		return nil, failf(http.StatusBadRequest, "the body has %d bytes; the report data are 64", len(body))
	}
	b, _, err := s.report(req.Context(), [64]byte(body), vmpl)
	if err != nil {
		return nil, err
	}
	return octets(b)
}

// evidence is a report as JSON, with all that a verifier needs.
func (s *Server) evidence(req *http.Request) (*answer, error) {
	q := struct {
		Nonce []byte `json:"nonce"` // base64
		VMPL  *int   `json:"vmpl"`
	}{}
	if err := decode(req, &q); err != nil {
		return nil, err
	}
	vmpl := 1
	if q.VMPL != nil {
		vmpl = *q.VMPL
	}
	if err := vmplOf(vmpl); err != nil {
		return nil, err
	}
	if len(q.Nonce) == 0 || len(q.Nonce) > 64 {
		return nil, failf(http.StatusBadRequest, "the nonce has %d bytes, want 1 to 64", len(q.Nonce))
	}
	var data [64]byte
	copy(data[:], q.Nonce)
	report, primary, certs, err := s.trusteeEvidence(req.Context(), data, vmpl)
	if err != nil {
		return nil, err
	}
	chain := []map[string]string{}
	for _, c := range certs {
		chain = append(chain, map[string]string{"type": string(c.Type), "pem": pemText(c.Data)})
	}
	return object(map[string]any{
		"tee": evidence.TEESNP, "vmpl": vmpl, "simulated": s.cfg.Source.Simulated(),
		"report": base64.StdEncoding.EncodeToString(report), "certificates": chain, "evidence": primary,
	})
}

// trusteeEvidence is a report, and Trustee's form of it with the chain that is
// known of its chip.
func (s *Server) trusteeEvidence(ctx context.Context, data [64]byte, vmpl int) (report []byte, primary json.RawMessage, certs []snp.Cert, err error) {
	report, _, err = s.report(ctx, data, vmpl)
	if err != nil {
		return nil, nil, nil, err
	}
	r, err := snp.ParseReport(report)
	if err != nil {
		return nil, nil, nil, err
	}
	if chips := s.cfg.Chips(); chips != nil {
		if der, _, err := chips.VCEK(ctx, r); err == nil {
			certs = chainOf(r, der, chips.Roots())
		}
	}
	primary, err = snp.EvidenceJSON(report, certs)
	return report, primary, certs, err
}

// chainOf puts a chip's certificate before those that it chains to.
func chainOf(r *snp.Report, der []byte, roots []verify.Roots) []snp.Cert {
	certs := []snp.Cert{{Type: snp.VCEK, Data: der}}
	if r.SigningKey() == snp.SigningKeyVLEK {
		certs[0].Type = snp.VLEK
	}
	product, err := r.Product()
	if err != nil {
		return certs
	}
	for _, root := range roots { // simulated ones stand first
		intermediate := root.ASK
		if certs[0].Type == snp.VLEK {
			intermediate = root.ASVK
		}
		if root.Product == product && intermediate != nil {
			return append(certs, snp.Cert{Type: snp.ASK, Data: intermediate.Raw}, snp.Cert{Type: snp.ARK, Data: root.ARK.Raw})
		}
	}
	return certs
}

// decode reads a JSON body strictly.
func decode(req *http.Request, v any) error {
	d := json.NewDecoder(req.Body)
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		if errors.As(err, new(*http.MaxBytesError)) {
			return err
		}
		return failf(http.StatusBadRequest, "the body: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return failf(http.StatusBadRequest, "the body: data after the object")
	}
	return nil
}

func (s *Server) snpCertificates(req *http.Request) (*answer, error) {
	_, table, err := s.report(req.Context(), [64]byte{}, 1)
	if err != nil {
		return nil, err
	}
	return octets(table)
}

func (s *Server) chips() (Chips, error) {
	if c := s.cfg.Chips(); c != nil {
		return c, nil
	}
	return nil, failf(http.StatusNotImplemented, "this CVM runs on sample evidence: it knows no chips")
}

func (s *Server) snpVCEK(req *http.Request) (*answer, error) {
	body, err := io.ReadAll(req.Body)
	if err != nil {
		return nil, err
	}
	r, err := snp.ParseReport(body)
	if err != nil {
		return nil, failf(http.StatusBadRequest, "the body: %w", err)
	}
	chips, err := s.chips()
	if err != nil {
		return nil, err
	}
	done, err := s.calls.slotOf(req.Context())
	if err != nil {
		return nil, err
	}
	defer done()
	der, _, err := chips.VCEK(req.Context(), r)
	if err != nil {
		return nil, failf(http.StatusNotFound, "%w", err)
	}
	return octets(der)
}

func (s *Server) snpCRL(req *http.Request) (*answer, error) {
	chips, err := s.chips()
	if err != nil {
		return nil, err
	}
	done, err := s.calls.take(req.Context())
	if err != nil {
		return nil, err
	}
	defer done()
	q := req.URL.Query()
	der, err := chips.CRL(req.Context(), q.Get("product"), q.Get("endorser") == "vlek")
	if err != nil {
		return nil, failf(http.StatusNotFound, "%w", err)
	}
	return octets(der)
}

func (s *Server) snpKey(req *http.Request) (*answer, error) {
	var q evidence.KeyRequest
	if err := decode(req, &q); err != nil {
		return nil, err
	}
	if err := vmplOf(q.VMPL); err != nil {
		return nil, err
	}
	if q.Root != "vcek" && q.Root != "vmrk" || q.Fields>>7 != 0 {
		return nil, failf(http.StatusBadRequest, "root is vcek or vmrk, guest_field_select has 7 bits")
	}
	d, can := s.cfg.Source.(Deriver)
	if !can {
		return nil, failf(http.StatusNotImplemented, "this platform derives no keys")
	}
	ctx, cancel := context.WithTimeout(req.Context(), reportTime)
	defer cancel()
	done, err := s.reports.take(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	key, err := d.DeriveKey(ctx, q)
	if errors.Is(err, evidence.ErrNoKey) {
		return nil, failf(http.StatusNotImplemented, "%w", err)
	}
	if err != nil {
		return nil, failf(http.StatusBadGateway, "%w", err)
	}
	return &answer{kind: "application/octet-stream", body: key, wipe: true}, nil
}

// snpRoots are what snpguest of a simulated build trusts beside AMD's.
func (s *Server) snpRoots(*http.Request) (*answer, error) {
	chips, err := s.chips()
	if err != nil {
		return nil, err
	}
	var text string
	for _, r := range chips.Roots() {
		if r.Simulated {
			for _, c := range []string{pemText(r.ARK.Raw), pemText(r.ASK.Raw)} {
				text += c
			}
		}
	}
	if text == "" {
		return nil, failf(http.StatusNotFound, "this is no simulated platform: AMD's roots are part of snpguest")
	}
	return &answer{kind: "application/x-pem-file", body: []byte(text)}, nil
}

// ownToken is the token of the last round that passed, or a fresh one.
func (s *Server) ownToken(req *http.Request) (*answer, error) {
	token, err := s.freshToken(req.Context())
	if err != nil {
		return nil, err
	}
	return object(map[string]string{"token": token})
}

func (s *Server) freshToken(ctx context.Context) (string, error) {
	s.mu.Lock()
	token := s.token
	s.mu.Unlock()
	if s.lives(token) {
		return token, nil
	}
	resource, token, err := s.fetch(ctx, s.cfg.Guest.KBS.CanaryPath)
	clear(resource)
	if err != nil {
		return "", err
	}
	s.mu.Lock()
	s.token = token
	s.mu.Unlock()
	return token, nil
}

func (s *Server) lives(token string) bool {
	if token == "" {
		return false
	}
	c, err := kbsclient.ParseToken(token)
	return err == nil && c.Expires.After(s.cfg.Wall().Add(tokenMargin))
}

// fetch asks the KBS, as often as the limit allows.
func (s *Server) fetch(ctx context.Context, path string) ([]byte, string, error) {
	ctx, cancel := context.WithTimeout(ctx, kbsTime)
	defer cancel()
	done, err := s.calls.take(ctx)
	if err != nil {
		return nil, "", err
	}
	defer done()
	resource, token, err := s.cfg.KBS.Fetch(ctx, path)
	switch {
	case err == nil:
		return resource, token, nil
	case errors.Is(err, kbsclient.ErrPolicyDenied):
		return nil, "", failf(http.StatusForbidden, "%w", err)
	case errors.Is(err, kbsclient.ErrNoResource):
		return nil, "", failf(http.StatusNotFound, "%w", err)
	}
	return nil, "", failf(http.StatusBadGateway, "%w", err)
}

func (s *Server) resource(req *http.Request) (*answer, error) {
	path := req.PathValue("repository") + "/" + req.PathValue("type") + "/" + req.PathValue("tag")
	g := s.cfg.Guest
	if !slices.Contains(g.API.Resources, path) || path == g.KBS.KeyPath || path == g.KBS.CanaryPath {
		return nil, failf(http.StatusForbidden, "resource %s is none of those that this CVM's configuration gives to the workload (workload.kbs_resources)", url.PathEscape(path))
	}
	b, _, err := s.fetch(req.Context(), path)
	if err != nil {
		return nil, err
	}
	return &answer{kind: "application/octet-stream", body: b, wipe: true}, nil
}

// cocoToken is CoCo's form, but for its tee_keypair.
func (s *Server) cocoToken(req *http.Request) (*answer, error) {
	if kind := req.URL.Query().Get("token_type"); kind != "kbs" {
		return nil, failf(http.StatusBadRequest, "token_type %q: only kbs is known", kind)
	}
	return s.ownToken(req)
}

// cocoEvidence takes up to 64 bytes of runtime data as they are.
func (s *Server) cocoEvidence(req *http.Request) (*answer, error) {
	q := req.URL.Query()
	text := q.Get("runtime_data")
	if !q.Has("runtime_data") || len(text) > 64 {
		return nil, failf(http.StatusBadRequest, "runtime_data is missing or longer than 64 bytes")
	}
	var data [64]byte
	copy(data[:], text)
	_, primary, _, err := s.trusteeEvidence(req.Context(), data, 1)
	if err != nil {
		return nil, err
	}
	return &answer{kind: "application/json", body: primary}, nil
}
