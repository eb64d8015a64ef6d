package cli

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha512"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"
)

// fakeKBS stores resources and takes sample evidence. Its answers are T's.
type fakeKBS struct {
	t         *testing.T
	admin     ed25519.PublicKey
	resources map[string][]byte
	deny      bool

	bearer   string // of the last admin call
	last     string // "METHOD path body" of the last admin call
	answer   string // to admin GETs
	attested int
	extra    string // additional evidence of the last attestation
	initData string
	key      json.RawMessage
}

var b64url = base64.RawURLEncoding

func (f *fakeKBS) fail(w http.ResponseWriter, typ string) {
	w.Header()["Content-Type"] = nil
	w.WriteHeader(http.StatusUnauthorized)
	fmt.Fprintf(w, `{"type":"https://github.com/confidential-containers/kbs/errors/%s","detail":"by the test"}`, typ)
}

func (f *fakeKBS) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		f.t.Error(err)
	}
	path := strings.TrimPrefix(r.URL.Path, "/kbs/v0")
	name := strings.TrimPrefix(path, "/resource/")
	switch route := r.Method + " " + path; {
	case route == "POST /auth":
		w.Header().Set("Set-Cookie", "kbs-session-id=1")
		fmt.Fprint(w, `{"nonce":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=","extra-params":""}`)
	case route == "POST /attest":
		f.attest(w, body)
	case r.Method == "GET" && name != path:
		f.get(w, r, name)
	default:
		f.adminCall(w, r, path, name, body)
	}
}

func (f *fakeKBS) attest(w http.ResponseWriter, body []byte) {
	var req struct {
		InitData *struct{ Body string } `json:"init-data"`
		Runtime  struct {
			Key json.RawMessage `json:"tee-pubkey"`
		} `json:"runtime-data"`
		Evidence struct {
			Primary struct {
				SVN        string `json:"svn"`
				ReportData []byte `json:"report_data"`
			} `json:"primary_evidence"`
			Additional string `json:"additional_evidence"`
		} `json:"tee-evidence"`
	}
	if err := json.Unmarshal(body, &req); err != nil {
		f.t.Error(err)
	}
	if req.Evidence.Primary.SVN != "1" || len(req.Evidence.Primary.ReportData) != sha512.Size384 {
		f.fail(w, "AttestationError")
		return
	}
	f.attested++
	f.key, f.extra, f.initData = req.Runtime.Key, req.Evidence.Additional, ""
	if req.InitData != nil {
		f.initData = req.InitData.Body
	}
	fmt.Fprintf(w, `{"token":%q}`, token)
}

var token = b64url.EncodeToString([]byte(`{"alg":"ES256"}`)) + "." + b64url.EncodeToString([]byte(`{}`)) + "." + b64url.EncodeToString([]byte(`x`))

func (f *fakeKBS) get(w http.ResponseWriter, r *http.Request, name string) {
	data, ok := f.resources[name]
	var key jose.JSONWebKey
	switch bearer := r.Header.Get("Authorization"); {
	case f.key == nil || bearer != "" && bearer != "Bearer "+token:
		f.fail(w, "TokenNotFound")
	case f.deny:
		f.fail(w, "PolicyDeny")
	case !ok:
		f.fail(w, "PluginInternalError")
	default:
		if err := key.UnmarshalJSON(f.key); err != nil {
			f.t.Error(err)
		}
		e, err := jose.NewEncrypter(jose.A256GCM, jose.Recipient{Algorithm: jose.KeyAlgorithm(key.Algorithm), Key: key.Key}, nil)
		if err != nil {
			f.t.Fatal(err)
		}
		m, err := e.Encrypt(data)
		if err != nil {
			f.t.Fatal(err)
		}
		fmt.Fprint(w, m.FullSerialize())
	}
}

func (f *fakeKBS) adminCall(w http.ResponseWriter, r *http.Request, path, name string, body []byte) {
	f.bearer = strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	jws, err := jose.ParseSigned(f.bearer, []jose.SignatureAlgorithm{jose.EdDSA})
	if err == nil {
		_, err = jws.Verify(f.admin)
	}
	if err != nil {
		f.fail(w, "AdminAuth")
		return
	}
	f.last = r.Method + " " + path + " " + string(body)
	switch {
	case r.Method == "POST" && name != path:
		f.resources[name] = body
	case r.Method == "DELETE":
		delete(f.resources, name)
	case r.Method == "GET":
		fmt.Fprint(w, f.answer)
	}
}

// env is a KBS with a folder of files and the tool.
type testEnv struct {
	*fakeKBS
	dir, url string
	vars     map[string]string
}

func newEnv(t *testing.T) *testEnv {
	t.Helper()
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	kbs := &fakeKBS{t: t, admin: pub, resources: map[string][]byte{}}
	server := httptest.NewTLSServer(kbs)
	t.Cleanup(server.Close)
	e := &testEnv{fakeKBS: kbs, dir: t.TempDir(), url: server.URL, vars: map[string]string{}}
	e.write(t, "ca.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}))
	e.writeKey(t, "admin.key", key)
	_, other, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	e.writeKey(t, "other.key", other)
	return e
}

func (e *testEnv) write(t *testing.T, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(e.dir, name), data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func (e *testEnv) writeKey(t *testing.T, name string, key any) {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	e.write(t, name, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

// run runs a command line, with $URL, $DIR and $KBS (the usual flags) replaced,
// and gives exit code, standard output and standard error.
func (e *testEnv) run(line string) (code int, stdout, stderr string) {
	line = strings.ReplaceAll(line, "$ADMIN", "$KBS config --auth-private-key $DIR/admin.key")
	line = strings.ReplaceAll(line, "$KBS", "--url $URL --cert-file $DIR/ca.pem")
	args := strings.Fields(line)
	for i := range args {
		args[i] = strings.NewReplacer("$URL", e.url, "$DIR", e.dir).Replace(args[i])
	}
	var out, errOut bytes.Buffer
	lookup := func(name string) (string, bool) { v, ok := e.vars[name]; return v, ok }
	code = Main(context.Background(), args, lookup, &out, &errOut)
	return code, out.String(), errOut.String()
}

func (e *testEnv) must(t *testing.T, line, want string) {
	t.Helper()
	code, stdout, stderr := e.run(line)
	if code != 0 || stdout != want {
		t.Errorf("%s: exit %d\nstdout %q\n  want %q\nstderr %s", line, code, stdout, want, stderr)
	}
}

func TestResource(t *testing.T) {
	e := newEnv(t)
	secret := []byte("0123\n\x00\xff")
	e.write(t, "secret", secret)
	e.must(t, "$ADMIN set-resource --path keys/root/x --resource-file $DIR/secret",
		"Set resource success \n resource: keys/root/x\n")
	if !bytes.Equal(e.resources["keys/root/x"], secret) {
		t.Errorf("stored %q", e.resources["keys/root/x"])
	}
	e.must(t, "$KBS get-resource --path keys/root/x", base64.StdEncoding.EncodeToString(secret)+"\n")
	e.must(t, "$ADMIN delete-resource --path keys/root/x", "Delete resource success \n resource: keys/root/x\n")
	if len(e.resources) != 0 {
		t.Error("not deleted")
	}
}

func TestGetResourceFails(t *testing.T) {
	for name, reason := range map[string]string{"missing": "no such resource", "denied": "policy denies"} {
		e := newEnv(t)
		e.deny = name == "denied"
		code, stdout, stderr := e.run("$KBS get-resource --path a/b/c")
		if code != 1 || stdout != "" || !strings.HasPrefix(stderr, "Error: ") || !strings.Contains(stderr, reason) {
			t.Errorf("%s: exit %d, stdout %q, stderr %q", name, code, stdout, stderr)
		}
		if e.attested != 1 {
			t.Errorf("%s: attested %d times", name, e.attested)
		}
	}
}

func TestTokenServesAgain(t *testing.T) {
	rs, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	e := newEnv(t)
	e.resources["a/b/c"] = []byte("secret")
	e.writeKey(t, "ec.pem", ec)
	e.write(t, "rsa.pem", pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(rs)}))
	e.write(t, "token", []byte(token+"\n"))
	for _, key := range []string{"ec.pem", "rsa.pem"} {
		e.must(t, "$KBS attest --tee-key-file $DIR/"+key, token+"\n")
		e.attested = 0
		e.must(t, "$KBS get-resource --path a/b/c --attestation-token $DIR/token --tee-key-file $DIR/"+key, "c2VjcmV0\n")
		if e.attested != 0 {
			t.Error("attested in spite of the token")
		}
	}
	code, stdout, _ := e.run("$KBS get-resource --path a/b/c --attestation-token $DIR/token")
	if code != 1 || stdout != "" {
		t.Errorf("token without key: exit %d, stdout %q", code, stdout)
	}
}

func TestSampleDeviceAndInitData(t *testing.T) {
	e := newEnv(t)
	e.must(t, "$KBS attest", token+"\n")
	if e.extra != "" || e.initData != "" {
		t.Errorf("additional evidence %q, init-data %q", e.extra, e.initData)
	}
	e.vars["ENABLE_SAMPLE_DEVICE"] = ""
	e.must(t, "$KBS attest algorithm=x", token+"\n")
	if !strings.HasPrefix(e.extra, `{"sampledevice":{"svn":"2","report_data":"`) || e.initData != "algorithm=x" {
		t.Errorf("additional evidence %q, init-data %q", e.extra, e.initData)
	}
}

func TestConfigCalls(t *testing.T) {
	const good = "package policy\nimport rego.v1\nallow if { false }\n"
	const open = "package policy\nallow if { false }\nimport rego.v1\n" // too late: an older KBS has read the rule by then
	printed := func(what, text string) string {
		return "Set " + what + " policy success \n policy: " + base64.StdEncoding.EncodeToString([]byte(text)) + "\n"
	}
	posted := func(text string) string { return `{"policy":"` + b64url.EncodeToString([]byte(text)) + `"` }
	value := func(json string) string {
		return `POST /reference-value {"version":"0.1.0","type":"sample","payload":"` + base64.StdEncoding.EncodeToString([]byte(json)) + `"}`
	}
	for _, tc := range []struct {
		line, answer, stdout, call string
		warn                       bool
	}{
		{"set-resource-policy --policy-file $DIR/good", "", printed("resource", good), "POST /resource-policy " + posted(good) + "}", false},
		{"set-resource-policy --policy-file $DIR/open", "", printed("resource", open), "POST /resource-policy " + posted(open) + "}", true},
		{"set-resource-policy --allow-all", "", printed("resource", builtinPolicies[0].rego), "POST /resource-policy " + posted(builtinPolicies[0].rego) + "}", false},
		{"set-resource-policy --deny-all", "", printed("resource", builtinPolicies[1].rego), "POST /resource-policy " + posted(builtinPolicies[1].rego) + "}", false},
		{"set-resource-policy --affirming", "", printed("resource", builtinPolicies[2].rego), "POST /resource-policy " + posted(builtinPolicies[2].rego) + "}", false},
		{"set-resource-policy --default", "", printed("resource", builtinPolicies[3].rego), "POST /resource-policy " + posted(builtinPolicies[3].rego) + "}", false},
		{"set-attestation-policy --policy-file $DIR/good", "", printed("attestation", good),
			"POST /attestation-policy " + posted(good) + `,"policy_id":"default","type":"rego"}`, false},
		{"set-attestation-policy --type rego --id default_cpu --policy-file $DIR/open", "", printed("attestation", open),
			"POST /attestation-policy " + posted(open) + `,"policy_id":"default_cpu","type":"rego"}`, true},
		{"get-reference-values", `{"svn":["1"]}`, `"{\"svn\":[\"1\"]}"` + "\n", "GET /reference-value ", false},
		{"get-reference-value --id svn", `["1"]`, `["1"]` + "\n", "GET /reference-value/svn ", false},
		{"set-sample-reference-value svn 1", "", "Reference Values Updated\n", value(`{"svn":["1"]}`), false},
		{"set-sample-reference-value svn 1 --as-integer", "", "Reference Values Updated\n", value(`{"svn":[1]}`), false},
		{"set-sample-reference-value svn true --as-bool --as-single-value", "", "Reference Values Updated\n", value(`{"svn":true}`), false},
	} {
		t.Run(tc.line, func(t *testing.T) {
			e := newEnv(t)
			e.write(t, "good", []byte(good))
			e.write(t, "open", []byte(open))
			e.answer = tc.answer
			code, stdout, stderr := e.run("$ADMIN " + tc.line)
			if code != 0 || stdout != tc.stdout || e.last != tc.call {
				t.Errorf("exit %d\nstdout %q\n  want %q\n  sent %s\n  want %s\nstderr %s", code, stdout, tc.stdout, e.last, tc.call, stderr)
			}
			if warned := strings.Contains(stderr, "allows everything to everyone"); warned != tc.warn {
				t.Errorf("stderr %q", stderr)
			}
		})
	}
}

func TestAdminTokenFile(t *testing.T) {
	e := newEnv(t)
	e.write(t, "secret", []byte("x"))
	e.write(t, "admin-token", []byte("abc\n"))
	code, stdout, stderr := e.run("$KBS config --admin-token-file $DIR/admin-token set-resource --path a/b/c --resource-file $DIR/secret")
	if e.bearer != "abc" {
		t.Errorf("token %q", e.bearer)
	}
	if code != 1 || stdout != "" || !strings.Contains(stderr, "AdminAuth") { // the fake takes signed ones only
		t.Errorf("exit %d, stdout %q, stderr %q", code, stdout, stderr)
	}
}

// Exit codes are those of Trustee's tool: 1 for a failure, 2 for wrong usage.
func TestExitCodes(t *testing.T) {
	e := newEnv(t)
	e.write(t, "secret", []byte("x"))
	e.write(t, "junk", []byte("junk"))
	for line, want := range map[string]int{
		"--help":            0,
		"--version":         0,
		"config --help":     0,
		"":                  2,
		"config":            2,
		"nonsense":          2,
		"config nonsense":   2,
		"get-resource":      2,
		"--nonsense attest": 2,
		"attest a b":        2,
		"$KBS config set-resource --path a/b/c --resource-file $DIR/secret":                                   2,
		"$ADMIN --admin-token-file x set-resource --path a/b/c --resource-file $DIR/secret":                   2,
		"$ADMIN set-resource --path a/b/c":                                                                    2,
		"$ADMIN set-resource-policy --allow-all --deny-all":                                                   2,
		"$ADMIN set-resource-policy --allow-all --policy-file $DIR/secret":                                    2,
		"$ADMIN set-sample-reference-value a":                                                                 2,
		"$ADMIN set-sample-reference-value a 1 --as-integer --as-bool":                                        2,
		"$ADMIN set-resource-policy":                                                                          1,
		"$ADMIN set-resource-policy --policy-file $DIR/none":                                                  1,
		"$ADMIN set-attestation-policy --type wasm --policy-file $DIR/secret":                                 1,
		"$ADMIN set-resource --path a/b --resource-file $DIR/secret":                                          1,
		"$ADMIN set-resource --path a/b/c --resource-file $DIR/none":                                          1,
		"$ADMIN set-sample-reference-value a 3000000000 --as-integer":                                         1,
		"$ADMIN set-sample-reference-value a yes --as-bool":                                                   1,
		"$KBS config --auth-private-key $DIR/other.key set-resource --path a/b/c --resource-file $DIR/secret": 1,
		"$KBS config --auth-private-key $DIR/junk set-resource --path a/b/c --resource-file $DIR/secret":      1,
		"--url $URL attest":                                       1, // not signed by a CA of the system
		"--url $URL --cert-file $DIR/junk attest":                 1,
		"--url $URL --cert-file $DIR/none attest":                 1,
		"$KBS attest --tee-key-file $DIR/admin.key":               1,
		"--url nonsense attest":                                   1,
		"$KBS get-resource --path a/b/c --tee-key-file $DIR/none": 1,
	} {
		code, stdout, stderr := e.run(line)
		if code != want {
			t.Errorf("%q: exit %d, want %d\n%s", line, code, want, stderr)
		}
		if (want == 0) == (stdout == "") || (want != 0) == (stderr == "") {
			t.Errorf("%q: stdout %q, stderr %q", line, stdout, stderr)
		}
	}
}
