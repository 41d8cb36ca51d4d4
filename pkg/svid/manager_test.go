package svid_test

import (
	"testing"
	"testing/synctest"

	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

func TestCallerGetsItsIdentity(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := run(t, newAuthority(), newEntries(workload("web"), workload("db")))
		s := w.subscribe(newCaller("web", "unix:user:web", "unix:uid:1000"))
		synctest.Wait()
		u := s.Update()
		if len(u.Identities) != 1 || u.Identities[0].SVID.ID.Path() != "/web" || len(u.Late) != 0 || !u.Synced || u.Own == nil {
			t.Fatalf("got %+v", u)
		}
		if n := w.ca.signs(); n != 1 {
			t.Errorf("%d certificates signed, want 1: only what somebody may have", n)
		}
		if s.Update() != u {
			t.Error("an unchanged Update has another pointer")
		}
	})
}

func TestLateEntryIsPushedOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := run(t, newAuthority(), newEntries())
		synctest.Wait()
		s := w.subscribe(newCaller("web", "unix:user:web"))
		if err := s.Park("default"); err != nil {
			t.Fatal(err)
		}
		if u := s.Update(); len(u.Identities)+len(u.Late) != 0 || !u.Synced {
			t.Fatalf("got %+v", u)
		}
		w.entries.put(workload("web"))
		synctest.Wait()
		if serial(s.Update()) == "" {
			t.Fatal("no SVID after the entry came")
		}
		if n := s.told.Load(); n != 1 {
			t.Errorf("told %d times of one change", n)
		}
	})
}

func TestDeletedEntryIsTakenAway(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := run(t, newAuthority(), newEntries(workload("web")))
		s := w.subscribe(newCaller("web", "unix:user:web"))
		synctest.Wait()
		before := s.told.Load()
		w.entries.with(nil, "entry-web")
		synctest.Wait()
		if u := s.Update(); len(u.Identities)+len(u.Late) != 0 {
			t.Fatalf("got %+v", u)
		}
		if n := s.told.Load() - before; n != 1 {
			t.Errorf("told %d times", n)
		}
		if records, _, _ := w.m.Records(); records != 0 {
			t.Errorf("%d records left", records)
		}
	})
}

func TestUpdateWithoutGap(t *testing.T) {
	t.Parallel()
	for name, edit := range map[string]func(*entry.Entry){
		"dns":       func(e *entry.Entry) { e.DNSNames = []string{"web.example.org"} },
		"ttl":       func(e *entry.Entry) { e.X509SVIDTTL = 600e9 },
		"spiffe id": func(e *entry.Entry) { e.SPIFFEID = workload("other").SPIFFEID },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				web := workload("web")
				w := run(t, newAuthority(), newEntries(web))
				s := w.subscribe(newCaller("web", "unix:user:web"))
				synctest.Wait()
				first := serial(s.Update())
				before := s.told.Load()
				w.ca.set(func() { w.ca.delay = 1e9 })
				w.entries.put(edited(web, edit))
				synctest.Wait()
				u := s.Update()
				if serial(u) != first || u.Identities[0].Entry.SPIFFEID != u.Identities[0].SVID.ID {
					t.Fatalf("while the new one is signed: %+v", u)
				}
				if s.told.Load() != before {
					t.Error("told before there was anything new")
				}
				advance(2e9)
				u = s.Update()
				if serial(u) == first || s.told.Load() != before+1 || u.Identities[0].Entry.Revision != 1 {
					t.Fatalf("after: serial %s (was %s), told %d times", serial(u), first, s.told.Load()-before)
				}
			})
		})
	}
}
