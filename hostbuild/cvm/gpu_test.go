package cvm

import (
	"bytes"
	"encoding/json"
	"encoding/pem"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"coffer/hostbuild/base"
	"coffer/hostbuild/bundle"
	"coffer/hostbuild/kbs"
	"coffer/hostbuild/register"
	"coffer/internal/guestconfig"
	"coffer/internal/snp"
	"coffer/test/gpusim"
	"coffer/test/simsnp"
)

// asH has the rig's KBS answer as newer Trustee does.
func (r *rig) asH(t *testing.T) {
	t.Helper()
	server, err := kbs.New(kbs.Options{Dir: filepath.Join(r.dir, "kbs"), Dialect: kbs.DialectH, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	ctx := t.Context() // ends before Cleanup
	go func() { defer close(done); server.Serve(ctx, l) }()
	t.Cleanup(func() { <-done })
	r.settings.KBSURL = "https://" + l.Addr().String()
	r.settings.KBSGuestURL = r.settings.KBSURL
}

// withGPUs has the rig's base say that it has a driver.
func (r *rig) withGPUs(t *testing.T) {
	t.Helper()
	file := filepath.Join(r.settings.BaseDir, "base.json")
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var doc map[string]any
	if err := json.Unmarshal(data, &doc); err != nil {
		t.Fatal(err)
	}
	doc["gpu"] = base.GPU{Driver: "570.124.06"}
	if data, err = json.Marshal(doc); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, data, 0o644); err != nil {
		t.Fatal(err)
	}
}

func (r *rig) append(t *testing.T, text string) {
	t.Helper()
	old, err := os.ReadFile(r.config)
	if err != nil {
		t.Fatal(err)
	}
	r.write(t, "CONFIG.yaml", append(old, text...))
}

func TestGPU(t *testing.T) {
	r := newRig(t)
	w := gpusim.NewWorld()
	rims, answers := filepath.Join(r.dir, "rims"), filepath.Join(r.dir, "answers")
	for _, dir := range []string{rims, answers} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	r.append(t, "gpu:\n  required: true\n  count: 2\n  rims: "+rims+"\n  ocsp: allow_cached\n  ocsp_answers: "+answers+"\n  resources: [site/data/one]\nvceks: "+filepath.Join(r.dir, "vceks")+"\n")
	chip, err := simsnp.New(simsnp.Params{})
	if err != nil {
		t.Fatal(err)
	}
	var vcek []byte
	for _, c := range chip.Certs() {
		if c.Type == snp.VCEK {
			vcek = c.Data
		} else {
			r.write(t, "vceks/other.der", c.Data)
		}
	}
	r.write(t, "vceks/one.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: vcek}))
	fails := func(want string) {
		t.Helper()
		if _, err := Build(t.Context(), r.params(t)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	fails("has no driver for any")
	r.withGPUs(t)
	fails("gpu.rims: " + rims + " holds no file *.xml; hostbuild rim fetch --dir " + rims)
	if err := w.NewRIMs(w.NewDevice("HOPPER")).Write(rims); err != nil {
		t.Fatal(err)
	}
	r.write(t, "rims/broken.xml", []byte("<x/>"))
	fails("gpu.rims: ")
	if err := os.Remove(filepath.Join(rims, "broken.xml")); err != nil {
		t.Fatal(err)
	}
	r.write(t, "answers/0a.ocsp", []byte("an answer"))
	fails("not of a chip (SEV-VCEK)")
	if err := os.Remove(filepath.Join(r.dir, "vceks/other.der")); err != nil {
		t.Fatal(err)
	}
	fails("gpu.mode local+trustee: KBS " + r.settings.KBSURL)
	fails("of a generation (Trustee before v0.17")
	if ids := r.rules(t); len(ids) != 0 {
		t.Errorf("rules of builds that failed: %v", ids)
	}

	r.asH(t)
	res := r.build(t)
	id := res.Manifest.CVMID
	rules, err := register.Rules(r.settings.PolicyDir)
	if err != nil || len(rules) != 1 {
		t.Fatalf("rules %v, %v", rules, err)
	}
	if want := []string{"keys/canary/" + id, "keys/root/" + id, "keys/vault/" + id, "site/data/one"}; !slices.Equal(rules[0].Paths, want) {
		t.Errorf("paths %v", rules[0].Paths)
	}
	if want := []string{"keys/canary/" + id, "keys/vault/" + id, "site/data/one"}; !slices.Equal(rules[0].GPUPaths, want) {
		t.Errorf("paths for GPUs %v", rules[0].GPUPaths)
	}
	var keys [2]string
	for i, kind := range []string{"root", "vault"} {
		b, err := os.ReadFile(filepath.Join(r.dir, "kbs/repository/keys", kind, id))
		if err != nil || len(b) != 128 {
			t.Errorf("key of %s: %d bytes, %v", kind, len(b), err)
		}
		keys[i] = string(b)
	}
	if keys[0] == keys[1] {
		t.Error("/vault has the root's key")
	}
	dir, err := bundle.Unpack(t.Context(), res.Path, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	initrd, err := os.ReadFile(filepath.Join(dir, bundle.Initrd))
	if err != nil {
		t.Fatal(err)
	}
	gc, err := bundle.GuestConfig(initrd)
	if err != nil {
		t.Fatal(err)
	}
	g := gc.GPU
	if g == nil || g.Mode != guestconfig.GPULocalTrustee || g.Count != 2 || len(g.RIMs) != 2 || g.VaultKeyPath != "keys/vault/"+id || g.OCSP != "allow_cached" {
		t.Errorf("guest config: %+v", g)
	}
	if !slices.Contains(gc.API.Resources, "site/data/one") {
		t.Errorf("the workload may ask for %v", gc.API.Resources)
	}
	if len(gc.VCEKs) != 1 || !bytes.Equal(gc.VCEKs[0], vcek) {
		t.Errorf("%d certificates of chips", len(gc.VCEKs))
	}
	p := r.params(t)
	whole := VerifyParams{Bundle: res.Path, Config: p.Config, Settings: p.Settings}
	if out := verify(t, whole); out != "" {
		t.Errorf("a fresh bundle differs:\n%s", out)
	}
	r.write(t, "answers/0b.ocsp", []byte("another answer"))
	if out := verify(t, whole); !strings.Contains(out, "disk.verity.root_hash") {
		t.Errorf("another answer changes nothing:\n%s", out)
	}

	// What a build that was killed had not yet stored is no fault; what people have
	// stored stays.
	reg, err := register.Open(r.settings)
	if err != nil {
		t.Fatal(err)
	}
	r.write(t, "kbs/repository/site/data/one", []byte("data"))
	for range 2 {
		if err := reg.ForgetCVM(t.Context(), rules[0]); err != nil {
			t.Errorf("forget: %v", err)
		}
	}
	for name, want := range map[string]bool{"keys/root/" + id: false, "keys/vault/" + id: false, "keys/canary/" + id: false, "site/data/one": true} {
		if _, err := os.Stat(filepath.Join(r.dir, "kbs/repository", name)); (err == nil) != want {
			t.Errorf("%s is there: %t, want %t", name, err == nil, want)
		}
	}
}
