package peersock

import (
	"sync"
	"time"
)

// gate lets one message per key and second through, so that a flood of
// refusals is no flood of logs. Safe for concurrent use.
type gate struct {
	mu   sync.Mutex
	keys map[string]*gated
}

type gated struct {
	last       time.Time
	suppressed int
}

const (
	gateEvery = time.Second
	gateKeys  = 1024 // the most that are remembered
)

// open says whether a message about key may be logged at now, and how many
// have been held back since the last.
func (g *gate) open(key string, now time.Time) (suppressed int, ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.keys == nil {
		g.keys = make(map[string]*gated)
	}
	e, known := g.keys[key]
	switch {
	case known && now.Sub(e.last) < gateEvery:
		e.suppressed++
		return 0, false
	case known:
		suppressed = e.suppressed
		e.last, e.suppressed = now, 0
		return suppressed, true
	}
	if len(g.keys) >= gateKeys {
		for k, e := range g.keys {
			if now.Sub(e.last) >= gateEvery {
				delete(g.keys, k)
			}
		}
		if len(g.keys) >= gateKeys { // so many keys in one second are noise
			return 0, false
		}
	}
	g.keys[key] = &gated{last: now}
	return 0, true
}
