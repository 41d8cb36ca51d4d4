package entry_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/selector"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func id(path string) spiffeid.ID { return spiffeid.RequireFromPath(td, path) }

func sels(in ...string) selector.Set { return selector.MustSet(in...) }

// ids is the IDs of entries in order.
func ids(entries []*entry.Entry) []string {
	out := []string{}
	for _, e := range entries {
		out = append(out, e.ID)
	}
	return out
}

// model is the naive set: a slice in row order.
type model []*entry.Entry

func (m model) with(changed []*entry.Entry, removed []string) model {
	out := slices.Clone(m)
	for _, id := range removed {
		out = slices.DeleteFunc(out, func(e *entry.Entry) bool { return e.ID == id })
	}
	for _, e := range changed {
		if i := slices.IndexFunc(out, func(o *entry.Entry) bool { return o.ID == e.ID }); i >= 0 {
			if !out[i].Equal(e) {
				out[i] = e
			}
		} else {
			out = append(out, e)
		}
	}
	return out
}

func (m model) filter(keep func(*entry.Entry) bool) []string {
	out := []string{}
	for _, e := range m {
		if keep(e) {
			out = append(out, e.ID)
		}
	}
	return out
}

// gen makes random entries over a small world, so that everything collides.
type gen struct{ *rand.Rand }

func newGen(seed uint64) gen { return gen{rand.New(rand.NewPCG(seed, 1))} }

func (g gen) selectors(maxLen int) selector.Set {
	var out []selector.Selector
	for range g.IntN(maxLen + 1) {
		out = append(out, selector.Must(fmt.Sprintf("t%d:v%d", g.IntN(3), g.IntN(4))))
	}
	return selector.NewSet(out...)
}

func (g gen) path() spiffeid.ID { return id(fmt.Sprintf("/p%d", g.IntN(6))) }

func (g gen) parent() spiffeid.ID {
	switch g.IntN(4) {
	case 0:
		return id("/spire/server")
	case 1:
		return id("/spire/agent/x")
	}
	return g.path()
}

func (g gen) entry() *entry.Entry {
	e := &entry.Entry{
		ID:        fmt.Sprintf("e%02d", g.IntN(40)),
		SPIFFEID:  g.path(),
		ParentID:  g.parent(),
		Selectors: g.selectors(3),
		Revision:  int64(g.IntN(2)),
	}
	if g.IntN(8) == 0 {
		e.SPIFFEID = spiffeid.RequireFromString("spiffe://other.org/p1")
	}
	return e
}

func (g gen) change() (changed []*entry.Entry, removed []string) {
	for range g.IntN(4) {
		changed = append(changed, g.entry())
	}
	for range g.IntN(3) {
		removed = append(removed, fmt.Sprintf("e%02d", g.IntN(40)))
	}
	return changed, removed
}

func check(t *testing.T, s *entry.Set, m model, g gen) {
	t.Helper()
	if err := s.Check(); err != nil {
		t.Fatal(err)
	}
	all := func(*entry.Entry) bool { return true }
	if diff := cmp.Diff(m.filter(all), ids(slices.Collect(s.All()))); diff != "" {
		t.Fatalf("All (-model +set):\n%s", diff)
	}
	caller := g.selectors(6)
	want := m.filter(func(e *entry.Entry) bool { return e.Selectors.Len() > 0 && e.Selectors.SubsetOf(caller) })
	if diff := cmp.Diff(want, ids(s.Match(caller))); diff != "" {
		t.Fatalf("Match(%v) (-model +set):\n%s", caller.Strings(), diff)
	}
	parent := g.parent()
	want = m.filter(func(e *entry.Entry) bool { return e.ParentID == parent })
	if diff := cmp.Diff(want, ids(slices.Collect(s.ByParent(parent)))); diff != "" {
		t.Fatalf("ByParent(%s) (-model +set):\n%s", parent, diff)
	}
	name := g.path()
	want = m.filter(func(e *entry.Entry) bool { return e.SPIFFEID == name })
	if diff := cmp.Diff(want, ids(slices.Collect(s.BySPIFFEID(name)))); diff != "" {
		t.Fatalf("BySPIFFEID(%s) (-model +set):\n%s", name, diff)
	}
	probe := g.entry()
	want = m.filter(func(e *entry.Entry) bool {
		return e.SPIFFEID == probe.SPIFFEID && e.ParentID == probe.ParentID && e.Selectors.Equal(probe.Selectors)
	})
	got, ok := s.Similar(probe)
	if ok != (len(want) > 0) || ok && got.ID != want[0] {
		t.Fatalf("Similar = %v %v, want %v", got, ok, want)
	}
	got, ok = s.Get(probe.ID)
	want = m.filter(func(e *entry.Entry) bool { return e.ID == probe.ID })
	if ok != (len(want) > 0) || ok && got.ID != probe.ID {
		t.Fatalf("Get(%s) = %v %v, want %v", probe.ID, got, ok, want)
	}
}

// TestSetAgainstModel runs random changes against the set and a plain slice.
// Every version made stays checkable: none may change once it is there.
func TestSetAgainstModel(t *testing.T) {
	t.Parallel()
	for seed := range uint64(40) {
		g := newGen(seed)
		type version struct {
			s *entry.Set
			m model
		}
		var m model
		for range g.IntN(30) {
			m = m.with([]*entry.Entry{g.entry()}, nil)
		}
		history := []version{{entry.NewSet(m...), m}}
		for range 60 {
			// Mostly from the newest, sometimes a fork of an older version.
			from := history[len(history)-1]
			if g.IntN(5) == 0 {
				from = history[g.IntN(len(history))]
			}
			changed, removed := g.change()
			next := version{from.s.With(changed, removed), from.m.with(changed, removed)}
			check(t, next.s, next.m, g)
			history = append(history, next)
		}
		for _, v := range history {
			check(t, v.s, v.m, g)
		}
	}
}

// TestChanges replays the delta between any two versions of a line.
func TestChanges(t *testing.T) {
	t.Parallel()
	for seed := range uint64(20) {
		g := newGen(seed)
		s := entry.NewSet()
		history := []*entry.Set{s}
		for range 40 {
			s = s.With(g.change())
			history = append(history, s)
		}
		for _, from := range history {
			d, ok := s.Changes(from.Version())
			if !ok {
				t.Fatalf("Changes(%d) of version %d: too old", from.Version(), s.Version())
			}
			state := map[string]*entry.Entry{}
			for e := range from.All() {
				state[e.ID] = e
			}
			for _, e := range d.Removed {
				delete(state, e.ID)
			}
			for _, e := range d.Changed {
				state[e.ID] = e
			}
			if len(state) != s.Len() {
				t.Fatalf("replay has %d entries, want %d", len(state), s.Len())
			}
			for e := range s.All() {
				if state[e.ID] != e {
					t.Fatalf("replay has %v under %s, want %v", state[e.ID], e.ID, e)
				}
			}
		}
	}
}

func TestChangesBounds(t *testing.T) {
	t.Parallel()
	s := entry.NewSet()
	if d, ok := s.Changes(1); !ok || len(d.Changed) != 0 {
		t.Errorf("Changes(own version) = %v %v", d, ok)
	}
	if _, ok := s.Changes(0); ok {
		t.Error("Changes(0) of a new set: ok, want everything anew")
	}
	if _, ok := s.Changes(2); ok {
		t.Error("Changes(later version): ok")
	}
	next := s.With([]*entry.Entry{{ID: "a"}}, nil)
	if d, ok := next.Since(s); !ok || len(d.Changed) != 1 {
		t.Errorf("Since = %v %v", d, ok)
	}
	if _, ok := next.Since(entry.NewSet()); ok {
		t.Error("Since a set of another lineage: ok")
	}
	for i := range 3 * entry.LogSize {
		s = s.With([]*entry.Entry{{ID: fmt.Sprint(i)}}, nil)
		if i%61 != 0 && i%entry.LogSize < entry.LogSize-2 {
			continue // around the bounds every step, elsewhere some
		}
		back := min(i+1, entry.LogSize)
		if d, ok := s.Changes(s.Version() - uint64(back)); !ok || len(d.Changed) != back {
			t.Fatalf("after %d changes: %d back: %d changed, %v", i+1, back, len(d.Changed), ok)
		}
		if _, ok := s.Changes(s.Version() - min(s.Version(), 2*entry.LogSize+1)); ok {
			t.Fatalf("after %d changes: the log is not bounded", i+1)
		}
	}
	var many []*entry.Entry
	for i := range entry.LogSize + 1 {
		many = append(many, &entry.Entry{ID: fmt.Sprint("m", i)})
	}
	before := s.Version()
	s = s.With(many, nil)
	if _, ok := s.Changes(before); ok {
		t.Error("a step beyond the log's size is still in the log")
	}
	if _, ok := s.With([]*entry.Entry{{ID: "z"}}, nil).Changes(s.Version()); !ok {
		t.Error("the step after it is not")
	}
}

func TestWithNoChange(t *testing.T) {
	t.Parallel()
	e := &entry.Entry{ID: "a", SPIFFEID: id("/a"), Selectors: sels("t:1"), CreatedAt: time.Unix(1, 0)}
	s := entry.NewSet(e)
	if got := s.With([]*entry.Entry{e.Clone()}, []string{"unknown"}); got != s {
		t.Error("a set without change is a new set")
	}
	other := e.Clone()
	other.Revision++
	next := s.With([]*entry.Entry{other}, nil)
	if next.Version() != s.Version()+1 {
		t.Errorf("version %d after %d", next.Version(), s.Version())
	}
	if got, _ := s.Get("a"); got != e {
		t.Error("the old set has changed")
	}
}

func TestRestoreKeepsRows(t *testing.T) {
	t.Parallel()
	s := entry.NewSet(&entry.Entry{ID: "a"}, &entry.Entry{ID: "b"}, &entry.Entry{ID: "c"})
	s = s.With([]*entry.Entry{{ID: "d"}}, []string{"a", "c"})
	back := entry.Restore(s.Rows())
	for _, id := range []string{"b", "d"} {
		was, _ := s.Row(id)
		if is, ok := back.Row(id); !ok || is != was {
			t.Errorf("row of %s is %d, was %d", id, is, was)
		}
	}
	bad := func(yield func(int64, *entry.Entry) bool) {
		_ = yield(7, &entry.Entry{ID: "a"}) && yield(7, &entry.Entry{ID: "b"}) && yield(-1, &entry.Entry{ID: "c"})
	}
	s = entry.Restore(bad)
	if diff := cmp.Diff([]string{"a", "b", "c"}, ids(slices.Collect(s.All()))); diff != "" {
		t.Error(diff)
	}
	if err := s.Check(); err != nil {
		t.Error(err)
	}
}

// TestListsSplitAndJoin drives one bucket through many chunks.
func TestListsSplitAndJoin(t *testing.T) {
	t.Parallel()
	g := newGen(1)
	s := entry.NewSet()
	var m model
	steps := 0
	step := func(changed []*entry.Entry, removed []string) {
		s, m = s.With(changed, removed), m.with(changed, removed)
		if steps++; steps%13 != 0 {
			return
		}
		if err := s.Check(); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 3 * entry.MaxChunk {
		step([]*entry.Entry{{ID: fmt.Sprint(i), Selectors: sels("t:one")}}, nil)
	}
	// Moving entries away and back inserts old rows into the middle.
	for range 300 {
		e := &entry.Entry{ID: fmt.Sprint(g.IntN(3 * entry.MaxChunk)), Selectors: sels("t:two")}
		if g.IntN(2) == 0 {
			e.Selectors = sels("t:one")
		}
		step([]*entry.Entry{e}, nil)
	}
	check(t, s, m, g)
	for _, i := range g.Perm(3 * entry.MaxChunk) {
		step(nil, []string{fmt.Sprint(i)})
	}
	if s.Len() != 0 {
		t.Errorf("%d left", s.Len())
	}
}
