package svid

import (
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// view is one subject's match, shared by its subscriptions. Without a subject
// it stands for a pod that was announced by Warm. Fields without a comment are
// guarded by Manager.mu.
type view struct {
	subject   attest.Subject // nil = warm; immutable
	selectors attest.Selectors
	group     *group
	place     int // in group.views
	subs      []*Subscription
	stop      func() // ends Subject.Watch; immutable once attached
	since     int64  // when the caller came, Unix nanoseconds; 0 once it has had an SVID
	alarm     timer  // ends a view without subscriptions
	pic       atomic.Pointer[picture]
	handed    atomic.Pointer[picture] // last picture that was handed out
	used      atomic.Int64            // last Snapshot or JWT, Unix nanoseconds; 0 = never
	attached  bool                    // in Manager.views
	stale     bool                    // selectors changed before it was attached
	isMoved   bool                    // in Manager.moved
	isPoked   atomic.Bool             // in Manager.pokes
}

// group is all views that match the same entries in the same order. Guarded by
// Manager.mu.
type group struct {
	key     string
	records []*record
	views   []*view
	callers int // views that are not warm
	pic     *picture
	isDirty bool
	// open says that identities are shown as they come. Until then the first
	// picture waits for all of them, so that nobody takes the second best for
	// the default identity because it was signed a millisecond earlier.
	open bool
	hold timer // ends the wait
}

// picture is an Update and the time from which it is wrong. Immutable.
type picture struct {
	update *Update
	until  time.Time // first NotAfter in it; zero = never
}

func (p *picture) expired(now time.Time) bool { return !p.until.IsZero() && !now.Before(p.until) }

// matchLocked is the entries a caller may have, the default identity first.
// Entries for secret stores are for those only, suspended ones for whoever has
// them; old is the group the caller was in, nil if it is new.
func (m *Manager) matchLocked(selectors attest.Selectors, old *group) []*entry.Entry {
	found := slices.DeleteFunc(m.set.Match(selectors), func(e *entry.Entry) bool {
		return e.StoreSVID || e.Suspended && !old.has(e.ID)
	})
	entry.Sort(found, m.cfg.Order, m.cfg.DefaultHint)
	return found
}

// putLocked puts a view into the group of its entries, which are sorted.
func (m *Manager) putLocked(v *view, entries []*entry.Entry, now time.Time) {
	key := groupKey(entries)
	old := v.group
	if old != nil && old.key == key {
		return
	}
	g := m.groups[key]
	if g == nil {
		g = &group{key: key, records: make([]*record, len(entries))}
		for i, e := range entries {
			g.records[i] = m.recordLocked(e)
			g.records[i].groups[g] = struct{}{}
		}
		if len(g.records) > 1 {
			m.setTimerLocked(&g.hold, g, now.Add(firstHold))
		}
		m.groups[key] = g
		m.soilLocked(g)
	}
	if pic := v.pic.Load(); pic != nil && len(pic.update.Identities) > 0 && !g.open {
		// A caller that has identities keeps them while a new one is signed,
		// in a new group and among others that wait.
		m.openLocked(g)
	}
	place := v.place
	v.group, v.place = g, len(g.views)
	g.views = append(g.views, v)
	if v.subject != nil {
		g.callers++
	}
	if !v.isMoved {
		v.isMoved = true
		m.moved = append(m.moved, v)
	}
	if len(g.views) == 1 || g.callers == 1 {
		for _, r := range g.records {
			m.considerLocked(r, now)
		}
	}
	if old != nil {
		m.leaveLocked(old, place, now)
	}
}

// leaveLocked takes the view at a place out of a group; an empty group is
// forgotten. A view that moves is in its new group by then, so that records in
// both are not let go in between.
func (m *Manager) leaveLocked(g *group, place int, now time.Time) {
	if g.views[place].subject != nil {
		g.callers--
	}
	last := len(g.views) - 1
	if place != last {
		g.views[place] = g.views[last]
		g.views[place].place = place
	}
	g.views[last] = nil
	g.views = g.views[:last]
	if len(g.views) > 0 && g.callers > 0 {
		return
	}
	if len(g.views) == 0 {
		delete(m.groups, g.key)
		m.setTimerLocked(&g.hold, g, unset)
		for _, r := range g.records {
			delete(r.groups, g)
		}
	}
	for _, r := range g.records {
		m.considerLocked(r, now)
	}
}

// has says whether an entry is among the group's.
func (g *group) has(id string) bool {
	return g != nil && slices.ContainsFunc(g.records, func(r *record) bool { return r.entry.ID == id })
}

// ring ends the wait for the first picture.
func (g *group) ring(m *Manager, _ time.Time) { m.openLocked(g) }

// openLocked has a group's identities shown as they come.
func (m *Manager) openLocked(g *group) {
	g.open = true
	m.setTimerLocked(&g.hold, g, unset)
	m.soilLocked(g)
}

// waitsLocked says whether the first picture still waits for a signature.
func (g *group) waitsLocked() bool {
	return !g.open && slices.ContainsFunc(g.records, func(r *record) bool {
		return r.shown == nil && r.failures == 0 && !r.refused
	})
}

func groupKey(entries []*entry.Entry) string {
	switch len(entries) {
	case 0:
		return ""
	case 1:
		return entries[0].ID
	}
	var b strings.Builder
	for _, e := range entries {
		b.WriteString(e.ID)
		b.WriteByte(0)
	}
	return b.String()
}
