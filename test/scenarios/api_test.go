package scenarios

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"coffer/internal/testenv"
	"coffer/test/dockersave"
)

// What a workload does with its API and with snpguest, in the order in which
// NVFlare does it; and what it must not get.
const apiScript = `
B=/bin/busybox
say() { echo "api: $*"; }
$B head -c 64 /dev/urandom >/tmp/req
$B ls /opt/certs | $B tr '\n' ' ' && echo
a=$($B date +%s)
snpguest report /tmp/r /tmp/req && say report
snpguest fetch ca pem /tmp/c milan && snpguest fetch vcek pem /tmp/c /tmp/r && say fetched
snpguest verify certs /tmp/c && snpguest verify attestation /tmp/c /tmp/r && say verified
snpguest verify attestation /opt/certs /tmp/r >/dev/null && say verified by what was there before
snpguest display report /tmp/r | $B grep VMPL
say took $(($($B date +%s) - a)) seconds
snpguest report /tmp/r0 /tmp/req -v 0; say VMPL 0: code $?
[ -e /tmp/r0 ] && say VMPL 0: a report
for p in sev-guest vport0p1 mem kmsg; do [ -e /dev/$p ] && say device $p; done
[ -e /sys/kernel/config/tsm ] && say configfs
$B wget -qO- "http://127.0.0.1:8006/aa/evidence?runtime_data=x" | $B grep -q attestation_report && say evidence
$B wget -qO- "http://127.0.0.1:8006/aa/token?token_type=kbs" | $B grep -q tee_keypair && say TEE KEY
$B wget -qO- "http://127.0.0.1:8006/aa/token?token_type=kbs" | $B grep -q '"token":"ey' && say token
$B wget -O- "http://127.0.0.1:8006/cdh/resource/keys/root/cvm_000000000000" 2>&1 | $B grep -o "403 Forbidden"
$B wget -O- "http://127.0.0.1:8006/cdh/resource/site/keys/unlisted" 2>&1 | $B grep -o "403 Forbidden"
$B wget -O- "http://127.0.0.1:8006/cdh/resource/site/keys/later" 2>&1 | $B grep -o "403 Forbidden"
say "$($B wget -qO- http://127.0.0.1:8006/cdh/resource/site/keys/model)"
snpguest ok | $B grep SNP
say done; exit 3
`

func TestWorkloadAPI(t *testing.T) {
	l := setupKBS(t)
	busybox, err := os.ReadFile(testenv.LookTool(t, "busybox"))
	if err != nil {
		t.Fatal(err)
	}
	layer, err := dockersave.Layer(dockersave.Entry{Name: "bin/"}, dockersave.Entry{Name: "bin/busybox", Mode: 0o755, Body: busybox},
		dockersave.Entry{Name: "run.sh", Mode: 0o755, Body: []byte(apiScript)})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	archive := filepath.Join(dir, "image.tar.gz")
	image := dockersave.Image{Tag: "api:1", Entrypoint: []string{"/bin/busybox", "sh", "/run.sh"}, Layers: [][]byte{layer}}
	if err := image.SaveLegacy(archive); err != nil {
		t.Fatal(err)
	}
	yaml := filepath.Join(dir, "CONFIG.yaml")
	write(t, yaml, fmt.Appendf(nil, `root_drive_size: 1
docker_archive: %s
vcpus: [1]
memory_mib: 1024
workload:
  api_port: 8006
  kbs_resources: [site/keys/model, site/keys/later]
  profile: nvflare
`, archive))
	ctx, cancel := context.WithTimeout(t.Context(), buildDeadline)
	defer cancel()
	b, err := l.env.Build(ctx, l.settings, yaml)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Unpack(ctx, filepath.Join(l.env.Dir, "site")); err != nil {
		t.Fatal(err)
	}
	l.release(t, b.ID, "site/keys/model", "the model's key")
	g := boot(t, b)
	g.expect(`coffer: certificate of this chip from="host"`)
	g.expect(`workload exited code=3`)
	text := g.Console.Text()
	for _, want := range []string{
		"workload: ark.pem ask.pem vcek.pem", "api: report", "api: fetched", "The VCEK was signed by the AMD ASK!", "VEK signed the Attestation Report!",
		"api: verified", "api: verified by what was there before", "VMPL:                         1", "VMPL 0 is Coffer's agent's own", "api: VMPL 0: code 1",
		"api: evidence", "api: token", "api: the model's key", "- SNP: ENABLED", "api: done",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the console lacks %q", want)
		}
	}
	for _, bad := range []string{"VMPL 0: a report", "api: device", "api: configfs", "TEE KEY"} {
		if strings.Contains(text, bad) {
			t.Errorf("the console holds %q", bad)
		}
	}
	// Another CVM's key, what is not listed, and what no rule releases.
	if n := strings.Count(text, "403 Forbidden"); n != 3 {
		t.Errorf("%d resources were refused, want 3", n)
	}
	g.off()
	if t.Failed() {
		t.Log(text)
	}
}

// release stores a resource and adds the rule for it that docs/kbs.md shows.
func (l *line) release(t *testing.T, cvm, path, value string) {
	t.Helper()
	doc, err := os.ReadFile("../../docs/kbs.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rule, found := strings.Cut(string(doc), "```rego\n")
	rule, _, closed := strings.Cut(rule, "```")
	if !found || !closed || !strings.Contains(rule, "site/keys/model") {
		t.Fatal("docs/kbs.md shows no rule for site/keys/model")
	}
	policy := filepath.Join(l.kbs.Dir, "policy", "policy.rego")
	text, err := os.ReadFile(policy)
	if err != nil {
		t.Fatal(err)
	}
	rule = strings.NewReplacer("site/keys/model", path, "cvm_0123456789ab", cvm).Replace(rule)
	write(t, policy, append(text, "\n"+rule...))
	file := filepath.Join(t.TempDir(), "resource")
	write(t, file, []byte(value))
	for _, args := range [][]string{
		{"kbs-client", "--url", "https://" + l.kbs.Listen, "--cert-file", l.kbs.Dir + "/ca.pem", "config", "--auth-private-key", l.kbs.Dir + "/admin.key",
			"set-resource", "--path", path, "--resource-file", file},
		{"hostbuild", "--settings", l.settings, "policy", "apply"},
	} {
		if _, err := l.env.Run(t.Context(), args[0], args[1:]...); err != nil {
			t.Fatal(err)
		}
	}
}
