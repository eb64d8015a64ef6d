package snpguest_test

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"coffer/internal/snp"
	"coffer/internal/snp/verify"
	"coffer/internal/snpguest"
	"coffer/test/fakebase"
	"coffer/test/simsnp"
)

// result is what a caller of the program sees, but for standard error.
type result struct {
	Args   []string          `json:"args"`
	Code   int               `json:"code"`
	Stdout string            `json:"stdout,omitempty"`
	Files  map[string]string `json:"files,omitempty"` // written, base64
}

// run runs our program in the present folder.
func run(t *testing.T, env snpguest.Env, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, err bytes.Buffer
	env.Stdout, env.Stderr = &out, &err
	if env.Socket == "" {
		env.Socket = "/nonexistent/coffer.sock"
	}
	if env.Now.IsZero() {
		env.Now = time.Now()
	}
	code = snpguest.Run(args, env)
	return code, out.String(), err.String()
}

// oracle is virtee's own snpguest 0.9.2, where the environment names it: see
// `make test-oracles`.
func oracle() string { return os.Getenv("COFFER_SNPGUEST_ORACLE") }

// runOracle runs virtee's program in the present folder.
func runOracle(t *testing.T, args ...string) (code int, stdout string) {
	t.Helper()
	cmd := exec.Command(oracle(), args...)
	out, err := cmd.Output()
	if exit := (*exec.ExitError)(nil); err != nil && !asExit(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), string(out)
}

func asExit(err error, exit **exec.ExitError) bool {
	e, ok := err.(*exec.ExitError)
	*exit = e
	return ok
}

// fixtures fills the present folder.
func fixtures(t *testing.T, testdata string) {
	t.Helper()
	for _, name := range []string{"genoa-v3.bin", "turin-v5.bin", "id.pem", "auth.pem", "id.der", "p256.pem"} {
		b, err := os.ReadFile(filepath.Join(testdata, name))
		if err != nil {
			t.Fatal(err)
		}
		write(t, name, b)
	}
	write(t, "ovmf", fakebase.OVMF(t))
	write(t, "kernel", []byte("a kernel"))
	write(t, "initrd", []byte("an initrd"))
	write(t, "empty", nil)
	write(t, "key", []byte("0123456789abcdefghijklmnopqrstuvwxyz"))
	write(t, "short", make([]byte, 63))
	for _, r := range generatedReports() {
		write(t, r.name, r.data)
	}
}

func write(t *testing.T, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

type generated struct {
	name string
	data []byte
}

// generatedReports are reports of all versions and products with random fields.
func generatedReports() []generated {
	var out []generated
	random := rand.New(rand.NewPCG(1, 2))
	for _, version := range []uint32{0, 2, 3, 4, 5, 6} {
		for _, cpu := range [][2]byte{{0x19, 0x01}, {0x19, 0x11}, {0x19, 0xa0}, {0x1a, 0x02}, {0x1a, 0x11}, {0x19, 0x20}, {0x1b, 0}} {
			b := make([]byte, snp.ReportSize)
			for i := range b {
				b[i] = byte(random.Uint32())
			}
			binary.LittleEndian.PutUint32(b, version)
			b[0x188], b[0x189] = cpu[0], cpu[1]
			reserved := [][2]int{{0x4c, 0x50}, {0x18b, 0x1a0}, {0x1eb, 0x1ec}, {0x1ef, 0x1f0}, {0x208, 0x2a0}, {0x330, 0x4a0}}
			if version < 5 {
				reserved = append(reserved, [2]int{0x1f8, 0x2a0})
			}
			if version < 3 {
				reserved = append(reserved, [2]int{0x188, 0x1a0})
			}
			for _, tcb := range []int{0x38, 0x180, 0x1e0, 0x1f0} {
				if version >= 3 && cpu[0] == 0x1a {
					reserved = append(reserved, [2]int{tcb + 4, tcb + 7})
				} else {
					reserved = append(reserved, [2]int{tcb + 2, tcb + 6})
				}
			}
			for _, r := range reserved {
				clear(b[r[0]:r[1]])
			}
			out = append(out, generated{fmt.Sprintf("v%d-%02x-%02x", version, cpu[0], cpu[1]), b})
		}
	}
	turinV2 := bytes.Clone(out[7].data)
	clear(turinV2[0x1a8:0x1e0])
	for _, tcb := range []int{0x38, 0x180, 0x1e0, 0x1f0} {
		copy(turinV2[tcb:], []byte{1, 2, 3, 4, 0, 0, 0, 5})
	}
	masked := bytes.Clone(out[7].data)
	clear(masked[0x1a0:0x1e0])
	long := append(bytes.Clone(out[14].data), 0)
	for _, off := range []int{0x4c, 0x39 + 1, 0x18b, 0x1eb, 0x1f8, 0x208, 0x29f, 0x330, 0x49f} {
		b := bytes.Clone(out[14].data)
		b[off] = 1
		out = append(out, generated{fmt.Sprintf("reserved-%x", off), b})
	}
	return append(out, generated{"v2-turin", turinV2}, generated{"v2-masked", masked}, generated{"long", long})
}

// cases are command lines whose outcome depends on nothing but the fixtures.
func cases() [][]string {
	lines := `
-V
--version
bogus
display
display bogus
display report
display report a b
display report missing
display report short
-q display report genoa-v3.bin
--quiet display report genoa-v3.bin
display report -q genoa-v3.bin
display report genoa-v3.bin
display report turin-v5.bin
display report -- genoa-v3.bin
display report long
display key key
display key empty
display key missing
display key
report
report out
report out short
report out missing
report out key -p
report out key -r -p
report out key -v x
report out key --vmpl
report out key --nothing
key out VCEK
key out vcek -v 7
key out vcek -g 1111
key out vcek -g 111112
key out vcek -s x
key out
certificates
certificates pem
certificates xyz dir
fetch
fetch ca
fetch ca xyz dir milan
fetch ca pem dir
fetch ca pem dir naples
fetch ca pem dir milan -r genoa-v3.bin
fetch ca pem dir milan -e xyz
fetch vcek pem dir
fetch vcek pem dir missing
fetch vcek xyz dir genoa-v3.bin
fetch vcek pem dir v2-masked
verify
verify certs
verify certs missing
verify attestation
verify attestation missing
verify attestation missing missing
verify attestation missing genoa-v3.bin
verify attestation missing genoa-v3.bin -t -s
verify attestation missing genoa-v3.bin -p naples
generate
generate measurement
generate measurement -o ovmf
generate measurement --vcpu-type EPYC-v4
generate measurement -o ovmf --vcpu-type EPYC-v4
generate measurement -o ovmf --vcpu-type epyc-V4 -v 3
generate measurement -oovmf --vcpu-type=EPYC-Genoa -v=2 -k kernel -i initrd -a console=ttyS0
generate measurement -o ovmf --vcpu-type EPYC-Milan -k kernel
generate measurement -o ovmf --vcpu-type EPYC-Milan -i initrd
generate measurement -o ovmf --vcpu-type EPYC-Milan -a x
generate measurement -o ovmf --vcpu-type EPYC-Rome -g 0x21
generate measurement -o ovmf --vcpu-type EPYC-Rome -g 33
generate measurement -o ovmf --vcpu-type EPYC-Rome -g zz
generate measurement -o ovmf --vcpu-type EPYC -f base64
generate measurement -o ovmf --vcpu-type EPYC -f HEX
generate measurement -o ovmf --vcpu-type EPYC -m out
-q generate measurement -o ovmf --vcpu-type EPYC -m out
generate measurement -o ovmf --vcpu-type EPYC -t ec2 -v 2
generate measurement -o ovmf --vcpu-type EPYC -t KRUN -v 2
generate measurement -o ovmf --vcpu-type EPYC -t foo
generate measurement -o ovmf --vcpu-type Pentium
generate measurement -o ovmf --vcpu-sig 8392466
generate measurement -o ovmf --vcpu-sig 1
generate measurement -o ovmf --vcpu-sig 8392466 --vcpu-type EPYC
generate measurement -o ovmf --vcpu-family 25 --vcpu-model 17 --vcpu-stepping 0
generate measurement -o ovmf --vcpu-family 25 --vcpu-model 17
generate measurement -o ovmf --vcpu-family 25 --vcpu-model 18 --vcpu-stepping 0
generate measurement -o missing --vcpu-type EPYC
generate measurement -o kernel --vcpu-type EPYC
generate measurement -o ovmf --vcpu-type EPYC -k missing
generate measurement -o ovmf --vcpu-type EPYC -v x
generate measurement -o ovmf --vcpu-type EPYC extra
generate ovmf-hash
generate ovmf-hash -o ovmf
generate ovmf-hash -o ovmf -f base64
generate ovmf-hash -o ovmf --hash-file out
generate ovmf-hash -o missing
generate key-digest
generate key-digest id.pem
generate key-digest auth.pem
generate key-digest id.der -d out
generate key-digest p256.pem
generate key-digest missing
generate id-block id.pem auth.pem
generate id-block id.pem auth.pem 0xabcd
generate id-block p256.pem auth.pem 0x` + strings.Repeat("ab", 48) + `
generate id-block id.pem auth.pem 0x` + strings.Repeat("ab", 48) + ` -f short
generate id-block id.pem auth.pem 0x` + strings.Repeat("ab", 48) + ` -p zz`
	var out [][]string
	for line := range strings.Lines(lines) {
		if words := strings.Fields(line); len(words) > 0 {
			out = append(out, words)
		}
	}
	for _, r := range generatedReports() {
		out = append(out, []string{"display", "report", r.name})
	}
	return append(out, []string{"generate", "measurement", "-o", "ovmf", "--vcpu-type", "EPYC", "-k", "kernel", "-a", "two words "})
}

// differs are the command lines where ours is another on purpose.
var differs = map[string]string{
	"display report v6-19-01": "a report version that is not known is refused",
	"display report v6-19-11": "a report version that is not known is refused",
	"display report v6-19-a0": "a report version that is not known is refused",
	"display report v6-1a-02": "a report version that is not known is refused",
	"display report v6-1a-11": "a report version that is not known is refused",

	"generate measurement -o kernel --vcpu-type EPYC": "virtee's program panics",
}

// The golden file holds what virtee's program answered. With
// COFFER_SNPGUEST_ORACLE set it is asked again, and the file is rewritten.
func TestAsVirtee(t *testing.T) {
	const golden = "virtee.json"
	here, err := filepath.Abs("testdata")
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir(t.TempDir())
	fixtures(t, here)

	var want []result
	if oracle() != "" {
		for _, args := range cases() {
			os.Remove("out")
			r := result{Args: args}
			r.Code, r.Stdout = runOracle(t, args...)
			if b, err := os.ReadFile("out"); err == nil {
				r.Files = map[string]string{"out": base64.StdEncoding.EncodeToString(b)}
			}
			want = append(want, r)
		}
		text, err := json.MarshalIndent(want, "", " ")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(here, golden), append(text, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(filepath.Join(here, golden))
	if err != nil {
		t.Fatal(err)
	}
	want = nil
	if err := json.Unmarshal(text, &want); err != nil {
		t.Fatal(err)
	}
	if len(want) != len(cases()) {
		t.Fatalf("%d golden answers for %d command lines: make test-oracles", len(want), len(cases()))
	}
	for i, args := range cases() {
		line := strings.Join(args, " ")
		os.Remove("out")
		code, stdout, stderr := run(t, snpguest.Env{}, args...)
		got := result{Args: args, Code: code, Stdout: stdout}
		if b, err := os.ReadFile("out"); err == nil {
			got.Files = map[string]string{"out": base64.StdEncoding.EncodeToString(b)}
		}
		if why := differs[line]; why != "" {
			if got.Code != 1 || got.Stdout != "" {
				t.Errorf("%s: code %d, %q although %s", line, got.Code, got.Stdout, why)
			}
			continue
		}
		if !reflect.DeepEqual(got, want[i]) {
			t.Errorf("%s:\n got %+v\nwant %+v\n%s", line, got, want[i], stderr)
		}
		if code != 0 && stderr == "" {
			t.Errorf("%s: code %d without a word", line, code)
		}
	}
}

func TestVectors(t *testing.T) {
	for _, name := range []string{"genoa-v3", "turin-v5"} {
		want, err := os.ReadFile("testdata/" + name + ".txt")
		if err != nil {
			t.Fatal(err)
		}
		if _, got, _ := run(t, snpguest.Env{}, "display", "report", "testdata/"+name+".bin"); got != string(want) {
			t.Errorf("%s: %s", name, got)
		}
	}
}

// chip makes a simulated chip, its certificates in certs/ and its report.
func chip(t *testing.T, p simsnp.Params) (*simsnp.Chip, []verify.Roots, *snp.Report) {
	t.Helper()
	c, err := simsnp.New(p)
	if err != nil {
		t.Fatal(err)
	}
	roots, err := verify.LoadRoots(c.RootsPEM())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll("certs", 0o755); err != nil {
		t.Fatal(err)
	}
	for _, cert := range c.Certs() {
		name := strings.ToLower(string(cert.Type))
		if cert.Type == snp.ASK && p.VLEK {
			name = "asvk"
		}
		write(t, "certs/"+name+".pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Data}))
	}
	rep, err := c.Report([48]byte{1}, [64]byte{2}, 1)
	if err != nil {
		t.Fatal(err)
	}
	write(t, "report.bin", rep.Marshal())
	return c, roots, rep
}

const (
	certsVerified = "The AMD ARK was self-signed!\nThe AMD ASK was signed by the AMD ARK!\nThe VCEK was signed by the AMD ASK!\n"
	tcbVerified   = `Reported TCB Boot Loader from certificate matches the attestation report.
Reported TCB TEE from certificate matches the attestation report.
Reported TCB SNP from certificate matches the attestation report.
Reported TCB Microcode from certificate matches the attestation report.
`
	fmcVerified    = "Reported TCB FMC from certificate matches the attestation report.\n"
	signedVerified = "VEK signed the Attestation Report!\n"
)

func TestVerify(t *testing.T) {
	t.Chdir(t.TempDir())
	_, roots, rep := chip(t, simsnp.Params{})
	env := snpguest.Env{Roots: roots}
	try := func(wantCode int, wantOut, wantErr string, args ...string) {
		t.Helper()
		code, out, errText := run(t, env, args...)
		if code != wantCode || out != wantOut || !strings.Contains(errText, wantErr) {
			t.Errorf("%v: code %d, %q, %q; want %d, %q, %q", args, code, out, errText, wantCode, wantOut, wantErr)
		}
		if oracle() != "" && wantCode == 0 {
			if code, out := runOracle(t, args...); code != wantCode || out != wantOut {
				t.Errorf("virtee %v: code %d, %q", args, code, out)
			}
		}
	}
	try(0, certsVerified, "", "verify", "certs", "certs")
	try(0, "", "", "-q", "verify", "certs", "certs")
	try(0, tcbVerified+signedVerified, "", "verify", "attestation", "certs", "report.bin")
	try(0, tcbVerified+signedVerified, "", "verify", "attestation", "certs", "report.bin", "-p", "genoa")
	try(0, tcbVerified, "", "verify", "attestation", "-t", "certs", "report.bin")
	try(0, signedVerified, "", "verify", "attestation", "-s", "certs", "report.bin")

	// A chain that somebody made up is AMD's to virtee, not to us.
	env.Roots = verify.AMDRoots()
	try(1, "", "not AMD's", "verify", "certs", "certs")
	try(1, tcbVerified, "does not chain to a trusted root", "verify", "attestation", "certs", "report.bin")
	env.Roots = roots

	bad := *rep
	bad.Measurement[0]++
	write(t, "bad.bin", bad.Marshal())
	try(1, tcbVerified, "VEK did NOT sign the Attestation Report!", "verify", "attestation", "certs", "bad.bin")
	bad = *rep
	bad.ReportedTCB.SNP++
	write(t, "bad.bin", bad.Marshal())
	try(1, strings.Join(strings.SplitAfter(tcbVerified, "\n")[:2], ""), "Report TCB SNP and Certificate SNP mismatch encountered.",
		"verify", "attestation", "certs", "bad.bin")
}

// sign signs a changed report again, as a chip would.
func sign(t *testing.T, c *simsnp.Chip, rep snp.Report, change func(*snp.Report)) {
	t.Helper()
	change(&rep)
	if err := c.Sign(&rep); err != nil {
		t.Fatal(err)
	}
	write(t, "bad.bin", rep.Marshal())
}

// What a genuine chip signed, and virtee's program accepts.
func TestVerifyStricter(t *testing.T) {
	t.Chdir(t.TempDir())
	c, roots, rep := chip(t, simsnp.Params{})
	for _, tc := range []struct {
		name   string
		change func(*snp.Report)
		want   error
	}{
		{"debug", func(r *snp.Report) { r.Policy |= snp.PolicyDebug }, verify.ErrDebug},
		{"migratable", func(r *snp.Report) { r.Policy |= snp.PolicyMigrateMA }, verify.ErrMigrateMA},
		{"another chip", func(r *snp.Report) { r.ChipID[0]++ }, verify.ErrChipID},
		{"masked chip", func(r *snp.Report) { r.ChipID = [64]byte{} }, verify.ErrChipID},
		{"committed TCB", func(r *snp.Report) { r.CommittedTCB.SNP = 1 }, verify.ErrCommittedTCB},
		{"aliases", func(r *snp.Report) { r.PlatformInfo = 0 }, verify.ErrAliasCheck},
		{"version 2", func(r *snp.Report) { r.Version = 2 }, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			sign(t, c, *rep, tc.change)
			code, out, errText := run(t, snpguest.Env{Roots: roots}, "verify", "attestation", "certs", "bad.bin")
			if code != 1 || strings.Contains(out, signedVerified) || tc.want != nil && !strings.Contains(errText, tc.want.Error()) {
				t.Errorf("code %d, %q, %q", code, out, errText)
			}
		})
	}
	t.Run("expired", func(t *testing.T) {
		if code, _, errText := run(t, snpguest.Env{Roots: roots, Now: time.Now().AddDate(9, 0, 0)}, "verify", "attestation", "certs", "report.bin"); code != 1 {
			t.Errorf("code %d, %q", code, errText)
		}
	})
	t.Run("Milan needs a minimum of its own", func(t *testing.T) {
		_, roots, _ := chip(t, simsnp.Params{Product: "Milan"})
		if code, _, errText := run(t, snpguest.Env{Roots: roots}, "verify", "attestation", "certs", "report.bin"); code != 1 || !strings.Contains(errText, verify.ErrNoMinimum.Error()) {
			t.Errorf("code %d, %q", code, errText)
		}
	})
}

func TestFetchCA(t *testing.T) {
	t.Chdir(t.TempDir())
	for _, model := range []string{"milan", "GENOA", "siena", "turin"} {
		if code, out, errText := run(t, snpguest.Env{}, "fetch", "ca", "pem", model, model); code != 0 || out != "" {
			t.Fatalf("%s: code %d, %q, %q", model, code, out, errText)
		}
		for _, name := range []string{"ark.pem", "ask.pem"} {
			text, err := os.ReadFile(filepath.Join(model, name))
			if err != nil {
				t.Fatal(err)
			}
			block, rest := pem.Decode(text)
			if block == nil || block.Type != "CERTIFICATE" || len(rest) > 0 {
				t.Errorf("%s/%s is %q", model, name, text)
			}
			if !slices.ContainsFunc(verify.AMDRoots(), func(r verify.Roots) bool {
				return bytes.Equal(r.ARK.Raw, block.Bytes) || r.ASK != nil && bytes.Equal(r.ASK.Raw, block.Bytes)
			}) {
				t.Errorf("%s/%s is not AMD's", model, name)
			}
		}
	}
	if code, _, _ := run(t, snpguest.Env{}, "fetch", "ca", "der", "nested/deep", "milan"); code != 1 {
		t.Errorf("a folder two levels deep: code %d, want 1", code)
	}
	if code, _, errText := run(t, snpguest.Env{}, "fetch", "ca", "der", "vlek", "milan", "-e", "VLEK"); code != 0 {
		t.Errorf("vlek: code %d, %s", code, errText)
	}
	for _, name := range []string{"vlek/ark.der", "vlek/asvk.der"} {
		if _, err := os.Stat(name); err != nil {
			t.Error(err)
		}
	}
}

// virtee's program signs with random numbers, so signatures are verified in
// place of compared.
// A derived key is nobody's but the caller's.
func TestKeyFile(t *testing.T) {
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "coffer.sock"))
	if err != nil {
		t.Fatal(err)
	}
	derived := bytes.Repeat([]byte{7}, 32)
	agent := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/v1/snp/key" {
			t.Errorf("asked for %s", r.URL.Path)
		}
		w.Write(derived)
	})}
	go agent.Serve(l)
	defer agent.Close()
	path := filepath.Join(dir, "key")
	if code, _, stderr := run(t, snpguest.Env{Socket: l.Addr().String()}, "key", path, "vcek"); code != 0 {
		t.Fatal(stderr)
	}
	b, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(b, derived) {
		t.Errorf("the file holds %x, %v", b, err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode() != 0o600 {
		t.Errorf("mode %v, %v: want 0600", fi.Mode(), err)
	}
}

func TestIDBlock(t *testing.T) {
	here, _ := filepath.Abs("testdata")
	t.Chdir(t.TempDir())
	fixtures(t, here)
	digest := strings.Repeat("ab", 48)
	code, out, errText := run(t, snpguest.Env{}, "generate", "id-block", "id.pem", "auth.pem", "0x"+digest,
		"-f", "0123456789abcdef", "-m", "fedcba9876543210", "-s", "3", "-p", "0x30000", "-i", "block", "-a", "auth")
	lines := strings.Split(out, "\n")
	if code != 0 || len(lines) != 5 || lines[0] != "ID-BLOCK:" || lines[2] != "AUTH-BLOCK:" || lines[4] != "" {
		t.Fatalf("code %d, %q, %q", code, out, errText)
	}
	// As virtee's program prints it for the same arguments.
	const want = "q6urq6urq6urq6urq6urq6urq6urq6urq6urq6urq6urq6urq6urq6urq6urq6urMDEyMzQ1Njc4OWFiY2RlZmZlZGNiYTk4NzY1NDMyMTABAAAAAwAAAAAAAwAAAAAA"
	if lines[1] != want {
		t.Errorf("block is %s", lines[1])
	}
	for name, text := range map[string]string{"block": lines[1], "auth": lines[3]} {
		if b, err := os.ReadFile(name); err != nil || string(b) != text {
			t.Errorf("file %s: %v", name, err)
		}
	}
	block, _ := base64.StdEncoding.DecodeString(lines[1])
	auth, _ := base64.StdEncoding.DecodeString(lines[3])
	if len(block) != 96 || len(auth) != 4096 {
		t.Fatalf("%d and %d bytes", len(block), len(auth))
	}
	checkSigned(t, block, auth[0x40:0x240], auth[0x240:0x240+1028])
	checkSigned(t, auth[0x240:0x240+1028], auth[0x680:0x880], auth[0x880:0x880+1028])
	if oracle() != "" {
		_, theirs := runOracle(t, "generate", "id-block", "id.pem", "auth.pem", "0x"+digest)
		their, _ := base64.StdEncoding.DecodeString(strings.Split(theirs, "\n")[3])
		for _, part := range [][2]int{{0, 0x40}, {0x240, 0x680}, {0x880, 0x1000}} {
			if !bytes.Equal(auth[part[0]:part[1]], their[part[0]:part[1]]) {
				t.Errorf("auth block differs from virtee's in %#x to %#x", part[0], part[1])
			}
		}
	}
}
