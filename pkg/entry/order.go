package entry

import (
	"cmp"
	"slices"
	"strings"
)

// Order decides which of several matched entries is a caller's default
// identity.
type Order int

const (
	// OrderNode is ours: entries that are not a fallback first, then those with the
	// most selectors, the oldest, the smallest ID.
	OrderNode Order = iota
	// OrderSPIRE is SPIRE Agent's: the smallest entry ID.
	OrderSPIRE
)

// String is the name the configuration uses.
func (o Order) String() string {
	if o == OrderSPIRE {
		return "spire"
	}
	return "node"
}

// Compare is negative if a comes before b. With a hint, entries that carry it
// come first in either order.
func (o Order) Compare(a, b *Entry, hint string) int {
	if hint != "" {
		if c := compareBool(b.Hint == hint, a.Hint == hint); c != 0 {
			return c
		}
	}
	if o == OrderSPIRE {
		return strings.Compare(a.ID, b.ID)
	}
	return cmp.Or(
		compareBool(a.Fallback, b.Fallback),
		cmp.Compare(b.Selectors.Len(), a.Selectors.Len()),
		a.CreatedAt.Compare(b.CreatedAt),
		strings.Compare(a.ID, b.ID),
	)
}

// Tied says that only age, or the ID, decides which of the two comes first: the
// order was not meant by whoever wrote them. OrderSPIRE goes by the ID alone,
// which who chose it knows.
func (o Order) Tied(a, b *Entry, hint string) bool {
	return o == OrderNode &&
		(hint == "" || (a.Hint == hint) == (b.Hint == hint)) &&
		a.Fallback == b.Fallback && a.Selectors.Len() == b.Selectors.Len()
}

// Sort orders entries in place, the default identity first.
func Sort(entries []*Entry, order Order, hint string) {
	slices.SortFunc(entries, func(a, b *Entry) int { return order.Compare(a, b, hint) })
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}
