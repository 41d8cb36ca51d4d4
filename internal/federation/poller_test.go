package federation_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"log/slog"
	"maps"
	"math/big"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/internal/federation"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

var own = spiffeid.RequireTrustDomainFromString("own.org")

func domain(name string) spiffeid.TrustDomain { return spiffeid.RequireTrustDomainFromString(name) }

// store is relationships and bundles in memory.
type store struct {
	mu        sync.Mutex
	relations map[spiffeid.TrustDomain]embedded.Relationship
	relChange chan struct{}
	set       *authority.BundleSet
	setChange chan struct{}
	stored    map[spiffeid.TrustDomain]*embedded.Bundle
	writes    int
	fail      error
}

func newStore() *store {
	return &store{
		relations: make(map[spiffeid.TrustDomain]embedded.Relationship), relChange: make(chan struct{}), setChange: make(chan struct{}),
		stored: make(map[spiffeid.TrustDomain]*embedded.Bundle),
		set:    &authority.BundleSet{Version: 1, Own: spiffebundle.New(own)},
	}
}

func (s *store) put(r embedded.Relationship) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r.Row = int64(len(s.relations) + 1)
	s.relations[r.TrustDomain] = r
	close(s.relChange)
	s.relChange = make(chan struct{})
}

func (s *store) drop(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.relations, domain(name))
	close(s.relChange)
	s.relChange = make(chan struct{})
}

func (s *store) Relationships() []embedded.Relationship {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Values(s.relations))
}

func (s *store) RelationshipChanges() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.relChange
}

func (s *store) Bundles(ctx context.Context, after uint64) (*authority.BundleSet, error) {
	for {
		s.mu.Lock()
		set, change := s.set, s.setChange
		s.mu.Unlock()
		if set.Version > after {
			return set, nil
		}
		select {
		case <-change:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (s *store) FederatedBundle(td spiffeid.TrustDomain) (*embedded.Bundle, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b := s.stored[td]; b != nil {
		return b, nil
	}
	return nil, embedded.ErrNotFound
}

func (s *store) SetFederatedBundle(_ context.Context, b *embedded.Bundle) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		return s.fail
	}
	s.writes++
	s.stored[b.TrustDomain] = b
	next := &authority.BundleSet{Version: s.set.Version + 1, Own: s.set.Own, Federated: maps.Clone(s.set.Federated)}
	if next.Federated == nil {
		next.Federated = make(map[spiffeid.TrustDomain]*spiffebundle.Bundle)
	}
	shown := spiffebundle.New(b.TrustDomain)
	for _, r := range b.X509 {
		shown.AddX509Authority(r.Certificate)
	}
	next.Federated[b.TrustDomain] = shown
	s.set = next
	close(s.setChange)
	s.setChange = make(chan struct{})
	return nil
}

// world is a poller on a store, with endpoints that are functions.
type world struct {
	*federation.Poller
	store *store
	log   *bytes.Buffer

	mu        sync.Mutex
	endpoints map[string]func(context.Context) (*spiffebundle.Bundle, error)
	asked     map[string][]time.Time
}

// newWorld runs inside a synctest bubble.
func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{store: newStore(), log: new(bytes.Buffer), endpoints: make(map[string]func(context.Context) (*spiffebundle.Bundle, error)), asked: make(map[string][]time.Time)}
	var err error
	w.Poller, err = federation.New(federation.Config{Store: w.store, Logger: slog.New(slog.NewTextHandler(w.log, nil)), Fetch: w.fetch})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return w
}

func (w *world) fetch(ctx context.Context, r embedded.Relationship) (*spiffebundle.Bundle, error) {
	w.mu.Lock()
	w.asked[r.EndpointURL] = append(w.asked[r.EndpointURL], time.Now())
	f := w.endpoints[r.EndpointURL]
	w.mu.Unlock()
	if f == nil {
		return nil, errors.New("nobody is there")
	}
	return f(ctx)
}

func (w *world) serve(name string, f func(context.Context) (*spiffebundle.Bundle, error)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.endpoints["https://"+name] = f
}

func (w *world) asks(name string) []time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.asked["https://"+name])
}

func (w *world) relate(name string) {
	w.store.put(embedded.Relationship{TrustDomain: domain(name), EndpointURL: "https://" + name})
}

func (w *world) writes() int {
	w.store.mu.Lock()
	defer w.store.mu.Unlock()
	return w.store.writes
}

// bundle is one of a trust domain; root 0 = without authorities.
func bundle(t *testing.T, name string, sequence uint64, hint time.Duration) *spiffebundle.Bundle {
	t.Helper()
	b := spiffebundle.New(domain(name))
	b.AddX509Authority(newRoot(t))
	b.SetSequenceNumber(sequence)
	if hint > 0 {
		b.SetRefreshHint(hint)
	}
	return b
}

func newRoot(t *testing.T) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(1000 * time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func always(b *spiffebundle.Bundle) func(context.Context) (*spiffebundle.Bundle, error) {
	return func(context.Context) (*spiffebundle.Bundle, error) { return b, nil }
}

// A new relationship is fetched at once, then four times per refresh hint; what
// has not changed is not stored again.
func TestPace(t *testing.T) {
	for name, tc := range map[string]struct {
		hint     time.Duration
		atLeast  int // fetches in two hours
		atMost   int
		lifetime time.Duration
	}{
		"hint of an hour":   {hint: time.Hour, atLeast: 9, atMost: 10},
		"no hint":           {hint: 0, atLeast: 97, atMost: 108},
		"hint of a second":  {hint: time.Second, atLeast: 481, atMost: 540},
		"hint of centuries": {hint: 5000 * time.Hour, atLeast: 1, atMost: 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.serve("a.org", always(bundle(t, "a.org", 1, tc.hint)))
				start := time.Now()
				w.relate("a.org")
				time.Sleep(2 * time.Hour)
				synctest.Wait()
				asks := w.asks("a.org")
				if n := len(asks); n < tc.atLeast || n > tc.atMost || !asks[0].Equal(start) {
					t.Errorf("%d fetches, the first after %s", n, asks[0].Sub(start))
				}
				if w.writes() != 1 {
					t.Errorf("stored %d times", w.writes())
				}
				if s := w.Status(); len(s) != 1 || s[0].Failures != 0 || !s[0].StaleSince.IsZero() || s[0].LastError != "" {
					t.Errorf("%+v", s)
				}
				if n := strings.Count(w.log.String(), "\n"); n != 1 {
					t.Errorf("%d lines in the log:\n%s", n, w.log)
				}
			})
		})
	}
}

// An endpoint that hangs, and one that fails, hold up nobody else.
func TestOneBadEndpointHoldsUpNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.serve("silent.org", func(ctx context.Context) (*spiffebundle.Bundle, error) { <-ctx.Done(); return nil, ctx.Err() })
		w.relate("silent.org")
		w.relate("absent.org")
		w.serve("good.org", always(bundle(t, "good.org", 1, time.Minute)))
		synctest.Wait()
		w.relate("good.org")
		synctest.Wait()
		if _, err := w.store.FederatedBundle(domain("good.org")); err != nil {
			t.Error(err)
		}
		if err := w.Refresh(t.Context(), domain("good.org")); err != nil {
			t.Error(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := w.Refresh(ctx, domain("silent.org")); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("refresh of the silent one: %v", err)
		}
	})
}

// Failures are tried again with growing pauses, said once, and once more when
// the bundle is stale and when it is well again.
func TestFailureAndRecovery(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		var broken atomic.Bool
		b := bundle(t, "a.org", 1, 10*time.Minute)
		w.serve("a.org", func(context.Context) (*spiffebundle.Bundle, error) {
			if broken.Load() {
				return nil, errors.New("evil\x1b[31m\ntext " + strings.Repeat("x", 1000))
			}
			return b, nil
		})
		w.relate("a.org")
		synctest.Wait()
		broken.Store(true)
		before := len(w.asks("a.org"))
		time.Sleep(15 * time.Minute)
		s := w.Status()[0]
		if s.Failures < 4 || !s.StaleSince.IsZero() || s.LastSuccess.IsZero() {
			t.Errorf("after a quarter: %+v", s)
		}
		if strings.ContainsAny(s.LastError, "\x1b\n") || len(s.LastError) > 400 {
			t.Errorf("the error is shown as %q", s.LastError)
		}
		time.Sleep(15 * time.Minute)
		if s = w.Status()[0]; s.StaleSince.IsZero() {
			t.Errorf("after half an hour: %+v", s)
		}
		if n := len(w.asks("a.org")) - before; n < 12 || n > 30 {
			t.Errorf("%d attempts in half an hour", n)
		}
		broken.Store(false)
		time.Sleep(5 * time.Minute)
		if s = w.Status()[0]; s.Failures != 0 || !s.StaleSince.IsZero() || s.LastError != "" {
			t.Errorf("after recovery: %+v", s)
		}
		synctest.Wait()
		for text, n := range map[string]int{"could not be fetched": 1, "is stale": 1, "fetched again": 1, "bundle stored": 1} {
			if got := strings.Count(w.log.String(), text); got != n {
				t.Errorf("%q is said %d times, not %d", text, got, n)
			}
		}
	})
}

// What changes is stored, an older sequence number only when it comes again and
// again.
func TestSequenceNumbers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		serve := func(b *spiffebundle.Bundle) { w.serve("a.org", always(b)) }
		serve(bundle(t, "a.org", 7, time.Minute))
		w.relate("a.org")
		synctest.Wait()
		refresh := func() error { return w.Refresh(t.Context(), domain("a.org")) }
		sequence := func() uint64 {
			b, err := w.store.FederatedBundle(domain("a.org"))
			if err != nil {
				t.Fatal(err)
			}
			return b.Sequence
		}
		newest, old := bundle(t, "a.org", 8, time.Minute), bundle(t, "a.org", 3, time.Minute)
		serve(newest)
		if err := refresh(); err != nil || sequence() != 8 {
			t.Errorf("the next: %d, %v", sequence(), err)
		}
		for range 2 {
			serve(old)
			if err := refresh(); err == nil || !strings.Contains(err.Error(), "sequence number 3, older than 8") || sequence() != 8 {
				t.Errorf("an older one: %d, %v", sequence(), err)
			}
			serve(newest)
			if err := refresh(); err != nil {
				t.Error(err)
			}
		}
		serve(old)
		for i := range 3 {
			if err := refresh(); (err == nil) != (i == 2) {
				t.Errorf("time %d: %v", i, err)
			}
		}
		if sequence() != 3 {
			t.Errorf("stored is %d", sequence())
		}
		w.store.fail = errors.New("disk is full")
		serve(bundle(t, "a.org", 9, time.Minute))
		if err := refresh(); err == nil || !strings.Contains(err.Error(), "disk is full") {
			t.Errorf("got %v", err)
		}
	})
}

// A change of the relationship is acted on at once, its end too.
func TestRelationshipChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.serve("a.org", always(bundle(t, "a.org", 1, time.Hour)))
		w.relate("a.org")
		synctest.Wait()
		w.serve("b.org", always(bundle(t, "a.org", 2, time.Hour)))
		w.store.put(embedded.Relationship{TrustDomain: domain("a.org"), EndpointURL: "https://b.org"})
		synctest.Wait()
		if b, err := w.store.FederatedBundle(domain("a.org")); err != nil || b.Sequence != 2 {
			t.Errorf("%+v, %v", b, err)
		}
		changed := w.Changed()
		w.store.drop("a.org")
		synctest.Wait()
		select {
		case <-changed:
		default:
			t.Error("nobody is told")
		}
		n := len(w.asks("b.org"))
		time.Sleep(24 * time.Hour)
		if len(w.asks("b.org")) != n || len(w.Status()) != 0 {
			t.Error("a deleted relationship is fetched on")
		}
		if err := w.Refresh(t.Context(), domain("a.org")); !errors.Is(err, embedded.ErrNotFound) {
			t.Errorf("refresh: %v", err)
		}
	})
}

// When the bundle comes by which an endpoint can be known, it is tried at once.
func TestEndpointBundleComesLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		id := spiffeid.RequireFromString("spiffe://elsewhere.org/x")
		w.store.put(embedded.Relationship{TrustDomain: domain("a.org"), EndpointURL: "https://a.org", EndpointID: id})
		time.Sleep(time.Hour)
		synctest.Wait()
		w.serve("a.org", always(bundle(t, "a.org", 1, time.Hour)))
		given, err := embedded.BundleOf(bundle(t, "elsewhere.org", 1, 0))
		if err != nil {
			t.Fatal(err)
		}
		if err := w.store.SetFederatedBundle(t.Context(), given); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if _, err := w.store.FederatedBundle(domain("a.org")); err != nil {
			t.Error(err)
		}
	})
}

func TestMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := prometheus.NewRegistry()
		s := newStore()
		p, err := federation.New(federation.Config{Store: s, Metrics: federation.NewMetrics(reg), Fetch: func(context.Context, embedded.Relationship) (*spiffebundle.Bundle, error) {
			return nil, errors.New("no")
		}})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- p.Run(ctx) }()
		s.put(embedded.Relationship{TrustDomain: domain("a.org"), EndpointURL: "https://a.org"})
		synctest.Wait()
		want := func(stale string) string {
			return `
# HELP spiffe_node_federation_bundle_stale 1 = the bundle of a foreign trust domain was not fetched for twice its refresh hint.
# TYPE spiffe_node_federation_bundle_stale gauge
spiffe_node_federation_bundle_stale{trust_domain="a.org"} ` + stale + "\n"
		}
		if err := testutil.GatherAndCompare(reg, strings.NewReader(want("0")), "spiffe_node_federation_bundle_stale"); err != nil {
			t.Error(err)
		}
		time.Sleep(11 * time.Minute)
		if err := testutil.GatherAndCompare(reg, strings.NewReader(want("1")), "spiffe_node_federation_bundle_stale"); err != nil {
			t.Error(err)
		}
		if n, err := testutil.GatherAndCount(reg, "spiffe_node_federation_last_success_timestamp_seconds", "spiffe_node_federation_failures", "spiffe_node_federation_fetches_total", "spiffe_node_federation_fetch_seconds"); err != nil || n != 4 {
			t.Errorf("%d series, %v", n, err)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
