package svid

import (
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

// unset is the zero time.
var unset time.Time

// errNoSubject: a caller without an identity of its own in this process.
var errNoSubject = errors.New("svid: subject is missing")

// Subscription is one stream's hold on what its caller may have. Safe for
// concurrent use.
type Subscription struct {
	m      *Manager
	view   *view
	notify func()
	closed atomic.Bool
	queued bool     // in Manager.pending; guarded by Manager.mu
	parked *parking // nil = not parked; guarded by Manager.mu
}

// parking is one caller that waits for something late.
type parking struct {
	sub   *Subscription
	what  string
	since time.Time
	key   string
	alarm timer
}

// Subscribe registers a stream of a caller. It never waits: Update answers at
// once, and what is late comes with a later notify. notify is called after
// Update may have changed, never beside itself, and must not block; it may
// come before Subscribe has returned, and after Close once more if it was under
// way. Subscriptions of one subject, the same pointer, share one match.
func (m *Manager) Subscribe(s attest.Subject, notify func()) (*Subscription, error) {
	if s == nil {
		return nil, errNoSubject
	}
	sub := &Subscription{m: m, notify: notify}
	m.attach(s, sub)
	return sub, nil
}

// Snapshot is what a caller may have now, without a subscription. It is cheap
// when the subject has subscriptions or was seen a moment ago. What it hands
// out is audited as with Update.
func (m *Manager) Snapshot(s attest.Subject) (*Update, error) {
	if s == nil {
		return nil, errNoSubject
	}
	return m.handOut(m.attach(s, nil)), nil
}

// attach finds or makes the view of a subject, and adds a subscription or
// notes that the view was used.
func (m *Manager) attach(s attest.Subject, sub *Subscription) *view {
	m.mu.Lock()
	v := m.views[s]
	if v != nil {
		m.useLocked(v, sub)
	}
	m.mu.Unlock()
	if v != nil {
		return v
	}
	// Watch and Selectors are the subject's code and run outside the lock.
	// Watching comes first: a change after Selectors is then not missed.
	fresh := &view{subject: s}
	fresh.stop = s.Watch(func() { m.pokeView(fresh) })
	fresh.selectors = s.Selectors()
	m.do(func(now time.Time) {
		if v = m.views[s]; v != nil {
			m.calls = append(m.calls, fresh.stop)
		} else {
			v = fresh
			v.since = now.UnixNano()
			v.attached = true
			m.views[s] = v
			m.putLocked(v, m.matchLocked(v.selectors, nil), now)
			if v.stale {
				m.pokeView(v)
			}
		}
		m.useLocked(v, sub)
	})
	return v
}

func (m *Manager) useLocked(v *view, sub *Subscription) {
	if sub != nil {
		sub.view = v
		v.subs = append(v.subs, sub)
		return
	}
	now := m.now()
	v.used.Store(now.UnixNano())
	if v.alarm.index == 0 {
		m.setTimerLocked(&v.alarm, v, now.Add(m.lingers()))
	}
}

// lingers is how long a view without subscriptions stays: never shorter than a
// call for a JWT-SVID.
func (m *Manager) lingers() time.Duration { return m.cfg.JWTTimeout + linger }

// ring ends a view without subscriptions after it lingered.
func (v *view) ring(m *Manager, now time.Time) {
	if v.subject == nil {
		m.endLocked(v, now)
		return
	}
	if until := time.Unix(0, v.used.Load()).Add(m.lingers()); until.After(now) {
		m.setTimerLocked(&v.alarm, v, until)
		return
	}
	if len(v.subs) == 0 {
		m.endLocked(v, now)
	}
}

func (m *Manager) endLocked(v *view, now time.Time) {
	if !v.attached {
		return
	}
	v.attached = false
	m.setTimerLocked(&v.alarm, v, unset)
	if v.subject == nil {
		delete(m.warm, v.selectors.Key())
	} else {
		delete(m.views, v.subject)
		m.calls = append(m.calls, v.stop)
	}
	m.leaveLocked(v.group, v.place, now)
}

// Update is the newest picture of what the caller may have. SVIDs the caller
// has not been handed before are written to the audit log. The Update is
// shared and must not be modified. After Close it is the last one.
func (s *Subscription) Update() *Update { return s.m.handOut(s.view) }

// Close ends the subscription. It may be called more than once.
func (s *Subscription) Close() {
	if s.closed.Swap(true) {
		return
	}
	s.m.do(func(now time.Time) {
		s.m.unparkLocked(s)
		v := s.view
		if i := slices.Index(v.subs, s); i >= 0 {
			v.subs = slices.Delete(v.subs, i, i+1)
		}
		if len(v.subs) == 0 && v.alarm.index == 0 {
			s.m.endLocked(v, now)
		}
	})
}

// Park says that the caller now waits for something late, a resource name or
// the like. ErrOverLimit if too many callers of its pod wait already. Parking
// again only changes what is waited for.
func (s *Subscription) Park(what string) error {
	began, err := s.park(what)
	if f := s.m.cfg.OnPark; f != nil && began {
		s.m.guard(f)
	}
	return err
}

// park is Park; began says that the caller did not wait before.
func (s *Subscription) park(what string) (began bool, err error) {
	m, key := s.m, s.view.subject.LimitKey()
	m.mu.Lock()
	defer m.mu.Unlock()
	if s.closed.Load() {
		return false, nil
	}
	if s.parked != nil {
		s.parked.what = what
		return false, nil
	}
	if n := m.parked[key]; n >= m.cfg.MaxParked {
		m.met.overLimit.Inc()
		return false, fmt.Errorf("%w: %d callers of %s wait already; raise the limit of parked callers or find out what they wait for", ErrOverLimit, n, key)
	}
	m.parked[key]++
	m.met.parked.Inc()
	now := m.now()
	s.parked = &parking{sub: s, what: what, since: now, key: key}
	m.setTimerLocked(&s.parked.alarm, s.parked, now.Add(m.cfg.LateAfter))
	return true, nil
}

// Unpark says that the caller waits no longer.
func (s *Subscription) Unpark() {
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	s.m.unparkLocked(s)
}

func (m *Manager) unparkLocked(s *Subscription) {
	p := s.parked
	if p == nil {
		return
	}
	s.parked = nil
	m.setTimerLocked(&p.alarm, p, unset)
	m.met.parked.Dec()
	if m.parked[p.key]--; m.parked[p.key] == 0 {
		delete(m.parked, p.key)
	}
}

// ring tells of a caller that has waited for long.
func (p *parking) ring(m *Manager, _ time.Time) {
	m.met.late.Inc()
	if f := m.cfg.OnLate; f != nil {
		subject, what, since := p.sub.view.subject, p.what, p.since
		m.calls = append(m.calls, func() { f(subject, what, since) })
	}
}

// Warm has the SVIDs signed that a pod with these selectors may get, before it
// asks; entries that appear a little later are included. It does not wait.
func (m *Manager) Warm(selectors attest.Selectors) {
	if selectors.Len() == 0 {
		return
	}
	m.do(func(now time.Time) {
		key := selectors.Key()
		v := m.warm[key]
		if v == nil {
			for _, o := range m.warm {
				if len(m.warm) < maxWarm {
					break
				}
				m.endLocked(o, now)
			}
			v = &view{selectors: selectors, attached: true}
			m.warm[key] = v
			m.putLocked(v, m.matchLocked(selectors, nil), now)
		}
		m.setTimerLocked(&v.alarm, v, now.Add(m.cfg.WarmFor))
	})
}
