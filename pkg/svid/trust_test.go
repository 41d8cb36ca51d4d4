package svid_test

import (
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"

	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

func bundleOf(cas ...*ca) *spiffebundle.Bundle {
	b := spiffebundle.New(td)
	for _, c := range cas {
		b.AddX509Authority(c.cert)
	}
	return b
}

// TestGenerations: one number per content, whatever else changes in a bundle.
func TestGenerations(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		first, second := newCA(), newCA()
		auth := newAuthority()
		auth.own = bundleOf(first)
		w := run(t, auth, newEntries(workload("web")))
		synctest.Wait()
		sub := w.subscribe(newCaller("web", "unix:user:web"))
		<-w.m.TrustChanged()
		one := w.m.Trust().Roots()
		if one.Number == 0 || !slices.Equal(one.IDs, []string{first.id()}) || sub.Update().Roots != one.Number {
			t.Fatalf("%+v, in the picture %d", one, sub.Update().Roots)
		}
		w.ca.change(func() { // another JWT key and a new pointer: the roots are the same
			auth.own = bundleOf(first)
			must(auth.own.AddJWTAuthority("k1", newCA().key.Public()))
		})
		synctest.Wait()
		if got := w.m.Trust().Roots().Number; got != one.Number {
			t.Errorf("generation %d, was %d", got, one.Number)
		}
		if keys := w.m.Trust().Keys(); !slices.Equal(keys.IDs, []string{"k1"}) || sub.Update().Keys != keys.Number {
			t.Errorf("%+v", keys)
		}
		<-w.m.TrustChanged()
		w.ca.change(func() { auth.own = bundleOf(first, second) })
		synctest.Wait()
		<-w.m.TrustChanged()
		two := w.m.Trust().Roots()
		if two.Number == one.Number || len(two.IDs) != 2 || sub.Update().Roots != two.Number {
			t.Errorf("%+v after %+v", two, one)
		}
		if old := w.m.Trust().RootsAt(one.Number); !slices.Equal(old, one.IDs) {
			t.Errorf("the generation before was %v", old)
		}
		w.ca.change(func() { auth.own = bundleOf(first) })
		synctest.Wait()
		if got := w.m.Trust().Roots(); got.Number != one.Number {
			t.Errorf("a content that came back has number %d, had %d", got.Number, one.Number)
		}
	})
}

// TestRevokedWithoutTaint: whoever missed the taint sees only a bundle without
// the root, and replaces what hangs on it all the same.
func TestRevokedWithoutTaint(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		auth := newAuthority()
		first, second := auth.ca, newCA()
		auth.own = bundleOf(first)
		w := run(t, auth, newEntries(workload("web")))
		synctest.Wait()
		s := w.subscribe(newCaller("web", "unix:user:web"))
		synctest.Wait()
		before := serial(s.Update())
		w.ca.change(func() { auth.ca, auth.own = second, bundleOf(first, second) })
		advance(time.Minute)
		if serial(s.Update()) != before || w.m.Outdated() != 0 {
			t.Fatal("replaced although its root is good")
		}
		w.ca.change(func() { auth.own = bundleOf(second) })
		synctest.Wait()
		if serial(s.Update()) != before || w.m.Outdated() != 1 {
			t.Errorf("the old SVID did not stay; %d outdated", w.m.Outdated())
		}
		advance(3 * time.Second)
		if serial(s.Update()) == before || w.m.Outdated() != 0 {
			t.Errorf("not replaced; %d outdated", w.m.Outdated())
		}
	})
}

// TestTaintSpreads: those with a caller are replaced within moments, those held
// for pods that have left or not come yet after them, and none of them at once.
func TestTaintSpreads(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const n = 50
		auth := newAuthority()
		var all []*entry.Entry
		for i := range 2 * n {
			all = append(all, workload(fmt.Sprint("w", i)))
		}
		w := run(t, auth, newEntries(all...))
		synctest.Wait()
		for i := range n {
			w.subscribe(newCaller(fmt.Sprint("w", i), fmt.Sprint("unix:user:w", i)))
			w.m.Warm(newCaller("", fmt.Sprint("unix:user:w", n+i)).Selectors())
		}
		synctest.Wait()
		auth.set(func() { auth.asked = nil })
		old := auth.ca.id()
		auth.change(func() {
			next := newCA()
			auth.ca, auth.own, auth.tainted = next, bundleOf(auth.ca, next), map[string]bool{old: true}
		})
		synctest.Wait()
		if at := auth.signs(); at > n/2 {
			t.Errorf("%d of %d in the first instant", at, 2*n)
		}
		advance(time.Second)
		if at := auth.signs(); at == 0 {
			t.Error("none within a second")
		}
		advance(time.Second)
		used := 0
		for _, id := range auth.asked {
			var i int
			if _, err := fmt.Sscanf(id, "entry-w%d", &i); err == nil && i < n {
				used++
			}
		}
		if used != n || w.m.Outdated() == 0 {
			t.Errorf("%d of %d in use replaced after 2 s, %d outdated", used, n, w.m.Outdated())
		}
		advance(30 * time.Second)
		if auth.signs() != 2*n || w.m.Outdated() != 0 {
			t.Errorf("%d of %d replaced in the end, %d outdated", auth.signs(), 2*n, w.m.Outdated())
		}
	})
}
