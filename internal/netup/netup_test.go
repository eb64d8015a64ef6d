package netup

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/server4"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"coffer/internal/guestconfig"
	"coffer/internal/testenv"
)

func ack(t testing.TB, your string, opts ...dhcpv4.Option) *dhcpv4.DHCPv4 {
	t.Helper()
	m, err := dhcpv4.New(dhcpv4.WithMessageType(dhcpv4.MessageTypeAck), dhcpv4.WithYourIP(net.ParseIP(your)))
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range opts {
		m.UpdateOption(o)
	}
	return m
}

func mask(bits int) dhcpv4.Option { return dhcpv4.OptSubnetMask(net.CIDRMask(bits, 32)) }

func dns(addrs ...string) dhcpv4.Option {
	var ips []net.IP
	for _, a := range addrs {
		ips = append(ips, net.ParseIP(a))
	}
	return dhcpv4.OptDNS(ips...)
}

func router(a string) dhcpv4.Option { return dhcpv4.OptRouter(net.ParseIP(a)) }

func routers(addrs ...string) dhcpv4.Option {
	var ips []net.IP
	for _, a := range addrs {
		ips = append(ips, net.ParseIP(a))
	}
	return dhcpv4.OptRouter(ips...)
}

func raw(code dhcpv4.OptionCode, data []byte) dhcpv4.Option { return dhcpv4.OptGeneric(code, data) }

// tricks are options that an answer may hold and that must change nothing.
func tricks(mtu ...byte) []dhcpv4.Option {
	return []dhcpv4.Option{
		raw(dhcpv4.OptionInterfaceMTU, mtu),
		routers("10.9.0.1", "10.9.0.66", "127.0.0.1"),
		raw(dhcpv4.OptionClasslessStaticRoute, []byte{1, 0, 10, 9, 0, 66, 1, 128, 10, 9, 0, 66, 99}), // half the world each, then a width of 99
		raw(dhcpv4.GenericOptionCode(249), []byte{0, 10, 9, 0, 66}),                                  // the same, as one vendor calls it
		raw(dhcpv4.OptionStaticRoutingTable, []byte{192, 0, 2, 1, 10, 9, 0, 66}),
		raw(dhcpv4.OptionDomainName, []byte("evil.example\nnameserver 10.9.0.66")),
		raw(dhcpv4.OptionDNSDomainSearchList, []byte{4, 'e', 'v', 'i', 'l', 0xc0, 0}), // a pointer to itself
		raw(dhcpv4.OptionHostName, []byte("evil\n127.0.0.1 kbs.example\x00")),
		raw(dhcpv4.OptionNTPServers, []byte{10, 9, 0, 66}),
		raw(dhcpv4.OptionIPForwarding, []byte{1}),
		raw(dhcpv4.GenericOptionCode(252), []byte("http://10.9.0.66/wpad.dat")),
		raw(dhcpv4.GenericOptionCode(224), bytes.Repeat([]byte("x"), 700)),
	}
}

func TestLease(t *testing.T) {
	hole := dhcpv4.OptSubnetMask(net.IPMask{255, 0, 255, 0})
	for _, c := range []struct {
		name    string
		ack     *dhcpv4.DHCPv4
		address string // "": refused
		gateway string
		dns     []string
	}{
		{"ordinary", ack(t, "10.0.2.15", mask(24), router("10.0.2.2"), dns("10.0.2.3")), "10.0.2.15/24", "10.0.2.2", []string{"10.0.2.3"}},
		{"no gateway, no resolver", ack(t, "10.0.2.15", mask(24)), "10.0.2.15/24", "", nil},
		{"gateway outside a /32", ack(t, "10.128.0.9", mask(32), router("10.128.0.1")), "10.128.0.9/32", "10.128.0.1", nil},
		{"more resolvers than three", ack(t, "10.0.0.9", mask(8), dns("1.1.1.1", "1.1.1.2", "1.1.1.3", "1.1.1.4")), "10.0.0.9/8", "", []string{"1.1.1.1", "1.1.1.2", "1.1.1.3"}},
		{"impossible resolvers", ack(t, "10.0.0.9", mask(24), dns("127.0.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "169.254.169.254")), "10.0.0.9/24", "", []string{"169.254.169.254"}},
		{"the first of several routers", ack(t, "10.0.0.9", mask(24), routers("10.0.0.1", "127.0.0.1", "10.0.0.2")), "10.0.0.9/24", "10.0.0.1", nil},
		{"a router cut short", ack(t, "10.0.0.9", mask(24), raw(dhcpv4.OptionRouter, []byte{10, 0, 0})), "10.0.0.9/24", "", nil},
		{"resolvers cut short", ack(t, "10.0.0.9", mask(24), raw(dhcpv4.OptionDomainNameServer, []byte{10, 0, 0, 3, 10})), "10.0.0.9/24", "", nil},
		{"a lease time cut short", ack(t, "10.0.0.9", mask(24), raw(dhcpv4.OptionIPAddressLeaseTime, []byte{1, 2})), "10.0.0.9/24", "", nil},
		{"thousands of resolvers", ack(t, "10.0.0.9", mask(24), raw(dhcpv4.OptionDomainNameServer, bytes.Repeat([]byte{10, 0, 0, 3}, 4000))), "10.0.0.9/24", "", []string{"10.0.0.3", "10.0.0.3", "10.0.0.3"}},
		{"the rest is ignored", ack(t, "10.0.0.9", mask(24), dhcpv4.OptGeneric(dhcpv4.OptionInterfaceMTU, []byte{0, 68}),
			dhcpv4.OptDomainName("evil"), dhcpv4.OptHostName("evil"), dhcpv4.OptClasslessStaticRoute(&dhcpv4.Route{
				Dest: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(1, 32)}, Router: net.IPv4(6, 6, 6, 6)})), "10.0.0.9/24", "", nil},
		{"no address", ack(t, "0.0.0.0", mask(24)), "", "", nil},
		{"loopback", ack(t, "127.0.0.5", mask(8)), "", "", nil},
		{"multicast", ack(t, "224.0.0.5", mask(24)), "", "", nil},
		{"reserved", ack(t, "250.0.0.5", mask(24)), "", "", nil},
		{"a netmask cut short", ack(t, "10.0.0.9", raw(dhcpv4.OptionSubnetMask, []byte{255, 255, 255})), "", "", nil},
		{"a netmask too long", ack(t, "10.0.0.9", raw(dhcpv4.OptionSubnetMask, []byte{255, 255, 255, 0, 0})), "", "", nil},
		{"the first router is impossible", ack(t, "10.0.0.9", mask(24), routers("0.0.0.0", "10.0.0.1")), "", "", nil},
		{"no netmask", ack(t, "10.0.0.9"), "", "", nil},
		{"the whole world is local", ack(t, "10.0.0.9", mask(0)), "", "", nil},
		{"a netmask with holes", ack(t, "10.0.0.9", hole), "", "", nil},
		{"gateway on loopback", ack(t, "10.0.0.9", mask(24), router("127.0.0.1")), "", "", nil},
		{"we are the gateway", ack(t, "10.0.0.9", mask(24), router("10.0.0.9")), "", "", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			n, err := fromACK(c.ack)
			if c.address == "" {
				if !errors.Is(err, ErrLease) {
					t.Errorf("%+v, %v; want a refusal", n, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, a := range n.DNS {
				got = append(got, a.String())
			}
			if n.Address.String() != c.address || n.Gateway.IsValid() != (c.gateway != "") || c.gateway != "" && n.Gateway.String() != c.gateway || !slices.Equal(got, c.dns) {
				t.Errorf("%+v", n)
			}
		})
	}
}

func TestRenewIn(t *testing.T) {
	for lease, want := range map[time.Duration]time.Duration{
		0: minRenew, time.Second: minRenew, time.Hour: 30 * time.Minute, 1 << 31 * time.Second: maxRenew,
	} {
		n, err := fromACK(ack(t, "10.0.0.9", mask(24), dhcpv4.OptIPAddressLeaseTime(lease)))
		if err != nil || n.RenewIn != want {
			t.Errorf("lease of %s: renew in %v, %v; want %s", lease, n, err, want)
		}
	}
}

func FuzzLease(f *testing.F) {
	f.Add(ack(f, "10.0.2.15", mask(24), router("10.0.2.2"), dns("10.0.2.3", "10.0.2.4")).ToBytes())
	f.Add(ack(f, "127.0.0.1", mask(0)).ToBytes())
	f.Add(ack(f, "10.9.0.77", append(tricks(0, 68), mask(24))...).ToBytes())
	f.Fuzz(func(t *testing.T, packet []byte) {
		m, err := dhcpv4.FromBytes(packet)
		if err != nil {
			return
		}
		n, err := fromACK(m)
		if err != nil {
			return
		}
		for _, a := range append(slices.Clone(n.DNS), n.Address.Addr()) {
			if !a.Is4() || a.IsLoopback() || a.IsMulticast() || a.IsUnspecified() {
				t.Errorf("accepted %s", a)
			}
		}
		if len(n.DNS) > maxDNS || n.Address.Bits() < 8 || n.RenewIn < minRenew || n.RenewIn > maxRenew {
			t.Errorf("accepted %+v", n)
		}
	})
}

func TestFiles(t *testing.T) {
	got := string(ResolvConf([]netip.Addr{netip.MustParseAddr("10.0.2.3"), netip.MustParseAddr("fd00::3")}))
	if want := "nameserver 10.0.2.3\nnameserver fd00::3\noptions timeout:2 attempts:2\n"; got != want {
		t.Errorf("resolv.conf %q, want %q", got, want)
	}
	got = string(Hosts(map[string]string{"b.example": "192.0.2.2", "a": "2001:db8::1"}))
	if want := "127.0.0.1 localhost\n::1 localhost\n2001:db8::1 a\n192.0.2.2 b.example\n"; got != want {
		t.Errorf("hosts %q, want %q", got, want)
	}
}

// inNamespaces runs f in a network namespace with an interface g0, whose other
// end is w0 in the namespace that other runs in.
func inNamespaces(t *testing.T, f func(other func(func()))) {
	t.Helper()
	testenv.Root(t)
	type space struct {
		run  chan func()
		path *os.File
		err  error
	}
	start := func() *space {
		s := &space{run: make(chan func())}
		ready := make(chan bool)
		go func() {
			runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
			if s.err = unix.Unshare(unix.CLONE_NEWNET); s.err == nil {
				s.path, s.err = os.Open("/proc/thread-self/ns/net")
			}
			close(ready)
			for f := range s.run {
				f()
			}
		}()
		<-ready
		t.Cleanup(func() { close(s.run) })
		testenv.Need(t, s.err == nil, "no network namespace of our own")
		t.Cleanup(func() { s.path.Close() })
		return s
	}
	do := func(s *space, f func()) {
		done := make(chan struct{})
		s.run <- func() { defer close(done); f() }
		<-done
	}
	guest, world := start(), start()
	var err error
	do(guest, func() {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "g0"
		err = netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "w0", PeerNamespace: netlink.NsFd(world.path.Fd())})
	})
	testenv.Need(t, err == nil, "no veth here")
	do(world, func() {
		var link netlink.Link
		if link, err = netlink.LinkByName("w0"); err != nil {
			return
		}
		addr, _ := netlink.ParseAddr("10.9.0.1/24")
		err = errors.Join(netlink.AddrAdd(link, addr), netlink.LinkSetUp(link))
	})
	if err != nil {
		t.Fatal(err)
	}
	do(guest, func() { f(func(f func()) { do(world, f) }) })
}

// veth is what the tests take for an Ethernet card.
func veth() (netlink.Link, error) { return netlink.LinkByName("g0") }

// state is what the kernel has: addresses of g0 and default routes.
func state(t *testing.T) string {
	t.Helper()
	link, err := veth()
	if err != nil {
		t.Error(err)
		return ""
	}
	var s []string
	addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
	if err != nil {
		t.Error(err)
	}
	for _, a := range addrs {
		s = append(s, a.IPNet.String())
	}
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{}, netlink.RT_FILTER_DST)
	if err != nil {
		t.Error(err)
	}
	for _, r := range routes {
		s = append(s, "via "+r.Gw.String())
	}
	return strings.Join(s, " ")
}

func TestStatic(t *testing.T) {
	inNamespaces(t, func(func(func())) {
		for _, c := range []struct {
			static guestconfig.Static
			want   string
		}{
			{guestconfig.Static{Address: "10.9.0.2/24", Gateway: "10.9.0.1", DNS: []string{"10.9.0.1"}}, "10.9.0.2/24 via 10.9.0.1"},
			{guestconfig.Static{Address: "10.9.0.2/24", Gateway: "10.9.0.1"}, "10.9.0.2/24 via 10.9.0.1"}, // again
			{guestconfig.Static{Address: "10.9.0.3/24", Gateway: "10.9.0.1"}, "10.9.0.3/24 via 10.9.0.1"}, // another of this network
			{guestconfig.Static{Address: "10.9.7.7/32", Gateway: "10.9.7.1"}, "10.9.7.7/32 via 10.9.7.1"}, // of another
		} {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			n, err := configure(ctx, &c.static, veth)
			if err != nil || n.Interface != "g0" {
				t.Errorf("%+v: %+v, %v", c.static, n, err)
			}
			if got := state(t); got != c.want {
				t.Errorf("%+v: kernel has %q, want %q", c.static, got, c.want)
			}
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil || lo.Attrs().Flags&net.FlagUp == 0 {
			t.Errorf("loopback is not up: %v", err)
		}
		const mtu = "/proc/sys/net/ipv6/conf/g0/accept_ra_mtu"
		if b, err := os.ReadFile(mtu); !errors.Is(err, fs.ErrNotExist) && (err != nil || string(b) != "0\n") { // no such file without IPv6
			t.Errorf("router advertisements may set the MTU: %q, %v", b, err)
		}
	})
}

func TestDHCP(t *testing.T) {
	inNamespaces(t, func(other func(func())) {
		hostName, err := os.Hostname()
		if err != nil {
			t.Error(err)
			return
		}
		for _, c := range []struct {
			name   string
			tricks []dhcpv4.Option
		}{
			{"ordinary", nil},
			{"tiny MTU", tricks(0, 68)},
			{"huge MTU", tricks(255, 255)},
			{"MTU 0", tricks(0, 0)},
			{"malformed MTU", tricks(5)},
		} {
			failed := make(chan error, 64)
			var server *server4.Server
			other(func() {
				server, err = server4.NewServer("w0", nil, func(conn net.PacketConn, _ net.Addr, m *dhcpv4.DHCPv4) {
					for _, p := range dhcpAnswers(m, c.tricks) {
						if _, err := conn.WriteTo(p, &net.UDPAddr{IP: net.IPv4bcast, Port: 68}); err != nil {
							failed <- err
							return
						}
					}
				})
			})
			if err != nil {
				t.Errorf("DHCP server: %v", err)
				return
			}
			done := make(chan struct{})
			go func() { defer close(done); _ = server.Serve() }()

			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			n, err := configure(ctx, nil, veth)
			cancel()
			server.Close()
			<-done
			if err != nil || len(failed) > 0 {
				t.Errorf("%s: %v (server: %d errors)", c.name, err, len(failed))
				continue
			}
			if got := state(t); got != "10.9.0.77/24 via 10.9.0.1" || n.RenewIn != 5*time.Minute {
				t.Errorf("%s: kernel has %q; %+v", c.name, got, n)
			}
			if got, want := string(ResolvConf(n.DNS)), "nameserver 10.9.0.3\noptions timeout:2 attempts:2\n"; got != want {
				t.Errorf("%s: resolv.conf %q, want %q", c.name, got, want)
			}
			link, err := veth()
			if err != nil || link.Attrs().MTU != 1500 {
				t.Errorf("%s: MTU %d, %v; the server's must be ignored", c.name, link.Attrs().MTU, err)
			}
			routes, err := netlink.RouteList(link, netlink.FAMILY_V4)
			if err != nil || len(routes) != 2 { // to the network, to the gateway
				t.Errorf("%s: routes %v, %v", c.name, routes, err)
			}
			if got, err := os.Hostname(); err != nil || got != hostName {
				t.Errorf("%s: host name %q, %v", c.name, got, err)
			}
		}
	})
}

// dhcpAnswers are packets in answer to m: some that cannot be meant for the guest
// or that nobody can read, each with another address, then one to be taken.
func dhcpAnswers(m *dhcpv4.DHCPv4, tricks []dhcpv4.Option) [][]byte {
	kind := dhcpv4.MessageTypeOffer
	if m.MessageType() == dhcpv4.MessageTypeRequest {
		kind = dhcpv4.MessageTypeAck
	}
	reply := func(last byte, mod ...dhcpv4.Modifier) []byte {
		r, err := dhcpv4.NewReplyFromRequest(m, append([]dhcpv4.Modifier{dhcpv4.WithMessageType(kind), dhcpv4.WithYourIP(net.IPv4(10, 9, 0, last)),
			dhcpv4.WithServerIP(net.IPv4(10, 9, 0, 1)), dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IPv4(10, 9, 0, 1))),
			dhcpv4.WithNetmask(net.CIDRMask(24, 32)), dhcpv4.WithRouter(net.IPv4(10, 9, 0, 1)), dhcpv4.WithDNS(net.IPv4(10, 9, 0, 3)),
			dhcpv4.WithLeaseTime(600)}, mod...)...)
		if err != nil {
			return nil // the guest gets no answer
		}
		return r.ToBytes()
	}
	const header = 240 // up to the options
	cut := reply(66)
	return [][]byte{
		nil,
		bytes.Repeat([]byte{0xff}, 1400),
		cut[:header/2],
		cut[:header],
		append(slices.Clone(cut[:header]), byte(dhcpv4.OptionDHCPMessageType.Code()), 250, byte(kind)), // longer than the packet
		reply(66, dhcpv4.WithTransactionID(dhcpv4.TransactionID{1, 2, 3, 4})),
		reply(66, dhcpv4.WithHwAddr(net.HardwareAddr{2, 0, 0, 0, 0, 66})),
		reply(66, func(d *dhcpv4.DHCPv4) { d.OpCode = dhcpv4.OpcodeBootRequest }),
		reply(66, dhcpv4.WithMessageType(dhcpv4.MessageTypeInform)),
		reply(77, func(d *dhcpv4.DHCPv4) {
			for _, o := range tricks {
				d.UpdateOption(o)
			}
		}),
	}
}

func TestNothingThere(t *testing.T) {
	inNamespaces(t, func(func(func())) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		none := func() (netlink.Link, error) { return nil, nil }
		if _, err := configure(ctx, nil, none); !errors.Is(err, ErrNoInterface) {
			t.Errorf("%v, want %v", err, ErrNoInterface)
		}
		if _, err := configure(ctx, nil, veth); err == nil {
			t.Error("an address without a server")
		}
	})
}
