// Package federation runs docs/nvflare.md: each of its commands, section by
// section, in one bash, with the real NVFlare inside of the guests and outside.
//
// The page waits for what it promises, so a command that fails, or does not end in
// time, fails the test; what the page does not say is checked here. NVFlare's
// sleeps of 100 s are left out by ../nvflare/testdata/sitecustomize.py.
package federation

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"coffer/internal/testenv"
	"coffer/test/harness"
)

// The slowest block takes about two minutes on two idle cores.
const blockDeadline = 8 * time.Minute

// section is one of the page's, with the commands of its sh blocks.
type section struct {
	title  string
	blocks []string
}

func readPage(t *testing.T, name string) []section {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	var sections []section
	for _, part := range regexp.MustCompile(`(?m)^## `).Split(string(text), -1)[1:] {
		title, body, _ := strings.Cut(part, "\n")
		s := section{title: title}
		for _, m := range regexp.MustCompile("(?ms)^```sh\n(.*?)^```$").FindAllStringSubmatch(body, -1) {
			s.blocks = append(s.blocks, m[1])
		}
		if s.blocks != nil {
			sections = append(sections, s)
		}
	}
	return sections
}

// shell is a bash that ends at the first command that fails.
type shell struct {
	out  *harness.Lines
	in   io.Writer
	next int // line of out
	runs int
}

func startShell(t *testing.T, root, home string) *shell {
	t.Helper()
	cmd := exec.Command("bash", "-eu", "-o", "pipefail")
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "HOME="+home, "MAKEFLAGS=",
		"PYTHONPATH="+filepath.Join(root, "test/nvflare/testdata"), "KEEP_KITS="+filepath.Join(home, "kits"))
	for _, name := range []string{"GOCACHE", "GOPATH", "GOMODCACHE"} { // else they follow HOME
		v, err := exec.Command("go", "env", name).Output()
		if err != nil {
			t.Fatal(err)
		}
		cmd.Env = append(cmd.Env, name+"="+strings.TrimSpace(string(v)))
	}
	s := &shell{out: harness.NewLines(os.Stderr)}
	cmd.Stdout, cmd.Stderr = s.out, s.out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = 5 * time.Second
	var err error
	if s.in, err = cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		cmd.Wait()
		s.out.Close()
	}()
	t.Cleanup(func() {
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // guests and KBS, too
		<-ended
	})
	return s
}

func (s *shell) run(ctx context.Context, block string) error {
	s.runs++
	end := fmt.Sprintf("== end of block %d", s.runs)
	if _, err := fmt.Fprintf(s.in, "%s\necho '%s'\n", block, end); err != nil {
		return err
	}
	_, next, err := s.out.Expect(ctx, s.next, "^"+end+"$")
	s.next = next
	return err
}

const model = "model: [[3.0, 4.0, 5.0], [6.0, 7.0, 8.0], [9.0, 10.0, 11.0]]"

// checks are what holds after a section, beside its own commands' success. two
// tells whether there is a site-2.
var checks = map[string]func(t *testing.T, dir string, two bool){
	"Start": func(t *testing.T, dir string, two bool) {
		const verified = "SNPAuthorizer - INFO - Check nonce passed"
		want(t, dir, "server1/cvm_*/console.log", "allowed ports in=8002/tcp out=443/tcp platform", verified)
		sites := []string{"site-1"}
		if two {
			sites = append(sites, "site-2")
		}
		for _, site := range sites {
			want(t, dir, site+"/cvm_*/console.log", "allowed ports in=none out=8002/tcp,443/tcp platform", verified)
			want(t, dir, site+".out", "phase=key status=ok")
		}
	},
	"A job": func(t *testing.T, dir string, _ bool) {
		want(t, dir, "job.out", model)
	},
	"Taking a site's rule away, and giving it back": func(t *testing.T, dir string, two bool) {
		if two {
			want(t, dir, "job2.out", "\nsites: site-2\n", model)
			if text := contents(t, dir, "site-2/cvm_*/console.log"); strings.Contains(text, "action=stop_job") {
				t.Error("site-2 was stopped for site-1's rule")
			}
		}
		want(t, dir, "job3.out", model)
	},
	"Another day": func(t *testing.T, dir string, two bool) {
		if two {
			want(t, dir, "job5.out", "\nsites: site-2\n", model)
		}
		want(t, dir, "job6.out", model)
	},
}

func contents(t *testing.T, dir, pattern string) string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil || len(names) != 1 {
		t.Fatalf("%s: %v, %v", pattern, names, err)
	}
	text, err := os.ReadFile(names[0])
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func want(t *testing.T, dir, pattern string, parts ...string) {
	t.Helper()
	text := contents(t, dir, pattern)
	for _, p := range parts {
		if !strings.Contains(text, p) {
			t.Errorf("%s lacks %q", pattern, p)
		}
	}
}

// follow runs the page up to the section last, and prints what took longest.
func follow(t *testing.T, last string) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"bin/cvm_build", "build/base/simulated/base.json", "build/nvflare/2.9.0/installed", "build/images/nvflare.tar.gz"} {
		_, err := os.Stat(filepath.Join(root, p))
		testenv.Need(t, err == nil, p+" is missing: make test-nvflare-e2e")
	}
	page := readPage(t, filepath.Join(root, "docs/nvflare.md"))
	end := slices.IndexFunc(page, func(s section) bool { return s.title == last })
	if end < 0 {
		t.Fatalf("docs/nvflare.md has no commands in a section %q", last)
	}
	home := t.TempDir()
	dir := filepath.Join(home, "federation")
	sh := startShell(t, root, home)
	t.Cleanup(func() {
		if t.Failed() {
			show(t, dir, "*/cvm_*/console.log", "kbs.log", "*.out")
		}
	})

	type step struct {
		name string
		took time.Duration
	}
	var steps []step
	began := time.Now()
	for _, s := range page[:end+1] {
		for i, block := range s.blocks {
			name := fmt.Sprintf("%s, block %d", s.title, i+1)
			start := time.Now()
			ctx, cancel := context.WithTimeout(t.Context(), blockDeadline)
			err := sh.run(ctx, block)
			cancel()
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			steps = append(steps, step{name, time.Since(start)})
			t.Logf("%6.1f s  %s", time.Since(start).Seconds(), name)
		}
		if check := checks[s.title]; check != nil {
			_, err := os.Stat(filepath.Join(dir, "site-2"))
			check(t, dir, err == nil)
		}
		if t.Failed() {
			t.FailNow()
		}
	}
	jobs, _ := filepath.Glob(filepath.Join(dir, "job*.out"))
	for _, name := range jobs {
		text := contents(t, dir, filepath.Base(name))
		for _, line := range regexp.MustCompile("(?m)^failed: .*").FindAllString(text, -1) {
			t.Logf("%s: %s", filepath.Base(name), line)
		}
	}
	t.Logf("%.0f s in all; the longest steps:", time.Since(began).Seconds())
	slices.SortFunc(steps, func(a, b step) int { return cmp.Compare(b.took, a.took) })
	for _, s := range steps[:min(6, len(steps))] {
		t.Logf("%6.1f s  %s", s.took.Seconds(), s.name)
	}
}

// show logs the ends of files.
func show(t *testing.T, dir string, patterns ...string) {
	for _, p := range patterns {
		names, _ := filepath.Glob(filepath.Join(dir, p))
		for _, name := range names {
			text, _ := os.ReadFile(name)
			lines := strings.Split(string(text), "\n")
			t.Logf("%s:\n%s", name, strings.Join(lines[max(0, len(lines)-60):], "\n"))
		}
	}
}

// TestBoot is what CI runs: up to a server and a site that has joined it.
func TestBoot(t *testing.T) { follow(t, "Start") }

// TestFederation is the whole page.
func TestFederation(t *testing.T) { follow(t, "Another day") }
