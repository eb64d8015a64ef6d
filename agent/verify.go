package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"coffer/agent/attest"
	"coffer/agent/gpus"
	"coffer/internal/boot"
	"coffer/internal/evidence"
	"coffer/internal/gpu"
	"coffer/kbsclient"
)

// verifier makes attestation rounds.
type verifier struct {
	kbs    KBS
	net    *network
	source evidence.Source
	canary string
	gpus   *gpus.Guard // nil: there are none
	found  gpus.Found  // of the GPUs in the last round; the loop's alone, as are the next
	token  string      // of the last round that passed

	vaultKey string                 // resource that release is to get once; "": there is none
	release  func(key []byte) error // the key's text
	cpu      int64                  // processor time when the round began
}

// round is one attestation. A KBS's /attest accepts evidence that its policy
// does not want, so what counts is the canary resource, which the policy gives
// to wanted guests only.
func (v *verifier) round(ctx context.Context) error {
	v.cpu, v.found = readUsage("/proc").cpu, gpus.Found{}
	if err := v.net.findKBS(ctx); err != nil {
		return err
	}
	err := v.fetchCanary(ctx)
	// A KBS that restarts in the middle of a handshake refuses it: one more.
	if errors.Is(err, kbsclient.ErrAttestationRefused) || errors.Is(err, kbsclient.ErrTokenNotFound) || errors.Is(err, kbsclient.ErrTokenInvalid) {
		err = v.fetchCanary(ctx)
	}
	if err == nil && v.vaultKey != "" {
		err = v.fetchVaultKey(ctx)
	}
	if err == nil && v.gpus != nil {
		err = v.gpus.Accept(ctx)
	}
	return err
}

// errVault is a key of /vault that does not open it.
var errVault = errors.New("/vault cannot be opened")

func (v *verifier) fetchVaultKey(ctx context.Context) error {
	key, _, err := v.kbs.Fetch(ctx, attester{v.source, v.gpus, &v.found}, v.vaultKey)
	defer clear(key)
	if err != nil {
		return fmt.Errorf("key of /vault: %w", err)
	}
	if err := v.release(key); err != nil {
		return fmt.Errorf("%w: %w", errVault, err)
	}
	v.vaultKey = ""
	return nil
}

func (v *verifier) fetchCanary(ctx context.Context) error {
	resource, token, err := v.kbs.Fetch(ctx, attester{v.source, v.gpus, &v.found}, v.canary)
	clear(resource)
	if err == nil {
		v.token = token
	}
	return err
}

// kbsClock is the KBS's clock in the last answer to whoever asked here, with the
// times of the loop's clock.
func (a *agent) kbsClock() attest.Stamp {
	last, now := a.verifier.kbs.LastAnswer(), a.Now()
	return attest.Stamp{Verifier: last.Date, Sent: now - time.Since(last.Sent), Came: now - time.Since(last.Came)}
}

// Fetch is for the workload's API.
func (v *verifier) Fetch(ctx context.Context, path string) ([]byte, string, error) {
	if err := v.net.findKBS(ctx); err != nil {
		return nil, "", err
	}
	// A resource may want GPUs of the KBS's own judging. Else they are left in peace.
	a := attester{Source: v.source}
	if v.gpus != nil && v.gpus.Send {
		a.gpus = v.gpus
	}
	return v.kbs.Fetch(ctx, a, path)
}

// errPlatform marks what the platform, not the KBS, has failed at.
var errPlatform = errors.New("no evidence")

// attester is the evidence of one round. The platform is asked twice before it
// counts as broken.
type attester struct {
	evidence.Source
	gpus  *gpus.Guard // nil: there are none
	found *gpus.Found // gets what was found of them; nil: it is for the workload
}

func (a attester) Evidence(ctx context.Context, digest [48]byte) (json.RawMessage, error) {
	e, err := a.Source.Evidence(ctx, digest)
	if err != nil && ctx.Err() == nil {
		select {
		case <-time.After(time.Second):
			e, err = a.Source.Evidence(ctx, digest)
		case <-ctx.Done():
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errPlatform, err)
	}
	return e, nil
}

// verdicts sorts the errors of a round; the first match counts. Negative is what
// an authentic KBS has answered about this guest, and what is broken in the
// guest itself. The rest says nothing about it: whoever cuts the line, answers
// with another certificate or breaks the KBS must not be able to stop a job
// before max_staleness has passed.
var verdicts = []struct {
	is      error
	verdict attest.Verdict
	code    boot.Code
}{
	{kbsclient.ErrPolicyDenied, attest.Negative, boot.CodeKBSDenied},
	{kbsclient.ErrAttestationRefused, attest.Negative, boot.CodeKBSRefused},
	{kbsclient.ErrTokenInvalid, attest.Negative, boot.CodeKBSRefused},
	{kbsclient.ErrClock, attest.Negative, boot.CodeClock}, // is an ErrTLS too
	{evidence.ErrKeyDisabled, attest.Negative, boot.CodeVMPCK},
	{evidence.ErrNoDevice, attest.Negative, boot.CodeNoDevice},
	{kbsclient.ErrTLS, attest.Unknown, boot.CodeKBSTLS},
	{kbsclient.ErrUnreachable, attest.Unknown, boot.CodeKBSUnreachable},
	{context.DeadlineExceeded, attest.Unknown, boot.CodeTimeout}, // the platform's, too
	{errPlatform, attest.Negative, boot.CodeEvidence},
	{errVault, attest.Negative, boot.CodeVault},
	{kbsclient.ErrNoResource, attest.Unknown, boot.CodeKBSNoKey}, // or the KBS's storage is down: it does not tell
}

func classify(err error) (attest.Verdict, string, string) {
	var g *gpu.Error
	if errors.As(err, &g) {
		if g.Code.Unreachable() {
			return attest.Unknown, string(boot.CodeGPU), err.Error()
		}
		return attest.Negative, string(boot.CodeGPU), err.Error()
	}
	for _, v := range verdicts {
		if errors.Is(err, v.is) {
			return v.verdict, string(v.code), err.Error()
		}
	}
	code := boot.CodeKBSProtocol
	var coded *boot.Error
	if errors.As(err, &coded) {
		code = coded.Code
	}
	return attest.Unknown, string(code), err.Error()
}

// record is one line of attestation.jsonl.
type record struct {
	Time         string `json:"time"` // RFC 3339, UTC; the guest's clock
	Seq          int    `json:"seq"`
	Verdict      string `json:"verdict"`
	Code         string `json:"code,omitempty"`
	Reason       string `json:"reason,omitempty"`
	DurationMS   int64  `json:"duration_ms"`
	LaunchDigest string `json:"launch_digest"`
	Simulated    bool   `json:"simulated"`

	GPU   gpus.Found `json:"gpu,omitzero"`    // zero where none was asked
	Clock *clockGap  `json:"clock,omitempty"` // nil where the clock goes right

	// What agent, containerd and shim take: resident memory, and processor time in
	// this round and between the last one and this.
	RSS      map[string]int64 `json:"rss_kib"`
	RoundCPU int64            `json:"round_cpu_ms"`
	IdleCPU  int64            `json:"idle_cpu_ms"`
}

// clockGap tells that the guest's clock was stopped or slowed before the round's
// end: what passed since the comparison before by the KBS's clock, and at most by
// the guest's, in seconds.
type clockGap struct {
	KBS   float64 `json:"kbs_s"`
	Guest float64 `json:"guest_s"`
}

// report writes a round to the console and to its log.
func (a *agent) report(r attest.Result) {
	line := fmt.Sprintf("attestation round=%d verdict=%s reason=%q", r.Seq, r.Verdict, r.Reason)
	if r.Code != "" {
		line += " code=" + r.Code
	}
	a.log.Printf("%s", line)
	var gap *clockGap
	if r.Gap != (attest.Gap{}) {
		gap = &clockGap{r.Gap.Verifier.Seconds(), r.Gap.Guest.Round(time.Millisecond).Seconds()}
	}
	u := readUsage("/proc")
	b, err := json.Marshal(record{
		Time:         time.Now().UTC().Format(time.RFC3339Nano),
		Seq:          r.Seq,
		Verdict:      r.Verdict.String(),
		Code:         r.Code,
		Reason:       r.Reason,
		DurationMS:   r.Duration.Milliseconds(),
		LaunchDigest: a.handover.LaunchDigest,
		Simulated:    a.verifier.source.Simulated(),
		GPU:          a.verifier.found,
		Clock:        gap,
		RSS:          u.rss,
		RoundCPU:     u.cpu - a.verifier.cpu,
		IdleCPU:      a.verifier.cpu - a.cpu,
	})
	a.cpu = u.cpu
	if err == nil {
		a.logs.attestation.Write(append(b, '\n'))
		a.services.api.SetRound(b, r.Verdict.String(), a.verifier.token, r.Gap.Lost())
	}
}
