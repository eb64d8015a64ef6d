package netup

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
)

// ErrLease is wrapped by the error about a DHCP answer that cannot be.
var ErrLease = errors.New("DHCP answer is not usable")

// A lease is renewed at half its time, within these bounds.
const (
	minRenew = 30 * time.Second
	maxRenew = 24 * time.Hour
)

// askDHCP asks until ctx ends: QEMU's user network, a bridge that still learns
// and a slow server all need some patience.
func askDHCP(ctx context.Context, iface string) (*Network, error) {
	for {
		n, err := askOnce(ctx, iface)
		if err == nil {
			return n, nil
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(time.Second):
		}
	}
}

func askOnce(ctx context.Context, iface string) (*Network, error) {
	c, err := nclient4.New(iface, nclient4.WithTimeout(2*time.Second), nclient4.WithRetry(3))
	if err != nil {
		return nil, fmt.Errorf("DHCP client: %w", err)
	}
	defer c.Close()
	lease, err := c.Request(ctx, dhcpv4.WithRequestedOptions(
		dhcpv4.OptionSubnetMask, dhcpv4.OptionRouter, dhcpv4.OptionDomainNameServer))
	if err != nil {
		return nil, fmt.Errorf("no DHCP lease: %w", err)
	}
	return fromACK(lease.ACK)
}

// fromACK takes out of an acknowledgement what the guest may learn from it.
func fromACK(ack *dhcpv4.DHCPv4) (*Network, error) {
	address, ok := unicast4(ack.YourIPAddr)
	if !ok {
		return nil, fmt.Errorf("%w: address %s", ErrLease, ack.YourIPAddr)
	}
	bits, size := ack.SubnetMask().Size() // 0, 0 for a mask with holes
	if size != 32 || bits < 8 {
		return nil, fmt.Errorf("%w: netmask %s", ErrLease, ack.SubnetMask())
	}
	n := &Network{Address: netip.PrefixFrom(address, bits)}
	if routers := ack.Router(); len(routers) > 0 {
		gw, ok := unicast4(routers[0])
		if !ok || gw == address {
			return nil, fmt.Errorf("%w: gateway %s", ErrLease, routers[0])
		}
		n.Gateway = gw
	}
	for _, d := range ack.DNS() {
		if a, ok := unicast4(d); ok && len(n.DNS) < maxDNS {
			n.DNS = append(n.DNS, a)
		}
	}
	lease := ack.IPAddressLeaseTime(maxRenew)
	n.RenewIn = min(max(lease/2, minRenew), maxRenew)
	return n, nil
}

// unicast4 accepts the addresses that another machine can have: a resolver or a
// gateway on loopback would be a program of our own.
func unicast4(ip net.IP) (netip.Addr, bool) {
	a, ok := netip.AddrFromSlice(ip)
	a = a.Unmap()
	if !ok || !a.Is4() || !a.IsGlobalUnicast() && !a.IsLinkLocalUnicast() || a.As4()[0] == 0 || a.As4()[0] >= 240 {
		return netip.Addr{}, false
	}
	return a, true
}
