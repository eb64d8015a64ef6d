package kbs

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"coffer/hostbuild/policy"
	"coffer/internal/snp"
	"coffer/kbsclient"
	"coffer/test/simsnp"
)

// attester gives a simulated chip's reports, or sample evidence without a chip.
type attester struct {
	chip        *simsnp.Chip
	measurement [48]byte
}

func (a attester) TEE() string {
	if a.chip == nil {
		return teeSample
	}
	return "snp"
}

func (a attester) Evidence(_ context.Context, digest [48]byte) (json.RawMessage, error) {
	if a.chip == nil {
		return sampleEvidence(digest), nil
	}
	var data [64]byte
	copy(data[:], digest[:])
	r, err := a.chip.Report(a.measurement, data, 0)
	if err != nil {
		return nil, err
	}
	return snp.EvidenceJSON(r.Marshal(), a.chip.Certs())
}

// TestWithOurClient goes the whole way: rules into the policy folder, key and
// policy to the server, key to the guest, and the rule's removal.
func TestWithOurClient(t *testing.T) {
	chip := newChip(t, simsnp.Params{})
	dialects(t, func(t *testing.T, d Dialect) {
		r := newRig(t, Options{Dialect: d, AllowSimulated: true, SimulatedRoots: chip.RootsPEM()})
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		ca, err := os.ReadFile(filepath.Join(r.dir, caCertFile))
		if err != nil {
			t.Fatal(err)
		}
		cfg := kbsclient.Config{URL: r.url, RootCAs: ca}
		adminPEM, err := os.ReadFile(filepath.Join(r.dir, adminKeyFile))
		if err != nil {
			t.Fatal(err)
		}
		key, err := kbsclient.ParseAdminKey(adminPEM)
		if err != nil {
			t.Fatal(err)
		}
		admin, err := kbsclient.NewAdmin(cfg, key)
		if err != nil {
			t.Fatal(err)
		}
		folder, err := policy.OpenFolder(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		upload := func(ctx context.Context, text []byte) error { return admin.SetResourcePolicy(ctx, text) }
		if err := admin.SetResource(ctx, keyPath, []byte(secret)); err != nil {
			t.Fatal(err)
		}
		_, err = folder.Update(ctx, func(rs *policy.Rules) error {
			return errors.Join(
				rs.Put(policy.Rule{CVMID: "one", Paths: []string{keyPath}, Digests: [][48]byte{measurement}, Simulated: true}),
				rs.Put(policy.Rule{CVMID: "smp", Paths: []string{"keys/root/smp"}, TEE: policy.TEESample}))
		}, upload)
		if err != nil {
			t.Fatal(err)
		}
		client, err := kbsclient.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		fetch := func(a attester, path string) ([]byte, error) {
			s, err := client.Attest(ctx, a)
			if err != nil {
				return nil, err
			}
			defer s.Close()
			return s.Resource(ctx, path)
		}
		good := attester{chip, measurement}
		if b, err := fetch(good, keyPath); err != nil || string(b) != secret {
			t.Fatalf("key: %q, %v\n%s", b, err, r.log)
		}
		changed := good
		changed.measurement[0] ^= 1
		if _, err := fetch(changed, keyPath); !errors.Is(err, kbsclient.ErrPolicyDenied) {
			t.Errorf("changed guest: %v, want ErrPolicyDenied", err)
		}
		if _, err := fetch(attester{}, keyPath); !errors.Is(err, kbsclient.ErrPolicyDenied) {
			t.Errorf("sample evidence: %v, want ErrPolicyDenied", err)
		}
		if _, err := fetch(attester{chip: newChip(t, simsnp.Params{}), measurement: measurement}, keyPath); !errors.Is(err, kbsclient.ErrAttestationRefused) {
			t.Errorf("stranger's chip: %v, want ErrAttestationRefused", err)
		}
		if _, err := fetch(attester{}, "keys/root/smp"); !errors.Is(err, kbsclient.ErrNoResource) {
			t.Errorf("allowed, but never stored: %v, want ErrNoResource", err)
		}
		if d == DialectT {
			if b, err := admin.ResourcePolicy(ctx); err != nil || string(b) != string(must(folder.Text())) {
				t.Errorf("policy read back: %v", err)
			}
		}
		session, err := client.Attest(ctx, good)
		if err != nil {
			t.Fatal(err)
		}
		defer session.Close()
		_, err = folder.Update(ctx, func(rs *policy.Rules) error { rs.Remove("one"); return nil }, upload)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := session.Resource(ctx, keyPath); !errors.Is(err, kbsclient.ErrPolicyDenied) {
			t.Errorf("after the rule's removal: %v, want ErrPolicyDenied", err)
		}
		err = admin.DeleteResource(ctx, keyPath)
		if d == DialectH && err != nil || d == DialectT && !errors.Is(err, kbsclient.ErrNotSupported) {
			t.Errorf("delete: %v", err)
		}
	})
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}

// BenchmarkKeyRelease is a whole handshake, a key's release and its decryption,
// over a kept TLS connection and over a new one for each call.
func BenchmarkKeyRelease(b *testing.B) {
	chip, err := simsnp.New(simsnp.Params{})
	if err != nil {
		b.Fatal(err)
	}
	r := newRig(b, Options{AllowSimulated: true, SimulatedRoots: chip.RootsPEM()})
	r.mustAdmin("POST", "/kbs/v0/resource/"+keyPath, []byte(secret))
	r.mustAdmin("POST", "/kbs/v0/resource/keys/root/smp", []byte(secret))
	r.setPolicy(rules(b, policy.Rule{CVMID: "one", Paths: []string{keyPath}, Digests: [][48]byte{measurement}, Simulated: true},
		policy.Rule{CVMID: "smp", Paths: []string{"keys/root/smp"}, TEE: policy.TEESample}))
	ca, err := os.ReadFile(filepath.Join(r.dir, caCertFile))
	if err != nil {
		b.Fatal(err)
	}
	for _, m := range []struct {
		name, path string
		a          attester
		kept       bool
	}{
		{"sample/kept", "keys/root/smp", attester{}, true}, {"sample/new", "keys/root/smp", attester{}, false},
		{"snp/kept", keyPath, attester{chip, measurement}, true}, {"snp/new", keyPath, attester{chip, measurement}, false},
	} {
		b.Run(m.name, func(b *testing.B) {
			client, err := kbsclient.New(kbsclient.Config{URL: r.url, RootCAs: ca})
			if err != nil {
				b.Fatal(err)
			}
			defer client.CloseIdle()
			var a kbsclient.Attester = m.a
			if !m.kept {
				a = closing{m.a, client}
			}
			for b.Loop() {
				s, err := client.Attest(b.Context(), a)
				if err != nil {
					b.Fatal(err)
				}
				if !m.kept {
					client.CloseIdle()
				}
				if _, err := s.Resource(b.Context(), m.path); err != nil {
					b.Fatal(err)
				}
				s.Close()
				if !m.kept {
					client.CloseIdle()
				}
			}
		})
	}
}

// closing ends the client's connection between its first call and its second.
type closing struct {
	attester
	c *kbsclient.Client
}

func (c closing) Evidence(ctx context.Context, digest [48]byte) (json.RawMessage, error) {
	c.c.CloseIdle()
	return c.attester.Evidence(ctx, digest)
}

// TestClientOverRestart: a session of kbsclient outlives the server's restart.
func TestClientOverRestart(t *testing.T) {
	dialects(t, func(t *testing.T, d Dialect) {
		r := ready(t, d)
		ca, err := os.ReadFile(filepath.Join(r.dir, caCertFile))
		if err != nil {
			t.Fatal(err)
		}
		client, err := kbsclient.New(kbsclient.Config{URL: r.url, RootCAs: ca})
		if err != nil {
			t.Fatal(err)
		}
		s, err := client.Attest(t.Context(), attester{})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		again, err := New(Options{Dir: r.dir, Dialect: d, AllowSimulated: true, Now: r.clock.now})
		if err != nil {
			t.Fatal(err)
		}
		r.server.sessions = again.sessions // as a new process has them: none
		if b, err := s.Resource(t.Context(), keyPath); err != nil || string(b) != secret {
			t.Errorf("after the restart: %q, %v", b, err)
		}
		r.clock.add(tokenLife + 2*tokenLeeway)
		if _, err := s.Resource(t.Context(), keyPath); !errors.Is(err, kbsclient.ErrTokenNotFound) {
			t.Errorf("when the token has expired: %v, want ErrTokenNotFound", err)
		}
	})
}
