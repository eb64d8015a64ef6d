package nras_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"coffer/internal/gpu"
	"coffer/internal/gpu/nras"
	"coffer/test/gpusim"
)

var b64 = base64.RawURLEncoding

// service is an NRAS that finds every device good, until its fields say otherwise.
type service struct {
	t       *testing.T
	key     *ecdsa.PrivateKey
	signer  *ecdsa.PrivateKey // key, unless replaced
	url     string
	status  int
	overall map[string]any // replaces claims of the overall token
	sub     map[string]any // and of each device's
	header  map[string]any
	edit    func(overall string, subs map[string]string) (string, map[string]string)
	asked   http.Header
	keySets int
}

func newService(t *testing.T) (*service, *nras.Client) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s := &service{t: t, key: key, signer: key, status: 200, overall: map[string]any{}, sub: map[string]any{}, header: map[string]any{}}
	server := httptest.NewServer(s)
	t.Cleanup(server.Close)
	s.url = server.URL
	return s, &nras.Client{URL: s.url, HTTP: server.Client(), Now: func() time.Time { return gpusim.Now }}
}

func (s *service) sign(claims map[string]any) string {
	header := map[string]any{"alg": "ES384", "kid": "one"}
	maps.Copy(header, s.header)
	h, _ := json.Marshal(header)
	c, _ := json.Marshal(claims)
	text := b64.EncodeToString(h) + "." + b64.EncodeToString(c)
	digest := sha512.Sum384([]byte(text))
	r, v, err := ecdsa.Sign(rand.Reader, s.signer, digest[:])
	if err != nil {
		s.t.Error(err)
	}
	return text + "." + b64.EncodeToString(append(r.FillBytes(make([]byte, 48)), v.FillBytes(make([]byte, 48))...))
}

func (s *service) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/.well-known/jwks.json" {
		s.keySets++
		point, _ := s.key.PublicKey.Bytes()
		fmt.Fprintf(w, `{"keys":[{"kty":"RSA","kid":"zero"},{"kty":"EC","crv":"P-384","kid":"one","x":%q,"y":%q}]}`, b64.EncodeToString(point[1:49]), b64.EncodeToString(point[49:]))
		return
	}
	s.asked = r.Header
	var q struct {
		Nonce, Arch string
		List        []struct{ Evidence, Certificate []byte } `json:"evidence_list"`
	}
	if err := json.NewDecoder(r.Body).Decode(&q); err != nil || r.URL.Path != "/v4/attest/gpu" || s.status != 200 {
		w.WriteHeader(s.status)
		fmt.Fprint(w, `{"x-nvidia-error-details":{"code":4013}}`)
		return
	}
	common := map[string]any{"iss": s.url, "eat_nonce": q.Nonce, "nbf": gpusim.Now.Unix(), "exp": gpusim.Now.Add(time.Hour).Unix()}
	subs, submods := map[string]string{}, map[string]any{}
	for i, e := range q.List {
		serial, err := gpu.Serial(e.Certificate)
		if err != nil {
			s.t.Error(err)
		}
		claims := maps.Clone(common)
		// What our own verifier says of a good device, NRAS says too.
		maps.Copy(claims, (&gpu.Result{
			Arch: q.Arch, Serial: serial, Parsed: true, NonceMatch: true, ArchMatch: true, FWIDMatch: true, Signature: true, NoConflict: true, Verified: true, Nonce: q.Nonce,
			DriverRIM: gpu.RIMState{Fetched: true, Format: true, Version: true, Signature: true, Usable: true},
			VBIOSRIM:  gpu.RIMState{Fetched: true, Format: true, Version: true, Signature: true, Usable: true},
		}).Claims())
		maps.Copy(claims, s.sub)
		name := fmt.Sprintf("GPU-%d", i)
		subs[name] = s.sign(claims)
		sum := sha256.Sum256([]byte(subs[name]))
		submods[name] = []any{"DIGEST", []string{"SHA-256", hex.EncodeToString(sum[:])}}
	}
	common["x-nvidia-overall-att-result"], common["submods"] = true, submods
	maps.Copy(common, s.overall)
	overall := s.sign(common)
	if s.edit != nil {
		overall, subs = s.edit(overall, subs)
	}
	json.NewEncoder(w).Encode([]any{[]string{"JWT", overall}, subs})
}

func TestVerifyAll(t *testing.T) {
	w := gpusim.NewWorld()
	nonce := [32]byte{5}
	one, two := w.NewDevice(gpu.Hopper).Evidence(nonce), w.NewDevice(gpu.Hopper).Evidence(nonce)
	other, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	swap := func(overall string, subs map[string]string) (string, map[string]string) {
		subs["GPU-0"], subs["GPU-1"] = subs["GPU-1"], subs["GPU-0"]
		return overall, subs
	}
	for _, m := range []struct {
		name string
		code gpu.Code
		do   func(*service, *nras.Client)
	}{
		{"good", "", func(*service, *nras.Client) {}},
		{"down", "nras-unreachable", func(s *service, _ *nras.Client) { s.status = 503 }},
		{"no service key", "nras-unreachable", func(s *service, _ *nras.Client) { s.status = 401 }},
		{"bad evidence", "nras-refused", func(s *service, _ *nras.Client) { s.status = 400 }},
		{"not there", "nras-unreachable", func(_ *service, c *nras.Client) { c.URL = "http://127.0.0.1:1" }},
		{"overall false", "nras-denied", func(s *service, _ *nras.Client) { s.overall["x-nvidia-overall-att-result"] = false }},
		{"overall not there", "nras-denied", func(s *service, _ *nras.Client) { s.overall["x-nvidia-overall-att-result"] = nil }},
		{"other key", "nras-token", func(s *service, _ *nras.Client) { s.signer = other }},
		{"unknown kid", "nras-token", func(s *service, _ *nras.Client) { s.header["kid"] = "two" }},
		{"kid of a key of another kind", "nras-token", func(s *service, _ *nras.Client) { s.header["kid"] = "zero" }},
		{"none", "nras-token", func(s *service, _ *nras.Client) { s.header["alg"] = "none" }},
		{"other algorithm", "nras-token", func(s *service, _ *nras.Client) { s.header["alg"] = "ES256" }},
		{"critical extension", "nras-token", func(s *service, _ *nras.Client) { s.header["crit"] = []string{"x"} }},
		{"other issuer", "nras-token", func(s *service, _ *nras.Client) { s.overall["iss"] = "https://nras.example" }},
		{"other nonce", "nras-token", func(s *service, _ *nras.Client) { s.overall["eat_nonce"] = strings.Repeat("0", 64) }},
		{"other nonce of a device", "nras-token", func(s *service, _ *nras.Client) { s.sub["eat_nonce"] = strings.Repeat("0", 64) }},
		{"expired", "nras-token", func(s *service, _ *nras.Client) { s.overall["exp"] = gpusim.Now.Add(-time.Hour).Unix() }},
		{"not yet valid", "nras-token", func(s *service, _ *nras.Client) { s.overall["nbf"] = gpusim.Now.Add(time.Hour).Unix() }},
		{"no expiry", "nras-token", func(s *service, _ *nras.Client) { s.overall["exp"] = "never" }},
		{"other device", "nras-token", func(s *service, _ *nras.Client) { s.sub["ueid"] = "1" }},
		{"tokens swapped", "nras-token", func(s *service, _ *nras.Client) { s.edit = swap }},
		{"a token missing", "nras-token", func(s *service, _ *nras.Client) {
			s.edit = func(overall string, subs map[string]string) (string, map[string]string) {
				delete(subs, "GPU-1")
				return overall, subs
			}
		}},
		{"a device missing", "nras-token", func(s *service, _ *nras.Client) { s.overall["submods"] = map[string]any{} }},
		{"no token", "nras-token", func(s *service, _ *nras.Client) {
			s.edit = func(_ string, subs map[string]string) (string, map[string]string) { return "a.b", subs }
		}},
		{"measurements differ", "nras-denied", func(s *service, _ *nras.Client) { s.sub["measres"] = "fail" }},
		{"debugging", "nras-denied", func(s *service, _ *nras.Client) { s.sub["dbgstat"] = "enabled" }},
		{"no secure boot", "nras-denied", func(s *service, _ *nras.Client) { s.sub["secboot"] = nil }},
		{"firmware", "nras-denied", func(s *service, _ *nras.Client) {
			s.sub["x-nvidia-gpu-attestation-report-cert-chain-fwid-match"] = false
		}},
		{"RIM", "nras-denied", func(s *service, _ *nras.Client) { s.sub["x-nvidia-gpu-vbios-rim-signature-verified"] = "true" }},
	} {
		t.Run(m.name, func(t *testing.T) {
			s, c := newService(t)
			m.do(s, c)
			results, err := c.VerifyAll(t.Context(), []gpu.Evidence{one, two}, nonce)
			if got := gpu.CodeOf(err); got != m.code || err == nil && (len(results) != 2 || !results[1].Verified) {
				t.Errorf("code %q, want %q: %v", got, m.code, err)
			}
		})
	}
	if _, err := (&nras.Client{}).VerifyAll(t.Context(), nil, nonce); gpu.CodeOf(err) != gpu.CodeCount {
		t.Errorf("no device: %v", err)
	}
	blackwell := w.NewDevice(gpu.Blackwell).Evidence(nonce)
	if _, err := (&nras.Client{}).VerifyAll(t.Context(), []gpu.Evidence{one, blackwell}, nonce); gpu.CodeOf(err) != gpu.CodeMixed {
		t.Errorf("two architectures: %v", err)
	}
}

// TestKeysAreKept fetches the set of keys once, and sends what the service wants.
func TestKeysAreKept(t *testing.T) {
	s, c := newService(t)
	c.Key, c.AllowHold = "service-key", true
	nonce := [32]byte{5}
	one := gpusim.NewWorld().NewDevice(gpu.Hopper).Evidence(nonce)
	for range 3 {
		if _, err := c.VerifyAll(t.Context(), []gpu.Evidence{one}, nonce); err != nil {
			t.Fatal(err)
		}
	}
	if s.keySets != 1 || s.asked.Get("Authorization") != "Bearer service-key" || s.asked.Get("X-NVIDIA-OCSP-ALLOW-CERT-HOLD") != "true" {
		t.Errorf("%d sets of keys, header %v", s.keySets, s.asked)
	}
}

// TestSample reads a recorded answer of the real service. Its key is not published
// any more, so that it must end there, and no earlier.
func TestSample(t *testing.T) {
	const vectors = "../../../../shared/vectors/gpu/"
	sample, err := os.ReadFile(vectors + "attestation-sdk/eat/hopperClaimsv3_detached_eat.json")
	if errors.Is(err, os.ErrNotExist) {
		t.Skip("the samples of vectors/gpu are not here; they are used from beside the repository and never copied")
	}
	if err != nil {
		t.Fatal(err)
	}
	chain, err := os.ReadFile(vectors + "nvtrust-head/hopperCertChain.txt")
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			fmt.Fprint(w, `{"keys":[]}`)
			return
		}
		w.Write(sample)
	}))
	defer server.Close()
	c := &nras.Client{URL: server.URL, HTTP: server.Client(), Now: time.Now}
	_, err = c.VerifyAll(t.Context(), []gpu.Evidence{{Arch: gpu.Hopper, Chain: chain}}, [32]byte{})
	if gpu.CodeOf(err) != nras.CodeToken || !strings.Contains(err.Error(), "nv-eat-kid-prod-") {
		t.Error(err)
	}
}

func FuzzAnswer(f *testing.F) {
	f.Add([]byte(`[["JWT","e30.e30.AA"],{"GPU-0":"e30.e30.AA"}]`))
	device := gpusim.NewWorld().NewDevice(gpu.Hopper).Evidence([32]byte{})
	f.Fuzz(func(t *testing.T, answer []byte) {
		c := &nras.Client{URL: "http://nras.invalid", Now: time.Now, HTTP: &http.Client{Transport: transport(answer)}}
		if _, err := c.VerifyAll(t.Context(), []gpu.Evidence{device}, [32]byte{}); err == nil {
			t.Fatal("tokens that nobody signed were taken")
		}
	})
}

type transport []byte

func (b transport) RoundTrip(*http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	w.Write(b)
	return w.Result(), nil
}
