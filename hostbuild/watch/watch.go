// Package watch reads a guest's console and tells how far its boot is: phases
// with their times, the workload, the last attestation round, the end.
//
// The console is the host's to write: lines are bounded, words are checked, and
// what is shown holds no control character. Nothing that is read here proves
// anything about the guest.
package watch

import (
	"bytes"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// Bounds of what is kept.
const (
	maxLine   = 4096 // bytes; longer lines are cut. Package boot writes at most 900
	maxPhases = 64
	maxText   = 700
)

// Phase is one phase of the boot.
type Phase struct {
	Name       string
	Start, End float64 // seconds since the kernel's start; End is 0 while it runs
	seen       time.Time
}

// State is what a console has told so far.
type State struct {
	CVM       string
	Simulated bool
	Phases    []Phase
	Workload  string
	Round     string // the last attestation round
	Refused   bool   // it was not good
	End       string // why the guest is off; "" while it runs
	Failed    bool   // it did not end in order

	rest []byte // of a line that has not ended
}

// Write takes console text as it comes and tells what happened in it, a line an
// event. now is when it was seen.
func (s *State) Write(text []byte, now time.Time) (events []string) {
	for len(text) > 0 {
		line, after, ended := bytes.Cut(text, []byte("\n"))
		text = after
		s.rest = append(s.rest, line[:min(len(line), maxLine-len(s.rest))]...)
		if !ended {
			return events
		}
		if e := s.line(clean(string(s.rest)), now); e != "" {
			events = append(events, e)
		}
		s.rest = s.rest[:0]
	}
	return events
}

// clean drops what a terminal might obey.
func clean(line string) string {
	return strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, line)
}

const text = `"((?:[^"\\]|\\.)*)"?`

var (
	cvmLine   = regexp.MustCompile(`^coffer: cvm_id=(cvm_[0-9a-f]{12}) `)
	phaseLine = regexp.MustCompile(`^phase=([a-z][a-z_0-9]{0,31}) status=(start|ok) t=([0-9]{1,7}\.[0-9]{2})( platform=simulated)?$`)
	roundLine = regexp.MustCompile(`^attestation round=([0-9]{1,9}) verdict=(pass|negative|unknown) reason=` + text + `(?: code=([A-Z_]{1,32}))?`)
	workLine  = regexp.MustCompile(`^workload (started|exited) (.*)$`)
	failLine  = regexp.MustCompile(`^coffer: FAILED phase=([a-z_0-9]{1,32}) code=([A-Z_]{1,32}) detail=` + text)
	offLine   = regexp.MustCompile(`^coffer: power off reason=` + text)
	panicLine = regexp.MustCompile(`(Kernel panic - not syncing: .*)$`)
)

// line takes one line and returns the event in it, "" if there is none.
func (s *State) line(line string, now time.Time) string {
	switch {
	case strings.HasPrefix(line, "phase="):
		if m := phaseLine.FindStringSubmatch(line); m != nil {
			return s.phase(m, now)
		}
	case strings.HasPrefix(line, "attestation round="):
		if m := roundLine.FindStringSubmatch(line); m != nil {
			s.Refused = m[2] != "pass"
			s.Round = "round " + m[1] + " " + m[2]
			if s.Refused {
				s.Round = short(s.Round + " " + m[4] + ": " + unquote(m[3]))
			}
			return "attestation " + s.Round
		}
	case strings.HasPrefix(line, "workload "):
		if m := workLine.FindStringSubmatch(line); m != nil {
			s.Workload = m[1]
			if m[1] == "exited" {
				s.Workload = short(m[1] + " " + strings.TrimSuffix(m[2], " platform=simulated"))
			}
			return "workload " + s.Workload
		}
	case strings.HasPrefix(line, "coffer: "):
		if m := cvmLine.FindStringSubmatch(line); m != nil {
			s.CVM = m[1]
			return s.CVM
		}
		if m := failLine.FindStringSubmatch(line); m != nil {
			s.Failed, s.End = true, short(fmt.Sprintf("FAILED in phase %s: %s: %s", m[1], m[2], unquote(m[3])))
			return s.End
		}
		if m := offLine.FindStringSubmatch(line); m != nil {
			s.End = short("power off: " + unquote(m[1]))
			return s.End
		}
	default:
		if m := panicLine.FindStringSubmatch(line); m != nil && !strings.HasPrefix(line, "workload:") {
			s.Failed, s.End = true, short(m[1])
			return s.End
		}
	}
	return ""
}

func (s *State) phase(m []string, now time.Time) string {
	name := m[1]
	t, err := strconv.ParseFloat(m[3], 64)
	if err != nil {
		return ""
	}
	i := len(s.Phases) - 1
	for i >= 0 && s.Phases[i].Name != name {
		i--
	}
	if m[2] == "start" {
		if i >= 0 { // another boot
			*s = State{CVM: s.CVM, rest: s.rest}
		}
		if len(s.Phases) < maxPhases {
			s.Phases = append(s.Phases, Phase{Name: name, Start: t, seen: now})
		}
		s.Simulated = m[4] != ""
		return ""
	}
	if i < 0 || s.Phases[i].End != 0 || t < s.Phases[i].Start {
		return ""
	}
	s.Phases[i].End = t
	return fmt.Sprintf("phase %s %.2f s, at %.2f s", name, t-s.Phases[i].Start, t)
}

func short(s string) string {
	if len(s) > maxText {
		s = strings.ToValidUTF8(s[:maxText], "") + "..."
	}
	return s
}

// unquote reads what %q wrote, as far as it can be read.
func unquote(s string) string {
	if u, err := strconv.Unquote(`"` + s + `"`); err == nil {
		return clean(u)
	}
	return s
}

// Table is the state in lines of at most width columns, the newest height of them.
func (s *State) Table(now time.Time, width, height int) []string {
	var rows []string
	head := s.CVM
	if s.Simulated {
		head += " (simulated: nothing is confidential)"
	}
	if head != "" {
		rows = append(rows, head)
	}
	for i, p := range s.Phases {
		switch {
		case p.End != 0:
			rows = append(rows, fmt.Sprintf("  %-12s %7.2f s  %8.2f", p.Name, p.End-p.Start, p.End))
		case i == len(s.Phases)-1 && s.End == "":
			rows = append(rows, fmt.Sprintf("> %-12s %7.1f s", p.Name, now.Sub(p.seen).Seconds()))
		default:
			rows = append(rows, fmt.Sprintf("! %-12s", p.Name))
		}
	}
	for _, line := range []struct{ name, text string }{{"workload", s.Workload}, {"attestation", s.Round}} {
		if line.text != "" {
			rows = append(rows, fmt.Sprintf("  %-12s %s", line.name, line.text))
		}
	}
	if s.End != "" {
		rows = append(rows, s.End)
	}
	if len(rows) > height {
		rows = rows[len(rows)-height:]
	}
	for i, r := range rows {
		if runes := []rune(r); len(runes) > width {
			rows[i] = string(runes[:width])
		}
	}
	return rows
}

// Screen draws a table over the one that it drew before.
type Screen struct {
	W     io.Writer
	Size  func() (width, height int)
	drawn int
}

// Draw draws the state as it is now; one that has ended whole, as nothing will be
// drawn over it.
func (c *Screen) Draw(s *State, now time.Time) {
	width, height := c.Size()
	if s.End != "" {
		width, height = maxText, 2*maxPhases
	}
	rows := s.Table(now, width, max(height-1, 1))
	var b strings.Builder
	if c.drawn > 0 {
		fmt.Fprintf(&b, "\x1b[%dA", c.drawn)
	}
	b.WriteString("\r\x1b[J")
	for _, r := range rows {
		b.WriteString(r + "\n")
	}
	c.drawn = len(rows)
	io.WriteString(c.W, b.String())
}
