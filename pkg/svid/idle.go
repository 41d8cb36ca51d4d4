package svid

import "container/list"

// idleRecords are the records with an SVID that no caller has, in the order in
// which they became that. Guarded by Manager.mu.
type idleRecords struct {
	order *list.List // of *record, longest idle first
	place map[*record]*list.Element
}

func newIdleRecords() idleRecords {
	return idleRecords{order: list.New(), place: make(map[*record]*list.Element)}
}

func (i *idleRecords) len() int { return len(i.place) }

// add puts a record last, unless it is in already.
func (i *idleRecords) add(r *record) {
	if i.place[r] == nil {
		i.place[r] = i.order.PushBack(r)
	}
}

func (i *idleRecords) remove(r *record) {
	if e := i.place[r]; e != nil {
		i.order.Remove(e)
		delete(i.place, r)
	}
}

// oldest is the record that has been idle longest of those that may go, nil if
// there is none.
func (i *idleRecords) oldest(may func(*record) bool) *record {
	for e := i.order.Front(); e != nil; e = e.Next() {
		if r := e.Value.(*record); may(r) {
			return r
		}
	}
	return nil
}
