package entry_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/selector"
)

func domains(names ...string) []spiffeid.TrustDomain {
	var out []spiffeid.TrustDomain
	for _, n := range names {
		out = append(out, spiffeid.RequireTrustDomainFromString(n))
	}
	return out
}

func TestFilterModes(t *testing.T) {
	t.Parallel()
	const (
		exact = 1 << iota
		subset
		superset
		anyOf
	)
	given := []string{"a", "b"}
	for _, c := range []struct {
		have []string
		want int
	}{
		{nil, 0},
		{[]string{"a"}, subset | anyOf},
		{[]string{"a", "b"}, exact | subset | superset | anyOf},
		{[]string{"b", "a"}, exact | subset | superset | anyOf},
		{[]string{"a", "b", "c"}, superset | anyOf},
		{[]string{"a", "c"}, anyOf},
		{[]string{"c"}, 0},
	} {
		got, gotFed := 0, 0
		toSelectors := func(in []string) selector.Set {
			var out []selector.Selector
			for _, s := range in {
				out = append(out, selector.Must("t:"+s))
			}
			return selector.NewSet(out...)
		}
		e := &entry.Entry{Selectors: toSelectors(c.have), FederatesWith: domains(c.have...)}
		for bit, mode := range []entry.MatchMode{entry.MatchExact, entry.MatchSubset, entry.MatchSuperset, entry.MatchAny} {
			f := entry.Filter{Selectors: &entry.SelectorFilter{Selectors: toSelectors(given), Mode: mode}}
			if f.Keep(e) {
				got |= 1 << bit
			}
			f = entry.Filter{FederatesWith: &entry.FederationFilter{TrustDomains: domains(given...), Mode: mode}}
			if f.Keep(e) {
				gotFed |= 1 << bit
			}
		}
		if got != c.want || gotFed != c.want {
			t.Errorf("%v: selectors %04b, federation %04b, want %04b", c.have, got, gotFed, c.want)
		}
	}
	unknown := entry.Filter{Selectors: &entry.SelectorFilter{Selectors: sels("t:a"), Mode: 9}}
	if unknown.Keep(&entry.Entry{Selectors: sels("t:a")}) {
		t.Error("an unknown mode selects")
	}
}

// TestListAgainstScan pages through random filters and compares with a scan.
func TestListAgainstScan(t *testing.T) {
	t.Parallel()
	for seed := range uint64(30) {
		g := newGen(seed)
		var m model
		s := entry.NewSet()
		for range 60 {
			changed, removed := g.change()
			for _, e := range changed {
				e.Downstream = g.IntN(2) == 0
				e.Hint = []string{"", "h"}[g.IntN(2)]
				e.FederatesWith = domains([]string{"a", "b", "c"}[:g.IntN(4)]...)
			}
			s, m = s.With(changed, removed), m.with(changed, removed)
		}
		for range 50 {
			var f entry.Filter
			if g.IntN(3) == 0 {
				f.ParentID = g.parent()
			}
			if g.IntN(3) == 0 {
				f.SPIFFEID = g.path()
			}
			if g.IntN(3) == 0 {
				f.Hint = "h"
			}
			f.DownstreamOnly = g.IntN(3) == 0
			if g.IntN(2) == 0 {
				f.Selectors = &entry.SelectorFilter{Selectors: g.selectors(4), Mode: entry.MatchMode(g.IntN(4))}
			}
			if g.IntN(4) == 0 {
				f.FederatesWith = &entry.FederationFilter{TrustDomains: domains("a", "b"), Mode: entry.MatchMode(g.IntN(4))}
			}
			want := m.filter(f.Keep)
			got := []string{}
			row := int64(0)
			size := 1 + g.IntN(5)
			for {
				page, last := s.List(f, row, size)
				if len(page) == 0 {
					if last != row {
						t.Fatalf("an empty page moved from row %d to %d", row, last)
					}
					break
				}
				if len(page) > size {
					t.Fatalf("page of %d, want %d at most", len(page), size)
				}
				got, row = append(got, ids(page)...), last
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Fatalf("filter %+v (-scan +list):\n%s", f, diff)
			}
			if n := s.Count(f); n != len(want) {
				t.Fatalf("Count %d, want %d", n, len(want))
			}
		}
	}
}

func TestAfterKeepsItsPlace(t *testing.T) {
	t.Parallel()
	s := entry.NewSet()
	for i := range 5 {
		s = s.With([]*entry.Entry{{ID: fmt.Sprint(i)}}, nil)
	}
	page, row := s.After(0, 2)
	if diff := cmp.Diff([]string{"0", "1"}, ids(page)); diff != "" {
		t.Error(diff)
	}
	s = s.With([]*entry.Entry{{ID: "5"}}, []string{"0", "1", "2"})
	page, _ = s.After(row, 0)
	if diff := cmp.Diff([]string{"3", "4", "5"}, ids(page)); diff != "" {
		t.Error(diff)
	}
}

func TestExpired(t *testing.T) {
	t.Parallel()
	now := time.Unix(100, 0)
	s := entry.NewSet(
		&entry.Entry{ID: "never"},
		&entry.Entry{ID: "past", ExpiresAt: now.Add(-time.Second)},
		&entry.Entry{ID: "now", ExpiresAt: now},
		&entry.Entry{ID: "future", ExpiresAt: now.Add(time.Second)},
	)
	if diff := cmp.Diff([]string{"past"}, ids(s.Expired(now))); diff != "" {
		t.Error(diff)
	}
}

func TestNearest(t *testing.T) {
	t.Parallel()
	s := entry.NewSet(
		&entry.Entry{ID: "match", Selectors: sels("k8s:ns:a")},
		&entry.Entry{ID: "one-old", Selectors: sels("k8s:ns:a", "k8s:sa:x")},
		&entry.Entry{ID: "one-new", Selectors: sels("k8s:ns:a", "k8s:sa:y")},
		&entry.Entry{ID: "one-of-three", Selectors: sels("k8s:ns:a", "unix:uid:1", "k8s:sa:z")},
		&entry.Entry{ID: "two", Selectors: sels("k8s:ns:a", "k8s:sa:z", "k8s:img:z")},
		&entry.Entry{ID: "stranger", Selectors: sels("k8s:ns:b")},
		&entry.Entry{ID: "empty"},
	)
	near := s.Nearest(sels("k8s:ns:a", "unix:uid:1"), 10)
	var got []string
	for _, n := range near {
		line := n.Entry.ID
		for _, sel := range n.Missing {
			line += " " + sel.String()
		}
		got = append(got, line)
	}
	want := []string{
		"one-of-three k8s:sa:z",
		"one-new k8s:sa:y",
		"one-old k8s:sa:x",
		"two k8s:img:z k8s:sa:z",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if near = s.Nearest(sels("k8s:ns:a", "unix:uid:1"), 1); len(near) != 1 || near[0].Entry.ID != "one-of-three" {
		t.Errorf("nearest one: %v", near)
	}
	if near = s.Nearest(sels("k8s:ns:a"), 0); len(near) != 0 {
		t.Errorf("nearest none: %v", near)
	}
}

func TestNearestAgainstScan(t *testing.T) {
	t.Parallel()
	for seed := range uint64(50) {
		g := newGen(seed)
		s := entry.NewSet()
		for range 30 {
			s = s.With(g.change())
		}
		caller := g.selectors(6)
		missing := func(e *entry.Entry) (lack int, shared bool) {
			for sel := range e.Selectors.All() {
				if caller.Contains(sel) {
					shared = true
				} else {
					lack++
				}
			}
			return lack, shared
		}
		var want []int
		for e := range s.All() {
			if lack, shared := missing(e); lack > 0 && shared {
				want = append(want, lack)
			}
		}
		slices.Sort(want)
		want = want[:min(len(want), 4)]
		var got []int
		seen := map[string]bool{}
		for _, n := range s.Nearest(caller, 4) {
			got = append(got, len(n.Missing))
			if seen[n.Entry.ID] {
				t.Errorf("%s twice", n.Entry.ID)
			}
			seen[n.Entry.ID] = true
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("selectors missing (-scan +index):\n%s", diff)
		}
	}
}

func TestSort(t *testing.T) {
	t.Parallel()
	day := func(n int) time.Time { return time.Unix(int64(n)*86400, 0) }
	all := []*entry.Entry{
		{ID: "f", Selectors: sels("t:1", "t:2", "t:3"), Fallback: true},
		{ID: "e", Selectors: sels("t:1"), CreatedAt: day(1)},
		{ID: "d", Selectors: sels("t:1", "t:2"), CreatedAt: day(3)},
		{ID: "c", Selectors: sels("t:1", "t:2"), CreatedAt: day(2), Hint: "h"},
		{ID: "b", Selectors: sels("t:1", "t:2"), CreatedAt: day(2)},
	}
	for _, c := range []struct {
		order entry.Order
		hint  string
		want  []string
	}{
		{entry.OrderNode, "", []string{"b", "c", "d", "e", "f"}},
		{entry.OrderNode, "h", []string{"c", "b", "d", "e", "f"}},
		{entry.OrderNode, "nobody's", []string{"b", "c", "d", "e", "f"}},
		{entry.OrderSPIRE, "", []string{"b", "c", "d", "e", "f"}},
		{entry.OrderSPIRE, "h", []string{"c", "b", "d", "e", "f"}},
	} {
		got := slices.Clone(all)
		newGen(1).Shuffle(len(got), func(i, j int) { got[i], got[j] = got[j], got[i] })
		entry.Sort(got, c.order, c.hint)
		if diff := cmp.Diff(c.want, ids(got)); diff != "" {
			t.Errorf("%v %q (-want +got):\n%s", c.order, c.hint, diff)
		}
	}
	// Where the orders differ.
	two := []*entry.Entry{{ID: "a", Selectors: sels("t:1")}, {ID: "b", Selectors: sels("t:1", "t:2")}}
	entry.Sort(two, entry.OrderNode, "")
	if two[0].ID != "b" {
		t.Error("node order: the entry with the most selectors is not first")
	}
	entry.Sort(two, entry.OrderSPIRE, "")
	if two[0].ID != "a" {
		t.Error("SPIRE's order: the smallest ID is not first")
	}
}
