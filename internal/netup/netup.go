// Package netup brings a guest's network up: loopback and the first Ethernet
// interface, by DHCPv4 or with a static address.
//
// A DHCP answer comes from the host, so it may set an address, a default route
// and at most three resolvers, each of which must be possible; an MTU, search
// domains, host names, routes and everything else in it are ignored. IPv6
// router advertisements are left to the kernel, their MTU excepted.
//
// Configure may be called again, which is how a lease is renewed: what has
// changed is replaced. The package does not decide what may be reached; that is
// the firewall's business.
package netup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"coffer/internal/guestconfig"
)

// Network is what an interface was given.
type Network struct {
	Interface string
	Address   netip.Prefix
	Gateway   netip.Addr    // invalid: no default route
	DNS       []netip.Addr  // at most maxDNS
	RenewIn   time.Duration // when to call Configure again; 0: never
}

// Resolvers beyond these are ignored, as the C library does.
const maxDNS = 3

// ErrNoInterface means that the machine has no Ethernet interface.
var ErrNoInterface = errors.New("no Ethernet interface; does the machine have a virtio network card?")

// linkPatience is how long interface and carrier may take to appear.
const linkPatience = 15 * time.Second

// Configure brings loopback and the first Ethernet interface up and gives it
// its address, by DHCP where static is nil. It asks until ctx ends. Needs
// CAP_NET_ADMIN and, for DHCP, CAP_NET_RAW.
func Configure(ctx context.Context, static *guestconfig.Static) (*Network, error) {
	return configure(ctx, static, ethernet)
}

// MaxAddresses bounds what Lookup returns: each address opens a door in the
// firewall, and is tried.
const MaxAddresses = 8

// Lookup resolves a host name with /etc/hosts and the resolvers of Network, or
// reads an address. It returns the first MaxAddresses, IPv4 perhaps mapped to IPv6.
//
// The host gives these answers, so they prove nothing: who answers at an address
// does, by its certificate. That is why no address is refused, not even loopback,
// where a program of our own would have to hold the KBS's key.
func Lookup(ctx context.Context, host string) ([]netip.Addr, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{a}, nil
	}
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	return addrs[:min(len(addrs), MaxAddresses)], err
}

// configure takes the interface that card returns; nil means that none is there yet.
func configure(ctx context.Context, static *guestconfig.Static, card func() (netlink.Link, error)) (*Network, error) {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return nil, fmt.Errorf("network: loopback: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return nil, fmt.Errorf("network: loopback up: %w", err)
	}
	linkCtx, cancel := context.WithTimeout(ctx, linkPatience)
	defer cancel()
	link, err := waitFor(linkCtx, ErrNoInterface, card)
	if err != nil {
		return nil, err
	}
	name := link.Attrs().Name
	err = os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/accept_ra_mtu", []byte("0"), 0)
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // no such file without IPv6
		return nil, fmt.Errorf("network: %s: refuse the MTU of router advertisements: %w", name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return nil, fmt.Errorf("network: %s up: %w", name, err)
	}
	if _, err := waitFor(linkCtx, fmt.Errorf("%s has no carrier", name), func() (netlink.Link, error) {
		l, err := netlink.LinkByName(name)
		if err != nil || l.Attrs().RawFlags&unix.IFF_LOWER_UP == 0 {
			return nil, err
		}
		return l, nil
	}); err != nil {
		return nil, err
	}

	var n *Network
	if static != nil {
		n, err = fromStatic(static)
	} else {
		n, err = askDHCP(ctx, name)
	}
	if err != nil {
		return nil, fmt.Errorf("network: %s: %w", name, err)
	}
	n.Interface = name
	if err := apply(link, n); err != nil {
		return nil, fmt.Errorf("network: %s: %w", name, err)
	}
	return n, nil
}

// ethernet returns the Ethernet interface with the lowest index, nil for none.
func ethernet() (netlink.Link, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, err
	}
	links = slices.DeleteFunc(links, func(l netlink.Link) bool {
		a := l.Attrs()
		return l.Type() != "device" || a.EncapType != "ether" || a.Flags&net.FlagLoopback != 0
	})
	if len(links) == 0 {
		return nil, nil
	}
	return slices.MinFunc(links, func(a, b netlink.Link) int { return a.Attrs().Index - b.Attrs().Index }), nil
}

// waitFor polls until get returns a link. At the end of ctx the error is missing.
func waitFor(ctx context.Context, missing error, get func() (netlink.Link, error)) (netlink.Link, error) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		l, err := get()
		if err != nil {
			return nil, fmt.Errorf("network: %w", err)
		}
		if l != nil {
			return l, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("network: %w", missing)
		}
	}
}

func fromStatic(s *guestconfig.Static) (*Network, error) {
	var n Network
	var err error
	if n.Address, err = netip.ParsePrefix(s.Address); err != nil {
		return nil, err
	}
	if n.Gateway, err = netip.ParseAddr(s.Gateway); err != nil {
		return nil, err
	}
	for _, d := range s.DNS {
		a, err := netip.ParseAddr(d)
		if err != nil {
			return nil, err
		}
		n.DNS = append(n.DNS, a)
	}
	n.DNS = n.DNS[:min(len(n.DNS), maxDNS)]
	return &n, nil
}

// apply sets address and default route, and takes away other addresses of the
// same family that an earlier lease has left.
func apply(link netlink.Link, n *Network) error {
	addr := &netlink.Addr{IPNet: &net.IPNet{
		IP:   n.Address.Addr().AsSlice(),
		Mask: net.CIDRMask(n.Address.Bits(), n.Address.Addr().BitLen()),
	}}
	if n.Address.Addr().Is4() {
		old, err := netlink.AddrList(link, netlink.FAMILY_V4)
		if err != nil {
			return fmt.Errorf("list addresses: %w", err)
		}
		// First, since an address takes those of its network that came later with it.
		for _, o := range old {
			if o.IPNet.String() != addr.IPNet.String() {
				if err := netlink.AddrDel(link, &o); err != nil {
					return fmt.Errorf("remove address %s: %w", o.IPNet, err)
				}
			}
		}
	}
	if err := netlink.AddrReplace(link, addr); err != nil {
		return fmt.Errorf("set address %s: %w", n.Address, err)
	}
	if !n.Gateway.IsValid() {
		return nil
	}
	route := &netlink.Route{
		LinkIndex: link.Attrs().Index,
		Gw:        n.Gateway.AsSlice(),
		Flags:     int(netlink.FLAG_ONLINK), // the gateway may stand outside a /32
	}
	if err := netlink.RouteReplace(route); err != nil {
		return fmt.Errorf("set default route by %s: %w", n.Gateway, err)
	}
	return nil
}

// ResolvConf renders /etc/resolv.conf.
func ResolvConf(dns []netip.Addr) []byte {
	var b bytes.Buffer
	for _, a := range dns {
		fmt.Fprintf(&b, "nameserver %s\n", a)
	}
	b.WriteString("options timeout:2 attempts:2\n")
	return b.Bytes()
}

// Hosts renders /etc/hosts: loopback, and names to addresses.
func Hosts(names map[string]string) []byte {
	var b bytes.Buffer
	b.WriteString("127.0.0.1 localhost\n::1 localhost\n")
	for _, name := range slices.Sorted(maps.Keys(names)) {
		fmt.Fprintf(&b, "%s %s\n", names[name], name)
	}
	return b.Bytes()
}
