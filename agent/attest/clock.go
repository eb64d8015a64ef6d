package attest

import (
	"fmt"
	"time"
)

// Stamp is what the verifier's clock showed in an answer. That was after the
// request was sent and before the answer came, by the guest's own clock.
type Stamp struct {
	Verifier   time.Time // in whole seconds; zero: it does not tell
	Sent, Came time.Duration
}

// Gap is how much time passed between two answers: by the verifier's clock, and by
// the guest's at the most. The zero value is that of clocks that agree.
type Gap struct{ Verifier, Guest time.Duration }

// Lost is the time that the guest's clock did not count.
func (g Gap) Lost() time.Duration { return g.Verifier - g.Guest }

func (g Gap) String() string {
	return fmt.Sprintf("the KBS counted %s, the guest at most %s", g.Verifier.Round(time.Second), g.Guest.Round(time.Second))
}

// What two clocks that go right may differ by: the verifier's shows whole seconds,
// some servers keep it for half a second, and it may be corrected.
const (
	apart      = 5 * time.Second
	apartShare = 50 // or one part of so many of the time
)

// longest bounds what a gap counts, so that a clock that is wrong by centuries makes
// no sum of times overflow.
const longest = 10 * 365 * 24 * time.Hour

// compare tells whether the guest's clock was stopped or slowed between two answers.
// The host owns that clock, and not the verifier's. It gives the stamp to compare
// the next one with: a short time is not let go, so that small differences add up.
func compare(since, next Stamp) (Stamp, Gap) {
	switch {
	case next.Verifier.IsZero():
		return since, Gap{}
	case since.Verifier.IsZero():
		return next, Gap{}
	}
	g := Gap{Verifier: next.Verifier.Sub(since.Verifier), Guest: next.Came - since.Sent}
	g.Verifier = min(max(g.Verifier, -longest), longest)
	switch {
	case g.Lost() > max(apart, g.Guest/apartShare):
		return next, g
	case g.Guest < apart*apartShare:
		return since, Gap{}
	}
	return next, Gap{}
}
