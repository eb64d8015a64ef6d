package workload

import (
	"context"
	"errors"
	"fmt"
	"time"

	"coffer/internal/guestconfig"
)

// Job is what a Supervisor runs: a Runner.
type Job interface {
	Start(ctx context.Context) (ended <-chan struct{}, err error)
	Exit() Exit
	Kill(ctx context.Context) error
	Terminate(ctx context.Context, grace time.Duration) error
}

// Supervisor runs a job, again where its policy says so. Start, Stop and Kill
// are not called at the same time.
type Supervisor struct {
	Job     Job
	Restart string          // guestconfig.RestartNever ("" too), RestartOnFailure or RestartAlways
	Failed  func(Exit) bool // judges an end that nobody asked for
	Before  func()          // before each start
	Ask     func() error    // asks for an end; nil: the image's stop signal
	Printf  func(format string, a ...any)
	Now     func() time.Duration

	starting chan struct{}      // holds one token while a start is under way
	halt     context.CancelFunc // no more starts
	abort    context.CancelFunc // nor the one under way
	done     chan struct{}      // closed when the last run's end has been logged
}

// Times of restarts.
const (
	restartFirst = time.Second
	restartMax   = time.Minute
	steadyAfter  = 10 * time.Minute // a run this long forgets the earlier ones
	againWithin  = time.Minute      // for a start
)

// Start starts the job. ctx bounds the start, not the run. The channel gives the
// last run's end.
func (s *Supervisor) Start(ctx context.Context) (<-chan Exit, error) {
	s.starting = make(chan struct{}, 1)
	life, halt := context.WithCancel(context.Background())
	began := s.Now()
	run, err := s.begin(life, ctx)
	if err != nil {
		halt()
		return nil, err
	}
	starts, abort := context.WithCancel(context.Background())
	s.halt, s.abort, s.done = halt, abort, make(chan struct{})
	last := make(chan Exit, 1)
	go func() {
		defer close(s.done)
		last <- s.keep(life, starts, run, began)
	}()
	return last, nil
}

// begin starts a run, within ctx, unless life is over.
func (s *Supervisor) begin(life, ctx context.Context) (<-chan struct{}, error) {
	s.starting <- struct{}{}
	defer func() { <-s.starting }()
	if err := life.Err(); err != nil {
		return nil, err
	}
	s.Before()
	return s.Job.Start(ctx)
}

// keep returns the end of the last run.
func (s *Supervisor) keep(life, starts context.Context, run <-chan struct{}, began time.Duration) Exit {
	for tries := 1; ; tries++ {
		<-run
		exit, ran := s.Job.Exit(), s.Now()-began
		asked := life.Err() != nil
		failed := !asked && s.Failed(exit)
		again := !asked && (s.Restart == guestconfig.RestartAlways || failed && s.Restart == guestconfig.RestartOnFailure)
		if ran >= steadyAfter {
			tries = 1
		}
		wait := min(restartFirst<<min(tries-1, 10), restartMax)
		line := fmt.Sprintf("workload exited %s seconds=%.1f", exit, ran.Seconds())
		if failed && exit.Code == 0 {
			line += " early=true"
		}
		if !again {
			s.Printf("%s", line)
			return exit
		}
		s.Printf("%s restart=%d in=%s", line, tries, wait)
		for {
			select {
			case <-life.Done():
				return exit
			case <-time.After(wait):
			}
			began = s.Now()
			ctx, cancel := context.WithTimeout(starts, againWithin)
			var err error
			run, err = s.begin(life, ctx)
			cancel()
			if err == nil {
				break
			}
			if life.Err() != nil {
				return exit
			}
			s.Printf("workload does not start again: %v", err)
			wait = restartMax
		}
		s.Printf("workload started again restart=%d", tries)
	}
}

// Kill ends the job at once, for good. nil means that nothing of it is left.
func (s *Supervisor) Kill(ctx context.Context) error {
	if s.halt == nil { // it never started, as far as a start that failed tells
		return s.Job.Kill(ctx)
	}
	s.halt()
	s.abort()
	return s.end(ctx, s.Job.Kill)
}

// Stop asks the job to end, gives it grace, and then kills it. A start that is
// under way may finish within the grace: what runs can be asked.
func (s *Supervisor) Stop(ctx context.Context, grace time.Duration) error {
	if s.halt == nil {
		return s.Kill(ctx)
	}
	s.halt()
	until := s.Now() + grace
	timer := time.AfterFunc(grace, s.abort)
	defer timer.Stop()
	return s.end(ctx, func(ctx context.Context) error {
		grace := max(until-s.Now(), 0)
		if s.Ask == nil {
			return s.Job.Terminate(ctx, grace)
		}
		if err := s.Ask(); err != nil {
			s.Printf("%v; it gets the stop signal", err)
			return s.Job.Terminate(ctx, grace)
		}
		select {
		case <-s.done:
			return nil
		case <-time.After(grace):
		case <-ctx.Done():
		}
		return s.Job.Kill(ctx)
	})
}

// end ends the run, after the start that may be under way.
func (s *Supervisor) end(ctx context.Context, how func(context.Context) error) error {
	select {
	case s.starting <- struct{}{}:
		defer func() { <-s.starting }()
	case <-ctx.Done():
		return errors.Join(fmt.Errorf("a start of the workload does not end: %w", ctx.Err()), s.Job.Kill(ctx))
	}
	if err := how(ctx); err != nil {
		return err
	}
	select {
	case <-s.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
