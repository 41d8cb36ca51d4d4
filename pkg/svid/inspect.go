package svid

import (
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// Inspection is what an administrator may see of one caller. It holds no key.
type Inspection struct {
	Selectors attest.Selectors
	Synced    bool
	Entries   []EntryStatus // the default identity first
	Waiting   []Waiting
}

// EntryStatus is how one matched entry stands. Times are zero and Serial is
// empty without an SVID.
type EntryStatus struct {
	Entry       *entry.Entry
	Serial      string
	NotBefore   time.Time
	NotAfter    time.Time
	NextRenewal time.Time
	NextTry     time.Time // after a failure
	Failures    int       // in a row
	Refused     bool      // not asked for again until the entry changes
	LastError   string
	LastErrorAt time.Time
}

// Waiting is one parked stream.
type Waiting struct {
	What  string
	Since time.Time
}

// Status is how the Manager stands as a whole.
type Status struct {
	Synced      bool      // entries and bundles were heard of in this process
	Entries     int       // in the set
	Callers     int       // connections with a match
	Streams     int       // subscriptions
	Parked      int       // of them, waiting for something late
	SVIDs       int       // held, in use or not
	Unsigned    int       // wanted entries without an SVID
	FirstExpiry time.Time // of an SVID in use; zero = none
	LastGood    time.Time // last signature of the authority; zero = none
	LastFailure time.Time // first failure since LastGood or before it
	LastError   string
}

// Entries is the set of entries the Manager works with. Until the source has
// answered it holds what the restart state had.
func (m *Manager) Entries() *entry.Set {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.set
}

// Inspect says how a caller stands; false if the Manager does not know it.
func (m *Manager) Inspect(s attest.Subject) (Inspection, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	v := m.views[s]
	if v == nil {
		return Inspection{}, false
	}
	out := Inspection{Selectors: v.selectors, Synced: m.heard && m.bundled}
	for _, r := range v.group.records {
		st := EntryStatus{Entry: r.entry, Failures: r.failures, Refused: r.refused, LastErrorAt: r.errAt, NextTry: r.retryAt}
		if r.svid != nil {
			st.Serial, st.NotBefore, st.NotAfter, st.NextRenewal = r.svid.Serial, r.svid.NotBefore, r.svid.NotAfter, r.renewAt
		}
		if r.err != nil {
			st.LastError = r.err.Error()
		}
		out.Entries = append(out.Entries, st)
	}
	for _, sub := range v.subs {
		if p := sub.parked; p != nil {
			out.Waiting = append(out.Waiting, Waiting{What: p.what, Since: p.since})
		}
	}
	return out, true
}

// Status says how the Manager stands.
func (m *Manager) Status() Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	st := Status{
		Synced:      m.heard && m.bundled,
		Entries:     m.set.Len(),
		Callers:     len(m.views),
		FirstExpiry: m.firstExpiryLocked(),
		LastGood:    m.lastGood,
		LastFailure: m.lastFail,
	}
	for _, v := range m.views {
		st.Streams += len(v.subs)
	}
	for _, n := range m.parked {
		st.Parked += n
	}
	for _, r := range m.records {
		if r.svid != nil {
			st.SVIDs++
		} else if called, _ := r.wanted(); called {
			st.Unsigned++
		}
	}
	if m.lastErr != nil {
		st.LastError = m.lastErr.Error()
	}
	return st
}

func (m *Manager) firstExpiryLocked() time.Time {
	var first time.Time
	for _, r := range m.records {
		if r.svid == nil || len(r.groups) == 0 {
			continue
		}
		if first.IsZero() || r.svid.NotAfter.Before(first) {
			first = r.svid.NotAfter
		}
	}
	return first
}
