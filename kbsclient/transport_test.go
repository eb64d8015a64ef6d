package kbsclient

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

const resourceRoute = "GET /resource/keys/root/x"

// hijack gives the raw connection of a request.
func hijack(t testing.TB, w http.ResponseWriter) net.Conn {
	conn, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		t.Error(err)
	}
	return conn
}

func TestConnectionClosedWithoutAnswer(t *testing.T) {
	for _, tc := range []struct {
		name  string
		times int // how often the connection is closed
		calls int
		ok    bool
	}{
		{"once", 1, 2, true},
		{"always", 99, 2, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			kbs := newFakeKBS(t)
			closed := 0
			kbs.override["POST /attest"] = func(w http.ResponseWriter, r *http.Request) {
				if closed++; closed <= tc.times {
					hijack(t, w).Close()
					return
				}
				kbs.serve(w, r, "POST /attest")
			}
			_, err := serve(t, kbs, nil).Attest(context.Background(), sample{})
			if (err == nil) != tc.ok {
				t.Fatalf("error %v", err)
			}
			if err != nil {
				is(t, err, ErrUnreachable)
			}
			if n := kbs.count("POST /attest"); n != tc.calls {
				t.Errorf("%d attempts, want %d", n, tc.calls)
			}
		})
	}
}

// Trustee closes idle connections; here each one after its first answer,
// without saying so.
func TestIdleConnectionClosed(t *testing.T) {
	kbs := newFakeKBS(t)
	var idle []net.Conn
	c := serve(t, kbs, func(_ *tls.Config, cfg *Config) {
		cfg.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
			idle = append(idle, conn)
			return conn, err
		}
	})
	s := attest(t, c)
	for _, conn := range idle {
		conn.Close()
	}
	if _, err := s.Resource(context.Background(), "keys/root/x"); err != nil {
		t.Fatal(err)
	}
	if len(idle) != 2 {
		t.Errorf("%d connections, want 2", len(idle))
	}
}

func TestDialIsRetriedThreeTimes(t *testing.T) {
	for _, failures := range []int{2, 3} {
		t.Run(fmt.Sprint(failures), func(t *testing.T) {
			dials := 0
			c := serve(t, newFakeKBS(t), func(_ *tls.Config, cfg *Config) {
				cfg.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
					if dials++; dials <= failures {
						return nil, &net.OpError{Op: "dial", Net: "tcp", Err: errors.New("connection refused")}
					}
					return (&net.Dialer{}).DialContext(ctx, network, addr)
				}
			})
			_, err := c.Attest(context.Background(), sample{})
			if failures == 2 {
				if err != nil {
					t.Error(err)
				}
				return
			}
			is(t, err, ErrUnreachable)
			if dials != 3 {
				t.Errorf("%d dials", dials)
			}
			if !strings.Contains(err.Error(), "connection refused") || !strings.Contains(err.Error(), c.host) {
				t.Errorf("%q names neither cause nor place", err)
			}
		})
	}
}

func TestAnswerBreaksOff(t *testing.T) {
	kbs := newFakeKBS(t)
	kbs.override[resourceRoute] = func(w http.ResponseWriter, _ *http.Request) {
		conn := hijack(t, w)
		_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
		conn.Close()
	}
	_, err := attest(t, serve(t, kbs, nil)).Resource(context.Background(), "keys/root/x")
	is(t, err, ErrUnreachable)
	if n := kbs.count(resourceRoute); n != 1 {
		t.Errorf("asked %d times", n)
	}
}

func TestBrokenHTTP(t *testing.T) {
	for name, answer := range map[string]string{
		"no HTTP":    "SSH-2.0-OpenSSH_9.2p1\r\n",
		"bad length": "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
		"bad chunk":  "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			kbs := newFakeKBS(t)
			kbs.override[resourceRoute] = func(w http.ResponseWriter, _ *http.Request) {
				conn := hijack(t, w)
				_, _ = io.WriteString(conn, answer)
				conn.Close()
			}
			_, err := attest(t, serve(t, kbs, nil)).Resource(context.Background(), "keys/root/x")
			is(t, err, ErrProtocol)
			if n := kbs.count(resourceRoute); n != 1 {
				t.Errorf("asked %d times", n)
			}
		})
	}
}

// An endless answer is left at the limit, not read to its end.
func TestOversizeAnswers(t *testing.T) {
	const all = 128 << 20
	for _, tc := range []struct {
		name, route string
		status      int
	}{
		{"challenge", "POST /auth", 200},
		{"token", "POST /attest", 200},
		{"error", "POST /attest", 401},
		{"resource", resourceRoute, 200},
	} {
		t.Run(tc.name, func(t *testing.T) {
			kbs := newFakeKBS(t)
			written := make(chan int, 1)
			kbs.override[tc.route] = func(w http.ResponseWriter, _ *http.Request) {
				w.WriteHeader(tc.status)
				chunk := make([]byte, 64<<10)
				sum := 0
				for err := error(nil); err == nil && sum < all; {
					var n int
					n, err = w.Write(chunk)
					sum += n
				}
				written <- sum
			}
			c := serve(t, kbs, nil)
			s, err := c.Attest(context.Background(), sample{})
			if tc.route == resourceRoute && err == nil {
				_, err = s.Resource(context.Background(), "keys/root/x")
			}
			is(t, err, ErrTooLarge)
			if n := <-written; n >= all {
				t.Errorf("all of %d bytes were taken", n)
			}
		})
	}
}

func TestOversizeHeader(t *testing.T) {
	kbs := newFakeKBS(t)
	kbs.override["POST /attest"] = func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("X", strings.Repeat("x", 1<<20))
	}
	_, err := serve(t, kbs, nil).Attest(context.Background(), sample{})
	is(t, err, ErrProtocol)
}

// A server that holds the line: nothing at all, or a byte now and then.
func TestDeadlineOfACall(t *testing.T) {
	for _, name := range []string{"silent", "trickle"} {
		t.Run(name, func(t *testing.T) {
			kbs := newFakeKBS(t)
			kbs.override["POST /attest"] = func(w http.ResponseWriter, r *http.Request) {
				_, _ = io.Copy(io.Discard, r.Body) // else the server does not notice that the client left
				for r.Context().Err() == nil {
					if name == "trickle" {
						_, _ = w.Write([]byte{' '})
						w.(http.Flusher).Flush()
					}
					select {
					case <-r.Context().Done():
					case <-time.After(5 * time.Millisecond):
					}
				}
			}
			c := serve(t, kbs, func(_ *tls.Config, cfg *Config) {
				cfg.CallTimeout, cfg.AttestTimeout = 300*time.Millisecond, time.Hour
			})
			_, err := c.Attest(context.Background(), sample{})
			is(t, err, ErrUnreachable)
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%q does not tell of the deadline", err)
			}
		})
	}
}

// A firewall that drops everything: the text must not claim that the KBS took
// the request.
func TestDeadlineOfAConnection(t *testing.T) {
	c := serve(t, newFakeKBS(t), func(_ *tls.Config, cfg *Config) {
		cfg.CallTimeout, cfg.AttestTimeout = 100*time.Millisecond, time.Hour
		cfg.Dial = func(ctx context.Context, _, _ string) (net.Conn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
	})
	_, err := c.Attest(context.Background(), sample{})
	is(t, err, ErrUnreachable)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "no connection") {
		t.Errorf("error %v", err)
	}
}

// Evidence that takes for ever ends at the handshake's own deadline.
func TestDeadlineOfAHandshake(t *testing.T) {
	c := serve(t, newFakeKBS(t), func(_ *tls.Config, cfg *Config) { cfg.AttestTimeout = 200 * time.Millisecond })
	_, err := c.Attest(context.Background(), hanging{})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
}

type hanging struct{ sample }

func (hanging) Evidence(ctx context.Context, _ [48]byte) (json.RawMessage, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func TestCancelIsNoNewsAboutTheKBS(t *testing.T) {
	kbs := newFakeKBS(t)
	ctx, cancel := context.WithCancel(context.Background())
	kbs.override["POST /attest"] = func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		cancel()
		<-r.Context().Done()
	}
	_, err := serve(t, kbs, nil).Attest(ctx, sample{})
	is(t, err)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

func TestTLSVersions(t *testing.T) {
	for _, tc := range []struct {
		version uint16
		ok      bool
	}{{tls.VersionTLS11, false}, {tls.VersionTLS12, true}, {tls.VersionTLS13, true}} {
		t.Run(tls.VersionName(tc.version), func(t *testing.T) {
			c := serve(t, newFakeKBS(t), func(server *tls.Config, _ *Config) {
				server.MinVersion, server.MaxVersion = tc.version, tc.version
			})
			_, err := c.Attest(context.Background(), sample{})
			if tc.ok && err != nil {
				t.Error(err)
			}
			if !tc.ok {
				is(t, err, ErrTLS)
			}
		})
	}
}

func TestCertificates(t *testing.T) {
	day := func(n int) time.Time { return epoch.AddDate(0, 0, n) }
	good := newCA(t, day(-9), day(9))
	for _, tc := range []struct {
		name             string
		ca               *ca
		from, to         time.Time
		roots            []byte
		want             []error
		contains, absent string
	}{
		{"good", good, day(-1), day(1), good.pem, nil, "", ""},
		{"good among others", good, day(-1), day(1), append(newCA(t, day(-1), day(1)).pem, good.pem...), nil, "", ""},
		{"other CA", good, day(-1), day(1), newCA(t, day(-1), day(1)).pem, []error{ErrTLS}, "unknown authority", "expired"},
		{"system roots", good, day(-1), day(1), nil, []error{ErrTLS}, "unknown authority", ""},
		{"expired", good, day(-3), day(-2), good.pem, []error{ErrTLS, ErrClock}, "has expired", "not valid yet"},
		{"of the future", good, day(2), day(3), good.pem, []error{ErrTLS, ErrClock}, "is not valid yet", "expired"},
		{"CA of the future", newCA(t, day(2), day(4)), day(1), day(3), nil, []error{ErrTLS, ErrClock}, "is not valid yet", "expired"},
		{"CA of the future, leaf good", newCA(t, day(2), day(4)), day(-1), day(3), nil, []error{ErrTLS, ErrClock}, "is not valid yet", "expired"},
		{"expired CA, leaf good", newCA(t, day(-4), day(-2)), day(-3), day(1), nil, []error{ErrTLS, ErrClock}, "has expired", "not valid yet"},
		{"expired, other CA", good, day(-3), day(-2), newCA(t, day(-1), day(1)).pem, []error{ErrTLS}, "not one of ours", "has expired"},
		{"of the future, other CA", good, day(2), day(3), newCA(t, day(-1), day(1)).pem, []error{ErrTLS}, "not one of ours", "expired"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			kbs := newFakeKBS(t)
			c := serve(t, kbs, func(server *tls.Config, cfg *Config) {
				server.Certificates = []tls.Certificate{tc.ca.leaf(tc.from, tc.to)}
				cfg.RootCAs = tc.roots
				if tc.roots == nil && tc.ca != good {
					cfg.RootCAs = tc.ca.pem
				}
			})
			_, err := c.Attest(context.Background(), sample{})
			if tc.want == nil {
				if err != nil {
					t.Error(err)
				}
				return
			}
			is(t, err, tc.want...)
			text := err.Error()
			if !strings.Contains(text, tc.contains) || tc.absent != "" && strings.Contains(text, tc.absent) {
				t.Errorf("%q: want %q, not %q", text, tc.contains, tc.absent)
			}
			// The guest's time stands beside the window.
			if !strings.Contains(text, stamp(epoch)) {
				t.Errorf("%q does not tell this machine's time", text)
			}
			if bad := (*ClockError)(nil); errors.As(err, &bad) && (!bad.Now.Equal(epoch) || !strings.Contains(text, window(bad.NotBefore, bad.NotAfter))) {
				t.Errorf("%q does not tell the window of %+v", text, bad)
			}
			if n := kbs.count("POST /auth"); n != 0 {
				t.Error("a request was sent")
			}
		})
	}
}

func TestOtherHostName(t *testing.T) {
	c := serve(t, newFakeKBS(t), nil)
	c.base = strings.Replace(c.base, "127.0.0.1", "localhost", 1)
	_, err := c.Attest(context.Background(), sample{})
	is(t, err, ErrTLS)
}

func TestPlainHTTPBehindHTTPS(t *testing.T) {
	server := httptest.NewServer(newFakeKBS(t))
	defer server.Close()
	c, err := New(Config{URL: strings.Replace(server.URL, "http:", "https:", 1)})
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Attest(context.Background(), sample{})
	is(t, err, ErrTLS)
	if !strings.Contains(err.Error(), "insecure_http") {
		t.Errorf("%q gives no hint", err)
	}
}

// The handshake of TLS is cut: that is the network, not a wrong certificate.
func TestConnectionClosedInTLSHandshake(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var accepted atomic.Int32
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			accepted.Add(1)
			conn.Close()
		}
	}()
	c, err := New(Config{URL: "https://" + l.Addr().String()})
	if err != nil {
		t.Fatal(err)
	}
	c.backoff = time.Millisecond
	_, err = c.Attest(context.Background(), sample{})
	is(t, err, ErrUnreachable)
	if n := accepted.Load(); n != 3 {
		t.Errorf("%d connections, want 3", n)
	}
}

func TestNewRefuses(t *testing.T) {
	key := "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"
	other := strings.ReplaceAll(string(newCA(t, epoch, epoch).pem), "CERTIFICATE", "TRUSTED CERTIFICATE")
	for name, cfg := range map[string]Config{
		"no URL":             {},
		"no host":            {URL: "https://"},
		"other scheme":       {URL: "ftp://kbs"},
		"no scheme":          {URL: "kbs:8080"},
		"plain http":         {URL: "http://kbs:8080"},
		"password in URL":    {URL: "https://u:secret@kbs"},
		"query":              {URL: "https://kbs?x=1"},
		"CA no PEM":          {URL: "https://kbs", RootCAs: []byte("x")},
		"CA of another type": {URL: "https://kbs", RootCAs: []byte(other)},
		"CA a key":           {URL: "https://kbs", RootCAs: []byte(key)},
		"CA broken":          {URL: "https://kbs", RootCAs: []byte(strings.ReplaceAll(key, "PRIVATE KEY", "CERTIFICATE"))},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := New(cfg)
			if err == nil {
				t.Fatal("accepted")
			}
			if strings.Contains(err.Error(), "secret") {
				t.Errorf("%q tells the password", err)
			}
		})
	}
	for _, url := range []string{"https://kbs", "https://kbs:8999/", "https://[::1]:8999/prefix"} {
		if _, err := New(Config{URL: url}); err != nil {
			t.Errorf("%s: %v", url, err)
		}
	}
	if _, err := New(Config{URL: "http://127.0.0.1:8080", AllowHTTP: true}); err != nil {
		t.Error(err)
	}
}

// TestTLSResumed: a second connection resumes the first one's TLS session, and
// only then does without the hybrid key exchange; nor is one that the server did
// not resume ever used.
func TestTLSResumed(t *testing.T) {
	kbs := newFakeKBS(t)
	var seen []string
	kbs.override["GET /resource-policy"] = func(w http.ResponseWriter, r *http.Request) {
		seen = append(seen, fmt.Sprintf("%v by %v", r.TLS.DidResume, r.TLS.CurveID))
		_, _ = io.WriteString(w, "eA")
	}
	var server *tls.Config
	c := serve(t, kbs, func(cfg *tls.Config, _ *Config) {
		server = cfg
		cfg.SetSessionTicketKeys([][32]byte{{1}})
		cfg.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return server, nil }
	})
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	admin, err := c.admin(key)
	if err != nil {
		t.Fatal(err)
	}
	get := func() {
		t.Helper()
		if _, err := admin.ResourcePolicy(t.Context()); err != nil {
			t.Fatal(err)
		}
		c.CloseIdle()
	}
	get()
	get()
	get()
	server.SetSessionTicketKeys([][32]byte{{2}}) // a restart
	get()
	get()
	server = server.Clone()
	server.CurvePreferences = []tls.CurveID{tls.X25519MLKEM768}
	get()
	server = server.Clone()
	server.CurvePreferences, server.MaxVersion = nil, tls.VersionTLS12 // as T, which has no hybrid one
	get()                                                              // made anew, it resumes what the first try began
	get()
	const full, resumed = "false by X25519MLKEM768", "true by CurveP256"
	if want := []string{full, resumed, resumed, full, resumed, full, resumed, resumed}; !slices.Equal(seen, want) {
		t.Errorf("connections resumed: %q, want %q", seen, want)
	}
}

// The KBS's clock is that of its last answer, whatever the answer says.
func TestLastAnswer(t *testing.T) {
	const good = "Sun, 06 Nov 2061 08:49:37 GMT"
	when := time.Date(2061, 11, 6, 8, 49, 37, 0, time.UTC)
	for _, tc := range []struct {
		name   string
		header []string
		status int
		want   time.Time
	}{
		{"good", []string{good}, 200, when},
		{"of a refusal", []string{good}, 401, when},
		{"of a broken KBS", []string{good}, 502, when},
		{"missing", nil, 200, time.Time{}},
		{"empty", []string{""}, 200, time.Time{}},
		{"twice", []string{good, good}, 200, time.Time{}},
		{"in the form of RFC 850", []string{"Sunday, 06-Nov-61 08:49:37 GMT"}, 200, time.Time{}},
		{"in C's form", []string{"Sun Nov  6 08:49:37 2061"}, 200, time.Time{}},
		{"of another zone", []string{"Sun, 06 Nov 2061 08:49:37 +0100"}, 200, time.Time{}},
		{"with more behind it", []string{good + ", " + good}, 200, time.Time{}},
		{"no day of the calendar", []string{"Sun, 31 Nov 2061 08:49:37 GMT"}, 200, time.Time{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			kbs := newFakeKBS(t)
			kbs.override["POST /auth"] = func(w http.ResponseWriter, r *http.Request) {
				w.Header()["Date"] = tc.header
				w.WriteHeader(tc.status)
			}
			c := serve(t, kbs, nil)
			if a := c.LastAnswer(); a != (Answered{}) {
				t.Errorf("before any answer: %v", a)
			}
			before := time.Now()
			if _, err := c.Attest(t.Context(), sample{}); err == nil {
				t.Error("an answer without a challenge was taken for one")
			}
			a := c.LastAnswer()
			if !a.Date.Equal(tc.want) {
				t.Errorf("the KBS's time is %v, want %v", a.Date, tc.want)
			}
			if a.Sent.Before(before) || a.Came.Before(a.Sent) || a.Came.After(time.Now()) {
				t.Errorf("sent %v, came %v, asked at %v", a.Sent, a.Came, before)
			}
		})
	}

	// An answer that never came leaves the earlier one.
	kbs := newFakeKBS(t)
	c := serve(t, kbs, nil)
	attest(t, c)
	first := c.LastAnswer()
	kbs.override["POST /auth"] = func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }
	if _, err := c.Attest(t.Context(), sample{}); !errors.Is(err, ErrUnreachable) {
		t.Errorf("got %v", err)
	}
	if a := c.LastAnswer(); a != first || a.Date.IsZero() {
		t.Errorf("after no answer it is %v, was %v", a, first)
	}
}
