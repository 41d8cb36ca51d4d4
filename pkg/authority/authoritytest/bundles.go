package authoritytest

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
)

// bundlesFirst: the first set is there without a change and is complete.
func (s suite) bundlesFirst() {
	t, h := s.T, s.Harness
	set := bundles(t, h)
	switch {
	case set.Version == 0:
		t.Error("version 0 means nothing was seen yet")
	case set.Own == nil:
		t.Fatal("no own bundle")
	case set.Own.TrustDomain() != h.TrustDomain:
		t.Errorf("own bundle of %s", set.Own.TrustDomain())
	case len(set.Own.X509Authorities()) == 0 || len(set.Own.JWTAuthorities()) == 0:
		t.Error("own bundle lacks authorities")
	}
	for td, b := range set.Federated {
		if b == nil || b.TrustDomain() != td || td == h.TrustDomain {
			t.Errorf("federated bundle of %s is %v", td, b)
		}
	}
	for _, root := range set.Own.X509Authorities() {
		if !root.IsCA {
			t.Errorf("authority %s is no CA", root.Subject)
		}
	}
}

// bundlesWait: a change wakes whoever waits; versions only grow.
func (s suite) bundlesWait() {
	t, h := s.T, s.Harness
	if h.ChangeBundle == nil {
		t.Skip("this harness cannot change the bundle")
	}
	first := bundles(t, h)
	type answer struct {
		set *authority.BundleSet
		err error
	}
	const waiters = 4
	answers := make(chan answer, waiters)
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	for range waiters {
		go func() {
			set, err := h.Authority.Bundles(ctx, first.Version)
			answers <- answer{set, err}
		}()
	}
	select {
	case a := <-answers:
		t.Fatalf("Bundles returned before any change: %+v", a)
	case <-time.After(50 * time.Millisecond):
	}
	h.ChangeBundle(t)
	for range waiters {
		a := <-answers
		if a.err != nil {
			t.Fatal(a.err)
		}
		if a.set.Version <= first.Version {
			t.Errorf("version %d after %d", a.set.Version, first.Version)
		}
		if a.set.Own.Equal(first.Own) {
			t.Error("woken without a change of content")
		}
	}
}

// bundlesStable: the same version is the same picture, and an authority that
// was published stays as long as SVIDs below it may live.
func (s suite) bundlesStable() {
	t, h := s.T, s.Harness
	a, b := bundles(t, h), bundles(t, h)
	if a.Version == b.Version && a.Own != b.Own {
		t.Error("two pointers for one version")
	}
	if h.ChangeBundle == nil {
		return
	}
	h.ChangeBundle(t)
	c := bundles(t, h)
	for _, root := range a.Own.X509Authorities() {
		if !c.Own.HasX509Authority(root) {
			t.Errorf("root %s vanished with the change", root.SerialNumber)
		}
	}
	for td, old := range a.Federated {
		if now, ok := c.Federated[td]; ok && now.Equal(old) && now != old {
			t.Errorf("bundle of %s has a new pointer and the old content", td)
		}
	}
}

// bundlesCancelled: waiting ends with the context, with its error.
func (s suite) bundlesCancelled() {
	t, h := s.T, s.Harness
	first := bundles(t, h)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := h.Authority.Bundles(ctx, first.Version+1000); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v, want the context's", err)
	}
}

// sentinels: a refusal is no passing fault.
func (s suite) sentinels() {
	t, h := s.T, s.Harness
	_, err := h.Authority.SignX509(t.Context(), authority.X509Request{EntryID: "nobody", SPIFFEID: h.id("/w")})
	wantRefused(t, "unknown entry", false, err)
	if errors.Is(errors.New("authority refused"), authority.ErrRefused) {
		t.Error("an unrelated error matches")
	}
}

// concurrent: many callers at once each get what they asked for, while the
// bundle changes under them.
func (s suite) concurrent() {
	t, h := s.T, s.Harness
	const workers, rounds = 8, 10
	var wg sync.WaitGroup
	csr := newCSR(t, newKey(t), x509.CertificateRequest{})
	for w := range workers {
		e := h.register(t, fmt.Sprintf("/w/%d", w), nil)
		wg.Go(func() {
			for range rounds {
				issued, err := h.Authority.SignX509(t.Context(), x509Request(e, csr))
				if err != nil {
					t.Error(err)
					return
				}
				// The bundle is read after the SVID was issued: its root must
				// be in there already.
				set, err := h.Authority.Bundles(t.Context(), 0)
				if err != nil {
					t.Error(err)
					return
				}
				certs, err := x509.ParseCertificates(issued.Chain[0])
				if err != nil {
					t.Error(err)
					return
				}
				if id, _, err := x509svid.Verify(certs, set.Own.X509Bundle()); err != nil || id != e.SPIFFEID {
					t.Errorf("%s: %v", id, err)
				}
				if _, err := h.Authority.SignJWT(t.Context(), jwtRequest(e, "a")); err != nil {
					t.Error(err)
				}
			}
		})
	}
	if h.ChangeBundle != nil {
		wg.Go(func() {
			for range 3 {
				h.ChangeBundle(t)
			}
		})
	}
	wg.Wait()
}

// stopped: an authority that cannot answer says so with a sentinel, and wakes
// whoever waits or lets their context end.
func (s suite) stopped() {
	t, h := s.T, s.Harness
	if h.Stop == nil {
		t.Skip("this harness cannot stop the authority")
	}
	e := h.register(t, "/w", nil)
	h.Stop(t)
	_, errX := h.Authority.SignX509(t.Context(), x509Request(e, newCSR(t, newKey(t), x509.CertificateRequest{})))
	_, errJ := h.Authority.SignJWT(t.Context(), jwtRequest(e, "a"))
	for _, err := range []error{errX, errJ} {
		if !errors.Is(err, authority.ErrNotReady) && !errors.Is(err, authority.ErrTryLater) {
			t.Errorf("error %v, want ErrNotReady or ErrTryLater", err)
		}
	}
}
