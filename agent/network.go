package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"coffer/agent/nfs"
	"coffer/internal/boot"
	"coffer/internal/firewall"
	"coffer/internal/guestconfig"
	"coffer/internal/netup"
	"coffer/kbsclient"
)

// Dial opens a connection to the KBS, whatever the address says.
type Dial = func(ctx context.Context, network, addr string) (net.Conn, error)

// network keeps the firewall in step with what the guest may reach: the ports of
// the guest config, the present resolvers, the present addresses of the KBS.
type network struct {
	set    func(firewall.Rules) error
	lookup func(ctx context.Context, host string) ([]netip.Addr, error)
	host   string // the KBS
	port   uint16
	others []string // what the guest itself connects to besides, within the allowed ports

	mu    sync.Mutex
	rules firewall.Rules
}

func newNetwork(d Deps, cfg *guestconfig.Config, resolvers []string) (*network, error) {
	u, err := url.Parse(cfg.KBS.URL)
	if err != nil {
		return nil, err
	}
	port := uint64(443)
	if u.Port() != "" {
		if port, err = strconv.ParseUint(u.Port(), 10, 16); err != nil {
			return nil, fmt.Errorf("port of %s: %w", cfg.KBS.URL, err)
		}
	}
	n := &network{set: d.Firewall, lookup: d.Lookup, host: u.Hostname(), port: uint16(port)}
	n.rules = firewall.Rules{DHCP: cfg.Network.Static == nil, In: cfg.Network.AllowedPorts, Out: cfg.Network.AllowedOutPorts}
	if cfg.API.KDS != "" {
		n.others = append(n.others, "kds:"+cfg.API.KDS)
	}
	if cfg.NFS() {
		n.others = append(n.others, fmt.Sprintf("nfs:%d/tcp", nfs.Port))
	}
	for _, s := range resolvers {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return nil, fmt.Errorf("handover: resolver %q: %w", s, err)
		}
		n.rules.DNS = append(n.rules.DNS, a)
	}
	return n, nil
}

// own names what the guest itself connects to, whatever the workload may.
func (n *network) own() []string {
	out := []string{fmt.Sprintf("kbs:%s:%d/tcp", n.host, n.port)}
	for _, a := range n.rules.DNS {
		out = append(out, fmt.Sprintf("dns:%s:53/udp+tcp", a))
	}
	if n.rules.DHCP {
		out = append(out, "dhcp:67/udp")
	}
	return append(out, n.others...)
}

func (n *network) apply() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.change(n.rules)
}

// findKBS looks the KBS up and lets its addresses through the firewall.
func (n *network) findKBS(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	addrs, err := n.lookup(ctx, n.host)
	if err != nil {
		return fmt.Errorf("%w: look up %s: %w", kbsclient.ErrUnreachable, n.host, err)
	}
	var peers []netip.AddrPort
	for _, a := range addrs {
		peers = append(peers, netip.AddrPortFrom(a.Unmap(), n.port))
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if slices.Equal(peers, n.rules.KBS) {
		return nil
	}
	rules := n.rules
	rules.KBS = peers
	return n.change(rules)
}

// change puts other rules in force. Where it cannot, the earlier ones still are.
func (n *network) change(rules firewall.Rules) error {
	err := n.set(rules)
	if err == nil {
		n.rules = rules
	}
	return boot.Fail(boot.CodeFirewall, err)
}

// setDNS lets other resolvers through.
func (n *network) setDNS(dns []netip.Addr) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if slices.Equal(dns, n.rules.DNS) {
		return nil
	}
	rules := n.rules
	rules.DNS = dns
	return n.change(rules)
}

// dial tries the addresses that the firewall lets through.
func (n *network) dial(ctx context.Context, proto, _ string) (net.Conn, error) {
	n.mu.Lock()
	peers := n.rules.KBS
	n.mu.Unlock()
	errs := []error{fmt.Errorf("%s has no address", n.host)}
	for i, p := range peers {
		if i == 0 {
			errs = nil
		}
		conn, err := (&net.Dialer{Timeout: 10 * time.Second}).DialContext(ctx, proto, p.String())
		if err == nil {
			return conn, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// Times of the DHCP lease.
const (
	renewFirst = 30 * time.Second // init has taken the lease shortly before
	renewRetry = 30 * time.Second
	renewTime  = 30 * time.Second
)

// keepNetwork renews the lease.
func (a *agent) keepNetwork(ctx context.Context) {
	if a.cfg.Network.Static != nil {
		return
	}
	for wait := renewFirst; wait > 0; {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		n, err := a.renew(ctx)
		if err != nil {
			a.log.Printf("coffer: renew the network's lease: %v", err)
			wait = renewRetry
			continue
		}
		wait = n.RenewIn
	}
}

func (a *agent) renew(ctx context.Context) (*netup.Network, error) {
	ctx, cancel := context.WithTimeout(ctx, renewTime)
	defer cancel()
	n, err := a.Network(ctx, nil)
	if err != nil {
		return nil, err
	}
	// Written in place: the container has this very file.
	if err := os.WriteFile(a.Paths.ResolvConf, netup.ResolvConf(n.DNS), 0o644); err != nil {
		return nil, err
	}
	return n, a.net.setDNS(n.DNS)
}
