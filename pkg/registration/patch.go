package registration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
)

// statusWriter sends a merge patch to a resource's status.
type statusWriter func(ctx context.Context, kind, name string, patch []byte) error

// patcher writes statuses, one at a time and only the newest of each resource.
// A merge patch of the whole status names the UID and no version: it cannot
// lose against a change of the specification nor hit a successor of the name.
type patcher struct {
	write   statusWriter
	log     *slog.Logger
	metrics *Metrics
	wake    chan struct{}

	mu    sync.Mutex
	queue map[types.UID]*patchJob
}

type patchJob struct {
	w    *wanted
	done func(error)
}

func newPatcher(s *settings, write statusWriter) *patcher {
	return &patcher{write: write, log: s.Logger, metrics: s.Metrics, wake: make(chan struct{}, 1), queue: make(map[types.UID]*patchJob)}
}

// put queues a status; it never blocks.
func (p *patcher) put(w *wanted, done func(error)) {
	p.mu.Lock()
	p.queue[w.uid] = &patchJob{w, done}
	p.mu.Unlock()
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// drop forgets a queued status.
func (p *patcher) drop(uid types.UID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.queue, uid)
}

// run writes until ctx ends.
func (p *patcher) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.wake:
		}
		p.mu.Lock()
		jobs := p.queue
		p.queue = make(map[types.UID]*patchJob)
		p.mu.Unlock()
		for _, j := range jobs {
			if ctx.Err() != nil {
				return
			}
			j.done(p.send(ctx, j.w))
		}
	}
}

const patchTimeout = 10 * time.Second

func (p *patcher) send(ctx context.Context, w *wanted) error {
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": w.uid},
		"status":   w.status,
	})
	if err != nil {
		return fmt.Errorf("encode status: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, patchTimeout)
	defer cancel()
	err = p.write(ctx, w.kind, w.name, patch)
	p.metrics.statuses.WithLabelValues(outcome(err)).Inc()
	switch {
	case err == nil, apierrors.IsNotFound(err), apierrors.IsConflict(err):
		// Gone, or another of the same name by now: its own event follows.
		return nil
	case !errors.Is(ctx.Err(), context.Canceled):
		p.log.Warn("cannot write status; trying again", slog.String("kind", w.kind), slog.String("name", w.name), slog.Any("error", err))
	}
	return err
}
