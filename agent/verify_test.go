package agent

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"

	"coffer/agent/attest"
	"coffer/internal/boot"
	"coffer/internal/evidence"
	"coffer/internal/firewall"
	"coffer/internal/gpu"
	"coffer/internal/gpu/helper"
	"coffer/internal/guestconfig"
	"coffer/kbsclient"
)

func kbsError(typ string) error { return &kbsclient.Error{Status: 401, Type: typ, Op: "attest"} }

func TestClassify(t *testing.T) {
	for _, tc := range []struct {
		name string
		err  error
		want attest.Verdict
		code boot.Code
	}{
		{"policy denies", kbsError("PolicyDeny"), attest.Negative, boot.CodeKBSDenied},
		{"evidence refused", kbsError("AttestationError"), attest.Negative, boot.CodeKBSRefused},
		{"token not accepted", kbsError("TokenVerifierError"), attest.Negative, boot.CodeKBSRefused},
		{"platform broken", fmt.Errorf("round: %w: %w", errPlatform, evidence.ErrReport), attest.Negative, boot.CodeEvidence},
		{"VMPCK disabled", fmt.Errorf("round: %w: %w", errPlatform, evidence.ErrKeyDisabled), attest.Negative, boot.CodeVMPCK},
		{"device lost", fmt.Errorf("round: %w: %w: %w", errPlatform, evidence.ErrNoDevice, context.DeadlineExceeded), attest.Negative, boot.CodeNoDevice},
		{"platform slow", fmt.Errorf("round: %w: %w", errPlatform, context.DeadlineExceeded), attest.Unknown, boot.CodeTimeout},
		{"clock", &kbsclient.ClockError{Host: "kbs"}, attest.Negative, boot.CodeClock},
		{"another certificate", fmt.Errorf("x: %w", kbsclient.ErrTLS), attest.Unknown, boot.CodeKBSTLS},
		{"no connection", fmt.Errorf("x: %w", kbsclient.ErrUnreachable), attest.Unknown, boot.CodeKBSUnreachable},
		{"slow KBS", fmt.Errorf("x: %w: %w", kbsclient.ErrUnreachable, context.DeadlineExceeded), attest.Unknown, boot.CodeKBSUnreachable},
		{"proxy's 502", &kbsclient.Error{Status: 502, Op: "auth"}, attest.Unknown, boot.CodeKBSUnreachable},
		{"session lost", kbsError("TokenNotFound"), attest.Unknown, boot.CodeKBSProtocol},
		{"storage down or canary missing", kbsError("PluginInternalError"), attest.Unknown, boot.CodeKBSNoKey},
		{"policy does not load", kbsError("PolicyEngine"), attest.Unknown, boot.CodeKBSProtocol},
		{"nonsense", fmt.Errorf("x: %w", kbsclient.ErrProtocol), attest.Unknown, boot.CodeKBSProtocol},
		{"a KBS that crashes at GPUs", fmt.Errorf("x: %w", kbsclient.ErrOldKBS), attest.Unknown, boot.CodeKBSProtocol},
		{"firewall", boot.Fail(boot.CodeFirewall, errors.New("x")), attest.Unknown, boot.CodeFirewall},
		{"panic", boot.Fail(boot.CodeInternal, errors.New("x")), attest.Unknown, boot.CodeInternal},
		{"a GPU is bad", fmt.Errorf("evidence of additional devices: GPU 1: %w", &gpu.Error{Code: gpu.CodeMeasurement, Err: errors.New("x")}), attest.Negative, boot.CodeGPU},
		{"gpu-helper hangs", &gpu.Error{Code: helper.CodeTimeout, Err: fmt.Errorf("x: %w", context.DeadlineExceeded)}, attest.Negative, boot.CodeGPU},
		{"no RIM service", &gpu.Error{Code: "vbios-rim-fetch", Err: errors.New("x")}, attest.Unknown, boot.CodeGPU},
		{"OCSP of a RIM unreachable", &gpu.Error{Code: "driver-rim-ocsp-unreachable", Err: errors.New("x")}, attest.Unknown, boot.CodeGPU},
		{"anything else", errors.New("x"), attest.Unknown, boot.CodeKBSProtocol},
	} {
		t.Run(tc.name, func(t *testing.T) {
			v, code, reason := classify(tc.err)
			if v != tc.want || code != string(tc.code) || reason != tc.err.Error() {
				t.Errorf("got %v %s %q, want %v %s", v, code, reason, tc.want, tc.code)
			}
		})
	}
}

// kbsFunc answers the n-th canary request, from 1.
type kbsFunc func(n int, a kbsclient.Attester) error

type countingKBS struct {
	f kbsFunc
	n int
}

func (k *countingKBS) Fetch(ctx context.Context, a kbsclient.Attester, path string) ([]byte, string, error) {
	k.n++
	return nil, "", k.f(k.n, a)
}

func (k *countingKBS) LastAnswer() kbsclient.Answered { return kbsclient.Answered{} }

// source fails its first requests.
type source struct {
	evidence.Source
	fail, asked int
}

func (s *source) TEE() string { return "snp" }
func (s *source) Evidence(context.Context, [48]byte) (json.RawMessage, error) {
	s.asked++
	if s.asked <= s.fail {
		return nil, errors.New("device busy")
	}
	return json.RawMessage(`{}`), nil
}

func testNetwork(t *testing.T, url string, addrs *[]netip.Addr, rules *[]firewall.Rules) *network {
	t.Helper()
	n, err := newNetwork(Deps{
		Firewall: func(r firewall.Rules) error { *rules = append(*rules, r); return nil },
		Lookup: func(context.Context, string) ([]netip.Addr, error) {
			if len(*addrs) == 0 {
				return nil, errors.New("no such host")
			}
			return *addrs, nil
		},
	}, &guestconfig.Config{KBS: guestconfig.KBS{URL: url}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestRound(t *testing.T) {
	for _, tc := range []struct {
		name    string
		fail    int // of the platform
		kbs     kbsFunc
		want    error // nil: pass
		tries   int
		noHosts bool
	}{
		{"pass", 0, func(int, kbsclient.Attester) error { return nil }, nil, 1, false},
		{"denied at once", 0, func(int, kbsclient.Attester) error { return kbsError("PolicyDeny") }, kbsclient.ErrPolicyDenied, 1, false},
		{"refused twice", 0, func(int, kbsclient.Attester) error { return kbsError("AttestationError") }, kbsclient.ErrAttestationRefused, 2, false},
		{"the KBS has restarted between the calls", 0, func(n int, _ kbsclient.Attester) error {
			if n == 1 {
				return kbsError("TokenNotFound")
			}
			return nil
		}, nil, 2, false},
		{"unreachable is for the back-off", 0, func(int, kbsclient.Attester) error { return kbsclient.ErrUnreachable }, kbsclient.ErrUnreachable, 1, false},
		{"no address", 0, nil, kbsclient.ErrUnreachable, 0, true},
		{"platform fails once", 1, askEvidence, nil, 1, false},
		{"platform fails", 9, askEvidence, errPlatform, 1, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				addrs := []netip.Addr{netip.MustParseAddr("192.0.2.1")}
				if tc.noHosts {
					addrs = nil
				}
				var rules []firewall.Rules
				k := &countingKBS{f: tc.kbs}
				v := &verifier{kbs: k, net: testNetwork(t, "https://kbs", &addrs, &rules), source: &source{fail: tc.fail}, canary: "a/b/c"}
				if err := v.round(context.Background()); !errors.Is(err, tc.want) || (err == nil) != (tc.want == nil) {
					t.Errorf("got %v, want %v", err, tc.want)
				}
				if k.n != tc.tries {
					t.Errorf("asked %d times, want %d", k.n, tc.tries)
				}
			})
		})
	}
}

func askEvidence(_ int, a kbsclient.Attester) error {
	_, err := a.Evidence(context.Background(), [48]byte{})
	return err
}

func TestNetworkFollowsTheKBS(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	ctx := context.Background()

	var rules []firewall.Rules
	// Nobody listens on the first address: the next one is tried.
	addrs := []netip.Addr{netip.MustParseAddr("127.0.0.9"), netip.MustParseAddr("::ffff:127.0.0.1")}
	n := testNetwork(t, fmt.Sprintf("https://kbs.example:%d", port), &addrs, &rules)
	if _, err := n.dial(ctx, "tcp", ""); err == nil {
		t.Error("connected before the address was known")
	}
	for range 3 {
		if err := n.findKBS(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if want := fmt.Sprintf("[127.0.0.9:%d 127.0.0.1:%d]", port, port); len(rules) != 1 || fmt.Sprint(rules[0].KBS) != want {
		t.Errorf("firewall was set to %v, want once to %s", rules, want)
	}
	c, err := n.dial(ctx, "tcp", "elsewhere:1")
	if err != nil {
		t.Fatal(err)
	}
	if got := c.RemoteAddr().String(); got != l.Addr().String() {
		t.Errorf("connected to %s, want %s", got, l.Addr())
	}
	c.Close()

	// The doors to earlier addresses are closed again.
	addrs = []netip.Addr{netip.MustParseAddr("192.0.2.1")}
	if err := n.findKBS(ctx); err != nil || len(rules) != 2 || len(rules[1].KBS) != 1 {
		t.Errorf("%v; firewall was set to %v", err, rules[1:])
	}
	if err := n.setDNS([]netip.Addr{netip.MustParseAddr("192.0.2.53")}); err != nil || len(rules) != 3 || len(rules[2].KBS) != 1 {
		t.Errorf("%v; other resolvers change more than the resolvers: %v", err, rules[2:])
	}
}

// Rules that the kernel refused once are tried again.
func TestFirewallRefusesOnce(t *testing.T) {
	addrs := []netip.Addr{netip.MustParseAddr("192.0.2.1")}
	var rules []firewall.Rules
	n := testNetwork(t, "https://kbs.example", &addrs, &rules)
	set, refuse := n.set, true
	n.set = func(r firewall.Rules) error {
		if refuse {
			return errors.New("no memory")
		}
		return set(r)
	}
	dns := []netip.Addr{netip.MustParseAddr("192.0.2.53")}
	if err := n.findKBS(t.Context()); boot.CodeOf(err) != boot.CodeFirewall {
		t.Errorf("a firewall that refuses gave %v", err)
	}
	if err := n.setDNS(dns); boot.CodeOf(err) != boot.CodeFirewall {
		t.Errorf("a firewall that refuses gave %v", err)
	}
	refuse = false
	if err := errors.Join(n.findKBS(t.Context()), n.setDNS(dns)); err != nil || len(rules) != 2 || len(rules[1].KBS) != 1 || len(rules[1].DNS) != 1 {
		t.Errorf("%v; firewall was set to %v, want KBS and resolver let through", err, rules)
	}
}

func TestAwaitPowerKey(t *testing.T) {
	event := func(typ, code uint16, value uint32) []byte {
		b := make([]byte, inputEventSize)
		binary.LittleEndian.PutUint16(b[16:], typ)
		binary.LittleEndian.PutUint16(b[18:], code)
		binary.LittleEndian.PutUint32(b[20:], value)
		return b
	}
	for _, tc := range []struct {
		name string
		in   []byte
		want bool
	}{
		{"nothing", nil, false},
		{"cut off", event(evKey, keyPower, keyPressed)[:20], false},
		{"pressed", event(evKey, keyPower, keyPressed), true},
		{"the other code", event(evKey, keyPower2, keyPressed), true},
		{"released", event(evKey, keyPower, 0), false},
		{"another key", event(evKey, 30, keyPressed), false},
		{"another kind of event", event(4, keyPower, keyPressed), false},
		{"after others", bytes.Join([][]byte{event(0, 0, 0), event(evKey, 30, 1), event(evKey, keyPower, 1)}, nil), true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := awaitPowerKey(bytes.NewReader(tc.in)); got != tc.want {
				t.Errorf("got %v, want %v", got, tc.want)
			}
		})
	}
}
