package attest

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"coffer/internal/guestconfig"
)

const s = time.Second

func policy(action string, restart bool) Policy {
	return Policy{Every: 60 * s, MaxStaleness: 300 * s, FirstWithin: 120 * s, Action: action, Restart: restart}
}

// step is one event and the actions that it must lead to.
type step struct {
	at   time.Duration
	ev   Event
	want string // actions, joined by blanks
}

func round(v Verdict, started time.Duration) Event {
	return Event{Kind: RoundEnded, Verdict: v, Started: started}
}

var (
	tick   = Event{Kind: Tick}
	exited = Event{Kind: JobExited}
)

func TestDecide(t *testing.T) {
	boot := []step{
		{0, tick, "start_round"},
		{1 * s, round(Pass, 0), "start_job"},
	}
	after := func(more ...step) []step { return append(slices.Clone(boot), more...) }
	for _, tc := range []struct {
		name    string
		action  string
		restart bool
		steps   []step
	}{
		{"rounds follow each other from start to start", guestconfig.ActionStopJob, false, after(
			step{9 * s, tick, ""},
			step{18 * s, tick, ""},
			step{27 * s, tick, ""},
			step{36 * s, tick, ""},
			step{45 * s, tick, ""},
			step{54 * s, tick, ""},
			step{60 * s, tick, "start_round"},
			step{61 * s, tick, ""}, // never two at a time
			step{65 * s, round(Pass, 60*s), ""},
		)},
		{"no start without a pass: negative", guestconfig.ActionStopJob, true, []step{
			{0, tick, "start_round"},
			{1 * s, round(Negative, 0), "power_off"},
			{2 * s, tick, ""},
		}},
		{"no start without a pass: not for action log either", guestconfig.ActionLog, false, []step{
			{0, tick, "start_round"},
			{1 * s, round(Negative, 0), "power_off"},
		}},
		{"first round unknown, then pass", guestconfig.ActionStopJob, false, []step{
			{0, tick, "start_round"},
			{1 * s, round(Unknown, 0), ""},
			{2 * s, tick, "start_round"},
			{3 * s, round(Unknown, 2*s), ""},
			{4 * s, tick, ""}, // 2 s of back-off
			{5 * s, tick, "start_round"},
			{6 * s, round(Pass, 5*s), "start_job"},
		}},
		{"first round unknown for too long", guestconfig.ActionStopJob, true, []step{
			{0, tick, "start_round"},
			{119 * s, round(Unknown, 0), ""},
			{120 * s, tick, "power_off"},
		}},
		{"first pass that took longer than max_staleness is stale", guestconfig.ActionStopJob, false, []step{
			{0, tick, "start_round"},
			{300 * s, round(Pass, 0), "power_off"},
		}},
		{"stop_job without restart", guestconfig.ActionStopJob, false, after(
			step{60 * s, tick, "start_round"},
			step{61 * s, round(Negative, 60*s), "stop_job power_off"},
			step{62 * s, tick, ""},
		)},
		{"stop_job with restart", guestconfig.ActionStopJob, true, after(
			step{60 * s, tick, "start_round"},
			step{61 * s, round(Negative, 60*s), "stop_job"},
			step{70 * s, tick, ""},
			step{120 * s, tick, "start_round"},
			step{121 * s, round(Unknown, 120*s), ""},
			step{122 * s, tick, "start_round"},
			step{123 * s, round(Negative, 122*s), ""},
			step{182 * s, tick, "start_round"},
			step{183 * s, round(Pass, 182*s), "start_job"},
		)},
		{"shutdown", guestconfig.ActionShutdown, true, after(
			step{60 * s, tick, "start_round"},
			step{61 * s, round(Negative, 60*s), "stop_job power_off"},
		)},
		{"log warns once and goes on", guestconfig.ActionLog, false, after(
			step{60 * s, tick, "start_round"},
			step{61 * s, round(Negative, 60*s), "warn"},
			step{62 * s, tick, ""},
			step{120 * s, tick, "start_round"},
			step{121 * s, round(Pass, 120*s), ""},
			step{180 * s, tick, "start_round"},
			step{181 * s, round(Negative, 180*s), "warn"}, // the next outage
		)},
		{"gpu_disable goes on like log", guestconfig.ActionGPUDisable, true, after(
			step{60 * s, tick, "start_round"},
			step{61 * s, round(Negative, 60*s), "warn"},
			step{120 * s, tick, "start_round"},
			step{121 * s, round(Negative, 120*s), ""},
		)},
		{"unknown until stale", guestconfig.ActionStopJob, true, after(
			step{60 * s, tick, "start_round"},
			step{70 * s, round(Unknown, 60*s), ""},
			step{71 * s, tick, "start_round"},
			step{299 * s, tick, ""},
			step{300 * s, tick, "stop_job"}, // while the round still runs
			step{301 * s, round(Pass, 71*s), "start_job start_round"},
		)},
		{"a round that took longer than max_staleness carries nothing", guestconfig.ActionStopJob, true, after(
			step{60 * s, tick, "start_round"},
			step{360 * s, round(Pass, 60*s), "stop_job start_round"},
		)},
		{"a pass counts from the round's start", guestconfig.ActionStopJob, false, []step{
			{0, tick, "start_round"},
			{299 * s, round(Pass, 0), "start_job start_round"},
			{300 * s, tick, "stop_job power_off"},
		}},
		{"a paused VM attests at once", guestconfig.ActionStopJob, false, after(
			step{6 * s, tick, ""},
			step{30 * s, tick, "start_round"},
		)},
		{"a VM paused for longer than max_staleness stops the job first", guestconfig.ActionStopJob, true, after(
			step{6 * s, tick, ""},
			step{1000 * s, tick, "stop_job start_round"},
		)},
		{"the workload's own end ends the guest", guestconfig.ActionStopJob, true, after(
			step{6 * s, exited, "power_off"},
			step{7 * s, tick, ""},
		)},
		{"an exit after a stop is no news", guestconfig.ActionStopJob, true, after(
			step{60 * s, tick, "start_round"},
			step{61 * s, round(Negative, 60*s), "stop_job"},
			step{62 * s, exited, ""},
		)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := policy(tc.action, tc.restart)
			st := Begin(0)
			for i, step := range tc.steps {
				var acts []Action
				st, acts = Decide(p, st, step.ev, step.at)
				var got []string
				for _, a := range acts {
					got = append(got, a.String())
				}
				if g := strings.Join(got, " "); g != step.want {
					t.Fatalf("step %d at %v: actions %q, want %q (state %+v)", i, step.at, g, step.want, st)
				}
			}
		})
	}
}

func TestBackoffAndJitter(t *testing.T) {
	p := policy(guestconfig.ActionStopJob, false)
	var got []time.Duration
	for n := 1; n <= 9; n++ {
		got = append(got, backoff(p, n))
	}
	want := []time.Duration{1 * s, 2 * s, 4 * s, 8 * s, 16 * s, 32 * s, 60 * s, 60 * s, 60 * s}
	if !slices.Equal(got, want) {
		t.Errorf("back-off is %v, want %v", got, want)
	}
	p.Every = 5 * s
	if got := backoff(p, 1000); got != 5*s {
		t.Errorf("back-off of %v is longer than check_frequency", got)
	}
	for _, j := range []float64{-1, 0, 0.5, 1, 2} {
		if got := shorten(60*s, j); got > 60*s || got < 54*s {
			t.Errorf("jitter %v makes 60s %v", j, got)
		}
	}
}

// TestModel drives Decide through long random lives with a caller that wakes up
// late at most as Wake allows, and holds it to its promises at every moment.
func TestModel(t *testing.T) {
	seen := map[Action]int{}
	for seed := range uint64(500) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			model(t, rand.New(rand.NewPCG(seed, 1)), seen)
		})
	}
	t.Log(seen)
	for a := StartRound; a <= PowerOff; a++ {
		if seen[a] < 100 {
			t.Errorf("only %d times %v: the model does not reach what it is for", seen[a], a)
		}
	}
}

func model(t *testing.T, rnd *rand.Rand, seen map[Action]int) {
	actions := []string{guestconfig.ActionStopJob, guestconfig.ActionShutdown, guestconfig.ActionLog}
	every := time.Duration(1+rnd.IntN(100)) * s
	p := Policy{
		Every:        every,
		MaxStaleness: every + time.Duration(rnd.IntN(500))*s,
		Action:       actions[rnd.IntN(len(actions))],
		Restart:      rnd.IntN(2) == 0,
	}
	p.FirstWithin = min(p.MaxStaleness, 300*s)

	var (
		now       time.Duration
		st        = Begin(0)
		running   bool          // the workload, as the world has it
		lastPass  time.Duration // start of the last pass that no negative verdict followed
		passed    bool
		inRound   bool
		began     time.Duration // of the round
		roundEnds time.Duration
		lastEnd   time.Duration
		over      bool
	)
	apply := func(ev Event) {
		ev.Jitter = rnd.Float64()
		var acts []Action
		st, acts = Decide(p, st, ev, now)
		if over && len(acts) > 0 {
			t.Fatalf("%v: actions %v after power_off", now, acts)
		}
		for _, a := range acts {
			if over {
				t.Fatalf("%v: %v after power_off in %v", now, a, acts)
			}
			seen[a]++
			switch a {
			case StartRound:
				if inRound {
					t.Fatalf("%v: rounds overlap", now)
				}
				inRound, began = true, now
				roundEnds = now + time.Duration(rnd.Int64N(int64(90*s)))
				if rnd.IntN(3) > 0 {
					roundEnds = now + time.Duration(rnd.Int64N(int64(s)))
				}
			case StartJob:
				if running {
					t.Fatalf("%v: started twice", now)
				}
				running = true
			case StopJob:
				if !running {
					t.Fatalf("%v: stopped what does not run", now)
				}
				running = false
			case PowerOff:
				over, running = true, false
			case Warn:
				if p.Action != guestconfig.ActionLog {
					t.Fatalf("%v: warned instead of %s", now, p.Action)
				}
			}
		}
		if running && !passed {
			if p.Action != guestconfig.ActionLog {
				t.Fatalf("%v: runs without a pass", now)
			}
		}
		if running && p.Action != guestconfig.ActionLog && now-lastPass >= p.MaxStaleness {
			t.Fatalf("%v: runs with a pass of %v, max_staleness is %v", now, lastPass, p.MaxStaleness)
		}
		if !over && !inRound && now-lastEnd > p.Every {
			t.Fatalf("%v: no round since %v, check_frequency is %v", now, lastEnd, p.Every)
		}
	}

	apply(Event{Kind: Tick})
	mood := rnd.IntN(40) // how likely a bad verdict is
	for range 2000 {
		if over {
			return
		}
		if rnd.IntN(50) == 0 {
			mood = rnd.IntN(40)
		}
		wake := max(st.Wake(p), now)
		switch {
		case running && rnd.IntN(500) == 0:
			running = false
			apply(Event{Kind: JobExited})
		case rnd.IntN(300) == 0: // the host stops the VM for a while
			wasRunning, last := running, lastPass
			now += stoodStill + 1 + time.Duration(rnd.Int64N(int64(2*p.MaxStaleness)))
			// It ran on paper only; what counts is the moment after.
			apply(Event{Kind: Tick})
			if wasRunning && p.Action != guestconfig.ActionLog && now-last >= p.MaxStaleness && running && lastPass == last {
				t.Fatalf("%v: still runs after the pause", now)
			}
			if !over && !inRound {
				t.Fatalf("%v: no round after a pause", now)
			}
		case inRound && roundEnds <= wake:
			now = max(now, roundEnds)
			inRound, lastEnd = false, now
			v := Pass
			if rnd.IntN(100) < mood {
				v = []Verdict{Unknown, Unknown, Negative}[rnd.IntN(3)]
			}
			switch v {
			case Pass:
				passed, lastPass = true, began
			case Negative:
				passed = false
			}
			apply(Event{Kind: RoundEnded, Verdict: v, Started: began})
		default:
			now = wake
			apply(Event{Kind: Tick})
		}
	}
}
