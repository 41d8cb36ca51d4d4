package svid_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

func TestJWTCache(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var audit journal
		web := workload("web")
		w := run(t, newAuthority(), newEntries(web), func(c *svid.Config) { c.Audit = slog.New(slog.NewJSONHandler(&audit, nil)) })
		c := newCaller("web", "unix:user:web")
		synctest.Wait()
		get := func(audience ...string) *svid.JWTSVID {
			t.Helper()
			j, err := w.m.JWT(t.Context(), c, web, audience)
			if err != nil {
				t.Fatal(err)
			}
			return j
		}
		first := get("b", "a", "b")
		if first.ID != web.SPIFFEID || first.KeyID != "key-1" || strings.Join(first.Audience, " ") != "a b" {
			t.Errorf("%+v", first)
		}
		if got := audit.take(); strings.Count(got, "granted") != 1 || !strings.Contains(got, `"audience":["a","b"]`) || strings.Contains(got, first.Token) {
			t.Errorf("audit: %s", got)
		}
		if get("a", "b") != first {
			t.Error("the order of audiences makes a difference")
		}
		if get("a") == first || w.ca.jwts.Load() != 2 {
			t.Error("another audience got the same token")
		}
		// 5 min of life: young at 40 %, renewed at 60 %.
		advance(119 * time.Second)
		if get("a", "b") != first {
			t.Error("asked again before 40 % of the life")
		}
		advance(62 * time.Second)
		second := get("a", "b")
		if second == first {
			t.Error("not renewed after 60 % of the life")
		}
		// A new revision is another token.
		web = edited(web, func(e *entry.Entry) { e.JWTSVIDTTL = time.Minute })
		w.entries.put(web)
		synctest.Wait()
		if j := get("a", "b"); j == second || j.ExpiresAt.Sub(j.IssuedAt) != time.Minute {
			t.Errorf("%+v", j)
		}
	})
}

func TestJWTRefusals(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		web := workload("web")
		w := run(t, newAuthority(), newEntries(web, workload("db")))
		synctest.Wait()
		c := newCaller("web", "unix:user:web")
		if _, err := w.m.JWT(t.Context(), c, web, []string{""}); !errors.Is(err, svid.ErrNoAudience) {
			t.Errorf("got %v", err)
		}
		if _, err := w.m.JWT(t.Context(), c, workload("db"), []string{"a"}); !errors.Is(err, svid.ErrNotMatched) {
			t.Errorf("got %v", err)
		}
		if _, err := w.m.JWT(t.Context(), c, web, []string{"a"}); err != nil {
			t.Fatal(err)
		}
		w.entries.with(nil, "entry-web")
		synctest.Wait()
		if _, err := w.m.JWT(t.Context(), c, web, []string{"a"}); !errors.Is(err, svid.ErrNotMatched) {
			t.Errorf("after the entry was deleted: %v", err)
		}
		// The same entry again: what was cached before is gone.
		w.entries.put(web)
		synctest.Wait()
		n := w.ca.jwts.Load()
		if _, err := w.m.JWT(t.Context(), c, web, []string{"a"}); err != nil || w.ca.jwts.Load() != n+1 {
			t.Errorf("%v; a token from before the deletion was handed out", err)
		}
	})
}

func TestJWTSingleFlight(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		web := workload("web")
		w := run(t, newAuthority(), newEntries(web))
		synctest.Wait()
		w.ca.set(func() { w.ca.delay = time.Second })
		c := newCaller("web", "unix:user:web")
		var wg sync.WaitGroup
		// The first gives up, and the others are served all the same.
		ctx, cancel := context.WithTimeout(t.Context(), time.Second/2)
		defer cancel()
		wg.Go(func() {
			if _, err := w.m.JWT(ctx, c, web, []string{"a"}); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("got %v", err)
			}
		})
		synctest.Wait()
		for range 50 {
			wg.Go(func() {
				if _, err := w.m.JWT(t.Context(), c, web, []string{"a"}); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if n := w.ca.jwts.Load(); n != 1 {
			t.Errorf("%d requests for one token", n)
		}
	})
}

func TestJWTAuthorityAway(t *testing.T) {
	t.Parallel()
	for name, away := range map[string]func(*fakeAuthority){
		"fails":  func(ca *fakeAuthority) { ca.fail = func(string) error { return authority.ErrTryLater } },
		"silent": func(ca *fakeAuthority) { ca.delay = time.Hour },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				web := workload("web")
				w := run(t, newAuthority(), newEntries(web))
				synctest.Wait()
				c := newCaller("web", "unix:user:web")
				first, err := w.m.JWT(t.Context(), c, web, []string{"a"})
				must(err)
				w.ca.set(func() { away(w.ca) })
				advance(4 * time.Minute)
				n := w.ca.jwts.Load()
				for range 20 {
					start := time.Now()
					if j, err := w.m.JWT(t.Context(), c, web, []string{"a"}); j != first || time.Since(start) > time.Second {
						t.Fatalf("%v after %s: %v", j, time.Since(start), err)
					}
				}
				if d := w.ca.jwts.Load() - n; d > 3 {
					t.Errorf("the authority was asked %d times", d)
				}
				advance(2 * time.Minute)
				start := time.Now()
				if j, err := w.m.JWT(t.Context(), c, web, []string{"a"}); err == nil || time.Since(start) > 5*time.Second {
					t.Fatalf("expired: %v after %s", j, time.Since(start))
				}
				advance(time.Hour)
				w.ca.set(func() { w.ca.fail, w.ca.delay = nil, 0 })
				if _, err := w.m.JWT(t.Context(), c, web, []string{"a"}); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

func TestJWTRefusedByAuthority(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		web := workload("web")
		w := run(t, newAuthority(), newEntries(web))
		synctest.Wait()
		c := newCaller("web", "unix:user:web")
		_, err := w.m.JWT(t.Context(), c, web, []string{"a"})
		must(err)
		w.ca.set(func() { w.ca.fail = func(string) error { return authority.ErrRefused } })
		advance(4 * time.Minute)
		for range 3 {
			if j, err := w.m.JWT(t.Context(), c, web, []string{"a"}); !errors.Is(err, authority.ErrRefused) {
				t.Errorf("an old token was handed out though the authority refuses: %v", j)
			}
		}
	})
}

func TestJWTWithIDIsNeverReused(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		web := workload("web")
		web.JWTSVIDIncludeJTI = true
		w := run(t, newAuthority(), newEntries(web))
		synctest.Wait()
		c := newCaller("web", "unix:user:web")
		seen := map[string]bool{}
		for range 5 {
			j, err := w.m.JWT(t.Context(), c, web, []string{"a"})
			must(err)
			seen[j.Token] = true
		}
		if len(seen) != 5 {
			t.Errorf("%d tokens for 5 calls", len(seen))
		}
		w.ca.set(func() { w.ca.delay = time.Hour })
		start := time.Now()
		if _, err := w.m.JWT(t.Context(), c, web, []string{"a"}); err == nil || time.Since(start) > 5*time.Second {
			t.Errorf("waited %s", time.Since(start))
		}
	})
}

func TestJWTOfTaintedKeyIsDropped(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		web := workload("web")
		w := run(t, newAuthority(), newEntries(web))
		synctest.Wait()
		c := newCaller("web", "unix:user:web")
		first, err := w.m.JWT(t.Context(), c, web, []string{"a"})
		must(err)
		w.ca.change(func() { w.ca.jwtBad = map[string]bool{"key-1": true} })
		synctest.Wait()
		second, err := w.m.JWT(t.Context(), c, web, []string{"a"})
		must(err)
		if second == first {
			t.Error("a token of a tainted key was handed out")
		}
		// The authority still signs with it: nothing of that is kept.
		if third, _ := w.m.JWT(t.Context(), c, web, []string{"a"}); third == second {
			t.Error("a token of a tainted key was cached")
		}
		w.ca.set(func() { w.ca.kid = "key-2" })
		good, err := w.m.JWT(t.Context(), c, web, []string{"a"})
		must(err)
		if again, _ := w.m.JWT(t.Context(), c, web, []string{"a"}); again != good {
			t.Error("a good token was not cached")
		}
	})
}

func TestJWTCacheIsBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		web := workload("web")
		w := run(t, newAuthority(), newEntries(web), func(c *svid.Config) { c.MaxJWT = 10 })
		synctest.Wait()
		c := newCaller("web", "unix:user:web")
		get := func(i int) {
			t.Helper()
			if _, err := w.m.JWT(t.Context(), c, web, []string{fmt.Sprint(i)}); err != nil {
				t.Fatal(err)
			}
		}
		for i := range 20 {
			get(0) // stays in use
			get(i)
		}
		n := w.ca.jwts.Load()
		get(0)
		get(19)
		if w.ca.jwts.Load() != n {
			t.Error("what was used last was dropped")
		}
		get(5)
		if w.ca.jwts.Load() != n+1 {
			t.Error("more is kept than the limit")
		}
	})
}

func TestJWTWithdrawnWhileItIsSigned(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		web := workload("web")
		w := run(t, newAuthority(), newEntries(web))
		synctest.Wait()
		w.ca.set(func() { w.ca.delay = time.Second })
		time.AfterFunc(time.Second/2, func() { w.entries.with(nil, web.ID) })
		if j, err := w.m.JWT(t.Context(), newCaller("web", "unix:user:web"), web, []string{"a"}); !errors.Is(err, svid.ErrNotMatched) {
			t.Errorf("handed out: %v %v", j, err)
		}
	})
}

// mute answers with tokens that are none.
type mute struct {
	*fakeAuthority
	issued *authority.JWTIssued
}

func (m *mute) SignJWT(context.Context, authority.JWTRequest) (*authority.JWTIssued, error) {
	return m.issued, nil
}

func TestWrongTokensAreNotServed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		web := workload("web")
		ca := &mute{fakeAuthority: newAuthority()}
		w := run(t, ca.fakeAuthority, newEntries(web), func(c *svid.Config) { c.Authority = ca })
		synctest.Wait()
		c := newCaller("web", "unix:user:web")
		for want, issued := range map[string]*authority.JWTIssued{
			"no token": nil,
			"expired":  {Token: "a.b.c", IssuedAt: time.Now().Add(-time.Hour), ExpiresAt: time.Now()},
		} {
			ca.issued = issued
			if _, err := w.m.JWT(t.Context(), c, web, []string{"a"}); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("got %v, want %s", err, want)
			}
		}
		// A header that cannot be read and no IssuedAt do no harm.
		ca.issued = &authority.JWTIssued{Token: "not base64!", ExpiresAt: time.Now().Add(time.Minute)}
		j, err := w.m.JWT(t.Context(), c, web, []string{"a"})
		if err != nil || j.KeyID != "" {
			t.Errorf("%+v %v", j, err)
		}
		if _, err := w.m.JWT(t.Context(), nil, web, []string{"a"}); err == nil {
			t.Error("nobody got a token")
		}
	})
}
