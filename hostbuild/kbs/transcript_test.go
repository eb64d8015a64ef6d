package kbs

import (
	"bufio"
	"cmp"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"
)

// exchange is a request to a running Trustee and its answer, as recorded in
// testdata/trustee-{T,H}.jsonl.
type exchange struct {
	Name, Method, Path, Body string
	// Auth is a verbatim header, "token" (a good bearer token), "tampered", or
	// "admin", "lower" (scheme) or "wrong" (key) with the claims of an admin
	// token, their times relative to the request's.
	Auth   string
	Cookie string // "attested", "open" or "unknown"

	Status       int
	CType, Allow string
	SetCookie    bool
	Resp         string // verbatim, or "jwe", "token", "challenge", "metrics"
}

// deviation is where this server differs on purpose.
type deviation struct {
	status  int
	errType string
}

// deviations by dialect and name of the exchange.
var deviations = map[Dialect]map[string]deviation{
	DialectT: {
		// exp is required, and clocks may differ by a minute, not fifteen.
		"admin POST resource: no claims at all {}": {401, "AdminAuth"},
		"admin POST resource: no exp, only iat":    {401, "AdminAuth"},
		"admin POST resource: exp = now-60 s":      {401, "AdminAuth"},
		"admin POST resource: exp = now-890 s":     {401, "AdminAuth"},
		"admin POST resource: exp = now-895 s":     {401, "AdminAuth"},
		"admin POST resource: nbf = now+890 s":     {401, "AdminAuth"},
		"admin POST resource: iat = now+890 s":     {401, "AdminAuth"},
		// Trustee takes these from anyone.
		"attestation-policy: no auth, id x1": {401, "AdminAuth"},
		"attestation-policy: no type member": {401, "AdminAuth"},
		"attestation-policy: no policy_id":   {401, "AdminAuth"},
		"attestation-policy: id with slash":  {401, "AdminAuth"},
		"attestation-policy: syntax error":   {401, "AdminAuth"},
		"attestation-policy: not JSON":       {401, "AdminAuth"},
		// The text that opens every resource at T.
		"set-policy v1 style without import rego.v1": {401, "PolicyEngine"},
		"GET /healthz": {200, ""}, // for whoever watches the server, in both dialects
		// Devices are not verified here, so their evidence is refused, never ignored.
		"attest with sampledevice (default_gpu policy there)":                {401, "AttestationError"},
		"attest with sampledevice, non-canonical additional_evidence string": {401, "AttestationError"},
	},
	DialectH: {
		"POST resource: role only + exp, no iss/aud": {200, ""}, // no issuer is configured here
		"POST resource: nbf +600 s":                  {401, "AdminAuthInitialization"},
		"POST attestation-policy with admin":         {401, "AttestationError"}, // none is evaluated
		"attest tee=sampledevice":                    {401, "AttestationError"}, // a device alone
	},
}

func TestLikeTrustee(t *testing.T) {
	_, wrong, _ := ed25519.GenerateKey(rand.Reader)
	dialects(t, func(t *testing.T, d Dialect) {
		r := newRig(t, Options{Dialect: d, AllowSimulated: true})
		for _, p := range []string{"nvflare/site-1-abc/rootfs", "nvflare/site-2/rootfs"} {
			r.mustAdmin("POST", "/kbs/v0/resource/"+p, []byte(secret))
		}
		if d == DialectH {
			r.mustAdmin("POST", "/kbs/v0/reference-value", []byte(`{"version":"0.1.0","type":"sample","payload":"eyJmb28iOlsiYmFyIl19"}`))
		}
		r.setPolicy(allowAll)
		g, open := r.guest("sample"), r.guest("sample").auth()
		token := g.attested()
		f, err := os.Open(filepath.Join("testdata", "trustee-"+string(d)+".jsonl"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		sc := bufio.NewScanner(f)
		sc.Buffer(nil, 1<<20)
		used := map[string]bool{}
		compared := 0
		skip := false // gets under a policy that was not taken
		for sc.Scan() {
			var e exchange
			if err := json.Unmarshal(sc.Bytes(), &e); err != nil {
				t.Fatal(err)
			}
			if e.Name == "get no cookie no bearer" || e.Name == "bad upload" {
				r.setPolicy(allowAll) // an upload that is not in the recording
			}
			header := []string{}
			switch kind, claims, _ := strings.Cut(e.Auth, " "); kind {
			case "admin", "lower", "wrong":
				var c map[string]any
				if err := json.Unmarshal([]byte(claims), &c); err != nil {
					t.Fatal(err)
				}
				for _, k := range []string{"exp", "iat", "nbf"} {
					if v, ok := c[k].(float64); ok {
						c[k] = float64(r.clock.now().Unix()) + v
					}
				}
				key, scheme := r.admin, "Bearer "
				if kind == "wrong" {
					key = wrong
				}
				if kind == "lower" {
					scheme = "bearer "
				}
				header = append(header, "Authorization", scheme+adminToken(t, jose.EdDSA, key, c))
			case "token":
				header = append(header, "Authorization", "Bearer "+token)
			case "tampered":
				header = append(header, "Authorization", "Bearer "+strings.Replace(token, ".", ".A", 1))
			default:
				header = append(header, "Authorization", e.Auth)
			}
			switch e.Cookie {
			case "attested":
				header = append(header, "Cookie", g.cookie)
			case "open":
				header = append(header, "Cookie", open.cookie)
			case "unknown":
				header = append(header, "Cookie", cookieName+"="+strings.Repeat("0", 32))
			}
			if strings.HasPrefix(e.Name, "set-policy") {
				skip = false
			}
			if skip {
				continue
			}
			a := r.do(e.Method, e.Path, []byte(e.Body), header...)
			dev, deviates := deviations[d][e.Name]
			if deviates {
				used[e.Name] = true
				skip = strings.HasPrefix(e.Name, "set-policy")
				if a.status != dev.status || a.errType() != dev.errType {
					t.Errorf("%s: %d %s; want, as documented, %d %s", e.Name, a.status, a.body, dev.status, dev.errType)
				}
				continue
			}
			compare(t, d, e, a)
			compared++
		}
		if err := sc.Err(); err != nil {
			t.Fatal(err)
		}
		if want := map[Dialect]int{DialectT: 219, DialectH: 78}[d]; compared != want {
			t.Errorf("%d exchanges compared, want %d", compared, want)
		}
		for name := range deviations[d] {
			if !used[name] && !strings.HasPrefix(name, "attest ") {
				t.Errorf("no recorded exchange %q", name)
			}
		}
	})
}

// TestAttestLikeTrustee replays each recorded /attest, byte for byte, in sessions
// that have the nonces of the recorded ones: the bodies' digests hold then.
func TestAttestLikeTrustee(t *testing.T) {
	nonceOf := regexp.MustCompile(`"nonce": ?"([^"]+)"`)
	idOf := regexp.MustCompile(cookieName + `="?([0-9a-f]{32})`)
	dialects(t, func(t *testing.T, d Dialect) {
		r := newRig(t, Options{Dialect: d, AllowSimulated: true})
		f, err := os.Open(filepath.Join("testdata", "attest.jsonl"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		type attestation struct {
			exchange
			Dialect Dialect
			TEE     string
		}
		var recorded []attestation
		nonces := map[string]string{} // by session, of the body that it took or else the last one
		taken := map[string]bool{}
		for dec := json.NewDecoder(f); dec.More(); {
			var e attestation
			if err := dec.Decode(&e); err != nil {
				t.Fatal(err)
			}
			if e.Dialect != d {
				continue
			}
			recorded = append(recorded, e)
			id, nonce := idOf.FindStringSubmatch(e.Cookie), nonceOf.FindStringSubmatch(e.Body)
			if id == nil || nonce == nil || taken[id[1]] || e.Name == "attest replay of an old body in a new session" {
				continue
			}
			nonces[id[1]], taken[id[1]] = nonce[1], e.Status == 200
		}
		opened := map[string]bool{}
		for _, e := range recorded {
			if id := idOf.FindStringSubmatch(e.Cookie); id != nil && !opened[id[1]] && e.Name != "attest unknown cookie" {
				opened[id[1]] = true
				r.openSession(id[1], nonces[id[1]], cmp.Or(e.TEE, teeSample))
			}
			a := r.do("POST", "/kbs/v0/attest", []byte(e.Body), "Cookie", e.Cookie)
			if dev, ok := deviations[d][e.Name]; ok {
				if a.status != dev.status || a.errType() != dev.errType {
					t.Errorf("%s: %d %s; want, as documented, %d %s", e.Name, a.status, a.body, dev.status, dev.errType)
				}
				continue
			}
			if e.Status == 200 {
				if a.status != 200 || a.header.Get("Content-Type") != e.CType || (a.header.Get("Set-Cookie") != "") != e.SetCookie {
					t.Errorf("%s: %d %v %s; Trustee: 200 and a token\n%s", e.Name, a.status, a.header, a.body, r.log.last(t))
				} else {
					tokenIn(t, a)
				}
				continue
			}
			compare(t, d, e.exchange, a)
		}
		if want := map[Dialect]int{DialectT: 37, DialectH: 9}[d]; len(recorded) != want {
			t.Errorf("%d exchanges replayed, want %d", len(recorded), want)
		}
	})
}

// openSession opens a session with a given id and nonce ("": a fresh one).
func (r *rig) openSession(id, nonce, tee string) {
	s := r.server.sessions.open(tee)
	ss := r.server.sessions
	ss.mu.Lock()
	defer ss.mu.Unlock()
	e := ss.byID[s.id]
	delete(ss.byID, s.id)
	s.id = id
	if nonce != "" {
		s.nonce = nonce
	}
	ss.byID[id] = e
}

func compare(t *testing.T, d Dialect, e exchange, a answer) {
	t.Helper()
	if a.status != e.Status || a.header.Get("Allow") != e.Allow || (a.header.Get("Set-Cookie") != "") != e.SetCookie {
		t.Errorf("%s: %d %v %s; Trustee: %d %s", e.Name, a.status, a.header, a.body, e.Status, e.Resp)
		return
	}
	if e.Resp != "metrics" && a.header.Get("Content-Type") != e.CType {
		t.Errorf("%s: content type %q; Trustee: %q", e.Name, a.header.Get("Content-Type"), e.CType)
	}
	var got, want map[string]any
	switch e.Resp {
	case "jwe":
		json.Unmarshal(a.body, &got)
		if keysOf(got) != "{ciphertext,encrypted_key,iv,protected,tag}" {
			t.Errorf("%s: %s", e.Name, a.body)
		}
	case "challenge":
		if len(a.body) != 74 || !strings.HasSuffix(string(a.body), `","extra-params":""}`) {
			t.Errorf("%s: %s", e.Name, a.body)
		}
	case "metrics":
		if !strings.Contains(string(a.body), "\nauth_requests_total ") {
			t.Errorf("%s: %s", e.Name, a.body)
		}
	default:
		if json.Unmarshal([]byte(e.Resp), &want) != nil || want["type"] == nil {
			if e.Name == "POST resource-policy" || string(a.body) == e.Resp || jsonEqual(string(a.body), e.Resp) {
				return
			}
			t.Errorf("%s: body %q; Trustee: %q", e.Name, a.body, e.Resp)
			return
		}
		json.Unmarshal(a.body, &got)
		// H's details about admin tokens and policies are its libraries' words.
		free := d == DialectH && (strings.HasPrefix(a.errType(), "AdminAuth") || a.errType() == "PolicyEngineError")
		if got["type"] != want["type"] || got["detail"] != want["detail"] && !free {
			t.Errorf("%s: %s; Trustee: %s", e.Name, a.body, e.Resp)
		}
		if free && strings.Fields(a.detail())[0] != strings.Fields(want["detail"].(string))[0] {
			t.Errorf("%s: detail %q; Trustee: %q", e.Name, a.detail(), want["detail"])
		}
	}
}

func jsonEqual(a, b string) bool {
	var x, y any
	if json.Unmarshal([]byte(a), &x) != nil || json.Unmarshal([]byte(b), &y) != nil {
		return false
	}
	p, _ := json.Marshal(x)
	q, _ := json.Marshal(y)
	return string(p) == string(q)
}
