// Package firewall replaces a guest's packet filter as a whole, in one nftables
// transaction: between two rule sets there is no moment without one.
//
// What Rules do not name is denied, in both directions and for IPv4 and IPv6
// alike. Always open are: loopback, answers (connection tracking), the ICMP that
// addressing and path MTU discovery live on. Denied input vanishes; denied
// output is rejected at once, so that a program sees an error and not a timeout.
// Both leave a rate-limited line in the kernel's log, with LogIn or LogOut.
//
// The package knows addresses and ports only. It does not stop raw packet
// sockets (AF_PACKET passes the inet hooks): who must obey must not hold
// CAP_NET_RAW.
package firewall

import (
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"coffer/internal/guestconfig"
)

// Table is the name of the one table, of family inet.
const Table = "coffer"

// Beginnings of the kernel log's lines about denied packets.
const (
	LogIn  = "coffer denied in: "
	LogOut = "coffer denied out: "
)

// Rules are what is allowed. The zero value denies everything.
type Rules struct {
	DHCP bool               // DHCPv4 as a client
	DNS  []netip.Addr       // resolvers that may be asked, UDP and TCP
	KBS  []netip.AddrPort   // TCP peers that may be connected to
	In   []guestconfig.Port // local ports that anyone may connect to
	Out  []guestconfig.Port // remote ports, anywhere, that may be connected to
}

// Apply puts the rules in force in the calling thread's network namespace.
// Needs CAP_NET_ADMIN there. On an error the earlier rules stay in force.
func Apply(r Rules) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("firewall: open nftables: %w", err)
	}
	// Adding first lets the delete succeed whether the table was there or not.
	t := &nftables.Table{Family: nftables.TableFamilyINet, Name: Table}
	c.AddTable(t)
	c.DelTable(t)
	c.AddTable(t)
	for _, h := range hooks(r) {
		drop := nftables.ChainPolicyDrop
		chain := c.AddChain(&nftables.Chain{
			Table: t, Name: h.name, Type: nftables.ChainTypeFilter,
			Hooknum: h.hook, Priority: nftables.ChainPriorityFilter, Policy: &drop,
		})
		for _, exprs := range h.rules {
			c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: exprs})
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("firewall: put the rules in force (are the nftables modules loaded?): %w", err)
	}
	return nil
}

// match is a part of a rule; rule joins them with a verdict.
type match []expr.Any

type hook struct {
	name  string
	hook  *nftables.ChainHook
	rules [][]expr.Any
}

func hooks(r Rules) []hook {
	in := [][]expr.Any{
		accept(ifname(expr.MetaKeyIIFNAME, "lo")),
		accept(ctState(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED)),
		drop(ctState(expr.CtStateBitINVALID)),
	}
	out := [][]expr.Any{
		accept(ifname(expr.MetaKeyOIFNAME, "lo")),
		accept(ctState(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED)),
	}
	// unreachable, echo request, time exceeded, parameter problem
	for _, t := range []byte{3, 8, 11, 12} {
		in = append(in, accept(l4proto(unix.IPPROTO_ICMP), field(transport, 0, t)))
	}
	// the same, packet too big, and neighbour discovery
	for _, t := range []byte{1, 2, 3, 4, 128, 133, 134, 135, 136} {
		in = append(in, accept(l4proto(unix.IPPROTO_ICMPV6), field(transport, 0, t)))
	}
	for _, t := range []byte{1, 2, 3, 4, 133, 135, 136, 143} {
		out = append(out, accept(l4proto(unix.IPPROTO_ICMPV6), field(transport, 0, t)))
	}
	if r.DHCP {
		in = append(in, accept(nfproto(unix.NFPROTO_IPV4), l4proto(unix.IPPROTO_UDP), sport(67), dport(68)))
		out = append(out, accept(nfproto(unix.NFPROTO_IPV4), l4proto(unix.IPPROTO_UDP), sport(68), dport(67)))
	}
	for _, a := range r.DNS {
		out = append(out,
			accept(daddr(a), l4proto(unix.IPPROTO_UDP), dport(53)),
			accept(daddr(a), l4proto(unix.IPPROTO_TCP), dport(53)))
	}
	for _, p := range r.KBS {
		out = append(out, accept(daddr(p.Addr()), l4proto(unix.IPPROTO_TCP), dport(p.Port())))
	}
	for _, p := range r.In {
		in = append(in, accept(l4proto(protocol(p.Proto)), dport(p.Port)))
	}
	for _, p := range r.Out {
		out = append(out, accept(l4proto(protocol(p.Proto)), dport(p.Port)))
	}
	in = append(in, logLine(LogIn))
	out = append(out, logLine(LogOut),
		rule(&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}, l4proto(unix.IPPROTO_TCP)),
		rule(&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}))
	return []hook{
		{"input", nftables.ChainHookInput, in},
		{"output", nftables.ChainHookOutput, out},
		{"forward", nftables.ChainHookForward, nil},
	}
}

func rule(verdict expr.Any, matches ...match) []expr.Any {
	var e []expr.Any
	for _, m := range matches {
		e = append(e, m...)
	}
	return append(e, &expr.Counter{}, verdict)
}

func accept(m ...match) []expr.Any { return rule(&expr.Verdict{Kind: expr.VerdictAccept}, m...) }
func drop(m ...match) []expr.Any   { return rule(&expr.Verdict{Kind: expr.VerdictDrop}, m...) }

func logLine(prefix string) []expr.Any {
	return []expr.Any{
		&expr.Limit{Type: expr.LimitTypePkts, Rate: 10, Unit: expr.LimitTimeMinute, Burst: 5},
		&expr.Log{Key: 1 << unix.NFTA_LOG_PREFIX, Data: []byte(prefix)},
	}
}

func equal(load expr.Any, value []byte) match {
	return match{load, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: value}}
}

func meta(key expr.MetaKey, value []byte) match {
	return equal(&expr.Meta{Key: key, Register: 1}, value)
}

func ifname(key expr.MetaKey, name string) match {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return meta(key, b)
}

func nfproto(p byte) match { return meta(expr.MetaKeyNFPROTO, []byte{p}) }
func l4proto(p byte) match { return meta(expr.MetaKeyL4PROTO, []byte{p}) }

func ctState(bits uint32) match {
	return match{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

const (
	network   = expr.PayloadBaseNetworkHeader
	transport = expr.PayloadBaseTransportHeader
)

func field(base expr.PayloadBase, offset uint32, value ...byte) match {
	return equal(&expr.Payload{DestRegister: 1, Base: base, Offset: offset, Len: uint32(len(value))}, value)
}

func sport(p uint16) match { return field(transport, 0, byte(p>>8), byte(p)) }
func dport(p uint16) match { return field(transport, 2, byte(p>>8), byte(p)) }

func daddr(a netip.Addr) match {
	a = a.Unmap()
	if a.Is4() {
		return append(nfproto(unix.NFPROTO_IPV4), field(network, 16, a.AsSlice()...)...)
	}
	return append(nfproto(unix.NFPROTO_IPV6), field(network, 24, a.AsSlice()...)...)
}

func protocol(name string) byte {
	if name == "udp" {
		return unix.IPPROTO_UDP
	}
	return unix.IPPROTO_TCP
}
