package svid

import (
	"context"
	"encoding/hex"
	"maps"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// applySetLocked takes a new set of entries into the books: deleted entries
// are withdrawn, changed ones updated, and only the views they concern are
// matched anew. With N waiting callers a new entry costs N subset tests.
func (m *Manager) applySetLocked(set *entry.Set, now time.Time) {
	var d entry.Delta
	ok := false
	if m.heard {
		d, ok = set.Changes(m.set.Version())
	}
	m.set = set
	if !m.heard {
		m.heard = true
		m.soilAllLocked()
	}
	if !ok || len(d.Changed)+len(d.Removed) > maxDelta {
		m.rematchLocked(now)
		return
	}
	touched := make(map[*view]struct{})
	touch := func(r *record) {
		for g := range r.groups {
			for _, v := range g.views {
				touched[v] = struct{}{}
			}
		}
	}
	skip := make(map[string]bool, len(d.Changed)+len(d.Removed))
	for _, e := range d.Removed {
		skip[e.ID] = true
		if r := m.records[e.ID]; r != nil {
			touch(r)
			m.withdrawLocked(r)
		}
	}
	for _, e := range d.Changed {
		skip[e.ID] = true
		if r := m.records[e.ID]; r != nil {
			touch(r)
			m.updateLocked(r, e, now)
		}
		if e.StoreSVID || e.Suspended {
			continue // nobody gets it who has not got it
		}
		for v := range m.allViewsLocked() {
			if e.Matches(v.selectors) {
				touched[v] = struct{}{}
			}
		}
	}
	for v := range touched {
		entries := make([]*entry.Entry, 0, len(v.group.records)+1)
		for _, r := range v.group.records {
			if !skip[r.entry.ID] {
				entries = append(entries, r.entry)
			}
		}
		for _, e := range d.Changed {
			if !e.StoreSVID && e.Matches(v.selectors) && (!e.Suspended || v.group.has(e.ID)) {
				entries = append(entries, e)
			}
		}
		entry.Sort(entries, m.cfg.Order, m.cfg.DefaultHint)
		m.putLocked(v, entries, now)
	}
}

// rematchLocked compares everything with the set, by index.
func (m *Manager) rematchLocked(now time.Time) {
	for id, r := range m.records {
		switch e, ok := m.set.Get(id); {
		case !ok:
			m.withdrawLocked(r)
		case e != r.entry:
			m.updateLocked(r, e, now)
		}
	}
	for v := range m.allViewsLocked() {
		m.putLocked(v, m.matchLocked(v.selectors, v.group), now)
	}
}

// allViewsLocked yields callers and expected pods.
func (m *Manager) allViewsLocked() func(func(*view) bool) {
	return func(yield func(*view) bool) {
		for _, v := range m.views {
			if !yield(v) {
				return
			}
		}
		for _, v := range m.warm {
			if !yield(v) {
				return
			}
		}
	}
}

func (m *Manager) soilAllLocked() {
	for _, g := range m.groups {
		m.soilLocked(g)
	}
}

// Replacing what hangs on a bad authority begins at once and is spread over a
// moment, so that the agents of a cluster do not meet at the authority. SVIDs
// that somebody has come first.
const (
	spreadUsed = 2 * time.Second
	spreadIdle = 30 * time.Second
)

// applyBundlesLocked takes new bundles into the books; what hangs on a tainted
// or revoked authority is replaced and served until its successor is there.
func (m *Manager) applyBundlesLocked(set *authority.BundleSet, now time.Time) {
	old := m.bundles
	m.bundles, m.bundled = set, true
	m.takeTrustLocked()
	m.soilAllLocked()
	signal(m.save)
	if len(set.TaintedJWT) > 0 && (old == nil || !maps.Equal(old.TaintedJWT, set.TaintedJWT)) {
		m.jwts.taint(set.TaintedJWT)
	}
	if old != nil && old.Own == set.Own && maps.Equal(old.TaintedX509, set.TaintedX509) {
		return
	}
	for _, r := range m.records {
		if r.svid == nil || r.resign && !r.refused || !m.outdatedLocked(r.svid) {
			continue
		}
		r.resign, r.refused = true, false
		called, _ := r.wanted()
		r.retryAt = now.Add(jitter(spreadUsed))
		if !called {
			r.retryAt = now.Add(jitter(spreadIdle))
		}
		m.considerLocked(r, now)
	}
}

// taintedLocked says whether any certificate of the chain was signed with a
// tainted key.
func (m *Manager) taintedLocked(s *X509SVID) bool {
	if m.bundles == nil || len(m.bundles.TaintedX509) == 0 {
		return false
	}
	for _, c := range s.Certificates {
		if len(c.AuthorityKeyId) > 0 && m.bundles.TaintedX509[hex.EncodeToString(c.AuthorityKeyId)] {
			return true
		}
	}
	return false
}

// followSubjects matches subjects anew whose selectors changed. It alone asks
// attached subjects for their selectors, so a later answer is never
// overwritten by an earlier one.
func (m *Manager) followSubjects(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.poke:
		}
		m.pokeMu.Lock()
		pokes := m.pokes
		m.pokes = nil
		m.pokeMu.Unlock()
		for _, v := range pokes {
			v.isPoked.Store(false)
			selectors := v.subject.Selectors()
			m.do(func(now time.Time) {
				if !v.attached {
					v.stale = true
					return
				}
				if !v.selectors.Equal(selectors) {
					v.selectors = selectors
					m.putLocked(v, m.matchLocked(selectors, v.group), now)
				}
			})
		}
	}
}

// pokeView is what a subject's Watch calls: from any goroutine, under any lock
// of the subject's, so it only leaves a note.
func (m *Manager) pokeView(v *view) {
	if v.isPoked.Swap(true) {
		return
	}
	m.pokeMu.Lock()
	m.pokes = append(m.pokes, v)
	m.pokeMu.Unlock()
	signal(m.poke)
}
