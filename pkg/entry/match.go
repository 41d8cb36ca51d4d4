package entry

import (
	"cmp"
	"slices"

	"github.com/spiffe-node/spiffe-node/pkg/selector"
)

// Match is the entries whose selectors are all among the caller's, in the
// order of their insertion. It looks only at entries whose home is one of the
// caller's selectors. Entries without selectors match nobody. Expired entries
// are not left out: deleting them is the registry's business.
func (s *Set) Match(selectors selector.Set) []*Entry {
	found := s.match(selectors)
	if len(found) == 0 {
		return nil
	}
	out := make([]*Entry, len(found))
	for i, it := range found {
		out[i] = it.entry
	}
	return out
}

func (s *Set) match(selectors selector.Set) []*item {
	var found []*item
	for sel := range selectors.All() {
		k := makeKey(hashSelector(s.lineage.seed, sel))
		l, ok := s.homes.Get(k[:])
		if !ok {
			continue
		}
		for _, c := range l.chunks {
			for _, it := range c {
				if it.entry.Selectors.SubsetOf(selectors) {
					found = append(found, it)
				}
			}
		}
	}
	slices.SortFunc(found, func(a, b *item) int { return cmp.Compare(a.row, b.row) })
	// Two selectors of one hash share a bucket, which was then seen twice.
	return slices.Compact(found)
}

// Matches says whether a caller with these selectors gets the entry: Match for
// one entry.
func (e *Entry) Matches(selectors selector.Set) bool {
	return e.Selectors.Len() > 0 && e.Selectors.SubsetOf(selectors)
}
