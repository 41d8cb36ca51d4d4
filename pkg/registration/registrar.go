package registration

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
)

// Registrar keeps the authority's entries in step with the cluster. Build one
// with New and keep Run running. Safe for concurrent use.
type Registrar struct {
	kube *kube
	x    *engine
}

// New checks the configuration and builds a Registrar. It does not reach for
// the API server.
func New(cfg Config) (*Registrar, error) {
	s, err := cfg.check()
	if err != nil {
		return nil, fmt.Errorf("registration: %w", err)
	}
	k, err := newKube(s.Client)
	if err != nil {
		return nil, fmt.Errorf("registration: %w", err)
	}
	return &Registrar{kube: k, x: newEngine(s, newPatcher(s, k.patchStatus))}, nil
}

// Synced says whether everything in the cluster has been seen and written once.
func (r *Registrar) Synced() bool { return r.x.synced.Load() }

// Run works until ctx ends, then returns nil. The API server may be away, the
// CRDs may be missing: it waits for both, and what it has written stays. It may
// be called once.
func (r *Registrar) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ctx = klog.NewContext(ctx, logr.FromSlogHandler(quiet{r.x.Logger.Handler()}))
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	var synced []cache.InformerSynced
	for _, w := range r.x.watches(r.kube) {
		s, err := r.x.follow(ctx, &wg, &w)
		if err != nil {
			return fmt.Errorf("registration: %w", err)
		}
		synced = append(synced, s)
	}
	wg.Go(func() { r.x.out.run(ctx) })
	wg.Go(func() { r.x.begin(ctx, &wg, synced) })
	r.x.loop(ctx)
	return nil
}

// begin waits until everything has been seen once, then lets the engine write.
func (x *engine) begin(ctx context.Context, wg *sync.WaitGroup, synced []cache.InformerSynced) {
	bundles, err := x.Authority.Bundles(ctx, 0)
	for err != nil && ctx.Err() == nil {
		x.pause(ctx, "bundles", err)
		bundles, err = x.Authority.Bundles(ctx, 0)
	}
	if err != nil || !waitSynced(ctx, synced) {
		return
	}
	have := make(map[spiffeid.TrustDomain]bool, len(bundles.Federated))
	for td := range bundles.Federated {
		have[td] = true
	}
	x.post(func() {
		x.setBundles(have)
		x.start()
	})
	wg.Go(func() { x.watchSet(ctx) })
	wg.Go(func() { x.watchBundles(ctx) })
	if x.Relationships != nil {
		wg.Go(func() { x.watchRelationships(ctx) })
	}
}

// waitSynced polls, as informers offer nothing else.
func waitSynced(ctx context.Context, synced []cache.InformerSynced) bool {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		all := true
		for _, s := range synced {
			all = all && s()
		}
		if all {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
		}
	}
}

// quiet drops what client-go says below warnings; its errors are said by
// watchError.
type quiet struct{ slog.Handler }

// Enabled implements slog.Handler.
func (q quiet) Enabled(ctx context.Context, l slog.Level) bool {
	return l >= slog.LevelWarn && q.Handler.Enabled(ctx, l)
}

// WithAttrs implements slog.Handler.
func (q quiet) WithAttrs(a []slog.Attr) slog.Handler { return quiet{q.Handler.WithAttrs(a)} }

// WithGroup implements slog.Handler.
func (q quiet) WithGroup(name string) slog.Handler { return quiet{q.Handler.WithGroup(name)} }
