package embedded_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

// logged collects what an authority writes.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// count is how many lines have all of the words.
func (l *logged) count(words ...string) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.b.String()) {
		if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
			n++
		}
	}
	return n
}

// attested makes an agent known for longer than any test.
func attested(t *testing.T, a *embedded.Authority, name string) spiffeid.ID {
	t.Helper()
	agent := spiffeid.RequireFromPath(td, "/spire/agent/test/"+name)
	_, err := a.UpsertAgent(t.Context(), &embedded.Agent{ID: agent, AttestationType: "test", Serial: "1", ExpiresAt: time.Now().Add(1000 * time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	return agent
}

// reporter is an agent that says every minute what it is told to say: which of
// the authorities in the bundle it holds, and which its consumers acknowledged.
type reporter struct {
	holds, acks func(id string) bool
	laggards    []authority.Laggard
}

func everything(string) bool { return true }

func (r reporter) run(t *testing.T, a *embedded.Authority, agent spiffeid.ID) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	tell := func() {
		a.AgentSeen(agent)
		if r.holds == nil {
			return // an agent that cannot report
		}
		b := a.OwnBundle()
		var x, j authority.TrustProgress
		for _, root := range b.X509 {
			id := svidRootID(root)
			if r.holds(id) {
				x.Held = append(x.Held, id)
				if r.acks(id) {
					x.Acknowledged = append(x.Acknowledged, id)
				}
			}
		}
		for _, k := range b.JWT {
			if r.holds(k.ID) {
				j.Held = append(j.Held, k.ID)
				if r.acks(k.ID) {
					j.Acknowledged = append(j.Acknowledged, k.ID)
				}
			}
		}
		x.Consumers, x.Lagging, x.Laggards = 7, len(r.laggards), r.laggards
		a.ReportTrust(agent, authority.TrustReport{X509: x, JWT: j})
	}
	tell()
	go func() {
		defer close(done)
		tick := time.NewTicker(time.Minute)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				tell()
			}
		}
	}()
	stop = func() { cancel(); <-done }
	t.Cleanup(stop)
	return stop
}

func svidRootID(r embedded.Root) string { return hex.EncodeToString(r.Certificate.SubjectKeyId) }

// activatedAt is when the keys of a kind change hands first, since now.
func activatedAt(t *testing.T, state func() (embedded.LocalAuthorities, error), limit time.Duration) time.Duration {
	t.Helper()
	start := time.Now()
	first, err := state()
	if err != nil {
		t.Fatal(err)
	}
	for time.Since(start) < limit {
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if now, err := state(); err != nil || now.Active.ID != first.Active.ID {
			return time.Since(start)
		}
	}
	return limit
}

// TestGate: with a CA of 24 h, activation is due at 20 h. Acknowledgements that
// are missing put it off to the deadline, an hour (the default SVID) before the
// CA ends, and nothing else does.
func TestGate(t *testing.T) {
	const due, deadline = 20 * time.Hour, 23*time.Hour - 10*time.Second
	first := func(of func(string) bool) func(t *testing.T, a *embedded.Authority) func(string) bool {
		return func(*testing.T, *embedded.Authority) func(string) bool { return of }
	}
	// old is what was in the bundle at the start.
	old := func(_ *testing.T, a *embedded.Authority) func(string) bool {
		var ids []string
		for _, r := range a.OwnBundle().X509 {
			ids = append(ids, svidRootID(r))
		}
		for _, k := range a.OwnBundle().JWT {
			ids = append(ids, k.ID)
		}
		return func(id string) bool { return slices.Contains(ids, id) }
	}
	nack := []authority.Laggard{{Name: "shop/web-0", API: "sotw", Rejected: "no such trust store"}}
	for name, c := range map[string]struct {
		holds, acks func(*testing.T, *embedded.Authority) func(string) bool
		laggards    []authority.Laggard
		leavesAt    time.Duration // stops talking
		entryTTL    time.Duration
		x509, jwt   time.Duration
		log         []string
	}{
		"all have it":                   {holds: first(everything), acks: first(everything), x509: due, jwt: due},
		"cannot say":                    {x509: due, jwt: due},
		"agent lacks it":                {holds: old, acks: old, x509: deadline, jwt: 24*time.Hour - 5*time.Minute - 10*time.Second, log: []string{"/spire/agent/test/n1 (does not hold it yet)"}},
		"a consumer rejects it":         {holds: first(everything), acks: old, laggards: nack, x509: deadline, jwt: 24*time.Hour - 5*time.Minute - 10*time.Second, log: []string{"shop/web-0 rejected it"}},
		"the agent that lacks it left":  {holds: old, acks: old, leavesAt: 19 * time.Hour, x509: due, jwt: due},
		"an entry with a long SVID":     {holds: old, acks: old, entryTTL: 150 * time.Minute, x509: 24*time.Hour - 150*time.Minute - 10*time.Second, jwt: 24*time.Hour - 5*time.Minute - 10*time.Second},
		"an entry with too long a SVID": {holds: old, acks: old, entryTTL: 10 * time.Hour, x509: due, jwt: 24*time.Hour - 5*time.Minute - 10*time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				log := &logged{}
				reg := prometheus.NewRegistry()
				a := inMemory(t, embedded.NewMemoryStore(), embedded.Config{Logger: slog.New(slog.NewTextHandler(log, nil)), Metrics: embedded.NewMetrics(reg)})
				running(t, a)
				agent := attested(t, a, "n1")
				if c.entryTTL > 0 {
					e := newEntry("/long")
					e.X509SVIDTTL = c.entryTTL
					mustCreate(t, a, e)
				}
				r := reporter{laggards: c.laggards}
				if c.holds != nil {
					r.holds, r.acks = c.holds(t, a), c.acks(t, a)
				}
				leave := r.run(t, a, agent)
				if c.leavesAt > 0 {
					time.Sleep(c.leavesAt)
					leave()
				}
				at := func(of func() (embedded.LocalAuthorities, error), want time.Duration) {
					t.Helper()
					if got := c.leavesAt + activatedAt(t, of, 24*time.Hour-c.leavesAt); (got - want).Abs() > 30*time.Second {
						t.Errorf("activated at %s, want %s", got, want)
					}
				}
				waits := c.x509 > due
				if waits {
					// Both kinds are followed by one clock: X.509 first.
					time.Sleep(due + time.Minute)
					synctest.Wait()
					rot := a.Rotations()[0]
					if !rot.Delayed || rot.Progress.Lagging != 1 || rot.NextStep != "activate" || time.Until(rot.Deadline) > 3*time.Hour {
						t.Errorf("%+v", rot)
					}
					if got := log.count(append(c.log, "waits for acknowledgements", "kind=x509")...); got != 1 {
						t.Errorf("logged %d times that it waits", got)
					}
					if got := series(t, reg)["spiffe_node_authority_rotation_delayed,kind=x509"]; got != 1 {
						t.Errorf("rotation_delayed is %v", got)
					}
					got := due + time.Minute + activatedAt(t, a.X509Authorities, 4*time.Hour)
					if (got - c.x509).Abs() > 30*time.Second {
						t.Errorf("activated at %s, want %s", got, c.x509)
					}
					if log.count(append(c.log, "at its deadline", "kind=x509")...) != 1 {
						t.Error("not logged who was left behind")
					}
					got += activatedAt(t, a.JWTAuthorities, 4*time.Hour)
					if (got - c.jwt).Abs() > 30*time.Second {
						t.Errorf("JWT key activated at %s, want %s", got, c.jwt)
					}
					return
				}
				at(a.X509Authorities, c.x509)
				if log.count("waits for acknowledgements", "kind=x509") != 0 {
					t.Error("logged a wait")
				}
			})
		})
	}
}

// TestGateAfterRestart: what agents said is not stored, so a process that starts
// when an activation is due gives those it knows a moment to say it again.
func TestGateAfterRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := embedded.NewMemoryStore()
		a := inMemory(t, s, embedded.Config{})
		attested(t, a, "n1")
		time.Sleep(13 * time.Hour)
		if err := a.Rotate(time.Now()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(8 * time.Hour)
		b := inMemory(t, s, embedded.Config{})
		running(t, b)
		if now := requireX509(t, b); now.Prepared == nil {
			t.Fatal("activated at the start")
		}
		if rot := b.Rotations()[0]; !rot.Delayed || rot.Progress.Laggards[0].Why != embedded.LagAway {
			t.Errorf("%+v", rot)
		}
		if at := activatedAt(t, b.X509Authorities, time.Hour); at < time.Minute || at > 3*time.Minute {
			t.Errorf("activated %s after the start", at)
		}
	})
}

// TestLatePrepared: a key that could not be made in time is published first and
// signs a moment later.
func TestLatePrepared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := embedded.NewMemoryStore()
		a := inMemory(t, s, embedded.Config{})
		running(t, a)
		s.Fail(errDisk)
		time.Sleep(21 * time.Hour)
		s.Fail(nil)
		time.Sleep(11 * time.Second)
		synctest.Wait()
		now := requireX509(t, a)
		if now.Prepared == nil {
			t.Fatalf("%+v", now)
		}
		if at := activatedAt(t, a.X509Authorities, time.Hour); at < 40*time.Second || at > 90*time.Second {
			t.Errorf("activated %s after it was prepared", at)
		}
		if now := requireX509(t, a); now.Old == nil || now.Prepared != nil {
			t.Errorf("%+v", now)
		}
	})
}

// TestForcedIsNotRefused: by hand it goes at once, and says who lags.
func TestForcedIsNotRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &logged{}
		a := inMemory(t, embedded.NewMemoryStore(), embedded.Config{Logger: slog.New(slog.NewTextHandler(log, nil))})
		e := mustCreate(t, a, newEntry("/w"))
		agent := attested(t, a, "n1")
		first := requireX509(t, a).Active.ID
		a.ReportTrust(agent, authority.TrustReport{X509: authority.TrustProgress{
			Held: []string{first}, Acknowledged: []string{first}, Consumers: 3, Lagging: 3,
		}})
		prepared, err := a.PrepareX509(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := a.ActivateX509(t.Context(), prepared.ID); err != nil {
			t.Fatal(err)
		}
		if log.count("activated by hand", "/spire/agent/test/n1", "lagging_consumers=3") != 1 {
			t.Errorf("log: %s", log.b.String())
		}
		verifies(t, a, sign(t, a, e))
		if err := a.RotateNow(t.Context()); err != nil {
			t.Fatal(err)
		}
		if log.count("activated by hand", "kind=x509") != 2 {
			t.Errorf("log: %s", log.b.String())
		}
		rot := a.Rotations()
		if len(rot) != 2 || rot[0].NextStep != "prepare" || rot[0].OldTainted || rot[0].Progress.Lagging != 1 {
			t.Errorf("%+v", rot)
		}
		if _, err := a.TaintX509(t.Context(), rot[0].Authorities.Old.ID); err != nil {
			t.Fatal(err)
		}
		if rot := a.Rotations()[0]; !rot.OldTainted || rot.OldRevoked {
			t.Errorf("%+v", rot)
		}
		if err := a.RevokeX509(t.Context(), rot[0].Authorities.Old.ID); err != nil {
			t.Fatal(err)
		}
		if rot := a.Rotations()[0]; rot.OldTainted || !rot.OldRevoked {
			t.Errorf("%+v", rot)
		}
	})
}

// TestReportsAreBounded: an agent can say as much as it likes.
func TestReportsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := inMemory(t, embedded.NewMemoryStore(), embedded.Config{})
		agent := attested(t, a, "n1")
		long := strings.Repeat("\xffx", 1<<16)
		many := slices.Repeat([]string{long, "a"}, 1<<10)
		laggards := slices.Repeat([]authority.Laggard{{Name: long, API: long, Rejected: long}}, 1<<10)
		a.ReportTrust(agent, authority.TrustReport{Outdated: -1, X509: authority.TrustProgress{
			Held: append([]string{requireX509(t, a).Active.ID}, many...), Acknowledged: many, Consumers: -1, Lagging: 1 << 30, Laggards: laggards,
		}})
		p := a.Rotations()[0].Progress
		if p.Lagging != 1 || p.Consumers != 0 || p.LaggingConsumers != 0 || p.Outdated != 0 || len(p.Laggards[0].Laggards) != authority.MaxReportedLaggards {
			t.Errorf("%+v", p)
		}
		for _, l := range p.Laggards[0].Laggards {
			if len(l.Name)+len(l.API)+len(l.Rejected) > 3*authority.MaxReportedText || strings.Contains(l.Name, "\xff") {
				t.Errorf("%q", l.Name)
			}
		}
		if n := len(p.Names()); n > 4096 {
			t.Errorf("a line of %d bytes", n)
		}
	})
}
