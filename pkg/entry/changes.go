package entry

import "slices"

// logSize is how many single changes a set remembers at least; it remembers at
// most twice as many.
const logSize = 1024

// Delta is what changed between two versions of a set.
type Delta struct {
	// Changed are the entries added or replaced, in their newest form, oldest
	// change first.
	Changed []*Entry
	// Removed are entries taken out, as they were last. They may never have
	// been seen at the older version.
	Removed []*Entry
}

// record is one step from a version to the next. Immutable.
type record struct {
	version uint64
	changed []*Entry
	removed []*Entry
	older   *record // the step before, within one generation
	size    int     // changes in this generation up to here
}

func (r *record) len() int { return len(r.changed) + len(r.removed) }

// changeLog remembers recent steps in two generations: when the young one is
// full it becomes the old one and the old one is dropped. That bounds the log
// without changing what older sets still point to.
type changeLog struct {
	young, old *record
	floor      uint64 // the oldest version the log reaches back to
}

func (l changeLog) with(rec *record) changeLog {
	if rec.len() > logSize {
		return changeLog{floor: rec.version}
	}
	if l.young != nil && l.young.size+rec.len() > logSize {
		floor := l.floor
		if l.old != nil {
			floor = l.old.version
		}
		l = changeLog{old: l.young, floor: floor}
	}
	rec.size = rec.len()
	if l.young != nil {
		rec.older = l.young
		rec.size += l.young.size
	}
	l.young = rec
	return l
}

// Since is Changes since another set was made; false also if that set is of
// another lineage.
func (s *Set) Since(old *Set) (Delta, bool) {
	if old == nil || old.lineage != s.lineage {
		return Delta{}, false
	}
	return s.Changes(old.version)
}

// Changes is what changed since a version of the same lineage. False if that
// is too long ago, or no version of this set: then everything must be looked
// at anew.
func (s *Set) Changes(after uint64) (Delta, bool) {
	if after > s.version || after < s.log.floor {
		return Delta{}, false
	}
	var d Delta
	if after == s.version {
		return d, true
	}
	seen := make(map[string]bool)
	for _, r := range []*record{s.log.young, s.log.old} {
		for ; r != nil && r.version > after; r = r.older {
			// Within one step removals come first, so backwards they are last.
			for _, e := range slices.Backward(r.changed) {
				if !seen[e.ID] {
					seen[e.ID] = true
					d.Changed = append(d.Changed, e)
				}
			}
			for _, e := range slices.Backward(r.removed) {
				if !seen[e.ID] {
					seen[e.ID] = true
					d.Removed = append(d.Removed, e)
				}
			}
		}
	}
	slices.Reverse(d.Changed)
	slices.Reverse(d.Removed)
	return d, true
}
