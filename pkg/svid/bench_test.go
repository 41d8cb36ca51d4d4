package svid_test

import (
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// benchWorld is a manager over n entries, one per workload.
func benchWorld(b *testing.B, n int) (*world, []*entry.Entry) {
	b.Helper()
	all := make([]*entry.Entry, n)
	for i := range all {
		all[i] = workload(fmt.Sprint("w", i))
	}
	return run(b, newAuthority(), newEntries(all...)), all
}

// BenchmarkSubscribe is one connection with two streams that come, look and go;
// its SVID is there. Reported is also what an open connection occupies.
func BenchmarkSubscribe(b *testing.B) {
	w, _ := benchWorld(b, 1000)
	nothing := func() {}
	open := func(i int) func() {
		c := newCaller("x", fmt.Sprint("unix:user:w", i%1000), "unix:uid:1000", "unix:gid:1000")
		one, _ := w.m.Subscribe(c, nothing)
		two, _ := w.m.Subscribe(c, nothing)
		one.Update()
		two.Update()
		return func() { one.Close(); two.Close() }
	}
	const many = 5000
	before := heap()
	closers := make([]func(), many)
	for i := range closers {
		closers[i] = open(i)
	}
	for w.m.Status().Unsigned > 0 {
		runtime.Gosched()
	}
	size := float64(heap()-before) / many
	b.ResetTimer()
	for i := range b.N {
		open(i)()
	}
	b.StopTimer()
	b.ReportMetric(size, "B/connection")
	for _, f := range closers {
		f()
	}
}

func heap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// BenchmarkUpdate is a look at an unchanged picture.
func BenchmarkUpdate(b *testing.B) {
	w, _ := benchWorld(b, 1)
	sub, _ := w.m.Subscribe(newCaller("x", "unix:user:w0"), func() {})
	defer sub.Close()
	for b.Loop() {
		sub.Update()
	}
}

// BenchmarkSnapshot is one unary call on a connection seen before.
func BenchmarkSnapshot(b *testing.B) {
	w, _ := benchWorld(b, 1)
	c := newCaller("x", "unix:user:w0")
	for b.Loop() {
		_, _ = w.m.Snapshot(c)
	}
}

// BenchmarkFanout1000 is one change until the last of 1,000 callers was told
// and has looked: one entry that all have (edit: a new hint; sign: a new DNS
// name), the own bundle, or an entry each.
func BenchmarkFanout1000(b *testing.B) {
	const n = 1000
	type setup struct {
		selector func(i int) string
		change   func(w *world, all []*entry.Entry, round int)
	}
	edit := func(e *entry.Entry, round int, f func(*entry.Entry)) *entry.Entry {
		e = e.Clone()
		e.Revision = int64(round)
		f(e)
		return e
	}
	shared := func(int) string { return "unix:user:w0" }
	for name, s := range map[string]setup{
		"edit": {shared, func(w *world, all []*entry.Entry, round int) {
			w.entries.put(edit(all[0], round, func(e *entry.Entry) { e.Hint = fmt.Sprint(round) }))
		}},
		"sign": {shared, func(w *world, all []*entry.Entry, round int) {
			w.entries.put(edit(all[0], round, func(e *entry.Entry) { e.DNSNames = []string{fmt.Sprint("n", round)} }))
		}},
		"bundle": {func(i int) string { return fmt.Sprint("unix:user:w", i) }, func(w *world, _ []*entry.Entry, _ int) {
			w.ca.change(func() { w.ca.own = w.ca.own.Clone() })
		}},
		"each": {func(i int) string { return fmt.Sprint("unix:user:w", i) }, func(w *world, all []*entry.Entry, round int) {
			next := make([]*entry.Entry, len(all))
			for i, e := range all {
				next[i] = edit(e, round, func(e *entry.Entry) { e.Hint = fmt.Sprint(round) })
			}
			w.entries.put(next...)
		}},
	} {
		b.Run(name, func(b *testing.B) {
			w, all := benchWorld(b, n)
			var left atomic.Int64
			done := make(chan struct{}, 1)
			subs := make([]*svid.Subscription, n)
			var ready sync.WaitGroup
			ready.Add(1)
			for i := range subs {
				subs[i], _ = w.m.Subscribe(newCaller(fmt.Sprint(i), s.selector(i)), func() {
					ready.Wait()
					subs[i].Update()
					if left.Add(-1) == 0 {
						done <- struct{}{}
					}
				})
				defer subs[i].Close()
			}
			ready.Done()
			for st := w.m.Status(); st.Unsigned > 0 || !st.Synced; st = w.m.Status() {
				time.Sleep(time.Millisecond)
			}
			time.Sleep(50 * time.Millisecond)
			b.ResetTimer()
			for i := range b.N {
				left.Store(n)
				s.change(w, all, i+1)
				<-done
			}
		})
	}
}

// BenchmarkIssue is an entry created until its parked caller has the SVID, the
// authority's own work included; among idle and among 1,000 parked callers.
func BenchmarkIssue(b *testing.B) {
	for _, parked := range []int{1, 1000} {
		b.Run(fmt.Sprintf("parked=%d", parked), func(b *testing.B) {
			w, _ := benchWorld(b, 0)
			for i := range parked - 1 {
				s, _ := w.m.Subscribe(newCaller(fmt.Sprint(i), fmt.Sprint("unix:user:other", i)), func() {})
				_ = s.Park("default")
				defer s.Close()
			}
			done := make(chan struct{}, 1)
			var sub *svid.Subscription
			sub, _ = w.m.Subscribe(newCaller("w", "unix:user:w"), func() {
				if len(sub.Update().Identities) == 1 {
					done <- struct{}{}
				}
			})
			defer sub.Close()
			for !w.m.Status().Synced {
				time.Sleep(time.Millisecond)
			}
			e := workload("w")
			b.ResetTimer()
			for range b.N {
				w.entries.put(e)
				<-done
				b.StopTimer()
				w.entries.with(nil, e.ID)
				for len(sub.Update().Identities) != 0 {
					runtime.Gosched()
				}
				b.StartTimer()
			}
		})
	}
}
