package nvflare

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"coffer/internal/guestconfig"
	"coffer/test/flarekit"
)

func makeKit(t *testing.T, k flarekit.Kit) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "a [kit]", "server1") // nothing in a name is a pattern
	if err := k.Make(dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestCheck(t *testing.T) {
	issuers := []string{"snp_authorizer"}
	edit := func(t *testing.T, name, text string) func(string) {
		return func(dir string) {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	remove := func(name string) func(string) { return func(dir string) { os.RemoveAll(filepath.Join(dir, name)) } }
	for _, tc := range []struct {
		name    string
		kit     flarekit.Kit
		issuers []string
		change  func(dir string)
		want    []string // in the error; none: no error
	}{
		{"server", flarekit.Kit{}, issuers, nil, nil},
		{"client", flarekit.Kit{Role: "client"}, issuers, nil, nil},
		{"CC switched off", flarekit.Kit{NoCC: true}, issuers, nil, []string{"has no cc_manager", "compute_env: onprem_cvm"}},
		{"the guide's order", flarekit.Kit{SignFirst: true}, issuers, nil,
			[]string{"no signature covers local/cc_manager__p_resources.json, local/snp_authorizer__p_resources.json", "CCBuilder must come before SignatureBuilder"}},
		{"issuer without authorizer", flarekit.Kit{}, []string{"gpu_authorizer"}, nil, []string{`has no authorizer "gpu_authorizer"`}},
		{"authorizer removed", flarekit.Kit{}, nil, remove("local/snp_authorizer__p_resources.json"),
			[]string{`has no authorizer "snp_authorizer"`, "local/snp_authorizer__p_resources.json is signed, but not there; provision again"}},
		{"manager removed", flarekit.Kit{}, nil, remove("local/cc_manager__p_resources.json"), []string{"has no cc_manager"}},
		{"file changed", flarekit.Kit{}, issuers, edit(t, "startup/sub_start.sh", "#!/bin/evil\n"), []string{"changed after they were signed: startup/sub_start.sh;"}},
		{"file added", flarekit.Kit{}, issuers, edit(t, "transfer/x", ""), []string{"no signature covers transfer/x;"}},
		{"signatures removed", flarekit.Kit{}, issuers, remove("local/signature.json"), []string{"local/signature.json: no such file", "provision again"}},
		{"link added", flarekit.Kit{}, issuers, func(dir string) { os.Symlink("/etc/passwd", dir+"/transfer/x") }, []string{"transfer/x is neither file nor folder"}},
		{"no kit", flarekit.Kit{}, issuers, remove("startup"), []string{"is no startup kit of an NVFlare server or client", "fed_server.json"}},
		{"root certificate", flarekit.Kit{}, issuers, edit(t, rootFile, "-"), []string{"startup/rootCA.pem holds no certificate"}},
		{"components", flarekit.Kit{}, issuers, edit(t, "local/cc_manager__p_resources.json", "{"), []string{"local/cc_manager__p_resources.json: unexpected end"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := makeKit(t, tc.kit)
			if tc.change != nil {
				tc.change(dir)
			}
			_, err := Check(dir, tc.issuers)
			if len(tc.want) == 0 && err != nil {
				t.Fatal(err)
			}
			for _, want := range tc.want {
				if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), dir) {
					t.Errorf("error %v\nwant %q, and the kit's folder", err, want)
				}
			}
		})
	}
}

func TestCheckImage(t *testing.T) {
	dir := makeKit(t, flarekit.Kit{Authorizers: map[string]string{"snp_authorizer": flarekit.SNP, "gpu_authorizer": flarekit.GPU, "mine": "my.Authorizer"}})
	k, err := Check(dir, []string{"snp_authorizer"})
	if err != nil {
		t.Fatal(err)
	}
	if err := k.CheckImage([]string{"filelock", "nv_attestation_sdk", "numpy"}); err != nil {
		t.Error(err)
	}
	err = k.CheckImage([]string{"filelock"})
	if err == nil || strings.Contains(err.Error(), "filelock") || !strings.Contains(err.Error(), "no Python module nv_attestation_sdk") ||
		!strings.Contains(err.Error(), "it belongs to another site") || !strings.Contains(err.Error(), "pip install nv-attestation-sdk") {
		t.Errorf("another site's authorizer: %v", err)
	}
	err = k.CheckImage([]string{"nv_attestation_sdk"})
	if err == nil || !strings.Contains(err.Error(), "no Python module filelock") || strings.Contains(err.Error(), "another site") {
		t.Errorf("its own authorizer: %v", err)
	}
}

// The guide's own client opens no port, and would never reach its server.
func TestShutPort(t *testing.T) {
	open := []guestconfig.Port{{Port: 443, Proto: "tcp"}, {Port: 8002, Proto: "tcp"}}
	shut := []guestconfig.Port{{Port: 443, Proto: "tcp"}, {Port: 8002, Proto: "udp"}}
	for _, tc := range []struct {
		role    string
		in, out []guestconfig.Port
		want    string
	}{
		{"client", nil, open, ""},
		{"client", open, shut, "allowed_out_ports has no 8002: this site connects to server1:8002"},
		{"server", open, nil, ""},
		{"server", shut, open, "allowed_ports has no 8002: this site is reached at server1:8002"},
	} {
		k, err := Check(makeKit(t, flarekit.Kit{Role: tc.role}), nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := k.ShutPort(tc.in, tc.out); !strings.HasPrefix(got, tc.want) || tc.want == "" && got != "" {
			t.Errorf("%s, %v, %v: %q, want %q", tc.role, tc.in, tc.out, got, tc.want)
		}
	}

	// A client's of NVFlare 2.7 names the server elsewhere.
	dir := makeKit(t, flarekit.Kit{Role: "client"})
	k, err := Check(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	old := `{"servers": [{"service": {"scheme": "grpc"}}], "overseer_agent": {"args": {"sp_end_point": "server1:8002:8003"}}}`
	if err := os.WriteFile(filepath.Join(dir, "startup/fed_client.json"), []byte(old), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := k.ShutPort(open, open); got != "" {
		t.Errorf("2.7, open: %q", got)
	}
	if got := k.ShutPort(open, shut); !strings.Contains(got, "connects to server1:8002,") {
		t.Errorf("2.7, shut: %q", got)
	}
}
