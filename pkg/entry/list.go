package entry

import (
	"iter"
	"slices"
)

// item is one entry at its place in a set. Items are replaced, never changed.
type item struct {
	entry *Entry
	row   int64  // insertion order, never reused within a set's lineage
	home  uint64 // hash of the selector the entry is indexed under; meaningless without selectors
}

// token marks the lists one With call made itself and may therefore change in
// place. It must not have size zero: tokens are told apart by their address.
type token struct{ _ byte }

// maxChunk bounds what one insertion copies; the outer slice grows with
// 1/maxChunk of the entries.
const maxChunk = 256

// list is a persistent list of items in row order. A nil list is empty.
type list struct {
	chunks [][]*item // none empty; a chunk is never changed once it is here
	n      int
	owner  *token
}

func (l *list) len() int {
	if l == nil {
		return 0
	}
	return l.n
}

// search finds the first chunk whose last row is at least row, and the place
// of row in it.
func (l *list) search(row int64) (chunk, at int, found bool) {
	chunk, _ = slices.BinarySearchFunc(l.chunks, row, func(c []*item, row int64) int {
		return compareRow(c[len(c)-1], row)
	})
	if chunk == len(l.chunks) {
		return chunk, 0, false
	}
	at, found = slices.BinarySearchFunc(l.chunks[chunk], row, compareRow)
	return chunk, at, found
}

func compareRow(it *item, row int64) int {
	switch {
	case it.row < row:
		return -1
	case it.row > row:
		return 1
	}
	return 0
}

// own is l itself if t made it, else a copy that t may change.
func (l *list) own(t *token) *list {
	switch {
	case l == nil:
		return &list{owner: t}
	case l.owner == t:
		return l
	}
	return &list{chunks: slices.Clone(l.chunks), n: l.n, owner: t}
}

// put inserts an item or replaces the one in the same row.
func (l *list) put(t *token, it *item) *list {
	out := l.own(t)
	chunk, at, found := out.search(it.row)
	if found {
		c := slices.Clone(out.chunks[chunk])
		c[at] = it
		out.chunks[chunk] = c
		return out
	}
	out.n++
	if chunk == len(out.chunks) { // beyond the last row: the usual case
		if chunk == 0 || len(out.chunks[chunk-1]) == maxChunk {
			out.chunks = append(out.chunks, []*item{it})
			return out
		}
		chunk--
		at = len(out.chunks[chunk])
	}
	old := out.chunks[chunk]
	c := make([]*item, 0, len(old)+1)
	c = append(append(append(c, old[:at]...), it), old[at:]...)
	if len(c) > maxChunk {
		half := len(c) / 2
		out.chunks = slices.Insert(out.chunks, chunk+1, slices.Clone(c[half:]))
		c = slices.Clip(c[:half])
	}
	out.chunks[chunk] = c
	return out
}

// del removes the item in a row; the empty list is nil.
func (l *list) del(t *token, row int64) *list {
	if l == nil {
		return nil
	}
	chunk, at, found := l.search(row)
	if !found {
		return l
	}
	if l.n == 1 {
		return nil
	}
	out := l.own(t)
	out.n--
	old := out.chunks[chunk]
	c := make([]*item, 0, len(old)-1)
	c = append(append(c, old[:at]...), old[at+1:]...)
	// A thin chunk joins its successor, so that deletions cannot leave many
	// chunks of one item each.
	if next := chunk + 1; next < len(out.chunks) && len(c)+len(out.chunks[next]) <= maxChunk/2 {
		c = slices.Concat(c, out.chunks[next])
		out.chunks = slices.Delete(out.chunks, next, next+1)
	}
	if len(c) == 0 {
		out.chunks = slices.Delete(out.chunks, chunk, chunk+1)
		return out
	}
	out.chunks[chunk] = c
	return out
}

// after yields the items of rows greater than row, in order.
func (l *list) after(row int64) iter.Seq[*item] {
	return func(yield func(*item) bool) {
		if l == nil {
			return
		}
		chunk, at, found := l.search(row)
		if found {
			at++
		}
		for ; chunk < len(l.chunks); chunk, at = chunk+1, 0 {
			for _, it := range l.chunks[chunk][at:] {
				if !yield(it) {
					return
				}
			}
		}
	}
}

// backward yields the items from the last row to the first.
func (l *list) backward() iter.Seq[*item] {
	return func(yield func(*item) bool) {
		if l == nil {
			return
		}
		for _, c := range slices.Backward(l.chunks) {
			for _, it := range slices.Backward(c) {
				if !yield(it) {
					return
				}
			}
		}
	}
}
