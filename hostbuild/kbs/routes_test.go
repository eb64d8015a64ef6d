package kbs

import (
	"cmp"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"
)

// Answers of Trustee, "status content-type type: detail" with "-" for none. An
// answer may have more behind a "...".
const (
	ok            = "200 - "
	okJSON        = "200 application/json "
	okXML         = "200 text/xml "
	challengeBody = okJSON + `{"nonce":"...`
	tokenBody     = okJSON + `{"token":"...`
	jweBody       = okJSON + `{"protected":"...`
	noPage        = "404 - "
	notAllowed    = "405 - "

	noToken      = "401 - TokenNotFound: Attestation Token not found"
	badToken     = "401 - TokenVerifierError: Token Verifier error"
	policyDenies = "401 - PolicyDeny: Access denied by policy"
	policyFailsT = "401 - PolicyEngine: Policy engine error"
	policyFailsH = "401 - PolicyEngineError: Policy engine error: ..."
	noResource   = "401 - PluginInternalError: Plugin internal error"
	jweFails     = "401 - JweError: JWE failed"
	attestFails  = "401 - AttestationError: Attestation error: RCAR handshake Attest failed"
	authFails    = "401 - AttestationError: Attestation error: RCAR handshake Auth failed: "
	asPolicy     = "401 - AttestationError: Attestation error: Set Attestation Policy failed"
	setReference = "401 - RvpsError: RVPS configuration failed: Failed to register reference value: register reference value"
	noReference  = "401 - RvpsError: RVPS configuration failed: Failed to get reference_values: query reference values"

	noAdminT       = "401 - AdminAuth: Admin auth error: Failed to parse HTTP Auth Bearer header"
	wrongAdminT    = "401 - AdminAuth: Admin auth error: Admin Token verification failed"
	resourceAdminH = "401 - AdminAuthInitialization: failed to initialize [admin] configuration: ..."
	adminH         = "401 - AdminAuthAccess: admin access denied for endpoint %s: ..."

	tooLarge = "413 text/plain; charset=utf-8 payload reached size limit"
)

func noPlugin(name string) string { return "404 - PluginNotFound: Plugin " + name + " not found" }

// TestRoutes is every route with each method, status and error body that Trustee
// has, in both dialects. A row that is not as Trustee answers says so.
func TestRoutes(t *testing.T) {
	const (
		get    = "GET /kbs/v0/resource/keys/root/one"
		post   = "POST /kbs/v0/resource/a/b/c"
		auth   = "POST /kbs/v0/auth"
		attest = "POST /kbs/v0/attest"
		policy = " /kbs/v0/resource-policy"
		as     = "POST /kbs/v0/attestation-policy"
		refs   = "/kbs/v0/reference-value"

		hello    = `{"version":"0.4.0","tee":"sample","extra-params":""}`
		mismatch = authFails + "KBS Client Protocol Version Mismatch: expect =0.4.0 while the request is "
		deny     = "package policy\ndefault allow = false\n"
		noBool   = "package policy\nallow = 1\n"
		broken   = "package policy\nallow = unknown_function(1)\n"
	)
	value := func(json string) string {
		return `{"version":"0.1.0","type":"sample","payload":"` + base64.StdEncoding.EncodeToString([]byte(json)) + `"}`
	}
	upload := func(text string) string { return string(policyBody(text)) }
	asUpload := `{"type":"rego","policy_id":"default_cpu","policy":"` + b64.EncodeToString([]byte(deny)) + `"}`

	tests := []struct {
		route, who, body string
		policy           string // in force; "" allows everything
		T, H             string // H "": as T
	}{
		{auth, "", hello, "", challengeBody, ""},
		{auth + "/", "", hello, "", challengeBody, ""},
		{auth + "?x=1", "", hello, "", challengeBody, ""},
		{auth, "", `{"version":"0.4.0+x","tee":"snp","extra-params":null}`, "", challengeBody, ""},
		{auth, "", `{"version":"0.1.1","tee":"snp","extra-params":""}`, "", mismatch + "0.1.1", ""},
		{auth, "", `{"version":"0.4.0-rc1","tee":"snp","extra-params":""}`, "", mismatch + "0.4.0-rc1", ""},
		{auth, "", `{"version":"0.4","tee":"snp","extra-params":""}`, "", authFails + "failed to parse KBS version", ""},
		{auth, "", `{"version":"0.4.0","tee":"SNP","extra-params":""}`, "", authFails + "deserialize Request", ""},
		{auth, "", `{"version":"0.4.0","tee":"snp"}`, "", authFails + "deserialize Request", ""},
		{auth, "", `{`, "", authFails + "deserialize Request", ""},
		{auth, "", `{"version":"0.4.0","tee":"sev","extra-params":""}`, "", challengeBody, authFails + "deserialize Request"},
		{auth, "", `{"version":"0.4.0","tee":"az-snp-vtpm","extra-params":""}`, "", authFails + "deserialize Request", challengeBody},
		{auth, "", `{"version":"0.4.0","tee":"se","extra-params":""}`, "", authFails + "Attestation Service generate challenge failed", ""},
		{auth, "", strings.Repeat("A", maxBody+1), "", tooLarge, ""},
		{"GET /kbs/v0/auth", "", "", "", noPlugin("auth"), ""},
		{"PUT /kbs/v0/auth", "", "", "", notAllowed, noPlugin("auth")},
		{"DELETE /kbs/v0/auth", "", "", "", notAllowed, noPlugin("auth")},
		{"PATCH /kbs/v0/auth", "", "", "", notAllowed, ""},

		{attest, "guest", "{evidence}", "", tokenBody, ""},
		{attest, "open", "{evidence}", "", attestFails, ""}, // of another session
		{attest, "open", "{", "", attestFails, ""},
		{attest, "", "{evidence}", "", attestFails, ""},
		{attest, "", strings.Repeat("A", maxBody+1), "", tooLarge, ""},
		{"GET /kbs/v0/attest", "guest", "", "", noPlugin("attest"), ""},
		{"PUT /kbs/v0/attest", "guest", "", "", notAllowed, noPlugin("attest")},

		{get, "guest", "", "", jweBody, ""},
		{get, "bearer", "", "", jweBody, ""},
		{get + "?x=1", "guest", "", "", jweBody, ""},
		{"GET /kbs/v0/%72esource/keys/root/on%65", "guest", "", "", jweBody, ""},
		{get, "", "", "", noToken, ""},
		{get, "open", "", "", noToken, ""},
		{get, "admin", "", "", badToken, ""},
		{get, "guest", "", deny, policyDenies, ""},
		{get, "guest", "", noBool, policyFailsT, policyDenies},
		{get, "guest", "", "package policy\n", policyFailsT, policyDenies},
		{get, "guest", "", broken, policyFailsT, policyFailsH},
		{get, "weak", "", "", jweFails, ""},
		{"GET /kbs/v0/resource/keys/root/two", "guest", "", "", noResource, ""},
		{"GET /kbs/v0/resource/keys/root", "guest", "", "", noResource, ""},
		{"GET /kbs/v0/resource/keys/root/one/x", "guest", "", "", noResource, ""},
		{"GET /kbs/v0/resource/keys/root/../one", "guest", "", "", noResource, ""},
		{"GET /kbs/v0/resource/keys/root%2fone", "guest", "", "", noResource, ""},
		{"GET /kbs/v0/resource/keys/root/%22", "guest", "", "", policyFailsT, noResource},
		{"GET /kbs/v0/resource/keys/root/four/x", "guest", "", deny, policyDenies, ""}, // the policy first, then the path
		{"ET /kbs/v0/resource/keys/root/one", "admin", "x", "", notAllowed, ""},
		{"HEAD /kbs/v0/resource/keys/root/one", "guest", "", "", notAllowed, ""},
		{"PUT /kbs/v0/resource/keys/root/one", "admin", "x", "", notAllowed, badToken},
		{"PUT /kbs/v0/resource/keys/root/one", "", "x", "", notAllowed, noToken},
		{"PATCH /kbs/v0/resource/keys/root/one", "admin", "x", "", notAllowed, ""},

		{post, "admin", "x", "", okXML, ""},
		{post, "admin", "", "", okXML, ""},
		{post, "", "x", "", noAdminT, resourceAdminH},
		{post, "wrong", "x", "", wrongAdminT, resourceAdminH},
		{post, "bearer", "x", "", wrongAdminT, resourceAdminH},
		{"POST /kbs/v0/resource/a/b", "admin", "x", "", noResource, ""},
		{"POST /kbs/v0/resource/a/b/c/d", "admin", "x", "", noResource, ""},
		{"POST /kbs/v0/resource/a/b/.c", "admin", "x", "", noResource, ""},
		{"POST /kbs/v0/resource/a/../c", "admin", "x", "", noResource, ""},
		{"POST /kbs/v0/resource/a/b%2fc", "admin", "x", "", noResource, ""},
		{post, "", strings.Repeat("A", maxBody+1), "", tooLarge, ""}, // before the admin is looked at
		{"DELETE /kbs/v0/resource/a/b/c", "", "", "", notAllowed, resourceAdminH},
		{"DELETE /kbs/v0/resource/a/b/c", "admin", "", "", notAllowed, okXML},
		{"DELETE /kbs/v0/resource/a/b/c", "admin", "", "", notAllowed, noResource}, // again

		{"POST" + policy, "admin", upload(allowAll), "", ok, ""},
		{"POST" + policy, "", upload(allowAll), "", noAdminT, fmt.Sprintf(adminH, "resource-policy")},
		{"POST" + policy, "wrong", upload(allowAll), "", wrongAdminT, fmt.Sprintf(adminH, "resource-policy")},
		{"POST" + policy, "admin", "x", "", policyFailsT, policyFailsH},
		{"POST" + policy, "admin", "{}", "", policyFailsT, policyFailsH},
		{"POST" + policy, "admin", `{"policy":1}`, "", policyFailsT, policyFailsH},
		{"POST" + policy, "admin", `{"policy":"+/=="}`, "", policyFailsT, policyFailsH},
		{"POST" + policy, "admin", upload("\xff"), "", policyFailsT, policyFailsH},
		{"POST" + policy, "admin", upload(""), "", policyFailsT, policyFailsH},
		{"POST" + policy, "admin", upload("allow = true"), "", policyFailsT, policyFailsH},
		{"POST" + policy, "admin", upload("package policy\nallow {"), "", policyFailsT, policyFailsH},
		{"POST" + policy, "admin", upload("package policy\nallow { true }\n"), "", ok, policyFailsH},
		{"GET" + policy, "admin", "", "", okXML + b64.EncodeToString([]byte(allowAll)), okJSON + `["resource-policy"]`},
		{"GET" + policy, "", "", "", noAdminT, fmt.Sprintf(adminH, "resource-policy")},
		{"DELETE" + policy, "admin", "", "", notAllowed, noPlugin("resource-policy")},

		{"POST " + refs, "admin", value(`{"foo":["bar"]}`), "", okJSON, ""},
		{"POST " + refs, "admin", "{}", "", setReference, ""},
		{"POST " + refs, "", value(`{"foo":1}`), "", noAdminT, fmt.Sprintf(adminH, "reference-value")},
		{"POST " + refs, "wrong", value(`{"foo":1}`), "", wrongAdminT, fmt.Sprintf(adminH, "reference-value")},
		{"GET " + refs, "admin", "", "", okJSON + `{"foo":["bar"]}`, noReference},
		{"GET " + refs + "/foo", "admin", "", "", okJSON + `{"foo":["bar"]}`, okJSON + `["bar"]`},
		{"GET " + refs, "", "", "", noAdminT, fmt.Sprintf(adminH, "reference-value")},

		{as, "", asUpload, "", noAdminT, fmt.Sprintf(adminH, "attestation-policy")}, // T takes it from anybody
		{as, "wrong", asUpload, "", wrongAdminT, fmt.Sprintf(adminH, "attestation-policy")},
		{as, "admin", "x", "", asPolicy, ""},
		{as, "admin", asUpload, "", asPolicy, ""}, // none is evaluated here
		{"GET /kbs/v0/attestation-policy", "admin", "", "", noPlugin("attestation-policy"), ""},

		{"GET /kbs/v0/foo/bar", "admin", "", "", noPlugin("foo"), ""},
		{"POST /kbs/v0/foo", "", "", "", noPlugin("foo"), ""},
		{"GET /kbs/v0/", "", "", "", noPage, ""},
		{"GET /kbs/v0", "", "", "", noPage, ""},
		{"GET /", "", "", "", noPage, ""},
		{"POST /kbs/v0//auth", "", hello, "", noPage, ""},
		{"GET /metrics", "", "", "", "200 text/plain; charset=utf-8 # HELP ...", ""},
		{"POST /metrics", "", "", "", notAllowed, ""},
		{"GET /healthz", "", "", "", ok, ""}, // T has none

		// Ours alone: T would read this text as "allow everything", and says so nowhere.
		{"POST" + policy, "admin", upload("package policy\nallow if { false }\n"), "", "401 - PolicyEngine: Policy engine error: ...", ok},
	}
	dialects(t, func(t *testing.T, d Dialect) {
		r := ready(t, d)
		guest, open, weak := r.guest("sample"), r.guest("sample").auth(), r.guest("sample")
		token := guest.attested()
		evidence := string(guest.attestBody(sampleEvidence(guest.digest()), ""))
		weak.jwk["crv"] = "P-384" // for which no JWE is made
		weak.attested()
		_, wrong, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		claims := map[string]any{"exp": r.clock.now().Unix() + 60, "role": adminRole}
		who := map[string][]string{
			"":       nil,
			"open":   {"Cookie", open.cookie}, // has sent no evidence
			"guest":  {"Cookie", guest.cookie},
			"weak":   {"Cookie", weak.cookie},
			"bearer": {"Authorization", "Bearer " + token},
			"admin":  {"Authorization", r.adminHeader()},
			"wrong":  {"Authorization", "Bearer " + adminToken(t, jose.EdDSA, wrong, claims)},
		}
		for i, tt := range tests { // in this order: a row finds what those before it left
			if d == DialectH && tt.H != "" {
				tt.T = tt.H
			}
			r.setPolicy(cmp.Or(tt.policy, allowAll))
			method, path, _ := strings.Cut(tt.route, " ")
			a := r.do(method, path, []byte(strings.ReplaceAll(tt.body, "{evidence}", evidence)), who[tt.who]...)
			got := fmt.Sprintf("%d %s ", a.status, cmp.Or(a.header.Get("Content-Type"), "-"))
			if typ := a.errType(); typ != "" {
				got += typ + ": " + a.detail()
			} else {
				got += string(a.body)
			}
			begin, more := strings.CutSuffix(tt.T, "...")
			if got != tt.T && !(more && strings.HasPrefix(got, begin)) {
				t.Errorf("row %d, %s by %q, body %.60q:\n got %.300s\nwant %s", i, tt.route, tt.who, tt.body, got, tt.T)
			}
			allow := map[Dialect]string{DialectT: "GET, POST", DialectH: "GET, POST, PUT, DELETE"}[d]
			if tt.T == notAllowed && strings.HasPrefix(path, prefix) && a.header.Get("Allow") != allow {
				t.Errorf("row %d, %s: Allow %q, want %q", i, tt.route, a.header.Get("Allow"), allow)
			}
			if setsCookie := tt.T == challengeBody || tt.T == tokenBody; (a.header.Get("Set-Cookie") != "") != setsCookie {
				t.Errorf("row %d, %s: Set-Cookie %q", i, tt.route, a.header.Get("Set-Cookie"))
			}
		}
	})
}
