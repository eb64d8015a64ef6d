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
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

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

// Figure prints one figure.
type Figure func(name string, value float64, unit string, floor float64)

// Run prints the figures. The releases are made by a process of its own, [Client],
// and by each side on one processor core of its own, as by two machines. On a shared
// one the two take each other's processor: a garbage collector uses every core that
// is idle because its side waits for the other. Trustee's figures, which docs/kbs.md
// has beside them, are of two shared cores.
func Run(ctx context.Context, env *harness.Env, figure Figure) error {
	// Dialect T, to compare with what was measured on that Trustee.
	kbsEnv := &harness.Env{Bin: env.Bin, Base: env.Base, Dir: filepath.Join(env.Dir, "kbsbench"), Log: env.Log,
		KBSFlags: []string{"--rate", "0", "--dialect", "T"}}
	if err := os.Mkdir(kbsEnv.Dir, 0o755); err != nil {
		return err
	}
	output, err := os.Create(filepath.Join(kbsEnv.Dir, "kbs.log"))
	if err != nil {
		return err
	}
	defer output.Close()
	kbsEnv.KBSOutput = output
	var kbs *harness.KBS
	err = onCore(1, func() (err error) {
		kbs, err = kbsEnv.StartKBS(ctx, "kbs")
		return err
	})
	if err != nil {
		return err
	}
	err = onCore(0, func() error {
		self, err := os.Executable()
		if err != nil {
			return err
		}
		client := exec.CommandContext(ctx, self, ClientArg, kbs.Listen, kbs.Dir, filepath.Join(kbsEnv.Dir, "chip"))
		client.Stdout, client.Stderr = os.Stdout, os.Stderr
		return client.Run()
	})
	kbs.Stop()
	if err != nil {
		return fmt.Errorf("the client's process: %w", err)
	}

	if kbs, err = kbsEnv.StartKBS(ctx, "kbs"); err != nil {
		return err
	}
	defer kbs.Stop()
	b, err := open(kbs.Listen, kbs.Dir, filepath.Join(kbsEnv.Dir, "chip"), figure)
	if err != nil {
		return err
	}
	defer b.bare.l.Close()
	if err := b.load(ctx); err != nil {
		return err
	}
	return b.memory(ctx, kbs.PID())
}

// onCore runs f on a thread of that processor core, which the programs that f
// starts inherit. On a machine with one core it changes nothing.
func onCore(n int, f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var all, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		return err
	}
	for core, seen := 0, 0; seen <= n && seen < all.Count(); core++ {
		if all.IsSet(core) {
			one.Zero()
			one.Set(core)
			seen++
		}
	}
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		return err
	}
	return errors.Join(f(), unix.SchedSetaffinity(0, &all))
}

// ClientArg is the first argument of a program that shall call Client.
const ClientArg = "release-client"

// Client measures the releases of the KBS whose address, folder and chip's folder
// args are.
func Client(ctx context.Context, args []string, figure Figure) error {
	if len(args) != 3 {
		return fmt.Errorf("%s needs address, folder of the KBS and folder of the chip", ClientArg)
	}
	b, err := open(args[0], args[1], args[2], figure)
	if err != nil {
		return err
	}
	defer b.bare.l.Close()
	return errors.Join(b.store(ctx), b.latency(ctx))
}

type bench struct {
	listen, dir string // the KBS's
	chip        *simsnp.Chip
	ca          []byte
	bare        *bare
	figure      Figure
}

func open(listen, dir, chip string, figure Figure) (b *bench, err error) {
	b = &bench{listen: listen, dir: dir, figure: figure}
	if b.chip, err = simsnp.Load(chip); err != nil {
		return nil, err
	}
	if b.ca, err = os.ReadFile(filepath.Join(dir, "ca.pem")); err != nil {
		return nil, err
	}
	b.bare, err = startBare()
	return b, err
}

func (b *bench) config() kbsclient.Config {
	return kbsclient.Config{URL: "https://" + b.listen, RootCAs: b.ca}
}

// store gives the server two keys and their rules.
func (b *bench) store(ctx context.Context) error {
	pem, err := os.ReadFile(filepath.Join(b.dir, "admin.key"))
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
func times(f func() error) ([]float64, error) {
	if err := f(); err != nil {
		return nil, err
	}
	runtime.GC() // of what came before
	var ms []float64
	for range rounds {
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
func (b *bench) memory(ctx context.Context, pid int) error {
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
		if rss[i], err = residentMiB(pid); err != nil {
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
