package federation

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/internal/adminapi"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

// Store holds relationships and bundles; *embedded.Authority is one.
type Store interface {
	// Relationships are those there are now; RelationshipChanges closes when
	// others are there.
	Relationships() []embedded.Relationship
	RelationshipChanges() <-chan struct{}
	// Bundles are those stored now.
	Bundles(ctx context.Context, after uint64) (*authority.BundleSet, error)
	// FederatedBundle is the stored bundle; an error without one.
	FederatedBundle(td spiffeid.TrustDomain) (*embedded.Bundle, error)
	// SetFederatedBundle stores a bundle; an equal one changes nothing.
	SetFederatedBundle(ctx context.Context, b *embedded.Bundle) error
}

// Config says what to keep fresh, and how.
type Config struct {
	// Store is required.
	Store Store
	// Roots judge https_web endpoints; nil = the system's.
	Roots *x509.CertPool
	// Logger gets what changes; nil = nothing is logged.
	Logger *slog.Logger
	// Metrics counts; nil = unregistered ones.
	Metrics *Metrics
	// Fetch replaces fetching, for tests; nil = over HTTPS.
	Fetch func(ctx context.Context, r embedded.Relationship) (*spiffebundle.Bundle, error)
}

// Poller keeps the bundles of all relationships fresh. Build one with New and
// keep Run running. Safe for concurrent use.
type Poller struct {
	store   Store
	fetch   func(ctx context.Context, r embedded.Relationship) (*spiffebundle.Bundle, error)
	log     *slog.Logger
	metrics *Metrics

	mu    sync.Mutex
	ctx   context.Context // of Run; nil before and after
	wg    *sync.WaitGroup
	tasks map[spiffeid.TrustDomain]*task

	changed changed
}

// New builds a Poller. Nothing is fetched before it runs.
func New(cfg Config) (*Poller, error) {
	if cfg.Store == nil {
		return nil, errors.New("federation: missing Store")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Metrics == nil {
		cfg.Metrics = NewMetrics(nil)
	}
	p := &Poller{store: cfg.Store, fetch: cfg.Fetch, log: cfg.Logger, metrics: cfg.Metrics, tasks: make(map[spiffeid.TrustDomain]*task)}
	if p.fetch == nil {
		f := &fetcher{roots: cfg.Roots, bundle: p.x509Bundle}
		p.fetch = f.fetch
	}
	p.changed.init()
	p.metrics.follow(p)
	return p, nil
}

var _ adminapi.Federation = (*Poller)(nil)

// Run fetches until ctx ends, then returns nil. It must be called once.
func (p *Poller) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	p.mu.Lock()
	p.ctx, p.wg = ctx, &wg
	p.mu.Unlock()
	defer wg.Wait()
	defer cancel()
	defer func() {
		p.mu.Lock()
		p.ctx = nil
		p.mu.Unlock()
	}()
	wg.Go(func() { p.watchBundles(ctx) })
	for {
		changes := p.store.RelationshipChanges()
		p.follow() //nolint:contextcheck // tasks live as long as Run
		select {
		case <-ctx.Done():
			return nil
		case <-changes:
		}
	}
}

// follow starts, replaces and ends tasks so that there is one for each
// relationship.
func (p *Poller) follow() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ctx == nil || p.ctx.Err() != nil {
		return
	}
	have, moved := make(map[spiffeid.TrustDomain]bool), false
	for _, r := range p.store.Relationships() {
		have[r.TrustDomain] = true
		old := p.tasks[r.TrustDomain]
		if old != nil && old.about == r {
			continue
		}
		moved = true
		t := newTask(p, r)
		if old != nil {
			old.cancel()
			t.inherit(old)
		}
		var ctx context.Context
		ctx, t.cancel = context.WithCancel(p.ctx)
		p.tasks[r.TrustDomain] = t
		p.wg.Go(func() { t.run(ctx) })
	}
	for td, t := range p.tasks {
		if !have[td] {
			moved = true
			t.cancel()
			delete(p.tasks, td)
		}
	}
	if moved {
		p.changed.say()
	}
}

// watchBundles has endpoints tried at once that could not be authenticated
// before, when the bundle by which they are known changes.
func (p *Poller) watchBundles(ctx context.Context) {
	var last *authority.BundleSet
	for {
		var after uint64
		if last != nil {
			after = last.Version
		}
		set, err := p.store.Bundles(ctx, after)
		if err != nil {
			return // ctx has ended, or the store is closed
		}
		if last != nil {
			p.retryAfter(last, set)
		}
		last = set
	}
}

func (p *Poller) retryAfter(before, now *authority.BundleSet) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, t := range p.tasks {
		td := t.about.EndpointID.TrustDomain()
		if !td.IsZero() && before.Federated[td] != now.Federated[td] && t.failing() {
			select {
			case t.kick <- struct{}{}:
			default:
			}
		}
	}
}

// Refresh fetches one bundle now and stores it if it is new. Error:
// embedded.ErrNotFound without a relationship.
func (p *Poller) Refresh(ctx context.Context, td spiffeid.TrustDomain) error {
	p.follow() //nolint:contextcheck // tasks live as long as Run; a relationship that was made just now counts
	p.mu.Lock()
	t := p.tasks[td]
	p.mu.Unlock()
	if t == nil {
		return fmt.Errorf("%w: no federation relationship with %q", embedded.ErrNotFound, td)
	}
	return t.refresh(ctx)
}

// Status is that of all relationships, in the order of their creation.
func (p *Poller) Status() []adminapi.RelationshipStatus {
	p.mu.Lock()
	tasks := make([]*task, 0, len(p.tasks))
	for _, t := range p.tasks {
		tasks = append(tasks, t)
	}
	p.mu.Unlock()
	slices.SortFunc(tasks, func(x, y *task) int { return cmp.Compare(x.about.Row, y.about.Row) })
	out := make([]adminapi.RelationshipStatus, len(tasks))
	for i, t := range tasks {
		out[i] = t.status(time.Now())
	}
	return out
}

// StatusOf is that of one relationship; false without one.
func (p *Poller) StatusOf(td spiffeid.TrustDomain) (adminapi.RelationshipStatus, bool) {
	p.mu.Lock()
	t := p.tasks[td]
	p.mu.Unlock()
	if t == nil {
		return adminapi.RelationshipStatus{}, false
	}
	return t.status(time.Now()), true
}

// Changed closes when the outcome of some relationship has changed: it began to
// fail, recovered, or went stale.
func (p *Poller) Changed() <-chan struct{} { return p.changed.next() }

// x509Bundle is what is stored for a trust domain, the own one included.
func (p *Poller) x509Bundle(td spiffeid.TrustDomain) *x509bundle.Bundle {
	// What is asked for after 0 is there at once, or not at all.
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	set, err := p.store.Bundles(ctx, 0)
	if err != nil {
		return nil
	}
	if td == set.Own.TrustDomain() {
		return set.Own.X509Bundle()
	}
	if b, ok := set.Federated[td]; ok {
		return b.X509Bundle()
	}
	return nil
}

// changed is a channel that closes at each change and is replaced by the next.
type changed struct {
	mu sync.Mutex
	ch chan struct{}
}

func (c *changed) init() { c.ch = make(chan struct{}) }

func (c *changed) next() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ch
}

func (c *changed) say() {
	c.mu.Lock()
	defer c.mu.Unlock()
	close(c.ch)
	c.ch = make(chan struct{})
}
