package svid_test

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// slowFor delays or fails the entries named.
func slowFor(a *fakeAuthority, id string, pause time.Duration, err error) {
	a.fail = func(got string) error {
		if got != id {
			return nil
		}
		time.Sleep(pause)
		return err
	}
}

// The best entry is signed last; nobody may be shown the second best as the
// default identity in between.
func TestFirstPictureIsWhole(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		pause time.Duration
		err   error
		waits time.Duration // until something is shown
		first string        // what the default is then
	}{
		"all signed": {pause: 200 * time.Millisecond, waits: 200 * time.Millisecond, first: "/best"},
		"one fails":  {pause: 50 * time.Millisecond, err: errors.New("down"), waits: 50 * time.Millisecond, first: "/other"},
		"refused":    {err: authority.ErrRefused, first: "/other"},
		"one hangs":  {pause: time.Minute, waits: time.Second, first: "/other"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := newAuthority()
				slowFor(a, "entry-best", tc.pause, tc.err)
				best, other := workload("best", "unix:uid:1"), workload("other")
				other.Selectors = attest.MustSelectors("unix:user:best")
				w := run(t, a, newEntries(best, other))
				synctest.Wait()
				s := w.subscribe(newCaller("web", "unix:user:best", "unix:uid:1"))
				if tc.waits > 0 {
					time.Sleep(tc.waits - time.Millisecond)
					synctest.Wait()
					if u := s.Update(); len(u.Identities) != 0 || len(u.Late) != 2 || u.Own == nil {
						t.Errorf("shown too early: %d identities, %d late", len(u.Identities), len(u.Late))
					}
					time.Sleep(time.Millisecond)
				}
				synctest.Wait()
				u := s.Update()
				if len(u.Identities) == 0 || u.Identities[0].Entry.SPIFFEID.Path() != tc.first {
					t.Errorf("got %+v", u)
				}
			})
		})
	}
}

// A caller that has an identity keeps it while a second is being signed.
func TestNewEntryDoesNotHideOldIdentity(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority()
		slowFor(a, "entry-new", 300*time.Millisecond, nil)
		old := workload("old")
		w := run(t, a, newEntries(old))
		s := w.subscribe(newCaller("web", "unix:user:old", "unix:uid:1"))
		synctest.Wait()
		added := &entry.Entry{ID: "entry-new", SPIFFEID: old.SPIFFEID, ParentID: old.ParentID, Selectors: attest.MustSelectors("unix:uid:1"), CreatedAt: old.CreatedAt}
		w.entries.put(added)
		synctest.Wait()
		if u := s.Update(); len(u.Identities) != 1 || len(u.Late) != 1 {
			t.Errorf("got %d identities, %d late", len(u.Identities), len(u.Late))
		}
		time.Sleep(300 * time.Millisecond)
		synctest.Wait()
		if u := s.Update(); len(u.Identities) != 2 {
			t.Errorf("got %d identities", len(u.Identities))
		}
	})
}

// Nor does a caller lose it by joining others whose first picture still waits.
func TestJoiningThoseWhoWaitHidesNothing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority()
		slowFor(a, "entry-new", 300*time.Millisecond, nil)
		old, added := workload("old"), workload("new")
		w := run(t, a, newEntries(old, added))
		s := w.subscribe(newCaller("first", "unix:user:old"))
		synctest.Wait()
		first := serial(s.Update())
		moving := newCaller("moving", "unix:user:old", "unix:uid:1")
		m := w.subscribe(moving)
		waiting := w.subscribe(newCaller("waiting", "unix:user:old", "unix:user:new"))
		if u := waiting.Update(); len(u.Identities) != 0 {
			t.Fatalf("%+v", u)
		}
		moving.become("unix:user:old", "unix:user:new")
		synctest.Wait()
		if u := m.Update(); serial(u) != first {
			t.Errorf("the identity is hidden: %+v", u)
		}
	})
}
