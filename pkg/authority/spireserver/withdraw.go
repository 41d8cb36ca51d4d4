package spireserver

import (
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// absence is an entry the server has stopped listing.
type absence struct {
	since   time.Time // of the first complete answer without it
	answers int
}

// ledger decides what an answer of the server means for the set of entries. It
// is plain data: time comes from outside. Guarded by mu.
type ledger struct {
	mu      sync.Mutex
	confirm time.Duration // Config.WithdrawConfirm
	set     *entry.Set    // nil = nothing is known yet
	heard   bool          // the server was heard in this process
	missing map[string]absence
	denied  map[string]bool // the server refuses to sign for these
}

// apply takes a complete answer into the books. The result is the new set and
// what was withdrawn.
func (l *ledger) apply(answer *listing, now time.Time) (next *entry.Set, withdrawn []*entry.Entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.heard = true
	var removed []string
	var resumed []*entry.Entry // or suspended
	if l.set != nil {
		for e := range l.set.All() {
			if answer.listed[e.ID] {
				delete(l.missing, e.ID)
				delete(l.denied, e.ID)
				if e.Suspended {
					resumed = append(resumed, suspend(e, false))
				}
				continue
			}
			a, ok := l.missing[e.ID]
			if !ok {
				a.since = now
			}
			a.answers++
			if l.goneLocked(e.ID, a, now) {
				removed = append(removed, e.ID)
				withdrawn = append(withdrawn, e)
				delete(l.missing, e.ID)
				delete(l.denied, e.ID)
				continue
			}
			l.missing[e.ID] = a
			if !e.Suspended {
				resumed = append(resumed, suspend(e, true))
			}
		}
	}
	// What came in full comes last and counts.
	changed := slices.Concat(resumed, answer.full)
	if l.set == nil {
		l.set = entry.NewSet(changed...)
	} else {
		l.set = l.set.With(changed, removed)
	}
	return l.set, withdrawn
}

// suspend is a copy of an entry that is suspended, or is not.
func suspend(e *entry.Entry, yes bool) *entry.Entry {
	c := *e
	c.Suspended = yes
	return &c
}

// restore takes over what the process before knew. It is published with the
// server's first answer, so that what that answer lacks is missing, not
// forgotten.
func (l *ledger) restore(known []*entry.Entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.set = entry.NewSet(known...)
}

// known are all entries, for the state.
func (l *ledger) known() *entry.Set {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.set
}

// goneLocked says whether a missing entry is to be withdrawn.
func (l *ledger) goneLocked(id string, a absence, now time.Time) bool {
	return l.confirm == 0 || l.denied[id] ||
		a.answers >= 2 && now.Sub(a.since) >= max(l.confirm, confirmMin)
}

// edit applies changes that the server pushed, which are deliberate.
func (l *ledger) edit(changed []*entry.Entry, removed []string) (next *entry.Set, withdrawn []*entry.Entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, id := range removed {
		if e, ok := l.set.Get(id); ok {
			withdrawn = append(withdrawn, e)
		}
		delete(l.missing, id)
	}
	for _, e := range changed {
		delete(l.missing, e.ID)
	}
	l.set = l.set.With(changed, removed)
	return l.set, withdrawn
}

// replace takes the whole set as the server pushed it.
func (l *ledger) replace(all []*entry.Entry) (next *entry.Set, withdrawn []*entry.Entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	clear(l.missing)
	clear(l.denied)
	l.heard = true
	if l.set == nil {
		l.set = entry.NewSet(all...)
		return l.set, nil
	}
	there := make(map[string]bool, len(all))
	for _, e := range all {
		there[e.ID] = true
	}
	var removed []string
	for e := range l.set.All() {
		if !there[e.ID] {
			removed = append(removed, e.ID)
			withdrawn = append(withdrawn, e)
		}
	}
	l.set = l.set.With(all, removed)
	return l.set, withdrawn
}

// deny notes that the server refuses to sign for an entry; false if the set
// does not hold it.
func (l *ledger) deny(id string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.set == nil {
		return false
	}
	if _, ok := l.set.Get(id); !ok {
		return false
	}
	l.denied[id] = true
	return true
}

// get is the entry with an ID; heard is false while the server was not heard of,
// and then nothing can be said.
func (l *ledger) get(id string) (e *entry.Entry, isMissing, heard bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.set == nil {
		return nil, false, false
	}
	e, _ = l.set.Get(id)
	_, isMissing = l.missing[id]
	return e, isMissing, l.heard
}

// nextConfirm is when another answer could withdraw something; zero = never.
func (l *ledger) nextConfirm() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	var next time.Time
	for _, a := range l.missing {
		// Once a second: an entry that was deleted and made again is back soon.
		due := a.since.Add(time.Duration(a.answers) * confirmMin)
		if last := a.since.Add(max(l.confirm, confirmMin)); due.After(last) {
			due = last
		}
		if next.IsZero() || due.Before(next) {
			next = due
		}
	}
	return next
}

// ban withdraws what was missing already: the server means it.
func (l *ledger) ban() (next *entry.Set, withdrawn []*entry.Entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.set == nil || len(l.missing) == 0 {
		return nil, nil
	}
	var removed []string
	for id := range l.missing {
		if e, ok := l.set.Get(id); ok {
			withdrawn = append(withdrawn, e)
		}
		removed = append(removed, id)
	}
	clear(l.missing)
	l.set = l.set.With(nil, removed)
	return l.set, withdrawn
}

func (l *ledger) counts() (entries, missing int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.set == nil {
		return 0, 0
	}
	return l.set.Len(), len(l.missing)
}

// publish shows a new set to those who wait for it.
func (c *Client) publish(next *entry.Set, withdrawn []*entry.Entry) {
	for _, e := range withdrawn {
		c.log.Info("entry withdrawn: the server does not list it any more",
			slog.String("entry_id", e.ID), slog.String("spiffe_id", e.SPIFFEID.String()))
	}
	entries, missing := c.ledger.counts()
	c.met.entries.Set(float64(entries))
	c.met.missing.Set(float64(missing))
	c.report.edit(func(r *report) { r.s.Missing = missing })
	if next != nil && next != c.set.Get() {
		c.set.Set(next)
		c.stateChanged()
	}
}

// ban is told that the server has banned this agent.
func (c *Client) ban() {
	if next, withdrawn := c.ledger.ban(); next != nil {
		c.publish(next, withdrawn)
	}
}

// federatesWith are the foreign trust domains of a set's entries, sorted.
func (c *Client) federatesWith(set *entry.Set) []spiffeid.TrustDomain {
	seen := map[spiffeid.TrustDomain]bool{}
	for e := range set.All() {
		for _, td := range e.FederatesWith {
			if td != c.cfg.TrustDomain {
				seen[td] = true
			}
		}
	}
	out := make([]spiffeid.TrustDomain, 0, len(seen))
	for td := range seen {
		out = append(out, td)
	}
	slices.SortFunc(out, spiffeid.TrustDomain.Compare)
	return out
}
