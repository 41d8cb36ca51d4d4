package entry

import (
	iradix "github.com/hashicorp/go-immutable-radix/v2"

	"github.com/spiffe-node/spiffe-node/pkg/selector"
)

// edit is one transaction from a set to the next. Not safe for concurrent use.
type edit struct {
	t       *token
	lineage *lineage
	lastRow int64
	rows    *list
	ids     *iradix.Txn[*item]
	homes   *iradix.Txn[*list]
	parents *iradix.Txn[*list]
	names   *iradix.Txn[*list]
}

func (s *Set) edit() *edit {
	return &edit{
		t:       &token{},
		lineage: s.lineage,
		lastRow: s.lastRow,
		rows:    s.rows,
		ids:     s.ids.Txn(),
		homes:   s.homes.Txn(),
		parents: s.parents.Txn(),
		names:   s.names.Txn(),
	}
}

func (x *edit) commit() *Set {
	return &Set{
		lineage: x.lineage,
		lastRow: x.lastRow,
		rows:    x.rows,
		ids:     x.ids.CommitOnly(),
		homes:   x.homes.CommitOnly(),
		parents: x.parents.CommitOnly(),
		names:   x.names.CommitOnly(),
	}
}

// put adds e in a row, or replaces the entry with its ID in that one's row.
// False if an equal entry was there.
func (x *edit) put(e *Entry, row int64) bool {
	old, replace := x.ids.Get([]byte(e.ID))
	if replace {
		if old.entry.Equal(e) {
			return false
		}
		row = old.row
		x.unlink(old, e)
	}
	it := &item{entry: e, row: row}
	if replace && old.entry.Selectors.Equal(e.Selectors) {
		it.home = old.home
	} else {
		it.home = x.home(e.Selectors)
	}
	x.lastRow = max(x.lastRow, row)
	x.rows = x.rows.put(x.t, it)
	x.ids.Insert([]byte(e.ID), it)
	if e.Selectors.Len() > 0 {
		k := makeKey(it.home)
		putList(x.homes, x.t, k[:], it)
	}
	k := makeKey(hashID(x.lineage.seed, e.ParentID))
	putList(x.parents, x.t, k[:], it)
	putList(x.names, x.t, nameKey(x.lineage.seed, e), it)
	return true
}

// unlink takes a replaced item out of the indices in which its successor will
// not overwrite it.
func (x *edit) unlink(old *item, next *Entry) {
	selectors := old.entry.Selectors.Equal(next.Selectors)
	if !selectors {
		x.unhome(old)
	}
	if old.entry.ParentID != next.ParentID {
		k := makeKey(hashID(x.lineage.seed, old.entry.ParentID))
		delList(x.parents, x.t, k[:], old.row)
	}
	if !selectors || old.entry.ParentID != next.ParentID || old.entry.SPIFFEID != next.SPIFFEID {
		delList(x.names, x.t, nameKey(x.lineage.seed, old.entry), old.row)
	}
}

func (x *edit) unhome(old *item) {
	if old.entry.Selectors.Len() > 0 {
		k := makeKey(old.home)
		delList(x.homes, x.t, k[:], old.row)
	}
}

// del removes the entry with an ID and returns it, nil if there is none.
func (x *edit) del(id string) *Entry {
	old, ok := x.ids.Delete([]byte(id))
	if !ok {
		return nil
	}
	x.rows = x.rows.del(x.t, old.row)
	x.unhome(old)
	k := makeKey(hashID(x.lineage.seed, old.entry.ParentID))
	delList(x.parents, x.t, k[:], old.row)
	delList(x.names, x.t, nameKey(x.lineage.seed, old.entry), old.row)
	return old.entry
}

// home picks the selector an entry is indexed under: the one with the fewest
// entries so far; among equals the longest, which is the likeliest to be the
// most specific.
func (x *edit) home(selectors selector.Set) uint64 {
	var best uint64
	fewest, longest := -1, 0
	for s := range selectors.All() {
		h := hashSelector(x.lineage.seed, s)
		k := makeKey(h)
		l, _ := x.homes.Get(k[:])
		n, length := l.len(), len(s.Type())+len(s.Value())
		if fewest < 0 || n < fewest || n == fewest && length > longest {
			best, fewest, longest = h, n, length
		}
	}
	return best
}
