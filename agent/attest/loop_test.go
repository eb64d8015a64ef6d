package attest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"coffer/internal/boot"
	"coffer/internal/guestconfig"
)

var (
	errDenied = errors.New("denied")
	errSilent = errors.New("silent")
)

// world is what a Loop acts on. It runs in a synctest bubble: no goroutine of
// the loop runs while the test looks at it after synctest.Wait.
type world struct {
	*Loop
	mu       sync.Mutex
	verdict  error // of the rounds to come
	takes    time.Duration
	running  chan error // of the present run, nil when none
	starts   int
	startErr error
	ahead    time.Duration // of the verifier's clock before the guest's; 0: it has none

	startTakes time.Duration
	stopErr    error
	lines      []string
	results    []Result
}

func newWorld(action string, restart bool) *world {
	w := &world{takes: time.Second}
	began := time.Now()
	var answered Stamp
	w.Loop = &Loop{
		Policy: policy(action, restart),
		Round: func(ctx context.Context) error {
			w.mu.Lock()
			verdict, takes, ahead := w.verdict, w.takes, w.ahead
			w.mu.Unlock()
			sent := time.Since(began)
			select {
			case <-time.After(takes):
				if ahead != 0 {
					answered = Stamp{Verifier: time.Now().Add(ahead), Sent: sent, Came: time.Since(began)}
				}
				return verdict
			case <-ctx.Done():
				return errSilent
			}
		},
		Classify: func(err error) (Verdict, string, string) {
			if errors.Is(err, errDenied) {
				return Negative, "E_KBS_DENIED", err.Error()
			}
			return Unknown, "E_KBS_UNREACHABLE", err.Error()
		},
		Report: func(r Result) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.results = append(w.results, r)
		},
		Printf: func(f string, a ...any) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.lines = append(w.lines, fmt.Sprintf(f, a...))
		},
		Start: func(ctx context.Context) (<-chan error, error) {
			select {
			case <-time.After(w.startTakes):
			case <-ctx.Done():
				return nil, ctx.Err()
			}
			w.mu.Lock()
			defer w.mu.Unlock()
			if w.startErr != nil {
				return nil, w.startErr
			}
			w.starts++
			w.running = make(chan error, 1)
			return w.running, nil
		},
		Stop: func(context.Context) error {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.running = nil
			return w.stopErr
		},
		Now:       func() time.Duration { w.sync(); return time.Since(began) },
		Clock:     func() Stamp { return answered },
		RoundTime: 30 * time.Second, StartTime: time.Minute, StopTime: time.Minute,
	}
	return w
}

// live runs the loop as the agent does. The result comes through the channel.
func (w *world) live(ctx context.Context) <-chan error {
	done := make(chan error, 1)
	go func() {
		if err := w.First(ctx); err != nil {
			done <- err
			return
		}
		if err := w.Started(ctx); err != nil {
			done <- err
			return
		}
		done <- w.Run(ctx)
	}()
	return done
}

// sync tells the race detector what fake time ensures: the loop and the test do
// not act at the same moment. The callbacks hold the lock.
func (w *world) sync() {
	w.mu.Lock()
	defer w.mu.Unlock()
}

func (w *world) wait(d time.Duration) {
	w.sync()
	time.Sleep(d) // fake time
	synctest.Wait()
	w.sync()
}

func (w *world) saw(t *testing.T, text string) {
	t.Helper()
	if !strings.Contains(strings.Join(w.lines, "\n"), text) {
		t.Errorf("no line with %q in %q", text, w.lines)
	}
}

func ended(t *testing.T, done <-chan error) error {
	t.Helper()
	select {
	case err := <-done:
		return err
	default:
		t.Fatal("the loop goes on")
		return nil
	}
}

func TestLoopRounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(guestconfig.ActionStopJob, false)
		ctx, cancel := context.WithCancelCause(context.Background())
		done := w.live(ctx)
		w.wait(10*time.Minute + 2*time.Second)
		// 60 s from start to start, shortened by a tenth at most.
		if n := len(w.results); n < 11 || n > 13 {
			t.Errorf("%d rounds in 10 minutes", n)
		}
		for i, r := range w.results {
			if r.Seq != i+1 || r.Verdict != Pass || r.Duration != time.Second || r.Code != "" || r.Reason != "" {
				t.Errorf("result %d is %+v", i, r)
			}
		}
		if w.starts != 1 || w.running == nil {
			t.Errorf("started %d times, running %v", w.starts, w.running != nil)
		}
		stop := errors.New("power button")
		cancel(stop)
		w.wait(0)
		if err := ended(t, done); err != stop {
			t.Errorf("ended with %v", err)
		}
		if w.running == nil {
			t.Error("the loop stopped the workload; an orderly stop is its caller's")
		}
		left := w.Left()
		if left < 4*time.Minute-time.Second || left > 5*time.Minute {
			t.Errorf("the last pass carries for %v", left)
		}
		w.wait(left)
		if w.Left() != 0 {
			t.Errorf("after that it carries for %v", w.Left())
		}
		w.wait(time.Minute) // the round in flight
	})
}

func TestLoopNegative(t *testing.T) {
	for _, tc := range []struct {
		action  string
		restart bool
	}{{guestconfig.ActionStopJob, false}, {guestconfig.ActionShutdown, false}, {guestconfig.ActionShutdown, true}} {
		t.Run(fmt.Sprint(tc), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(tc.action, tc.restart)
				done := w.live(context.Background())
				w.wait(10 * time.Second)
				w.verdict = errDenied
				w.wait(55 * time.Second)
				err := ended(t, done)
				if boot.CodeOf(err) != boot.CodeAttestation || !strings.Contains(err.Error(), "round 2 was negative: denied") {
					t.Errorf("ended with %s %v", boot.CodeOf(err), err)
				}
				if w.running != nil {
					t.Error("the workload still runs")
				}
				w.saw(t, `attestation action=stop_job reason="round 2 was negative: denied"`)
			})
		})
	}
}

// The host stops the guest's clock together with the VM: the guest learns it by the
// verifier's, tells it, and attests once more at once.
func TestLoopLostTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(guestconfig.ActionStopJob, true)
		w.ahead = time.Hour
		ctx, cancel := context.WithCancel(context.Background())
		done := w.live(ctx)
		w.wait(10 * time.Second)
		w.ahead += 100 * time.Second
		w.wait(55 * time.Second)
		if len(w.results) != 3 || w.results[2].Started != w.results[1].Started+w.results[1].Duration {
			t.Fatalf("no third round at once: %+v", w.results)
		}
		// The gap is told with the time that the calls may have taken, one second each.
		if gap := w.results[1].Gap; gap.Lost() != 99*time.Second || w.results[0].Gap != (Gap{}) || w.results[2].Gap != (Gap{}) {
			t.Errorf("gaps %v, %v, %v", w.results[0].Gap, gap, w.results[2].Gap)
		}
		w.saw(t, "attestation clock stopped or slowed: the KBS counted 2m")
		if w.starts != 1 || w.running == nil {
			t.Error("the workload was stopped")
		}
		w.sync()
		left := w.Left()
		w.wait(30 * time.Second)
		if w.results[3-1].Seq != 3 || len(w.results) != 3 {
			t.Errorf("%d rounds, want no more before check_frequency", len(w.results))
		}
		if got := w.Left(); got != left-30*time.Second || got > 5*time.Minute-30*time.Second {
			t.Errorf("the last pass carries for %v, 30 s ago for %v", got, left)
		}

		w.ahead += 6 * time.Minute // longer than max_staleness
		w.wait(35 * time.Second)
		w.saw(t, `attestation action=stop_job reason="no pass within 5m0s: the clock was stopped or slowed, the KBS counted `)
		w.saw(t, `attestation action=start_job reason="a round passed"`)
		if w.starts != 2 || w.running == nil {
			t.Errorf("started %d times, running %v", w.starts, w.running != nil)
		}
		cancel()
		w.wait(time.Minute)
		ended(t, done)
	})
}

func TestLoopRecovers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(guestconfig.ActionStopJob, true)
		ctx, cancel := context.WithCancel(context.Background())
		done := w.live(ctx)
		w.wait(10 * time.Second)
		w.verdict = errSilent
		w.wait(4 * time.Minute)
		if w.running == nil {
			t.Fatal("stopped before max_staleness")
		}
		w.wait(time.Minute)
		if w.running != nil {
			t.Fatal("runs with a pass older than max_staleness")
		}
		w.saw(t, `attestation action=stop_job reason="no pass within 5m0s; round `)
		w.verdict = nil
		w.wait(2 * time.Minute)
		if w.running == nil || w.starts != 2 {
			t.Fatalf("not started again after a pass: %d starts", w.starts)
		}
		w.saw(t, `attestation action=start_job reason="a round passed"`)
		cancel()
		w.wait(time.Minute)
		ended(t, done)
	})
}

func TestLoopGoesOn(t *testing.T) {
	for _, action := range []string{guestconfig.ActionLog, guestconfig.ActionGPUDisable} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(action, false)
			var disabled []error
			w.Disable = func(_ context.Context, why error) { disabled = append(disabled, why) }
			ctx, cancel := context.WithCancel(context.Background())
			done := w.live(ctx)
			w.wait(10 * time.Second)
			w.verdict = errDenied
			w.wait(time.Hour)
			if w.running == nil {
				t.Errorf("stopped by action %s", action)
			}
			if len(w.lines) != 1 || !strings.Contains(w.lines[0], "action="+action) {
				t.Errorf("want one warning for one outage, got %q", w.lines)
			}
			if want := map[string]int{guestconfig.ActionGPUDisable: 1}[action]; len(disabled) != want {
				t.Errorf("%s disabled the GPUs %d times: %v", action, len(disabled), disabled)
			}
			cancel()
			w.wait(time.Minute)
			ended(t, done)
		})
	}
}

// A start that takes longer than max_staleness is carried by the rounds beside it.
func TestLoopSlowStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(guestconfig.ActionStopJob, true)
		w.startTakes, w.StartTime = 20*time.Minute, time.Hour
		ctx, cancel := context.WithCancel(context.Background())
		done := w.live(ctx)
		w.wait(19 * time.Minute)
		if w.running != nil || len(w.results) < 18 {
			t.Errorf("running %v after %d rounds", w.running != nil, len(w.results))
		}
		w.wait(2 * time.Minute)
		if w.running == nil {
			t.Error("not started")
		}
		cancel()
		w.wait(time.Minute)
		ended(t, done)
	})
}

func TestLoopEnds(t *testing.T) {
	lost := errors.New("exited")
	for _, tc := range []struct {
		name string
		prep func(*world)
		act  func(*world)
		is   error
		code boot.Code
		runs bool
	}{
		{"first round negative", func(w *world) { w.verdict = errDenied }, nil, nil, boot.CodeAttestation, false},
		{"KBS silent from the start", func(w *world) { w.verdict = errSilent }, nil, nil, boot.CodeAttestation, false},
		{"round hangs from the start", func(w *world) { w.takes = time.Hour }, nil, nil, boot.CodeAttestation, false},
		{"start takes too long", func(w *world) { w.startTakes = time.Hour }, nil, context.DeadlineExceeded, boot.CodeWorkload, false},
		{"negative while starting", func(w *world) { w.startTakes, w.StartTime = time.Hour, time.Hour },
			func(w *world) { w.verdict = errDenied }, nil, boot.CodeAttestation, false},
		{"start fails", func(w *world) { w.startErr = lost }, nil, lost, boot.CodeWorkload, false},
		{"stop fails", func(w *world) { w.stopErr = lost }, func(w *world) { w.verdict = errDenied }, lost, boot.CodeWorkload, false},
		{"the workload exits", nil, func(w *world) { w.running <- lost }, lost, boot.CodeInternal, true},
		{"a round panics", func(w *world) { w.Round = func(context.Context) error { panic("oops") } }, nil, nil, boot.CodeAttestation, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(guestconfig.ActionStopJob, true)
				if tc.prep != nil {
					tc.prep(w)
				}
				done := w.live(context.Background())
				w.wait(10 * time.Second)
				if tc.act != nil {
					tc.act(w)
				}
				w.wait(4 * time.Minute)
				err := ended(t, done)
				if err == nil || tc.is != nil && !errors.Is(err, tc.is) || boot.CodeOf(err) != tc.code {
					t.Errorf("ended with %s %v, want %s %v", boot.CodeOf(err), err, tc.code, tc.is)
				}
				w.wait(time.Minute)
			})
		})
	}
}
