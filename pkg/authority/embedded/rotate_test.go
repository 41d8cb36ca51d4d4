package embedded_test

import (
	"context"
	"crypto/x509"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// inMemory is an authority that can live in a synctest bubble.
func inMemory(tb testing.TB, s *embedded.MemoryStore, cfg embedded.Config) *embedded.Authority {
	tb.Helper()
	cfg.TrustDomain = td
	a, err := embedded.OpenWith(cfg, s)
	if err != nil {
		tb.Fatal(err)
	}
	return a
}

// running runs the authority's jobs until the test ends.
func running(t *testing.T, a *embedded.Authority) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- a.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func requireX509(t *testing.T, a *embedded.Authority) embedded.LocalAuthorities {
	t.Helper()
	s, err := a.X509Authorities()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// verifies checks an SVID against a bundle at the present moment.
func verifies(t *testing.T, a *embedded.Authority, cert *x509.Certificate) {
	t.Helper()
	set, err := a.Bundles(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := x509svid.Verify([]*x509.Certificate{cert}, set.Own.X509Bundle(), x509svid.WithTime(time.Now())); err != nil {
		t.Errorf("%s: SVID of %s: %v", time.Now(), cert.NotBefore, err)
	}
}

// TestRotation lives through three CAs: every SVID verifies from its first to
// its last moment, and the steps come at SPIRE Server's times.
func TestRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := inMemory(t, embedded.NewMemoryStore(), embedded.Config{})
		running(t, a)
		e := mustCreate(t, a, newEntry("/w"))
		born := time.Now()
		first := requireX509(t, a)
		if first.Prepared != nil || first.Old != nil {
			t.Errorf("state at start: %+v", first)
		}
		if want := born.Add(24 * time.Hour); !first.Active.ExpiresAt.Equal(want) {
			t.Errorf("CA expires at %s, want %s", first.Active.ExpiresAt, want)
		}
		if seq := a.OwnBundle().Sequence; seq != 1 {
			t.Errorf("sequence %d after the first start, want 1", seq)
		}

		var prepared, activated []time.Duration
		last := first
		type held struct {
			cert *x509.Certificate
			jwt  *authority.JWTIssued
		}
		var living []held
		const tick = 5 * time.Minute
		for time.Since(born) < 3*24*time.Hour {
			time.Sleep(tick)
			synctest.Wait()
			now := requireX509(t, a)
			if now.Prepared != nil && last.Prepared == nil {
				prepared = append(prepared, time.Since(born).Truncate(tick))
			}
			if now.Active.ID != last.Active.ID {
				activated = append(activated, time.Since(born).Truncate(tick))
				if last.Prepared == nil || last.Prepared.ID != now.Active.ID || now.Old == nil || now.Old.ID != last.Active.ID {
					t.Errorf("activated %+v after %+v", now, last)
				}
			}
			last = now
			cert := sign(t, a, e)
			if life := time.Until(cert.NotAfter); life > time.Hour || life < time.Hour-time.Second {
				t.Errorf("SVID lives %s", life)
			}
			token, err := a.SignJWT(t.Context(), authority.JWTRequest{EntryID: e.ID, SPIFFEID: e.SPIFFEID, Audience: []string{"a"}})
			if err != nil {
				t.Fatal(err)
			}
			living = append(living, held{cert, token})
			living = slices.DeleteFunc(living, func(h held) bool { return time.Now().After(h.cert.NotAfter) })
			own := a.OwnBundle()
			set, err := a.Bundles(t.Context(), 0)
			if err != nil {
				t.Fatal(err)
			}
			for _, h := range living {
				verifies(t, a, h.cert)
				if time.Now().Before(h.jwt.ExpiresAt) {
					if _, err := jwtsvid.ParseAndValidate(h.jwt.Token, set.Own.JWTBundle(), []string{"a"}); err != nil {
						t.Error(err)
					}
				}
			}
			// One every 12 h, each for its 24 h, a day of safety and up to 6 h
			// until the next pruning.
			if len(own.X509) > 5 || len(own.JWT) > 5 {
				t.Errorf("bundle grew to %d roots, %d keys", len(own.X509), len(own.JWT))
			}
		}
		// The second CA is made at 12 h and so starts its life there.
		wantPrepared := []time.Duration{12 * time.Hour, 24 * time.Hour, 36 * time.Hour, 48 * time.Hour, 60 * time.Hour}
		wantActivated := []time.Duration{20 * time.Hour, 32 * time.Hour, 44 * time.Hour, 56 * time.Hour, 68 * time.Hour}
		near := func(got, want []time.Duration) bool {
			return len(got) >= len(want) && slices.EqualFunc(got[:len(want)], want, func(g, w time.Duration) bool { return (g - w).Abs() <= 2*tick })
		}
		if !near(prepared, wantPrepared) || !near(activated, wantActivated) {
			t.Errorf("prepared at %v, activated at %v", prepared, activated)
		}
	})
}

// TestRotationResumes restarts at each stage; nothing is made anew that is
// still good.
func TestRotationResumes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := embedded.NewMemoryStore()
		before := requireX509(t, inMemory(t, s, embedded.Config{}))
		for _, stage := range []struct {
			name string
			wait time.Duration
			same func(embedded.LocalAuthorities) bool
		}{
			{"young", time.Hour, func(now embedded.LocalAuthorities) bool {
				return now.Active == before.Active && now.Prepared == nil
			}},
			{"past the time to prepare", 12 * time.Hour, func(now embedded.LocalAuthorities) bool {
				return now.Active == before.Active && now.Prepared != nil
			}},
			{"prepared", time.Hour, func(now embedded.LocalAuthorities) bool {
				return now.Active == before.Active && *now.Prepared == *before.Prepared
			}},
			{"past the time to activate", 7 * time.Hour, func(now embedded.LocalAuthorities) bool {
				return now.Active.ID == before.Prepared.ID && now.Old.ID == before.Active.ID
			}},
			{"off for a month", 30 * 24 * time.Hour, func(now embedded.LocalAuthorities) bool {
				return now.Active.ID != before.Active.ID && now.Active.ExpiresAt.After(time.Now()) && now.Old.ID == before.Active.ID
			}},
		} {
			time.Sleep(stage.wait)
			writes := s.Writes
			a := inMemory(t, s, embedded.Config{})
			now := requireX509(t, a)
			if !stage.same(now) {
				t.Errorf("%s: %+v, before %+v", stage.name, now, before)
			}
			if stage.name == "young" && s.Writes != writes {
				t.Error("a restart wrote without need")
			}
			verifies(t, a, sign(t, a, mustCreate(t, a, newEntry("/"+now.Active.ID, "unix:path:"+stage.name))))
			before = now
		}
	})
}

// TestClockJumps: whatever the clock does, nothing is signed by a CA that is
// not valid at the moment, and no old root is dropped.
func TestClockJumps(t *testing.T) {
	s := embedded.NewMemoryStore()
	var roots []*x509.Certificate
	jump := func(t *testing.T, at time.Duration) {
		t.Helper()
		synctest.Test(t, func(t *testing.T) {
			// Each bubble starts at the same moment in 2000.
			time.Sleep(at)
			a := inMemory(t, s, embedded.Config{})
			now := requireX509(t, a)
			if !now.Active.ExpiresAt.After(time.Now()) {
				t.Errorf("active CA expired at %s", now.Active.ExpiresAt)
			}
			e, ok := a.Set().Get("w")
			if !ok {
				w := newEntry("/w")
				w.ID = "w"
				e = mustCreate(t, a, w)
			}
			verifies(t, a, sign(t, a, e))
			for _, root := range roots {
				if !slices.ContainsFunc(a.OwnBundle().X509, func(r embedded.Root) bool { return r.Certificate.Equal(root) }) {
					t.Errorf("root of %s is gone", root.NotBefore)
				}
			}
			roots = roots[:0]
			for _, r := range a.OwnBundle().X509 {
				roots = append(roots, r.Certificate)
			}
		})
	}
	day := 24 * time.Hour
	for _, at := range []time.Duration{100 * day, 100*day + time.Hour, 99 * day, 5000 * day, 100 * day, 0, 100 * day} {
		t.Run(at.String(), func(t *testing.T) { jump(t, at) })
	}
}

// TestRotationWithoutDisk: the CA goes on signing, takes over in memory when it
// must, and stops only when there is nothing valid left.
func TestRotationWithoutDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := embedded.NewMemoryStore()
		a := inMemory(t, s, embedded.Config{})
		running(t, a)
		e := mustCreate(t, a, newEntry("/w"))
		time.Sleep(13 * time.Hour)
		synctest.Wait()
		before := requireX509(t, a)
		if before.Prepared == nil {
			t.Fatal("not prepared at 13 h")
		}
		s.Fail(errDisk)
		book, _ := a.Bundles(t.Context(), 0)
		time.Sleep(10 * time.Hour)
		synctest.Wait()
		if now := requireX509(t, a); now.Active != before.Active {
			t.Errorf("activated without storing it: %+v", now)
		}
		sign(t, a, e)
		time.Sleep(90 * time.Minute)
		synctest.Wait()
		if now := requireX509(t, a); now.Active.ID != before.Prepared.ID {
			t.Errorf("the prepared CA did not take over: %+v", now)
		}
		verifies(t, a, sign(t, a, e))
		if now, _ := a.Bundles(t.Context(), 0); now != book {
			t.Error("the bundle changed without being stored")
		}
		time.Sleep(13 * time.Hour)
		_, err := a.SignX509(t.Context(), authority.X509Request{EntryID: e.ID, SPIFFEID: e.SPIFFEID, CSR: newCSR(t, newKey(t), x509.CertificateRequest{})})
		if !errors.Is(err, authority.ErrNotReady) {
			t.Errorf("error %v with an expired CA, want ErrNotReady", err)
		}
		s.Fail(nil)
		time.Sleep(11 * time.Second)
		synctest.Wait()
		verifies(t, a, sign(t, a, e))
	})
}

func TestFirstCAMustBeStored(t *testing.T) {
	s := embedded.NewMemoryStore()
	s.Fail(errDisk)
	if _, err := embedded.OpenWith(embedded.Config{TrustDomain: td}, s); !errors.Is(err, errDisk) {
		t.Errorf("error %v", err)
	}
}

// TestCapped: close to the end of a CA that could not be replaced, SVIDs end
// with it.
func TestCapped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := inMemory(t, embedded.NewMemoryStore(), embedded.Config{CATTL: time.Hour})
		e := mustCreate(t, a, newEntry("/w"))
		ca := requireX509(t, a).Active
		time.Sleep(30 * time.Minute)
		if cert := sign(t, a, e); !cert.NotAfter.Equal(ca.ExpiresAt) {
			t.Errorf("SVID ends at %s, its CA at %s", cert.NotAfter, ca.ExpiresAt)
		}
		long := mustCreate(t, a, &entry.Entry{SPIFFEID: id("/long"), ParentID: node, Selectors: e.Selectors, JWTSVIDTTL: 10 * time.Hour})
		token, err := a.SignJWT(t.Context(), authority.JWTRequest{EntryID: long.ID, SPIFFEID: long.SPIFFEID, Audience: []string{"a"}})
		if err != nil {
			t.Fatal(err)
		}
		jwt, err := a.JWTAuthorities()
		if err != nil || !token.ExpiresAt.Equal(jwt.Active.ExpiresAt) {
			t.Errorf("token ends at %s, its key at %s (%v)", token.ExpiresAt, jwt.Active.ExpiresAt, err)
		}
	})
}

// TestPruneBundle: expired authorities stay a day, the last of a kind for ever.
func TestPruneBundle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := inMemory(t, embedded.NewMemoryStore(), embedded.Config{})
		if err := a.RotateNow(t.Context()); err != nil {
			t.Fatal(err)
		}
		before := a.OwnBundle()
		if len(before.X509) != 2 || len(before.JWT) != 2 || before.Sequence != 3 {
			t.Fatalf("%d roots, %d keys, sequence %d", len(before.X509), len(before.JWT), before.Sequence)
		}
		prune := func() *embedded.Bundle {
			if err := a.PruneBundle(time.Now()); err != nil {
				t.Error(err)
			}
			return a.OwnBundle()
		}
		time.Sleep(47 * time.Hour)
		if prune() != before {
			t.Error("pruned within a day")
		}
		time.Sleep(2 * time.Hour)
		after := prune()
		if len(after.X509) != 1 || len(after.JWT) != 1 || after.Sequence != 4 {
			t.Errorf("%d roots, %d keys, sequence %d", len(after.X509), len(after.JWT), after.Sequence)
		}
		if after.X509[0].Certificate != before.X509[1].Certificate {
			t.Error("the wrong root was pruned")
		}
		time.Sleep(1000 * time.Hour)
		if prune() != after {
			t.Error("pruned the last authorities")
		}
	})
}

func TestPruneEntries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := inMemory(t, embedded.NewMemoryStore(), embedded.Config{})
		running(t, a)
		short := newEntry("/short")
		short.ExpiresAt = time.Now().Add(time.Minute)
		short = mustCreate(t, a, short)
		keep := mustCreate(t, a, newEntry("/keep"))
		source := a.NodeEntries(node, short.Selectors)
		set, err := source.Entries(t.Context(), 0)
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if set, err = source.Entries(t.Context(), set.Version()); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took < time.Minute || took > 6*time.Minute {
			t.Errorf("deleted after %s", took)
		}
		if _, ok := set.Get(short.ID); ok {
			t.Error("expired entry is still there")
		}
		if _, ok := set.Get(keep.ID); !ok {
			t.Error("the other one is gone")
		}
	})
}

// A CA of a minute, as trials have it, is replaced in time like any other.
func TestRotationOfAShortCA(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := inMemory(t, embedded.NewMemoryStore(), embedded.Config{CATTL: time.Minute})
		running(t, a)
		e := mustCreate(t, a, newEntry("/w"))
		seen := make(map[string]bool)
		for range 60 {
			time.Sleep(10 * time.Second)
			now := requireX509(t, a)
			if !now.Active.ExpiresAt.After(time.Now()) {
				t.Fatalf("active CA expired at %s", now.Active.ExpiresAt)
			}
			seen[now.Active.ID] = true
			verifies(t, a, sign(t, a, e))
		}
		if len(seen) < 8 {
			t.Errorf("%d CAs in ten minutes", len(seen))
		}
	})
}
