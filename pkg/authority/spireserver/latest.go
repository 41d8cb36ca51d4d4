package spireserver

import (
	"context"
	"sync/atomic"
)

// latest holds the newest of a series of immutable values and lets readers wait
// for one they accept; a slow reader skips values. Safe for concurrent use.
type latest[T any] struct {
	current atomic.Pointer[held[T]]
}

type held[T any] struct {
	value    T
	replaced chan struct{} // closed when a newer value is there
}

func newLatest[T any](v T) *latest[T] {
	l := new(latest[T])
	l.current.Store(&held[T]{v, make(chan struct{})})
	return l
}

// set replaces the value and wakes every waiting reader.
func (l *latest[T]) set(v T) {
	old := l.current.Swap(&held[T]{v, make(chan struct{})})
	close(old.replaced)
}

func (l *latest[T]) get() T { return l.current.Load().value }

// wait is the newest value that accept takes; it looks again after every change
// until ctx ends.
func (l *latest[T]) wait(ctx context.Context, accept func(T) bool) (T, error) {
	for {
		v := l.current.Load()
		if accept(v.value) {
			return v.value, nil
		}
		select {
		case <-v.replaced:
		case <-ctx.Done():
			var zero T
			return zero, ctx.Err()
		}
	}
}

// signal leaves a note in a one-slot channel.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
