package entry_test

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/selector"
)

// naiveScope is the definition, written as a fixed point.
func naiveScope(m model, agent spiffeid.ID, node selector.Set) []string {
	server := id("/spire/server")
	parents := map[spiffeid.ID]bool{agent: true}
	for _, e := range m {
		if e.ParentID == server && e.SPIFFEID.MemberOf(td) && e.Selectors.Len() > 0 && e.Selectors.SubsetOf(node) {
			parents[e.SPIFFEID] = true
		}
	}
	in := map[string]bool{}
	for grown := true; grown; {
		grown = false
		for _, e := range m {
			if !in[e.ID] && parents[e.ParentID] && e.ParentID != server && e.ParentID.MemberOf(td) && e.SPIFFEID.MemberOf(td) {
				in[e.ID], parents[e.SPIFFEID], grown = true, true, true
			}
		}
	}
	out := m.filter(func(e *entry.Entry) bool { return in[e.ID] })
	slices.Sort(out)
	return out
}

func sorted(s *entry.Set) []string {
	out := ids(slices.Collect(s.All()))
	slices.Sort(out)
	return out
}

func TestScopeAgainstDefinition(t *testing.T) {
	t.Parallel()
	agent := id("/spire/agent/x")
	rebuilds, steps := 0, 0
	for seed := range uint64(60) {
		g := newGen(seed)
		node := g.selectors(4)
		sc := entry.NewScope(agent, node)
		var m model
		s := entry.NewSet()
		seen := sc.Apply(s)
		for range 80 {
			changed, removed := g.change()
			s, m = s.With(changed, removed), m.with(changed, removed)
			switch g.IntN(10) {
			case 0:
				continue // several steps at once
			case 1:
				node = g.selectors(4)
				sc.SetNode(node)
			case 2:
				s = entry.NewSet(m...) // a lineage of its own
			}
			got := sc.Apply(s)
			steps++
			if diff := cmp.Diff(naiveScope(m, agent, node), sorted(got)); diff != "" {
				t.Fatalf("seed %d (-definition +scope):\n%s", seed, diff)
			}
			for e := range got.All() {
				if now, _ := s.Get(e.ID); now == nil || !now.Equal(e) {
					t.Fatalf("scope holds %v, the set %v", e, now)
				}
			}
			if _, ok := got.Changes(seen.Version()); !ok {
				t.Fatal("no delta between two scopes")
			}
			if sc.Apply(s) != got {
				t.Fatal("an equal scope is a new set")
			}
			seen = got
		}
		rebuilds += sc.Rebuilds()
	}
	t.Logf("%d of %d steps walked the whole scope", rebuilds, steps)
}

func TestScopeFollowsCommonChange(t *testing.T) {
	t.Parallel()
	agent := id("/spire/agent/x")
	sc := entry.NewScope(agent, sels("node:a"))
	s := entry.NewSet(&entry.Entry{ID: "alias", SPIFFEID: id("/nodes"), ParentID: id("/spire/server"), Selectors: sels("node:a")})
	sc.Apply(s)
	before := sc.Rebuilds()
	for _, e := range []*entry.Entry{
		{ID: "direct", SPIFFEID: id("/w1"), ParentID: agent, Selectors: sels("t:1")},
		{ID: "aliased", SPIFFEID: id("/w2"), ParentID: id("/nodes"), Selectors: sels("t:1")},
		{ID: "grandchild", SPIFFEID: id("/w3"), ParentID: id("/w2"), Selectors: sels("t:1")},
		{ID: "foreign", SPIFFEID: id("/w4"), ParentID: id("/spire/agent/y"), Selectors: sels("t:1")},
		{ID: "direct", SPIFFEID: id("/w1"), ParentID: agent, Selectors: sels("t:2")},
	} {
		s = s.With([]*entry.Entry{e}, nil)
		sc.Apply(s)
	}
	if diff := cmp.Diff([]string{"aliased", "direct", "grandchild"}, sorted(sc.Apply(s))); diff != "" {
		t.Error(diff)
	}
	s = s.With(nil, []string{"grandchild"})
	if diff := cmp.Diff([]string{"aliased", "direct"}, sorted(sc.Apply(s))); diff != "" {
		t.Error(diff)
	}
	if got := sc.Rebuilds() - before; got != 0 {
		t.Errorf("%d walks of the whole scope for changes of leaves", got)
	}
	if got := sc.Apply(s); got.Len() != 2 {
		t.Errorf("%d entries", got.Len())
	}
}
