package svid_test

import (
	"crypto/x509"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

func TestSyncedOnlyAfterBothAnswered(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ca, entries := newAuthority(), newEntries()
		ca.silent, entries.silent = true, true
		w := run(t, ca, entries)
		s := w.subscribe(newCaller("web", "unix:user:web"))
		synctest.Wait()
		if s.Update().Synced || w.m.Status().Synced {
			t.Fatal("synced before anybody answered")
		}
		entries.speak()
		synctest.Wait()
		if s.Update().Synced {
			t.Fatal("synced without bundles")
		}
		ca.change(func() { ca.silent = false })
		synctest.Wait()
		if u := s.Update(); !u.Synced || u.Own == nil || s.told.Load() != 1 {
			t.Errorf("%+v, told %d times", u, s.told.Load())
		}
	})
}

func TestSelectorsFollowThePod(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := run(t, newAuthority(), newEntries(workload("web"), workload("db")))
		c := newCaller("pod")
		s, other := w.subscribe(c), w.subscribe(c)
		synctest.Wait()
		told := s.told.Load()
		if len(s.Update().Identities) != 0 {
			t.Fatal("an identity without selectors")
		}
		c.become("unix:user:web")
		synctest.Wait()
		if u := s.Update(); len(u.Identities) != 1 || u.Identities[0].SVID.ID.Path() != "/web" || u != other.Update() {
			t.Fatalf("%+v", u)
		}
		c.become("unix:user:web", "unix:user:db")
		synctest.Wait()
		if u := s.Update(); len(u.Identities) != 2 {
			t.Fatalf("%+v", u)
		}
		c.become("unix:user:db")
		synctest.Wait()
		if u := s.Update(); len(u.Identities) != 1 || u.Identities[0].SVID.ID.Path() != "/db" {
			t.Fatalf("%+v", u)
		}
		if n := s.told.Load() - told; n != 3 {
			t.Errorf("told %d times of 3 changes", n)
		}
		c.become("unix:user:db", "unix:uid:7")
		synctest.Wait()
		if n := s.told.Load() - told; n != 3 {
			t.Error("told of a selector that changes nothing")
		}
		if n := c.watchers(); n != 1 {
			t.Errorf("two streams watch the caller %d times", n)
		}
		s.Close()
		s.Close()
		other.Close()
		if n := c.watchers(); n != 0 {
			t.Errorf("%d watches left", n)
		}
		if _, ok := w.m.Inspect(c); ok {
			t.Error("the caller is still known")
		}
		if _, groups, _ := w.m.Records(); groups != 0 {
			t.Errorf("%d groups left", groups)
		}
	})
}

func TestOrderOfIdentities(t *testing.T) {
	t.Parallel()
	few, many := workload("b"), workload("a", "unix:uid:1")
	many.ID = "z"
	hinted := workload("c")
	hinted.Hint = "me"
	for name, c := range map[string]struct {
		edit func(*svid.Config)
		want string
	}{
		"node":  {func(*svid.Config) {}, "/a"},
		"spire": {func(c *svid.Config) { c.Order = entry.OrderSPIRE }, "/b"},
		"hint":  {func(c *svid.Config) { c.DefaultHint = "me" }, "/c"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := run(t, newAuthority(), newEntries(few, many, hinted), c.edit)
				s := w.subscribe(newCaller("x", "unix:user:a", "unix:user:b", "unix:user:c", "unix:uid:1"))
				synctest.Wait()
				u := s.Update()
				if len(u.Identities) != 3 || u.Identities[0].SVID.ID.Path() != c.want {
					t.Fatalf("%+v", u.Identities[0].SVID.ID)
				}
				// A change that moves the default is news without a new SVID.
				told := s.told.Load()
				w.entries.put(edited(u.Identities[0].Entry, func(e *entry.Entry) { e.Fallback, e.Hint = true, "" }))
				synctest.Wait()
				if moved := s.Update().Identities[0].SVID.ID.Path() != c.want; moved != (name != "spire") {
					t.Errorf("default moved: %v", moved)
				}
				if n := s.told.Load() - told; name == "node" && n != 1 {
					t.Errorf("told %d times", n)
				}
			})
		})
	}
}

func TestSecretStoreEntriesAreNotServed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		stored := workload("web")
		stored.StoreSVID = true
		w := run(t, newAuthority(), newEntries(stored))
		s := w.subscribe(newCaller("web", "unix:user:web"))
		synctest.Wait()
		w.entries.put(edited(stored, func(e *entry.Entry) { e.Hint = "x" }))
		synctest.Wait()
		if u := s.Update(); len(u.Identities)+len(u.Late) != 0 || w.ca.signs() != 0 {
			t.Errorf("%+v", u)
		}
		w.entries.put(edited(stored, func(e *entry.Entry) { e.StoreSVID, e.Revision = false, 2 }))
		synctest.Wait()
		if u := s.Update(); len(u.Identities) != 1 {
			t.Errorf("%+v", u)
		}
		w.entries.put(edited(stored, func(e *entry.Entry) { e.Revision = 3 }))
		synctest.Wait()
		if u := s.Update(); len(u.Identities)+len(u.Late) != 0 {
			t.Errorf("%+v", u)
		}
	})
}

func TestBundles(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		partner := spiffeid.RequireTrustDomainFromString("partner.org")
		fed := workload("fed")
		fed.FederatesWith = []spiffeid.TrustDomain{partner}
		w := run(t, newAuthority(), newEntries(fed, workload("web")))
		a, b := w.subscribe(newCaller("fed", "unix:user:fed")), w.subscribe(newCaller("web", "unix:user:web"))
		synctest.Wait()
		toldA, toldB := a.told.Load(), b.told.Load()
		bundle := spiffebundle.FromX509Authorities(partner, []*x509.Certificate{newCA().cert})
		w.ca.change(func() { w.ca.feds = map[spiffeid.TrustDomain]*spiffebundle.Bundle{partner: bundle} })
		synctest.Wait()
		if a.Update().Federated[partner] != bundle || a.told.Load() != toldA+1 {
			t.Error("a federated bundle did not arrive")
		}
		if b.Update().Federated != nil || b.told.Load() != toldB {
			t.Error("told of a bundle that is not for this caller")
		}
		own := w.ca.own.Clone()
		own.AddX509Authority(newCA().cert)
		w.ca.change(func() { w.ca.own = own })
		synctest.Wait()
		if a.Update().Own != own || b.Update().Own != own || a.told.Load() != toldA+2 || b.told.Load() != toldB+1 {
			t.Error("the own bundle did not reach everybody once")
		}
		w.ca.change(func() {})
		synctest.Wait()
		if a.told.Load() != toldA+2 {
			t.Error("told of a version without a change")
		}
	})
}

func TestManyChangesAtOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		web := workload("web")
		w := run(t, newAuthority(), newEntries(web))
		s := w.subscribe(newCaller("web", "unix:user:web", "unix:user:w7"))
		synctest.Wait()
		first := serial(s.Update())
		var many []*entry.Entry
		for i := range 5000 {
			many = append(many, workload(fmt.Sprint("w", i)))
		}
		w.entries.put(many...)
		synctest.Wait()
		u := s.Update()
		if len(u.Identities) != 2 || u.Identities[1].SVID.Serial != first || w.ca.signs() != 2 {
			t.Fatalf("%+v, %d signatures", u, w.ca.signs())
		}
		gone := make([]string, 0, 5000)
		for _, e := range many {
			gone = append(gone, e.ID)
		}
		w.entries.with(nil, gone...)
		synctest.Wait()
		if u := s.Update(); len(u.Identities) != 1 || serial(u) != first {
			t.Fatalf("%+v", u)
		}
	})
}

func TestWarm(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		lazy := workload("pod")
		lazy.ID, lazy.DisableX509SVIDPrefetch = "entry-lazy", true
		w := run(t, newAuthority(), newEntries(workload("pod"), lazy))
		synctest.Wait()
		w.m.Warm(attest.MustSelectors("unix:user:pod", "unix:user:late"))
		w.m.Warm(attest.MustSelectors("unix:user:pod", "unix:user:late"))
		synctest.Wait()
		if n := w.ca.signs(); n != 1 {
			t.Fatalf("%d signed in advance, want 1", n)
		}
		advance(time.Second)
		w.entries.put(workload("late"))
		synctest.Wait()
		if n := w.ca.signs(); n != 2 {
			t.Fatalf("%d signed after the entry came, want 2", n)
		}
		s := w.subscribe(newCaller("pod", "unix:user:pod", "unix:user:late", "unix:uid:5"))
		if u := s.Update(); len(u.Identities) != 2 || len(u.Late) != 1 {
			t.Fatalf("not ready when the pod called: %+v", u)
		}
		synctest.Wait()
		if u := s.Update(); len(u.Identities) != 3 {
			t.Errorf("%+v", u)
		}
		s.Close()
		advance(3 * time.Hour)
		if n := w.ca.signs(); n != 3 {
			t.Errorf("%d signatures: a pod that left is renewed", n)
		}
		if r, g, a := w.m.Records(); r+g+a != 0 {
			t.Errorf("left over: %d records, %d groups, %d alarms", r, g, a)
		}
	})
}

func TestIdleSVIDsAreBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var all []*entry.Entry
		for i := range 50 {
			all = append(all, workload(fmt.Sprint("w", i)))
		}
		w := run(t, newAuthority(), newEntries(all...), func(c *svid.Config) { c.MaxIdle = 10 })
		for i := range 50 {
			s := w.subscribe(newCaller("x", fmt.Sprint("unix:user:w", i)))
			synctest.Wait()
			if serial(s.Update()) == "" {
				t.Fatal("no SVID")
			}
			s.Close()
		}
		if n := w.m.Status().SVIDs; n != 10 {
			t.Errorf("%d SVIDs kept, want 10", n)
		}
		for i := range 50 {
			w.m.Warm(attest.MustSelectors(fmt.Sprint("unix:user:w", i)))
		}
		synctest.Wait()
		if n := w.m.Status().SVIDs; n > 10 {
			t.Errorf("%d SVIDs kept for expected pods, want at most 10", n)
		}
		n := w.ca.signs()
		advance(time.Minute)
		if w.ca.signs() != n {
			t.Error("signing goes on")
		}
		s := w.subscribe(newCaller("x", "unix:user:w49"))
		synctest.Wait()
		if serial(s.Update()) == "" {
			t.Error("a caller is not served because of the idle ones")
		}
	})
}

// What was used last stays longest; what is in use always stays.
func TestLeastRecentlyUsedGoesFirst(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var all []*entry.Entry
		for i := range 20 {
			all = append(all, workload(fmt.Sprint("w", i)))
		}
		w := run(t, newAuthority(), newEntries(all...), func(c *svid.Config) { c.MaxIdle = 5 })
		call := func(i int) (string, *svid.Subscription) {
			s := w.subscribe(newCaller("x", fmt.Sprint("unix:user:w", i)))
			synctest.Wait()
			return serial(s.Update()), s.Subscription
		}
		inUse := map[int]string{}
		for i := range 10 {
			inUse[i], _ = call(i)
		}
		left := map[int]string{}
		visit := func(i int) {
			number, s := call(i)
			left[i] = number
			s.Close()
			advance(10 * time.Second) // it lingers
		}
		for i := 10; i < 15; i++ {
			visit(i)
		}
		visit(10) // used again
		visit(15) // one too many: 11 has to go
		for _, i := range []int{12, 13, 14, 10, 15} {
			number, s := call(i)
			if number != left[i] {
				t.Errorf("w%d was let go", i)
			}
			s.Close()
		}
		if number, _ := call(11); number == left[11] {
			t.Error("w11 was kept, used longest ago")
		}
		for i, number := range inUse {
			if got, _ := call(i); got != number {
				t.Errorf("w%d is in use and was replaced", i)
			}
		}
	})
}

func TestExpectedPodsComeBeforeDepartedOnes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var all []*entry.Entry
		for i := range 30 {
			all = append(all, workload(fmt.Sprint("w", i)))
		}
		w := run(t, newAuthority(), newEntries(all...), func(c *svid.Config) { c.MaxIdle = 10 })
		synctest.Wait()
		for i := range 10 {
			w.subscribe(newCaller("x", fmt.Sprint("unix:user:w", i))).Close()
			s := w.subscribe(newCaller("x", fmt.Sprint("unix:user:w", i)))
			synctest.Wait()
			s.Close()
		}
		for i := 10; i < 30; i++ {
			w.m.Warm(attest.MustSelectors(fmt.Sprint("unix:user:w", i)))
			synctest.Wait()
		}
		ready := 0
		for i := 10; i < 30; i++ {
			if serial(w.subscribe(newCaller("x", fmt.Sprint("unix:user:w", i))).Update()) != "" {
				ready++
			}
		}
		if ready != 10 {
			t.Errorf("%d of 20 expected pods were ready, want as many as there is room for: 10", ready)
		}
	})
}

func TestClosedSubscription(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := run(t, newAuthority(), newEntries(workload("web"), workload("db")))
		synctest.Wait()
		w.entries.put(edited(workload("db"), func(e *entry.Entry) { e.X509SVIDTTL = 2 * time.Hour }))
		s := w.subscribe(newCaller("web", "unix:user:web", "unix:user:db"))
		synctest.Wait()
		s.Close()
		told := s.told.Load()
		if u := s.Update(); len(u.Identities) != 2 {
			t.Errorf("%+v", u)
		}
		time.Sleep(90 * time.Minute)
		if u := s.Update(); len(u.Identities) != 1 || u.Identities[0].Entry.ID != "entry-db" || len(u.Late) != 1 {
			t.Errorf("%+v", u)
		}
		time.Sleep(time.Hour)
		if u := s.Update(); len(u.Identities) != 0 || len(u.Late) != 2 {
			t.Errorf("%+v", u)
		}
		if s.told.Load() != told {
			t.Error("told after Close")
		}
	})
}

func TestKeptForThoseWhoComeBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := run(t, newAuthority(), newEntries(workload("web")))
		s := w.subscribe(newCaller("web", "unix:user:web"))
		synctest.Wait()
		first := serial(s.Update())
		s.Close()
		w.ca.set(func() { w.ca.fail = func(string) error { return fmt.Errorf("away") } })
		advance(50 * time.Minute)
		s = w.subscribe(newCaller("web", "unix:user:web"))
		if got := serial(s.Update()); got != first {
			t.Errorf("got %q, want %q: valid, and the authority is away", got, first)
		}
		w.ca.set(func() { w.ca.fail = nil })
		advance(time.Minute)
		if serial(s.Update()) == first {
			t.Error("not renewed though it is past half of its life")
		}
	})
}

func TestSnapshot(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := run(t, newAuthority(), newEntries(workload("web")))
		synctest.Wait()
		c := newCaller("web", "unix:user:web")
		u, err := w.m.Snapshot(c)
		if err != nil || len(u.Late) != 1 {
			t.Fatalf("%+v %v", u, err)
		}
		synctest.Wait()
		u, _ = w.m.Snapshot(c)
		if len(u.Identities) != 1 || c.watchers() != 1 {
			t.Fatalf("%+v", u)
		}
		for range 10 {
			advance(4 * time.Second)
			if again, _ := w.m.Snapshot(c); again != u {
				t.Fatal("not the same picture")
			}
		}
		if c.watchers() != 1 {
			t.Error("the match was not kept")
		}
		advance(10 * time.Second)
		if c.watchers() != 0 {
			t.Error("the match is kept for ever")
		}
		if _, err := w.m.Snapshot(nil); err == nil {
			t.Error("nobody got a snapshot")
		}
		if _, err := w.m.Subscribe(nil, nil); err == nil {
			t.Error("nobody got a subscription")
		}
	})
}

func TestEqualResultsAreShared(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := run(t, newAuthority(), newEntries(workload("web")))
		a := w.subscribe(newCaller("a", "unix:user:web", "unix:uid:1"))
		b := w.subscribe(newCaller("b", "unix:user:web", "unix:uid:2"))
		synctest.Wait()
		if a.Update() != b.Update() {
			t.Error("two replicas have two pictures")
		}
	})
}

func TestFaultyCallback(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := run(t, newAuthority(), newEntries())
		bad, err := w.m.Subscribe(newCaller("web", "unix:user:web"), func() { panic("oops") })
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(bad.Close)
		var again atomic.Int64
		var self atomic.Pointer[svid.Subscription]
		sub, err := w.m.Subscribe(newCaller("web", "unix:user:web"), func() {
			again.Add(1)
			// A callback may use the manager; it may come before Subscribe
			// has returned.
			if s := self.Load(); s != nil {
				s.Update()
			}
			s, _ := w.m.Subscribe(newCaller("x"), func() {})
			s.Close()
		})
		if err != nil {
			t.Fatal(err)
		}
		self.Store(sub)
		t.Cleanup(sub.Close)
		synctest.Wait()
		n := again.Load()
		w.entries.put(workload("web"))
		synctest.Wait()
		if again.Load() != n+1 {
			t.Error("one faulty callback kept another from being called")
		}
	})
}

// hasty is a caller whose selectors change while they are asked for the first
// time, and whose notification is dealt with before the answer is.
type hasty struct {
	*caller
	asked atomic.Bool
}

func (h *hasty) Selectors() attest.Selectors {
	before := h.caller.Selectors()
	if !h.asked.Swap(true) {
		h.become("unix:user:web")
		synctest.Wait()
	}
	return before
}

func TestSelectorsChangeWhileSubscribing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := run(t, newAuthority(), newEntries(workload("web")))
		synctest.Wait()
		sub, err := w.m.Subscribe(&hasty{caller: newCaller("web", "unix:user:other")}, func() {})
		must(err)
		t.Cleanup(sub.Close)
		synctest.Wait()
		if serial(sub.Update()) == "" {
			t.Error("the change was lost")
		}
	})
}
