// Command soak runs an embedded KBS under load for a while, kills it with SIGKILL
// in between and starts it again, and then checks that every write that it
// acknowledged is there. Clients recover by themselves; the only error they may
// see is that nobody answers, and only while the server is down.
package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"coffer/hostbuild/policy"
	"coffer/kbsclient"
	"coffer/test/harness"
)

func main() {
	bin := flag.String("bin", "bin", "folder of the built programs")
	length := flag.Duration("for", 10*time.Minute, "how long")
	clients := flag.Int("clients", 32, "how many at a time; every fourth one also writes")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *bin, *length, *clients); err != nil {
		fmt.Fprintln(os.Stderr, "soak: FAILED:", err)
		os.Exit(1)
	}
	fmt.Println("soak: passed")
}

// soak is one run.
type soak struct {
	kbs    *harness.KBS
	ca     []byte
	admin  *kbsclient.Admin
	folder *policy.Folder

	changes atomic.Int32 // of the server's state, from up to down and back: odd while it is down

	releases, writes, unreachable atomic.Int64
	mu                            sync.Mutex
	acked                         map[string]string // resource to value, as acknowledged last
	tried                         map[string]string // the value that a write was last tried with
	rules                         map[string]bool   // CVMs whose rule was acknowledged
	failures                      []error
}

func run(ctx context.Context, bin string, length time.Duration, clients int) error {
	bin, err := filepath.Abs(bin)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "coffer-soak-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	env := &harness.Env{Bin: bin, Dir: dir, Log: io.Discard, KBSFlags: []string{"--rate", "0"}}
	s := &soak{acked: map[string]string{}, tried: map[string]string{}, rules: map[string]bool{}}
	if s.kbs, err = env.StartKBS(ctx, "kbs"); err != nil {
		return err
	}
	defer s.kbs.Stop()
	if err := s.prepare(ctx); err != nil {
		return err
	}

	end, stop := context.WithTimeout(ctx, length)
	defer stop()
	var wg sync.WaitGroup
	for i := range clients {
		wg.Go(func() { s.client(end, i) })
	}
	wg.Go(func() { s.killOnce(end, length/2) })
	wg.Go(func() { s.report(end, length) })
	wg.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	s.check()
	fmt.Printf("soak: %s, %d clients: %d releases, %d writes; nobody answered %d times while it was down, %d failures\n",
		length, clients, s.releases.Load(), s.writes.Load(), s.unreachable.Load(), len(s.failures))
	if s.releases.Load() == 0 || s.writes.Load() == 0 {
		return errors.New("nothing was released or written")
	}
	return errors.Join(s.failures...)
}

func (s *soak) config() kbsclient.Config {
	return kbsclient.Config{URL: "https://" + s.kbs.Listen, RootCAs: s.ca}
}

func (s *soak) prepare(ctx context.Context) (err error) {
	if s.ca, err = os.ReadFile(filepath.Join(s.kbs.Dir, "ca.pem")); err != nil {
		return err
	}
	pem, err := os.ReadFile(filepath.Join(s.kbs.Dir, "admin.key"))
	if err != nil {
		return err
	}
	key, err := kbsclient.ParseAdminKey(pem)
	if err != nil {
		return err
	}
	if s.admin, err = kbsclient.NewAdmin(s.config(), key); err != nil {
		return err
	}
	if s.folder, err = policy.OpenFolder(filepath.Join(s.kbs.Dir, "policy")); err != nil {
		return err
	}
	return s.rule(ctx, "base")
}

func path(client int) string { return fmt.Sprintf("keys/soak/client-%d", client) }

// rule adds a CVM's rule. The clients' own paths are the rule "base".
func (s *soak) rule(ctx context.Context, id string) error {
	r := policy.Rule{CVMID: id, Paths: []string{"keys/root/" + id}, TEE: policy.TEESample}
	if id == "base" {
		for i := range 1000 {
			r.Paths = append(r.Paths, path(i))
		}
	}
	_, err := s.folder.Update(ctx, func(rs *policy.Rules) error { return rs.Put(r) }, s.admin.SetResourcePolicy)
	return err
}

func (s *soak) fail(format string, a ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.failures) < 20 {
		s.failures = append(s.failures, fmt.Errorf(format, a...))
	}
}

// excused says whether err is one that the kill explains.
func (s *soak) excused(err error, changesBefore int32) bool {
	changes := s.changes.Load()
	if !errors.Is(err, kbsclient.ErrUnreachable) || changes == changesBefore && changes%2 == 0 {
		return false
	}
	s.unreachable.Add(1)
	return true
}

func (s *soak) client(ctx context.Context, i int) {
	c, err := kbsclient.New(s.config())
	if err != nil {
		s.fail("client %d: %w", i, err)
		return
	}
	defer c.CloseIdle()
	if err := s.write(ctx, i, 0); err != nil {
		s.fail("first write of client %d: %w", i, err)
		return
	}
	for n := 1; ctx.Err() == nil; n++ {
		before := s.changes.Load()
		err := s.release(ctx, c, i)
		if err == nil && i%4 == 0 {
			err = s.write(ctx, i, n)
		}
		if err == nil && i%16 == 0 && n%50 == 0 {
			id := fmt.Sprintf("cvm-%d-%d", i, n)
			if err = s.rule(ctx, id); err == nil {
				s.mu.Lock()
				s.rules[id] = true
				s.mu.Unlock()
			}
		}
		if err != nil && ctx.Err() == nil && !s.excused(err, before) {
			s.fail("client %d, round %d: %w", i, n, err)
		}
	}
}

// release attests anew and fetches the client's own resource.
func (s *soak) release(ctx context.Context, c *kbsclient.Client, i int) error {
	session, err := c.Attest(ctx, sample{})
	if err != nil {
		return err
	}
	defer session.Close()
	got, err := session.Resource(ctx, path(i))
	if err != nil {
		return err
	}
	s.mu.Lock()
	want, tried := s.acked[path(i)], s.tried[path(i)]
	s.mu.Unlock()
	if string(got) != want && string(got) != tried {
		s.fail("%s holds %.60q, acknowledged was %.60q", path(i), got, want)
	}
	s.releases.Add(1)
	return nil
}

func (s *soak) write(ctx context.Context, i, n int) error {
	value := fmt.Sprintf("%d %s", n, strings.Repeat("x", n%3000))
	s.mu.Lock()
	s.tried[path(i)] = value
	s.mu.Unlock()
	if err := s.admin.SetResource(ctx, path(i), []byte(value)); err != nil {
		return err
	}
	s.mu.Lock()
	s.acked[path(i)] = value
	s.mu.Unlock()
	s.writes.Add(1)
	return nil
}

// killOnce kills the server when half of the time has passed, and starts it anew.
func (s *soak) killOnce(ctx context.Context, after time.Duration) {
	select {
	case <-ctx.Done():
		return
	case <-time.After(after):
	}
	s.changes.Add(1)
	s.kbs.Kill()
	if err := s.kbs.Start(ctx); err != nil {
		s.fail("restart: %w", err)
	}
	s.changes.Add(1)
}

func (s *soak) report(ctx context.Context, length time.Duration) {
	t := time.NewTicker(max(length/10, time.Second))
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			fmt.Printf("soak: %d releases, %d writes\n", s.releases.Load(), s.writes.Load())
		}
	}
}

// check compares the server's files with what was acknowledged.
func (s *soak) check() {
	for name, want := range s.acked {
		got, err := os.ReadFile(filepath.Join(s.kbs.Dir, "repository", name))
		if err != nil || string(got) != want && string(got) != s.tried[name] {
			s.fail("%s: %v, holds %.60q, acknowledged was %.60q", name, err, got, want)
		}
	}
	rules, err := s.folder.Rules()
	if err != nil {
		s.fail("policy folder: %w", err)
	}
	held, err := os.ReadFile(filepath.Join(s.kbs.Dir, "resource-policy.rego"))
	if err != nil {
		s.fail("policy of the server: %w", err)
	}
	for id := range s.rules {
		if _, ok := rules.Get(id); !ok {
			s.fail("the rule of %s is not in the master copy", id)
		}
		if !strings.Contains(string(held), `"resource/keys/root/`+id+`"`) {
			s.fail("the rule of %s is not at the server", id)
		}
	}
}

// sample is Trustee's test evidence.
type sample struct{}

func (sample) TEE() string { return policy.TEESample }

func (sample) Evidence(_ context.Context, digest [48]byte) (json.RawMessage, error) {
	return json.RawMessage(`{"svn":"1","report_data":"` + base64.StdEncoding.EncodeToString(digest[:]) + `"}`), nil
}
