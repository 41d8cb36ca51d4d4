package svid_test

import (
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// TestEverybodyAtOnce is for the race detector, in real time: callers of every
// kind while everything changes.
func TestEverybodyAtOnce(t *testing.T) {
	t.Parallel()
	const names = 10
	var all []*entry.Entry
	for i := range names {
		all = append(all, workload(fmt.Sprint("w", i)))
	}
	dir := stateDir(t)
	w := run(t, newAuthority(), newEntries(all...), keeping(dir), func(c *svid.Config) {
		c.MaxParked = 3
		c.LateAfter = time.Millisecond
		c.OnLate = func(attest.Subject, string, time.Time) {}
		c.Logger = slog.New(slog.DiscardHandler)
	})
	end := time.Now().Add(700 * time.Millisecond)
	var wg sync.WaitGroup
	forever := func(f func(i int)) {
		wg.Go(func() {
			for i := 0; time.Now().Before(end); i++ {
				f(i)
			}
		})
	}
	for n := range 4 {
		forever(func(i int) {
			c := newCaller(fmt.Sprint(n), fmt.Sprint("unix:user:w", i%names))
			woken := make(chan struct{}, 1)
			a, err := w.m.Subscribe(c, func() {
				select {
				case woken <- struct{}{}:
				default:
				}
			})
			must(err)
			b, err := w.m.Subscribe(c, func() {})
			must(err)
			_ = a.Park("default")
			for range 3 {
				if u := a.Update(); len(u.Identities) > 0 {
					a.Unpark()
					if _, err := w.m.JWT(t.Context(), c, u.Identities[0].Entry, []string{"a"}); err != nil && i%names != 0 {
						t.Log(err)
					}
					break
				}
				select {
				case <-woken:
				case <-time.After(10 * time.Millisecond):
				}
			}
			c.become(fmt.Sprint("unix:user:w", (i+1)%names))
			_, _ = w.m.Snapshot(c)
			w.m.Inspect(c)
			b.Update()
			if i%2 == 0 {
				a.Close()
			}
			b.Close()
			a.Close()
		})
	}
	forever(func(i int) {
		e := all[i%names]
		if i%7 == 0 {
			w.entries.with(nil, e.ID)
		}
		w.entries.put(edited(e, func(e *entry.Entry) {
			e.Revision, e.Hint, e.X509SVIDTTL = int64(i+1), fmt.Sprint(i), time.Duration(1+i%2)*time.Hour
		}))
		time.Sleep(time.Millisecond)
	})
	forever(func(i int) {
		w.ca.change(func() {
			if i%3 == 0 {
				w.ca.tainted = map[string]bool{w.ca.ca.id(): true}
				w.ca.ca = newCA()
			}
			w.ca.own = w.ca.own.Clone()
		})
		time.Sleep(5 * time.Millisecond)
	})
	forever(func(int) {
		w.m.Warm(attest.MustSelectors(fmt.Sprint("unix:user:w", rand.IntN(names))))
		w.m.Status()
		w.m.Entries().Len()
		time.Sleep(time.Millisecond)
	})
	wg.Wait()
	if st := w.m.Status(); st.Parked != 0 || st.Streams != 0 {
		t.Errorf("left over: %+v", st)
	}
}
