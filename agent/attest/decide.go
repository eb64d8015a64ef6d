// Package attest decides whether the workload may run, and keeps deciding.
//
// A round asks the verifier for one verdict. Pass carries the workload for at
// most MaxStaleness, counted from the round's start. Negative is acted on at
// once. Unknown (nobody authentic answered) is retried with a back-off; once the
// last pass is too old, it counts as negative. The workload never starts without
// a pass, whatever the failure action is.
//
// A guest that stood still attests at once. It sees that by its own clock, where the
// host lets that run on, else by the verifier's at the end of the next round.
//
// What decides is Decide: a pure function of the policy, the state, an event and
// the time. Loop carries its decisions out. The package knows nothing of the
// verifier, of the evidence or of containers.
package attest

import (
	"time"

	"coffer/internal/guestconfig"
)

// Verdict is the outcome of a round.
type Verdict int

// Verdicts.
const (
	Unknown Verdict = iota
	Pass
	Negative
)

func (v Verdict) String() string {
	switch v {
	case Pass:
		return "pass"
	case Negative:
		return "negative"
	}
	return "unknown"
}

// Policy is what the guest config asks for.
type Policy struct {
	Every        time.Duration // from one round's start to the next
	MaxStaleness time.Duration // how long a pass carries the workload
	FirstWithin  time.Duration // how long unknown verdicts may hold up the first pass
	Action       string        // one of guestconfig's
	Restart      bool          // after ActionStopJob: go on attesting and start again after a pass
}

// goesOn reports whether the workload goes on without a good verdict.
func (p Policy) goesOn() bool {
	return p.Action == guestconfig.ActionLog || p.Action == guestconfig.ActionGPUDisable
}

// Times that are the same for every guest.
const (
	backoffFirst = time.Second
	backoffMax   = time.Minute
	stoodStill   = 10 * time.Second // a longer time between two events: the VM was paused
	jitterShare  = 10               // jitter shortens a wait by at most a tenth
)

// Job is where the workload stands.
type Job int

// Jobs.
const (
	JobWaiting Job = iota // not started yet: no pass yet
	JobRunning
	JobStopped // by a verdict; a pass starts it again
)

// State is all that Decide remembers. Times are those of the guest's monotonic
// clock, and Lost on top.
type State struct {
	Job      Job
	Began    time.Duration // when the loop began
	PassAt   time.Duration // start of the last round that passed
	Passed   bool          // PassAt is valid: it has not run out, and no negative verdict came after it
	Unknowns int           // unknown verdicts in a row
	Due      time.Duration // when the next round starts
	InRound  bool
	Again    bool          // the guest stood still during the round: another follows at once
	Extra    bool          // the round is such a one; none follows it at once
	Seen     time.Duration // when the last event came
	Lost     time.Duration // what the guest's clock did not count
	Warned   bool          // the workload goes on: the present outage has been reported
	Over     bool          // PowerOff was decided
}

// Begin is the state of a loop that begins now.
func Begin(now time.Duration) State { return State{Began: now, Due: now, Seen: now} }

// Kind is the kind of an event.
type Kind int

// Kinds.
const (
	Tick       Kind = iota // time passed
	RoundEnded             // Verdict and Started are set
	JobExited              // the workload ended, or did not start
)

// Event is what happened.
type Event struct {
	Kind    Kind
	Verdict Verdict
	Started time.Duration // of the round
	Lost    time.Duration // that the guest's clock did not count before the round's end, as far as no event has told yet
	Jitter  float64       // 0 to 1, drawn at random by the caller; shortens the next wait
}

// Action is what to do. Actions are done in the order in which they are given.
type Action int

// Actions.
const (
	StartRound Action = iota // never while a round runs
	StartJob
	StopJob  // at once: pause, then kill
	Warn     // the workload goes on without a good verdict
	PowerOff // the last one
)

func (a Action) String() string {
	return [...]string{"start_round", "start_job", "stop_job", "warn", "power_off"}[a]
}

// fresh reports whether a pass carries the workload at now.
func (s State) fresh(p Policy, now time.Duration) bool {
	return s.Passed && now-s.PassAt < p.MaxStaleness
}

// Decide takes one event. It is a pure function; now is the guest's clock, which
// never runs backwards.
//
// Lost time makes every pass older by as much, that of the ending round included:
// the guest may have stood still after its evidence was made.
func Decide(p Policy, s State, ev Event, now time.Duration) (State, []Action) {
	if s.Over {
		return s, nil
	}
	ev.Started += s.Lost
	still := now+s.Lost-s.Seen > stoodStill || ev.Lost > 0
	s.Lost += min(max(ev.Lost, 0), p.MaxStaleness) // more says no more
	now += s.Lost
	s.Seen = now
	if still {
		s.Due, s.Again = now, s.InRound
	}

	var acts []Action
	negative := s.Job == JobRunning && !s.Warned && !s.fresh(p, now) // though this very round may pass
	switch ev.Kind {
	case RoundEnded:
		s.InRound = false
		s.Due = ev.Started + shorten(p.Every, ev.Jitter)
		switch ev.Verdict {
		case Pass:
			s.Passed, s.PassAt, s.Unknowns = true, ev.Started, 0
			s.Warned = s.Warned && !s.fresh(p, now)
		case Negative:
			s.Passed, s.Unknowns = false, 0
			negative = true
		default:
			s.Unknowns++
			s.Due = now + shorten(backoff(p, s.Unknowns), ev.Jitter)
		}
		s.Extra = s.Again && !s.Extra
		if s.Extra {
			s.Due = now
		}
		s.Again = false
	case JobExited:
		if s.Job == JobRunning {
			s.Over = true
			return s, []Action{PowerOff}
		}
	}

	switch {
	case s.Job == JobWaiting && s.fresh(p, now),
		s.Job == JobStopped && s.fresh(p, now):
		s.Job = JobRunning
		acts = append(acts, StartJob)
	case s.Job == JobWaiting && (negative || now-s.Began >= p.FirstWithin):
		s.Over = true
		return s, []Action{PowerOff}
	case s.Job == JobRunning && (negative || !s.fresh(p, now)):
		s.Passed = false
		switch {
		case p.goesOn():
			if !s.Warned {
				s.Warned = true
				acts = append(acts, Warn)
			}
		case p.Action == guestconfig.ActionStopJob && p.Restart:
			s.Job = JobStopped
			acts = append(acts, StopJob)
		default:
			s.Over = true
			return s, []Action{StopJob, PowerOff}
		}
	}
	if !s.InRound && now >= s.Due {
		s.InRound = true
		acts = append(acts, StartRound)
	}
	return s, acts
}

// Wake is when Decide wants a Tick at the latest, if nothing else happens, by the
// guest's clock.
func (s State) Wake(p Policy) time.Duration {
	wake := s.Seen + stoodStill/2 // so that a longer silence means a pause
	if !s.InRound {
		wake = min(wake, s.Due)
	}
	switch {
	case s.Job == JobWaiting:
		wake = min(wake, s.Began+p.FirstWithin)
	case s.Job == JobRunning && s.Passed && !s.Warned:
		wake = min(wake, s.PassAt+p.MaxStaleness)
	}
	return wake - s.Lost
}

// backoff is the wait after the n-th unknown verdict in a row.
func backoff(p Policy, n int) time.Duration {
	d := backoffFirst << min(n-1, 10)
	return min(d, backoffMax, p.Every)
}

func shorten(d time.Duration, jitter float64) time.Duration {
	return d - time.Duration(float64(d/jitterShare)*min(max(jitter, 0), 1))
}
