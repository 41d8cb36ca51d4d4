package adminapi

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
)

const (
	// idleBucket is how long a caller's bucket is remembered; by then it has
	// long been full again.
	idleBucket = 2 * time.Minute
	// maxBuckets bounds the memory of a limiter. Callers beyond share a bucket.
	maxBuckets = 8192
	// maxWait is the longest that a call without a deadline waits its turn.
	maxWait = time.Minute
)

// limiter gives each address a token bucket of perSecond tokens. A call waits
// for its tokens if it can have them before its deadline. A nil limiter has no
// limit. Safe for concurrent use.
type limiter struct {
	perSecond int
	what      string // begins the refusal

	mu       sync.Mutex
	buckets  map[netip.Prefix]*bucket
	overflow *rate.Limiter
	swept    time.Time
}

type bucket struct {
	*rate.Limiter
	used time.Time
}

func newLimiter(perSecond int, what string) *limiter {
	return &limiter{
		perSecond: perSecond, what: what,
		buckets:  make(map[netip.Prefix]*bucket),
		overflow: rate.NewLimiter(rate.Limit(perSecond), perSecond),
		swept:    time.Now(),
	}
}

// wait takes n tokens of the caller's. Calls on the socket have no address and
// are never limited.
func (l *limiter) wait(ctx context.Context, n int) error {
	address := callerOf(ctx).address
	if l == nil || !address.IsValid() || n == 0 {
		return nil
	}
	if n > l.perSecond {
		return fail(codes.ResourceExhausted, l.what, fmt.Errorf("rate (%d) exceeds burst size (%d)", n, l.perSecond))
	}
	now := time.Now()
	r := l.bucket(address, now).ReserveN(now, n)
	delay := r.DelayFrom(now)
	if delay == 0 {
		return nil
	}
	if deadline, ok := ctx.Deadline(); delay > maxWait || ok && now.Add(delay).After(deadline) {
		r.CancelAt(now)
		return fail(codes.ResourceExhausted, l.what, fmt.Errorf("the next turn is in %s", delay.Round(time.Millisecond)))
	}
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		r.Cancel()
		return fail(codes.ResourceExhausted, l.what, ctx.Err())
	}
}

// bucket is the bucket of an address. Whoever has one IPv6 address has a whole
// network of them, so that is what counts there.
func (l *limiter) bucket(address netip.Addr, now time.Time) *rate.Limiter {
	bits := 32
	if address.Is6() {
		bits = 64
	}
	network, err := address.WithZone("").Prefix(bits)
	if err != nil {
		return l.overflow
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if now.Sub(l.swept) > idleBucket || len(l.buckets) >= maxBuckets && now.Sub(l.swept) > time.Second {
		for key, b := range l.buckets {
			if now.Sub(b.used) > idleBucket {
				delete(l.buckets, key)
			}
		}
		l.swept = now
	}
	b, ok := l.buckets[network]
	if !ok {
		if len(l.buckets) >= maxBuckets {
			return l.overflow
		}
		b = &bucket{Limiter: rate.NewLimiter(rate.Limit(l.perSecond), l.perSecond)}
		l.buckets[network] = b
	}
	b.used = now
	return b.Limiter
}
