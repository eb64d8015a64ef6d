// Package nvflare runs the real `nvflare provision` of PyPI with our cvm_build as
// its build_image_cmd: two sites and a server, and the mistakes that NVFlare lets
// pass. `make test-nvflare` installs what it needs.
//
// NVFlare's fixed sleeps of 100 s are left out by testdata/sitecustomize.py.
package nvflare

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"coffer/hostbuild/bundle"
	"coffer/hostbuild/disk"
	"coffer/internal/testenv"
	"coffer/internal/treedigest"
	"coffer/test/dockersave"
	"coffer/test/harness"
)

// versions of NVFlare; the first runs the failing cases, too.
var versions = []string{"2.9.0", "2.7.3"}

// rig is a build host with NVFlare, and a KBS.
type rig struct {
	env      *harness.Env
	kbs      *harness.KBS
	settings string
	venv     string
	aid      string
}

func newRig(t *testing.T, version string) *rig {
	t.Helper()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{env: &harness.Env{Bin: filepath.Join(root, "bin"), Base: filepath.Join(root, "build/base/simulated"), Dir: t.TempDir(), Log: new(bytes.Buffer)},
		venv: filepath.Join(root, "build/nvflare", version), aid: filepath.Join(root, "test/nvflare/testdata")}
	for _, p := range []string{r.env.Bin + "/cvm_build", r.env.Base + "/base.json", r.venv + "/bin/nvflare"} {
		_, err := os.Stat(p)
		testenv.Need(t, err == nil, p+" is missing: make test-nvflare")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if r.kbs, err = r.env.StartKBS(ctx, "kbs"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.kbs.Stop)
	if r.settings, err = r.kbs.Settings(); err != nil {
		t.Fatal(err)
	}
	return r
}

// project is what a project admin has in front of him.
type project struct {
	*rig
	t   *testing.T
	dir string // the working directory, and the home folder

	builders []string          // the last three, in their order
	cc       map[string]string // site to its CC file, or "" for none
}

const (
	ccBuilder        = "nvflare.lighter.cc_provision.impl.cc.CCBuilder"
	certBuilder      = "nvflare.lighter.impl.cert.CertBuilder"
	signatureBuilder = "nvflare.lighter.impl.signature.SignatureBuilder"
)

// newProject is the deployment guide's, with a second site, and with the builders
// in the order that works.
func (r *rig) newProject(t *testing.T) *project {
	t.Helper()
	p := &project{rig: r, t: t, dir: t.TempDir(), builders: []string{certBuilder, ccBuilder, signatureBuilder}, cc: map[string]string{}}
	p.image("image.tar.gz", "filelock")
	for site, role := range map[string]string{"server1": "server", "site-1": "client", "site-2": "client"} {
		p.cc[site] = fmt.Sprintf(`compute_env: onprem_cvm
cc_cpu_mechanism: amd_sev_snp
role: %s

# All drive sizes are in GB
root_drive_size: 1
applog_drive_size: 1
user_config_drive_size: 1
user_data_drive_size: 1
docker_archive: %s/image.tar.gz

# will be mount inside docker "/user_config/nvflare"
user_config:
  nvflare: /tmp/startup_kits

cc_issuers:
  - id: snp_authorizer
    path: nvflare.app_opt.confidential_computing.snp_authorizer.SNPAuthorizer
    token_expiration: 100 # seconds, needs to be less than check_frequency

cc_attestation:
  check_frequency: 120 # seconds
  failure_action: stop_job
`, role, p.dir)
	}
	p.cc["server1"] += "allowed_ports:\n - 8002\n\nallowed_out_ports:\n- 443\n- 8002\n- 8999\n"
	p.cc["site-1"] += "hosts_entries:\n   server1: 10.176.200.152\n"
	p.cc["site-2"] += "host_entries:\n   server1: 10.176.200.152\n"
	return p
}

func (p *project) edit(site, from, to string) {
	p.t.Helper()
	if !strings.Contains(p.cc[site], from) {
		p.t.Fatalf("the CC file of %s has no %q", site, from)
	}
	p.cc[site] = strings.ReplaceAll(p.cc[site], from, to)
}

func (p *project) write(name, text string) {
	p.t.Helper()
	if err := os.WriteFile(filepath.Join(p.dir, name), []byte(text), 0o644); err != nil {
		p.t.Fatal(err)
	}
}

func (p *project) image(name string, modules ...string) {
	p.t.Helper()
	entries := []dockersave.Entry{{Name: "usr/bin/python3", Mode: 0o755, Body: []byte("#!/bin/false\n")}}
	for _, m := range modules {
		entries = append(entries, dockersave.Entry{Name: "usr/local/lib/python3.12/site-packages/" + m + "/__init__.py", Body: []byte("#\n")})
	}
	layer, err := dockersave.Layer(entries...)
	if err != nil {
		p.t.Fatal(err)
	}
	im := dockersave.Image{Tag: "nvflare-site:1", Entrypoint: []string{"/user_config/nvflare/startup/sub_start.sh", "--verify"}, Layers: [][]byte{layer}}
	if err := im.SaveLegacy(filepath.Join(p.dir, name)); err != nil {
		p.t.Fatal(err)
	}
}

// provision runs `nvflare provision`. output is its standard output: what our
// program printed, and NVFlare's own lines.
func (p *project) provision(settings string) (output string, rc int) {
	p.t.Helper()
	yaml := "api_version: 3\nname: example_project\ndescription: NVIDIA FLARE sample project yaml file\nparticipants:\n"
	for _, site := range []string{"server1", "site-1", "site-2"} {
		text, ok := p.cc[site]
		if !ok {
			continue
		}
		yaml += fmt.Sprintf("  - name: %s\n    type: client\n    org: nvidia\n    cc_config: cc_%s.yml\n", site, site)
		p.write("cc_"+site+".yml", text)
	}
	yaml = strings.Replace(yaml, "type: client\n", "type: server\n    fed_learn_port: 8002\n", 1)
	yaml += `  - name: admin@nvidia.com
    type: admin
    org: nvidia
    role: project_admin
builders:
  - path: nvflare.lighter.impl.workspace.WorkspaceBuilder
  - path: nvflare.lighter.impl.static_file.StaticFileBuilder
    args:
      config_folder: config
`
	for _, b := range p.builders {
		yaml += "  - path: " + b + "\n"
	}
	yaml += "packager:\n  path: nvflare.lighter.cc_provision.impl.onprem_packager.OnPremPackager\n  args:\n    build_image_cmd: " + p.env.Bin + "/cvm_build\n"
	p.write("project.yml", yaml)
	if err := os.MkdirAll(filepath.Join(p.dir, "kits"), 0o755); err != nil {
		p.t.Fatal(err)
	}
	// Where it stands still for ever, that is the dead-lock.
	ctx, cancel := context.WithTimeout(p.t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, p.venv+"/bin/nvflare", "provision", "-p", "project.yml")
	cmd.Dir = p.dir
	cmd.Env = append(os.Environ(), "PYTHONPATH="+p.aid, "KEEP_KITS="+p.dir+"/kits", "PYTHONDONTWRITEBYTECODE=1", "HOME="+p.dir, "COFFER_SETTINGS="+settings)
	cmd.WaitDelay = 5 * time.Second
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	if ctx.Err() != nil {
		p.t.Fatalf("nvflare provision does not end\n%s%s", tail(out.String()), errOut.String())
	}
	if cmd.ProcessState == nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() {
		if p.t.Failed() {
			p.t.Logf("nvflare provision printed:\n%s\nand on standard error:\n%s", tail(out.String()), errOut.String())
		}
	})
	return out.String(), cmd.ProcessState.ExitCode()
}

func tail(s string) string {
	lines := strings.Split(s, "\n")
	return strings.Join(lines[max(0, len(lines)-40):], "\n")
}

// bundles are the files in the output folder, hidden ones included.
func (r *rig) bundles(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(r.kbs.Dir, "bundles"))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func (r *rig) rules(t *testing.T) int {
	t.Helper()
	out, err := r.env.Run(t.Context(), "hostbuild", "--settings", r.settings, "policy", "list")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(out, "cvm_")
}

func TestProvision(t *testing.T) {
	for _, version := range versions {
		t.Run(version, func(t *testing.T) {
			r := newRig(t, version)
			p := r.newProject(t)
			// The home folder and the working directory are where a path may count from.
			p.edit("site-1", p.dir+"/image.tar.gz", "~/image.tar.gz")
			p.edit("site-2", p.dir+"/image.tar.gz", "image.tar.gz")
			// More warnings than a pipe holds: NVFlare's reader must live through them.
			var many strings.Builder
			for i := range 3000 {
				fmt.Fprintf(&many, "from_the_future_%d: some value\n", i)
			}
			p.cc["site-2"] += many.String()

			output, rc := p.provision(r.settings)
			if rc != 0 {
				t.Fatalf("exit code %d", rc)
			}
			if n := strings.Count(output, "test aid: NVFlare's sleep of 100 s is left out"); n != 3 {
				t.Errorf("%d sleeps were left out, want 3: is the test aid loaded?", n)
			} else {
				t.Log("NVFlare's 3 sleeps of 100 s were left out by the test aid")
			}
			if n := strings.Count(output, "unknown key from_the_future_"); n != 3000 {
				t.Errorf("%d warnings of unknown keys, want 3000", n)
			}
			// The guide's sites cannot reach their server.
			if n := strings.Count(output, "warning: allowed_out_ports has no 8002: this site connects to server1:8002"); n != 2 {
				t.Errorf("%d warnings of a shut port, want 2", n)
			}
			for site := range p.cc {
				t.Run(site, func(t *testing.T) { checkSite(t, p, site) })
			}
			if got := r.bundles(t); len(got) != len(p.cc) || r.rules(t) != len(p.cc) {
				t.Errorf("%d rules, and bundles %v", r.rules(t), got)
			}
		})
	}
}

// checkSite compares what a site gets with what NVFlare provisioned.
func checkSite(t *testing.T, p *project, site string) {
	original := filepath.Join(p.dir, "kits", site)
	kit := filepath.Join(p.dir, "workspace/example_project/prod_00", site)
	if entries, err := os.ReadDir(kit); err != nil || len(entries) != 1 || entries[0].Name() != site+".tgz" {
		t.Fatalf("the site gets %v, %v", entries, err)
	}
	dir := t.TempDir()
	if out, err := exec.Command("tar", "-zxf", filepath.Join(kit, site+".tgz"), "-C", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	found, err := filepath.Glob(dir + "/cvm_*")
	if err != nil || len(found) != 1 {
		t.Fatalf("the bundle holds %v", found)
	}
	var names []string
	entries, _ := os.ReadDir(found[0])
	for _, e := range entries {
		names = append(names, e.Name())
	}
	for _, want := range strings.Fields("applog.qcow2 crypt_root.qcow2 initrd.img launch_vm.sh OVMF.amdsev.fd README.txt user_config.qcow2 user_data.qcow2 vmlinuz") {
		if !slices.Contains(names, want) {
			t.Errorf("the bundle lacks %s", want)
		}
	}

	copied := filepath.Join(t.TempDir(), "nvflare")
	extract(t, filepath.Join(found[0], "user_config.qcow2"), "/nvflare", copied)
	sameTrees(t, original, copied)
	if t.Failed() {
		return
	}

	// NVFlare's own check accepts what came out of the drive.
	verify := exec.Command(p.venv+"/bin/python3", "-c",
		"import sys; from nvflare.lighter.utils import verify_folder_signature as v; sys.exit(0 if v(sys.argv[1], sys.argv[1] + '/startup/rootCA.pem', single_signer=True, signature_file='signature.json') else 3)", copied)
	if out, err := verify.CombinedOutput(); err != nil {
		t.Errorf("NVFlare does not accept the kit: %v\n%s", err, out)
	}

	raw, err := os.ReadFile(filepath.Join(found[0], "manifest.json"))
	if err != nil {
		t.Fatal(err)
	}
	var m bundle.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		t.Fatal(err)
	}
	tree, err := treedigest.Scan(map[string]string{"nvflare": original})
	if err != nil {
		t.Fatal(err)
	}
	if m.UserConfig.Integrity != "pinned" || m.UserConfig.Digest != tree.Digest() {
		t.Errorf("the guest pins %+v, and the kit is %s", m.UserConfig, tree.Digest())
	}
	wantHosts := map[string]string{"server1": "10.176.200.152"}
	if site == "server1" {
		wantHosts = nil
		if len(m.Network.AllowedPorts) != 1 || len(m.Network.AllowedOutPorts) != 3 {
			t.Errorf("ports %v, %v", m.Network.AllowedPorts, m.Network.AllowedOutPorts)
		}
	}
	if fmt.Sprint(m.Network.Hosts) != fmt.Sprint(wantHosts) {
		t.Errorf("hosts %v, want %v", m.Network.Hosts, wantHosts)
	}
	if m.Attestation.CheckFrequency != 120 || m.Attestation.FailureAction != "stop_job" {
		t.Errorf("attestation %+v", m.Attestation)
	}
}

// extract copies a folder out of a drive, modes and all.
func extract(t *testing.T, drive, from, to string) {
	t.Helper()
	entries, err := disk.ListDrive(t.Context(), drive, from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(to, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		name, target := from+"/"+e.Name, filepath.Join(to, e.Name)
		if e.UID != 0 || e.GID != 0 {
			t.Errorf("%s belongs to %d:%d", name, e.UID, e.GID)
		}
		if e.Mode&0o170000 == 0o040000 {
			extract(t, drive, name, target)
		} else {
			f, err := os.Create(target)
			if err != nil {
				t.Fatal(err)
			}
			if err := disk.ReadDrive(t.Context(), drive, f, name); err != nil {
				t.Fatal(err)
			}
			f.Close()
		}
		if err := os.Chmod(target, fs.FileMode(e.Mode&0o777)); err != nil {
			t.Fatal(err)
		}
	}
}

// sameTrees compares two folders file by file, modes included.
func sameTrees(t *testing.T, a, b string) {
	t.Helper()
	list := func(root string) map[string]string {
		files := map[string]string{}
		err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
			if err != nil || name == root {
				return err
			}
			info, err := d.Info()
			if err != nil {
				return err
			}
			content := []byte("a folder")
			if !d.IsDir() {
				if content, err = os.ReadFile(name); err != nil {
					return err
				}
			}
			rel, _ := filepath.Rel(root, name)
			files[rel] = fmt.Sprintf("%v %s", info.Mode(), content)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return files
	}
	want, got := list(a), list(b)
	if len(want) < 15 {
		t.Errorf("a kit of %d files is none", len(want))
	}
	for name, w := range want {
		if got[name] != w {
			t.Errorf("%s differs:\n%.200s\n%.200s", name, w, got[name])
		}
		delete(got, name)
	}
	for name := range got {
		t.Errorf("%s was added", name)
	}
}

// What NVFlare lets pass, or would fail at without a word why, is an error of ours:
// its cause is the last line before NVFlare's own "This is likely a bug", the exit
// code is not 0, and no bundle and no rule is left.
func TestFailures(t *testing.T) {
	r := newRig(t, versions[0])
	gpu := "cc_issuers:\n  - id: gpu_authorizer\n    path: nvflare.app_opt.confidential_computing.gpu_authorizer.GPUAuthorizer\n    token_expiration: 100\n"
	for _, tc := range []struct {
		name    string
		change  func(p *project) (settings string)
		want    string // in the last line
		nvflare string // what NVFlare itself makes of it, elsewhere in its output
	}{
		{"compute_env switches CC off", func(p *project) string {
			p.edit("server1", "onprem_cvm", "onprem-cvm")
			return ""
		}, `compute_env: "onprem-cvm" switches confidential computing off at NVFlare; only onprem_cvm is a CVM`, "CC is not enabled for server1: Invalid compute environment"},
		{"another CC environment", func(p *project) string {
			p.edit("server1", "onprem_cvm", "mock")
			return ""
		}, `compute_env: "mock" switches confidential computing off`, ""},
		{"no CCBuilder", func(p *project) string {
			p.builders = []string{certBuilder, signatureBuilder}
			return ""
		}, "server1 has no cc_manager: NVFlare made this site without confidential computing", ""},
		{"the deployment guide's order", func(p *project) string {
			p.builders = []string{certBuilder, signatureBuilder, ccBuilder}
			return ""
		}, "no signature covers local/cc_manager__p_resources.json, local/snp_authorizer__p_resources.json; ", ""},
		{"include", func(p *project) string {
			p.write("common.yml", "compute_env: onprem_cvm\n")
			p.edit("server1", "compute_env: onprem_cvm\n", "include: common.yml\n")
			return ""
		}, "include: NVFlare resolves include: only for itself", ""},
		{"authorizer of another site", func(p *project) string {
			p.edit("site-2", "cc_issuers:\n", gpu)
			return ""
		}, `the image has no Python module nv_attestation_sdk, which the authorizer "gpu_authorizer"`, ""},
		{"image without filelock", func(p *project) string {
			p.image("image.tar.gz")
			return ""
		}, "the image has no Python module filelock", ""},
		{"bundle inside the kit", func(p *project) string {
			return p.setting("output_dir", p.dir+"/workspace/example_project/prod_00/server1/out")
		}, "lies inside of " /* the kit */, ""},
		{"blank in the bundle's path", func(p *project) string {
			return p.setting("output_dir", p.dir+"/two words")
		}, `holds a blank, and NVFlare reads the bundle's path only up to one`, ""},
		{"missing archive", func(p *project) string {
			p.edit("server1", "image.tar.gz", "nothing.tar.gz")
			return ""
		}, "docker_archive: ", ""},
		{"misspelt key", func(p *project) string {
			p.cc["server1"] += "allowed_out_port: [443]\n"
			return ""
		}, "unknown key allowed_out_port: did you mean allowed_out_ports?", ""},
		{"KBS refuses the admin", func(p *project) string {
			other := filepath.Join(p.dir, "other-kbs")
			if _, err := p.env.Run(t.Context(), "hostbuild", "kbs", "init", other, "--host", "127.0.0.1"); err != nil {
				t.Fatal(err)
			}
			return p.setting("  admin_key", other+"/admin.key")
		}, "KBS https://127.0.0.1:", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := r.newProject(t)
			settings := tc.change(p)
			if settings == "" {
				settings = r.settings
			}
			output, rc := p.provision(settings)
			if rc == 0 {
				t.Error("nvflare provision ends with 0")
			}
			lines := strings.Split(strings.TrimSpace(output), "\n")
			if last := lines[len(lines)-1]; !strings.HasPrefix(last, "hostbuild: ") || !strings.Contains(last, tc.want) {
				t.Errorf("the last line is %q, want %q", last, tc.want)
			}
			if !strings.Contains(output, tc.nvflare) {
				t.Errorf("NVFlare does not say %q any more", tc.nvflare)
			}
			if got := r.bundles(t); len(got) != 0 || r.rules(t) != 0 {
				t.Errorf("%d rules, and left over: %v", r.rules(t), got)
			}
			if _, err := os.Stat(filepath.Join(p.dir, "workspace/example_project/prod_00/server1/startup")); err != nil {
				t.Errorf("the kit is gone: %v", err)
			}
		})
	}
}

// setting writes the settings with one key changed.
func (p *project) setting(key, value string) string {
	p.t.Helper()
	b, err := os.ReadFile(p.settings)
	if err != nil {
		p.t.Fatal(err)
	}
	lines := strings.Split(string(b), "\n")
	i := slices.IndexFunc(lines, func(l string) bool { return strings.HasPrefix(l, key+":") })
	if i < 0 {
		p.t.Fatalf("no %s in %s", key, b)
	}
	lines[i] = key + ": " + value
	p.write("settings.yaml", strings.Join(lines, "\n"))
	return filepath.Join(p.dir, "settings.yaml")
}
