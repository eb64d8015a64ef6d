package netup

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"coffer/internal/testenv"
)

// query is what the guest asks.
type query struct {
	id       uint16
	question []byte // name, type, class
	name     string // without the last dot
	v6       bool   // asks for AAAA and not for A
	tcp      bool
}

func parseQuery(b []byte, tcp bool) (query, error) {
	if len(b) < 12 {
		return query{}, errors.New("a query without a header")
	}
	q := query{id: binary.BigEndian.Uint16(b), question: b[12:], tcp: tcp}
	var labels []string
	for rest := q.question; ; {
		if len(rest) < 5 || len(rest) < 1+int(rest[0]) {
			return query{}, errors.New("a query without a question")
		}
		n := int(rest[0])
		if n == 0 {
			q.question = q.question[:len(q.question)-len(rest)+5]
			q.name, q.v6 = strings.Join(labels, "."), rest[2] == typeAAAA
			return q, nil
		}
		labels, rest = append(labels, string(rest[1:1+n])), rest[1+n:]
	}
}

const (
	typeA, typeCNAME, typeAAAA = 1, 5, 28

	ok, nameError, serverFailure = 0x8180, 0x8183, 0x8182 // header flags of an answer
	truncated                    = 0x0200
)

// pointer is a compressed name that points to the question's.
var pointer = []byte{0xc0, 12}

func (q query) answer(flags uint16, records ...[]byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, q.id)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = append(b, 0, 1)
	b = binary.BigEndian.AppendUint16(b, uint16(len(records)))
	b = append(b, 0, 0, 0, 0)
	return append(append(b, q.question...), bytes.Join(records, nil)...)
}

func record(owner []byte, kind uint16, data []byte) []byte {
	b := binary.BigEndian.AppendUint16(slices.Clone(owner), kind)
	b = append(b, 0, 1, 0, 0, 0, 60)
	b = binary.BigEndian.AppendUint16(b, uint16(len(data)))
	return append(b, data...)
}

func address(a string) []byte { return addressOf(pointer, a) }

func addressOf(owner []byte, a string) []byte {
	ip := netip.MustParseAddr(a)
	if ip.Is4() {
		return record(owner, typeA, ip.AsSlice())
	}
	return record(owner, typeAAAA, ip.AsSlice())
}

func wire(name string) []byte {
	var b []byte
	for label := range strings.SplitSeq(name, ".") {
		b = append(append(b, byte(len(label))), label...)
	}
	return append(b, 0)
}

// server answers each name in its own way and notes what it was asked for.
type server struct {
	answers map[string]func(query) [][]byte // packets; over TCP with their length in front

	mu    sync.Mutex
	asked map[string]bool
}

func (s *server) handle(b []byte, tcp bool) [][]byte {
	q, err := parseQuery(b, tcp)
	if err != nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked[q.name] = true
	if f := s.answers[q.name]; f != nil {
		return f(q)
	}
	return [][]byte{q.answer(ok, address("6.6.6.6"))} // names that nobody meant
}

func (s *server) serve(t *testing.T) {
	t.Helper()
	udp, err := net.ListenPacket("udp", "127.0.0.1:53")
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := net.Listen("tcp", "127.0.0.1:53")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { udp.Close(); tcp.Close() })
	go func() {
		for {
			b := make([]byte, 2048)
			n, from, err := udp.ReadFrom(b)
			if err != nil {
				return
			}
			for _, p := range s.handle(b[:n], false) {
				_, _ = udp.WriteTo(p, from)
			}
		}
	}()
	go func() {
		for {
			c, err := tcp.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				var size [2]byte
				if _, err := io.ReadFull(c, size[:]); err != nil {
					return
				}
				b := make([]byte, binary.BigEndian.Uint16(size[:]))
				if _, err := io.ReadFull(c, b); err != nil {
					return
				}
				for _, p := range s.handle(b, true) {
					if _, err := c.Write(p); err != nil {
						return
					}
				}
				_, _ = io.Copy(io.Discard, c) // until the guest has had enough
			}()
		}
	}()
}

func framed(b []byte) []byte { return append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...) }

// overTCP answers truncated over UDP and with f over TCP.
func overTCP(f func(query) [][]byte) func(query) [][]byte {
	return func(q query) [][]byte {
		if !q.tcp {
			return [][]byte{q.answer(ok | truncated)}
		}
		return f(q)
	}
}

// asGuest runs the calling test once more, as a process which has a network, a
// host name and an /etc of its own, as the guest has them. True: this is it.
func asGuest(t *testing.T) bool {
	t.Helper()
	const marker = "NETUP_TEST_GUEST"
	if os.Getenv(marker) == "" {
		testenv.Root(t)
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", "-test.parallel=64", "-test.timeout=120s")
		cmd.Env = append(os.Environ(), marker+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWUTS, Pdeathsig: unix.SIGKILL}
		out, err := cmd.CombinedOutput()
		testenv.Need(t, !errors.Is(err, unix.EPERM), "no namespaces of our own")
		if err != nil || !bytes.Contains(out, []byte("--- PASS: "+t.Name())) {
			t.Errorf("%v\n%s", err, out)
		}
		return false
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{
		netlink.LinkSetUp(lo),
		unix.Sethostname([]byte("cvm_0123456789ab")),
		unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		unix.Mount("tmpfs", "/etc", "tmpfs", 0, ""),
		os.WriteFile("/etc/resolv.conf", ResolvConf([]netip.Addr{netip.MustParseAddr("127.0.0.1")}), 0o644),
		os.WriteFile("/etc/hosts", Hosts(map[string]string{"pinned.example": "192.0.2.99"}), 0o644),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return true
}

// What a hostile resolver can do is what it may do anyway: give another address,
// or none. That costs an attempt; who answers there still needs the certificate.
func TestHostileDNS(t *testing.T) {
	if !asGuest(t) {
		return
	}
	const right = "192.0.2.7"
	only := func(records ...[]byte) func(query) [][]byte {
		return func(q query) [][]byte { return [][]byte{q.answer(ok, records...)} }
	}
	spoil := func(f func(b []byte, q query)) func(query) []byte {
		return func(q query) []byte {
			b := q.answer(ok, address("6.6.6.6"))
			f(b, q)
			return b
		}
	}
	otherID := spoil(func(b []byte, _ query) { b[1]++ })
	otherQuestion := spoil(func(b []byte, _ query) { b[13] ^= 1 })
	notAnswer := spoil(func(b []byte, _ query) { b[2] &^= 0x80 })
	questionLoop := spoil(func(b []byte, _ query) { copy(b[12:], pointer) })
	noise := rand.New(rand.NewPCG(1, 2))
	garbage := func(query) []byte {
		b := make([]byte, noise.IntN(1232)) // the server handles one query at a time
		for i := range b {
			b[i] = byte(noise.Uint32())
		}
		return b
	}
	many := func(n int) [][]byte {
		records := make([][]byte, n)
		for i := range records {
			records[i] = record(pointer, typeA, []byte{198, 51, byte(i >> 8), byte(i)})
		}
		return records
	}
	first := func(forged func(query) []byte) func(query) [][]byte { // before the true answer
		return func(q query) [][]byte { return [][]byte{forged(q), q.answer(ok, address(right))} }
	}
	nothingElse := func(forged func(query) []byte) func(query) [][]byte {
		return func(q query) [][]byte { return [][]byte{forged(q)} }
	}
	silent := func(query) [][]byte { return nil }

	cases := []struct {
		name   string
		answer func(query) [][]byte
		want   []string // nil: an error
	}{
		{"ordinary.example", only(address(right)), []string{right}},
		{"short", only(address(right)), []string{right}},

		{"id-first.example", first(otherID), []string{right}},
		{"id.example", nothingElse(otherID), nil},
		{"question-first.example", first(otherQuestion), []string{right}},
		{"question.example", nothingElse(otherQuestion), nil},
		{"query-as-answer.example", nothingElse(notAnswer), nil},
		{"garbage-first.example", first(garbage), []string{right}},
		{"garbage.example", nothingElse(garbage), nil},
		{"empty.example", nothingElse(func(query) []byte { return nil }), nil},
		{"header-only.example", nothingElse(func(q query) []byte { return q.answer(ok)[:12] }), nil},
		{"silent.example", silent, nil},

		{"name-error.example", func(q query) [][]byte { return [][]byte{q.answer(nameError, address("6.6.6.6"))} }, nil},
		{"failure.example", func(q query) [][]byte { return [][]byte{q.answer(serverFailure, address("6.6.6.6"))} }, nil},
		{"no-record.example", only(), nil},
		{"text-only.example", only(record(pointer, 16, []byte("\x07hostile"))), nil},
		{"additional.example", nothingElse(func(q query) []byte {
			b := q.answer(ok, address("6.6.6.6"))
			b[7], b[11] = 0, 1 // the record is an additional one, no answer
			return b
		}), nil},

		{"cname-loop.example", only(record(pointer, typeCNAME, wire("a.example")), record(wire("a.example"), typeCNAME, pointer)), nil},
		{"cname-itself.example", only(record(pointer, typeCNAME, pointer)), nil},
		{"cname-chain.example", func(q query) [][]byte {
			var records [][]byte
			owner := pointer
			for i := range 20 {
				next := wire(fmt.Sprintf("c%d.example", i))
				records = append(records, record(owner, typeCNAME, next))
				owner = next
			}
			return [][]byte{q.answer(ok, append(records, addressOf(owner, right))...)}
		}, []string{right}},

		{"owner-loop.example", nothingElse(func(q query) []byte {
			at := len(q.answer(ok))
			return q.answer(ok, addressOf([]byte{0xc0 | byte(at>>8), byte(at)}, "6.6.6.6"))
		}), nil},
		{"owner-pair-loop.example", nothingElse(func(q query) []byte {
			at := len(q.answer(ok))
			owner := []byte{1, 'a', 0xc0 | byte(at>>8), byte(at)}
			return q.answer(ok, addressOf(owner, "6.6.6.6"))
		}), nil},
		{"owner-outside.example", only(addressOf([]byte{0xff, 0xff}, "6.6.6.6")), nil},
		{"question-loop.example", nothingElse(questionLoop), nil},

		{"cut.example", nothingElse(func(q query) []byte { b := q.answer(ok, address("6.6.6.6")); return b[:len(b)-2] }), nil},
		{"length-beyond.example", nothingElse(func(q query) []byte {
			b := q.answer(ok, address(right))
			b[len(b)-6], b[len(b)-5] = 0xff, 0xff
			return b
		}), []string{right}}, // the address is whole, nothing behind it is read
		{"count-beyond.example", nothingElse(func(q query) []byte {
			b := q.answer(ok, address(right))
			b[6], b[7] = 0xff, 0xff
			return b
		}), []string{right}},

		{"tcp.example", overTCP(func(q query) [][]byte { return [][]byte{framed(q.answer(ok, address(right)))} }), []string{right}},
		{"tcp-truncated.example", overTCP(func(q query) [][]byte { return [][]byte{framed(q.answer(ok|truncated, address(right)))} }), []string{right}},
		{"tcp-silent.example", overTCP(silent), nil},
		{"tcp-stalls.example", overTCP(func(q query) [][]byte { return [][]byte{{0xff, 0xff}, q.answer(ok, address("6.6.6.6"))} }), nil},
		{"tcp-zero.example", overTCP(func(query) [][]byte { return [][]byte{{0, 0}} }), nil},
		{"tcp-garbage.example", overTCP(func(q query) [][]byte { return [][]byte{framed(garbage(q))} }), nil},
		{"tcp-id.example", overTCP(func(q query) [][]byte { return [][]byte{framed(otherID(q))} }), nil},

		// The other addresses that the host may give: each as good as any it could
		// have given, and each answered by nobody who has the KBS's certificate.
		{"other-owner.example", only(addressOf(wire("evil.example"), "198.51.100.9")), []string{"198.51.100.9"}},
		{"loopback.example", only(address("127.0.0.1")), []string{"127.0.0.1"}},
		{"unspecified.example", only(address("0.0.0.0")), []string{"0.0.0.0"}},
		{"multicast.example", only(address("224.0.0.1"), address("255.255.255.255")), []string{"224.0.0.1", "255.255.255.255"}},

		{"pinned.example", only(address("6.6.6.6")), []string{"192.0.2.99"}}, // in /etc/hosts
	}
	const huge = 4000
	s := &server{answers: map[string]func(query) [][]byte{
		"huge.example":     overTCP(func(q query) [][]byte { return [][]byte{framed(q.answer(ok, many(huge)...))} }),
		"deadline.example": silent,
		"dual.example": func(q query) [][]byte {
			if q.v6 {
				return [][]byte{q.answer(ok, address("2001:db8::7"), address("::ffff:192.0.2.8"))}
			}
			return [][]byte{q.answer(ok, address(right))}
		},
	}, asked: map[string]bool{}}
	meant := map[string]bool{"huge.example": true, "deadline.example": true, "dual.example": true}
	for _, c := range cases {
		s.answers[c.name] = func(q query) [][]byte {
			if q.v6 && c.want != nil {
				return [][]byte{q.answer(ok)} // a name without AAAA
			}
			return c.answer(q)
		}
		meant[c.name] = true
	}
	s.serve(t)

	t.Run("cases", func(t *testing.T) {
		for _, c := range cases {
			t.Run(c.name, func(t *testing.T) {
				t.Parallel()
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				got, err := lookup(ctx, c.name)
				if c.want == nil && err == nil || c.want != nil && (err != nil || !slices.Equal(got, c.want)) {
					t.Errorf("%v, %v; want %v", got, err, c.want)
				}
				if ctx.Err() != nil {
					t.Error("the resolver does not give up by itself")
				}
			})
		}
		t.Run("dual", func(t *testing.T) {
			t.Parallel()
			got, err := lookup(t.Context(), "dual.example")
			slices.Sort(got)
			if want := []string{"192.0.2.7", "192.0.2.8", "2001:db8::7"}; err != nil || !slices.Equal(got, want) {
				t.Errorf("%v, %v; want %v", got, err, want)
			}
		})
		t.Run("thousands of records", func(t *testing.T) {
			t.Parallel()
			got, err := lookup(t.Context(), "huge.example")
			if err != nil || len(got) != MaxAddresses {
				t.Errorf("%d addresses, %v; want %d", len(got), err, MaxAddresses)
			}
		})
		t.Run("deadline", func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			got, err := lookup(ctx, "deadline.example")
			if e := new(net.DNSError); !errors.As(err, &e) || !e.IsTimeout {
				t.Errorf("%v, %v; want the deadline", got, err)
			}
		})
	})

	s.mu.Lock()
	defer s.mu.Unlock()
	// No domain is ever put behind a name, however short it is and whatever failed.
	for name := range s.asked {
		if !meant[name] {
			t.Errorf("the guest asked for %q", name)
		}
	}
	if s.asked["pinned.example"] {
		t.Error("the guest asked for a name of /etc/hosts")
	}
}

func lookup(ctx context.Context, host string) ([]string, error) {
	addrs, err := Lookup(ctx, host)
	var s []string
	for _, a := range addrs {
		s = append(s, a.Unmap().String())
	}
	return s, err
}
