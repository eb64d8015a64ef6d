// Package helper runs gpu-helper, the program that speaks NVML: NVIDIA's library
// needs cgo and glibc, and can hang, crash or end its process.
//
// One process answers one request: a line of JSON on its standard input, a line of
// JSON on its standard output. It is started with an empty environment and killed
// at its time limit, so that whatever the library does costs its caller no more
// than an error with a code. What it answers is not trusted: evidence is signed,
// and the rest is compared with it.
//
// A failed report leaves the driver in a state that only a restart of the VM ends.
// Callers ask seldom and one at a time.
package helper

import (
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"coffer/internal/gpu"
)

// maxAnswer bounds an answer: the evidence of 16 GPUs.
const maxAnswer = 512 << 10

// Operations of a Request.
const (
	OpSettings    = "settings"    // Answer.Settings
	OpDevices     = "devices"     // Answer.Devices
	OpCollect     = "collect"     // Answer.Evidence of every GPU, asked with Nonce
	OpReady       = "ready"       // Answer.Ready
	OpSetReady    = "set_ready"   // to Ready; false is for good, until the VM restarts
	OpPersistence = "persistence" // keeps GPUs initialised while nobody uses them
)

// Request is what the program reads.
type Request struct {
	Op    string `json:"op"`
	Nonce string `json:"nonce,omitempty"` // hex
	Ready bool   `json:"ready,omitempty"`
}

// Answer is what the program writes. Where Error is set nothing else is.
type Answer struct {
	Error    *Problem      `json:"error,omitempty"`
	Settings *gpu.Settings `json:"settings,omitempty"`
	Devices  []Device      `json:"devices,omitempty"`
	Evidence []Evidence    `json:"evidence,omitempty"`
	Ready    *bool         `json:"ready,omitempty"`
	Done     bool          `json:"done,omitempty"`
}

// Device is what NVML says of a GPU.
type Device struct {
	Arch   string `json:"arch"`
	UUID   string `json:"uuid"`
	Driver string `json:"driver"`
	VBIOS  string `json:"vbios"`
}

// Evidence is what a GPU gave.
type Evidence struct {
	Device
	Report []byte `json:"report"`
	Chain  []byte `json:"chain"`
}

// Problem is a call of NVML that failed.
type Problem struct {
	Call   string `json:"call"`   // "nvmlInit"
	Device *int   `json:"device"` // index of the GPU, where it was one's
	Return int    `json:"return"` // NVML's number, 0 where the call could not be made
	Text   string `json:"text"`
}

// CallHandle is the Call that finds a GPU.
const CallHandle = "nvmlDeviceGetHandleByIndex"

const gpuIsLost = 15 // NVML's number for a GPU that has fallen off its bus

func (p *Problem) Error() string {
	where := ""
	if p.Device != nil {
		where = fmt.Sprintf(" of GPU %d", *p.Device)
	}
	return fmt.Sprintf("%s%s: %s (%d)", p.Call, where, p.Text, p.Return)
}

// The codes of errors, besides those of package gpu.
const (
	CodeTimeout gpu.Code = "helper-timeout" // it did not answer in time and was killed
	CodeCrash   gpu.Code = "helper-crash"   // it ended without an answer
	CodeAnswer  gpu.Code = "helper-answer"  // it answered something else
	CodeStart   gpu.Code = "helper-start"   // it is not there or cannot be run
	CodeNVML    gpu.Code = "nvml"           // NVML refused; errors.As finds a *Problem

	// NVML knows a GPU that the driver has not started, as it does where one is in
	// another confidential-computing mode than the first (INVALID_STATE in gpu_mgr.c
	// of NVIDIA's open kernel modules).
	CodeNotStarted gpu.Code = "device-not-started"
)

// Helper runs the program. It is safe for concurrent use: requests wait for each
// other.
type Helper struct {
	Path    string   // of gpu-helper
	Library string   // of libnvidia-ml.so.1, absolute
	Env     []string // normally empty
	Count   int      // of GPUs that there should be; 0: not known
	// Timeout returns the limit of an operation on n GPUs; nil: DefaultTimeout.
	Timeout func(op string, n int) time.Duration

	mu sync.Mutex
	n  int // GPUs of the last answer
}

// DefaultTimeout is 15 s, and 6 s more for each GPU that has to sign or to come up.
func DefaultTimeout(op string, n int) time.Duration {
	if op != OpCollect && op != OpPersistence {
		n = 0
	}
	return 15*time.Second + time.Duration(n)*6*time.Second
}

// Settings returns the system's confidential-computing settings.
func (h *Helper) Settings(ctx context.Context) (gpu.Settings, error) {
	a, err := h.do(ctx, Request{Op: OpSettings}, func(a *Answer) bool { return a.Settings != nil })
	if err != nil {
		return gpu.Settings{}, err
	}
	return *a.Settings, nil
}

// Devices returns the GPUs.
func (h *Helper) Devices(ctx context.Context) ([]Device, error) {
	a, err := h.do(ctx, Request{Op: OpDevices}, func(a *Answer) bool { return len(a.Devices) <= gpu.MaxDevices })
	if err != nil {
		return nil, err
	}
	return a.Devices, nil
}

// Collect asks every GPU for a report over nonce.
func (h *Helper) Collect(ctx context.Context, nonce [32]byte) ([]gpu.Evidence, error) {
	a, err := h.do(ctx, Request{Op: OpCollect, Nonce: hex.EncodeToString(nonce[:])}, func(a *Answer) bool {
		return len(a.Evidence) > 0 && len(a.Evidence) <= gpu.MaxDevices
	})
	if err != nil {
		return nil, err
	}
	var list []gpu.Evidence
	for _, e := range a.Evidence {
		list = append(list, gpu.Evidence{Arch: e.Arch, UUID: e.UUID, Driver: e.Driver, VBIOS: e.VBIOS, Report: e.Report, Chain: e.Chain})
	}
	return list, nil
}

// Ready tells whether the GPUs accept work.
func (h *Helper) Ready(ctx context.Context) (bool, error) {
	a, err := h.do(ctx, Request{Op: OpReady}, func(a *Answer) bool { return a.Ready != nil })
	if err != nil {
		return false, err
	}
	return *a.Ready, nil
}

// SetReady lets the GPUs accept work, or takes that back until the VM restarts.
func (h *Helper) SetReady(ctx context.Context, ready bool) error {
	_, err := h.do(ctx, Request{Op: OpSetReady, Ready: ready}, func(a *Answer) bool { return a.Done })
	return err
}

// KeepInitialised turns on persistence mode: without it the session with a GPU
// ends with its last user.
func (h *Helper) KeepInitialised(ctx context.Context) error {
	_, err := h.do(ctx, Request{Op: OpPersistence}, func(a *Answer) bool { return a.Done })
	return err
}

// do runs the program for one request; fits tells whether an answer is one to it.
func (h *Helper) do(ctx context.Context, r Request, fits func(*Answer) bool) (*Answer, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	timeout := h.Timeout
	if timeout == nil {
		timeout = DefaultTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout(r.Op, cmp.Or(h.n, h.Count, gpu.MaxDevices)))
	defer cancel()
	line, err := h.run(ctx, r)
	if err != nil {
		return nil, err
	}
	var a Answer
	switch err := json.Unmarshal(line, &a); {
	case err != nil:
		return nil, problem(CodeAnswer, "%s: answer %.80q: %w", r.Op, line, err)
	case a.Error != nil:
		if a.Error.Call == CallHandle && a.Error.Return != gpuIsLost {
			return nil, problem(CodeNotStarted, "%w: the driver has not started it; it does not where a GPU is in another confidential-computing mode than the first", a.Error)
		}
		return nil, problem(CodeNVML, "%w", a.Error)
	case !fits(&a):
		return nil, problem(CodeAnswer, "%s: answer %.80q is none to it", r.Op, line)
	}
	if n := max(len(a.Devices), len(a.Evidence)); n > 0 {
		h.n = n
	}
	return &a, nil
}

func (h *Helper) run(ctx context.Context, r Request) ([]byte, error) {
	request, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	out, errs := &limited{limit: maxAnswer}, &limited{limit: 4 << 10}
	cmd := exec.CommandContext(ctx, h.Path, "--library", h.Library)
	cmd.Env = append([]string{}, h.Env...) // not nil, which would be ours
	cmd.Dir = "/"
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(append(request, '\n')), out, errs
	// A group of its own, so that what the library starts ends with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	err = cmd.Run()
	tail := strings.TrimSpace(errs.String())
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return nil, problem(CodeTimeout, "%s: gpu-helper gave no answer in time: %w", r.Op, ctx.Err())
	case out.over:
		return nil, problem(CodeAnswer, "%s: gpu-helper answered with more than %d bytes", r.Op, maxAnswer)
	case errors.As(err, &exit):
		return nil, problem(CodeCrash, "%s: gpu-helper ended: %w: %.300q", r.Op, err, tail)
	case err != nil:
		return nil, problem(CodeStart, "%s: %w", r.Op, err)
	}
	line, rest, ok := bytes.Cut(out.Bytes(), []byte("\n"))
	if !ok || len(rest) > 0 {
		return nil, problem(CodeAnswer, "%s: gpu-helper's answer is not one line", r.Op)
	}
	return line, nil
}

func problem(code gpu.Code, format string, args ...any) error {
	return &gpu.Error{Code: code, Err: fmt.Errorf(format, args...)}
}

// limited is a buffer that takes no more than its limit and notes that there was.
type limited struct {
	bytes.Buffer
	limit int
	over  bool
}

func (l *limited) Write(p []byte) (int, error) {
	if room := l.limit - l.Len(); len(p) > room {
		l.over = true
		l.Buffer.Write(p[:room])
		return len(p), nil
	}
	return l.Buffer.Write(p)
}
