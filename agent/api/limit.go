package api

import (
	"context"
	"io"
	"log"
	"net/http"
	"sync"
	"time"
)

// limiter bounds how often, and how many at once. Its tokens come back one every
// so often, up to burst.
type limiter struct {
	now   func() time.Duration
	every time.Duration
	burst int
	slot  chan struct{}

	mu   sync.Mutex
	full time.Duration // when all tokens will be back
}

// take waits for a slot, and fails where too many have been taken lately.
func (l *limiter) take(ctx context.Context) (done func(), err error) {
	l.mu.Lock()
	now := l.now()
	full := max(l.full, now) + l.every
	ok := full-now <= time.Duration(l.burst)*l.every
	if ok {
		l.full = full
	}
	l.mu.Unlock()
	if !ok {
		return nil, failf(http.StatusTooManyRequests, "too many requests: %d at once, then one in %s", l.burst, l.every)
	}
	return l.slotOf(ctx)
}

// slotOf waits for a slot alone.
func (l *limiter) slotOf(ctx context.Context) (done func(), err error) {
	select {
	case l.slot <- struct{}{}:
		return func() { <-l.slot }, nil
	case <-ctx.Done():
		return nil, failf(http.StatusServiceUnavailable, "earlier requests are still under way: %w", ctx.Err())
	}
}

// quiet takes what net/http says about connections: the workload must not fill
// the guest's log.
func quiet() *log.Logger { return log.New(io.Discard, "", 0) }
