package scenarios

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/server4"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"coffer/internal/testenv"
)

// lan is a network of the host's own, with a guest at the other end of tap: what
// QEMU's user network lets nobody do, IPv6 to the guest and DHCP at will.
type lan struct {
	tap netlink.Link
	ns  *os.File
}

// ownNamespace puts the test, and the programs that it starts, into a network
// namespace of its own, where loopback is up.
func ownNamespace(t *testing.T) *os.File {
	t.Helper()
	testenv.Root(t)
	runtime.LockOSThread() // never unlocked: the thread ends with the test
	testenv.Need(t, unix.Unshare(unix.CLONE_NEWNET) == nil, "no network namespace of our own")
	ns, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	up(t, "lo")
	return ns
}

func up(t *testing.T, name string) netlink.Link {
	t.Helper()
	link, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkSetUp(link)
	}
	if err != nil {
		t.Fatal(err)
	}
	return link
}

// newLAN makes one in a namespace of its own; the host is 10.0.2.2 there.
func newLAN(t *testing.T) *lan {
	t.Helper()
	ns := ownNamespace(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "w0"
	err := netlink.LinkAdd(&netlink.Tuntap{LinkAttrs: attrs, Mode: netlink.TUNTAP_MODE_TAP})
	testenv.Need(t, err == nil, fmt.Sprintf("no tap device: %v", err))
	tap := up(t, "w0")
	addr, err := netlink.ParseAddr("10.0.2.2/24")
	if err = errors.Join(err, netlink.AddrAdd(tap, addr)); err != nil {
		t.Fatal(err)
	}
	return &lan{tap, ns}
}

// do runs f beside the test, in the namespace.
func (n *lan) do(t *testing.T, f func()) (done <-chan struct{}) {
	d := make(chan struct{})
	go func() {
		defer close(d)
		runtime.LockOSThread()
		if err := unix.Setns(int(n.ns.Fd()), unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		f()
	}()
	return d
}

// dhcp is the server of a lan.
type dhcp struct {
	mu     sync.Mutex
	offer  []dhcpv4.Modifier // nil: no answer
	client net.HardwareAddr
}

func (n *lan) serveDHCP(t *testing.T) *dhcp {
	t.Helper()
	d := &dhcp{}
	s, err := server4.NewServer(n.tap.Attrs().Name, nil, d.answer)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	go s.Serve()
	return d
}

// lease is what the server gives from now on: for a minute, so that it is renewed
// as soon as any.
func (d *dhcp) lease(address, dns string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	host := net.IPv4(10, 0, 2, 2)
	d.offer = []dhcpv4.Modifier{
		dhcpv4.WithYourIP(net.ParseIP(address)), dhcpv4.WithServerIP(host), dhcpv4.WithOption(dhcpv4.OptServerIdentifier(host)), dhcpv4.WithLeaseTime(60),
		dhcpv4.WithNetmask(net.CIDRMask(24, 32)), dhcpv4.WithRouter(host), dhcpv4.WithDNS(net.ParseIP(dns)),
	}
}

func (d *dhcp) mute() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.offer = nil
}

// linkLocal is the IPv6 address that the guest's kernel made of its card's.
func (d *dhcp) linkLocal() netip.Addr {
	d.mu.Lock()
	defer d.mu.Unlock()
	m := d.client // RFC 4291, appendix A
	return netip.AddrFrom16([16]byte{0xfe, 0x80, 8: m[0] ^ 2, m[1], m[2], 0xff, 0xfe, m[3], m[4], m[5]})
}

func (d *dhcp) answer(conn net.PacketConn, _ net.Addr, m *dhcpv4.DHCPv4) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.client = m.ClientHWAddr
	if d.offer == nil {
		return
	}
	kind := dhcpv4.MessageTypeOffer
	if m.MessageType() == dhcpv4.MessageTypeRequest {
		kind = dhcpv4.MessageTypeAck
	}
	if r, err := dhcpv4.NewReplyFromRequest(m, append(d.offer, dhcpv4.WithMessageType(kind))...); err == nil {
		conn.WriteTo(r.ToBytes(), &net.UDPAddr{IP: net.IPv4bcast, Port: dhcpv4.ClientPort})
	}
}

// The host's own network: ports are closed on IPv6 as on IPv4; the guest keeps its
// address while the DHCP server is away, and takes another one when it is back.
func TestGuestNetwork(t *testing.T) {
	t.Parallel()
	n := newLAN(t)
	l := setupKBS(t)
	l.kbs.Stop()
	_, port, _ := net.SplitHostPort(l.kbs.Listen)
	l.kbs.Listen = "0.0.0.0:" + port
	if err := l.kbs.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	d := n.serveDHCP(t)
	d.lease("10.0.2.15", "10.0.2.3")
	b := l.probeBundle(t, "allowed_ports: [8002, 8002/udp]\ncc_attestation:\n  check_frequency: 5\n", "serve")
	g := bootLong(t, b, "--no-check", "--tap", n.tap.Attrs().Name) // the check looks for the device in the host's /sys
	g.expect(`workload: probe: listening ok`)
	g.expect(`workload: probe: resolv.conf ok nameserver 10.0.2.3;`)
	d.mute()

	var knocks []<-chan struct{}
	for _, host := range []string{"10.0.2.15", fmt.Sprintf("[%s%%%s]", d.linkLocal(), n.tap.Attrs().Name)} {
		for _, proto := range []string{"tcp", "udp"} {
			knocks = append(knocks, n.do(t, func() {
				if !answers(proto, host+":8002") {
					t.Errorf("%s port 8002 of %s does not answer", proto, host)
				}
				if answers(proto, host+":8003") {
					t.Errorf("%s port 8003 of %s answers", proto, host)
				}
			}))
		}
	}
	for _, done := range knocks {
		<-done
	}

	from := func(address string) {
		t.Helper()
		g.expect(`attestation round=\d+ verdict=pass`)
		g.expect(`attestation round=\d+ verdict=pass`)
		lines := l.kbs.Log.All()
		if last := lines[len(lines)-1]; !strings.Contains(last, "verdict=released") || !strings.Contains(last, "remote="+address+":") {
			t.Errorf("the KBS's last line is %q, want a release to %s", last, address)
		}
	}
	g.expect(`coffer: renew the network's lease: .*no DHCP lease`)
	from("10.0.2.15")
	d.lease("10.0.2.16", "10.0.2.9")
	g.expect(`workload: probe: resolv.conf ok nameserver 10.0.2.9;`)
	from("10.0.2.16")
	<-n.do(t, func() {
		if !answers("tcp", "10.0.2.16:8002") || answers("tcp", "10.0.2.15:8002") {
			t.Error("the guest does not listen at its new address alone")
		}
	})
}
