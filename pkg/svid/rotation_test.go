package svid_test

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

func TestRotationOverManyLives(t *testing.T) {
	t.Parallel()
	for _, ttl := range []time.Duration{2 * time.Second, time.Minute, time.Hour, 2 * 24 * time.Hour} {
		t.Run(ttl.String(), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				web := workload("web")
				web.X509SVIDTTL = ttl
				w := run(t, newAuthority(), newEntries(web))
				synctest.Wait()
				s := w.subscribe(newCaller("web", "unix:user:web"))
				synctest.Wait()
				const lives, steps = 20, 20
				seen := map[string]bool{}
				for range lives * steps {
					advance(ttl / steps)
					u := s.Update()
					if len(u.Identities) != 1 || !time.Now().Before(u.Identities[0].SVID.NotAfter) {
						t.Fatalf("%+v", u)
					}
					seen[serial(u)] = true
				}
				if n := int(s.told.Load()); n != w.ca.signs() || len(seen) < lives*3/2 || len(seen) > lives*3 {
					t.Errorf("%d pushes and %d signatures in %d lives, want about two per life and as many of each", n, w.ca.signs(), lives)
				}
			})
		})
	}
}

func TestRenewalsAreSpread(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const n = 200
		var all []*entry.Entry
		for i := range n {
			all = append(all, workload(fmt.Sprint("w", i)))
		}
		w := run(t, newAuthority(), newEntries(all...))
		synctest.Wait()
		var callers []*caller
		for i := range n {
			c := newCaller(fmt.Sprint("w", i), fmt.Sprint("unix:user:w", i))
			w.subscribe(c)
			callers = append(callers, c)
		}
		synctest.Wait()
		plan := func() (first, last time.Time) {
			for _, c := range callers {
				in, ok := w.m.Inspect(c)
				if !ok || len(in.Entries) != 1 || in.Entries[0].Serial == "" {
					t.Fatalf("%+v %v", in, ok)
				}
				at := in.Entries[0].NextRenewal
				if first.IsZero() || at.Before(first) {
					first = at
				}
				if at.After(last) {
					last = at
				}
			}
			return first, last
		}
		first, last := plan()
		if spread := last.Sub(first); spread < 8*time.Minute || spread > 13*time.Minute {
			t.Errorf("renewals of SVIDs of 1 h lie within %s, want about 12 min", spread)
		}
		time.Sleep(10 * time.Minute)
		if f, l := plan(); f != first || l != last {
			t.Error("the renewal time was drawn again")
		}
	})
}

func TestFailuresAreRetriedWithPauses(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ca := newAuthority()
		var mu sync.Mutex
		var asked []time.Time
		ca.fail = func(string) error {
			mu.Lock()
			defer mu.Unlock()
			asked = append(asked, time.Now())
			return fmt.Errorf("disk: %w", authority.ErrTryLater)
		}
		w := run(t, ca, newEntries(workload("web")))
		synctest.Wait()
		c := newCaller("web", "unix:user:web")
		s := w.subscribe(c)
		advance(10 * time.Minute)
		mu.Lock()
		defer mu.Unlock()
		if len(asked) < 20 || len(asked) > 40 {
			t.Errorf("asked %d times in 10 min", len(asked))
		}
		for i := 1; i < len(asked); i++ {
			if gap := asked[i].Sub(asked[i-1]); gap < 250*time.Millisecond || gap > 30*time.Second {
				t.Errorf("pause %d is %s", i, gap)
			}
		}
		in, _ := w.m.Inspect(c)
		if e := in.Entries[0]; e.LastError == "" || e.Failures != len(asked) || !e.NextTry.After(time.Now()) || e.Refused {
			t.Errorf("%+v", e)
		}
		if u := s.Update(); len(u.Late) != 1 || len(u.Identities) != 0 {
			t.Errorf("%+v", u)
		}
		if st := w.m.Status(); st.Unsigned != 1 || st.LastError == "" {
			t.Errorf("%+v", st)
		}
		ca.set(func() { ca.fail = nil })
		advance(30 * time.Second)
		if serial(s.Update()) == "" || s.told.Load() != 1 {
			t.Errorf("after recovery: %+v, told %d times", s.Update(), s.told.Load())
		}
	})
}

func TestRecoveryIsForAll(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ca := newAuthority()
		ca.fail = func(string) error { return authority.ErrNotReady }
		w := run(t, ca, newEntries(workload("a"), workload("b"), workload("c")))
		synctest.Wait()
		var all []*stream
		for _, n := range []string{"a", "b", "c"} {
			all = append(all, w.subscribe(newCaller(n, "unix:user:"+n)))
		}
		advance(10 * time.Minute)
		ca.set(func() { ca.fail = nil })
		for all[0].told.Load()+all[1].told.Load()+all[2].told.Load() == 0 {
			advance(100 * time.Millisecond)
		}
		for i, s := range all {
			if serial(s.Update()) == "" {
				t.Errorf("stream %d still sits out its pause", i)
			}
		}
	})
}

func TestRefusedIsNotAskedAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ca := newAuthority()
		ca.fail = func(id string) error {
			if id == "entry-web" {
				return fmt.Errorf("entry not found: %w", authority.ErrRefused)
			}
			return nil
		}
		web := workload("web")
		w := run(t, ca, newEntries(web, workload("db")))
		synctest.Wait()
		c := newCaller("web", "unix:user:web", "unix:user:db")
		s := w.subscribe(c)
		advance(time.Hour / 4)
		if n := ca.signs(); n != 2 {
			t.Fatalf("asked %d times for two entries", n)
		}
		if u := s.Update(); len(u.Identities) != 1 || len(u.Late) != 1 || u.Late[0].ID != "entry-web" {
			t.Fatalf("one refused entry must not keep the other back: %+v", u)
		}
		if in, _ := w.m.Inspect(c); !in.Entries[0].Refused && !in.Entries[1].Refused {
			t.Errorf("not shown: %+v", in)
		}
		ca.set(func() { ca.fail = nil })
		w.entries.put(edited(web, func(e *entry.Entry) { e.Hint = "x" }))
		synctest.Wait()
		if u := s.Update(); len(u.Identities) != 2 {
			t.Errorf("after the entry changed: %+v", u)
		}
	})
}

func TestWaitingGoesFirst(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ca := newAuthority()
		var all []*entry.Entry
		for i := range 20 {
			all = append(all, workload(fmt.Sprint("w", i)))
		}
		w := run(t, ca, newEntries(append(all, workload("urgent"))...), func(c *svid.Config) { c.Workers = 1 })
		synctest.Wait()
		for i := range 20 {
			w.subscribe(newCaller(fmt.Sprint("w", i), fmt.Sprint("unix:user:w", i)))
		}
		synctest.Wait()
		ca.set(func() { ca.delay, ca.asked = time.Second, nil })
		old := ca.ca.id()
		ca.change(func() { ca.ca, ca.tainted = newCA(), map[string]bool{old: true} })
		synctest.Wait()
		s := w.subscribe(newCaller("urgent", "unix:user:urgent"))
		advance(2100 * time.Millisecond)
		if serial(s.Update()) == "" {
			t.Errorf("the waiting caller is not served second of 21; asked for %v", ca.asked)
		}
	})
}

func TestWorkersAreBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ca := newAuthority()
		ca.delay = time.Second
		var all []*entry.Entry
		for i := range 20 {
			all = append(all, workload(fmt.Sprint("w", i)))
		}
		w := run(t, ca, newEntries(all...), func(c *svid.Config) { c.Workers = 5 })
		synctest.Wait()
		for i := range 20 {
			c := newCaller(fmt.Sprint("w", i), fmt.Sprint("unix:user:w", i))
			w.subscribe(c)
			w.subscribe(c) // one flight per entry
		}
		advance(4100 * time.Millisecond)
		if ca.most.Load() != 5 || ca.signs() != 20 {
			t.Errorf("%d at a time, %d in all", ca.most.Load(), ca.signs())
		}
	})
}

func TestExpiredIsNotHandedOut(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := run(t, newAuthority(), newEntries(workload("web")))
		synctest.Wait()
		s := w.subscribe(newCaller("web", "unix:user:web"))
		synctest.Wait()
		end := s.Update().Identities[0].SVID.NotAfter
		w.ca.set(func() { w.ca.fail = func(string) error { return errors.New("away") } })
		advance(time.Until(end) - time.Nanosecond)
		if serial(s.Update()) == "" {
			t.Fatal("a valid SVID was taken away")
		}
		told := s.told.Load()
		advance(time.Nanosecond)
		if u := s.Update(); len(u.Identities) != 0 || len(u.Late) != 1 {
			t.Fatalf("%+v", u)
		}
		if n := s.told.Load() - told; n != 1 {
			t.Errorf("told %d times of the expiry", n)
		}
		advance(3 * time.Hour)
		w.ca.set(func() { w.ca.fail = nil })
		advance(30 * time.Second)
		if serial(s.Update()) == "" || s.told.Load() != told+2 {
			t.Error("not served after the authority came back")
		}
	})
}

func TestWallClockJumps(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var offset atomic.Int64
		clock := func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }
		ca := newAuthority()
		ca.now = clock
		m, err := svid.New(svid.Config{Authority: ca, Entries: newEntries(workload("web"))})
		if err != nil {
			t.Fatal(err)
		}
		m.SetWallClock(clock)
		w := &world{t: t, m: m, ca: ca}
		w.start()
		s := w.subscribe(newCaller("web", "unix:user:web"))
		synctest.Wait()
		first := serial(s.Update())

		// Forward, past the expiry, while the authority is away.
		ca.set(func() { ca.fail = func(string) error { return errors.New("away") } })
		offset.Store(int64(2 * time.Hour))
		if u := s.Update(); len(u.Identities) != 0 || len(u.Late) != 1 {
			t.Fatalf("expired by the new clock, but handed out: %+v", u)
		}
		ca.set(func() { ca.fail = nil })
		advance(time.Minute)
		second := s.Update()
		if s := serial(second); s == "" || s == first {
			t.Fatalf("%+v", second)
		}

		// Back: what was issued is not valid yet.
		offset.Store(0)
		advance(time.Minute)
		third := s.Update()
		if serial(third) == serial(second) || third.Identities[0].SVID.NotBefore.After(time.Now()) {
			t.Errorf("still the one from the future: %+v", third.Identities[0].SVID.NotBefore)
		}
		n := ca.signs()
		advance(10 * time.Minute)
		if ca.signs() != n {
			t.Errorf("%d more signatures in 10 quiet minutes", ca.signs()-n)
		}
	})
}

func TestAuthorityClockAhead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ca := newAuthority()
		ca.now = func() time.Time { return time.Now().Add(20 * time.Minute) }
		w := run(t, ca, newEntries(workload("web")))
		synctest.Wait()
		s := w.subscribe(newCaller("web", "unix:user:web"))
		advance(2 * time.Hour)
		if n := ca.signs(); n > 10 {
			t.Errorf("%d signatures in 2 h", n)
		}
		ca.set(func() { ca.now = func() time.Time { return time.Now().Add(-2 * time.Hour) } })
		n := ca.signs()
		advance(3 * time.Hour)
		if d := ca.signs() - n; d < 10 || d > 500 {
			t.Errorf("%d tries in 3 h with certificates expired on arrival", d)
		}
		if u := s.Update(); len(u.Identities) != 0 {
			t.Errorf("%+v", u)
		}
	})
}

func TestTaintWithoutGap(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := run(t, newAuthority(), newEntries(workload("web")))
		synctest.Wait()
		var gaps atomic.Int64
		var self atomic.Pointer[svid.Subscription]
		sub, err := w.m.Subscribe(newCaller("web", "unix:user:web"), func() {
			if s := self.Load(); s != nil && len(s.Update().Identities) == 0 {
				gaps.Add(1)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(sub.Close)
		synctest.Wait()
		self.Store(sub)
		first := serial(sub.Update())
		old := w.ca.ca.id()
		w.ca.change(func() { w.ca.ca, w.ca.tainted, w.ca.delay = newCA(), map[string]bool{old: true}, time.Second })
		synctest.Wait()
		if serial(sub.Update()) != first {
			t.Fatal("the old SVID did not stay")
		}
		advance(4 * time.Second)
		u := sub.Update()
		if serial(u) == first || u.Identities[0].SVID.Certificates[0].CheckSignatureFrom(w.ca.ca.cert) != nil {
			t.Error("not replaced by one of the new authority")
		}
		if gaps.Load() != 0 {
			t.Errorf("%d updates without an identity", gaps.Load())
		}
		if n := w.ca.signs(); n != 2 {
			t.Errorf("%d signatures", n)
		}
	})
}

func TestAuthorityKeepsSigningTainted(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := run(t, newAuthority(), newEntries(workload("web")))
		synctest.Wait()
		s := w.subscribe(newCaller("web", "unix:user:web"))
		synctest.Wait()
		id := w.ca.ca.id()
		w.ca.change(func() { w.ca.tainted = map[string]bool{id: true} })
		advance(5 * time.Minute)
		if n := w.ca.signs(); n < 5 || n > 30 {
			t.Errorf("%d signatures in 5 min", n)
		}
		if serial(s.Update()) == "" {
			t.Error("no identity")
		}
		w.ca.set(func() { w.ca.ca = newCA() })
		advance(30 * time.Second)
		n := w.ca.signs()
		advance(5 * time.Minute)
		if w.ca.signs() != n {
			t.Error("still being replaced")
		}
	})
}

func TestEntryChangesWhileItIsSigned(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		web := workload("web")
		ca := newAuthority()
		ca.delay = time.Second
		w := run(t, ca, newEntries(web))
		synctest.Wait()
		s := w.subscribe(newCaller("web", "unix:user:web"))
		advance(time.Second / 2)
		w.entries.put(edited(web, func(e *entry.Entry) { e.DNSNames = []string{"web.example.org"} }))
		advance(3 * time.Second)
		u := s.Update()
		if len(u.Identities) != 1 || len(u.Identities[0].SVID.Certificates[0].DNSNames) != 1 || s.told.Load() != 1 {
			t.Errorf("%+v, told %d times", u, s.told.Load())
		}
		w.entries.put(edited(web, func(e *entry.Entry) { e.X509SVIDTTL, e.Revision = time.Minute, 3 }))
		advance(time.Second / 2)
		w.entries.with(nil, web.ID)
		advance(3 * time.Second)
		if u := s.Update(); len(u.Identities)+len(u.Late) != 0 {
			t.Errorf("an answer that came after the deletion counted: %+v", u)
		}
	})
}

func TestDraws(t *testing.T) {
	t.Parallel()
	for n := range 100 {
		for range 100 {
			if d := svid.Backoff(n); d < 250*time.Millisecond || d > 30*time.Second {
				t.Fatalf("pause %s after %d failures", d, n)
			}
		}
	}
	now := time.Now()
	for _, life := range []time.Duration{1, time.Second, time.Hour, 365 * 24 * time.Hour} {
		s := &svid.X509SVID{NotBefore: now, NotAfter: now.Add(life)}
		for range 100 {
			if at := svid.RenewalTime(s, now); at.Before(now) || at.After(s.NotAfter) {
				t.Fatalf("life %s: renewed %s from the start", life, at.Sub(now))
			}
		}
	}
}
