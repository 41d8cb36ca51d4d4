package svid

import (
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// soilLocked marks a group whose picture may have changed.
func (m *Manager) soilLocked(g *group) {
	if !g.isDirty {
		g.isDirty = true
		m.dirty = append(m.dirty, g)
	}
}

// settleLocked ends a change of the books: pictures are repainted, views get
// them, and free workers get what was queued.
func (m *Manager) settleLocked() {
	m.pumpLocked()
	for _, g := range m.dirty {
		g.isDirty = false
		if len(g.views) == 0 {
			continue
		}
		pic := m.paintLocked(g)
		if pic == g.pic {
			continue
		}
		g.pic = pic
		for _, v := range g.views {
			m.publishLocked(v)
		}
	}
	for _, v := range m.moved {
		v.isMoved = false
		m.publishLocked(v)
	}
	clear(m.dirty)
	clear(m.moved)
	m.dirty, m.moved = m.dirty[:0], m.moved[:0]
}

// publishLocked gives a view its group's picture and queues its subscriptions
// for a notification if there is something to see.
func (m *Manager) publishLocked(v *view) {
	pic, old := v.group.pic, v.pic.Load()
	if pic == old {
		return
	}
	v.pic.Store(pic)
	if v.since != 0 && len(pic.update.Identities) > 0 {
		m.met.firstSVID.Observe(max(0, m.now().Sub(time.Unix(0, v.since))).Seconds())
		v.since = 0
	}
	if old == nil || !news(old.update, pic.update) {
		return
	}
	for _, s := range v.subs {
		if !s.queued {
			s.queued = true
			m.pending = append(m.pending, s)
		}
	}
}

// paintLocked is a group's picture now: the one it has if nothing changed.
func (m *Manager) paintLocked(g *group) *picture {
	u := &Update{Synced: m.heard && m.bundled}
	p := &picture{update: u}
	waits := g.waitsLocked()
	for _, r := range g.records {
		if r.shown == nil || waits {
			u.Late = append(u.Late, r.entry)
		} else {
			u.Identities = append(u.Identities, r.shown)
			if end := r.svid.NotAfter; p.until.IsZero() || end.Before(p.until) {
				p.until = end
			}
		}
		if m.bundles == nil {
			continue
		}
		for _, td := range r.entry.FederatesWith {
			if b := m.bundles.Federated[td]; b != nil {
				if u.Federated == nil {
					u.Federated = make(map[spiffeid.TrustDomain]*spiffebundle.Bundle)
				}
				u.Federated[td] = b
			}
		}
	}
	if m.bundles != nil {
		u.Own = m.bundles.Own
		u.Roots, u.Keys = m.trust.Load().current()
	}
	if len(u.Identities) > 0 && !g.open {
		g.open = true
		m.setTimerLocked(&g.hold, g, unset)
	}
	if g.pic != nil && same(g.pic.update, u) {
		return g.pic
	}
	return p
}

// same says whether two pictures are interchangeable.
func same(a, b *Update) bool {
	return a.Synced == b.Synced && a.Own == b.Own &&
		maps.Equal(a.Federated, b.Federated) &&
		slices.Equal(a.Identities, b.Identities) &&
		slices.Equal(a.Late, b.Late)
}

// news says whether a caller that has a must be told of b. An entry that is
// merely on its way is no news: its SVID will be.
func news(a, b *Update) bool {
	return a.Synced != b.Synced || a.Own != b.Own ||
		!maps.Equal(a.Federated, b.Federated) ||
		!slices.EqualFunc(a.Identities, b.Identities, looksAlike) ||
		slices.ContainsFunc(a.Late, func(e *entry.Entry) bool { return !b.knows(e.ID) })
}

// looksAlike compares what of an identity can be sent to a caller.
func looksAlike(a, b *Identity) bool {
	return a == b || a.SVID == b.SVID &&
		a.Entry.ID == b.Entry.ID && a.Entry.SPIFFEID == b.Entry.SPIFFEID && a.Entry.Hint == b.Entry.Hint
}

// knows says whether an entry is among the identities, ready or late.
func (u *Update) knows(id string) bool {
	return slices.ContainsFunc(u.Identities, func(i *Identity) bool { return i.Entry.ID == id }) ||
		slices.ContainsFunc(u.Late, func(e *entry.Entry) bool { return e.ID == id })
}

// without is the picture less what has expired at now.
func (p *picture) without(now time.Time) *picture {
	u := *p.update
	out := &picture{update: &u}
	u.Identities = nil
	for _, i := range p.update.Identities {
		end := i.SVID.NotAfter
		if !now.Before(end) {
			u.Late = append(slices.Clip(u.Late), i.Entry)
			continue
		}
		u.Identities = append(u.Identities, i)
		if out.until.IsZero() || end.Before(out.until) {
			out.until = end
		}
	}
	return out
}
