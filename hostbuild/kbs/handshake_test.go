package kbs

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

func TestSampleFlow(t *testing.T) {
	dialects(t, func(t *testing.T, d Dialect) {
		r := newRig(t, Options{Dialect: d, AllowSimulated: true})
		r.mustAdmin("POST", "/kbs/v0/resource/"+keyPath, []byte(secret))
		g := r.guest("sample")
		token := g.attested()
		if a := g.get(keyPath); a.status != 401 || a.errType() != "PolicyDeny" {
			t.Errorf("under the first policy: %d %s, want PolicyDeny", a.status, a.body)
		}
		r.setPolicy(allowAll)
		a := g.get(keyPath)
		if a.status != 200 || decrypt(t, a.body, g.key) != secret {
			t.Fatalf("get: %d %s", a.status, a.body)
		}
		l := r.log.last(t)
		if l["msg"] != "released" || l["path"] != keyPath || l["tee"] != "sample" || l["simulated"] != true || l["action"] != "release" {
			t.Errorf("audit line %v", l)
		}
		a = r.do("GET", "/kbs/v0/resource/"+keyPath, nil, "Authorization", "Bearer "+token)
		if a.status != 200 || decrypt(t, a.body, g.key) != secret {
			t.Errorf("get by bearer token: %d %s", a.status, a.body)
		}
		if strings.Contains(r.log.String(), secret) || strings.Contains(r.log.String(), token) {
			t.Error("the audit holds a secret")
		}
		if !strings.Contains(r.log.String(), "SIMULATED evidence is accepted") {
			t.Error("no startup line says that simulated evidence is accepted")
		}
	})
}

// TestSampleNeedsPermission: without the flag sample evidence gets nowhere.
func TestSampleNeedsPermission(t *testing.T) {
	r := newRig(t, Options{})
	g := r.guest("sample").auth()
	if a := g.attest(g.attestBody(sampleEvidence(g.digest()), "")); a.status != 401 || a.errType() != "AttestationError" {
		t.Errorf("attest: %d %s", a.status, a.body)
	}
	if l := r.log.last(t); !strings.Contains(fmt.Sprint(l["reason"]), "not allowed") {
		t.Errorf("audit line %v", l)
	}
}

func TestAttestRefuses(t *testing.T) {
	r := ready(t, DialectT)
	other := r.guest("sample").auth()
	tests := []struct {
		name   string
		body   func(g *guest) []byte
		reason string
	}{
		{"not JSON", func(*guest) []byte { return []byte("{") }, "EOF"},
		{"empty object", func(*guest) []byte { return []byte("{}") }, "runtime-data"},
		{"something behind", func(g *guest) []byte { return append(g.attestBody(sampleEvidence(g.digest()), ""), "{}"...) }, "behind"},
		{"a brace behind", func(g *guest) []byte { return append(g.attestBody(sampleEvidence(g.digest()), ""), '}') }, "behind"},
		{"nonce of another session", func(g *guest) []byte {
			g.nonce = other.nonce
			return g.attestBody(sampleEvidence(g.digest()), "")
		}, "nonce"},
		{"evidence for another key", func(g *guest) []byte { return g.attestBody(sampleEvidence(other.digest()), "") }, "report_data"},
		{"padded report_data", func(g *guest) []byte {
			d := g.digest()
			return g.attestBody(json.RawMessage(`{"svn":"1","report_data":"`+base64.StdEncoding.EncodeToString(append(d[:], make([]byte, 16)...))+`"}`), "")
		}, "report_data"},
		{"evidence as a string", func(g *guest) []byte { return g.attestBody(json.RawMessage(`"{}"`), "") }, "not a JSON object"},
		{"device evidence", func(g *guest) []byte { return g.attestBody(sampleEvidence(g.digest()), `{"nvidia":{}}`) }, "additional (device) evidence"},
		{"additional_evidence null", func(g *guest) []byte {
			return bytes.Replace(g.attestBody(sampleEvidence(g.digest()), ""), []byte(`"additional_evidence":""`), []byte(`"additional_evidence":null`), 1)
		}, "additional_evidence"},
		{"member twice", func(g *guest) []byte {
			return bytes.Replace(g.attestBody(sampleEvidence(g.digest()), ""), []byte(`"nonce":`), []byte(`"nonce":"x","nonce":`), 1)
		}, "twice"},
		{"other case", func(g *guest) []byte {
			return bytes.Replace(g.attestBody(sampleEvidence(g.digest()), ""), []byte(`"runtime-data"`), []byte(`"Runtime-Data"`), 1)
		}, "runtime-data"},
		{"init-data", func(g *guest) []byte {
			return bytes.Replace(g.attestBody(sampleEvidence(g.digest()), ""), []byte(`"init-data":null`), []byte(`"init-data":{"format":"toml","body":""}`), 1)
		}, "init-data"},
		{"no kty", func(g *guest) []byte {
			delete(g.jwk, "kty")
			return g.attestBody(sampleEvidence(g.digest()), "")
		}, "kty"},
		{"key with other members", func(g *guest) []byte {
			g.jwk["kty"] = "RSA"
			return g.attestBody(sampleEvidence(g.digest()), "")
		}, `"n" is missing`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := r.guest("sample").auth()
			nonce, jwk := g.nonce, map[string]string{}
			for k, v := range g.jwk {
				jwk[k] = v
			}
			a := g.attest(tt.body(g))
			if a.status != 401 || a.errType() != "AttestationError" || a.detail() != "Attestation error: RCAR handshake Attest failed" {
				t.Errorf("answer %d %s", a.status, a.body)
			}
			if l := r.log.last(t); l["msg"] != "refused" || !strings.Contains(fmt.Sprint(l["reason"]), tt.reason) {
				t.Errorf("audit line %v, want the reason %q", l, tt.reason)
			}
			if a := g.get(keyPath); a.errType() != "TokenNotFound" {
				t.Errorf("get after it: %d %s, want TokenNotFound", a.status, a.body)
			}
			// A refused attempt does not use up the nonce.
			g.nonce, g.jwk = nonce, jwk
			if a := g.attest(g.attestBody(sampleEvidence(g.digest()), "")); a.status != 200 {
				t.Errorf("a good attempt after it: %d %s", a.status, a.body)
			}
		})
	}
}

func TestAttestReplay(t *testing.T) {
	dialects(t, func(t *testing.T, d Dialect) {
		r := ready(t, d)
		g := r.guest("sample").auth()
		body := g.attestBody(sampleEvidence(g.digest()), "")
		first := tokenIn(t, g.attest(body))
		if again := tokenIn(t, g.attest(body)); again != first {
			t.Error("an attested session gives another token")
		}
		if a := r.do("POST", "/kbs/v0/attest", body, "Cookie", r.guest("sample").auth().cookie); a.status != 401 {
			t.Errorf("the same body in another session: %d", a.status)
		}
		r.reason("the nonce is not this session's")
		for _, cookie := range []string{"", cookieName + "=" + strings.Repeat("0", 32), "x=y"} {
			if a := r.do("POST", "/kbs/v0/attest", body, "Cookie", cookie); a.status != 401 || a.errType() != "AttestationError" {
				t.Errorf("cookie %q: %d %s", cookie, a.status, a.body)
			}
			r.reason("no cookie of a live session")
		}
		// The session's five minutes are not extended.
		r.clock.add(sessionLife - time.Second)
		if a := g.get(keyPath); a.status != 200 {
			t.Errorf("before the session's end: %d %s", a.status, a.body)
		}
		r.clock.add(time.Second)
		if a := g.get(keyPath); a.errType() != "TokenNotFound" {
			t.Errorf("after the session's end: %d %s", a.status, a.body)
		}
		if a := g.attest(body); a.status != 401 {
			t.Errorf("attest after the session's end: %d", a.status)
		}
		// The token has a minute of leeway, and then ends, too.
		if a := r.do("GET", "/kbs/v0/resource/"+keyPath, nil, "Authorization", "Bearer "+first); a.status != 200 {
			t.Errorf("bearer token within the leeway: %d %s", a.status, a.body)
		}
		r.clock.add(tokenLeeway + time.Second)
		if a := r.do("GET", "/kbs/v0/resource/"+keyPath, nil, "Authorization", "Bearer "+first); a.errType() != "TokenVerifierError" {
			t.Errorf("expired bearer token: %d %s", a.status, a.body)
		}
		r.reason("the token has expired")
	})
}

func TestOtherSessionsCookie(t *testing.T) {
	r := ready(t, DialectT)
	a, b := r.guest("sample"), r.guest("sample")
	a.attested()
	b.auth()
	b.cookie = a.cookie // b takes a's cookie: what it gets is sealed to a's key
	got := b.get(keyPath)
	obj, err := jose.ParseEncryptedJSON(string(got.body), []jose.KeyAlgorithm{jose.ECDH_ES_A256KW}, []jose.ContentEncryption{jose.A256GCM})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := obj.Decrypt(b.key); err == nil {
		t.Error("the thief of a cookie can read the resource")
	}
}

func TestParallelAttests(t *testing.T) {
	r := ready(t, DialectH)
	g := r.guest("sample").auth()
	body := g.attestBody(sampleEvidence(g.digest()), "")
	tokens := make([]string, 8)
	var wg sync.WaitGroup
	for i := range tokens {
		wg.Go(func() {
			req, _ := http.NewRequest("POST", r.url+"/kbs/v0/attest", bytes.NewReader(body))
			req.Header.Set("Cookie", g.cookie)
			resp, err := r.client.Do(req)
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			b, _ := io.ReadAll(resp.Body)
			tokens[i] = string(b)
		})
	}
	wg.Wait()
	if !strings.HasPrefix(tokens[0], `{"token":"`) || len(slices.Compact(tokens)) != 1 {
		t.Errorf("different answers: %.80s", tokens)
	}
}

func TestSessionsAreBounded(t *testing.T) {
	c := new(clock)
	ss := newSessions(make([]byte, 32), []string{"snp"}, c.now)
	ss.max = 3
	kept := ss.open("snp")
	ss.keep(kept)
	var last *session
	for range 10 {
		last = ss.open("snp")
	}
	if len(ss.byID) != 4 || ss.get(kept.id) == nil || ss.get(last.id) == nil {
		t.Errorf("%d sessions, attested one there %v, newest there %v", len(ss.byID), ss.get(kept.id) != nil, ss.get(last.id) != nil)
	}
	// Many attested sessions push out the oldest of their kind, not those that wait.
	waits := ss.open("snp")
	for range 5 {
		ss.keep(ss.open("snp"))
	}
	if ss.attested.Len() != 3 || ss.get(kept.id) == kept || ss.get(waits.id) != waits {
		t.Errorf("%d attested sessions, oldest there %v, waiting one there %v", ss.attested.Len(), ss.get(kept.id) == kept, ss.get(waits.id) == waits)
	}
	kept = waits
	c.add(sessionLife)
	if ss.get(kept.id) != nil {
		t.Error("a session outlives its five minutes")
	}
	ss.open("snp")
	if len(ss.byID) != 1 {
		t.Errorf("%d sessions after all but one expired", len(ss.byID))
	}
}

func FuzzAuth(f *testing.F) {
	f.Add([]byte(`{"version":"0.4.0","tee":"snp","extra-params":""}`))
	f.Add([]byte(`{"version":"0.4.0+a-b","tee":"sample","extra-params":{"a":[1]}} `))
	f.Fuzz(func(t *testing.T, b []byte) {
		if tee, err := parseAuth(b, DialectT); err == nil && (tee == "" || !json.Valid(b)) {
			t.Errorf("accepted: %q", b)
		}
	})
}

func FuzzAttestation(f *testing.F) {
	raw, err := os.ReadFile(filepath.Join("testdata", "vectors.json"))
	if err != nil {
		f.Fatal(err)
	}
	var v struct {
		P struct {
			Body json.RawMessage `json:"sample_attest_body"`
		} `json:"primary_no_devices"`
	}
	if err := json.Unmarshal(raw, &v); err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(v.P.Body))
	f.Add([]byte(`{"runtime-data":{"nonce":"\u0000","tee-pubkey":{"kty":"RSA","alg":"","n":"","e":""}},"tee-evidence":{"primary_evidence":null,"additional_evidence":""}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := parseAttestation(b)
		if err != nil {
			return
		}
		bd, err := a.parse()
		if err != nil {
			return
		}
		bd.digest()
		if !json.Valid([]byte(canonical(bd.nonce))) {
			t.Errorf("canonical form of %q is no JSON", bd.nonce)
		}
		k := teeKey{KTY: bd.key["kty"], ALG: bd.key["alg"], CRV: bd.key["crv"], X: bd.key["x"], Y: bd.key["y"], N: bd.key["n"], E: bd.key["e"]}
		if out, err := k.encrypt([]byte("x")); err == nil && !json.Valid(out) {
			t.Errorf("sealed to %v: %s", k, out)
		}
	})
}
