package svid

import (
	"context"
	"log/slog"
	"slices"
	"time"
)

// handOut is the only way an X.509-SVID leaves the package: it decides that
// the picture is still true, and records what the caller had not been handed
// before. Unchanged, it costs two loads and a look at the clock.
func (m *Manager) handOut(v *view) *Update {
	for {
		// handed before pic: whoever changes handed has seen a picture at
		// least as new.
		handed := v.handed.Load()
		pic := v.pic.Load()
		if pic.expired(m.now()) {
			m.do(func(now time.Time) {
				for _, r := range v.group.records {
					m.considerLocked(r, now)
				}
			})
			if v.pic.Load() == pic {
				// Nobody repaints the picture of a closed subscription.
				v.pic.CompareAndSwap(pic, pic.without(m.now()))
			}
			continue
		}
		if handed == pic {
			return pic.update
		}
		if v.handed.CompareAndSwap(handed, pic) {
			m.record(v, handed, pic)
			return pic.update
		}
	}
}

// record writes the audit record of each SVID that is in pic and was not in
// handed, and of each identity that was withdrawn.
func (m *Manager) record(v *view, handed, pic *picture) {
	var before []*Identity
	if handed != nil {
		before = handed.update.Identities
	}
	var caller []any
	write := func(i *Identity, outcome string) {
		if caller == nil {
			for _, a := range v.subject.LogAttrs() {
				caller = append(caller, a)
			}
		}
		m.audit.LogAttrs(context.Background(), slog.LevelInfo, "X.509-SVID decision",
			slog.Group("caller", caller...),
			slog.String("entry_id", i.Entry.ID),
			slog.String("spiffe_id", i.SVID.ID.String()),
			slog.String("serial", i.SVID.Serial),
			slog.Time("expires", i.SVID.NotAfter),
			slog.String("outcome", outcome),
		)
	}
	for _, i := range pic.update.Identities {
		if !slices.ContainsFunc(before, func(o *Identity) bool { return o.SVID == i.SVID }) {
			write(i, "granted")
		}
	}
	for _, i := range before {
		if !pic.update.knows(i.Entry.ID) {
			write(i, "withdrawn")
		}
	}
	m.tellAmbiguous(v, before, pic.update.Identities)
}

// tellAmbiguous reports a default identity that was left to chance, once for
// each pair.
func (m *Manager) tellAmbiguous(v *view, before, now []*Identity) {
	f := m.cfg.OnAmbiguous
	if f == nil || len(now) < 2 {
		return
	}
	a, b := now[0].Entry, now[1].Entry
	if a.SPIFFEID == b.SPIFFEID || !m.cfg.Order.Tied(a, b, m.cfg.DefaultHint) ||
		len(before) > 1 && before[0].Entry.ID == a.ID && before[1].Entry.ID == b.ID {
		return
	}
	m.guard(func() { f(v.subject, a, b) })
}
