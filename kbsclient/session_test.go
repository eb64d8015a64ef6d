package kbsclient

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"
)

func attest(t *testing.T, c *Client, opts ...Option) *Session {
	t.Helper()
	s, err := c.Attest(context.Background(), sample{}, opts...)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestHandshakeAndResource(t *testing.T) {
	kbs := newFakeKBS(t)
	s := attest(t, serve(t, kbs, nil))
	got, err := s.Resource(context.Background(), "keys/root/x")
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != "luks-key-0123456789abcdef" {
		t.Errorf("resource %q", got)
	}
	if status := s.Claims().Submods["cpu0"].Status; status != "contraindicated" {
		t.Errorf("cpu0 status %q", status)
	}
	if got := s.Claims().Expires.Sub(s.Claims().Issued).Minutes(); got != 5 {
		t.Errorf("token lives %v minutes", got)
	}
	s.Close()
	if _, err := s.Resource(context.Background(), "keys/root/x"); err == nil {
		t.Error("a closed session still decrypts")
	}
	for route, want := range map[string]int{"POST /auth": 1, "POST /attest": 1, "GET /resource/keys/root/x": 2} {
		if got := kbs.count(route); got != want {
			t.Errorf("%d calls of %s, want %d", got, route, want)
		}
	}
}

func TestEachHandshakeHasItsOwnKeyAndSession(t *testing.T) {
	c := serve(t, newFakeKBS(t), nil)
	a, b := attest(t, c), attest(t, c)
	if fmt.Sprint(a.key.public()) == fmt.Sprint(b.key.public()) || a.cookie == b.cookie {
		t.Error("two handshakes share a key or a session")
	}
}

func TestLargestAndEmptyResource(t *testing.T) {
	kbs := newFakeKBS(t)
	kbs.resource["a/b/big"] = []byte(strings.Repeat("x", 2<<20))
	kbs.resource["a/b/empty"] = nil
	s := attest(t, serve(t, kbs, nil))
	for name, want := range map[string]int{"a/b/big": 2 << 20, "a/b/empty": 0} {
		got, err := s.Resource(context.Background(), name)
		if err != nil || len(got) != want {
			t.Errorf("%s: %d bytes, %v; want %d", name, len(got), err, want)
		}
	}
}

// composite records the digests that it is asked for.
type composite struct {
	sample
	additional      string
	device, primary [48]byte
	order           []string
}

func (a *composite) AdditionalEvidence(_ context.Context, digest [48]byte) (string, error) {
	a.device, a.order = digest, append(a.order, "devices")
	return a.additional, nil
}

func (a *composite) Evidence(ctx context.Context, digest [48]byte) (json.RawMessage, error) {
	a.primary, a.order = digest, append(a.order, "cpu")
	return a.sample.Evidence(ctx, digest)
}

func TestAdditionalEvidenceIsBound(t *testing.T) {
	c := serve(t, newFakeKBS(t), nil)
	// White space and order must reach the KBS as they are: it hashes the text.
	a := &composite{additional: `{"sampledevice": {"svn":"2", "report_data":"<&> \u00e9 é"}}`}
	s, err := c.Attest(context.Background(), a)
	if err != nil {
		t.Fatal(err) // the fake compares the digest of what it received
	}
	defer s.Close()
	if fmt.Sprint(a.order) != "[devices cpu]" {
		t.Errorf("order %v: the CPU's evidence covers the devices'", a.order)
	}
	want, err := deviceDigest(s.claims.nonce, s.key.public())
	if err != nil || a.device != want {
		t.Errorf("device digest %x, want %x, %v", a.device, want, err)
	}
	if a.device == a.primary {
		t.Error("devices and CPU got the same digest")
	}
}

// TestNVIDIAEvidenceStaysAwayFromT: T's verifier panics at it. What tells T from
// newer ones is a name that it does not know, in whatever form the evidence comes.
func TestNVIDIAEvidenceStaysAwayFromT(t *testing.T) {
	for _, text := range []string{`{"nvidia":{}}`, `{"sampledevice":{},"n\u0076idia":null}`} {
		t.Run(text, func(t *testing.T) {
			a := &composite{additional: text}
			old := newFakeKBS(t)
			_, err := serve(t, old, nil).Attest(t.Context(), a)
			if !errors.Is(err, ErrOldKBS) || errors.Is(err, ErrAttestationRefused) || old.count("POST /attest") != 0 {
				t.Errorf("T: %v after %d calls", err, old.count("POST /attest"))
			}
			later := newFakeKBS(t)
			later.tees = []string{"sample", newTEE}
			s, err := serve(t, later, nil).Attest(t.Context(), a)
			if err != nil {
				t.Fatalf("H: %v", err)
			}
			s.Close()
			gone := newFakeKBS(t)
			gone.override["POST /auth"] = func(w http.ResponseWriter, r *http.Request) {
				if gone.count("POST /auth") > 1 { // the second is the question
					w.WriteHeader(http.StatusBadGateway)
					return
				}
				gone.serve(w, r, "POST /auth")
			}
			if _, err := serve(t, gone, nil).Attest(t.Context(), a); !errors.Is(err, ErrUnreachable) || gone.count("POST /attest") != 0 {
				t.Errorf("no answer: %v after %d calls", err, gone.count("POST /attest"))
			}
		})
	}
}

func TestBadEvidenceStaysHere(t *testing.T) {
	kbs := newFakeKBS(t)
	c := serve(t, kbs, nil)
	mine := errors.New("no report")
	for name, a := range map[string]Attester{
		"error":            failing{err: mine},
		"no JSON":          failing{text: "{"},
		"no object":        failing{text: `"a"`},
		"devices no JSON":  &composite{additional: "x"},
		"devices an array": &composite{additional: "[]"},
		"devices not utf8": &composite{additional: "{\"\xff\":1}"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := c.Attest(context.Background(), a)
			if err == nil {
				t.Fatal("no error")
			}
			if name == "error" && !errors.Is(err, mine) {
				t.Errorf("%v hides the attester's error", err)
			}
		})
	}
	if n := kbs.count("POST /attest"); n != 0 {
		t.Errorf("%d bad bodies were sent", n)
	}
}

type failing struct {
	text string
	err  error
}

func (failing) TEE() string { return "sample" }
func (a failing) Evidence(context.Context, [48]byte) (json.RawMessage, error) {
	return json.RawMessage(a.text), a.err
}

func TestInitDataIsSentVerbatim(t *testing.T) {
	kbs := newFakeKBS(t)
	var got struct {
		InitData *initData `json:"init-data"`
	}
	kbs.override["POST /attest"] = func(w http.ResponseWriter, r *http.Request) {
		if err := json.NewDecoder(r.Body).Decode(&got); err != nil {
			t.Error(err)
		}
		fail(w, "AttestationError", "")
	}
	c := serve(t, kbs, nil)
	text := loadVectors(t).InitData.TOML
	if _, err := c.Attest(context.Background(), sample{}, WithInitData(text)); !errors.Is(err, ErrAttestationRefused) {
		t.Fatal(err)
	}
	if got.InitData == nil || *got.InitData != (initData{"toml", text}) {
		t.Errorf("init-data %+v", got.InitData)
	}
}

func TestChallenge(t *testing.T) {
	const nonce = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
	for _, tc := range []struct {
		name, body string
		ok         bool
	}{
		{"trustee", `{"nonce":"` + nonce + `","extra-params":""}`, true},
		{"null", `{"nonce":"` + nonce + `","extra-params":null}`, true},
		{"absent", `{"nonce":"` + nonce + `"}`, true},
		{"more members", `{"nonce":"` + nonce + `","x":1}`, true},
		{"our hash", `{"nonce":"` + nonce + `","extra-params":{"selected-hash-algorithm":"sha384"}}`, true},
		{"other hash", `{"nonce":"` + nonce + `","extra-params":{"selected-hash-algorithm":"sha256"}}`, false},
		{"hash a number", `{"nonce":"` + nonce + `","extra-params":{"selected-hash-algorithm":1}}`, false},
		{"no nonce", `{"extra-params":""}`, false},
		{"short nonce", `{"nonce":"AAAA"}`, false},
		{"nonce with quotes", `{"nonce":"` + nonce + `\""}`, false},
		{"nonce a number", `{"nonce":1}`, false},
		{"trailing data", `{"nonce":"` + nonce + `"}{}`, false},
		{"html", `<html>`, false},
		{"empty", ``, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := parseChallenge([]byte(tc.body))
			if (err == nil) != tc.ok || tc.ok && got != nonce {
				t.Errorf("nonce %q, error %v", got, err)
			}
		})
	}
}

func TestHandshakeAnswersOutsideTheProtocol(t *testing.T) {
	good := `{"nonce":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=","extra-params":""}`
	for _, tc := range []struct{ name, route, cookie, body string }{
		{"no cookie", "POST /auth", "", good},
		{"other cookie", "POST /auth", "session=1", good},
		{"cookie with odd characters", "POST /auth", `kbs-session-id=a,b`, good},
		{"cookie of 129 characters", "POST /auth", "kbs-session-id=" + strings.Repeat("a", 129), good},
		{"nonce of 15 characters", "POST /auth", "kbs-session-id=1", `{"nonce":"` + strings.Repeat("A", 15) + `","extra-params":""}`},
		{"nonce of 1001 characters", "POST /auth", "kbs-session-id=1", `{"nonce":"` + strings.Repeat("A", 1001) + `","extra-params":""}`},
		{"no JSON", "POST /auth", "kbs-session-id=1", "<html>"},
		{"no token", "POST /attest", "", `{}`},
		{"token no JWT", "POST /attest", "", `{"token":"abc"}`},
		{"token of another handshake", "POST /attest", "", `{"token":"` + fakeToken("other") + `"}`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			kbs := newFakeKBS(t)
			kbs.override[tc.route] = func(w http.ResponseWriter, _ *http.Request) {
				if tc.cookie != "" {
					w.Header().Set("Set-Cookie", tc.cookie)
				}
				_, _ = w.Write([]byte(tc.body))
			}
			_, err := serve(t, kbs, nil).Attest(context.Background(), sample{})
			if !errors.Is(err, ErrProtocol) {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestResourcePath(t *testing.T) {
	kbs := newFakeKBS(t)
	s := attest(t, serve(t, kbs, nil))
	for _, path := range []string{"", "a/b", "a/b/c/d", "/a/b/c", "a/b/c/", "a//c", ".a/b/c", "a/../c", "a/b/c?x", "a/b/%63", "a/b/ä", "a/b/c\n"} {
		if _, err := s.Resource(context.Background(), path); err == nil {
			t.Errorf("path %q was asked for", path)
		}
	}
	if err := checkPath("keys/root/1f-A_.b"); err != nil {
		t.Error(err)
	}
}

func TestResourceWithOtherAlgorithm(t *testing.T) {
	for _, tc := range []struct {
		name string
		alg  jose.KeyAlgorithm
		enc  jose.ContentEncryption
		opts *jose.EncrypterOptions
	}{
		{"ECDH-ES", jose.ECDH_ES, jose.A256GCM, nil},
		{"ECDH-ES+A128KW", jose.ECDH_ES_A128KW, jose.A256GCM, nil},
		{"A128GCM", jose.ECDH_ES_A256KW, jose.A128GCM, nil},
		{"A256CBC-HS512", jose.ECDH_ES_A256KW, jose.A256CBC_HS512, nil},
		{"compressed", jose.ECDH_ES_A256KW, jose.A256GCM, &jose.EncrypterOptions{Compression: jose.DEFLATE}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			kbs := newFakeKBS(t)
			kbs.override["GET /resource/keys/root/x"] = func(w http.ResponseWriter, r *http.Request) {
				cookie, _ := r.Cookie(cookieName)
				_, _ = w.Write([]byte(encrypt(t, kbs.sessions[cookie.Value].key, tc.alg, tc.enc, tc.opts, []byte("x"))))
			}
			_, err := attest(t, serve(t, kbs, nil)).Resource(context.Background(), "keys/root/x")
			if !errors.Is(err, ErrProtocol) {
				t.Errorf("error %v", err)
			}
		})
	}
}
