package boot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func testLog(simulated bool) (*Log, *bytes.Buffer) {
	var b bytes.Buffer
	return NewLog(&b, simulated, func() time.Duration { return 1500 * time.Millisecond }), &b
}

func TestRunReportsEachPhase(t *testing.T) {
	l, out := testLog(true)
	var order []string
	phase := func(name string) Phase {
		return Phase{Name: name, Deadline: time.Minute, Run: func(context.Context) error { order = append(order, name); return nil }}
	}
	if err := Run(t.Context(), l, []Phase{phase("a"), {Name: "idle", If: func() bool { return len(order) != 1 }}, phase("b")}); err != nil {
		t.Fatal(err)
	}
	want := "phase=a status=start t=1.50 platform=simulated\nphase=a status=ok t=1.50 platform=simulated\nphase=b status=start t=1.50 platform=simulated\nphase=b status=ok t=1.50 platform=simulated\n"
	if out.String() != want || strings.Join(order, "") != "ab" {
		t.Errorf("%v\n%s", order, out)
	}
}

func TestRunStopsAtTheFirstFailure(t *testing.T) {
	cause := fs.ErrNotExist
	for name, tc := range map[string]struct {
		run  func(context.Context) error
		code Code
		is   error
	}{
		"the phase's code":   {func(context.Context) error { return fmt.Errorf("open: %w", cause) }, CodeNetwork, cause},
		"the error's code":   {func(context.Context) error { return fmt.Errorf("x: %w", Fail(CodeKBSTLS, cause)) }, CodeKBSTLS, cause},
		"a panic":            {func(context.Context) error { panic("boom") }, CodeInternal, nil},
		"the first code won": {func(context.Context) error { return Fail(CodeVerity, Fail(CodeLUKSKey, cause)) }, CodeLUKSKey, cause},
	} {
		t.Run(name, func(t *testing.T) {
			l, out := testLog(false)
			err := Run(t.Context(), l, []Phase{
				{Name: "bad", Deadline: time.Minute, Code: CodeNetwork, Run: tc.run},
				{Name: "never", Deadline: time.Minute, Run: func(context.Context) error { t.Error("a phase ran after a failure"); return nil }},
			})
			var pe *PhaseError
			if !errors.As(err, &pe) || pe.Phase != "bad" || CodeOf(err) != tc.code {
				t.Errorf("%v, code %s, want %s", err, CodeOf(err), tc.code)
			}
			if tc.is != nil && !errors.Is(err, tc.is) {
				t.Errorf("%v does not wrap %v", err, tc.is)
			}
			if strings.Contains(out.String(), "status=ok") {
				t.Errorf("a failed phase is reported as ok:\n%s", out)
			}
		})
	}
}

func TestDeadline(t *testing.T) {
	for name, tc := range map[string]struct {
		run  func(context.Context) error
		code Code
	}{
		"a phase that knows its context": {func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }, CodeNetwork},
		"a phase that hangs":             {func(context.Context) error { time.Sleep(24 * time.Hour); return nil }, CodeTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l, _ := testLog(false)
				began := time.Now()
				err := Run(t.Context(), l, []Phase{{Name: "slow", Deadline: time.Minute, Code: CodeNetwork, Run: tc.run}})
				if CodeOf(err) != tc.code {
					t.Errorf("%v, code %s, want %s", err, CodeOf(err), tc.code)
				}
				if took := time.Since(began); took > time.Minute+time.Second {
					t.Errorf("gave up after %s", took)
				}
				time.Sleep(25 * time.Hour) // let the hanging phase end within the bubble
			})
		})
	}
}

func TestFailedLine(t *testing.T) {
	l, out := testLog(false)
	l.Failed("key", Fail(CodeKBSDenied, errors.New("line one\nphase=root status=ok \"quoted\"")))
	want := `coffer: FAILED phase=key code=E_KBS_DENIED detail="line one\nphase=root status=ok \"quoted\""` + "\n"
	if out.String() != want {
		t.Errorf("%q", out.String())
	}
	out.Reset()
	l.Failed("key", errors.New(strings.Repeat("x", 5000)))
	if n := out.Len(); n > maxLine+50 || strings.Count(out.String(), "\n") != 1 {
		t.Errorf("a long detail makes %d bytes", n)
	}
}

func TestPrintfKeepsToOneLine(t *testing.T) {
	l, out := testLog(false)
	l.Printf("not kept")
	l.Keep()
	l.Printf("a\nb\x1b[2Jc\rd\u009b2Je")
	if out.String() != "not kept\na b [2Jc d 2Je\n" {
		t.Errorf("%q", out.String())
	}
	if got := l.Lines(); len(got) != 1 || got[0] != "a b [2Jc d 2Je" {
		t.Errorf("%q", got)
	}
}

func TestCodeOf(t *testing.T) {
	for want, err := range map[Code]error{
		CodeTimeout:  fmt.Errorf("x: %w", context.DeadlineExceeded),
		CodeInternal: errors.New("x"),
		CodeRoot:     fmt.Errorf("x: %w", &Error{CodeRoot, context.DeadlineExceeded}),
	} {
		if got := CodeOf(err); got != want {
			t.Errorf("%v has code %s, want %s", err, got, want)
		}
	}
}
