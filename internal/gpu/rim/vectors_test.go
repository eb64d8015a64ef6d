package rim_test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"coffer/internal/gpu/certs"
	"coffer/internal/gpu/rim"
	"coffer/internal/testenv"
)

// vectors is where the samples of public NVIDIA repositories lie: beside the
// repository, never in it.
const vectors = "../../../../shared/vectors/gpu"

type expected struct {
	File, SHA256, RimVersion, Product, TagID    string
	Bytes                                       int
	ActiveIndices                               []int
	MaxAlternatives                             int
	XMLSig                                      string
	NCerts                                      int
	LeafCN                                      string
	LeafNotBefore, LeafNotAfter                 time.Time
	ChainNow, ChainAtLeafNotBeforePlus1h        string
	ChainValidFrom, ChainValidTo, clockWhenMade time.Time
}

func readExpected(t *testing.T) []expected {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(vectors, "expected.json"))
	if errors.Is(err, os.ErrNotExist) {
		t.Skip("the samples of vectors/gpu are not here; they are used from beside the repository and never copied")
	}
	var all struct {
		Clock time.Time `json:"clock_when_made"`
		RIMs  []expected
	}
	if err := json.Unmarshal(text, &all); err != nil {
		t.Fatal(err)
	}
	for i := range all.RIMs {
		all.RIMs[i].clockWhenMade = all.Clock
	}
	return all.RIMs
}

// outcome names what Verify found, in the words of expected.json.
func outcome(err error) (signature, chain string) {
	switch {
	case errors.Is(err, rim.ErrDigest):
		return "digest mismatch", ""
	case errors.Is(err, rim.ErrSignature):
		return "signature wrong", ""
	case errors.Is(err, rim.ErrChain):
		return "ok", "x509: certificate signed by unknown authority"
	case errors.Is(err, rim.ErrExpired):
		return "ok", "expired"
	case err != nil:
		return err.Error(), ""
	}
	return "ok", "ok"
}

func TestVectors(t *testing.T) {
	for _, want := range readExpected(t) {
		t.Run(want.File, func(t *testing.T) {
			data, err := os.ReadFile(filepath.Join(vectors, want.File))
			if err != nil {
				t.Fatal(err)
			}
			if sum := sha256.Sum256(data); hex.EncodeToString(sum[:]) != want.SHA256 || len(data) != want.Bytes {
				t.Fatal("this is another file than the one expected.json speaks of")
			}
			r, err := rim.Parse(data)
			if err != nil {
				t.Fatal(err)
			}
			var active []int
			most := 0
			for _, e := range r.Entries {
				if most = max(most, len(e.Values)); e.Active {
					active = append(active, e.Index)
				}
			}
			if !slices.Equal(active, want.ActiveIndices) || most != want.MaxAlternatives || r.Active() != len(active) {
				t.Errorf("active %v with up to %d alternatives, want %v and %d", active, most, want.ActiveIndices, want.MaxAlternatives)
			}
			if r.Version != want.RimVersion || r.Product != want.Product || r.TagID != want.TagID || r.OEMID != "5703" {
				t.Errorf("version %q product %q tag %q oem %q", r.Version, r.Product, r.TagID, r.OEMID)
			}
			leaf := r.Chain[0]
			if len(r.Chain) != want.NCerts || leaf.Subject.CommonName != want.LeafCN || !leaf.NotBefore.Equal(want.LeafNotBefore) || !leaf.NotAfter.Equal(want.LeafNotAfter) {
				t.Errorf("%d certificates, leaf %s from %s to %s", len(r.Chain), leaf.Subject.CommonName, leaf.NotBefore, leaf.NotAfter)
			}
			if from, to := certs.Validity(r.Chain); !from.Equal(want.ChainValidFrom) || !to.Equal(want.ChainValidTo) {
				t.Errorf("chain valid from %s to %s, want %s to %s", from, to, want.ChainValidFrom, want.ChainValidTo)
			}
			for _, at := range []struct {
				now   time.Time
				chain string
			}{
				{want.clockWhenMade, want.ChainNow},
				{want.LeafNotBefore.Add(time.Hour), want.ChainAtLeafNotBeforePlus1h},
				{want.ChainValidTo.Add(time.Second), "expired"},
				{want.ChainValidFrom.Add(-time.Second), "expired"},
			} {
				signature, chain := outcome(r.Verify(certs.RIMRoot(), at.now))
				if signature != want.XMLSig {
					t.Errorf("at %s: signature %q, want %q", at.now, signature, want.XMLSig)
				}
				if unknown := want.NCerts == 2; signature == "ok" && chain != at.chain && !unknown {
					t.Errorf("at %s: chain %q, want %q", at.now, chain, at.chain)
				} else if unknown && chain != want.ChainNow {
					t.Errorf("at %s: chain %q, want %q", at.now, chain, want.ChainNow)
				}
			}
		})
	}
}

// TestXMLSec compares our verdict on every RIM with that of xmlsec1, at a time
// at which its chain is valid and at one at which it has expired.
func TestXMLSec(t *testing.T) {
	all := readExpected(t)
	xmlsec := testenv.LookTool(t, "xmlsec1")
	for _, want := range all {
		for _, now := range []time.Time{want.ChainValidFrom.Add(time.Hour), want.ChainValidTo.Add(time.Hour)} {
			file := filepath.Join(vectors, want.File)
			out, err := exec.Command(xmlsec, "--verify", "--trusted-pem", filepath.Join(vectors, "roots/verifier_RIM_root.pem"),
				"--verification-time", now.UTC().Format("2006-01-02 15:04:05"), file).CombinedOutput()
			data, _ := os.ReadFile(file)
			r, parseErr := rim.Parse(data)
			if parseErr != nil {
				t.Fatal(parseErr)
			}
			if ours := r.Verify(certs.RIMRoot(), now); (ours == nil) != (err == nil) {
				t.Errorf("%s at %s: we say %v, xmlsec1 %v\n%s", want.File, now, ours, err, out)
			}
		}
	}
}
