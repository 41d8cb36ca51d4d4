package svid

import (
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
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

// work is where a record stands with the authority.
type work int8

const (
	resting work = iota
	queued
	signing
)

// rank says who is served first.
type rank int8

const (
	waiting rank = iota // a caller waits for the first SVID
	ahead               // a pod is coming, or an SVID must be replaced soon
	renewal
	ranks
)

// queue holds records per rank, first come first served. A record whose rank
// rises is in it twice; the one that is no longer queued is skipped.
type queue struct {
	lists [ranks][]*record
	busy  int // running workers
	slow  int // of them, those with a renewal
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
	if due && !r.refused && !now.Before(r.retryAt) {
		switch {
		case called && r.svid == nil:
			m.enqueueLocked(r, waiting)
		case r.svid == nil && len(m.idle) >= m.cfg.MaxIdle:
			// No room for SVIDs nobody has called for.
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
// go, those of expected pods last.
func (m *Manager) idleLocked(r *record, called bool) {
	if called || r.svid == nil {
		delete(m.idle, r)
		return
	}
	m.idle[r] = struct{}{}
	if len(m.idle) <= m.cfg.MaxIdle {
		return
	}
	victim := r
	for o := range m.idle {
		if len(o.groups) == 0 {
			victim = o
			break
		}
	}
	if len(victim.groups) == 0 {
		m.dropLocked(victim)
		return
	}
	m.eraseLocked(victim)
}

// ring is the alarm of a record.
func (r *record) ring(m *Manager, now time.Time) { m.considerLocked(r, now) }

func (m *Manager) eraseLocked(r *record) {
	r.svid, r.signed, r.resign = nil, nil, false
	delete(m.idle, r)
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

func (m *Manager) enqueueLocked(r *record, k rank) {
	if r.work == signing || r.work == queued && r.rank <= k {
		return
	}
	r.work, r.rank = queued, k
	m.queue.lists[k] = append(m.queue.lists[k], r)
}

// nextLocked takes the most urgent record from the queue, nil if there is none
// that may be worked on now.
func (m *Manager) nextLocked() *record {
	for k := range m.queue.lists {
		if rank(k) == renewal && m.queue.slow >= max(1, m.cfg.Workers*3/4) {
			return nil
		}
		list := m.queue.lists[k]
		for len(list) > 0 {
			r := list[0]
			list[0] = nil
			list = list[1:]
			if r.work == queued && r.rank == rank(k) {
				m.queue.lists[k] = list
				r.work = signing
				return r
			}
		}
		m.queue.lists[k] = nil
	}
	return nil
}

// pumpLocked gives queued records to free workers.
func (m *Manager) pumpLocked() {
	for m.ctx != nil && m.ctx.Err() == nil && m.queue.busy < m.cfg.Workers {
		r := m.nextLocked()
		if r == nil {
			return
		}
		m.queue.busy++
		if r.rank == renewal {
			m.queue.slow++
		}
		ctx, e, k := m.ctx, r.entry, r.rank
		m.workers.Go(func() {
			svid, err := m.sign(ctx, e)
			m.do(func(now time.Time) {
				m.queue.busy--
				if k == renewal {
					m.queue.slow--
				}
				if ctx.Err() == nil {
					m.signedLocked(r, e, svid, err, now)
				}
			})
		})
	}
}

// signedLocked takes the answer of the authority into the books.
func (m *Manager) signedLocked(r *record, e *entry.Entry, svid *X509SVID, err error, now time.Time) {
	r.work = resting
	if r.gone {
		return
	}
	if err == nil && !now.Before(svid.NotAfter) {
		err = fmt.Errorf("the authority returned an SVID that expired at %s; compare the clocks", svid.NotAfter)
	}
	kind := "first"
	if r.svid != nil {
		kind = "renewal"
	}
	m.met.count(kind, err)
	if !sameCertificate(e, r.entry) {
		// The entry changed meanwhile; what was signed is not it any more.
		m.considerLocked(r, now)
		return
	}
	failures := r.failures
	if err == nil {
		m.installLocked(r, svid, now)
		if m.taintedLocked(svid) {
			r.failures, err = failures, errStillTainted
		}
	}
	if err != nil {
		m.failedLocked(r, err, now)
	}
	m.considerLocked(r, now)
}

var errStillTainted = errors.New("the authority still signs with a tainted key")

func (m *Manager) installLocked(r *record, svid *X509SVID, now time.Time) {
	r.svid, r.signed = svid, r.entry
	r.renewAt = renewalTime(svid, now)
	r.resign, r.refused, r.failures, r.retryAt = false, false, 0, time.Time{}
	r.err, r.errAt = nil, time.Time{}
	delete(m.failing, r)
	m.showLocked(r)
	m.recoveredLocked(now)
}

// failedLocked notes a failure and when to try again.
func (m *Manager) failedLocked(r *record, err error, now time.Time) {
	r.err, r.errAt = err, now
	m.lastErr = err
	if r.refused = errors.Is(err, authority.ErrRefused); r.refused {
		delete(m.failing, r)
		m.log.Error("authority refused to sign; asked again when the entry changes", r.logAttrs(), slog.Any("error", err))
		return
	}
	pause := backoff(r.failures)
	r.failures++
	r.retryAt = now.Add(pause)
	if errors.Is(err, errStillTainted) {
		r.resign = true
	} else {
		m.failing[r] = struct{}{}
		if !m.lastFail.After(m.lastGood) {
			m.lastFail = now
		}
	}
	m.log.Warn("SVID was not signed", r.logAttrs(), slog.Int("failures", r.failures),
		slog.Duration("retry_in", pause), slog.Any("error", err))
}

// recoveredLocked follows the first good answer after an outage: whoever still
// sits out a pause from it need not.
func (m *Manager) recoveredLocked(now time.Time) {
	outage := m.lastFail.After(m.lastGood)
	m.lastGood = now
	m.met.lastGood.Set(float64(now.UnixNano()) / 1e9)
	if !outage {
		return
	}
	for r := range m.failing {
		delete(m.failing, r)
		if r.work == resting {
			r.retryAt = time.Time{}
			m.considerLocked(r, now)
		}
	}
}

// renewalTime draws when to renew an SVID received now: at half of the life it
// has left, give or take a tenth. SVIDs signed together are not renewed
// together. Counting from now and not from NotBefore keeps short-lived SVIDs,
// which are back-dated by more than they live, and an authority with another
// clock from making renewal a busy loop.
func renewalTime(svid *X509SVID, now time.Time) time.Time {
	left := svid.NotAfter.Sub(now)
	return now.Add(left*2/5 + rand.N(left/5+1))
}
