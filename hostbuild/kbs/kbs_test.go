package kbs

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestOversize(t *testing.T) {
	r := newRig(t, Options{})
	for _, header := range []string{"", r.adminHeader()} {
		a := r.do("POST", "/kbs/v0/resource/a/b/c", make([]byte, maxBody+1), "Authorization", header)
		if a.status != 413 || string(a.body) != "payload reached size limit" || a.header.Get("Content-Type") != "text/plain; charset=utf-8" {
			t.Errorf("body of 2 MiB + 1: %d %q %v", a.status, a.body, a.header)
		}
	}
	if a := r.do("POST", "/kbs/v0/auth", bytes.Repeat([]byte("A"), maxBody)); a.errType() != "AttestationError" {
		t.Errorf("auth with 2 MiB: %d %s", a.status, a.body)
	}
	if a := r.do("GET", "/kbs/v0/resource/a/b/c", nil, "X-Big", strings.Repeat("a", maxHeader+8192)); a.status != 431 {
		t.Errorf("head of 136 KiB: %d", a.status)
	}
}

func TestInitAndNew(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "kbs")
	if err := Init(dir, Options{}); err == nil || !strings.Contains(err.Error(), "no host") {
		t.Errorf("Init without hosts: %v", err)
	}
	if err := Init(dir, Options{Hosts: []string{"10.0.0.1", "::1", "kbs.example"}}); err != nil {
		t.Fatal(err)
	}
	key, _ := os.ReadFile(filepath.Join(dir, adminKeyFile))
	if err := Init(dir, Options{Hosts: []string{"x"}}); err == nil || !strings.Contains(err.Error(), "not an empty folder") {
		t.Errorf("second Init: %v", err)
	}
	file := filepath.Join(t.TempDir(), "notes.txt")
	if err := os.WriteFile(file, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Init(file, Options{Hosts: []string{"x"}}); err == nil || !strings.Contains(err.Error(), "not an empty folder") {
		t.Errorf("Init in the place of a file: %v", err)
	}
	if b, _ := os.ReadFile(file); string(b) != "mine" {
		t.Error("Init has removed a file")
	}
	if again, _ := os.ReadFile(filepath.Join(dir, adminKeyFile)); !bytes.Equal(key, again) {
		t.Error("a second Init changed the keys")
	}
	if entries, _ := os.ReadDir(filepath.Dir(dir)); len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
	b, _ := os.ReadFile(filepath.Join(dir, serverCertFile))
	block, _ := pem.Decode(b)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{"10.0.0.1", "::1", "kbs.example"} {
		if err := cert.VerifyHostname(host); err != nil {
			t.Error(err)
		}
	}
	if _, err := New(Options{Dir: dir, SimulatedRoots: []byte("x")}); err == nil || !strings.Contains(err.Error(), "not allowed") {
		t.Errorf("simulated roots without the flag: %v", err)
	}
	if _, err := New(Options{Dir: dir, Dialect: "X"}); err == nil {
		t.Error("dialect X is accepted")
	}
	for name, modes := range map[string][2]os.FileMode{tokenKeyFile: {0o640, 0o600}, serverKeyFile: {0o604, 0o600}, repositoryDir: {0o755, 0o700}} {
		if err := os.Chmod(filepath.Join(dir, name), modes[0]); err != nil {
			t.Fatal(err)
		}
		if _, err := New(Options{Dir: dir}); err == nil || !strings.Contains(err.Error(), name+" can be read by others") {
			t.Errorf("%s readable by others: %v", name, err)
		}
		if err := os.Chmod(filepath.Join(dir, name), modes[1]); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := New(Options{Dir: dir, Logger: slog.New(slog.DiscardHandler)}); err != nil {
		t.Error(err)
	}
	if _, err := New(Options{Dir: t.TempDir()}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("empty folder: %v", err)
	}
}

// TestRestart: a handshake that began before a restart of the server goes on
// after it, and a session's token counts after it.
func TestRestart(t *testing.T) {
	dialects(t, func(t *testing.T, d Dialect) {
		r := ready(t, d)
		attested := r.guest("sample")
		token := attested.attested()
		waits := r.guest("sample").auth()
		stale := r.guest("sample").auth()

		again, err := New(Options{Dir: r.dir, Dialect: d, AllowSimulated: true, Logger: slog.New(slog.NewJSONHandler(r.log, nil)), Now: r.clock.now})
		if err != nil {
			t.Fatal(err)
		}
		r.server.sessions = again.sessions // as a new process has them: none
		if a := waits.attest(waits.attestBody(sampleEvidence(waits.digest()), "")); a.status != 200 {
			t.Errorf("attest after the restart: %d %s\n%v", a.status, a.body, r.log.last(t))
		}
		if a := waits.get(keyPath); a.status != 200 {
			t.Errorf("get after the restart: %d %s", a.status, a.body)
		}
		if a := attested.get(keyPath); a.errType() != "TokenNotFound" {
			t.Errorf("attested session after the restart: %d %s", a.status, a.body)
		}
		if a := r.do("GET", "/kbs/v0/resource/"+keyPath, nil, "Authorization", "Bearer "+token); a.status != 200 {
			t.Errorf("its token after the restart: %d %s", a.status, a.body)
		}
		forged := stale.cookie[:len(stale.cookie)-1] + "0"
		if forged == stale.cookie {
			forged = stale.cookie[:len(stale.cookie)-1] + "1"
		}
		if a := r.do("POST", "/kbs/v0/attest", stale.attestBody(sampleEvidence(stale.digest()), ""), "Cookie", forged); a.errType() != "AttestationError" {
			t.Errorf("another id: %d %s", a.status, a.body)
		}
		r.clock.add(sessionLife)
		if a := stale.attest(stale.attestBody(sampleEvidence(stale.digest()), "")); a.errType() != "AttestationError" {
			t.Errorf("after its five minutes: %d %s", a.status, a.body)
		}
	})
}

// TestStop: the end of the context lets a request in progress finish.
func TestStop(t *testing.T) {
	r := newRig(t, Options{AllowSimulated: true})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- r.server.Serve(ctx, ln) }()
	pr, pw := io.Pipe()
	status := make(chan int, 1)
	go func() {
		req, _ := http.NewRequest("POST", "https://"+ln.Addr().String()+"/kbs/v0/auth", pr)
		req.Header.Set("Expect", "100-continue") // the body begins when the server reads it
		resp, err := r.client.Do(req)
		if err != nil {
			t.Error(err)
			status <- 0
			return
		}
		resp.Body.Close()
		status <- resp.StatusCode
	}()
	fmt.Fprint(pw, `{"version":"0.4.0","tee":"snp",`)
	cancel()
	fmt.Fprint(pw, `"extra-params":""}`)
	pw.Close()
	if got := <-status; got != 200 {
		t.Errorf("request in progress: %d", got)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
	if _, err := net.Dial("tcp", ln.Addr().String()); err == nil {
		t.Error("the listener is still open")
	}
	// A listener that fails is an error.
	if err := r.server.Serve(context.Background(), ln); err == nil {
		t.Error("serving a closed listener is no error")
	}
}

func TestLogIsBounded(t *testing.T) {
	r := newRig(t, Options{})
	r.do("GET", "/kbs/v0/resource/"+strings.Repeat("x", 50000)+"%0a{}", nil)
	if l := r.log.last(t); len(fmt.Sprint(l["path"])) > 600 || l["reason"] == nil {
		t.Errorf("audit line %v", l)
	}
	if strings.Count(r.log.String(), "\n") != 2 { // serving, denied
		t.Errorf("lines: %s", r.log)
	}
}

func TestMetrics(t *testing.T) {
	r := ready(t, DialectT)
	g := r.guest("sample")
	g.attested()
	g.get(keyPath)
	bad := r.guest("sample").auth()
	bad.attest(bad.attestBody(sampleEvidence([48]byte{}), ""))
	r.do("POST", "/kbs/v0/attest", []byte("x"))
	text := string(r.do("GET", "/metrics", nil).body)
	for _, want := range []string{
		"# TYPE auth_requests_total counter\nauth_requests_total 2\n",
		"auth_successes_total 2\n",
		"attestation_requests_total 3\n",
		"attestation_successes_total{tee_type=\"sample\"} 1\n",
		"attestation_failures_total{tee_type=\"sample\"} 1\n",
		"attestation_errors_total 1\n",
		"kbs_policy_approvals_total 1\n",
		"kbs_policy_violations_total 0\n",
		"resource_reads_total 1\n",
		"resource_writes_total 1\n",
		"# TYPE http_request_duration_seconds histogram\n",
		"http_request_duration_seconds_bucket{le=\"+Inf\"} 8\n",
		"http_request_duration_seconds_count 8\n",
		"http_requests_total 8\n",
		"http_response_size_bytes_bucket{le=\"128\"} ",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	if strings.Contains(text, "keys/root") {
		t.Error("a resource's path is told to everybody")
	}
}

// TestTooManyAtATime: requests beyond what the server works at are answered
// unread, and connections beyond what it holds are closed; an address has a share of
// them.
func TestTooManyAtATime(t *testing.T) {
	r := newRig(t, Options{AllowSimulated: true})
	each := func(f func(remote string), host string, n int) {
		for range n {
			f(host + ":1")
		}
	}
	take := func(remote string) {
		if !r.server.inFlight.take(remote) {
			t.Fatalf("no room for %s", remote)
		}
	}
	// One address gets its quarter: another's requests go on.
	each(take, "192.0.2.1", maxInFlight/4)
	if r.server.inFlight.take("192.0.2.1:2") {
		t.Error("an address may have more than a quarter of the requests")
	}
	if a := r.do("GET", "/healthz", nil); a.status != 200 {
		t.Errorf("beside a busy address: %d, want 200", a.status)
	}
	for i := range 3 {
		each(take, fmt.Sprintf("[2001:db8:0:%d::1]", i), maxInFlight/4)
	}
	if a := r.do("GET", "/healthz", nil); a.status != 503 {
		t.Errorf("one request too many: %d, want 503", a.status)
	}
	each(r.server.inFlight.give, "192.0.2.1", maxInFlight/4)
	for i := range 3 {
		each(r.server.inFlight.give, fmt.Sprintf("[2001:db8:0:%d::2]", i), maxInFlight/4) // the same /64
	}
	if n := len(r.server.inFlight.by); n != 0 {
		t.Errorf("%d addresses without requests are remembered", n)
	}
	if a := r.do("GET", "/metrics", nil); !strings.Contains(string(a.body), "http_requests_refused_total 1\n") {
		t.Errorf("the refused request is not counted: %d", a.status)
	}

	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer inner.Close()
	l := &limited{Listener: inner, share: newShare(1)}
	dial := func() net.Conn {
		c, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	dial()
	first, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	accepted := make(chan net.Conn, 1)
	go func() {
		c, _ := l.Accept()
		accepted <- c
	}()
	if _, err := dial().Read(make([]byte, 1)); err == nil {
		t.Error("a connection too many is not closed")
	}
	first.Close()
	first.Close() // gives its slot back once
	dial()
	if c := <-accepted; c == nil {
		t.Error("after one has ended, none is accepted")
	}
	if l.share.total != 1 {
		t.Errorf("%d connections counted, want 1", l.share.total)
	}
}

func TestRate(t *testing.T) {
	r := newRig(t, Options{AllowSimulated: true, Rate: 2})
	for i := range 2 * burstSeconds {
		if a := r.do("GET", "/healthz", nil); a.status != 200 {
			t.Fatalf("request %d: %d", i, a.status)
		}
	}
	// The requests took a moment, too; a second of it is worth two more.
	status := 200
	for range 2 * burstSeconds {
		if status = r.do("GET", "/healthz", nil).status; status == 429 {
			break
		}
	}
	if status != 429 {
		t.Errorf("beyond the rate: %d, want 429", status)
	}
	r.clock.add(time.Second)
	if a := r.do("GET", "/healthz", nil); a.status != 200 {
		t.Errorf("a second later: %d", a.status)
	}

	now := time.Now()
	l := limiter{rate: 1, now: func() time.Time { return now }, buckets: map[string]*bucket{}}
	for i := range maxBuckets + 10 {
		l.allow(fmt.Sprintf("10.%d.%d.%d:1", i>>16, i>>8&255, i&255))
	}
	if len(l.buckets) > maxBuckets {
		t.Errorf("%d addresses remembered", len(l.buckets))
	}
	for i := range burstSeconds + 1 {
		if got := l.allow(fmt.Sprintf("[2001:db8::%d]:1", i+1)); got != (i < burstSeconds) {
			t.Errorf("request %d of a /64: %v", i, got)
		}
	}
}
