package workloadapi

import (
	"cmp"
	"slices"

	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// beaten are the entries that must yield to another entry with the same hint:
// the oldest wins, then the smallest entry ID, as in SPIRE.
func beaten(entries []*entry.Entry) map[*entry.Entry]bool {
	best := make(map[string]*entry.Entry)
	var out map[*entry.Entry]bool
	for _, e := range entries {
		if e.Hint == "" {
			continue
		}
		loser := e
		if old, ok := best[e.Hint]; !ok {
			best[e.Hint] = e
			continue
		} else if older(e, old) {
			best[e.Hint], loser = e, old
		}
		if out == nil {
			out = make(map[*entry.Entry]bool)
		}
		out[loser] = true
	}
	return out
}

func older(a, b *entry.Entry) bool {
	return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), cmp.Compare(a.ID, b.ID)) < 0
}

// matched are all entries the caller matches, the default identity first.
// Those without an SVID at the moment count: which entry a hint belongs to
// must not change while one is renewed.
func matched(u *svid.Update) []*entry.Entry {
	out := make([]*entry.Entry, 0, len(u.Identities)+len(u.Late))
	for _, ident := range u.Identities {
		out = append(out, ident.Entry)
	}
	return append(out, u.Late...)
}

// unbeaten drops the beaten.
func unbeaten(entries []*entry.Entry) []*entry.Entry {
	lost := beaten(entries)
	return slices.DeleteFunc(entries, func(e *entry.Entry) bool { return lost[e] })
}
