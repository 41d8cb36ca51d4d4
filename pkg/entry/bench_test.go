package entry_test

import (
	"fmt"
	"runtime"
	"sync"
	"testing"

	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/selector"
)

const manyEntries = 100_000

// workload is the i-th entry of a large cluster: selectors as a ClusterSPIFFEID
// makes them, over 500 namespaces and 200 agents.
func workload(i int) *entry.Entry {
	return &entry.Entry{
		ID:       fmt.Sprintf("00000000-0000-4000-8000-%012d", i),
		SPIFFEID: id(fmt.Sprintf("/ns/ns%d/sa/sa%d", i%500, i%5000)),
		ParentID: id(fmt.Sprintf("/spire/agent/k8s_psat/cluster/node%d", i%200)),
		Selectors: sels(
			fmt.Sprintf("k8s:ns:ns%d", i%500),
			fmt.Sprintf("k8s:sa:sa%d", i%5000),
			fmt.Sprintf("k8s:pod-uid:%08d-aaaa-bbbb-cccc-000000000000", i),
		),
	}
}

// caller is the i-th workload's process as the attestor sees it.
func caller(i int) selector.Set {
	return workload(i).Selectors.Union(sels(
		"unix:uid:1000", "unix:gid:1000", "unix:user:app", "unix:group:app",
		"unix:supplementary_gid:1000", "k8s:pod-name:web", "k8s:container-name:app",
		"k8s:pod-label:app:web", "k8s:pod-owner:ReplicaSet:web-1", "k8s:node-name:node1",
	))
}

var large = sync.OnceValue(func() *entry.Set {
	all := make([]*entry.Entry, manyEntries)
	for i := range all {
		all[i] = workload(i)
	}
	return entry.NewSet(all...)
})

func BenchmarkMatch(b *testing.B) {
	for _, c := range []struct {
		name   string
		caller selector.Set
		want   int
	}{
		{"hit", caller(manyEntries / 2), 1},
		{"miss", caller(manyEntries + 1), 0},
		{"first", caller(0), 1},
		{"last", caller(manyEntries - 1), 1},
	} {
		b.Run(c.name, func(b *testing.B) {
			s := large()
			b.ReportAllocs()
			for b.Loop() {
				if got := s.Match(c.caller); len(got) != c.want {
					b.Fatalf("%d matches, want %d", len(got), c.want)
				}
			}
		})
	}
}

// BenchmarkMatchCommon has callers that share every selector with 200 others:
// no selector is theirs alone.
func BenchmarkMatchCommon(b *testing.B) {
	all := make([]*entry.Entry, manyEntries)
	for i := range all {
		all[i] = workload(i)
		all[i].Selectors = sels(fmt.Sprintf("k8s:ns:ns%d", i%500), fmt.Sprintf("k8s:sa:sa%d", i%5000))
	}
	s := entry.NewSet(all...)
	c := caller(77)
	b.ReportAllocs()
	for b.Loop() {
		if got := s.Match(c); len(got) != 20 {
			b.Fatalf("%d matches", len(got))
		}
	}
}

// BenchmarkWith is one step from a large set to the next.
func BenchmarkWith(b *testing.B) {
	for _, c := range []struct {
		name string
		step func(s *entry.Set, i int) *entry.Set
	}{
		{"insert", func(s *entry.Set, i int) *entry.Set {
			return s.With([]*entry.Entry{workload(manyEntries + i)}, nil)
		}},
		{"update", func(s *entry.Set, i int) *entry.Set {
			e := workload(i * 7919 % manyEntries)
			e.Hint = fmt.Sprint(i)
			return s.With([]*entry.Entry{e}, nil)
		}},
		{"remove", func(s *entry.Set, i int) *entry.Set {
			return s.With(nil, []string{workload(i * 7919 % manyEntries).ID})
		}},
	} {
		b.Run(c.name, func(b *testing.B) {
			s := large()
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				c.step(s, i)
			}
		})
	}
}

// BenchmarkNewSet also reports what an entry costs in memory besides itself.
func BenchmarkNewSet(b *testing.B) {
	all := make([]*entry.Entry, manyEntries)
	for i := range all {
		all[i] = workload(i)
	}
	var before, after runtime.MemStats
	for b.Loop() {
		runtime.GC()
		runtime.ReadMemStats(&before)
		s := entry.NewSet(all...)
		runtime.GC()
		runtime.ReadMemStats(&after)
		runtime.KeepAlive(s)
	}
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/manyEntries, "B/entry")
}

// BenchmarkScope follows one changed entry on an agent of 500 among 100,000.
func BenchmarkScope(b *testing.B) {
	s := large()
	sc := entry.NewScope(id("/spire/agent/k8s_psat/cluster/node7"), sels("node:a"))
	sc.Apply(s)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		e := workload(200*(i%500) + 7)
		e.Hint = fmt.Sprint(i)
		s = s.With([]*entry.Entry{e}, nil)
		sc.Apply(s)
	}
	if sc.Rebuilds() != 1 {
		b.Errorf("%d rebuilds", sc.Rebuilds())
	}
}
