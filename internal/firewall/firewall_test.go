package firewall

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"coffer/internal/guestconfig"
	"coffer/internal/testenv"
)

// namespace is a network namespace, bound to a thread of its own.
type namespace struct {
	run  chan func()
	path *os.File
}

func newNamespace(t *testing.T) *namespace {
	t.Helper()
	n := &namespace{run: make(chan func())}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			n.path, err = os.Open("/proc/thread-self/ns/net")
		}
		ready <- err
		for f := range n.run {
			f()
		}
	}()
	err := <-ready
	t.Cleanup(func() { close(n.run) })
	testenv.Need(t, err == nil, "no network namespace of our own")
	t.Cleanup(func() { n.path.Close() })
	return n
}

func (n *namespace) do(f func()) {
	done := make(chan struct{})
	n.run <- func() { defer close(done); f() }
	<-done
}

const (
	guest4, world4 = "10.9.0.2", "10.9.0.1"
	guest6, world6 = "fd00:9::2", "fd00:9::1"
)

// pair makes two namespaces with a cable between them.
func pair(t *testing.T) (guest, world *namespace) {
	t.Helper()
	testenv.Root(t)
	guest, world = newNamespace(t), newNamespace(t)
	up := func(name string, addrs ...string) {
		for _, l := range []string{"lo", name} {
			link, err := netlink.LinkByName(l)
			check(t, err)
			check(t, netlink.LinkSetUp(link))
			if l != name {
				continue
			}
			for _, a := range addrs {
				addr, err := netlink.ParseAddr(a)
				check(t, err)
				if addr.IP.To4() == nil {
					addr.Flags = unix.IFA_F_NODAD
				}
				check(t, netlink.AddrAdd(link, addr))
			}
		}
	}
	guest.do(func() {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "g0"
		err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "w0", PeerNamespace: netlink.NsFd(world.path.Fd())})
		testenv.Need(t, err == nil, "no veth here")
	})
	world.do(func() { up("w0", world4+"/24", world6+"/64") })
	guest.do(func() { up("g0", guest4+"/24", guest6+"/64") })
	return guest, world
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
	}
}

// serve accepts TCP connections, or takes datagrams, on a port of a namespace.
// The channel tells of each.
func serve(t *testing.T, n *namespace, proto, addr string) <-chan struct{} {
	t.Helper()
	seen := make(chan struct{}, 16)
	n.do(func() {
		if proto == "udp" {
			c, err := net.ListenPacket(proto, addr)
			if err != nil {
				t.Error(err)
				return
			}
			t.Cleanup(func() { c.Close() })
			go func() {
				for {
					if _, _, err := c.ReadFrom(make([]byte, 8)); err != nil {
						return
					}
					seen <- struct{}{}
				}
			}()
			return
		}
		l, err := net.Listen(proto, addr)
		if err != nil {
			t.Error(err)
			return
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				c.Close()
				seen <- struct{}{}
			}
		}()
	})
	return seen
}

func apply(t *testing.T, n *namespace, r Rules) {
	t.Helper()
	n.do(func() {
		if err := Apply(r); err != nil {
			testenv.Need(t, !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EPROTONOSUPPORT), "this kernel lacks a part of nftables: "+err.Error())
			t.Error(err)
		}
	})
	if t.Failed() {
		t.FailNow()
	}
}

const patience = 20 * time.Second

// reach connects from a namespace, or sends a datagram and waits for its arrival.
func reach(n *namespace, proto, addr string, seen <-chan struct{}) (err error) {
	n.do(func() {
		var c net.Conn
		if c, err = net.DialTimeout(proto, addr, patience); err != nil {
			return
		}
		defer c.Close()
		_, err = c.Write([]byte("x"))
	})
	if err == nil && proto == "udp" {
		select {
		case <-seen:
		case <-time.After(patience):
			err = errors.New("the datagram did not arrive")
		}
	}
	return err
}

func port(p uint16, proto string) guestconfig.Port { return guestconfig.Port{Port: p, Proto: proto} }

func TestOutput(t *testing.T) {
	guest, world := pair(t)
	seen := map[string]<-chan struct{}{}
	for _, at := range []string{
		"tcp " + world4 + ":8999", "tcp " + world4 + ":443", "tcp " + world4 + ":53", "udp " + world4 + ":53", "udp " + world4 + ":9000",
		"tcp [" + world6 + "]:8999", "tcp [" + world6 + "]:443", "udp [" + world6 + "]:9000",
	} {
		proto, addr, _ := strings.Cut(at, " ")
		seen[at] = serve(t, world, proto, addr)
	}
	kbs := []netip.AddrPort{netip.MustParseAddrPort(world4 + ":8999")}
	kbs6 := []netip.AddrPort{netip.MustParseAddrPort("[" + world6 + "]:8999")}
	dns := []netip.Addr{netip.MustParseAddr(world4)}

	// A step goes from the rules of the one before to its own: what was open is closed again.
	for _, step := range []struct {
		name  string
		rules Rules
		open  []string
	}{
		{"everything is denied", Rules{DHCP: true}, nil},
		{"the KBS's address and port", Rules{KBS: kbs}, []string{"tcp " + world4 + ":8999"}},
		{"the KBS's IPv6 address", Rules{KBS: kbs6}, []string{"tcp [" + world6 + "]:8999"}},
		{"the resolver", Rules{DNS: dns}, []string{"tcp " + world4 + ":53", "udp " + world4 + ":53"}},
		{"another resolver", Rules{DNS: []netip.Addr{netip.MustParseAddr("10.9.0.7")}}, nil},
		{"a TCP port anywhere", Rules{Out: []guestconfig.Port{port(443, "tcp")}}, []string{"tcp " + world4 + ":443", "tcp [" + world6 + "]:443"}},
		{"a UDP port anywhere", Rules{Out: []guestconfig.Port{port(9000, "udp")}}, []string{"udp " + world4 + ":9000", "udp [" + world6 + "]:9000"}},
		{"ports that are open inwards only", Rules{In: []guestconfig.Port{port(443, "tcp"), port(9000, "udp")}}, nil},
	} {
		t.Run(step.name, func(t *testing.T) {
			apply(t, guest, step.rules)
			open := map[string]bool{}
			for _, o := range step.open {
				open[o] = true
			}
			for at, arrived := range seen {
				proto, addr, _ := strings.Cut(at, " ")
				err := reach(guest, proto, addr, arrived)
				switch {
				case open[at] && err != nil:
					t.Errorf("%s: %v", at, err)
				case !open[at] && !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.EPERM) && !errors.Is(err, syscall.EACCES):
					t.Errorf("%s: %v, want a refusal at once", at, err)
				}
			}
		})
	}
}

func TestInput(t *testing.T) {
	guest, world := pair(t)
	type service struct{ proto, denied, allowed string }
	for _, s := range []service{
		{"tcp", guest4 + ":8003", guest4 + ":8002"},
		{"tcp", "[" + guest6 + "]:8003", "[" + guest6 + "]:8002"},
		{"udp", guest4 + ":8003", guest4 + ":8002"},
		{"udp", "[" + guest6 + "]:8003", "[" + guest6 + "]:8002"},
	} {
		t.Run(s.proto+" "+s.allowed, func(t *testing.T) {
			denied := serve(t, guest, s.proto, s.denied)
			allowed := serve(t, guest, s.proto, s.allowed)
			apply(t, guest, Rules{In: []guestconfig.Port{port(8002, s.proto)}})
			// The denied packet goes first; when the allowed one has made it,
			// the denied one has been judged.
			knock(t, world, s.proto, s.denied)
			if err := reach(world, s.proto, s.allowed, allowed); err != nil {
				t.Errorf("allowed port: %v", err)
			}
			select {
			case <-denied:
				t.Error("the denied port was reached")
			default:
			}
		})
	}
}

// knock sends a SYN or a datagram and does not wait.
func knock(t *testing.T, n *namespace, proto, addr string) {
	t.Helper()
	ap := netip.MustParseAddrPort(addr)
	family, kind := unix.AF_INET6, unix.SOCK_STREAM
	var sa unix.Sockaddr = &unix.SockaddrInet6{Port: int(ap.Port()), Addr: ap.Addr().As16()}
	if ap.Addr().Is4() {
		family, sa = unix.AF_INET, &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}
	}
	if proto == "udp" {
		kind = unix.SOCK_DGRAM
	}
	n.do(func() {
		fd, err := unix.Socket(family, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		check(t, err)
		t.Cleanup(func() { unix.Close(fd) })
		if err := unix.Connect(fd, sa); err != nil && !errors.Is(err, unix.EINPROGRESS) {
			t.Error(err)
		}
		if proto == "udp" {
			_, err := unix.Write(fd, []byte("x"))
			check(t, err)
		}
	})
}

func TestLoopbackIsFree(t *testing.T) {
	guest, _ := pair(t)
	seen := serve(t, guest, "tcp", "127.0.0.1:8003")
	apply(t, guest, Rules{})
	if err := reach(guest, "tcp", "127.0.0.1:8003", seen); err != nil {
		t.Error(err)
	}
}

// What the kernel holds after two calls is one table that drops by default.
func TestReadBack(t *testing.T) {
	guest, _ := pair(t)
	r := Rules{
		DHCP: true,
		DNS:  []netip.Addr{netip.MustParseAddr(world4), netip.MustParseAddr(world6)},
		KBS:  []netip.AddrPort{netip.MustParseAddrPort(world4 + ":8999")},
		In:   []guestconfig.Port{port(8002, "tcp")},
		Out:  []guestconfig.Port{port(443, "tcp"), port(123, "udp")},
	}
	apply(t, guest, Rules{})
	apply(t, guest, r)
	guest.do(func() {
		c, err := nftables.New()
		check(t, err)
		tables, err := c.ListTables()
		check(t, err)
		if len(tables) != 1 || tables[0].Name != Table || tables[0].Family != nftables.TableFamilyINet {
			t.Errorf("tables: %+v", tables)
			return
		}
		chains, err := c.ListChains()
		check(t, err)
		var names []string
		for _, chain := range chains {
			names = append(names, chain.Name)
		}
		if slices.Sort(names); !slices.Equal(names, []string{"forward", "input", "output"}) {
			t.Errorf("chains: %q", names)
		}
		for _, h := range hooks(r) {
			chain, err := c.ListChain(tables[0], h.name)
			if err != nil {
				t.Errorf("chain %s: %v", h.name, err)
				continue
			}
			if chain.Policy == nil || *chain.Policy != nftables.ChainPolicyDrop || *chain.Hooknum != *h.hook {
				t.Errorf("chain %s: policy %v, hook %v", h.name, chain.Policy, chain.Hooknum)
			}
			rules, err := c.GetRules(tables[0], chain)
			check(t, err)
			if len(rules) != len(h.rules) {
				t.Errorf("chain %s holds %d rules, %d were sent", h.name, len(rules), len(h.rules))
			}
		}
	})
}
