package svid_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

func TestAvailabilityTarget(t *testing.T) {
	t.Parallel()
	const target = 48 * time.Hour
	for name, tc := range map[string]struct {
		ttl   time.Duration
		first time.Duration // before the end, when renewal may come
		last  time.Duration
	}{
		"long life":  {100 * time.Hour, target + 10*time.Minute, target},
		"short life": {time.Hour, 36 * time.Minute, 24 * time.Minute},
		"no slack":   {target + 11*time.Hour, 36 * time.Hour, 23 * time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				web := workload("web")
				web.X509SVIDTTL = tc.ttl
				w := run(t, newAuthority(), newEntries(web), func(c *svid.Config) { c.AvailabilityTarget = target })
				synctest.Wait()
				c := newCaller("web", "unix:user:web")
				s := w.subscribe(c)
				synctest.Wait()
				in, ok := w.m.Inspect(c)
				if !ok || len(in.Entries) != 1 || serial(s.Update()) == "" {
					t.Fatalf("%+v", in)
				}
				left := in.Entries[0].NotAfter.Sub(in.Entries[0].NextRenewal)
				if left > tc.first || left < tc.last {
					t.Errorf("renewed %s before the end, want %s to %s", left, tc.last, tc.first)
				}
				before := serial(s.Update())
				advance(time.Until(in.Entries[0].NextRenewal) + time.Second)
				if serial(s.Update()) == before {
					t.Error("not renewed at the time that was drawn")
				}
			})
		})
	}
}

// An agent that is restarted with a target renews what was signed before.
func TestAvailabilityTargetAfterRestart(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		web := workload("web")
		web.X509SVIDTTL = 100 * time.Hour
		dir := stateDir(t)
		ca, entries := newAuthority(), newEntries(web)
		w := run(t, ca, entries, keeping(dir))
		s := w.subscribe(newCaller("web", "unix:user:web"))
		synctest.Wait()
		if serial(s.Update()) == "" {
			t.Fatal("no SVID")
		}
		advance(time.Second)
		w.stop()
		w = run(t, ca, entries, keeping(dir), func(c *svid.Config) { c.AvailabilityTarget = 80 * time.Hour })
		c := newCaller("web", "unix:user:web")
		w.subscribe(c)
		synctest.Wait()
		in, _ := w.m.Inspect(c)
		if len(in.Entries) != 1 {
			t.Fatalf("%+v", in)
		}
		if left := in.Entries[0].NotAfter.Sub(in.Entries[0].NextRenewal); left < 80*time.Hour {
			t.Errorf("renewed %s before the end", left)
		}
	})
}
