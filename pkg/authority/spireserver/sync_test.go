package spireserver_test

import (
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/authority/spireserver"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// pass lets time go by and everything settle.
func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func ids(s *entry.Set) string {
	var out []string
	for e := range s.All() {
		id := e.ID
		if e.Suspended {
			id += "?"
		}
		out = append(out, id)
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

// now is the client's set at this moment.
func now(t *testing.T, c *spireserver.Client) string {
	t.Helper()
	return ids(waitEntries(t, c, heard))
}

func TestFirstContact(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.entries = wireEntries(2)
		f.up(t)
		c := run(t, f.config(t))
		pass(time.Second)
		if got := now(t, c); got != "e000 e001" {
			t.Errorf("entries %q", got)
		}
		s := c.Status()
		if s.AgentID.Path() != "/spire/agent/join_token/token-1" || !s.Attested || s.Err != nil || s.LastSync.IsZero() || c.Ready() != nil {
			t.Errorf("status %+v", s)
		}
		pass(time.Minute)
		if f.version != "1.2.3" || f.count("PostStatus") != 1 || f.count("AttestAgent") != 1 {
			t.Errorf("version %q, told %d times; attested %d times", f.version, f.count("PostStatus"), f.count("AttestAgent"))
		}
		// Nobody is in a hurry: every 5 s, give or take a tenth.
		if n := f.count("SyncAuthorizedEntries"); n < 11 || n > 16 {
			t.Errorf("%d syncs in a minute", n)
		}
	})
}

func TestSparseSync(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.entries, f.pageSize = wireEntries(10), 3
		f.up(t)
		cfg := f.config(t)
		cfg.WithdrawConfirm = 0
		c := run(t, cfg)
		pass(time.Second)
		if got := waitEntries(t, c, heard).Len(); got != 10 {
			t.Fatalf("%d entries", got)
		}
		if len(f.wanted) != 4 || len(f.wanted[0]) != 3 || len(f.wanted[3]) != 1 || !slices.IsSorted(f.wanted[0]) {
			t.Errorf("asked for %v", f.wanted)
		}
		before, _ := waitEntries(t, c, heard).Get("e004")
		f.edit(func() {
			f.wanted = nil
			changed := wireEntry("e001", func(e *typespb.Entry) { e.RevisionNumber, e.Hint = 1, "new" })
			anew := wireEntry("e002", func(e *typespb.Entry) { e.CreatedAt++ }) // deleted and made again
			f.entries = slices.Concat(f.entries[:1], []*typespb.Entry{changed, anew}, f.entries[4:], wireEntries(11)[10:])
		})
		pass(6 * time.Second)
		set := waitEntries(t, c, heard)
		if got := ids(set); got != "e000 e001 e002 e004 e005 e006 e007 e008 e009 e010" {
			t.Errorf("entries %q", got)
		}
		if e, _ := set.Get("e001"); e.Hint != "new" {
			t.Errorf("e001 is %+v", e)
		}
		if e, _ := set.Get("e004"); e != before {
			t.Error("an unchanged entry has a new pointer")
		}
		if got := slices.Concat(f.wanted...); !slices.Equal(got, []string{"e001", "e002", "e010"}) {
			t.Errorf("asked for %v", got)
		}
	})
}

func TestNoSyncAuthorizedEntries(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.entries, f.noSync = wireEntries(3), true
		f.up(t)
		c := run(t, f.config(t))
		pass(20 * time.Second)
		if got := now(t, c); got != "e000 e001 e002" {
			t.Errorf("entries %q", got)
		}
		if f.count("SyncAuthorizedEntries") != 1 || f.count("GetAuthorizedEntries") < 3 {
			t.Errorf("calls: %v", f.calls)
		}
	})
}

func TestProtocolErrorsChangeNothing(t *testing.T) {
	type res = entrypb.SyncAuthorizedEntriesResponse
	rev := []*entrypb.EntryRevision{{Id: "e000"}, {Id: "e009"}}
	for name, answers := range map[string][]*res{
		"nothing":                  nil,
		"revisions after entries":  {{Entries: wireEntries(1), More: true}, {EntryRevisions: rev}},
		"entries after revisions":  {{EntryRevisions: rev, More: true}, {Entries: wireEntries(1)}},
		"both":                     {{EntryRevisions: rev, Entries: wireEntries(1)}},
		"negative revision":        {{EntryRevisions: []*entrypb.EntryRevision{{Id: "a", RevisionNumber: -1}}}},
		"revision without ID":      {{EntryRevisions: []*entrypb.EntryRevision{{}}}},
		"ends in the middle":       {{EntryRevisions: rev, More: true}},
		"ends before the entries":  {{EntryRevisions: rev}},
		"more than was asked for":  {{Entries: wireEntries(1)}, {Entries: wireEntries(5)}},
		"ends in the middle again": {{Entries: wireEntries(1), More: true}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				f := newFake()
				f.entries = wireEntries(2)
				f.up(t)
				c := run(t, f.config(t))
				pass(time.Second)
				set := waitEntries(t, c, heard)
				f.edit(func() {
					f.sync = func(stream entrypb.Entry_SyncAuthorizedEntriesServer) error {
						for _, a := range answers {
							if err := stream.Send(a); err != nil {
								return err
							}
						}
						return nil
					}
				})
				pass(time.Minute)
				if got := waitEntries(t, c, heard); got != set {
					t.Errorf("entries are now %q", ids(got))
				}
				if c.Status().Err == nil || c.Ready() == nil {
					t.Error("nothing is wrong")
				}
				f.edit(func() { f.sync = nil })
				pass(20 * time.Second)
				if err := c.Ready(); err != nil {
					t.Errorf("not ready again: %v", err)
				}
			})
		})
	}
}

func TestEntriesThatMakeNoSense(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.entries = []*typespb.Entry{
			wireEntry("good"), wireEntry("good"), // twice
			wireEntry(""),
			wireEntry("foreign", func(e *typespb.Entry) { e.SpiffeId.TrustDomain = "other.org" }),
			wireEntry("bad-id", func(e *typespb.Entry) { e.SpiffeId.Path = "no slash" }),
			wireEntry("no-id", func(e *typespb.Entry) { e.SpiffeId = nil }),
			wireEntry("no-selectors", func(e *typespb.Entry) { e.Selectors = nil }),
			wireEntry("bad-selector", func(e *typespb.Entry) { e.Selectors[0].Type = "a:b" }),
			wireEntry("bad-federation", func(e *typespb.Entry) { e.FederatesWith = []string{"NOT A TD"} }),
			{},
		}
		f.up(t)
		c := run(t, f.config(t))
		pass(time.Second)
		if got := now(t, c); got != "good" {
			t.Errorf("entries %q", got)
		}
	})
}

func TestOmissionIsConfirmed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.entries = wireEntries(2)
		f.up(t)
		c := run(t, f.config(t))
		pass(time.Second)
		f.edit(func() { f.entries = f.entries[:1] })
		pass(5500 * time.Millisecond)
		if got := now(t, c); got != "e000 e001?" {
			t.Errorf("omitted once: %q", got)
		}
		if c.Status().Missing != 1 {
			t.Errorf("missing %d", c.Status().Missing)
		}
		// One that comes back was never away.
		f.edit(func() { f.entries = wireEntries(2) })
		pass(1500 * time.Millisecond)
		if got := now(t, c); got != "e000 e001" {
			t.Errorf("listed again, confirmed after a second: %q", got)
		}
		f.edit(func() { f.entries = f.entries[:1] })
		pass(5500 * time.Millisecond)
		start := time.Now()
		for now(t, c) != "e000" {
			if time.Since(start) > 12*time.Second {
				t.Fatalf("still %q", now(t, c))
			}
			pass(100 * time.Millisecond)
		}
		if d := time.Since(start); d < 4*time.Second {
			t.Errorf("withdrawn after %s, within the time to confirm", d)
		}
	})
}

func TestOmissionIsNotAnOutage(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.entries = wireEntries(2)
		f.up(t)
		c := run(t, f.config(t))
		pass(time.Second)
		f.edit(func() { f.entries = f.entries[:1] })
		pass(5100 * time.Millisecond)
		f.edit(func() { f.fail["SyncAuthorizedEntries"] = status.Error(codes.Internal, "database is gone") })
		pass(10 * time.Minute)
		if got := now(t, c); got != "e000 e001?" {
			t.Errorf("withdrawn on one answer: %q", got)
		}
	})
}

func TestWithdrawAtOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.entries = wireEntries(2)
		f.up(t)
		cfg := f.config(t)
		cfg.WithdrawConfirm = 0
		c := run(t, cfg)
		pass(time.Second)
		f.edit(func() { f.entries = nil })
		pass(5500 * time.Millisecond)
		if got := now(t, c); got != "" {
			t.Errorf("entries %q", got)
		}
	})
}

func TestHurry(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.up(t)
		c := run(t, f.config(t))
		pass(time.Second)
		f.edit(func() { f.entries = wireEntries(1) })
		c.Hurry()
		pass(10 * time.Millisecond)
		if got := now(t, c); got != "e000" {
			t.Errorf("not asked at once: %q", got)
		}
		before := f.count("SyncAuthorizedEntries")
		for range 4 {
			pass(50 * time.Millisecond)
			c.Hurry()
		}
		pass(100 * time.Millisecond)
		if n := f.count("SyncAuthorizedEntries") - before; n > 2 {
			t.Errorf("%d syncs within 300 ms", n)
		}
		pass(2 * time.Second)
		if n := f.count("SyncAuthorizedEntries") - before; n < 4 {
			t.Errorf("%d syncs within 2 s", n)
		}
		// Somebody nobody knows, who asks for ever, costs a sync a second.
		for range 600 {
			c.Hurry()
			pass(500 * time.Millisecond)
		}
		before = f.count("SyncAuthorizedEntries")
		bundles := f.count("GetBundle")
		for range 120 {
			c.Hurry()
			pass(500 * time.Millisecond)
		}
		if n := f.count("SyncAuthorizedEntries") - before; n > 90 {
			t.Errorf("%d syncs in a minute of hurry", n)
		}
		if n := f.count("GetBundle") - bundles; n > 16 {
			t.Errorf("%d calls for the bundle in a minute of hurry", n)
		}
	})
}
