package svid

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

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
	for m.launch != nil && m.queue.busy < m.cfg.Workers {
		r := m.nextLocked()
		if r == nil {
			return
		}
		m.launch(r)
	}
}

// launchLocked starts a worker for one record.
func (m *Manager) launchLocked(ctx context.Context, r *record) {
	e, slow := r.entry, r.rank == renewal
	m.queue.busy++
	if slow {
		m.queue.slow++
	}
	m.workers.Go(func() {
		svid, err := m.sign(ctx, e)
		m.do(func(now time.Time) {
			m.queue.busy--
			if slow {
				m.queue.slow--
			}
			if ctx.Err() == nil {
				m.signedLocked(r, e, svid, err, now)
			}
		})
	})
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
	r.renewAt = m.renewalTime(svid, now)
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
	for g := range r.groups {
		if !g.open {
			m.soilLocked(g) // its first picture waits for this no longer
		}
	}
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

// Where AvailabilityTarget decides, nodes do not renew together either, and a
// life that leaves less than availabilitySlack for renewing does not follow it.
const (
	availabilitySpread = 10 * time.Minute
	availabilitySlack  = 12 * time.Hour
)

// renewalTime draws when to renew an SVID received now.
func (m *Manager) renewalTime(svid *X509SVID, now time.Time) time.Time {
	at, ok := m.availableAt(svid)
	if !ok {
		return renewalTime(svid, now)
	}
	return at
}

// availableAt draws when AvailabilityTarget has an SVID renewed; false if it
// does not decide.
func (m *Manager) availableAt(svid *X509SVID) (time.Time, bool) {
	target := m.cfg.AvailabilityTarget
	if target == 0 {
		return time.Time{}, false
	}
	if life := svid.NotAfter.Sub(svid.NotBefore); life-target <= availabilitySlack {
		m.shortOnce.Do(func() {
			m.log.Warn("SVIDs do not live long enough for the availability target; they are renewed at half of their life",
				slog.String("spiffe_id", svid.ID.String()), slog.Duration("life", life),
				slog.Duration("availability_target", target), slog.Duration("life_needed", target+availabilitySlack))
		})
		return time.Time{}, false
	}
	return svid.NotAfter.Add(-target - jitter(availabilitySpread)), true
}

// renewalTime draws when to renew an SVID received now: at half of the life it
// has left, give or take a tenth. SVIDs signed together are not renewed
// together. Counting from now and not from NotBefore keeps short-lived SVIDs,
// which are back-dated by more than they live, and an authority with another
// clock from making renewal a busy loop.
func renewalTime(svid *X509SVID, now time.Time) time.Time {
	left := svid.NotAfter.Sub(now)
	return now.Add(left*2/5 + jitter(left/5))
}
