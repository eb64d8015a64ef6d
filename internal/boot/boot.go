// Package boot runs a guest's phases one after the other and reports them in
// the form that launch_vm.sh, tests and people read:
//
//	phase=<name> status=start t=<seconds>
//	phase=<name> status=ok t=<seconds>
//	coffer: FAILED phase=<name> code=<E_...> detail="<one line>"
//
// t counts from the kernel's start. On the simulated platform each line ends in
// platform=simulated. The package prints no secret because it is given none:
// errors that reach it must not carry any.
package boot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
)

// Code is the stable name of a failure; docs/operations.md lists them.
type Code string

// Codes of init and agent.
const (
	CodeInternal       Code = "E_INTERNAL"        // a defect of Coffer itself, or a panic
	CodeTimeout        Code = "E_TIMEOUT"         // the phase's deadline passed
	CodeConfig         Code = "E_CONFIG"          // the guest config is missing or invalid
	CodeACPI           Code = "E_ACPI"            // the host gives ACPI tables that are not expected
	CodeModules        Code = "E_MODULES"         // a kernel module did not load
	CodeEvidence       Code = "E_EVIDENCE"        // the platform gives no attestation report
	CodeVMPCK          Code = "E_VMPCK"           // the guest's key to the firmware is disabled
	CodeNoDevice       Code = "E_NO_DEVICE"       // the platform's attestation device is not there
	CodeClock          Code = "E_CLOCK"           // the clock stands where it cannot be
	CodeFirewall       Code = "E_FIREWALL"        // nftables refused the rules
	CodeNetwork        Code = "E_NETWORK"         // no link, no address
	CodeKBSUnreachable Code = "E_KBS_UNREACHABLE" // no answer from the KBS
	CodeKBSTLS         Code = "E_KBS_TLS"         // the KBS's certificate is not the pinned one
	CodeKBSRefused     Code = "E_KBS_REFUSED"     // the KBS does not accept the evidence
	CodeKBSDenied      Code = "E_KBS_DENIED"      // the policy denies this CVM's key
	CodeKBSNoKey       Code = "E_KBS_NO_KEY"      // the KBS has no such resource
	CodeKBSProtocol    Code = "E_KBS_PROTOCOL"    // an answer outside the protocol
	CodeDiskMissing    Code = "E_DISK_MISSING"    // no crypt_root device
	CodeLUKSHeader     Code = "E_LUKS_HEADER"     // the header is not the pinned one
	CodeLUKSKey        Code = "E_LUKS_KEY"        // the key does not open the disk
	CodeLUKSParams     Code = "E_LUKS_PARAMS"     // the header asks for other parameters than ours
	CodeVerity         Code = "E_VERITY"          // the root does not match its root hash
	CodeRoot           Code = "E_ROOT"            // the root cannot be mounted or entered
	CodeDrive          Code = "E_DRIVE"           // applog, user_config or user_data is missing or broken
	CodeUserConfig     Code = "E_USER_CONFIG"     // user_config is not what was built
	CodeContainerd     Code = "E_CONTAINERD"      // containerd does not come up
	CodeImage          Code = "E_IMAGE"           // the image cannot be imported
	CodeWorkload       Code = "E_WORKLOAD"        // the container cannot be started
	CodeGPU            Code = "E_GPU"             // a GPU or its driver failed attestation
	CodeVault          Code = "E_VAULT"           // /vault does not open with the key that the KBS has for it
	CodeAttestation    Code = "E_ATTESTATION"     // an attestation round failed and the action is shutdown
)

// Error is a failure with its code.
type Error struct {
	Code Code
	Err  error
}

func (e *Error) Error() string { return e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// Fail gives err a code; a code that err already carries wins.
func Fail(code Code, err error) error {
	if err == nil {
		return nil
	}
	var e *Error
	if errors.As(err, &e) {
		return err
	}
	return &Error{Code: code, Err: err}
}

// CodeOf returns the code that err carries, else CodeTimeout for a passed
// deadline, else CodeInternal.
func CodeOf(err error) Code {
	var e *Error
	switch {
	case errors.As(err, &e):
		return e.Code
	case errors.Is(err, context.DeadlineExceeded):
		return CodeTimeout
	}
	return CodeInternal
}

// Phase is one row of a boot table.
type Phase struct {
	Name     string
	Deadline time.Duration
	Code     Code // given to an error that carries none
	Run      func(context.Context) error
	If       func() bool // whether there is anything to do, asked when its turn comes; nil: always
}

// Log writes the boot lines. It is safe for concurrent use.
type Log struct {
	w         io.Writer
	simulated bool
	uptime    func() time.Duration

	mu    sync.Mutex
	keep  bool
	lines []string
}

// NewLog writes to w. uptime is the time since the kernel started.
func NewLog(w io.Writer, simulated bool, uptime func() time.Duration) *Log {
	return &Log{w: w, simulated: simulated, uptime: uptime}
}

const (
	maxLine  = 900  // bytes: within what a console and the kernel's log carry
	maxLines = 1000 // that are kept
)

// Printf writes one line. Control characters become blanks.
func (l *Log) Printf(format string, a ...any) {
	s := strings.Map(func(r rune) rune {
		if unicode.IsControl(r) { // a terminal obeys U+009B as it does ESC [
			return ' '
		}
		return r
	}, fmt.Sprintf(format, a...))
	if len(s) > maxLine {
		s = s[:maxLine] + "..."
	}
	if l.simulated {
		s += " platform=simulated"
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.keep && len(l.lines) < maxLines {
		l.lines = append(l.lines, s)
	}
	fmt.Fprintln(l.w, s)
}

// Keep has every line kept from now on, for Lines.
func (l *Log) Keep() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.keep = true
}

// Lines returns what was written since Keep.
func (l *Log) Lines() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]string(nil), l.lines...)
}

// Failed writes the last line of a failed boot.
func (l *Log) Failed(phase string, err error) {
	detail := err.Error()
	if len(detail) > 600 {
		detail = detail[:600] + "..."
	}
	l.Printf("coffer: FAILED phase=%s code=%s detail=%s", phase, CodeOf(err), strconv.Quote(detail))
}

func (l *Log) seconds() string { return strconv.FormatFloat(l.uptime().Seconds(), 'f', 2, 64) }

// PhaseError says in which phase a boot failed.
type PhaseError struct {
	Phase string
	Err   error
}

func (e *PhaseError) Error() string { return e.Phase + ": " + e.Err.Error() }
func (e *PhaseError) Unwrap() error { return e.Err }

// Run runs the phases in order and stops at the first that fails. The error is
// a *PhaseError; its cause carries a code. Run does not write the FAILED line:
// the one failure path of the program does.
func Run(ctx context.Context, l *Log, phases []Phase) error {
	for _, p := range phases {
		if p.If != nil && !p.If() {
			continue
		}
		l.Printf("phase=%s status=start t=%s", p.Name, l.seconds())
		if err := runPhase(ctx, p); err != nil {
			return &PhaseError{Phase: p.Name, Err: Fail(p.Code, err)}
		}
		l.Printf("phase=%s status=ok t=%s", p.Name, l.seconds())
	}
	return nil
}

// runPhase gives up on a phase that outlives its deadline, even where the phase
// itself sits in a system call that knows no context.
func runPhase(ctx context.Context, p Phase) error {
	ctx, cancel := context.WithTimeout(ctx, p.Deadline)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		defer func() {
			if r := recover(); r != nil {
				done <- &Error{CodeInternal, fmt.Errorf("panic: %v", r)}
			}
		}()
		done <- p.Run(ctx)
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		select { // a phase that noticed the deadline itself has the better error
		case err := <-done:
			return err
		case <-time.After(500 * time.Millisecond):
		}
		return &Error{CodeTimeout, fmt.Errorf("no result within %s", p.Deadline)}
	}
}
