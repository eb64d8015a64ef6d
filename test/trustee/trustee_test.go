// Package trustee proves Coffer against a KBS: the client, the policy flow and one
// guest with `sample` evidence, from its build to its revocation.
//
// The KBS is the user's own where KBS_URL names one (`make test-trustee`), and
// otherwise the embedded one in each dialect. The KBS must accept sample evidence,
// and its resource policy is replaced: an old Trustee's is put back afterwards; a
// new one cannot be asked for its policy, so the test wants REPLACE_POLICY=yes.
package trustee

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"coffer/internal/testenv"
	"coffer/kbsclient"
	"coffer/test/dockersave"
	"coffer/test/harness"
)

const (
	buildDeadline = 5 * time.Minute
	bootDeadline  = 5 * time.Minute
)

// target is the KBS under test.
type target struct {
	env      *harness.Env
	dialect  string // "T" or "H"
	url      string
	guestURL string
	ca       string // PEM files
	adminKey string
	folder   string // policy folder
	settings string
}

func newEnv(t *testing.T) *harness.Env {
	t.Helper()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	env := &harness.Env{Bin: filepath.Join(root, "bin"), Base: filepath.Join(root, "build/base/simulated"), Dir: t.TempDir(), Log: testWriter{}}
	for _, p := range []string{env.Bin + "/hostbuild", env.Bin + "/kbs-client", env.Bin + "/simplatform", env.Bin + "/demo-workload", env.Base + "/base.json"} {
		_, err := os.Stat(p)
		testenv.Need(t, err == nil, "make all base: "+p+" is missing")
	}
	testenv.LookTool(t, "qemu-system-x86_64")
	return env
}

type testWriter struct{}

func (testWriter) Write(p []byte) (int, error) {
	if testing.Verbose() {
		os.Stderr.Write(p)
	}
	return len(p), nil
}

func TestKBS(t *testing.T) {
	if os.Getenv("KBS_URL") != "" {
		t.Run("own", func(t *testing.T) { suite(t, ownKBS(t)) })
		return
	}
	for _, dialect := range []string{"T", "H"} {
		t.Run(dialect, func(t *testing.T) { suite(t, embedded(t, dialect)) })
	}
}

// ownKBS is the one that the environment names.
func ownKBS(t *testing.T) *target {
	k := &target{env: newEnv(t), dialect: os.Getenv("DIALECT"), url: os.Getenv("KBS_URL"), guestURL: os.Getenv("KBS_GUEST_URL"),
		ca: os.Getenv("KBS_CA"), adminKey: os.Getenv("KBS_ADMIN_KEY")}
	if k.ca == "" || k.adminKey == "" {
		t.Fatal("KBS_URL needs KBS_CA and KBS_ADMIN_KEY, names of PEM files, beside it")
	}
	for _, p := range []*string{&k.ca, &k.adminKey} {
		if !filepath.IsAbs(*p) {
			*p = filepath.Join("../..", *p) // as seen from the top, where make runs
		}
		var err error
		if *p, err = filepath.Abs(*p); err != nil {
			t.Fatal(err)
		}
	}
	u, err := url.Parse(k.url)
	if err != nil {
		t.Fatal(err)
	}
	if h := u.Hostname(); k.guestURL == "" && (h == "localhost" || h == "127.0.0.1") {
		u.Host = "10.0.2.2:" + u.Port() // this machine, as a guest on QEMU's user network sees it
		t.Logf("guests use %s; the KBS's certificate must name that address (or set KBS_GUEST_URL)", u)
	}
	if k.guestURL == "" {
		k.guestURL = u.String()
	}
	if err := k.env.MakeChip(t.Context()); err != nil {
		t.Fatal(err)
	}
	k.prepare(t)
	return k
}

func embedded(t *testing.T, dialect string) *target {
	env := newEnv(t)
	env.KBSFlags = []string{"--dialect", dialect}
	kbs, err := env.StartKBS(t.Context(), "kbs")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(kbs.Stop)
	port := kbs.Listen[strings.LastIndexByte(kbs.Listen, ':'):]
	k := &target{env: env, dialect: dialect, url: "https://127.0.0.1" + port, guestURL: "https://10.0.2.2" + port,
		ca: filepath.Join(kbs.Dir, "ca.pem"), adminKey: filepath.Join(kbs.Dir, "admin.key")}
	k.prepare(t)
	return k
}

// prepare makes an empty policy folder and the settings.
func (k *target) prepare(t *testing.T) {
	t.Helper()
	k.folder = filepath.Join(k.env.Dir, "policy")
	if err := os.Mkdir(k.folder, 0o755); err != nil {
		t.Fatal(err)
	}
	k.settings = filepath.Join(k.env.Dir, "hostbuild.yaml")
	names := ""
	for key, env := range map[string]string{"admin_issuer": "KBS_ADMIN_ISSUER", "admin_audience": "KBS_ADMIN_AUDIENCE"} {
		if v := os.Getenv(env); v != "" {
			names += fmt.Sprintf("  %s: %s\n", key, v)
		}
	}
	write(t, k.settings, fmt.Appendf(nil, "kbs:\n  url: %s\n  guest_url: %s\n  ca: %s\n  admin_key: %s\n%spolicy_dir: %s\nbase_dir: %s\noutput_dir: %s/bundles\n",
		k.url, k.guestURL, k.ca, k.adminKey, names, k.folder, k.env.Base, k.env.Dir))
}

func (k *target) config(t *testing.T) kbsclient.Config {
	t.Helper()
	return kbsclient.Config{URL: k.url, RootCAs: read(t, k.ca), AdminIssuer: os.Getenv("KBS_ADMIN_ISSUER"), AdminAudience: os.Getenv("KBS_ADMIN_AUDIENCE")}
}

func (k *target) admin(t *testing.T) *kbsclient.Admin {
	t.Helper()
	key, err := kbsclient.ParseAdminKey(read(t, k.adminKey))
	if err != nil {
		t.Fatal(err)
	}
	a, err := kbsclient.NewAdmin(k.config(t), key)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// hostbuild runs hostbuild with the target's settings.
func (k *target) hostbuild(t *testing.T, args ...string) string {
	t.Helper()
	out, err := k.env.Run(t.Context(), "hostbuild", append([]string{"--settings", k.settings}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func suite(t *testing.T, k *target) {
	k.keepPolicy(t)
	t.Run("client", func(t *testing.T) { client(t, k) })
	t.Run("policy", func(t *testing.T) { policyFlow(t, k) })
	t.Run("guest", func(t *testing.T) { guest(t, k) })
}

// keepPolicy finds out the dialect, compares it with what was said, and puts the
// KBS's policy back in the end where it can be read.
func (k *target) keepPolicy(t *testing.T) {
	t.Helper()
	admin := k.admin(t)
	old, err := admin.ResourcePolicy(t.Context())
	found := "T"
	switch {
	case errors.Is(err, kbsclient.ErrNotSupported):
		found = "H"
		if os.Getenv("KBS_URL") != "" && os.Getenv("REPLACE_POLICY") != "yes" {
			t.Fatal("this KBS cannot be asked for its resource policy, which this test replaces: set REPLACE_POLICY=yes if nothing depends on it")
		}
	case err != nil:
		t.Fatalf("the KBS does not answer its admin: %v", err)
	default:
		t.Cleanup(func() {
			if err := admin.SetResourcePolicy(context.Background(), old); err != nil {
				t.Errorf("put the old resource policy back: %v", err)
			}
		})
	}
	if k.dialect != "" && k.dialect != found {
		t.Errorf("DIALECT=%s, and the KBS behaves as %s", k.dialect, found)
	}
	k.dialect = found
}

// sample is Trustee's test evidence.
type sample struct{}

func (sample) TEE() string { return "sample" }

func (sample) Evidence(_ context.Context, digest [48]byte) (json.RawMessage, error) {
	return json.RawMessage(`{"svn":"1","report_data":"` + base64.StdEncoding.EncodeToString(digest[:]) + `"}`), nil
}

const (
	openTest = "package policy\n\nimport rego.v1\n\ndefault allow := false\n\n" +
		"path := data[\"resource-path\"] if is_string(data[\"resource-path\"])\n\n" +
		"path := concat(\"/\", array.concat([data.plugin], data[\"resource-path\"])) if is_array(data[\"resource-path\"])\n\n" +
		"allow if startswith(path, \"resource/coffer-test/\")\n"
	closedAll = "package policy\n\nimport rego.v1\n\ndefault allow := false\n"
)

// client: the handshake, a resource, each admin call, and each error that a caller
// must tell apart.
func client(t *testing.T, k *target) {
	ctx, admin := t.Context(), k.admin(t)
	const path, missing = "coffer-test/client/one", "coffer-test/client/missing"
	secret := []byte("0123456789abcdef-coffer-test")
	if err := admin.SetResource(ctx, path, secret); err != nil {
		t.Fatal(err)
	}
	if err := admin.SetResourcePolicy(ctx, []byte(openTest)); err != nil {
		t.Fatal(err)
	}
	c, err := kbsclient.New(k.config(t))
	if err != nil {
		t.Fatal(err)
	}
	s, err := c.Attest(ctx, sample{})
	if err != nil {
		t.Fatalf("attest with sample evidence: %v", err)
	}
	defer s.Close()
	if got, err := s.Resource(ctx, path); err != nil || !bytes.Equal(got, secret) {
		t.Errorf("resource: %q, %v", got, err)
	}
	if _, err := s.Resource(ctx, missing); !errors.Is(err, kbsclient.ErrNoResource) {
		t.Errorf("missing resource: %v, want ErrNoResource", err)
	}
	if s.Claims() == nil || strings.Count(s.Token(), ".") != 2 {
		t.Error("no token")
	}
	if err := admin.SetResourcePolicy(ctx, []byte(closedAll)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Resource(ctx, path); !errors.Is(err, kbsclient.ErrPolicyDenied) {
		t.Errorf("closed policy: %v, want ErrPolicyDenied", err)
	}
	if err := admin.SetResourcePolicy(ctx, []byte("package policy\nallow if {")); !errors.Is(err, kbsclient.ErrPolicyEngine) {
		t.Errorf("broken policy: %v, want ErrPolicyEngine", err)
	}
	got, err := admin.ResourcePolicy(ctx)
	if k.dialect == "T" && (err != nil || string(got) != closedAll) || k.dialect == "H" && !errors.Is(err, kbsclient.ErrNotSupported) {
		t.Errorf("policy read back: %q, %v", got, err)
	}
	if err := admin.SetReferenceValue(ctx, "coffer-test", []string{"x"}); err != nil {
		t.Errorf("set reference value: %v", err)
	}
	switch k.dialect {
	case "T":
		if v, err := admin.ReferenceValues(ctx); err != nil || !bytes.Contains(v, []byte("coffer-test")) {
			t.Errorf("reference values: %s, %v", v, err)
		}
		if err := admin.DeleteResource(ctx, path); !errors.Is(err, kbsclient.ErrNotSupported) {
			t.Errorf("delete: %v, want ErrNotSupported", err)
		}
	case "H":
		if v, err := admin.ReferenceValue(ctx, "coffer-test"); err != nil || !bytes.Contains(v, []byte(`"x"`)) {
			t.Errorf("reference value: %s, %v", v, err)
		}
		if err := admin.DeleteResource(ctx, path); err != nil {
			t.Errorf("delete: %v", err)
		}
	}
	stranger, err := kbsclient.NewAdminToken(k.config(t), "e30.e30.e30")
	if err != nil {
		t.Fatal(err)
	}
	if err := stranger.SetResource(ctx, path, secret); !errors.Is(err, kbsclient.ErrAdminAuth) {
		t.Errorf("another's admin token: %v, want ErrAdminAuth", err)
	}
	if _, err := c.Attest(ctx, wrongEvidence{}); !errors.Is(err, kbsclient.ErrAttestationRefused) {
		t.Errorf("evidence over something else: %v, want ErrAttestationRefused", err)
	}
}

type wrongEvidence struct{ sample }

func (wrongEvidence) Evidence(ctx context.Context, _ [48]byte) (json.RawMessage, error) {
	return sample{}.Evidence(ctx, [48]byte{1})
}

// policyFlow: text of people in the folder survives, is warned about, and reaches
// the KBS by `policy apply`; a text that opens an old Trustee does not.
func policyFlow(t *testing.T, k *target) {
	master := filepath.Join(k.folder, "policy.rego")
	own := "# mine\n" + closedAll + "\nallow if input.submods.cpu0[\"ear.status\"] == \"nobody\"\n"
	write(t, master, []byte(own))
	out, err := exec.CommandContext(t.Context(), filepath.Join(k.env.Bin, "hostbuild"), "--settings", k.settings, "policy", "apply").CombinedOutput()
	if line := 1 + strings.Count(own[:strings.Index(own, "allow if")], "\n"); err != nil || !strings.Contains(string(out), fmt.Sprintf("warning: %s, line %d: warning: this allow rule ignores", master, line)) {
		t.Errorf("policy apply: %v, %s; want a warning about line %d", err, out, line)
	}
	if got := k.hostbuild(t, "policy", "show"); !strings.HasPrefix(got, own) || !strings.Contains(got, "BEGIN coffer rules") {
		t.Errorf("policy show: %s", got)
	}
	if got, err := k.admin(t).ResourcePolicy(t.Context()); k.dialect == "T" && (err != nil || !bytes.HasPrefix(got, []byte(own))) {
		t.Errorf("the KBS holds %q, %v", got, err)
	}
	good := read(t, master)
	write(t, master, bytes.Replace(good, []byte("import rego.v1"), nil, 1))
	if _, err := k.env.Run(t.Context(), "hostbuild", "--settings", k.settings, "policy", "apply"); err == nil || !strings.Contains(err.Error(), "`if` without `import rego.v1`") {
		t.Errorf("apply of a text that opens everything: %v", err)
	}
	write(t, master, good)

	// The folder as the deployment guide has it: the hook uploads, by kbs-client.
	write(t, filepath.Join(k.folder, "private.key"), read(t, k.adminKey))
	hook := filepath.Join(k.folder, "set-policy.sh")
	issuer := ""
	for flag, env := range map[string]string{"--admin-issuer": "KBS_ADMIN_ISSUER", "--admin-audience": "KBS_ADMIN_AUDIENCE"} {
		if v := os.Getenv(env); v != "" {
			issuer += " " + flag + " " + v
		}
	}
	write(t, hook, fmt.Appendf(nil, "#!/bin/sh\nset -e\n%s/kbs-client --url %s --cert-file %s config --auth-private-key private.key%s set-resource-policy --policy-file policy.rego\ntouch ran\n",
		k.env.Bin, k.url, k.ca, issuer))
	if err := os.Chmod(hook, 0o755); err != nil {
		t.Fatal(err)
	}
	k.hostbuild(t, "policy", "apply")
	if _, err := os.Stat(filepath.Join(k.folder, "ran")); err != nil {
		t.Errorf("the hook did not run: %v", err)
	}
	if got, err := k.admin(t).ResourcePolicy(t.Context()); k.dialect == "T" && (err != nil || !bytes.Equal(got, good)) {
		t.Errorf("after the hook the KBS holds %q, %v", got, err)
	}
	if err := os.Remove(hook); err != nil {
		t.Fatal(err)
	}
}

// guest builds a bundle for sample evidence, boots it, and takes its rule away.
func guest(t *testing.T, k *target) {
	ctx, cancel := context.WithTimeout(t.Context(), buildDeadline)
	defer cancel()
	b, err := k.env.Build(ctx, k.settings, configFile(t, k.env, "trustee"), "--sample")
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Unpack(ctx, filepath.Join(k.env.Dir, "site")); err != nil {
		t.Fatal(err)
	}
	if out := k.hostbuild(t, "policy", "list"); !strings.Contains(out, b.ID+" sample evidence") {
		t.Errorf("policy list: %s", out)
	}
	ctx, cancel = context.WithTimeout(t.Context(), bootDeadline)
	defer cancel()
	vm, err := b.Boot()
	if err != nil {
		t.Fatal(err)
	}
	defer vm.Kill()
	for _, line := range []string{`phase=key status=ok`, `workload: hello from the workload: good morning trustee`, `attestation round=\d+ verdict=pass`} {
		if _, err := vm.Expect(ctx, line); err != nil {
			t.Fatal(err)
		}
	}
	k.hostbuild(t, "policy", "remove", b.ID)
	if _, err := vm.Expect(ctx, `attestation round=\d+ verdict=negative.*code=E_KBS_DENIED`); err != nil {
		t.Errorf("the running guest does not feel the removal: %v", err)
	}
	vm.Kill()
	again, err := b.Boot()
	if err != nil {
		t.Fatal(err)
	}
	defer again.Kill()
	if _, err := again.Expect(ctx, `FAILED phase=key code=E_KBS_DENIED`); err != nil {
		t.Errorf("the next boot: %v", err)
	}
}

// configFile writes a CONFIG.yaml and its inputs: an image of one small program.
func configFile(t *testing.T, env *harness.Env, name string) string {
	t.Helper()
	dir := filepath.Join(env.Dir, "in-"+name)
	if err := os.MkdirAll(filepath.Join(dir, "config"), 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "config/greeting.txt"), []byte("good morning "+name+"\n"))
	layer, err := dockersave.Layer(dockersave.Entry{Name: "workload", Mode: 0o755, Body: read(t, filepath.Join(env.Bin, "demo-workload"))})
	if err != nil {
		t.Fatal(err)
	}
	archive := filepath.Join(dir, "image.tar.gz")
	if err := (dockersave.Image{Tag: name + ":1", Entrypoint: []string{"/workload"}, Layers: [][]byte{layer}}).SaveLegacy(archive); err != nil {
		t.Fatal(err)
	}
	yaml := filepath.Join(dir, "CONFIG.yaml")
	write(t, yaml, fmt.Appendf(nil, "root_drive_size: 1\ndocker_archive: %s\nuser_config:\n  demo: %s/config\nvcpus: [1]\nmemory_mib: 1024\ncc_attestation:\n  check_frequency: 3\n  max_staleness: 60\n", archive, dir))
	return yaml
}

// TestTwentyBuilds has twenty `hostbuild cvm` at once use one folder and one KBS,
// while people's own text stands in the folder: no rule is lost.
func TestTwentyBuilds(t *testing.T) {
	if os.Getenv("KBS_URL") != "" {
		t.Skip("only against the embedded KBS")
	}
	k := embedded(t, "T")
	const own = "# mine\n" + closedAll
	write(t, filepath.Join(k.folder, "policy.rego"), []byte(own))
	yaml := configFile(t, k.env, "twenty")
	ctx, cancel := context.WithTimeout(t.Context(), 2*buildDeadline)
	defer cancel()
	var mu sync.Mutex
	var ids []string
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			b, err := k.env.Build(ctx, k.settings, yaml)
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			ids = append(ids, b.ID)
		})
	}
	wg.Wait()
	master := read(t, filepath.Join(k.folder, "policy.rego"))
	held, err := k.admin(t).ResourcePolicy(t.Context())
	if err != nil || !bytes.Equal(held, master) {
		t.Errorf("the KBS holds another text than the master copy (%v)", err)
	}
	if !bytes.HasPrefix(master, []byte(own)) {
		t.Error("text of people changed")
	}
	slices.Sort(ids)
	listed := slices.Compact(regexp.MustCompile(`cvm_[0-9a-f]{12}`).FindAllString(k.hostbuild(t, "policy", "list"), -1))
	if len(ids) != 20 || !slices.Equal(listed, ids) {
		t.Errorf("%d rules %v, want the %d of %v", len(listed), listed, len(ids), ids)
	}
	for _, id := range ids {
		if show := k.hostbuild(t, "policy", "show", id); !strings.Contains(show, "resource keys/root/"+id) || !strings.Contains(show, "minimum TCB Genoa") {
			t.Errorf("policy show %s: %s", id, show)
		}
	}
	if _, err := os.Stat(filepath.Join(k.env.Dir, "bundles", ids[0]+".tgz")); err != nil {
		t.Error(err)
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func write(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
}
