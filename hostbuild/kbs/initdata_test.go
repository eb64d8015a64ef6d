package kbs

import (
	"bytes"
	"crypto/sha512"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"coffer/internal/snp"
	"coffer/test/simsnp"
)

func TestInitData(t *testing.T) {
	chip := newChip(t, simsnp.Params{})
	const body = "version = \"0.1.0\"\nalgorithm = \"sha384\"\n[data]\n\"site\" = \"one\"\n"
	sum := sha512.Sum384([]byte(body))
	text, _ := json.Marshal(body)
	good := `{"format":"toml","body":` + string(text) + `}`
	r := newRig(t, Options{AllowSimulated: true, SimulatedRoots: chip.RootsPEM()})
	for _, tt := range []struct {
		name, init string
		hostData   []byte
		status     int
		reason     string
	}{
		{"bound", good, sum[:32], 200, ""},
		{"not bound", good, nil, 401, "HOST_DATA"},
		{"bound to other text", good, bytes.Repeat([]byte{1}, 32), 401, "HOST_DATA"},
		{"host data without text", "null", sum[:32], 200, ""},
		{"other format", `{"format":"json","body":"{}"}`, nil, 401, "must be toml"},
		{"no TOML", `{"format":"toml","body":"="}`, nil, 401, "init-data"},
		{"no table", `{"format":"toml","body":"version=\"1\"\nalgorithm=\"sha256\""}`, nil, 401, "missing"},
		{"other algorithm", `{"format":"toml","body":"version=\"1\"\nalgorithm=\"md5\"\n[data]\n"}`, nil, 401, "algorithm"},
		{"values that are no strings", `{"format":"toml","body":"version=\"1\"\nalgorithm=\"sha256\"\n[data]\nx=1\n"}`, nil, 401, "init-data"},
	} {
		g := r.guest("snp").auth()
		raw := g.evidence(chip, chip.Certs(), func(r *snp.Report) { copy(r.HostData[:], tt.hostData) })
		a := g.attest(bytes.Replace(g.attestBody(raw, ""), []byte(`"init-data":null`), []byte(`"init-data":`+tt.init), 1))
		if l := r.log.last(t); a.status != tt.status || !strings.Contains(fmt.Sprint(l["reason"]), tt.reason) {
			t.Errorf("%s: %d %v, want %d %q", tt.name, a.status, l["reason"], tt.status, tt.reason)
		}
		if tt.name == "bound" {
			claims, err := r.server.tokens.verify(tokenIn(t, a), time.Now())
			if got := keysOf(evidenceOf(claims)["init_data_claims"].(map[string]any)); err != nil || got != "{site}" {
				t.Errorf("init_data_claims %s, %v", got, err)
			}
		}
	}
}

func FuzzInitData(f *testing.F) {
	f.Add([]byte(`{"format":"toml","body":"version=\"1\"\nalgorithm=\"sha256\"\n[data]\nx=\"y\"\n"}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if d, err := parseInitData(b); err == nil && d != nil && d.hostData == [32]byte{} {
			t.Error("accepted without a digest")
		}
	})
}
