package entry

import (
	"cmp"
	"slices"

	"github.com/spiffe-node/spiffe-node/pkg/selector"
)

// nearBudget bounds how many entries Nearest looks at.
const nearBudget = 1 << 15

// Near is an entry that a caller almost matches.
type Near struct {
	Entry *Entry
	// Missing are the entry's selectors that the caller lacks, in order; at
	// least one.
	Missing []selector.Selector
}

// Nearest is up to n entries that share a selector with the caller but ask for
// more, those that lack the fewest first, then those that share the most, then
// the newest. It is for explanations: it looks at those indexed under the
// caller's selectors and then at the newest ones, 32,768 at most, and so may
// overlook an old one in a large set.
func (s *Set) Nearest(selectors selector.Set, n int) []Near {
	if n <= 0 {
		return nil
	}
	var best []candidate
	seen := make(map[int64]bool)
	budget := nearBudget
	look := func(it *item) bool {
		if budget == 0 {
			return false
		}
		budget--
		if seen[it.row] {
			return true
		}
		c := score(it, selectors)
		if c.missing == 0 || c.shared == 0 {
			return true
		}
		i, _ := slices.BinarySearchFunc(best, c, candidate.compare)
		if i == n {
			return true
		}
		seen[it.row] = true
		if len(best) == n {
			best = best[:n-1]
		}
		best = slices.Insert(best, i, c)
		return true
	}
	for sel := range selectors.All() {
		k := makeKey(hashSelector(s.lineage.seed, sel))
		l, _ := s.homes.Get(k[:])
		for it := range l.backward() {
			if !look(it) {
				break
			}
		}
	}
	for it := range s.rows.backward() {
		if !look(it) {
			break
		}
	}
	out := make([]Near, len(best))
	for i, c := range best {
		out[i].Entry = c.it.entry
		for sel := range c.it.entry.Selectors.All() {
			if !selectors.Contains(sel) {
				out[i].Missing = append(out[i].Missing, sel)
			}
		}
	}
	return out
}

// candidate is an entry with how far it is from the caller.
type candidate struct {
	it              *item
	missing, shared int
}

func score(it *item, selectors selector.Set) candidate {
	c := candidate{it: it}
	for sel := range it.entry.Selectors.All() {
		if selectors.Contains(sel) {
			c.shared++
		} else {
			c.missing++
		}
	}
	return c
}

func (c candidate) compare(o candidate) int {
	return cmp.Or(
		cmp.Compare(c.missing, o.missing),
		cmp.Compare(o.shared, c.shared),
		cmp.Compare(o.it.row, c.it.row),
	)
}
