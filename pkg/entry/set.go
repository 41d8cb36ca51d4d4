package entry

import (
	"hash/maphash"
	"iter"
	"slices"

	iradix "github.com/hashicorp/go-immutable-radix/v2"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Set is an immutable, indexed snapshot of registration entries. With makes
// the next snapshot and shares with this one whatever did not change, so a
// change costs the same among ten entries and among a hundred thousand.
//
// Entries keep the order of their insertion; each has a row number that grows
// and is never reused. Safe for concurrent use.
type Set struct {
	lineage *lineage
	version uint64
	lastRow int64
	rows    *list
	ids     *iradix.Tree[*item]
	homes   *iradix.Tree[*list] // selector -> entries whose home it is
	parents *iradix.Tree[*list] // parent ID -> children
	names   *iradix.Tree[*list] // SPIFFE ID + parent and selectors -> entries
	log     changeLog
}

// lineage is what all sets made from one by With share. Versions can be
// compared only within a lineage.
type lineage struct {
	seed maphash.Seed
}

// NewSet builds a set of its own lineage, version 1, with rows counted from 1.
// Of several entries with one ID the last counts, in the row of the first.
func NewSet(entries ...*Entry) *Set {
	return Restore(func(yield func(int64, *Entry) bool) {
		for i, e := range entries {
			if !yield(int64(i)+1, e) {
				return
			}
		}
	})
}

// Restore is NewSet for entries that had rows before, so that page tokens
// survive a restart. Rows must be positive and differ; an entry whose row is
// taken or not positive gets a new one at the end.
func Restore(entries iter.Seq2[int64, *Entry]) *Set {
	empty := &Set{
		lineage: &lineage{seed: maphash.MakeSeed()},
		ids:     iradix.New[*item](),
		homes:   iradix.New[*list](),
		parents: iradix.New[*list](),
		names:   iradix.New[*list](),
	}
	x := empty.edit()
	var homeless []*Entry
	for row, e := range entries {
		if _, _, taken := x.rows.own(x.t).search(row); taken || row <= 0 {
			homeless = append(homeless, e)
			continue
		}
		x.put(e, row)
	}
	for _, e := range homeless {
		x.put(e, x.lastRow+1)
	}
	s := x.commit()
	s.version = 1
	s.log = changeLog{floor: 1}
	return s
}

// With is the set after changed entries were added or replaced (by ID) and
// those with the removed IDs taken out; removals come first. An entry equal to
// the one it replaces keeps the old pointer and is no change; without any
// change With returns s itself.
func (s *Set) With(changed []*Entry, removed []string) *Set {
	x := s.edit()
	rec := &record{version: s.version + 1}
	for _, id := range removed {
		if old := x.del(id); old != nil {
			rec.removed = append(rec.removed, old)
		}
	}
	for _, e := range changed {
		if x.put(e, x.lastRow+1) {
			rec.changed = append(rec.changed, e)
		}
	}
	if rec.len() == 0 {
		return s
	}
	out := x.commit()
	out.version = rec.version
	out.log = s.log.with(rec)
	return out
}

// Version grows by one with each With that changed something; it starts at 1.
func (s *Set) Version() uint64 { return s.version }

// Len is the number of entries.
func (s *Set) Len() int { return s.rows.len() }

// Get is the entry with an ID.
func (s *Set) Get(id string) (*Entry, bool) {
	it, ok := s.ids.Get([]byte(id))
	if !ok {
		return nil, false
	}
	return it.entry, true
}

// Row is the row of the entry with an ID.
func (s *Set) Row(id string) (int64, bool) {
	it, ok := s.ids.Get([]byte(id))
	if !ok {
		return 0, false
	}
	return it.row, true
}

// All yields the entries in the order of their insertion.
func (s *Set) All() iter.Seq[*Entry] { return entriesOf(s.rows.after(0)) }

// Rows is All with row numbers.
func (s *Set) Rows() iter.Seq2[int64, *Entry] {
	return func(yield func(int64, *Entry) bool) {
		for it := range s.rows.after(0) {
			if !yield(it.row, it.entry) {
				return
			}
		}
	}
}

// ByParent yields the entries with a parent ID, in order.
func (s *Set) ByParent(id spiffeid.ID) iter.Seq[*Entry] { return entriesOf(s.byParent(id, 0)) }

// BySPIFFEID yields the entries with a SPIFFE ID, in order.
func (s *Set) BySPIFFEID(id spiffeid.ID) iter.Seq[*Entry] { return entriesOf(s.bySPIFFEID(id, 0)) }

// Similar is the first entry with e's SPIFFE ID, parent and selectors: SPIRE
// Server refuses to create a second one. e itself is not excluded.
func (s *Set) Similar(e *Entry) (*Entry, bool) {
	l, _ := s.names.Get(nameKey(s.lineage.seed, e))
	for it := range l.after(0) {
		if o := it.entry; o.SPIFFEID == e.SPIFFEID && o.ParentID == e.ParentID && o.Selectors.Equal(e.Selectors) {
			return o, true
		}
	}
	return nil, false
}

func (s *Set) byParent(id spiffeid.ID, after int64) iter.Seq[*item] {
	return func(yield func(*item) bool) {
		k := makeKey(hashID(s.lineage.seed, id))
		l, _ := s.parents.Get(k[:])
		for it := range l.after(after) {
			if it.entry.ParentID == id && !yield(it) {
				return
			}
		}
	}
}

func (s *Set) bySPIFFEID(id spiffeid.ID, after int64) iter.Seq[*item] {
	return func(yield func(*item) bool) {
		k := makeKey(hashID(s.lineage.seed, id))
		var found []*item
		it := s.names.Root().Iterator()
		it.SeekPrefix(k[:])
		for _, l, ok := it.Next(); ok; _, l, ok = it.Next() {
			for it := range l.after(after) {
				if it.entry.SPIFFEID == id {
					found = append(found, it)
				}
			}
		}
		slices.SortFunc(found, func(a, b *item) int { return compareRow(a, b.row) })
		for _, it := range found {
			if !yield(it) {
				return
			}
		}
	}
}

// hasChildren says whether id is some entry's parent.
func (s *Set) hasChildren(id spiffeid.ID) bool {
	for range s.byParent(id, 0) {
		return true
	}
	return false
}

func entriesOf(items iter.Seq[*item]) iter.Seq[*Entry] {
	return func(yield func(*Entry) bool) {
		for it := range items {
			if !yield(it.entry) {
				return
			}
		}
	}
}
