package spireserver_test

import (
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/watchpb"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
)

// TestReports: the newest report goes to an authority that pushes, again when a
// watch starts anew or one did not arrive, and otherwise once.
func TestReports(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		p := newPusher(f)
		var got []*watchpb.TrustReport
		f.told = func(r *watchpb.TrustReport) { got = append(got, r) }
		f.up(t)
		c := run(t, f.config(t))
		c.ReportTrust(authority.TrustReport{Outdated: 1})
		pass(time.Second)
		p.send(p.whole("1", wireEntries(1)...))
		pass(time.Second)
		if len(got) != 1 || got[0].GetOutdatedSvids() != 1 {
			t.Fatalf("when the watch began: %v", got)
		}
		c.ReportTrust(authority.TrustReport{X509: authority.TrustProgress{
			Held: []string{"a", "b"}, Acknowledged: []string{"a"}, Consumers: 3, Lagging: 1,
			Laggards: []authority.Laggard{{Name: "ns/pod", API: "sotw", Rejected: "no"}},
		}})
		pass(time.Millisecond)
		x := got[len(got)-1].GetX509()
		if len(got) != 2 || len(x.GetHeld()) != 2 || len(x.GetAcknowledged()) != 1 || x.GetConsumers() != 3 || x.GetLagging() != 1 ||
			len(x.GetLaggards()) != 1 || x.GetLaggards()[0].GetName() != "ns/pod" || x.GetLaggards()[0].GetApi() != "sotw" || x.GetLaggards()[0].GetRejected() != "no" {
			t.Errorf("a change: %v", got[1:])
		}
		p.end <- status.Error(codes.Unavailable, "closing")
		pass(time.Millisecond)
		p.send(p.whole("2", wireEntries(1)...))
		pass(time.Second)
		if len(got) != 3 || got[2].GetX509().GetConsumers() != 3 {
			t.Errorf("when the watch began anew: %v", got[2:])
		}
		f.edit(func() { f.fail["ReportTrust"] = status.Error(codes.ResourceExhausted, "slowly") })
		c.ReportTrust(authority.TrustReport{Outdated: 2})
		pass(time.Second)
		f.edit(func() { delete(f.fail, "ReportTrust") })
		p.send(&watchpb.WatchEvent{Version: "3"})
		pass(10 * time.Second)
		if len(got) != 4 || got[3].GetOutdatedSvids() != 2 {
			t.Errorf("after one that did not arrive: %v", got[3:])
		}
	})
}

// TestReportsToNobody: an authority without the call is asked once per watch, one
// that does not push not at all.
func TestReportsToNobody(t *testing.T) {
	t.Parallel()
	for name, pushes := range map[string]bool{"pushes": true, "does not push": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				f := newFake()
				f.entries = wireEntries(1)
				var p *pusher
				if pushes {
					p = newPusher(f)
				}
				f.up(t)
				c := run(t, f.config(t))
				c.ReportTrust(authority.TrustReport{Outdated: 1})
				pass(time.Second)
				want := 0
				if pushes {
					want = 1
					p.send(p.whole("1", wireEntries(1)...))
				}
				for range 6 {
					pass(5 * time.Second)
					if pushes {
						p.send(&watchpb.WatchEvent{Version: "2"})
					}
				}
				if n := f.count("ReportTrust"); n != want || c.Ready() != nil {
					t.Errorf("asked %d times, want %d; ready: %v", n, want, c.Ready())
				}
			})
		})
	}
}
