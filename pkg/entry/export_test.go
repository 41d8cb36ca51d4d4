package entry

import "fmt"

// LogSize is the least number of changes a set remembers.
const LogSize = logSize

// MaxChunk is the most items in one chunk of a list.
const MaxChunk = maxChunk

// Rebuilds is how often the scope was walked as a whole.
func (sc *Scope) Rebuilds() int { return sc.rebuilds }

// Check verifies what must hold between the indices of a set.
func (s *Set) Check() error {
	n := 0
	last := int64(0)
	for it := range s.rows.after(0) {
		n++
		if it.row <= last || it.row > s.lastRow {
			return fmt.Errorf("row %d after %d, last %d", it.row, last, s.lastRow)
		}
		last = it.row
		if got, _ := s.ids.Get([]byte(it.entry.ID)); got != it {
			return fmt.Errorf("entry %s: not under its ID", it.entry.ID)
		}
		if it.entry.Selectors.Len() > 0 {
			k := makeKey(it.home)
			if err := s.homes0(k[:], it); err != nil {
				return err
			}
		}
	}
	if n != s.Len() || n != s.ids.Len() {
		return fmt.Errorf("%d rows, len %d, %d ids", n, s.Len(), s.ids.Len())
	}
	for name, tree := range map[string]interface {
		sum() (int, error)
	}{"homes": treeSum{s.homes.Root().Iterator()}, "parents": treeSum{s.parents.Root().Iterator()}, "names": treeSum{s.names.Root().Iterator()}} {
		got, err := tree.sum()
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		want := n
		if name == "homes" {
			for it := range s.rows.after(0) {
				if it.entry.Selectors.Len() == 0 {
					want--
				}
			}
		}
		if got != want {
			return fmt.Errorf("%s holds %d items, want %d", name, got, want)
		}
	}
	return nil
}

func (s *Set) homes0(k []byte, it *item) error {
	l, _ := s.homes.Get(k)
	if chunk, at, ok := l.search(it.row); !ok || l.chunks[chunk][at] != it {
		return fmt.Errorf("entry %s: not under its home", it.entry.ID)
	}
	return nil
}

type treeSum struct {
	it interface {
		Next() ([]byte, *list, bool)
	}
}

func (t treeSum) sum() (int, error) {
	n := 0
	for _, l, ok := t.it.Next(); ok; _, l, ok = t.it.Next() {
		inList := 0
		for _, c := range l.chunks {
			if len(c) == 0 || len(c) > maxChunk {
				return 0, fmt.Errorf("chunk of %d", len(c))
			}
			inList += len(c)
		}
		if inList != l.n || l.n == 0 {
			return 0, fmt.Errorf("list of %d says %d", inList, l.n)
		}
		n += inList
	}
	return n, nil
}
