package entry

import (
	"iter"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/selector"
)

// MatchMode says how an entry's selectors, or federated trust domains, must
// relate to the given ones. The numbers are the wire's.
type MatchMode int

// The match modes.
const (
	MatchExact    MatchMode = iota // the same set
	MatchSubset                    // not empty, and all among the given
	MatchSuperset                  // all the given, and perhaps more
	MatchAny                       // at least one of the given
)

// Filter selects entries for a listing. The zero filter selects all; fields
// that are set must all hold.
type Filter struct {
	ParentID       spiffeid.ID // zero = any
	SPIFFEID       spiffeid.ID // zero = any
	Hint           string      // "" = any
	DownstreamOnly bool
	Selectors      *SelectorFilter   // nil = any
	FederatesWith  *FederationFilter // nil = any
}

// SelectorFilter compares an entry's selectors with given ones.
type SelectorFilter struct {
	Selectors selector.Set
	Mode      MatchMode
}

// FederationFilter compares an entry's federated trust domains with given ones.
type FederationFilter struct {
	TrustDomains []spiffeid.TrustDomain
	Mode         MatchMode
}

// Keep says whether the filter selects e.
func (f *Filter) Keep(e *Entry) bool {
	switch {
	case !f.ParentID.IsZero() && e.ParentID != f.ParentID,
		!f.SPIFFEID.IsZero() && e.SPIFFEID != f.SPIFFEID,
		f.Hint != "" && e.Hint != f.Hint,
		f.DownstreamOnly && !e.Downstream,
		f.Selectors != nil && !f.Selectors.keep(e.Selectors),
		f.FederatesWith != nil && !f.FederatesWith.keep(e.FederatesWith):
		return false
	}
	return true
}

func (f *SelectorFilter) keep(s selector.Set) bool {
	switch f.Mode {
	case MatchExact:
		return s.Equal(f.Selectors)
	case MatchSubset:
		return s.Len() > 0 && s.SubsetOf(f.Selectors)
	case MatchSuperset:
		return f.Selectors.SubsetOf(s)
	case MatchAny:
		for sel := range f.Selectors.All() {
			if s.Contains(sel) {
				return true
			}
		}
	}
	return false
}

func (f *FederationFilter) keep(tds []spiffeid.TrustDomain) bool {
	switch f.Mode {
	case MatchExact:
		return sameSet(tds, f.TrustDomains)
	case MatchSubset:
		return len(tds) > 0 && within(tds, f.TrustDomains)
	case MatchSuperset:
		return within(f.TrustDomains, tds)
	case MatchAny:
		return slices.ContainsFunc(f.TrustDomains, func(td spiffeid.TrustDomain) bool {
			return slices.Contains(tds, td)
		})
	}
	return false
}

// After is the first entries beyond a row, at most limit of them, and the row
// of the last one (row itself if there is none). 0 is before the first row; a
// limit of 0 or less means no limit. Rows are page tokens: entries that come or go
// between two pages neither repeat nor hide others.
func (s *Set) After(row int64, limit int) (entries []*Entry, last int64) {
	return s.List(Filter{}, row, limit)
}

// List is After for the entries a filter selects. Filters for parent, SPIFFE
// ID or selectors use the indices.
func (s *Set) List(f Filter, row int64, limit int) (entries []*Entry, last int64) {
	last = row
	for it := range s.candidates(f, row) {
		if !f.Keep(it.entry) {
			continue
		}
		entries, last = append(entries, it.entry), it.row
		if limit > 0 && len(entries) == limit {
			break
		}
	}
	return entries, last
}

// Count is the number of entries a filter selects.
func (s *Set) Count(f Filter) int {
	if f == (Filter{}) {
		return s.Len()
	}
	n := 0
	for it := range s.candidates(f, 0) {
		if f.Keep(it.entry) {
			n++
		}
	}
	return n
}

// candidates yields in row order at least the entries f selects.
func (s *Set) candidates(f Filter, row int64) iter.Seq[*item] {
	switch {
	case !f.SPIFFEID.IsZero():
		return s.bySPIFFEID(f.SPIFFEID, row)
	case f.Selectors != nil && f.Selectors.Selectors.Len() > 0 &&
		(f.Selectors.Mode == MatchExact || f.Selectors.Mode == MatchSubset):
		return func(yield func(*item) bool) {
			for _, it := range s.match(f.Selectors.Selectors) {
				if it.row > row && !yield(it) {
					return
				}
			}
		}
	case !f.ParentID.IsZero():
		return s.byParent(f.ParentID, row)
	}
	return s.rows.after(row)
}

// Expired is the entries whose time has passed at now, in row order. It looks
// at all entries.
func (s *Set) Expired(now time.Time) []*Entry {
	var out []*Entry
	for e := range s.All() {
		if e.Expired(now) {
			out = append(out, e)
		}
	}
	return out
}
