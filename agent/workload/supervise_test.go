package workload

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"coffer/internal/guestconfig"
)

// fakeJob ends each run as the test says.
type fakeJob struct {
	mu     sync.Mutex
	starts int
	ended  chan struct{}
	exit   Exit
	fail   error         // of Start
	slow   time.Duration // a start takes this long, whatever its context says
	ignore bool          // of the stop signal
	calls  []string
}

func (j *fakeJob) Start(context.Context) (<-chan struct{}, error) {
	time.Sleep(j.slow)
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.fail != nil {
		return nil, j.fail
	}
	j.starts++
	j.ended = make(chan struct{})
	return j.ended, nil
}

func (j *fakeJob) count() int { j.mu.Lock(); defer j.mu.Unlock(); return j.starts }

func (j *fakeJob) Exit() Exit { j.mu.Lock(); defer j.mu.Unlock(); return j.exit }

func (j *fakeJob) end(code int) {
	j.mu.Lock()
	defer j.mu.Unlock()
	select {
	case <-j.ended:
	default:
		j.exit = Exit{Code: code}
		close(j.ended)
	}
}

func (j *fakeJob) Kill(context.Context) error {
	j.calls = append(j.calls, "kill")
	j.end(137)
	return nil
}

func (j *fakeJob) Terminate(ctx context.Context, grace time.Duration) error {
	j.calls = append(j.calls, fmt.Sprintf("terminate %s", grace))
	if j.ignore {
		time.Sleep(grace)
		return j.Kill(ctx)
	}
	j.end(143)
	return nil
}

type bench struct {
	*Supervisor
	job   *fakeJob
	lines []string
	ready int
	last  <-chan Exit
}

// supervise runs a test with a fake clock.
func supervise(t *testing.T, restart string, f func(*testing.T, *bench)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		b := &bench{job: &fakeJob{}}
		began := time.Now()
		b.Supervisor = &Supervisor{Job: b.job, Restart: restart, Failed: func(e Exit) bool { return e.Code != 0 }, Before: func() { b.ready++ },
			Printf: func(format string, a ...any) { b.lines = append(b.lines, fmt.Sprintf(format, a...)) },
			Now:    func() time.Duration { return time.Since(began) }}
		var err error
		if b.last, err = b.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		f(t, b)
		b.Kill(context.Background())
		synctest.Wait()
	})
}

func (b *bench) over() bool {
	synctest.Wait()
	select {
	case <-b.done:
		return true
	default:
		return false
	}
}

func TestRestartPolicies(t *testing.T) {
	for _, tc := range []struct {
		restart string
		code    int
		again   bool
	}{
		{"", 1, false}, {guestconfig.RestartNever, 1, false}, {guestconfig.RestartNever, 0, false},
		{guestconfig.RestartOnFailure, 0, false}, {guestconfig.RestartOnFailure, 1, true}, {guestconfig.RestartOnFailure, 137, true},
		{guestconfig.RestartAlways, 0, true}, {guestconfig.RestartAlways, 1, true},
	} {
		t.Run(fmt.Sprint(tc.restart, tc.code), func(t *testing.T) {
			supervise(t, tc.restart, func(t *testing.T, b *bench) {
				b.job.end(tc.code)
				time.Sleep(2 * time.Second)
				if again := !b.over(); again != tc.again || again != (b.job.count() == 2) || b.ready != b.job.count() {
					t.Errorf("%d starts, %d preparations", b.job.count(), b.ready)
				}
				if !tc.again && (<-b.last).Code != tc.code {
					t.Error("another exit code")
				}
				if !strings.HasPrefix(b.lines[0], fmt.Sprintf("workload exited code=%d", tc.code)) {
					t.Error(b.lines)
				}
			})
		})
	}
}

// A crash loop is slowed down; a long run begins anew.
func TestBackOff(t *testing.T) {
	supervise(t, guestconfig.RestartAlways, func(t *testing.T, b *bench) {
		for _, wait := range []time.Duration{1, 2, 4, 8, 16, 32, 60, 60} {
			before := b.job.count()
			b.job.end(1)
			time.Sleep(wait*time.Second - time.Millisecond)
			if b.job.count() != before {
				t.Fatalf("started before %ds", wait)
			}
			time.Sleep(2 * time.Millisecond)
			synctest.Wait()
			if b.job.count() != before+1 {
				t.Fatalf("not started after %ds", wait)
			}
		}
		time.Sleep(steadyAfter)
		before := b.job.count()
		b.job.end(1)
		time.Sleep(restartFirst + time.Millisecond)
		synctest.Wait()
		if b.job.count() != before+1 {
			t.Error("a long run does not count")
		}
	})
}

// A stop is for good, whenever it comes.
func TestNoStartAfterStop(t *testing.T) {
	for name, at := range map[string]func(*bench){
		"while it runs":  func(*bench) {},
		"while it waits": func(b *bench) { b.job.end(1); time.Sleep(restartFirst / 2) },
		"while it starts": func(b *bench) {
			b.job.mu.Lock()
			b.job.slow = 10 * time.Second
			b.job.mu.Unlock()
			b.job.end(1)
			time.Sleep(restartFirst + 5*time.Second)
		},
		"while it cannot start": func(b *bench) {
			b.job.mu.Lock()
			b.job.fail = errors.New("no")
			b.job.mu.Unlock()
			b.job.end(1)
			time.Sleep(restartFirst + 5*time.Second)
		},
	} {
		t.Run(name, func(t *testing.T) {
			supervise(t, guestconfig.RestartAlways, func(t *testing.T, b *bench) {
				at(b)
				ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
				defer cancel()
				if err := b.Kill(ctx); err != nil {
					t.Fatal(err)
				}
				starts := b.job.count()
				select {
				case <-b.job.ended:
				default:
					t.Error("it runs after Kill")
				}
				time.Sleep(time.Hour)
				if b.job.count() != starts || !b.over() {
					t.Error("it started again")
				}
			})
		})
	}
}

// A stop that meets a start lets it finish and asks what runs then.
// A start that failed may have left something: containerd was told to start it,
// and only its answer was cut off.
func TestKillAfterAFailedStart(t *testing.T) {
	root := t.TempDir()
	kill := filepath.Join(root, "workload", "cgroup.kill")
	if err := os.Mkdir(filepath.Dir(kill), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, end := range map[string]func(*Supervisor) error{
		"kill": func(s *Supervisor) error { return s.Kill(t.Context()) },
		"stop": func(s *Supervisor) error { return s.Stop(t.Context(), time.Second) },
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(kill, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			s := &Supervisor{Job: cutOff{&Runner{cfg: Config{CgroupRoot: root, Cgroup: "/workload"}}}, Before: func() {}, Now: func() time.Duration { return 0 }}
			if _, err := s.Start(t.Context()); err == nil {
				t.Fatal("the start did not fail")
			}
			if err := end(s); err != nil {
				t.Error(err)
			}
			if b, err := os.ReadFile(kill); err != nil || string(b) != "1" {
				t.Errorf("the workload's group got %q, %v: want it killed", b, err)
			}
		})
	}
}

// cutOff is a runner whose first start fails.
type cutOff struct{ *Runner }

func (cutOff) Start(context.Context) (<-chan struct{}, error) { return nil, context.DeadlineExceeded }

func TestStopWhileItStarts(t *testing.T) {
	supervise(t, guestconfig.RestartAlways, func(t *testing.T, b *bench) {
		b.job.mu.Lock()
		b.job.slow = 5 * time.Second
		b.job.mu.Unlock()
		b.job.end(1)
		time.Sleep(restartFirst + time.Second)
		b.Stop(t.Context(), 20*time.Second)
		if got := strings.Join(b.job.calls, ","); got != "terminate 16s" || !b.over() {
			t.Errorf("%q, want a stop signal with what is left of the grace", got)
		}
	})
}

func TestStopAsks(t *testing.T) {
	supervise(t, "", func(t *testing.T, b *bench) {
		b.job.ignore = true
		b.Stop(t.Context(), 20*time.Second)
		if got := strings.Join(b.job.calls, ","); got != "terminate 20s,kill" {
			t.Error(got)
		}
	})
	for name, tc := range map[string]struct {
		obeys bool
		err   error
		want  string
	}{
		"by its own way": {true, nil, ""},
		"in vain":        {false, nil, "kill"},
		"no way":         {false, errors.New("no workspace"), "terminate 15s"},
	} {
		t.Run(name, func(t *testing.T) {
			supervise(t, guestconfig.RestartAlways, func(t *testing.T, b *bench) {
				b.Ask = func() error {
					if tc.obeys {
						time.AfterFunc(10*time.Second, func() { b.job.end(0) })
					}
					return tc.err
				}
				b.Stop(t.Context(), 15*time.Second)
				if got := strings.Join(b.job.calls, ","); got != tc.want {
					t.Errorf("%q, want %q", got, tc.want)
				}
				if !b.over() || b.job.count() != 1 {
					t.Error("it is not over")
				}
			})
		})
	}
}
