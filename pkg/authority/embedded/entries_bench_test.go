package embedded_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

func quiet(b *testing.B) embedded.Config {
	b.Helper()
	cfg := testConfig(b)
	cfg.Logger = nil
	return cfg
}

func manyEntries(n int) []*entry.Entry {
	out := make([]*entry.Entry, n)
	for i := range out {
		out[i] = newEntry(fmt.Sprintf("/ns/team-%d/sa/service-%d", i%97, i),
			fmt.Sprintf("k8s:ns:team-%d", i%97), fmt.Sprintf("k8s:sa:service-%d", i), fmt.Sprintf("k8s:pod-uid:%032d", i))
	}
	return out
}

// create100k fills a state file in batches as the Entry API would.
func create100k(tb testing.TB, a *embedded.Authority) {
	tb.Helper()
	all := manyEntries(100_000)
	for len(all) > 0 {
		n := min(10_000, len(all))
		for _, r := range a.CreateEntries(context.Background(), all[:n]...) {
			if r.Err != nil {
				tb.Fatal(r.Err)
			}
		}
		all = all[n:]
	}
}

// BenchmarkCreateEntry is one durable change among 0 and 100,000 entries, up to
// the moment a waiting node has it.
func BenchmarkCreateEntry(b *testing.B) {
	for _, n := range []int{0, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			a := start(b, quiet(b))
			if n > 0 {
				create100k(b, a)
			}
			source := a.NodeEntries(node, newEntry("/x").Selectors)
			ctx := context.Background()
			set, err := source.Entries(ctx, 0)
			if err != nil {
				b.Fatal(err)
			}
			i := 0
			for b.Loop() {
				i++
				if _, err := a.CreateEntry(ctx, newEntry(fmt.Sprintf("/new/%d", i))); err != nil {
					b.Fatal(err)
				}
				if set, err = source.Entries(ctx, set.Version()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkCreateBatch is 500 entries in one call.
func BenchmarkCreateBatch(b *testing.B) {
	a := start(b, quiet(b))
	i := 0
	for b.Loop() {
		in := make([]*entry.Entry, 500)
		for j := range in {
			i++
			in[j] = newEntry(fmt.Sprintf("/new/%d", i))
		}
		for _, r := range a.CreateEntries(context.Background(), in...) {
			if r.Err != nil {
				b.Fatal(r.Err)
			}
		}
	}
}

// BenchmarkOpen100k is a start with 100,000 entries.
func BenchmarkOpen100k(b *testing.B) {
	cfg := quiet(b)
	a := start(b, cfg)
	create100k(b, a)
	if err := a.Close(); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		a, err := embedded.Open(cfg)
		if err != nil {
			b.Fatal(err)
		}
		if a.Set().Len() != 100_000 {
			b.Fatal(a.Set().Len())
		}
		if err := a.Close(); err != nil {
			b.Fatal(err)
		}
	}
}
