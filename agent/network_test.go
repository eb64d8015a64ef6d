package agent

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"coffer/internal/boot"
	"coffer/internal/firewall"
	"coffer/internal/guestconfig"
	"coffer/internal/netup"
)

// The lease is renewed when the server says, sooner after a failure; other resolvers
// are written and let through the firewall, which is tried again where it failed.
func TestLeaseIsRenewed(t *testing.T) {
	resolv := filepath.Join(t.TempDir(), "resolv.conf")
	a, b := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		ctx, cancel := context.WithCancel(t.Context())
		var asked []time.Duration
		var through [][]netip.Addr
		var log strings.Builder
		d := Deps{
			Paths: Paths{ResolvConf: resolv},
			Firewall: func(r firewall.Rules) error {
				through = append(through, r.DNS)
				if len(through) == 1 {
					return errors.New("no memory")
				}
				return nil
			},
			Network: func(context.Context, *guestconfig.Static) (*netup.Network, error) {
				asked = append(asked, time.Since(began))
				switch len(asked) {
				case 1:
					return &netup.Network{DNS: []netip.Addr{a}, RenewIn: 5 * time.Minute}, nil
				case 2:
					return nil, errors.New("no DHCP lease")
				case 5:
					cancel()
				}
				return &netup.Network{DNS: []netip.Addr{b}, RenewIn: time.Hour}, nil
			},
		}
		cfg := &guestconfig.Config{KBS: guestconfig.KBS{URL: "https://kbs.example"}}
		net, err := newNetwork(d, cfg, []string{a.String()})
		if err != nil {
			t.Fatal(err)
		}
		ag := &agent{Deps: d, cfg: cfg, net: net, log: boot.NewLog(&log, false, func() time.Duration { return 0 })}
		ag.keepNetwork(ctx)

		m, s := time.Minute, time.Second
		want := []time.Duration{30 * s, 5*m + 30*s, 6 * m, 6*m + 30*s, time.Hour + 6*m + 30*s}
		if !slices.Equal(asked, want) {
			t.Errorf("asked at %v, want %v", asked, want)
		}
		if len(through) != 2 || !slices.Equal(through[0], []netip.Addr{b}) || !slices.Equal(through[1], []netip.Addr{b}) {
			t.Errorf("the firewall lets through %v", through)
		}
		if text, err := os.ReadFile(resolv); err != nil || !strings.HasPrefix(string(text), "nameserver 192.0.2.2\n") {
			t.Errorf("resolv.conf: %q, %v", text, err)
		}
		if !strings.Contains(log.String(), "renew the network's lease: no DHCP lease") || !strings.Contains(log.String(), "no memory") {
			t.Errorf("log:\n%s", log.String())
		}
	})
}
