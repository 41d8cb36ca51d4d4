package svid_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

func TestKeyTypes(t *testing.T) {
	t.Parallel()
	for kind, right := range map[string]func(crypto.Signer) bool{
		"":         func(k crypto.Signer) bool { e, ok := k.(*ecdsa.PrivateKey); return ok && e.Curve == elliptic.P256() },
		"ec-p256":  func(k crypto.Signer) bool { e, ok := k.(*ecdsa.PrivateKey); return ok && e.Curve == elliptic.P256() },
		"ec-p384":  func(k crypto.Signer) bool { e, ok := k.(*ecdsa.PrivateKey); return ok && e.Curve == elliptic.P384() },
		"rsa-2048": func(k crypto.Signer) bool { r, ok := k.(*rsa.PrivateKey); return ok && r.N.BitLen() == 2048 },
	} {
		t.Run("type "+kind, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := run(t, newAuthority(), newEntries(workload("web")), func(c *svid.Config) { c.KeyType = kind })
				s := w.subscribe(newCaller("web", "unix:user:web"))
				synctest.Wait()
				u := s.Update()
				if len(u.Identities) != 1 {
					t.Fatalf("%+v", u)
				}
				id := u.Identities[0].SVID
				if !right(id.Key) {
					t.Errorf("key is a %T", id.Key)
				}
				parsed, err := x509.ParsePKCS8PrivateKey(id.KeyDER)
				if err != nil || !id.Key.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(parsed.(crypto.Signer).Public()) {
					t.Errorf("KeyDER: %v", err)
				}
				roots := x509.NewCertPool()
				roots.AddCert(w.ca.ca.cert)
				if _, err := id.Certificates[0].Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
					t.Error(err)
				}
				advance(40 * time.Minute)
				if again := s.Update().Identities[0].SVID; again.Key.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(id.Key.Public()) {
					t.Error("the renewed SVID has the old key")
				}
			})
		})
	}
}

// crooked wraps an authority and bends what it returns.
type crooked struct {
	*fakeAuthority
	bend func(*x509.Certificate, *authority.X509Issued) (*authority.X509Issued, error)
}

func (c *crooked) SignX509(ctx context.Context, req authority.X509Request) (*authority.X509Issued, error) {
	out, err := c.fakeAuthority.SignX509(ctx, req)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(out.Chain[0])
	if err != nil {
		return nil, err
	}
	return c.bend(leaf, out)
}

func TestWrongCertificatesAreNotServed(t *testing.T) {
	t.Parallel()
	reissue := func(ca *ca, pub crypto.PublicKey, tmpl *x509.Certificate) *authority.X509Issued {
		der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.cert, pub, ca.key)
		must(err)
		return &authority.X509Issued{Chain: [][]byte{der}}
	}
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	for name, c := range map[string]struct {
		bend func(ca *ca, leaf *x509.Certificate, out *authority.X509Issued) *authority.X509Issued
		want string
	}{
		"nothing": {func(*ca, *x509.Certificate, *authority.X509Issued) *authority.X509Issued { return nil }, "nothing"},
		"empty chain": {func(*ca, *x509.Certificate, *authority.X509Issued) *authority.X509Issued {
			return &authority.X509Issued{}
		}, "empty"},
		"garbage": {func(_ *ca, _ *x509.Certificate, out *authority.X509Issued) *authority.X509Issued {
			return &authority.X509Issued{Chain: append(out.Chain, []byte("x"))}
		}, "certificate 1"},
		"another ID": {func(ca *ca, leaf *x509.Certificate, _ *authority.X509Issued) *authority.X509Issued {
			leaf.URIs = []*url.URL{workload("db").SPIFFEID.URL()}
			return reissue(ca, leaf.PublicKey, leaf)
		}, "not for"},
		"no ID": {func(ca *ca, leaf *x509.Certificate, _ *authority.X509Issued) *authority.X509Issued {
			leaf.URIs = nil
			return reissue(ca, leaf.PublicKey, leaf)
		}, "no X.509-SVID"},
		"another key": {func(ca *ca, leaf *x509.Certificate, _ *authority.X509Issued) *authority.X509Issued {
			return reissue(ca, other.Public(), leaf)
		}, "another public key"},
		"a CA": {func(ca *ca, leaf *x509.Certificate, _ *authority.X509Issued) *authority.X509Issued {
			leaf.IsCA, leaf.BasicConstraintsValid, leaf.KeyUsage = true, true, x509.KeyUsageCertSign
			return reissue(ca, leaf.PublicKey, leaf)
		}, "is a CA"},
		"expired": {func(ca *ca, leaf *x509.Certificate, _ *authority.X509Issued) *authority.X509Issued {
			leaf.NotBefore, leaf.NotAfter = leaf.NotBefore.Add(-2*time.Hour), leaf.NotBefore
			return reissue(ca, leaf.PublicKey, leaf)
		}, "expired"},
		"backwards": {func(ca *ca, leaf *x509.Certificate, _ *authority.X509Issued) *authority.X509Issued {
			leaf.NotBefore, leaf.NotAfter = leaf.NotAfter, leaf.NotBefore
			leaf.SerialNumber = big.NewInt(1)
			return reissue(ca, leaf.PublicKey, leaf)
		}, "before it starts"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				inner := newAuthority()
				ca := &crooked{inner, func(leaf *x509.Certificate, out *authority.X509Issued) (*authority.X509Issued, error) {
					return c.bend(inner.ca, leaf, out), nil
				}}
				w := run(t, inner, newEntries(workload("web")), func(cfg *svid.Config) { cfg.Authority = ca })
				c1 := newCaller("web", "unix:user:web")
				s := w.subscribe(c1)
				advance(time.Minute)
				if u := s.Update(); len(u.Identities) != 0 || len(u.Late) != 1 {
					t.Errorf("handed out: %+v", u)
				}
				if in, _ := w.m.Inspect(c1); !strings.Contains(in.Entries[0].LastError, c.want) {
					t.Errorf("shown: %q, want %q", in.Entries[0].LastError, c.want)
				}
				if n := inner.signs(); n < 5 || n > 12 {
					t.Errorf("asked %d times in a minute", n)
				}
			})
		})
	}
}

func TestPanickingAuthority(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ca := newAuthority()
		web := workload("web")
		w := run(t, ca, newEntries(web))
		ca.set(func() { ca.fail = func(string) error { panic("oops") } })
		c := newCaller("web", "unix:user:web")
		s := w.subscribe(c)
		synctest.Wait()
		if in, _ := w.m.Inspect(c); !strings.Contains(in.Entries[0].LastError, "oops") {
			t.Errorf("%+v", in)
		}
		if _, err := w.m.JWT(t.Context(), c, web, []string{"a"}); err == nil {
			t.Error("a token came out of a panic")
		}
		ca.set(func() { ca.fail = nil })
		advance(time.Second)
		if serial(s.Update()) == "" {
			t.Error("not served after the fault")
		}
	})
}

// nagging sources answer at once with an error, or with what is known already.
type nagging struct {
	*fakeAuthority
	calls int
	err   error
}

func (n *nagging) Entries(context.Context, uint64) (*entry.Set, error) {
	n.calls++
	if n.calls%2 == 0 {
		return nil, n.err
	}
	return entry.NewSet(), nil
}

func (n *nagging) Bundles(context.Context, uint64) (*authority.BundleSet, error) {
	return nil, nil
}

func TestFaultySourcesAreNotABusyLoop(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		src := &nagging{fakeAuthority: newAuthority(), err: errors.New("away")}
		w := run(t, src.fakeAuthority, newEntries(), func(c *svid.Config) { c.Authority, c.Entries = src, src })
		s := w.subscribe(newCaller("x"))
		advance(10 * time.Minute)
		w.stop()
		if src.calls < 10 || src.calls > 100 {
			t.Errorf("asked %d times in 10 min", src.calls)
		}
		if s.Update().Synced {
			t.Error("in sync without bundles")
		}
	})
}

func TestConfigIsChecked(t *testing.T) {
	t.Parallel()
	good := svid.Config{Authority: newAuthority(), Entries: newEntries()}
	if _, err := svid.New(good); err != nil {
		t.Fatal(err)
	}
	for want, edit := range map[string]func(*svid.Config){
		"Authority":   func(c *svid.Config) { c.Authority = nil },
		"Entries":     func(c *svid.Config) { c.Entries = nil },
		"rsa-1024":    func(c *svid.Config) { c.KeyType = "rsa-1024" },
		"MaxParked":   func(c *svid.Config) { c.MaxParked = -1 },
		"SignTimeout": func(c *svid.Config) { c.SignTimeout = -1 },
	} {
		cfg := good
		edit(&cfg)
		if _, err := svid.New(cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v", want, err)
		}
	}
}
