package kbs

import (
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// limiter gives each address so many requests a second, and ten seconds' worth
// at once. It remembers a bounded number of addresses.
type limiter struct {
	rate float64 // a second; 0: no limit
	now  func() time.Time

	mu      sync.Mutex
	buckets map[string]*bucket
}

type bucket struct {
	left float64
	at   time.Time
}

const (
	burstSeconds = 10
	maxBuckets   = 10000
)

// allow takes one request of the address remote, host:port.
func (l *limiter) allow(remote string) bool {
	if l.rate == 0 {
		return true
	}
	host := hostOf(remote)
	l.mu.Lock()
	defer l.mu.Unlock()
	now, full := l.now(), l.rate*burstSeconds
	b, ok := l.buckets[host]
	if !ok {
		if len(l.buckets) >= maxBuckets {
			l.forget(now, full)
		}
		b = &bucket{left: full, at: now}
		l.buckets[host] = b
	}
	b.left = min(full, b.left+max(0, now.Sub(b.at).Seconds())*l.rate)
	b.at = now
	if b.left < 1 {
		return false
	}
	b.left--
	return true
}

// hostOf is what of host:port counts as one address.
func hostOf(remote string) string {
	host, _, err := net.SplitHostPort(remote)
	if err != nil {
		return remote
	}
	if ip := net.ParseIP(host); ip != nil && ip.To4() == nil {
		return ip.Mask(net.CIDRMask(64, 128)).String() // one host can have all of a /64
	}
	return host
}

// forget drops the addresses that have their full share again, or all.
func (l *limiter) forget(now time.Time, full float64) {
	for host, b := range l.buckets {
		if b.left+now.Sub(b.at).Seconds()*l.rate >= full {
			delete(l.buckets, host)
		}
	}
	if len(l.buckets) >= maxBuckets {
		clear(l.buckets)
	}
}

// share bounds how many there are at a time, of connections or of requests, in all
// and of one address: a quarter, so that no address keeps out the others.
type share struct {
	max int

	mu    sync.Mutex
	total int
	by    map[string]int // by address
}

func newShare(max int) *share { return &share{max: max, by: map[string]int{}} }

// take takes one for the address remote, host:port, if there is one left.
func (s *share) take(remote string) bool {
	host := hostOf(remote)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.total >= s.max || s.by[host] >= max(s.max/4, 1) {
		return false
	}
	s.total++
	s.by[host]++
	return true
}

func (s *share) give(remote string) {
	host := hostOf(remote)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.total--
	if s.by[host]--; s.by[host] == 0 {
		delete(s.by, host)
	}
}

// limited closes the connections that are beyond a share.
type limited struct {
	net.Listener
	share *share
}

func (l *limited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if l.share.take(c.RemoteAddr().String()) {
			return &limitedConn{Conn: c, share: l.share}, nil
		}
		c.Close()
	}
}

type limitedConn struct {
	net.Conn
	share  *share
	closed atomic.Bool
}

func (c *limitedConn) Close() error {
	if c.closed.CompareAndSwap(false, true) {
		c.share.give(c.RemoteAddr().String())
	}
	return c.Conn.Close()
}
