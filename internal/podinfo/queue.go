package podinfo

import (
	"context"
	"sync"
)

// queue hands keys to workers, each key once until it is done. Adding never
// blocks; what is added while nobody runs is kept. Safe for concurrent use.
type queue[K comparable] struct {
	mu      sync.Mutex
	pending []K
	known   map[K]bool // pending or being worked on
	wake    chan struct{}
}

func newQueue[K comparable]() *queue[K] {
	return &queue[K]{known: map[K]bool{}, wake: make(chan struct{}, 1)}
}

func (q *queue[K]) add(k K) {
	q.mu.Lock()
	if !q.known[k] {
		q.known[k] = true
		q.pending = append(q.pending, k)
	}
	q.mu.Unlock()
	q.signal()
}

func (q *queue[K]) signal() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

func (q *queue[K]) next() (k K, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.pending) == 0 {
		q.pending = nil
		return k, false
	}
	k = q.pending[0]
	q.pending = q.pending[1:]
	return k, true
}

func (q *queue[K]) done(k K) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.known, k)
}

// run has keys worked on, at most workers of them at a time, until ctx ends;
// it returns when all work has ended.
func (q *queue[K]) run(ctx context.Context, workers int, work func(context.Context, K)) {
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, workers)
	for {
		k, ok := q.next()
		if !ok {
			select {
			case <-ctx.Done():
				return
			case <-q.wake:
			}
			continue
		}
		select {
		case <-ctx.Done():
			return
		case slots <- struct{}{}:
		}
		wg.Go(func() {
			defer func() { q.done(k); <-slots }()
			work(ctx, k)
		})
	}
}
