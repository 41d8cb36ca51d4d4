package svid

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// Manager issues, renews and hands out the identities of one node. Safe for
// concurrent use. New builds it, Run makes it work.
type Manager struct {
	cfg   Config
	log   *slog.Logger
	audit *slog.Logger
	met   *Metrics
	now   func() time.Time     // wall clock
	mono  func() time.Duration // monotonic clock
	keys  *keyMaker
	jwts  *jwtCache
	state *stateFile // nil = no restart state
	trust atomic.Pointer[Trust]

	wake   chan struct{} // the timer loop has an earlier alarm
	save   chan struct{} // restart state is out of date
	poke   chan struct{} // pokes is not empty
	spread chan struct{} // Trust changed

	pokeMu sync.Mutex
	pokes  []*view // subjects whose selectors may have changed

	shortOnce sync.Once // an SVID too short for AvailabilityTarget was told of

	mu       sync.Mutex
	launch   func(r *record) // starts a worker; nil while Run does not run
	workers  sync.WaitGroup
	set      *entry.Set           // never nil
	bundles  *authority.BundleSet // nil until known
	heard    bool                 // the entry source has answered in this process
	bundled  bool                 // the authority has given bundles in this process
	records  map[string]*record   // entry ID -> record
	views    map[attest.Subject]*view
	warm     map[string]*view // Selectors.Key -> view of a pod that has not called
	groups   map[string]*group
	timers   timers
	queue    queue
	parked   map[string]int // limit key -> parked callers
	idle     idleRecords
	failing  map[*record]struct{} // waiting for another try
	lastGood time.Time            // of any answer to SignX509
	lastFail time.Time
	lastErr  error

	dirty      []*group        // to be repainted
	moved      []*view         // to be given their group's picture
	pending    []*Subscription // to be notified
	calls      []func()        // to be called outside the lock
	delivering bool

	clock struct {
		wall time.Time
		mono time.Duration
	}
}

// New builds a Manager and loads the restart state, if there is a usable one:
// what is valid in it is served at once. The error names the setting to change.
func New(cfg Config) (*Manager, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	start := time.Now()
	m := &Manager{
		cfg:     cfg,
		log:     cfg.Logger,
		audit:   cfg.Audit,
		met:     cfg.Metrics,
		now:     time.Now,
		mono:    func() time.Duration { return time.Since(start) },
		keys:    newKeyMaker(cfg.KeyType),
		wake:    make(chan struct{}, 1),
		save:    make(chan struct{}, 1),
		poke:    make(chan struct{}, 1),
		spread:  make(chan struct{}, 1),
		set:     entry.NewSet(),
		records: make(map[string]*record),
		views:   make(map[attest.Subject]*view),
		warm:    make(map[string]*view),
		groups:  make(map[string]*group),
		parked:  make(map[string]int),
		idle:    newIdleRecords(),
		failing: make(map[*record]struct{}),
	}
	m.jwts = newJWTCache(m)
	m.trust.Store(new(Trust))
	m.met.watch(m.firstExpiry)
	if cfg.StateDir != "" {
		if m.state, err = openState(cfg.StateDir, cfg.StateOf, cfg.anyFilesystem); err != nil {
			return nil, err
		}
		m.restore()
	}
	return m, nil
}

// Run follows entries and bundles, signs, renews and keeps the restart state
// until ctx ends; then it returns nil after its goroutines have ended. It may
// be called once.
func (m *Manager) Run(ctx context.Context) error {
	var tasks sync.WaitGroup
	m.do(func(time.Time) {
		m.launch = func(r *record) { m.launchLocked(ctx, r) }
	})
	tasks.Go(func() { m.follow(ctx, "entries", m.nextEntries()) })
	tasks.Go(func() { m.follow(ctx, "bundles", m.nextBundles()) })
	tasks.Go(func() { m.keepTime(ctx) })
	tasks.Go(func() { m.followSubjects(ctx) })
	tasks.Go(func() { m.keys.run(ctx) })
	if m.state != nil {
		tasks.Go(func() { m.keepState(ctx) })
	}
	<-ctx.Done()
	// No worker starts after this.
	m.do(func(time.Time) { m.launch = nil })
	m.workers.Wait()
	tasks.Wait()
	return nil
}

// do changes the books: f runs under the lock, then the groups it made dirty
// are repainted, free workers get queued records, and outside the lock
// everybody concerned is told.
func (m *Manager) do(f func(now time.Time)) {
	var deliver bool
	func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		f(m.now())
		m.settleLocked()
		deliver = !m.delivering && len(m.pending)+len(m.calls) > 0
	}()
	if deliver {
		m.deliver()
	}
}

// deliver calls whoever is pending, outside the lock. Only one goroutine at a
// time delivers, so no callback runs beside itself and a callback may use the
// Manager.
func (m *Manager) deliver() {
	m.mu.Lock()
	if m.delivering {
		m.mu.Unlock()
		return
	}
	m.delivering = true
	for len(m.pending)+len(m.calls) > 0 {
		subs, calls := m.pending, m.calls
		m.pending, m.calls = nil, nil
		for _, s := range subs {
			s.queued = false
		}
		m.mu.Unlock()
		for _, s := range subs {
			if !s.closed.Load() {
				m.guard(s.notify)
			}
		}
		for _, f := range calls {
			m.guard(f)
		}
		m.mu.Lock()
	}
	m.delivering = false
	m.mu.Unlock()
}

// guard keeps a fault in one callback from the others.
func (m *Manager) guard(f func()) {
	defer func() {
		if r := recover(); r != nil {
			m.log.Error("callback panicked", slog.Any("panic", r))
		}
	}()
	f()
}

// follow takes what next waits for, again and again; after an error it pauses.
func (m *Manager) follow(ctx context.Context, what string, next func(context.Context) error) {
	failures := 0
	for ctx.Err() == nil {
		err := next(ctx)
		if err == nil {
			failures = 0
			continue
		}
		if ctx.Err() != nil {
			return
		}
		pause := backoff(failures)
		failures++
		m.log.Warn("source cannot answer", slog.String("source", what), slog.Duration("retry_in", pause), slog.Any("error", err))
		if !sleep(ctx, pause) {
			return
		}
	}
}

var errNoNews = errors.New("the source answered at once without anything new")

func (m *Manager) nextEntries() func(context.Context) error {
	var after uint64
	return func(ctx context.Context) error {
		set, err := m.cfg.Entries.Entries(ctx, after)
		if err != nil {
			return err
		}
		if set == nil || set.Version() == after {
			return errNoNews
		}
		after = set.Version()
		m.do(func(now time.Time) { m.applySetLocked(set, now) })
		return nil
	}
}

func (m *Manager) nextBundles() func(context.Context) error {
	var after uint64
	return func(ctx context.Context) error {
		set, err := m.cfg.Authority.Bundles(ctx, after)
		if err != nil {
			return err
		}
		if set == nil || set.Version == after {
			return errNoNews
		}
		after = set.Version
		m.do(func(now time.Time) { m.applyBundlesLocked(set, now) })
		return nil
	}
}

// keepTime rings the alarms.
func (m *Manager) keepTime(ctx context.Context) {
	t := time.NewTimer(0)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.wake:
		case <-t.C:
		}
		var pause time.Duration
		m.do(func(now time.Time) {
			m.checkClockLocked(now)
			pause = m.ringLocked(now)
		})
		t.Reset(max(pause, 0))
	}
}

// checkClockLocked notices a wall clock that was set: everything is looked at
// anew, and SVIDs that are not valid yet are replaced.
func (m *Manager) checkClockLocked(now time.Time) {
	wall, mono := now.Round(0), m.mono()
	jump := wall.Sub(m.clock.wall) - (mono - m.clock.mono)
	first := m.clock.wall.IsZero()
	m.clock.wall, m.clock.mono = wall, mono
	if first || jump.Abs() <= clockSlack {
		return
	}
	m.log.Warn("wall clock jumped", slog.Duration("by", jump))
	m.jwts.forgetAll()
	for _, r := range m.records {
		r.retryAt = time.Time{}
		if r.svid != nil && now.Before(r.svid.NotBefore) {
			r.resign = true
		}
		m.considerLocked(r, now)
	}
}

// backoff is the pause after so many earlier failures: doubling up to
// retryMax, of which the upper third is jitter.
func backoff(failures int) time.Duration {
	d := retryMax * 2 / 3
	if failures < 7 {
		d = min(retryMin<<failures, d)
	}
	return d + jitter(d/2)
}

// jitter is a random part of d.
func jitter(d time.Duration) time.Duration {
	return rand.N(d + 1) //nolint:gosec // it spreads load and guards nothing
}

// sleep is false if ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
