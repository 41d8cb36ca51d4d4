package svid_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// TestAnythingMayHappen lets entries, callers, bundles, the authority and time
// change at random. After each step every caller must have exactly what it
// matches, in order, valid, and must have been told of what it can see.
func TestAnythingMayHappen(t *testing.T) {
	t.Parallel()
	for seed := range uint64(8) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) { anything(t, rand.New(rand.NewPCG(seed, 1))) })
		})
	}
}

func anything(t *testing.T, rnd *rand.Rand) {
	t.Helper()
	partner := spiffeid.RequireTrustDomainFromString("partner.org")
	w := run(t, newAuthority(), newEntries(), func(c *svid.Config) { c.MaxIdle, c.Workers = 3, 2 })
	synctest.Wait()
	selectors := []string{"a:1", "a:2", "a:3", "b:1", "b:2", "c:1"}
	some := func() []string {
		return slices.DeleteFunc(slices.Clone(selectors), func(string) bool { return rnd.IntN(2) == 0 })
	}
	type held struct {
		*stream
		c     *caller
		last  *svid.Update
		heard int64
	}
	var streams []*held
	live := map[string]*entry.Entry{}
	revision := int64(0)
	for range 400 {
		what := rnd.IntN(12)
		switch what {
		case 0, 1, 2: // put or change an entry
			sel := some()
			if len(sel) == 0 {
				break
			}
			revision++
			id := fmt.Sprint("e", rnd.IntN(8))
			e := &entry.Entry{
				ID: id, SPIFFEID: spiffeid.RequireFromPathf(td, "/%s/%d", id, rnd.IntN(2)), Selectors: attest.MustSelectors(sel...),
				Revision: revision, Hint: fmt.Sprint(rnd.IntN(3)), Fallback: rnd.IntN(3) == 0, StoreSVID: rnd.IntN(8) == 0,
				X509SVIDTTL:             time.Duration(1+rnd.IntN(3)) * 20 * time.Minute,
				DisableX509SVIDPrefetch: rnd.IntN(4) == 0,
			}
			if rnd.IntN(3) == 0 {
				e.FederatesWith = []spiffeid.TrustDomain{partner}
			}
			live[id] = e
			w.entries.put(e)
		case 3: // delete, or delete and create at once
			id := fmt.Sprint("e", rnd.IntN(8))
			if e := live[id]; e != nil && rnd.IntN(3) == 0 {
				w.entries.with([]*entry.Entry{e}, id)
				break
			}
			delete(live, id)
			w.entries.with(nil, id)
		case 4: // a stream opens
			if len(streams) < 12 {
				c := newCaller(fmt.Sprint(rnd.IntN(3)), some()...)
				if len(streams) > 0 && rnd.IntN(3) == 0 {
					c = streams[rnd.IntN(len(streams))].c
				}
				s := w.subscribe(c)
				streams = append(streams, &held{stream: s, c: c})
			}
		case 5: // or closes
			if n := len(streams); n > 0 && rnd.IntN(2) == 0 {
				i := rnd.IntN(n)
				streams[i].Close()
				streams = slices.Delete(streams, i, i+1)
			}
		case 6: // a pod gets other selectors
			if n := len(streams); n > 0 {
				streams[rnd.IntN(n)].c.become(some()...)
			}
		case 7:
			w.m.Warm(attest.MustSelectors(some()...))
		case 8: // CA rotation, with or without taint
			old := w.ca.ca.id()
			w.ca.change(func() {
				w.ca.ca = newCA()
				w.ca.tainted = nil
				if rnd.IntN(2) == 0 {
					w.ca.tainted = map[string]bool{old: true}
				}
				w.ca.feds = newFederation(partner)
			})
		case 9: // the authority fails or recovers
			w.ca.set(func() {
				w.ca.fail, w.ca.delay = nil, time.Duration(rnd.IntN(3))*time.Second
				if rnd.IntN(2) == 0 {
					w.ca.fail = func(string) error { return errors.New("away") }
				}
			})
		case 10: // a caller without a stream
			_, _ = w.m.Snapshot(newCaller("x", some()...))
		default:
			advance(time.Duration(rnd.Int64N(int64(40 * time.Minute))))
		}
		synctest.Wait()
		for n, h := range streams {
			u := h.Update()
			check(t, w, h.c, u, live)
			if h.last != nil && what < 11 { // in time, a successor may have expired as well
				for _, i := range h.last.Identities {
					if e := live[i.Entry.ID]; e != nil && !e.StoreSVID && e.Matches(h.c.Selectors()) && time.Now().Before(i.SVID.NotAfter) && !ready(u, e.ID) {
						t.Fatalf("step %d: stream %d lost %s, which is valid and its own", what, n, e.ID)
					}
				}
			}
			told := h.told.Load()
			if h.last != nil {
				changed := visible(h.last) != visible(u) || lost(h.last, u)
				if changed && told == h.heard {
					t.Fatalf("step %d: stream %d was not told that %s became %s", what, n, visible(h.last), visible(u))
				}
				if !changed && told != h.heard && what < 11 {
					t.Fatalf("step %d: stream %d was told of nothing: %s", what, n, visible(u))
				}
			}
			h.heard = told
			h.last = u
		}
	}
	for _, h := range streams {
		h.Close()
	}
	advance(3 * time.Hour)
	if r, g, _ := w.m.Records(); r+g != 0 {
		t.Errorf("left over: %d records, %d groups", r, g)
	}
}

// check says whether a caller has exactly what the live entries give it.
func check(t *testing.T, w *world, c *caller, u *svid.Update, live map[string]*entry.Entry) {
	t.Helper()
	var want []*entry.Entry
	for _, e := range live {
		if e.Matches(c.Selectors()) && !e.StoreSVID {
			want = append(want, e)
		}
	}
	entry.Sort(want, entry.OrderNode, "")
	index := func(id string) int {
		return slices.IndexFunc(want, func(e *entry.Entry) bool { return e.ID == id })
	}
	last := -1
	for _, i := range u.Identities {
		at := index(i.Entry.ID)
		if at < 0 {
			t.Fatalf("unmatched identity %s", i.Entry.ID)
		}
		if at <= last {
			t.Fatalf("identities out of order: %s", visible(u))
		}
		last = at
		if now := time.Now(); !now.Before(i.SVID.NotAfter) {
			t.Fatalf("expired identity %s", i.Entry.ID)
		}
		if i.Entry.SPIFFEID != i.SVID.ID {
			t.Fatalf("entry %s with an SVID of %s", i.Entry.SPIFFEID, i.SVID.ID)
		}
	}
	for _, e := range u.Late {
		if at := index(e.ID); at < 0 || want[at] != e {
			t.Fatalf("late entry %s is not as it should be", e.ID)
		}
	}
	if len(u.Identities)+len(u.Late) != len(want) {
		t.Fatalf("%d ready and %d late of %d matched", len(u.Identities), len(u.Late), len(want))
	}
	if !u.Synced || u.Own != w.ca.own {
		t.Fatal("not in sync")
	}
	if in, ok := w.m.Inspect(c); !ok || len(in.Entries) != len(want) {
		t.Fatalf("inspection shows %d entries, want %d", len(in.Entries), len(want))
	}
}

func ready(u *svid.Update, id string) bool {
	return slices.ContainsFunc(u.Identities, func(i *svid.Identity) bool { return i.Entry.ID == id })
}

// visible is what of an Update a caller can be sent.
func visible(u *svid.Update) string {
	out := fmt.Sprintf("own %p federated", u.Own)
	for _, b := range u.Federated {
		out += fmt.Sprintf(" %p", b)
	}
	for _, i := range u.Identities {
		out += fmt.Sprintf(" %s=%s(%s)", i.Entry.ID, i.SVID.Serial, i.Entry.Hint)
	}
	return out
}

// lost says whether a late entry was withdrawn.
func lost(a, b *svid.Update) bool {
	return slices.ContainsFunc(a.Late, func(e *entry.Entry) bool {
		same := func(o *entry.Entry) bool { return o.ID == e.ID }
		return !slices.ContainsFunc(b.Late, same) && !slices.ContainsFunc(b.Identities, func(i *svid.Identity) bool { return same(i.Entry) })
	})
}
