// Package kbsbench measures the embedded KBS: what the release of a key costs,
// how many handshakes it makes a second, and whether its memory grows. It starts
// the server as a program and speaks to it over loopback.
package kbsbench

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"coffer/hostbuild/policy"
	"coffer/internal/snp"
	"coffer/kbsclient"
	"coffer/test/harness"
	"coffer/test/simsnp"
)

const (
	rounds     = 500 // of each latency
	roundGoal  = 50  // milliseconds of the client's processor time
	loadTime   = 4 * time.Second
	sessions   = 10000 // between two looks at the server's memory
	samplePath = "keys/root/sample"
	snpPath    = "keys/root/snp"
)

// Run prints the figures by figure(name, value, unit, floor).
func Run(ctx context.Context, env *harness.Env, figure func(name string, value float64, unit string, floor float64)) error {
	// Dialect T, to compare with what was measured on that Trustee.
	kbsEnv := &harness.Env{Bin: env.Bin, Base: env.Base, Dir: filepath.Join(env.Dir, "kbsbench"), Log: env.Log,
		KBSFlags: []string{"--rate", "0", "--dialect", "T"}}
	if err := os.Mkdir(kbsEnv.Dir, 0o755); err != nil {
		return err
	}
	kbs, err := kbsEnv.StartKBS(ctx, "kbs")
	if err != nil {
		return err
	}
	defer kbs.Stop()
	b := &bench{kbs: kbs, figure: figure}
	if b.chip, err = simsnp.Load(filepath.Join(kbsEnv.Dir, "chip")); err != nil {
		return err
	}
	if b.ca, err = os.ReadFile(filepath.Join(kbs.Dir, "ca.pem")); err != nil {
		return err
	}
	if err := b.store(ctx); err != nil {
		return err
	}
	if b.bare, err = startBare(); err != nil {
		return err
	}
	defer b.bare.l.Close()
	for _, f := range []func(context.Context) error{b.latency, b.load, b.memory} {
		if err := f(ctx); err != nil {
			return err
		}
	}
	return nil
}

type bench struct {
	kbs    *harness.KBS
	chip   *simsnp.Chip
	ca     []byte
	bare   *bare
	figure func(name string, value float64, unit string, floor float64)
}

func (b *bench) config() kbsclient.Config {
	return kbsclient.Config{URL: "https://" + b.kbs.Listen, RootCAs: b.ca}
}

// store gives the server two keys and their rules.
func (b *bench) store(ctx context.Context) error {
	pem, err := os.ReadFile(filepath.Join(b.kbs.Dir, "admin.key"))
	if err != nil {
		return err
	}
	key, err := kbsclient.ParseAdminKey(pem)
	if err != nil {
		return err
	}
	admin, err := kbsclient.NewAdmin(b.config(), key)
	if err != nil {
		return err
	}
	var rules policy.Rules
	if err := errors.Join(
		rules.Put(policy.Rule{CVMID: "sample", Paths: []string{samplePath}, TEE: policy.TEESample}),
		rules.Put(policy.Rule{CVMID: "snp", Paths: []string{snpPath}, Digests: [][48]byte{{1}}, Simulated: true}),
	); err != nil {
		return err
	}
	secret := []byte(strings.Repeat("0123456789abcdef", 8))
	return errors.Join(admin.SetResource(ctx, samplePath, secret), admin.SetResource(ctx, snpPath, secret),
		admin.SetResourcePolicy(ctx, policy.Render(rules)))
}

// latency is that of a whole release: fresh key pair, auth, evidence, attest,
// resource, decryption. New: each call on a TLS connection of its own, which
// resumes the client's session, as a running guest's does. First: the same by a
// client that was never connected, as a booting guest's is; its first connection
// is a full handshake. The floor is a bare exchange of as many bytes, once; on a new
// connection that is a full handshake.
func (b *bench) latency(ctx context.Context) error {
	kept, err := b.bare.dial()
	if err != nil {
		return err
	}
	defer kept.Close()
	floorKept, err := times(func() error { return exchange(kept) })
	if err != nil {
		return err
	}
	floorNew, err := times(b.bare.fresh)
	if err != nil {
		return err
	}
	for _, m := range []struct {
		name       string
		sample     bool
		connection string // kept, or "new" for each call; "first": and a new client for each release
		floor      []float64
	}{
		{"sample_kept", true, "kept", floorKept}, {"sample_new", true, "new", floorNew}, {"sample_first", true, "first", floorNew},
		{"snp_kept", false, "kept", floorKept}, {"snp_new", false, "new", floorNew},
	} {
		client, err := kbsclient.New(b.config())
		if err != nil {
			return err
		}
		a := b.attester(m.sample)
		var before, after syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &before); err != nil {
			return err
		}
		ms, err := times(func() (err error) {
			if m.connection == "first" {
				if client, err = kbsclient.New(b.config()); err != nil {
					return err
				}
			}
			if m.connection != "kept" {
				a.between = client.CloseIdle
			}
			return a.release(ctx, client)
		})
		if err != nil {
			return err
		}
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &after); err != nil {
			return err
		}
		client.CloseIdle()
		b.figure("key_release_"+m.name+"_p50", percentile(ms, 50), "ms", percentile(m.floor, 50))
		b.figure("key_release_"+m.name+"_p99", percentile(ms, 99), "ms", percentile(m.floor, 99))
		if !m.sample && m.connection == "new" {
			// What a round of the agent makes, on this machine: the chip's signature is part of it.
			spent := after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano()
			b.figure("attestation_round_cpu_native", float64(spent)/1e6/(rounds+1), "ms", roundGoal)
		}
	}
	return nil
}

// times runs f once to warm up, and then measures rounds of it, in milliseconds.
// A guest makes one release in a round or in its life: what 500 of them leave
// behind in one process is collected between them. The server collects as it likes.
func times(f func() error) ([]float64, error) {
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	if err := f(); err != nil {
		return nil, err
	}
	var ms []float64
	for i := range rounds {
		if i%20 == 0 {
			runtime.GC()
		}
		t := time.Now()
		if err := f(); err != nil {
			return nil, err
		}
		ms = append(ms, time.Since(t).Seconds()*1e3)
	}
	return ms, nil
}

func percentile(s []float64, p int) float64 {
	s = slices.Clone(s)
	slices.Sort(s)
	return s[min(len(s)*p/100, len(s)-1)]
}

// load counts handshakes (auth and attest with an SNP report on a new connection)
// a second; the floor is bare exchanges on new connections. Client and server
// share the machine in both.
func (b *bench) load(ctx context.Context) error {
	for _, clients := range []int{1, 8, 64} {
		floor, err := perSecond(clients, func() func() error { return b.bare.fresh })
		if err != nil {
			return err
		}
		n, err := perSecond(clients, func() func() error {
			client, err := kbsclient.New(b.config())
			a := b.attester(false)
			return func() error {
				if err != nil {
					return err
				}
				s, err := client.Attest(ctx, a)
				if err != nil {
					return err
				}
				s.Close()
				client.CloseIdle()
				return nil
			}
		})
		if err != nil {
			return err
		}
		b.figure(fmt.Sprintf("handshakes_%d_clients", clients), n, "1/s", floor)
	}
	return nil
}

// perSecond runs what newClient returns in so many goroutines for a while.
func perSecond(clients int, newClient func() func() error) (float64, error) {
	var wg sync.WaitGroup
	counts, errs := make([]int, clients), make([]error, clients)
	start := time.Now()
	for i := range clients {
		f := newClient()
		wg.Go(func() {
			for time.Since(start) < loadTime && errs[i] == nil {
				if errs[i] = f(); errs[i] == nil {
					counts[i]++
				}
			}
		})
	}
	wg.Wait()
	n := 0
	for _, c := range counts {
		n += c
	}
	return float64(n) / time.Since(start).Seconds(), errors.Join(errs...)
}

// memory compares the server's resident memory after 20,000 sessions with that
// after 10,000: as many as it keeps.
func (b *bench) memory(ctx context.Context) error {
	var rss [2]float64
	for i := range rss {
		var wg sync.WaitGroup
		errs := make([]error, 4)
		for j := range errs {
			wg.Go(func() {
				client, err := kbsclient.New(b.config())
				for n := 0; n < sessions/len(errs) && err == nil; n++ {
					var s *kbsclient.Session
					if s, err = client.Attest(ctx, b.attester(true)); err == nil {
						s.Close()
					}
				}
				errs[j] = err
			})
		}
		wg.Wait()
		if err := errors.Join(errs...); err != nil {
			return err
		}
		var err error
		if rss[i], err = residentMiB(b.kbs.PID()); err != nil {
			return err
		}
	}
	b.figure("kbs_rss_after_20000_sessions", rss[1], "MiB", rss[0])
	return nil
}

func residentMiB(pid int) (float64, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	_, rest, ok := strings.Cut(string(status), "VmRSS:")
	fields := strings.Fields(rest)
	if !ok || len(fields) == 0 {
		return 0, fmt.Errorf("/proc/%d/status: no VmRSS", pid)
	}
	kib, err := strconv.ParseFloat(fields[0], 64)
	return kib / 1024, err
}

// attester gives sample evidence, or reports of the simulated chip.
type attester struct {
	chip    *simsnp.Chip // nil: sample evidence
	between func()       // called between two calls to the KBS; may be nil
}

func (b *bench) attester(sample bool) *attester {
	if sample {
		return &attester{}
	}
	return &attester{chip: b.chip}
}

func (a *attester) pause() {
	if a.between != nil {
		a.between()
	}
}

func (a *attester) TEE() string {
	if a.chip == nil {
		return policy.TEESample
	}
	return policy.TEESNP
}

func (a *attester) Evidence(_ context.Context, digest [48]byte) (json.RawMessage, error) {
	defer a.pause()
	if a.chip == nil {
		return json.RawMessage(`{"svn":"1","report_data":"` + base64.StdEncoding.EncodeToString(digest[:]) + `"}`), nil
	}
	var data [64]byte
	copy(data[:], digest[:])
	r, err := a.chip.Report([48]byte{1}, data, 0)
	if err != nil {
		return nil, err
	}
	return snp.EvidenceJSON(r.Marshal(), a.chip.Certs())
}

func (a *attester) release(ctx context.Context, client *kbsclient.Client) error {
	s, err := client.Attest(ctx, a)
	if err != nil {
		return err
	}
	defer s.Close()
	a.pause()
	path := samplePath
	if a.chip != nil {
		path = snpPath
	}
	key, err := s.Resource(ctx, path)
	clear(key)
	a.pause()
	return err
}
