package attest

import (
	"testing"
	"time"
)

// at is a stamp of a call that took a tenth of a second.
func at(verifier int64, guest time.Duration) Stamp {
	return Stamp{Verifier: time.Unix(verifier, 0), Sent: guest, Came: guest + s/10}
}

func TestCompare(t *testing.T) {
	for _, tc := range []struct {
		name   string
		stamps []Stamp
		want   []time.Duration // lost before each
	}{
		{"the first tells nothing", []Stamp{at(9e9, 0)}, []time.Duration{0}},
		{"clocks that agree", []Stamp{at(1000, 0), at(1060, 60*s), at(1120, 120*s)}, []time.Duration{0, 0, 0}},
		{"stopped", []Stamp{at(1000, 0), at(1090, 60*s), at(1150, 120*s)}, []time.Duration{0, 29900 * time.Millisecond, 0}},
		{"slowed", []Stamp{at(1000, 0), at(1120, 60*s), at(1240, 120*s)}, []time.Duration{0, 59900 * time.Millisecond, 59900 * time.Millisecond}},
		{"as far apart as clocks may be", []Stamp{at(1000, 0), at(1065, 60*s)}, []time.Duration{0, 0}},
		{"a second further", []Stamp{at(1000, 0), at(1066, 60*s)}, []time.Duration{0, 5900 * time.Millisecond}},
		{"little by little, in short rounds", []Stamp{at(1000, 0), at(1004, 2*s), at(1008, 4*s), at(1012, 6*s), at(1016, 8*s)},
			[]time.Duration{0, 0, 0, 5900 * time.Millisecond, 0}},
		{"a slow drift never adds up", []Stamp{at(1000, 0), at(1604, 600*s), at(2208, 1200*s), at(2812, 1800*s)}, []time.Duration{0, 0, 0, 0}},
		{"a fiftieth of a long time", []Stamp{at(1000, 0), at(4672, 3600*s)}, []time.Duration{0, 0}},
		{"more than that", []Stamp{at(1000, 0), at(4673, 3600*s)}, []time.Duration{0, 72900 * time.Millisecond}},
		{"the guest's clock counts more: a pause that it saw", []Stamp{at(1000, 0), at(1001, 500*s)}, []time.Duration{0, 0}},
		{"the verifier's is set back, and is right again later", []Stamp{at(10000, 0), at(1000, 60*s), at(10120, 120*s)}, []time.Duration{0, 0, 0}},
		{"set back for good: seen again when the short time is over", []Stamp{at(10000, 0), at(1000, 300*s), at(1090, 360*s)},
			[]time.Duration{0, 0, 29900 * time.Millisecond}},
		{"set forward", []Stamp{at(1000, 0), at(10060, 60*s), at(10120, 120*s)}, []time.Duration{0, 8999900 * time.Millisecond, 0}},
		{"two servers whose clocks are a few seconds apart", []Stamp{at(1000, 0), at(1064, 60*s), at(1120, 120*s), at(1184, 180*s), at(1244, 240*s), at(1300, 300*s), at(1364, 360*s)},
			make([]time.Duration, 7)},
		{"without a clock between", []Stamp{at(1000, 0), {Sent: 60 * s, Came: 61 * s}, at(1150, 120*s)}, []time.Duration{0, 0, 29900 * time.Millisecond}},
		{"never a clock", []Stamp{{}, {}, {}}, []time.Duration{0, 0, 0}},
		{"no answer since: the same stamp", []Stamp{at(1000, 0), at(1000, 0), at(1000, 0)}, []time.Duration{0, 0, 0}},
		{"a call that may have taken all the time", []Stamp{{Verifier: time.Unix(1000, 0), Sent: 0, Came: 20 * s}, at(1040, 35*s)}, []time.Duration{0, 0}},
		{"a clock at the ends of time", []Stamp{at(-62135596801, 0), at(253402300799, 60*s)}, []time.Duration{0, longest - 60100*time.Millisecond}},
		{"back from the end of time", []Stamp{at(253402300799, 0), at(1000, 60*s), at(1300, 360*s)}, []time.Duration{0, 0, 0}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var since Stamp
			for i, st := range tc.stamps {
				var g Gap
				if since, g = compare(since, st); g.Lost() != tc.want[i] {
					t.Errorf("stamp %d: lost %v (%s), want %v", i, g.Lost(), g, tc.want[i])
				}
			}
		})
	}
}
