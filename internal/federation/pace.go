package federation

import (
	"math/rand/v2"
	"time"
)

const (
	// minHint and maxHint bound what an endpoint may ask for: not more work
	// than SPIRE Server would do, and a look at least twice a day.
	minHint = time.Minute
	maxHint = 24 * time.Hour
	// defaultHint is for endpoints that give none; SPIRE Server's own.
	defaultHint = 5 * time.Minute

	firstPause = 2 * time.Second
	maxPause   = 5 * time.Minute
)

// bounded is the refresh hint that counts.
func bounded(hint time.Duration) time.Duration {
	if hint <= 0 {
		hint = defaultHint
	}
	return min(max(hint, minHint), maxHint)
}

// interval is the time from one success to the next attempt: a quarter of the
// hint, as SPIRE Server has it, so that several may fail before it has passed.
func interval(hint time.Duration) time.Duration { return bounded(hint) / 4 }

// pause is the time from a failure to the next attempt; n counts failures from
// 1. It never grows beyond the usual interval by much.
func pause(n int, hint time.Duration) time.Duration {
	longest := min(max(interval(hint), 15*time.Second), maxPause)
	d := firstPause
	for i := 1; i < n && d < longest; i++ {
		d *= 2
	}
	return min(d, longest)
}

// staleAfter is how long after the last success a bundle counts as stale: keys
// may have come that nobody here has heard of.
func staleAfter(hint time.Duration) time.Duration { return 2 * bounded(hint) }

// spread takes up to a tenth off, so that many relationships do not keep step.
func spread(d time.Duration) time.Duration {
	return d - rand.N(d/10+1) //nolint:gosec // no secret
}
