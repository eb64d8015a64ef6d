package attest

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"time"

	"coffer/internal/boot"
	"coffer/internal/guestconfig"
)

// Result is one round, as it is logged.
type Result struct {
	Seq      int
	Verdict  Verdict
	Code     string // empty for a pass
	Reason   string // one line, no secret
	Started  time.Duration
	Duration time.Duration
	Stamp    Stamp // of the verifier's last answer
	Gap      Gap   // where the guest's clock stood still or went slowly before the round's end
}

// Loop carries out what Decide decides. Start and Stop are never called at the
// same time; a Round may run beside them, so that a slow start does not let the
// pass grow stale.
type Loop struct {
	Policy Policy
	// Round asks the verifier once. It returns nil for a pass. Its context ends
	// when the round has had its time.
	Round func(context.Context) error
	// Classify turns an error of Round into a verdict.
	Classify func(error) (v Verdict, code, reason string)
	// Clock is what the verifier's clock showed in its last answer, whenever that was.
	Clock func() Stamp
	// Report is told every round. It must not block.
	Report func(Result)
	// Printf writes to the boot log.
	Printf func(format string, a ...any)
	// Start starts the workload; the channel gives its one exit.
	Start func(context.Context) (<-chan error, error)
	// Stop stops the workload at once; an error means that it may still run.
	Stop func(context.Context) error
	// Disable takes the GPUs' leave to work back, for guestconfig.ActionGPUDisable.
	Disable func(context.Context, error)
	// Now is a monotonic clock that also counts suspended time.
	Now func() time.Duration

	// Bounds of a round, a start and a stop.
	RoundTime, StartTime, StopTime time.Duration

	state     State
	since     Stamp // that the next one is compared with
	seq       int
	rounds    chan Result
	starts    chan start         // result of the start under way
	abort     context.CancelFunc // of the start under way, nil when none
	exited    <-chan error
	last      Result // the last round that ended
	restarted bool   // the start under way is not the first
}

// start is how a start went.
type start struct {
	exited <-chan error
	err    error
}

// First attests until the workload may start, and begins to start it.
func (l *Loop) First(ctx context.Context) error {
	l.state = Begin(l.Now())
	l.rounds = make(chan Result, 1)
	l.starts = make(chan start, 1)
	return l.drive(ctx, func() bool { return l.state.Job == JobRunning })
}

// Started goes on attesting until the workload that First has begun to start runs.
func (l *Loop) Started(ctx context.Context) error {
	return l.drive(ctx, func() bool { return l.exited != nil })
}

// Run attests until the guest has to end, and says why: what the workload's
// channel gave, the context's cause, or a failure. The workload may still run
// when the context ended or where a start or a stop failed.
func (l *Loop) Run(ctx context.Context) error {
	return l.drive(ctx, func() bool { return false })
}

// do carries out an action on the workload.
func (l *Loop) do(ctx context.Context, a Action) error {
	switch a {
	case StartJob:
		if l.restarted {
			l.Printf("attestation action=start_job reason=%q", "a round passed")
		}
		l.restarted = true
		// Not bounded by the phase that happens to begin it.
		ctx, l.abort = context.WithTimeout(context.WithoutCancel(ctx), l.StartTime)
		go func() {
			var st start
			st.err = guard(func() (err error) {
				st.exited, err = l.Start(ctx)
				return err
			})
			l.starts <- st
		}()
	case StopJob:
		l.Printf("attestation action=stop_job reason=%q", l.reason())
		if l.abort != nil {
			// What a start that was cut off has left is not known; the end is.
			return boot.Fail(boot.CodeAttestation, fmt.Errorf("while the workload was starting: %w", l.reason()))
		}
		// Whoever cancels ctx wants the workload to end, too.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), l.StopTime)
		defer cancel()
		if err := l.Stop(ctx); err != nil {
			return boot.Fail(boot.CodeWorkload, fmt.Errorf("stop the workload after a bad verdict: %w", err))
		}
		l.exited = nil
	case Warn:
		l.Printf("attestation action=%s reason=%q", l.Policy.Action, l.reason())
		if l.Policy.Action == guestconfig.ActionGPUDisable {
			go l.Disable(ctx, l.reason()) // it may wait for a driver
		}
	}
	return nil
}

// begun takes the result of a start.
func (l *Loop) begun(st start) error {
	l.abort()
	l.abort, l.exited = nil, st.exited
	if st.err != nil {
		return boot.Fail(boot.CodeWorkload, fmt.Errorf("start the workload: %w", st.err))
	}
	return nil
}

// settle ends a start that is under way when the loop ends. Where nothing speaks
// against the workload it may finish: what runs can be asked to end.
func (l *Loop) settle(ctx context.Context) {
	if l.abort == nil {
		return
	}
	if ctx.Err() == nil {
		l.abort()
	}
	timer := time.AfterFunc(l.StopTime, l.abort)
	defer timer.Stop()
	select {
	case <-l.starts:
	case <-time.After(2 * l.StopTime):
	}
	l.abort = nil
}

// reason says why the workload may not run.
func (l *Loop) reason() error {
	r := l.last
	if r.Verdict == Negative {
		return fmt.Errorf("round %d was negative: %s", r.Seq, r.Reason)
	}
	stale := fmt.Sprintf("no pass within %s", l.Policy.MaxStaleness)
	if l.state.Job == JobWaiting {
		stale = fmt.Sprintf("no first pass within %s", l.Policy.FirstWithin)
	}
	if r.Gap.Lost() > 0 {
		stale += ": the clock was stopped or slowed, " + r.Gap.String()
	}
	if r.Seq == 0 || r.Verdict == Pass {
		return errors.New(stale)
	}
	return fmt.Errorf("%s; round %d was unknown: %s", stale, r.Seq, r.Reason)
}

// Left is how long the last pass carries the workload yet, if no round follows.
func (l *Loop) Left() time.Duration {
	if l.Policy.goesOn() {
		return math.MaxInt64
	}
	if !l.state.Passed {
		return 0
	}
	return max(l.state.PassAt+l.Policy.MaxStaleness-l.state.Lost-l.Now(), 0)
}

// drive feeds Decide until it is done, or the guest has to end.
func (l *Loop) drive(ctx context.Context, done func() bool) (err error) {
	defer func() {
		if err != nil {
			l.settle(ctx)
		}
	}()
	ev := Event{Kind: Tick}
	var exit error
	for {
		ev.Jitter = rand.Float64()
		var acts []Action
		l.state, acts = Decide(l.Policy, l.state, ev, l.Now())
		for _, a := range acts {
			switch a {
			case StartRound:
				l.startRound(ctx)
			case PowerOff:
				if ev.Kind == JobExited {
					return exit
				}
				return boot.Fail(boot.CodeAttestation, l.reason())
			default:
				if err := l.do(ctx, a); err != nil {
					return err
				}
			}
		}
		if done() {
			return nil
		}

		timer := time.NewTimer(max(l.state.Wake(l.Policy)-l.Now(), 0))
		ev = Event{Kind: Tick}
		select {
		case <-ctx.Done():
			timer.Stop()
			return context.Cause(ctx)
		case r := <-l.rounds:
			l.since, r.Gap = compare(l.since, r.Stamp)
			ev = Event{Kind: RoundEnded, Verdict: r.Verdict, Started: r.Started, Lost: r.Gap.Lost()}
			l.last = r
			if r.Gap.Lost() > 0 {
				l.Printf("attestation clock stopped or slowed: %s", r.Gap)
			}
			l.Report(r)
		case st := <-l.starts:
			if err := l.begun(st); err != nil {
				return err
			}
		case exit = <-l.exited:
			l.exited = nil
			ev = Event{Kind: JobExited}
		case <-timer.C:
		}
		timer.Stop()
	}
}

// startRound runs one round beside the loop. The machine allows one at a time,
// so the channel never blocks.
func (l *Loop) startRound(ctx context.Context) {
	l.seq++
	r := Result{Seq: l.seq, Started: l.Now()}
	go func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), l.RoundTime)
		defer cancel()
		err := guard(func() error { return l.Round(ctx) })
		r.Duration = l.Now() - r.Started
		r.Verdict = Pass
		if err != nil {
			r.Verdict, r.Code, r.Reason = l.Classify(err)
		}
		r.Stamp = l.Clock()
		l.rounds <- r
	}()
}

// guard turns a panic of f into an error.
func guard(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = &boot.Error{Code: boot.CodeInternal, Err: fmt.Errorf("panic: %v", p)}
		}
	}()
	return f()
}
