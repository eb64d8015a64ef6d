// Package gpus watches over the guest's NVIDIA GPUs: it lets them work only after
// all of them were attested, asks again in every round, and takes their leave to
// work back when one fails.
//
// Each round asks with a nonce of the KBS's handshake, so that GPU evidence is as
// fresh as the CPU's; where it is sent along, the CPU's report covers it. The
// devices of the first round are the ones: another, or a further one, is a failure.
//
// Taking back is for good: the driver accepts work again only after the VM was
// restarted. So it happens on what a device has answered, or its driver has failed
// at, not when a RIM or OCSP service could not be reached.
package gpus

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"coffer/internal/gpu"
)

// CodeIdentity is a GPU that is another one than at the first round.
const CodeIdentity gpu.Code = "device-changed"

// Source is the GPUs, safe for concurrent use, and bounds the time of each call
// itself; *helper.Helper is one.
type Source interface {
	Settings(context.Context) (gpu.Settings, error)
	Collect(ctx context.Context, nonce [32]byte) ([]gpu.Evidence, error)
	SetReady(ctx context.Context, ready bool) error
	// KeepInitialised keeps the session with a GPU while nobody uses it.
	KeepInitialised(context.Context) error
}

// Judge judges evidence; *gpu.Verifier is one.
type Judge interface {
	VerifyAll(ctx context.Context, devices []gpu.Evidence, nonce [32]byte) ([]*gpu.Result, error)
}

// Guard watches over the GPUs of one guest. It is safe for concurrent use.
type Guard struct {
	Source Source
	Policy gpu.Policy // for the settings
	Judges []Judge    // all must be content; none where the KBS alone judges
	Send   bool       // the KBS gets the evidence, too
	Count  int        // of GPUs; 0: as many as the first round had
	Printf func(format string, a ...any)

	// Held while the devices are asked. Whoever waits to Lock it, a round, comes before
	// all that wait to RLock it, which the workload's requests do, one at a time: so
	// they hold up a round by one answer, however many they are.
	asking sync.RWMutex
	line   sync.Mutex // of the workload's requests

	mu     sync.Mutex
	known  []string // what tells the devices apart: serials of the first round
	ready  bool
	failed error // why ready was taken back
}

// Prepare initialises the GPUs, for good. Where that fails the first round tells.
func (g *Guard) Prepare(ctx context.Context) {
	if err := g.Source.KeepInitialised(ctx); err != nil {
		g.Printf("gpu: warning: persistence mode: %v", err)
	}
}

// Attest attests the GPUs for a round, with a nonce out of a handshake's digest. It
// returns what the KBS gets of it as additional evidence, and what was found, also
// where that is an error.
func (g *Guard) Attest(ctx context.Context, digest [48]byte) (evidence string, found Found, err error) {
	return g.attest(ctx, &g.asking, gpu.DeviceNonce(digest))
}

// AttestForWorkload is Attest for a handshake that the workload wants.
func (g *Guard) AttestForWorkload(ctx context.Context, digest [48]byte) (evidence string, err error) {
	g.line.Lock()
	defer g.line.Unlock()
	evidence, _, err = g.attest(ctx, g.asking.RLocker(), gpu.DeviceNonce(digest))
	return evidence, err
}

func (g *Guard) attest(ctx context.Context, turn sync.Locker, nonce [32]byte) (evidence string, found Found, err error) {
	list, err := g.ask(ctx, turn, nonce)
	if err == nil {
		found.list(list)
		if err = g.judge(ctx, list, nonce, &found); err != nil && !gpu.CodeOf(err).Unreachable() && ctx.Err() == nil {
			g.Disable(ctx, err)
		}
	}
	found.Code = codeIn(err)
	if err == nil && g.Send {
		evidence, err = gpu.MarshalEvidence(list)
	}
	return evidence, found, err
}

// ask asks the devices when it is its turn. Once begun it is not broken off when ctx
// ends: a report that fails can cost the GPU, and who waits for it may be the workload.
func (g *Guard) ask(ctx context.Context, turn sync.Locker, nonce [32]byte) (list []gpu.Evidence, err error) {
	turn.Lock()
	defer turn.Unlock()
	if err := g.failure(); err != nil {
		return nil, fmt.Errorf("the GPUs do no more work until the VM is restarted: %w", err)
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("waiting for the GPUs: %w", err)
	}
	ctx = context.WithoutCancel(ctx)
	settings, err := g.Source.Settings(ctx)
	if err == nil {
		err = g.Policy.CheckSettings(settings)
	}
	if err == nil {
		list, err = g.Source.Collect(ctx, nonce)
	}
	if err != nil {
		g.Disable(ctx, err)
	}
	return list, err
}

func (g *Guard) failure() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.failed
}

func (g *Guard) judge(ctx context.Context, evidence []gpu.Evidence, nonce [32]byte, found *Found) error {
	if n := len(evidence); g.Count != 0 && n != g.Count {
		return &gpu.Error{Code: gpu.CodeCount, Err: fmt.Errorf("there are %d GPUs, want %d", n, g.Count)}
	}
	for _, j := range g.Judges {
		results, err := j.VerifyAll(ctx, evidence, nonce)
		found.judged(len(results), err)
		if err != nil {
			return err
		}
		for i, r := range results {
			for _, w := range r.Warnings {
				g.Printf("gpu: GPU %d: warning: %s", i, w)
			}
		}
	}
	return g.recognise(evidence, found)
}

// recognise compares the devices with those of the first round. The certificate of
// a device's key is its identity, and every judge has checked it.
func (g *Guard) recognise(evidence []gpu.Evidence, round *Found) error {
	var found []string
	for _, e := range evidence {
		serial, err := gpu.Serial(e.Chain)
		if err != nil {
			return &gpu.Error{Code: gpu.CodeChainStructure, Err: err}
		}
		found = append(found, serial)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.known != nil {
		round.unknown(found, g.known)
	}
	slices.Sort(found)
	if g.known == nil {
		g.known = found
		g.Printf("gpu: %d attested, serials %s", len(found), strings.Join(found, " "))
		return nil
	}
	if !slices.Equal(found, g.known) {
		return &gpu.Error{Code: CodeIdentity, Err: fmt.Errorf("the GPUs are not those of the first round; further: %s; missing: %s", without(found, g.known), without(g.known, found))}
	}
	return nil
}

// without lists what of a is not in b.
func without(a, b []string) string {
	a = slices.DeleteFunc(slices.Clone(a), func(s string) bool { return slices.Contains(b, s) })
	if len(a) == 0 {
		return "none"
	}
	return strings.Join(a, " ")
}

// Accept lets the GPUs work. It is called after a round that passed, and does
// something after the first alone.
func (g *Guard) Accept(ctx context.Context) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.failed != nil:
		return g.failed
	case g.known == nil:
		return errors.New("GPUs that were not attested are not let to work")
	case g.ready:
		return nil
	}
	if err := g.Source.SetReady(ctx, true); err != nil {
		return fmt.Errorf("let the GPUs work: %w", err)
	}
	g.ready = true
	g.Printf("gpu: ready")
	return nil
}

// Disable takes the GPUs' leave to work back, for good.
func (g *Guard) Disable(ctx context.Context, why error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.failed != nil {
		return
	}
	g.failed = why
	if !g.ready {
		return // it was never given, and the driver's default is not to
	}
	g.ready = false
	// The round may have used up its time.
	ctx = context.WithoutCancel(ctx)
	if err := g.Source.SetReady(ctx, false); err != nil {
		g.Printf("gpu: ready could not be taken back: %v", err)
		return
	}
	g.Printf("gpu: ready taken back until the VM is restarted")
}
