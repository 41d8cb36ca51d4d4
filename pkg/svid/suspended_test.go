package svid_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// An entry the server has stopped listing: who has its SVID keeps it, nobody
// else gets it, and it is not renewed until it is listed again.
func TestSuspendedEntry(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority()
		e := workload("web")
		entries := newEntries(e)
		w := run(t, a, entries)
		synctest.Wait()
		old := w.subscribe(newCaller("old", "unix:user:web"))
		synctest.Wait()
		serial := wantOne(t, old, "before")

		suspended := e.Clone()
		suspended.Suspended = true
		entries.with([]*entry.Entry{suspended})
		synctest.Wait()
		if got := wantOne(t, old, "suspended"); got != serial {
			t.Error("the SVID was replaced")
		}
		fresh := w.subscribe(newCaller("fresh", "unix:user:web"))
		synctest.Wait()
		if u := fresh.Update(); len(u.Identities)+len(u.Late) != 0 {
			t.Errorf("a new caller gets %d identities, %d late", len(u.Identities), len(u.Late))
		}
		// A change elsewhere, and of everything at once, makes no difference.
		entries.with([]*entry.Entry{workload("other")})
		var many []*entry.Entry
		for i := range 100 {
			many = append(many, workload("n"+string(rune('a'+i%26))+string(rune('a'+i/26))))
		}
		entries.with(many)
		synctest.Wait()
		wantOne(t, old, "after other changes")
		if u := fresh.Update(); len(u.Identities) != 0 {
			t.Error("a new caller gets it after other changes")
		}
		signed := a.signs()
		time.Sleep(50 * time.Minute)
		synctest.Wait()
		if a.signs() != signed {
			t.Error("renewed while suspended")
		}
		entries.with([]*entry.Entry{e})
		synctest.Wait()
		if got := wantOne(t, old, "listed again"); got == serial {
			t.Error("not renewed although it was due")
		}
		wantOne(t, fresh, "listed again, new caller")
		entries.with([]*entry.Entry{suspended})
		entries.with(nil, e.ID)
		synctest.Wait()
		if u := old.Update(); len(u.Identities)+len(u.Late) != 0 {
			t.Error("withdrawn, but still there")
		}
	})
}

// wantOne is the serial of the caller's one identity.
func wantOne(t *testing.T, s *stream, when string) string {
	t.Helper()
	u := s.Update()
	if len(u.Identities) != 1 {
		t.Fatalf("%s: %d identities, %d late", when, len(u.Identities), len(u.Late))
	}
	return serial(u)
}
