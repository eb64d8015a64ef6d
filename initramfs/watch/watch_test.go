package watch

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"coffer/internal/boot"
)

// The watcher reaps all children of its process, so each test's has one of its
// own: this program, which becomes the parent of its orphans as PID 1 is.
const scriptEnv = "WATCH_TEST_SCRIPT"

func TestMain(m *testing.M) {
	script := os.Getenv(scriptEnv)
	if script == "" {
		os.Exit(m.Run())
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		panic(err)
	}
	log := boot.NewLog(os.Stdout, false, func() time.Duration { return 0 })
	Run(log, script, func() { os.Stdout.WriteString("power off\n") })
	os.Exit(0)
}

// watch starts a watcher of a shell script and returns the watcher and its output.
func watch(t *testing.T, script string) (*exec.Cmd, *bytes.Buffer) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "agent")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	cmd := exec.CommandContext(t.Context(), self)
	cmd.Env = append(os.Environ(), scriptEnv+"="+path)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd, &out
}

func TestAgentEnds(t *testing.T) {
	for _, c := range []struct{ name, script, detail string }{
		{"exit 0", "exit 0", "exit status 0"},
		{"crash", "exit 2", "exit status 2"},
		{"killed", "kill -9 $$", "signal 9, killed"},
		{"orphans before it", "(sleep 0.05; exit 7) & (true) & sleep 0.2; exit 3", "exit status 3"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd, out := watch(t, c.script)
			if err := cmd.Wait(); err != nil {
				t.Fatal(err)
			}
			lines := strings.Split(strings.TrimSpace(out.String()), "\n")
			if len(lines) != 2 || lines[1] != "power off" ||
				!strings.HasPrefix(lines[0], "coffer: FAILED phase=run code=E_INTERNAL detail=") || !strings.Contains(lines[0], c.detail) {
				t.Errorf("output %q, want a FAILED line with %q and the power off", lines, c.detail)
			}
		})
	}
}

func TestNoAgent(t *testing.T) {
	var out bytes.Buffer
	off := false
	Run(boot.NewLog(&out, false, func() time.Duration { return 0 }), "/no/such/agent", func() { off = true })
	if !off || !strings.Contains(out.String(), "code=E_ROOT") {
		t.Errorf("power off %v, output %q", off, out.String())
	}
}

// A wish to stop reaches the agent, which decides.
func TestSignalsReachTheAgent(t *testing.T) {
	ready := filepath.Join(t.TempDir(), "ready")
	cmd, out := watch(t, `trap 'echo asked to stop; exit 5' TERM
echo $$ > `+ready+`.new; mv `+ready+`.new `+ready+`
while :; do sleep 0.05; done`)
	for {
		if _, err := os.Stat(ready); err == nil {
			break
		}
		if t.Context().Err() != nil {
			t.Fatal("the agent did not start")
		}
		time.Sleep(5 * time.Millisecond)
	}
	if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if s := out.String(); !strings.HasPrefix(s, "asked to stop\n") || !strings.Contains(s, "exit status 5") {
		t.Errorf("output %q", s)
	}
}

// Orphans do not pile up.
func TestOrphansAreReaped(t *testing.T) {
	pids := filepath.Join(t.TempDir(), "pids")
	cmd, out := watch(t, `for i in 1 2 3 4 5; do (sh -c 'echo $$ >> `+pids+`; exit 1' &) ; done
for i in $(seq 200); do
	left=0; while read p; do [ -e /proc/$p ] && left=1; done < `+pids+`
	[ $left = 0 ] && [ $(wc -l < `+pids+`) = 5 ] && exit 4
	sleep 0.1
done; exit 9`)
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(pids)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range strings.Fields(string(b)) {
		if n, err := strconv.Atoi(p); err != nil || unix.Kill(n, 0) == nil {
			t.Errorf("orphan %s is still there: %s", p, out.String())
		}
	}
}
