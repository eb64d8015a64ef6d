package register

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"coffer/hostbuild/bundle"
	"coffer/hostbuild/kbs"
	"coffer/hostbuild/policy"
	"coffer/hostbuild/settings"
	"coffer/kbsclient"
)

// site is a KBS and a policy folder as the deployment guide lays it out: the
// admin key in it, no kbs.admin_key in the settings.
type site struct {
	t      *testing.T
	dir    string
	policy string
	file   string // settings
	s      *settings.Settings
}

func newSite(t *testing.T, o kbs.Options) *site {
	t.Helper()
	st := &site{t: t, dir: filepath.Join(t.TempDir(), "kbs"), policy: filepath.Join(t.TempDir(), "policy")}
	if err := kbs.Init(st.dir, kbs.Options{Hosts: []string{"127.0.0.1"}}); err != nil {
		t.Fatal(err)
	}
	o.Dir, o.Logger = st.dir, slog.New(slog.DiscardHandler)
	server, err := kbs.New(o)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- server.Serve(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	if err := os.Mkdir(st.policy, 0o755); err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(filepath.Join(st.dir, "admin.key"))
	if err != nil {
		t.Fatal(err)
	}
	st.write("private.key", string(key), 0o600)
	st.file = filepath.Join(t.TempDir(), "hostbuild.yaml")
	if err := os.WriteFile(st.file, fmt.Appendf(nil, "kbs:\n  url: https://%s\n  ca: %s/ca.pem\n%spolicy_dir: %s\nbase_dir: /none\noutput_dir: /none\n",
		ln.Addr(), st.dir, "  admin_issuer: nvflare\n  admin_audience: trustee\n", st.policy), 0o600); err != nil {
		t.Fatal(err)
	}
	if st.s, err = settings.Read(st.file); err != nil {
		t.Fatal(err)
	}
	return st
}

func (st *site) write(name, text string, mode os.FileMode) {
	st.t.Helper()
	path := filepath.Join(st.policy, name)
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		st.t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		st.t.Fatal(err)
	}
}

func (st *site) open() *Registrar {
	st.t.Helper()
	r, err := Open(st.s)
	if err != nil {
		st.t.Fatal(err)
	}
	return r
}

// held is the policy that the KBS has.
func (st *site) held() []byte {
	st.t.Helper()
	b, err := os.ReadFile(filepath.Join(st.dir, "resource-policy.rego"))
	if err != nil {
		st.t.Fatal(err)
	}
	return b
}

func (st *site) master() []byte {
	st.t.Helper()
	b, err := os.ReadFile(filepath.Join(st.policy, "policy.rego"))
	if err != nil {
		st.t.Fatal(err)
	}
	return b
}

func rule(id string) policy.Rule {
	return policy.Rule{CVMID: id, Paths: []string{"keys/root/" + id, "keys/canary/" + id}, Digests: [][48]byte{{1}}}
}

// TestFolderOfTheGuide: the admin key of the folder, issuer and audience of the
// settings, and text of people that is warned about.
func TestFolderOfTheGuide(t *testing.T) {
	st := newSite(t, kbs.Options{Dialect: kbs.DialectH, AdminIssuer: "nvflare", AdminAudience: "trustee"})
	own := "package policy\n\nimport rego.v1\n\ndefault allow := false\n\nallow if {\n\tinput.submods.cpu0[\"ear.veraison.annotated-evidence\"].snp.measurement == \"x\"\n}\n"
	st.write("policy.rego", own, 0o644)
	r := st.open()
	var warnings []policy.Finding
	r.Warn = func(f policy.Finding) { warnings = append(warnings, f) }
	if err := r.AddCVM(t.Context(), rule("one"), map[string][]byte{"keys/root/one": []byte("key")}); err != nil {
		t.Fatal(err)
	}
	if len(warnings) != 1 || warnings[0].Line != 7 || !strings.Contains(warnings[0].Message, "every CVM's key") {
		t.Errorf("warnings %v, want one about line 7", warnings)
	}
	if !bytes.HasPrefix(st.master(), []byte(own)) || !bytes.Equal(st.master(), st.held()) {
		t.Error("text of people changed, or the KBS has another text")
	}
	if b, err := os.ReadFile(filepath.Join(st.dir, "repository/keys/root/one")); err != nil || string(b) != "key" {
		t.Errorf("key at the KBS: %q, %v", b, err)
	}
	if err := r.ForgetCVM(t.Context(), rule("one")); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(st.dir, "repository/keys/root/one")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the key is still there after undo (%v)", err)
	}
	if rules, err := Rules(st.policy); err != nil || len(rules) != 0 {
		t.Errorf("rules %v, %v after undo", rules, err)
	}

	// What people change by hand reaches the KBS by Apply, unless it would open it.
	st.write("policy.rego", strings.Replace(own, `"x"`, `"y"`, 1), 0o644)
	if err := r.Apply(t.Context()); err != nil || !bytes.Equal(st.master(), st.held()) {
		t.Errorf("apply: %v", err)
	}
	before := st.held()
	st.write("policy.rego", strings.Replace(own, "import rego.v1\n", "", 1), 0o644)
	var check *policy.CheckError
	if err := r.Apply(t.Context()); !errors.As(err, &check) || !strings.Contains(err.Error(), "line 6: error: `if` without") {
		t.Errorf("fail-open text: %v", err)
	}
	if !bytes.Equal(st.held(), before) {
		t.Error("a refused text was uploaded")
	}
}

func TestOtherIssuer(t *testing.T) {
	st := newSite(t, kbs.Options{Dialect: kbs.DialectH, AdminIssuer: "another"})
	if err := st.open().Check(t.Context()); !errors.Is(err, kbsclient.ErrAdminAuth) {
		t.Errorf("check: %v, want ErrAdminAuth", err)
	}
}

func TestSettingsWithoutAnyKey(t *testing.T) {
	st := newSite(t, kbs.Options{})
	if err := os.Remove(filepath.Join(st.policy, "private.key")); err != nil {
		t.Fatal(err)
	}
	if _, err := settings.Read(st.file); err == nil || !strings.Contains(err.Error(), "kbs.admin_key") || !strings.Contains(err.Error(), "private.key") {
		t.Errorf("settings: %v, want a word about kbs.admin_key and private.key", err)
	}
}

func TestMinTCBReachesRules(t *testing.T) {
	st := newSite(t, kbs.Options{})
	if got := st.open().minTCB; len(got) != 1 || got["Genoa"].SNP != 23 {
		t.Errorf("default minimum %v, want Genoa's", got)
	}
	b, _ := os.ReadFile(st.file)
	os.WriteFile(st.file, append(b, "min_tcb:\n  Turin: {bootloader: 1, tee: 1, snp: 4, microcode: 71}\n"...), 0o600)
	var err error
	if st.s, err = settings.Read(st.file); err != nil {
		t.Fatal(err)
	}
	if got := st.open().minTCB; len(got) != 1 || got["Turin"] != (policy.TCB{Bootloader: 1, TEE: 1, SNP: 4, Microcode: 71}) {
		t.Errorf("minimum %v", got)
	}
	for _, bad := range []string{"min_tcb: {}", "min_tcb: {Rome: {}}", "min_tcb: {Genoa: {snp: 300}}", "min_tcb: {Genoa: {smp: 3}}"} {
		os.WriteFile(st.file, append(b, bad...), 0o600)
		if _, err := settings.Read(st.file); err == nil || !strings.Contains(err.Error(), "min_tcb") {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

// TestRuleOfOwnResources: a manifest that was changed cannot claim the key of
// another CVM, one whose rule is gone included.
func TestRuleOfOwnResources(t *testing.T) {
	r := newSite(t, kbs.Options{}).open()
	own := func() *bundle.Manifest {
		return &bundle.Manifest{CVMID: "cvm_0123456789ab", TEE: "snp", LaunchDigests: []bundle.LaunchDigest{{Digest: strings.Repeat("ab", 48)}},
			KBS: bundle.KBS{KeyPath: "keys/root/cvm_0123456789ab", CanaryPath: "keys/canary/cvm_0123456789ab",
				VaultKeyPath: "keys/vault/cvm_0123456789ab", GPUResources: []string{"site/data/key"}}}
	}
	if rule, err := r.RuleOf(own()); err != nil || len(rule.Paths) != 4 {
		t.Errorf("its own: %v, %v", rule.Paths, err)
	}
	for name, change := range map[string]func(m *bundle.Manifest){
		"key":      func(m *bundle.Manifest) { m.KBS.KeyPath = "keys/root/cvm_ba9876543210" },
		"canary":   func(m *bundle.Manifest) { m.KBS.CanaryPath = "keys/root/cvm_ba9876543210" },
		"vault":    func(m *bundle.Manifest) { m.KBS.VaultKeyPath = "keys/root/cvm_ba9876543210" },
		"resource": func(m *bundle.Manifest) { m.KBS.GPUResources = []string{"keys/root/cvm_ba9876543210"} },
		"id":       func(m *bundle.Manifest) { m.CVMID = "cvm_ba9876543210" },
	} {
		m := own()
		change(m)
		if rule, err := r.RuleOf(m); !errors.Is(err, ErrForeign) {
			t.Errorf("another CVM's, by %s: %v, %v", name, rule.Paths, err)
		}
	}
}

// upload is a set-policy.sh that puts the policy where the test's KBS has it.
func (st *site) upload(before string) string {
	return "#!/bin/sh\nset -eu\n" + before + "\ncp policy.rego " + filepath.Join(st.dir, "resource-policy.rego") + "\n"
}

func TestHook(t *testing.T) {
	st := newSite(t, kbs.Options{Dialect: kbs.DialectT})
	st.write("set-policy.sh", st.upload(`test $# = 0; test "$PWD/policy.rego" = "$POLICY_FILE"; echo "$KBS_URL $KBS_CA" > ran; ! env | grep -q "PRIVATE KEY"`), 0o755)
	if err := st.open().AddRule(t.Context(), rule("one")); err != nil {
		t.Fatal(err)
	}
	if ran, err := os.ReadFile(filepath.Join(st.policy, "ran")); err != nil || !strings.HasPrefix(string(ran), st.s.KBSURL) {
		t.Errorf("the hook's mark: %q, %v", ran, err)
	}
	good := st.master()
	if !bytes.Equal(good, st.held()) {
		t.Error("the KBS has another text")
	}
	for _, tt := range []struct{ name, script, want string }{
		{"fails", "#!/bin/sh\necho no route; exit 3\n", "exit status 3\nno route"},
		{"does not upload", "#!/bin/sh\ntrue\n", "holds another policy"},
	} {
		st.write("set-policy.sh", tt.script, 0o755)
		err := st.open().AddRule(t.Context(), rule("two"))
		if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "set-policy.sh") {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
		if !bytes.Equal(st.master(), good) {
			t.Errorf("%s: the master copy changed", tt.name)
		}
	}
	st.write("set-policy.sh", "#!/bin/sh\nexit 1\n", 0o777)
	if _, err := Open(st.s); err == nil || !strings.Contains(err.Error(), "chmod o-w") {
		t.Errorf("a hook that everybody may write: %v", err)
	}
	st.write("set-policy.sh", "#!/bin/sh\nexit 1\n", 0o755)
	if err := os.Chmod(st.policy, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(st.s); err == nil || !strings.Contains(err.Error(), st.policy+" can be written by everybody") {
		t.Errorf("a folder in which everybody may put a hook: %v", err)
	}
	if err := os.Chmod(st.policy, 0o755); err != nil {
		t.Fatal(err)
	}
	st.write("set-policy.sh", "#!/bin/sh\nexit 1\n", 0o644) // no hook: hostbuild uploads
	if err := st.open().AddRule(t.Context(), rule("two")); err != nil || !bytes.Equal(st.master(), st.held()) {
		t.Errorf("a file that is not executable: %v", err)
	}
}

func TestHookIsKilled(t *testing.T) {
	st := newSite(t, kbs.Options{})
	up := filepath.Join(st.policy, "up")
	if err := syscall.Mkfifo(up, 0o600); err != nil {
		t.Fatal(err)
	}
	st.write("set-policy.sh", "#!/bin/sh\nexec 3>up\n(echo it runs >&3; sleep 9; echo so does its child >&3) &\nwait\n", 0o755)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	said := make(chan string)
	go func() {
		f, err := os.Open(up) // blocks until the hook opens it
		if err != nil {
			t.Error(err)
		}
		defer f.Close()
		r := bufio.NewReader(f)
		first, _ := r.ReadString('\n')
		cancel()
		rest, _ := io.ReadAll(r) // until nobody can write any more
		said <- first + string(rest)
	}()
	err := st.open().hook.run(ctx)
	if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "signal: killed") || !strings.Contains(err.Error(), "may have uploaded") {
		t.Errorf("run: %v, want Canceled, by a signal, and a word on what the hook may have done", err)
	}
	if text := <-said; text != "it runs\n" {
		t.Errorf("the hook and its child say %q", text)
	}
}
