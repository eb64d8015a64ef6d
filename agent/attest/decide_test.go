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

func lost(ev Event, d time.Duration) Event {
	ev.Lost = d
	return ev
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
			{9 * s, tick, ""},
			{18 * s, round(Unknown, 0), ""},
			{119 * s, tick, "start_round"},
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
		{"a pause during a round: another one follows at once, and no third", guestconfig.ActionStopJob, false, after(
			step{60 * s, tick, "start_round"},
			step{90 * s, tick, ""},
			step{91 * s, round(Pass, 60*s), "start_round"},
			step{111 * s, round(Pass, 91*s), ""}, // the host does it again
			step{151 * s, tick, "start_round"},
		)},
		{"a pause that a round's end reveals", guestconfig.ActionStopJob, false, after(
			step{60 * s, tick, "start_round"},
			step{90 * s, round(Pass, 60*s), "start_round"},
			step{91 * s, round(Pass, 90*s), ""},
		)},
		{"time that the clock did not count: attest at once, once", guestconfig.ActionStopJob, false, after(
			step{60 * s, tick, "start_round"},
			step{61 * s, lost(round(Pass, 60*s), 30*s), "start_round"},
			step{62 * s, lost(round(Pass, 61*s), 30*s), ""},
			step{71 * s, tick, ""},
			// 60 s after the last round's start, 30 of them gone before its end.
			step{81 * s, tick, ""},
			step{90 * s, tick, ""},
			step{91 * s, tick, "start_round"},
			step{92 * s, lost(round(Pass, 91*s), 30*s), "start_round"},
		)},
		{"lost time at an unknown verdict: no back-off, once", guestconfig.ActionStopJob, false, after(
			step{60 * s, tick, "start_round"},
			step{61 * s, lost(round(Unknown, 60*s), 30*s), "start_round"},
			step{62 * s, lost(round(Unknown, 61*s), 30*s), ""},
			step{64 * s, tick, "start_round"},
		)},
		{"lost time at a negative verdict changes nothing of it", guestconfig.ActionStopJob, true, after(
			step{60 * s, tick, "start_round"},
			step{61 * s, lost(round(Negative, 60*s), 30*s), "stop_job start_round"},
			step{62 * s, round(Pass, 61*s), "start_job"},
		)},
		{"lost time makes the last pass older", guestconfig.ActionStopJob, true, after(
			step{60 * s, tick, "start_round"},
			step{61 * s, lost(round(Pass, 60*s), 200*s), "start_round"},
			step{62 * s, round(Unknown, 61*s), ""},
			step{63 * s, tick, "start_round"},
			step{159 * s, tick, ""},
			step{160 * s, tick, "stop_job"}, // 100 s after its start, and 200 lost
		)},
		{"more than max_staleness lost: stopped, though the round passed", guestconfig.ActionStopJob, false, after(
			step{60 * s, tick, "start_round"},
			step{61 * s, lost(round(Pass, 60*s), 300*s), "stop_job power_off"},
		)},
		{"max_staleness since the last pass, lost time included", guestconfig.ActionStopJob, true, after(
			step{60 * s, tick, "start_round"},
			step{61 * s, lost(round(Pass, 60*s), 239*s), "stop_job start_round"},
			step{62 * s, tick, ""}, // not by the pass that came too late
			step{63 * s, round(Pass, 61*s), "start_job"},
		)},
		{"less than that", guestconfig.ActionStopJob, true, after(
			step{60 * s, tick, "start_round"},
			step{61 * s, lost(round(Pass, 60*s), 238*s), "start_round"},
		)},
		{"max_staleness lost: action log warns once", guestconfig.ActionLog, false, after(
			step{60 * s, tick, "start_round"},
			step{61 * s, lost(round(Pass, 60*s), 1000*s), "warn start_round"},
			step{62 * s, lost(round(Pass, 61*s), 1000*s), "start_round"}, // check_frequency is over, too
			step{63 * s, round(Pass, 62*s), ""},
			step{72 * s, tick, ""},
		)},
		{"time lost before the first pass", guestconfig.ActionStopJob, true, []step{
			{0, tick, "start_round"},
			{1 * s, lost(round(Unknown, 0), 30*s), "start_round"},
			{2 * s, round(Pass, 1*s), "start_job"},
		}},
		{"too much time lost before the first pass", guestconfig.ActionStopJob, true, []step{
			{0, tick, "start_round"},
			{1 * s, lost(round(Unknown, 0), 119*s), "power_off"},
		}},
		{"a clock of the verifier that was set back says nothing", guestconfig.ActionStopJob, false, after(
			step{60 * s, tick, "start_round"},
			step{61 * s, lost(round(Pass, 60*s), -1000*s), ""},
			step{70 * s, tick, ""},
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
// late at most as Wake allows, and holds it to its promises at every moment. In half
// of the lives the host stops and slows the guest's clock. Then it promises: where the
// verifier has answered, no workload goes on whose pass is older than max_staleness
// by the verifier's clock, but for what compare lets two clocks differ; and time
// found lost means a round at once, yet no rounds without end.
func TestModel(t *testing.T) {
	seen := map[Action]int{}
	var found, stopped int
	for seed := range uint64(500) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			f, st := model(t, rand.New(rand.NewPCG(seed, 1)), seen, seed%2 == 1)
			found, stopped = found+f, stopped+st
		})
	}
	t.Log(seen, found, stopped)
	if found < 1000 || stopped < 100 {
		t.Errorf("time was found lost %d times, and %d workloads stopped for it", found, stopped)
	}
	for a := StartRound; a <= PowerOff; a++ {
		if seen[a] < 100 {
			t.Errorf("only %d times %v: the model does not reach what it is for", seen[a], a)
		}
	}
}

func model(t *testing.T, rnd *rand.Rand, seen map[Action]int, hostile bool) (found, stopped int) {
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

		real                float64 = 1e9 // seconds, by the verifier's clock
		rate                float64 = 1   // of real time to the guest's
		realBegan, realPass float64       // of the round, and of the last pass
		stamp, since        Stamp
	)
	advance := func(to time.Duration) {
		real += (to - now).Seconds() * rate
		now = to
	}
	// What compare may leave unnoticed since a pass: in the spans that it has closed, in the open one,
	// and the seconds of a call and of the clock's resolution whenever it finds something.
	var finds float64
	unnoticed := func() float64 { return 5*(apart+2*s).Seconds() + 2*p.MaxStaleness.Seconds()/apartShare + 3*finds }
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
				inRound, began, realBegan = true, now, real
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
				if ev.Lost > 0 && ev.Verdict == Pass {
					stopped++
				}
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
		if ev.Kind == RoundEnded && stamp.Came == now && running && p.Action != guestconfig.ActionLog &&
			real-realPass >= p.MaxStaleness.Seconds()+unnoticed() {
			t.Fatalf("%v: runs with a pass that is %.0f s old by the verifier's clock, max_staleness is %v", now, real-realPass, p.MaxStaleness)
		}
		if !over && !inRound && now-lastEnd > p.Every {
			t.Fatalf("%v: no round since %v, check_frequency is %v", now, lastEnd, p.Every)
		}
	}

	apply(Event{Kind: Tick})
	mood := rnd.IntN(40) // how likely a bad verdict is
	for range 2000 {
		if over {
			return found, stopped
		}
		hostile := hostile && since != (Stamp{}) // before the first answer there is nothing to compare with
		if hostile && rnd.IntN(30) == 0 {        // the host slows the clock, or lets it go
			rate = max(1, rnd.ExpFloat64()*3)
		}
		if hostile && rnd.IntN(60) == 0 { // the host stops it together with the VM
			real += rnd.Float64() * 2 * p.MaxStaleness.Seconds()
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
			advance(now + stoodStill + 1 + time.Duration(rnd.Int64N(int64(2*p.MaxStaleness))))
			// It ran on paper only; what counts is the moment after.
			apply(Event{Kind: Tick})
			if wasRunning && p.Action != guestconfig.ActionLog && now-last >= p.MaxStaleness && running && lastPass == last {
				t.Fatalf("%v: still runs after the pause", now)
			}
			if !over && !inRound {
				t.Fatalf("%v: no round after a pause", now)
			}
		case inRound && roundEnds <= wake:
			advance(max(now, roundEnds))
			inRound, lastEnd = false, now
			v := Pass
			if rnd.IntN(100) < mood {
				v = []Verdict{Unknown, Unknown, Negative}[rnd.IntN(3)]
			}
			switch v {
			case Pass:
				passed, lastPass, realPass, finds = true, began, realBegan, 0
			case Negative:
				passed = false
			}
			if v != Unknown || rnd.IntN(2) == 0 { // the verifier has answered
				call := time.Duration(rnd.Int64N(int64(s)))
				stamp = Stamp{Verifier: time.Unix(int64(real-call.Seconds()*rnd.Float64()), 0), Sent: now - call, Came: now}
			}
			var gap Gap
			since, gap = compare(since, stamp)
			if gap.Lost() > 0 {
				finds++
			}
			before, realBefore := st.Extra, realBegan
			apply(Event{Kind: RoundEnded, Verdict: v, Started: began, Lost: gap.Lost()})
			if gap.Lost() > 0 {
				found++
				if !hostile {
					t.Fatalf("%v: %v lost, and the clock goes right", now, gap.Lost())
				}
				if !before && !inRound && !over {
					t.Fatalf("%v: no round after %v lost", now, gap.Lost())
				}
			}
			// A third in a row needs a whole check_frequency by the verifier's clock, which is counted once.
			if before && inRound && max(real-realBefore, gap.Verifier.Seconds()) < 0.9*p.Every.Seconds()-1 {
				t.Fatalf("%v: rounds without end: %v", now, gap)
			}
		default:
			advance(wake)
			apply(Event{Kind: Tick})
		}
	}
	return found, stopped
}
