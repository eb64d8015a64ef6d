package kbsclient

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"
)

var sentinels = []error{
	ErrUnreachable, ErrTLS, ErrClock, ErrProtocol, ErrTooLarge, ErrNotSupported, ErrAttestationRefused, ErrPolicyDenied,
	ErrPolicyEngine, ErrTokenNotFound, ErrTokenInvalid, ErrNoResource, ErrAdminAuth, ErrReferenceValue, ErrOldKBS,
}

// is asserts that err matches want and no other sentinel.
func is(t *testing.T, err error, want ...error) {
	t.Helper()
	for _, s := range sentinels {
		expected := false
		for _, w := range want {
			expected = expected || s == w
		}
		if errors.Is(err, s) != expected {
			t.Errorf("errors.Is(%q, %q) = %v", err, s, !expected)
		}
	}
}

func TestErrorTypes(t *testing.T) {
	info := func(typ string) string {
		return `{"type":"https://github.com/confidential-containers/kbs/errors/` + typ + `","detail":"a detail"}`
	}
	for _, tc := range []struct {
		name   string
		status int
		body   string
		want   error
	}{
		{"policy denial", 401, info("PolicyDeny"), ErrPolicyDenied},
		{"dead session", 401, info("TokenNotFound"), ErrTokenNotFound},
		{"bad token", 401, info("TokenVerifierError"), ErrTokenInvalid},
		{"missing resource", 401, info("PluginInternalError"), ErrNoResource},
		{"policy engine T", 401, info("PolicyEngine"), ErrPolicyEngine},
		{"policy engine H", 401, info("PolicyEngineError"), ErrPolicyEngine},
		{"attestation", 401, info("AttestationError"), ErrAttestationRefused},
		{"tee-pubkey", 401, info("JweError"), ErrProtocol},
		{"unknown type", 401, info("Novelty"), ErrProtocol},
		{"plugin", 404, info("PluginNotFound"), ErrNotSupported},
		{"404 empty", 404, "", ErrNotSupported},
		{"405 empty", 405, "", ErrNotSupported},
		{"413 plain text", 413, "payload reached size limit", ErrTooLarge},
		{"431 empty", 431, "", ErrTooLarge},
		{"408 empty", 408, "", ErrUnreachable},
		{"proxy", 502, "<html>bad gateway</html>", ErrUnreachable},
		{"401 of somebody else", 401, `{"type":"https://example.com/PolicyDeny","detail":"x"}`, ErrProtocol},
		{"401 empty", 401, "", ErrProtocol},
		{"401 no JSON", 401, "denied", ErrProtocol},
		{"type with odd characters", 401, info("Policy\\nDeny"), ErrProtocol},
		{"redirect", 302, "", ErrProtocol},
		{"no content", 204, "", ErrProtocol},
	} {
		t.Run(tc.name, func(t *testing.T) {
			kbs := newFakeKBS(t)
			const route = "GET /resource/keys/root/x"
			kbs.override[route] = func(w http.ResponseWriter, _ *http.Request) {
				w.Header()["Content-Type"] = nil
				w.Header().Set("Location", "/kbs/v0/elsewhere")
				w.WriteHeader(tc.status)
				_, _ = io.WriteString(w, tc.body)
			}
			_, err := attest(t, serve(t, kbs, nil)).Resource(context.Background(), "keys/root/x")
			is(t, err, tc.want)
			var e *Error
			if !errors.As(err, &e) || e.Status != tc.status {
				t.Fatalf("error %#v, want an *Error of status %d", err, tc.status)
			}
			if !strings.Contains(err.Error(), "keys/root/x") {
				t.Errorf("%q does not name the resource", err)
			}
			// A verdict is final, and a redirect goes nowhere. A dead session is no
			// verdict: its token is tried once.
			want := 1
			if tc.want == ErrTokenNotFound {
				want = 2
			}
			if n := kbs.count(route); n != want {
				t.Errorf("asked %d times", n)
			}
			if n := kbs.count("GET /elsewhere"); n != 0 {
				t.Error("a redirect was followed")
			}
		})
	}
}

func TestErrorTextIsOneBoundedLine(t *testing.T) {
	typ, detail := parseErrorInformation([]byte(`{"type":"https://github.com/confidential-containers/kbs/errors/PolicyEngineError","detail":"a\n\u001b[31mb` + strings.Repeat("x", 9999) + `"}`))
	if typ != "PolicyEngineError" || strings.ContainsAny(detail, "\n\x1b") || len(detail) > maxDetail+3 {
		t.Errorf("type %q, detail of %d bytes %q", typ, len(detail), detail[:20])
	}
}

// transcript is one answer of a running Trustee.
type transcript struct {
	title, method, path string
	resp                *http.Response
	body                []byte
}

func readTranscripts(t testing.TB, name string) (all []transcript) {
	t.Helper()
	text, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	for _, block := range strings.Split(string(text), "======== ")[1:] {
		head, answer, _ := strings.Cut(block, "\n--------\n")
		title, line, _ := strings.Cut(head, "\n")
		method, path, _ := strings.Cut(line, " ")
		resp, err := http.ReadResponse(bufio.NewReader(strings.NewReader(answer)), &http.Request{Method: method})
		if err != nil {
			t.Fatalf("%s: %v", title, err)
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatalf("%s: %v", title, err)
		}
		all = append(all, transcript{title, method, path, resp, body})
	}
	return all
}

// Every answer that a real KBS gave is understood, at T and at H.
func TestTranscripts(t *testing.T) {
	for _, server := range []string{"T", "H"} {
		seen := map[error]int{}
		for _, tr := range readTranscripts(t, "answers-"+server+".txt") {
			t.Run(server+" "+tr.title, func(t *testing.T) {
				checkTranscript(t, tr, seen)
			})
		}
		for _, want := range []error{ErrAttestationRefused, ErrPolicyDenied, ErrPolicyEngine, ErrTokenNotFound, ErrTokenInvalid,
			ErrNoResource, ErrAdminAuth, ErrReferenceValue, ErrNotSupported} {
			if seen[want] == 0 {
				t.Errorf("%s: no answer means %q", server, want)
			}
		}
	}
}

func checkTranscript(t *testing.T, tr transcript, seen map[error]int) {
	route := tr.method + " " + strings.SplitN(strings.TrimPrefix(tr.path, "/kbs/v0/"), "/", 2)[0]
	kind := map[string]opKind{"POST auth": opAttest, "POST attest": opAttest, "GET resource": opResource}[route]
	if tr.method != "GET" && kind != opAttest {
		kind = opAdmin
	}
	if route == "POST attestation-policy" || route == "POST resource" || route == "DELETE resource" {
		kind = opAdmin
	}
	if tr.resp.StatusCode != http.StatusOK {
		e := newError(call{op: "op", kind: kind}, tr.resp, tr.body, epoch)
		reason := e.reason()
		seen[reason]++
		if reason == ErrProtocol && e.Type != "JweError" {
			t.Errorf("not understood: %v", e)
		}
		if len(tr.body) > 0 && tr.body[0] == '{' && e.Type == "" {
			t.Errorf("no type in %s", tr.body)
		}
		return
	}
	var err error
	switch route {
	case "POST auth":
		if _, err = parseChallenge(tr.body); err == nil && sessionCookie(tr.resp.Header) == "" {
			err = errors.New("no cookie")
		}
	case "POST attest":
		token := strings.TrimSuffix(strings.TrimPrefix(string(tr.body), `{"token":"`), `"}`)
		var c *Claims
		if c, err = ParseToken(token); err == nil && len(c.Submods) == 0 {
			err = errors.New("no submods")
		}
		if err == nil && c.Expires.Sub(c.Issued) != 5*time.Minute {
			err = fmt.Errorf("lives from %s to %s", c.Issued, c.Expires)
		}
	case "GET resource": // encrypted to a key that nobody has any more
		if _, err = decryptJWE(tr.body, loadVectors(t).key(t)); err != nil && strings.Contains(err.Error(), "unwrap") {
			err = nil
		}
	}
	if err != nil {
		t.Error(err)
	}
}
