package registration

import (
	"context"
	"log/slog"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"k8s.io/apimachinery/pkg/types"

	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// engine holds the state. Its fields belong to the goroutine in loop, except
// for the inbox.
type engine struct {
	*settings
	ownership
	world
	inbox inbox
	out   *patcher

	groups  map[groupKey]*group
	byEntry map[string]*group // entry ID -> the group it belongs to
	dirty   map[*group]bool
	retry   map[*group]time.Time
	held    map[string]types.UID // entry ID -> refused resource it is kept for
	bundles map[spiffeid.TrustDomain]bool
	seen    *entry.Set // the newest set that setChanged has looked at

	foreign     map[types.UID]map[string]bool // pod -> entries that are not ours
	foreignOf   map[string]types.UID          // the reverse
	foreignPods int
	foreignSaid time.Time

	federationDirty bool
	federationAgain time.Time // zero = no retry
	statusDirty     map[*source]bool
	statusNext      map[*source]time.Time
	said            map[*source]saying
	otherClass      map[string]string // kind/name -> class that is not ours
	resourcesDirty  bool

	// started: everything has been seen once. Nothing is written before.
	started bool
	synced  atomic.Bool
}

func newEngine(s *settings, out *patcher) *engine {
	return &engine{
		settings: s, ownership: newOwnership(), world: newWorld(), out: out,
		inbox:  inbox{wake: make(chan struct{}, 1)},
		groups: make(map[groupKey]*group), byEntry: make(map[string]*group), dirty: make(map[*group]bool),
		retry: make(map[*group]time.Time), held: make(map[string]types.UID),
		foreign: make(map[types.UID]map[string]bool), foreignOf: make(map[string]types.UID),
		statusDirty: make(map[*source]bool), statusNext: make(map[*source]time.Time), said: make(map[*source]saying),
		otherClass: make(map[string]string),
	}
}

// inbox is what has happened and has not been looked at. Anyone may add.
type inbox struct {
	wake   chan struct{}
	mu     sync.Mutex
	events []event
}

type event struct {
	do func()
	at time.Time
}

// post hands an event to the engine; it never blocks.
func (x *engine) post(do func()) {
	x.inbox.mu.Lock()
	x.inbox.events = append(x.inbox.events, event{do, time.Now()})
	x.inbox.mu.Unlock()
	select {
	case x.inbox.wake <- struct{}{}:
	default:
	}
}

func (x *engine) take() []event {
	x.inbox.mu.Lock()
	defer x.inbox.mu.Unlock()
	out := x.inbox.events
	x.inbox.events = nil
	return out
}

// start begins to write: everything has been seen once.
func (x *engine) start() {
	x.adopt(x.Authority.Set())
	x.started = true
}

// loop works until ctx ends.
func (x *engine) loop(ctx context.Context) {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		timer.Reset(x.step(ctx))
		select {
		case <-ctx.Done():
			return
		case <-x.inbox.wake:
		case <-timer.C:
		}
	}
}

// step looks at what has come in and writes what follows. It returns how long
// to wait if nothing else comes.
func (x *engine) step(ctx context.Context) time.Duration {
	events := x.take()
	for _, ev := range events {
		x.handle(ev)
	}
	if !x.started {
		return time.Hour
	}
	now := time.Now()
	if !x.federationAgain.IsZero() && !now.Before(x.federationAgain) {
		x.federationAgain, x.federationDirty = time.Time{}, true
	}
	x.flushFederation(ctx)
	x.retryDue(now)
	if len(x.dirty) > 0 {
		x.flush(ctx)
		if len(events) > 0 {
			x.Metrics.delay.Observe(time.Since(events[0].at).Seconds())
		}
	}
	x.gauges()
	if !x.synced.Load() && ctx.Err() == nil {
		x.synced.Store(true)
		x.Metrics.synced.Set(1)
		x.Logger.Info("registration is in step with the cluster")
	}
	next := x.writeStatuses(time.Now())
	for _, at := range []time.Time{x.nextRetry(), x.federationAgain} {
		if !at.IsZero() && (next.IsZero() || at.Before(next)) {
			next = at
		}
	}
	if next.IsZero() {
		return time.Hour
	}
	return max(time.Until(next), time.Millisecond)
}

// handle handles one event. A fault in it must not end the authority: that one
// object is left as it was.
func (x *engine) handle(ev event) {
	defer func() {
		if p := recover(); p != nil {
			x.Logger.Error("registration: fault while handling an event; please report it", slog.Any("panic", p), slog.String("stack", string(debug.Stack())))
		}
	}()
	ev.do()
}

const federationPause = 5 * time.Second

func (x *engine) retryFederation() {
	if x.federationAgain.IsZero() {
		x.federationAgain = time.Now().Add(federationPause)
	}
}

// touch says that a resource's status may have changed.
func (x *engine) touch(s *source) { x.statusDirty[s] = true }

// dropSource forgets what is kept per resource.
func (x *engine) dropSource(s *source) {
	delete(x.statusDirty, s)
	delete(x.statusNext, s)
	delete(x.said, s)
	x.out.drop(s.uid)
	x.resourcesDirty = true
}
