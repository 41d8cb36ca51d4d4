package embedded

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/internal/latest"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// Periods of the jobs in Run; SPIRE Server's.
const (
	rotatePeriod      = 10 * time.Second
	pruneEntryPeriod  = 5 * time.Minute
	pruneBundlePeriod = 6 * time.Hour
)

// Authority is the embedded authority. Build one with Open, keep Run running,
// and Close it at the end. All methods are safe for concurrent use; those that
// change something return when the change is durable and visible to readers.
type Authority struct {
	cfg     Config
	log     *slog.Logger
	metrics *Metrics
	count   signCounters

	// What readers see: immutable values, replaced whole after their change is
	// durable.
	entries *latest.Value[*entry.Set]
	bundles *latest.Value[*bundleBook]
	agents  *latest.Value[*agentBook]
	journal atomic.Pointer[journal]

	relations *latest.Value[*relationBook]

	closed    chan struct{}
	closeOnce sync.Once

	// rotating is held during a step of rotation, which may wait for somebody
	// else; it is taken before mu. Only steps change the journal.
	rotating sync.Mutex

	upstream upstreamState

	// mu is held during a change, from reading the present state to
	// publishing the new one; it guards the store and every set above.
	mu     sync.Mutex
	store  store
	tokens map[string]time.Time // join token -> when it expires
	// delayed is the prepared authority whose wait has been logged, by kind; it
	// belongs to rotate.
	delayed map[kind]string

	fleet *fleet
}

var _ authority.Authority = (*Authority)(nil)

// Open reads the state file, or creates it with a new CA, and leaves the
// authority ready to sign. A state whose CA has expired is opened too; if its
// successor cannot be stored, signing answers authority.ErrNotReady until it
// can. So it is where upstream is away and no CA is valid; where one is,
// upstream is not asked before Run. Errors wrap ErrCorrupt, ErrLocked, ErrForeign or ErrNewer where they
// apply; the state file is then as it was.
func Open(cfg Config) (*Authority, error) {
	cfg = cfg.withDefaults()
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("embedded authority: %w", err)
	}
	start := time.Now()
	s, err := openBolt(cfg.StatePath, cfg.TrustDomain, cfg.LockTimeout)
	if err != nil {
		return nil, fmt.Errorf("embedded authority: %w", err)
	}
	a, err := open(cfg, s)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("embedded authority: %w", err), s.close())
	}
	if s.readOnly {
		a.log.Warn("state file is read-only; entries cannot be changed and the CA cannot be rotated", slog.String("path", cfg.StatePath))
	}
	a.log.Info("embedded authority opened", slog.String("path", cfg.StatePath), slog.String("trust_domain", cfg.TrustDomain.Name()),
		slog.Int("entries", a.Set().Len()), slog.Duration("took", time.Since(start)))
	return a, nil
}

// open builds the authority on a store, which it does not close on error. cfg
// is complete.
func open(cfg Config, s store) (*Authority, error) {
	a := &Authority{
		cfg: cfg, log: cfg.Logger, metrics: cfg.Metrics,
		count: newSignCounters(cfg.Metrics), closed: make(chan struct{}), store: s,
		delayed: make(map[kind]string), fleet: newFleet(),
	}
	if err := a.load(); err != nil {
		return nil, err
	}
	if longest := min(cfg.CATTL/6, 7*24*time.Hour); cfg.DefaultX509SVIDTTL > longest {
		a.log.Warn("default X509-SVID TTL is longer than the CA's last stretch; SVIDs issued shortly before a rotation will be shorter",
			slog.Duration("ttl", cfg.DefaultX509SVIDTTL), slog.Duration("longest", longest))
	}
	if err := a.leaveUpstream(time.Now()); err != nil {
		a.log.Error("cannot note that there is no upstream authority any more", slog.Any("error", err))
	}
	if err := a.rotateAtStart(); err != nil {
		if a.journal.Load().x509.current == nil {
			return nil, fmt.Errorf("make the first CA: %w", err)
		}
		a.log.Error("cannot rotate the CA at start; trying again", slog.Any("error", err))
	}
	return a, nil
}

// TrustDomain is the authority's trust domain.
func (a *Authority) TrustDomain() spiffeid.TrustDomain { return a.cfg.TrustDomain }

// Run rotates the CA, deletes expired entries and prunes the bundle until ctx
// ends, then returns nil. Faults are logged and tried again.
func (a *Authority) Run(ctx context.Context) error {
	rotation := time.NewTicker(rotationPeriod(a.cfg.CATTL))
	defer rotation.Stop()
	// The first pass comes after a whole period, not at once: a clock that is
	// wrong at boot gets the time to be set right before anything is deleted.
	entries := time.NewTicker(pruneEntryPeriod)
	defer entries.Stop()
	bundle := time.NewTicker(pruneBundlePeriod)
	defer bundle.Stop()
	if a.cfg.Upstream != nil {
		// Closing ends it too, though not a call that is under way.
		follow, cancel := context.WithCancel(ctx)
		var done sync.WaitGroup
		done.Go(func() { a.followUpstream(follow) })
		defer done.Wait()
		defer cancel()
	}
	for {
		var what string
		var err error
		select {
		case <-ctx.Done():
			return nil
		case <-a.closed:
			return nil
		case <-rotation.C:
			what, err = "rotate the CA", a.rotate(ctx, time.Now())
		case <-entries.C:
			what, err = "delete expired entries and join tokens", errors.Join(a.pruneEntries(time.Now()), a.pruneTokens(time.Now()))
		case <-bundle.C:
			what, err = "prune the trust bundle", a.pruneBundle(time.Now())
		}
		if err != nil {
			a.log.Error("embedded authority: background job failed; it runs again", slog.String("job", what), slog.Any("error", err))
		}
	}
}

// Close lets go of the state file. Waiting calls and later ones fail with
// authority.ErrNotReady. It may be called twice.
func (a *Authority) Close() error {
	var err error
	a.closeOnce.Do(func() {
		close(a.closed)
		a.mu.Lock()
		defer a.mu.Unlock()
		err = a.store.close()
	})
	return err
}

// commit makes changes durable. The caller holds mu and publishes afterwards.
func (a *Authority) commit(changes ...change) error {
	select {
	case <-a.closed:
		return errClosed
	default:
	}
	start := time.Now()
	err := a.store.apply(changes)
	a.metrics.wrote(start, err)
	return err
}
