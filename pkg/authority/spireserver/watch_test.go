package spireserver_test

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/internal/watchpb"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
)

// pusher is a Watch service that sends what the test says.
type pusher struct {
	f       *fake
	events  chan *watchpb.WatchEvent
	end     chan error
	resumed []string
}

func newPusher(f *fake) *pusher {
	p := &pusher{f: f, events: make(chan *watchpb.WatchEvent), end: make(chan error)}
	f.watch = func(req *watchpb.WatchRequest, stream watchpb.Watch_WatchServer) error {
		p.f.edit(func() { p.resumed = append(p.resumed, req.GetResume()) })
		for {
			select {
			case ev := <-p.events:
				if err := stream.Send(ev); err != nil {
					return err
				}
			case err := <-p.end:
				return err
			case <-stream.Context().Done():
				return nil
			}
		}
	}
	return p
}

func (p *pusher) send(events ...*watchpb.WatchEvent) {
	for _, ev := range events {
		p.events <- ev
	}
	pass(time.Millisecond)
}

// whole is a first change.
func (p *pusher) whole(version string, entries ...*typespb.Entry) *watchpb.WatchEvent {
	p.f.mu.Lock()
	defer p.f.mu.Unlock()
	return &watchpb.WatchEvent{Version: version, Reset_: true, Entries: entries, Bundle: p.f.bundleLocked()}
}

func TestPushed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		p := newPusher(f)
		f.up(t)
		c := run(t, f.config(t))
		pass(time.Second)
		foreign := &typespb.Bundle{TrustDomain: "b.org", X509Authorities: []*typespb.X509Certificate{{Asn1: newRoot().cert.Raw}}}
		first := p.whole("1", wireEntries(2)...)
		first.FederatedBundles = []*typespb.Bundle{foreign, {TrustDomain: "BAD"}, {TrustDomain: "c.org", X509Authorities: []*typespb.X509Certificate{{Asn1: []byte("x")}}}}
		p.send(first)
		if got := now(t, c); got != "e000 e001" || c.Ready() != nil || !c.Status().Watching {
			t.Fatalf("entries %q, ready: %v", got, c.Ready())
		}
		set, err := c.Bundles(t.Context(), 0)
		if err != nil || len(set.Federated) != 1 {
			t.Fatalf("%v %+v", err, set)
		}
		// Pieces take effect together.
		p.send(&watchpb.WatchEvent{More: true, Entries: []*typespb.Entry{wireEntry("new")}})
		if got := now(t, c); got != "e000 e001" {
			t.Errorf("a piece took effect: %q", got)
		}
		p.send(&watchpb.WatchEvent{Version: "2", RemovedEntries: []string{"e000", "nobody"}})
		if got := now(t, c); got != "e001 new" {
			t.Errorf("entries %q", got)
		}
		// A form that makes no sense replaces the good one.
		p.send(&watchpb.WatchEvent{Version: "3", Entries: []*typespb.Entry{wireEntry("new", func(e *typespb.Entry) { e.Selectors = nil })}, RemovedBundles: []string{"b.org", "?"}})
		if got := now(t, c); got != "e001" {
			t.Errorf("entries %q", got)
		}
		if set, _ = c.Bundles(t.Context(), set.Version); len(set.Federated) != 0 {
			t.Errorf("federated %v", set.Federated)
		}
		// The server closes the connection; the client goes on where it was.
		p.end <- status.Error(codes.Unavailable, "closing")
		pass(time.Millisecond)
		p.send(&watchpb.WatchEvent{Version: "4", Entries: []*typespb.Entry{wireEntry("late")}})
		if got := now(t, c); got != "e001 late" {
			t.Errorf("entries %q", got)
		}
		pass(time.Minute) // silence
		p.send(p.whole("5", wireEntry("late")))
		if got := now(t, c); got != "late" {
			t.Errorf("entries %q", got)
		}
		if len(p.resumed) < 3 || p.resumed[0] != "" || p.resumed[1] != "3" || p.resumed[2] != "4" {
			t.Errorf("resumed at %q", p.resumed)
		}
		if f.count("SyncAuthorizedEntries") != 0 || f.count("GetBundle") != 1 || f.count("PostStatus") != 1 {
			t.Errorf("calls %v", f.calls)
		}
	})
}

func TestPushedNonsense(t *testing.T) {
	for name, events := range map[string]func(p *pusher) *watchpb.WatchEvent{
		"own bundle of another": func(*pusher) *watchpb.WatchEvent {
			return &watchpb.WatchEvent{Version: "2", Bundle: &typespb.Bundle{TrustDomain: "other.org"}}
		},
		"own bundle without roots": func(*pusher) *watchpb.WatchEvent {
			return &watchpb.WatchEvent{Version: "2", Reset_: true, Bundle: &typespb.Bundle{TrustDomain: td.Name()}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				f := newFake()
				p := newPusher(f)
				f.up(t)
				c := run(t, f.config(t))
				pass(time.Second)
				p.send(p.whole("1", wireEntries(2)...))
				set := waitEntries(t, c, heard)
				bundles, _ := c.Bundles(t.Context(), 0)
				p.send(events(p))
				if got := waitEntries(t, c, heard); got != set {
					t.Errorf("entries %q", ids(got))
				}
				if got, _ := c.Bundles(t.Context(), 0); got != bundles {
					t.Error("bundles changed")
				}
				pass(20 * time.Second) // it starts over
				p.send(p.whole("3", wireEntries(1)...))
				if got := now(t, c); got != "e000" || p.resumed[len(p.resumed)-1] != "" {
					t.Errorf("entries %q, resumed %q", got, p.resumed)
				}
			})
		})
	}
	t.Run("change before the whole", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			f := newFake()
			p := newPusher(f)
			f.up(t)
			c := run(t, f.config(t))
			pass(time.Second)
			p.send(&watchpb.WatchEvent{Version: "1", Entries: wireEntries(1)})
			if c.Status().Err == nil || c.Ready() == nil {
				t.Error("taken")
			}
		})
	})
}

func TestPushedDenials(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.reattestable = true
		p := newPusher(f)
		f.up(t)
		cfg := f.config(t)
		cfg.Attestor = attestor{}
		c := run(t, cfg)
		pass(time.Second)
		p.send(p.whole("1", wireEntries(1)...))
		f.edit(func() { clear(f.agents) })
		p.end <- denied(typespb.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
		pass(2 * time.Second)
		p.send(p.whole("2", wireEntries(2)...))
		if got := now(t, c); got != "e000 e001" || f.count("AttestAgent") != 2 {
			t.Errorf("entries %q, attested %d times", got, f.count("AttestAgent"))
		}
		// Signing refused for an entry the server is about to take away.
		f.edit(func() { f.entries = wireEntries(1) })
		done := make(chan error, 1)
		go func() {
			_, err := c.SignX509(t.Context(), request("e001"))
			done <- err
		}()
		pass(100 * time.Millisecond)
		p.send(&watchpb.WatchEvent{Version: "3", RemovedEntries: []string{"e001"}})
		if err := <-done; !errors.Is(err, authority.ErrRefused) {
			t.Errorf("sign: %v", err)
		}
	})
}
