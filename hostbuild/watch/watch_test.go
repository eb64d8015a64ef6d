package watch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"coffer/internal/boot"
)

var start = time.Unix(1e9, 0)

// revoked is a console of the demo: a boot, four rounds, a revocation.
func revoked(t testing.TB) []byte {
	b, err := os.ReadFile("testdata/revoked.log")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestARealConsole(t *testing.T) {
	var s State
	events := s.Write(revoked(t), start)
	if s.CVM != "cvm_13c5a0421f14" || !s.Simulated || len(s.Phases) != 20 || !s.Failed {
		t.Errorf("%+v", s)
	}
	if p := s.Phases[2]; p.Name != "modules" || p.Start != 1.77 || p.End != 2.57 {
		t.Errorf("the third phase is %+v", p)
	}
	for _, want := range []string{
		"cvm_13c5a0421f14", "phase modules 0.80 s, at 2.57 s", "workload started", "attestation round 3 pass",
		"workload exited code=137 signal=9 seconds=14.8",
	} {
		if !slices.Contains(events, want) {
			t.Errorf("no event %q in %q", want, events)
		}
	}
	if want := "round 4 negative E_KBS_DENIED: get resource keys/canary/"; !strings.HasPrefix(s.Round, want) || !s.Refused {
		t.Errorf("the last round is %q", s.Round)
	}
	if want := "FAILED in phase run: E_ATTESTATION: round 4 was negative"; !strings.HasPrefix(s.End, want) || events[len(events)-1] != s.End {
		t.Errorf("the end is %q", s.End)
	}
	// In any pieces, it is the same.
	var p State
	var pieces []string
	for b := range slices.Chunk(revoked(t), 7) {
		pieces = append(pieces, p.Write(b, start)...)
	}
	if !slices.Equal(pieces, events) {
		t.Errorf("in pieces: %q", pieces)
	}
}

// What package boot writes is what is read.
func TestWhatBootWrites(t *testing.T) {
	var console bytes.Buffer
	up := time.Second
	log := boot.NewLog(&console, false, func() time.Duration { up += 500 * time.Millisecond; return up })
	err := boot.Run(context.Background(), log, []boot.Phase{
		{Name: "mounts", Deadline: time.Minute, Run: func(context.Context) error { return nil }},
		{Name: "key", Deadline: time.Minute, Code: boot.CodeKBSDenied, Run: func(context.Context) error {
			return errors.New("say \"no\" \x1b[2J" + strings.Repeat("long ", 200))
		}},
	})
	var pe *boot.PhaseError
	if !errors.As(err, &pe) {
		t.Fatal(err)
	}
	log.Failed(pe.Phase, pe.Err)
	var s State
	s.Write(console.Bytes(), start)
	if len(s.Phases) != 2 || s.Phases[0].End-s.Phases[0].Start != 0.5 || s.Phases[1].End != 0 {
		t.Errorf("%+v", s.Phases)
	}
	if !strings.HasPrefix(s.End, `FAILED in phase key: E_KBS_DENIED: say "no" [2Jlong long`) || !s.Failed || s.Simulated {
		t.Errorf("the end is %q", s.End)
	}
}

func TestLines(t *testing.T) {
	for _, tc := range []struct{ name, console, event string }{
		{"orderly end", "coffer: power off reason=\"the workload has ended\"\r\n", "power off: the workload has ended"},
		{"panic", "[   12.5] Kernel panic - not syncing: dm-verity device corrupted\n", "Kernel panic - not syncing: dm-verity device corrupted"},
		{"the workload says panic", "workload: Kernel panic - not syncing: haha\n", ""},
		{"the workload says FAILED", "workload: coffer: FAILED phase=key code=E_X detail=\"\"\n", ""},
		{"ok of a phase that did not begin", "phase=key status=ok t=1.00\n", ""},
		{"ok before its start", "phase=key status=start t=2.00\nphase=key status=ok t=1.00\n", ""},
		{"no number", "phase=key status=start t=NaN\nphase=key status=ok t=1e9\n", ""},
		{"terminal sequences", "coffer: power off reason=\"\\x1b]0;owned\\a\"\n", "power off: ]0;owned"},
		{"raw terminal sequences", "coffer: power off reason=\"\x1b]0;owned\a\"\n", "power off: ]0;owned"},
		{"a line without an end", "coffer: power off reason=\"x\"", ""},
		{"a long line", "coffer: power off reason=\"" + strings.Repeat("x", 1<<20) + "\"\n", "power off: " + strings.Repeat("x", maxText-11) + "..."},
	} {
		var s State
		if got := strings.Join(s.Write([]byte(tc.console), start), "\n"); got != tc.event {
			t.Errorf("%s: %q, want %q", tc.name, got, tc.event)
		}
	}
	var s State
	for i := range 1000 {
		s.Write(fmt.Appendf(nil, "phase=p%d status=start t=1.00\n", i), start)
	}
	if len(s.Phases) != maxPhases {
		t.Errorf("%d phases are kept", len(s.Phases))
	}
	// A phase that begins again is another boot.
	s.Write([]byte("phase=p1 status=start t=1.00\n"), start)
	if len(s.Phases) != 1 {
		t.Errorf("after another boot began: %d phases", len(s.Phases))
	}
}

func TestTable(t *testing.T) {
	var s State
	s.Write([]byte("coffer: cvm_id=cvm_0123456789ab tee=snp kbs=x\nphase=mounts status=start t=1.00\nphase=mounts status=ok t=1.25\nphase=key status=start t=1.25\n"), start)
	want := []string{"cvm_0123456789ab", "  mounts          0.25 s      1.25", "> key              3.5 s"}
	if got := s.Table(start.Add(3500*time.Millisecond), 80, 24); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if got := s.Table(start, 6, 2); !slices.Equal(got, []string{"  moun", "> key "}) {
		t.Errorf("in 6 columns and 2 lines: %q", got)
	}
	var out bytes.Buffer
	screen := Screen{W: &out, Size: func() (int, int) { return 80, 24 }}
	screen.Draw(&s, start)
	screen.Draw(&s, start)
	if got := out.String(); strings.Count(got, "\x1b[3A") != 1 || strings.Count(got, "\x1b[J") != 2 {
		t.Errorf("drawn twice: %q", got)
	}
}

func TestFollow(t *testing.T) {
	path := filepath.Join(t.TempDir(), "console.log")
	put := func(text string) { // as QEMU: appended to what is there
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteString(text); err != nil {
			t.Fatal(err)
		}
	}
	// Each step is taken when the reader has seen all of the one before.
	steps := []func(){
		func() {}, // it is not there yet
		func() { put("one ") },
		func() { put("two ") },
		func() { // launch_vm.sh starts again
			if err := os.Rename(path, path+".1"); err != nil {
				t.Fatal(err)
			}
			put("new ")
		},
		func() {
			if err := os.Truncate(path, 0); err != nil {
				t.Fatal(err)
			}
		},
		func() { put("cut") },
	}
	var got strings.Builder
	wants := []string{"", "one ", "one two ", "one two new ", "one two new ", "one two new cut"}
	done := 0
	err := Follow(context.Background(), path, time.Millisecond, func(text []byte) bool {
		got.Write(text)
		if len(text) > 0 || done > 0 && got.String() != wants[done-1] {
			return true
		}
		if done == len(steps) {
			return false
		}
		steps[done]()
		done++
		return true
	})
	if err != nil || got.String() != wants[len(wants)-1] {
		t.Errorf("%q, %v", got.String(), err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	if err := Follow(ctx, path+".none", time.Hour, func([]byte) bool { cancel(); return true }); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func FuzzConsole(f *testing.F) {
	f.Add(revoked(f), 5)
	f.Add([]byte("coffer: FAILED phase=x code=E_X detail=\"\\x1b[2J\xff\"\n"), 1)
	f.Fuzz(func(t *testing.T, console []byte, piece int) {
		if len(console) > 1<<16 || piece < 1 {
			return
		}
		var s State
		var events []string
		for b := range slices.Chunk(console, piece) {
			events = append(events, s.Write(b, start)...)
		}
		if len(s.rest) > maxLine || len(s.Phases) > maxPhases {
			t.Errorf("%d bytes, %d phases are kept", len(s.rest), len(s.Phases))
		}
		for _, e := range append(events, s.Table(start, 120, 50)...) {
			if clean(e) != e || !utf8.ValidString(e) || len(e) > maxText+200 {
				t.Errorf("shown: %q", e)
			}
		}
	})
}
