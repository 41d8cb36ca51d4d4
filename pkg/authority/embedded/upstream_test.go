package embedded_test

import (
	"context"
	"crypto/x509"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// signChain asks for an SVID and gives its chain.
func signChain(tb testing.TB, a *embedded.Authority, e *entry.Entry) []*x509.Certificate {
	tb.Helper()
	chain, err := trySign(tb, a, e)
	if err != nil {
		tb.Fatal(err)
	}
	return chain
}

func trySign(tb testing.TB, a *embedded.Authority, e *entry.Entry) ([]*x509.Certificate, error) {
	tb.Helper()
	issued, err := a.SignX509(context.Background(), authority.X509Request{
		EntryID: e.ID, SPIFFEID: e.SPIFFEID, CSR: newCSR(tb, newKey(tb), x509.CertificateRequest{}), DNSNames: e.DNSNames,
	})
	if err != nil {
		return nil, err
	}
	var chain []*x509.Certificate
	for _, der := range issued.Chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			tb.Fatal(err)
		}
		if c.CheckSignatureFrom(c) == nil {
			tb.Errorf("the chain holds the root %s", c.Subject)
		}
		chain = append(chain, c)
	}
	return chain, nil
}

func verifiesChain(t *testing.T, a *embedded.Authority, chain []*x509.Certificate) {
	t.Helper()
	if _, _, err := x509svid.Verify(chain, getBundles(t, a).Own.X509Bundle(), x509svid.WithTime(time.Now())); err != nil {
		t.Errorf("%s: SVID until %s: %v", time.Now(), chain[0].NotAfter, err)
	}
}

func hasRoot(a *embedded.Authority, c *x509.Certificate) bool {
	return slices.ContainsFunc(a.OwnBundle().X509, func(r embedded.Root) bool { return r.Certificate.Equal(c) })
}

// TestUpstream lives through days below a company's issuing CA: every SVID
// verifies with the bundle, which holds the root alone, restarts included.
func TestUpstream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root := newCompanyCA(t, "Root", nil, 10*365*24*time.Hour, nil)
		issuing := newCompanyCA(t, "Issuing", root, 365*24*time.Hour, nil)
		up := newCompany(t, issuing, root)
		store := embedded.NewMemoryStore()
		cfg := embedded.Config{Upstream: up}
		a := inMemory(t, store, cfg)
		e := mustCreate(t, a, newEntry("/w"))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- a.Run(ctx) }()
		first := requireX509(t, a)
		seen := map[string]bool{}
		var living [][]*x509.Certificate
		for range 33 {
			time.Sleep(time.Hour)
			chain := signChain(t, a, e)
			if len(chain) != 3 {
				t.Fatalf("%d certificates", len(chain))
			}
			now := requireX509(t, a)
			seen[now.Active.ID] = true
			if now.Active.UpstreamID == "" || now.Active.UpstreamID != first.Active.UpstreamID {
				t.Errorf("upstream ID %q", now.Active.UpstreamID)
			}
			if got := a.CAChain(); len(got) != 3 || !got[2].Equal(root.cert) {
				t.Errorf("the CA's chain is %d long", len(got))
			}
			living = append(slices.DeleteFunc(living, func(c []*x509.Certificate) bool { return time.Now().After(c[0].NotAfter) }), chain)
			for _, c := range living {
				verifiesChain(t, a, c)
			}
		}
		if len(seen) != 3 {
			t.Errorf("%d CAs in 33 hours", len(seen))
		}
		if own := a.OwnBundle(); len(own.X509) != 1 || !own.X509[0].Certificate.Equal(root.cert) {
			t.Errorf("the bundle has %d roots", len(own.X509))
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		// A restart needs no upstream.
		up.change(func() { up.err = errAway })
		b := inMemory(t, store, cfg)
		if got := requireX509(t, b); got.Active != requireX509(t, a).Active {
			t.Errorf("restarted with %+v", got)
		}
		verifiesChain(t, b, signChain(t, b, e))
	})
}

// TestUpstreamAndBack: switching to an upstream and back keeps old SVIDs valid
// and ends with what was asked for.
func TestUpstreamAndBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root := newCompanyCA(t, "Root", nil, 10*365*24*time.Hour, nil)
		up := newCompany(t, root)
		store := embedded.NewMemoryStore()
		a := inMemory(t, store, embedded.Config{})
		e := mustCreate(t, a, newEntry("/w"))
		own := requireX509(t, a).Active
		before := signChain(t, a, e)

		a = inMemory(t, store, embedded.Config{Upstream: up})
		if err := a.Rotate(time.Now()); err != nil {
			t.Fatal(err)
		}
		state := requireX509(t, a)
		if state.Active != own || state.Prepared == nil || state.Prepared.UpstreamID == "" || !hasRoot(a, root.cert) {
			t.Fatalf("right after the switch: %+v", state)
		}
		if err := a.Rotate(time.Now()); err != nil || requireX509(t, a).Prepared.ID != state.Prepared.ID {
			t.Error("prepared again")
		}
		if _, err := a.ActivateX509(t.Context(), state.Prepared.ID); err != nil {
			t.Fatal(err)
		}
		after := signChain(t, a, e)
		if len(after) != 2 {
			t.Errorf("%d certificates", len(after))
		}
		verifiesChain(t, a, before)
		verifiesChain(t, a, after)
		// The self-signed one is no upstream's: it can be tainted as ever.
		if _, err := a.TaintX509(t.Context(), own.ID); err != nil {
			t.Error(err)
		}

		a = inMemory(t, store, embedded.Config{})
		if err := a.Rotate(time.Now()); err != nil {
			t.Fatal(err)
		}
		state = requireX509(t, a)
		if state.Prepared == nil || state.Prepared.UpstreamID != "" {
			t.Fatalf("after the way back: %+v", state)
		}
		if err := a.RotateNow(t.Context()); err != nil {
			t.Fatal(err)
		}
		last := signChain(t, a, e)
		if len(last) != 1 {
			t.Errorf("%d certificates", len(last))
		}
		for _, c := range [][]*x509.Certificate{before, after, last} {
			verifiesChain(t, a, c)
		}
		// The company's root goes a day after the last CA below it.
		time.Sleep(47 * time.Hour)
		if err := a.PruneBundle(time.Now()); err != nil || !hasRoot(a, root.cert) {
			t.Errorf("gone too early, %v", err)
		}
		time.Sleep(2 * time.Hour)
		if err := a.RotateNow(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := a.PruneBundle(time.Now()); err != nil || hasRoot(a, root.cert) {
			t.Errorf("still there, %v", err)
		}
	})
}

// TestUpstreamAway: what is there is used to its end, no longer, and everything
// comes back by itself.
func TestUpstreamAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := newCompany(t, newCompanyCA(t, "Root", nil, 10*365*24*time.Hour, nil))
		up.err = errAway
		a := inMemory(t, embedded.NewMemoryStore(), embedded.Config{Upstream: up})
		e := mustCreate(t, a, newEntry("/w"))
		if _, err := trySign(t, a, e); !errors.Is(err, authority.ErrNotReady) {
			t.Errorf("without any CA: %v", err)
		}
		if err := a.Ready(); !errors.Is(err, authority.ErrNotReady) || !errors.Is(err, errAway) {
			t.Errorf("ready says %v", err)
		}
		if b := a.OwnBundle(); len(b.X509) != 0 || b.TrustDomain != td {
			t.Errorf("the bundle before the first CA: %+v", b)
		}
		running(t, a)
		time.Sleep(time.Minute)
		up.change(func() { up.err = nil })
		time.Sleep(time.Minute)
		if err := a.Ready(); err != nil {
			t.Fatal(err)
		}
		if s := a.UpstreamStatus(); s.Err != nil || s.Name != "the company" || s.LastSuccess.IsZero() {
			t.Errorf("%+v", s)
		}
		active := requireX509(t, a).Active
		up.change(func() { up.err = errAway })
		time.Sleep(23 * time.Hour)
		verifiesChain(t, a, signChain(t, a, e))
		if s := a.UpstreamStatus(); !errors.Is(s.Err, errAway) || a.Ready() != nil || requireX509(t, a).Active != active {
			t.Errorf("%+v, %v", s, a.Ready())
		}
		time.Sleep(2 * time.Hour)
		if _, err := trySign(t, a, e); !errors.Is(err, authority.ErrNotReady) {
			t.Errorf("past the CA's end: %v", err)
		}
		up.change(func() { up.err = nil })
		time.Sleep(time.Minute)
		verifiesChain(t, a, signChain(t, a, e))
	})
}

// TestUpstreamRefused: a CA that would be of no use is not taken, and the text
// says why.
func TestUpstreamRefused(t *testing.T) {
	long := 10 * 365 * 24 * time.Hour
	root := newCompanyCA(t, "Root", nil, long, nil)
	other := newCompanyCA(t, "Other", nil, long, nil)
	issuing := newCompanyCA(t, "Issuing", root, long, func(c *x509.Certificate) { c.MaxPathLenZero = true })
	constrained := newCompanyCA(t, "Constrained", nil, long, func(c *x509.Certificate) {
		c.PermittedURIDomains, c.PermittedDNSDomainsCritical = []string{"elsewhere.org"}, true
	})
	clientOnly := newCompanyCA(t, "Clients", root, long, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} })
	withChain := func(c *company, chain ...*x509.Certificate) *company { c.chain = chain; return c }
	shaped := func(c *company, f func(*x509.Certificate)) *company { c.shape = f; return c }
	for name, tc := range map[string]struct {
		up   *company
		want string
	}{
		"strange root":     {newCompany(t, issuing, other), "which is none of the roots"},
		"no issuer":        {withChain(newCompany(t, issuing, root)), "which is none of the roots"},
		"path length":      {newCompany(t, issuing, root), "path length of a certificate above"},
		"name constraints": {newCompany(t, constrained), "would not verify"},
		"no servers":       {newCompany(t, clientOnly, root), "would not verify"},
		"no CA":            {shaped(newCompany(t, root), func(c *x509.Certificate) { c.IsCA, c.KeyUsage = false, x509.KeyUsageDigitalSignature }), "do not make it a CA"},
		"foreign":          {shaped(newCompany(t, root), func(c *x509.Certificate) { c.URIs = uris("other.org/x") }), "is not spiffe://example.org"},
		"expired":          {shaped(newCompany(t, root), func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }), "is valid from"},
		"key usage":        {shaped(newCompany(t, root), func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageKeyAgreement }), "key usage"},
		"no roots":         {&company{tb: t, issuer: root}, "there are no roots"},
	} {
		t.Run(name, func(t *testing.T) {
			a := inMemory(t, embedded.NewMemoryStore(), embedded.Config{Upstream: tc.up})
			_, err := a.PrepareX509(t.Context())
			if err == nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), "the company") {
				t.Errorf("got %v, want %q", err, tc.want)
			}
			if err := a.Ready(); !errors.Is(err, authority.ErrNotReady) {
				t.Errorf("ready says %v", err)
			}
		})
	}
}

// TestUpstreamConstraints: what the company allows is kept to, DNS names and
// CAs below included.
func TestUpstreamConstraints(t *testing.T) {
	root := newCompanyCA(t, "Root", nil, 24*365*time.Hour, func(c *x509.Certificate) {
		c.PermittedURIDomains, c.PermittedDNSDomains, c.PermittedDNSDomainsCritical = []string{"example.org"}, []string{"example.org"}, true
		c.MaxPathLen = 2
	})
	up := newCompany(t, root)
	a := inMemory(t, embedded.NewMemoryStore(), embedded.Config{Upstream: up, CATTL: 1000 * time.Hour})
	good, bad := newEntry("/good", "unix:uid:1"), newEntry("/bad", "unix:uid:2")
	good.DNSNames, bad.DNSNames = []string{"w.example.org"}, []string{"w.example.com"}
	verifiesChain(t, a, signChain(t, a, mustCreate(t, a, good)))
	if _, err := trySign(t, a, mustCreate(t, a, bad)); err == nil || !strings.Contains(err.Error(), "w.example.com") {
		t.Errorf("a name that is not permitted: %v", err)
	}
	csr := newCSR(t, newKey(t), x509.CertificateRequest{})
	issued, roots, err := a.NewDownstreamX509CA(t.Context(), csr, 0)
	if err != nil || len(issued.Chain) != 2 || len(roots) != 1 || !roots[0].Equal(root.cert) {
		t.Fatalf("%v", err)
	}
	if c, err := x509.ParseCertificate(issued.Chain[0]); err != nil || !slices.Equal(c.Subject.OrganizationalUnit, []string{"DOWNSTREAM-1"}) {
		t.Errorf("%v, %v", c.Subject, err)
	}
	// One below the other: the last has no room for a third.
	up.change(func() { up.shape = func(c *x509.Certificate) { c.MaxPathLenZero = true } })
	if err := a.RotateNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, _, err := a.NewDownstreamX509CA(t.Context(), csr, 0); err == nil || !strings.Contains(err.Error(), "allows no further CA") {
		t.Errorf("a CA that nobody would accept: %v", err)
	}
	// The CA above ends first.
	if end := requireX509(t, a).Active.ExpiresAt; end.After(root.cert.NotAfter) {
		t.Errorf("the CA ends at %s, the one above at %s", end, root.cert.NotAfter)
	}
}

// TestUpstreamEnding: a CA above that is about to end does not make for ever
// shorter CAs below it.
func TestUpstreamEnding(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root := newCompanyCA(t, "Root", nil, 30*time.Hour, nil)
		up := newCompany(t, root)
		a := inMemory(t, embedded.NewMemoryStore(), embedded.Config{Upstream: up})
		running(t, a)
		time.Sleep(29 * time.Hour)
		if s := a.UpstreamStatus(); s.Err == nil || !strings.Contains(s.Err.Error(), "has to be renewed") {
			t.Errorf("%+v", s)
		}
		up.change(func() {
			if up.signed > 200 {
				t.Errorf("%d certificates signed", up.signed)
			}
			up.issuer = newCompanyCA(t, "Root 2", nil, 1000*time.Hour, nil)
			up.roots = append(up.roots, embedded.Root{Certificate: up.issuer.cert})
		})
		time.Sleep(10 * time.Minute)
		if s := a.UpstreamStatus(); s.Err != nil || time.Until(requireX509(t, a).Active.ExpiresAt) < 20*time.Hour {
			t.Errorf("%+v %+v", s, requireX509(t, a))
		}
	})
}

// TestUpstreamRollover: the company replaces its root. Taint and revocation of
// the old one work by hand, and last where the company goes on listing it.
func TestUpstreamRollover(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old := newCompanyCA(t, "Root 1", nil, 10*365*24*time.Hour, nil)
		fresh := newCompanyCA(t, "Root 2", nil, 10*365*24*time.Hour, nil)
		up := newCompany(t, old)
		a := inMemory(t, embedded.NewMemoryStore(), embedded.Config{Upstream: up})
		e := mustCreate(t, a, newEntry("/w"))
		running(t, a)
		oldID := requireX509(t, a).Active.UpstreamID
		if _, err := a.TaintX509Upstream(t.Context(), oldID); !errors.Is(err, embedded.ErrInvalid) {
			t.Errorf("taint of the present root: %v", err)
		}
		before := signChain(t, a, e)
		// First the new root is announced, then it signs.
		up.change(func() { up.roots = append(up.roots, embedded.Root{Certificate: fresh.cert}) })
		time.Sleep(10 * time.Second)
		if !hasRoot(a, fresh.cert) {
			t.Fatal("the new root is not announced")
		}
		up.change(func() { up.issuer = fresh })
		if err := a.RotateNow(t.Context()); err != nil {
			t.Fatal(err)
		}
		verifiesChain(t, a, before)
		verifiesChain(t, a, signChain(t, a, e))
		state := requireX509(t, a)
		if state.Old == nil || state.Old.UpstreamID != oldID || state.Active.UpstreamID == oldID {
			t.Fatalf("%+v", state)
		}
		if _, err := a.TaintX509(t.Context(), state.Old.ID); !errors.Is(err, embedded.ErrPrecondition) {
			t.Errorf("taint of the CA itself: %v", err)
		}
		if err := a.RevokeX509(t.Context(), state.Old.ID); !errors.Is(err, embedded.ErrPrecondition) {
			t.Errorf("revocation of the CA itself: %v", err)
		}
		if _, err := a.RevokeX509Upstream(t.Context(), oldID); err == nil || errors.Is(err, embedded.ErrInvalid) {
			t.Errorf("revocation before the taint: %v", err)
		}
		if _, err := a.TaintX509Upstream(t.Context(), strings.ToUpper(oldID)); err != nil {
			t.Fatal(err)
		}
		if set := getBundles(t, a); !set.TaintedX509[oldID] || !set.Own.HasX509Authority(old.cert) {
			t.Error("not tainted")
		}
		if _, err := a.TaintX509Upstream(t.Context(), oldID); err == nil {
			t.Error("tainted twice")
		}
		if _, err := a.RevokeX509Upstream(t.Context(), oldID); err != nil || hasRoot(a, old.cert) {
			t.Errorf("not revoked: %v", err)
		}
		time.Sleep(time.Minute)
		if hasRoot(a, old.cert) {
			t.Error("it came back")
		}
		// Nor does a CA below it.
		up.change(func() { up.issuer = old })
		if _, err := a.PrepareX509(t.Context()); err == nil || !strings.Contains(err.Error(), "revoked here") {
			t.Errorf("a CA below the revoked root: %v", err)
		}
	})
}

// TestUpstreamTaints: a parent that taints its root gets its child off it before
// the child's own agents hear of it, and takes it away by leaving it out.
func TestUpstreamTaints(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old := newCompanyCA(t, "Root 1", nil, 1000*time.Hour, nil)
		fresh := newCompanyCA(t, "Root 2", nil, 1000*time.Hour, nil)
		up := newCompany(t, old)
		up.knows = true
		a := inMemory(t, embedded.NewMemoryStore(), embedded.Config{Upstream: up})
		e := mustCreate(t, a, newEntry("/w"))
		running(t, a)
		oldID := requireX509(t, a).Active.UpstreamID
		up.change(func() {
			up.issuer = fresh
			up.roots = []embedded.Root{{Certificate: old.cert, Tainted: true}, {Certificate: fresh.cert}}
		})
		for set := getBundles(t, a); !set.TaintedX509[oldID]; {
			var err error
			if set, err = a.Bundles(t.Context(), set.Version); err != nil {
				t.Fatal(err)
			}
		}
		if now := requireX509(t, a).Active.UpstreamID; now == oldID {
			t.Error("told before the CA was replaced")
		}
		verifiesChain(t, a, signChain(t, a, e))
		up.change(func() { up.roots = up.roots[1:] })
		time.Sleep(10 * time.Second)
		if hasRoot(a, old.cert) {
			t.Error("not revoked")
		}
	})
}

// TestUpstreamJWT: JWT keys go up before they sign, everybody's come back, and
// one that the parent lost is published again.
func TestUpstreamJWT(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := embedded.NewMemoryStore()
		a := inMemory(t, store, embedded.Config{})
		before, err := a.JWTAuthorities()
		if err != nil {
			t.Fatal(err)
		}
		up := newCompany(t, newCompanyCA(t, "Root", nil, 1000*time.Hour, nil))
		sibling := someJWTKey(t, "sibling")
		up.knows, up.jwt = true, []embedded.JWTKey{sibling}
		a = inMemory(t, store, embedded.Config{Upstream: up})
		running(t, a)
		time.Sleep(10 * time.Second)
		ids := func(keys []embedded.JWTKey) (out []string) {
			for _, k := range keys {
				out = append(out, k.ID)
			}
			slices.Sort(out)
			return out
		}
		want := []string{before.Active.ID, "sibling"}
		slices.Sort(want)
		if got := ids(up.jwtKeys()); !slices.Equal(got, want) {
			t.Errorf("upstream has %q, want %q", got, want)
		}
		if got := ids(a.OwnBundle().JWT); !slices.Equal(got, want) {
			t.Errorf("the bundle has %q, want %q", got, want)
		}
		up.change(func() { up.jwt = nil })
		time.Sleep(10 * time.Second)
		if got := ids(up.jwtKeys()); !slices.Equal(got, []string{before.Active.ID}) {
			t.Errorf("upstream got back %q", got)
		}
		// A key that cannot be published is not used.
		up.change(func() { up.err = errAway })
		if _, err := a.PrepareJWT(t.Context()); !errors.Is(err, errAway) {
			t.Errorf("prepared: %v", err)
		}
		up.change(func() { up.err = nil })
		made, err := a.PrepareJWT(t.Context())
		if err != nil || !slices.Contains(ids(up.jwtKeys()), made.ID) {
			t.Errorf("%+v, %v", made, err)
		}
	})
}
