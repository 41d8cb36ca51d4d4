package svid

import (
	"log/slog"
	"slices"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// record is what the node holds for one entry: at most one SVID and how the
// next one is coming along. Guarded by Manager.mu.
type record struct {
	entry  *entry.Entry
	groups map[*group]struct{} // who may have it

	svid    *X509SVID    // nil = none
	signed  *entry.Entry // the entry svid was signed for
	shown   *Identity    // svid as callers see it
	renewAt time.Time    // drawn once per SVID
	resign  bool         // replace svid before renewAt

	work     work
	rank     rank // while queued
	failures int  // in a row
	retryAt  time.Time
	refused  bool // not asked for again until the entry changes
	err      error
	errAt    time.Time

	gone  bool // withdrawn or dropped; only a late answer still knows it
	alarm timer
}

func (r *record) logAttrs() slog.Attr {
	return slog.Group("entry", slog.String("id", r.entry.ID), slog.String("spiffe_id", r.entry.SPIFFEID.String()))
}

// wanted says whether a caller has the entry, or a pod that is expected.
func (r *record) wanted() (called, expected bool) {
	for g := range r.groups {
		if g.callers > 0 {
			return true, true
		}
	}
	return false, len(r.groups) > 0 && !r.entry.DisableX509SVIDPrefetch
}

// sameCertificate says whether a certificate signed for a would be signed
// alike for b.
func sameCertificate(a, b *entry.Entry) bool {
	return a == b || a.SPIFFEID == b.SPIFFEID && a.X509SVIDTTL == b.X509SVIDTTL && slices.Equal(a.DNSNames, b.DNSNames)
}

// recordLocked is the record of an entry, made if there is none.
func (m *Manager) recordLocked(e *entry.Entry) *record {
	r := m.records[e.ID]
	if r == nil {
		r = &record{entry: e, groups: make(map[*group]struct{}, 1)}
		m.records[e.ID] = r
	}
	return r
}

// updateLocked gives a record the new form of its entry.
func (m *Manager) updateLocked(r *record, e *entry.Entry, now time.Time) {
	r.entry = e
	r.refused, r.failures, r.retryAt = false, 0, time.Time{}
	if r.svid != nil && !sameCertificate(r.signed, e) {
		r.resign = true
	}
	m.showLocked(r)
	m.considerLocked(r, now)
}

// showLocked renews what callers see of a record and marks their groups. An
// SVID of another SPIFFE ID than the entry's stays with the entry it was
// signed for until its successor is there.
func (m *Manager) showLocked(r *record) {
	r.shown = nil
	if r.svid != nil {
		e := r.entry
		if e.SPIFFEID != r.svid.ID {
			e = r.signed
		}
		r.shown = &Identity{Entry: e, SVID: r.svid}
	}
	for g := range r.groups {
		m.soilLocked(g)
	}
	signal(m.save)
}

// considerLocked looks at one record: expired SVIDs are erased, what is due is
// queued, what nobody needs is let go, and the alarm is set for the next look.
func (m *Manager) considerLocked(r *record, now time.Time) {
	if r.gone {
		return
	}
	called, expected := r.wanted()
	if r.svid != nil && !now.Before(r.svid.NotAfter) {
		if called || expected {
			m.log.Warn("SVID expired before it could be renewed", r.logAttrs(),
				slog.Time("expired", r.svid.NotAfter), slog.Any("error", r.err))
			m.met.expired.Inc()
		}
		m.eraseLocked(r)
	}
	m.idleLocked(r, called)
	if r.gone {
		return
	}
	if !called && !expected {
		m.restLocked(r)
		return
	}
	due := r.svid == nil || r.resign || !now.Before(r.renewAt)
	if due && !r.refused && !r.entry.Suspended && !now.Before(r.retryAt) {
		switch {
		case called && r.svid == nil:
			m.enqueueLocked(r, waiting)
		case r.svid == nil && !m.roomLocked():
			// Too many SVIDs that nobody has called for: this one waits for
			// its caller.
		case r.svid == nil || r.resign:
			m.enqueueLocked(r, ahead)
		default:
			m.enqueueLocked(r, renewal)
		}
	}
	var next time.Time
	if r.svid != nil {
		next = r.svid.NotAfter
	}
	if r.work == resting && !r.refused {
		try := r.retryAt
		if !due && r.renewAt.After(try) {
			try = r.renewAt
		}
		if try.After(now) && (next.IsZero() || try.Before(next)) {
			next = try
		}
	}
	m.setTimerLocked(&r.alarm, r, next)
}

// restLocked is for a record nobody needs: a valid SVID is kept for those who
// come back, without being renewed.
func (m *Manager) restLocked(r *record) {
	if r.work == queued {
		r.work = resting
	}
	if r.work == resting && len(r.groups) == 0 && (r.svid == nil || r.resign) {
		m.dropLocked(r)
		return
	}
	var end time.Time
	if r.svid != nil {
		end = r.svid.NotAfter
	}
	m.setTimerLocked(&r.alarm, r, end)
}

// idleLocked counts SVIDs no caller has. When they are too many, some are let
// go: those that have been idle longest first, those of expected pods last.
func (m *Manager) idleLocked(r *record, called bool) {
	if called || r.svid == nil {
		m.idle.remove(r)
		return
	}
	m.idle.add(r)
	if m.idle.len() <= m.cfg.MaxIdle {
		return
	}
	if o := m.idle.oldest(func(o *record) bool { return len(o.groups) == 0 }); o != nil {
		m.dropLocked(o)
		return
	}
	m.eraseLocked(r)
}

// roomLocked says whether one more SVID may be signed before its caller comes;
// if need be, one is let go whose pod has left.
func (m *Manager) roomLocked() bool {
	if m.idle.len() < m.cfg.MaxIdle {
		return true
	}
	o := m.idle.oldest(func(o *record) bool { return len(o.groups) == 0 && o.work == resting })
	if o == nil {
		return false
	}
	m.dropLocked(o)
	return true
}

// ring is the alarm of a record.
func (r *record) ring(m *Manager, now time.Time) { m.considerLocked(r, now) }

func (m *Manager) eraseLocked(r *record) {
	r.svid, r.signed, r.resign = nil, nil, false
	m.idle.remove(r)
	m.showLocked(r)
}

// dropLocked forgets a record and its key.
func (m *Manager) dropLocked(r *record) {
	m.eraseLocked(r)
	r.gone = true
	r.work = resting
	m.setTimerLocked(&r.alarm, r, time.Time{})
	delete(m.failing, r)
	if m.records[r.entry.ID] == r {
		delete(m.records, r.entry.ID)
	}
}

// withdrawLocked takes an identity away for good, at once. Every withdrawal
// passes here, and only those the source of entries means: the caller decides
// whether an entry that is missing was deleted.
func (m *Manager) withdrawLocked(r *record) {
	m.log.Info("identity withdrawn", r.logAttrs())
	m.jwts.forget(r.entry.ID)
	m.dropLocked(r)
	m.state.hurry()
}
