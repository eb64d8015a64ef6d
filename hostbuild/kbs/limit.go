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
	host, _, err := net.SplitHostPort(remote)
	if err != nil {
		host = remote
	}
	if ip := net.ParseIP(host); ip != nil && ip.To4() == nil {
		host = ip.Mask(net.CIDRMask(64, 128)).String() // one host can have all of a /64
	}
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

// limited accepts no more connections at a time than it has slots.
type limited struct {
	net.Listener
	slots chan struct{}
}

func (l *limited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		select {
		case l.slots <- struct{}{}:
			return &limitedConn{Conn: c, slots: l.slots}, nil
		default:
			c.Close()
		}
	}
}

type limitedConn struct {
	net.Conn
	slots  chan struct{}
	closed atomic.Bool
}

func (c *limitedConn) Close() error {
	if c.closed.CompareAndSwap(false, true) {
		<-c.slots
	}
	return c.Conn.Close()
}
