package embedded

import (
	"context"
	"sync/atomic"
)

// latest holds the newest of a series of immutable values and lets readers wait
// for the next. It signals that something changed, not what: a slow reader
// skips values. The zero latest holds the zero T. Reading takes no lock.
type latest[T any] struct {
	current atomic.Pointer[version[T]]
}

type version[T any] struct {
	value    T
	replaced chan struct{} // closed when a newer value is there
}

func newLatest[T any](v T) *latest[T] {
	l := new(latest[T])
	l.current.Store(&version[T]{v, make(chan struct{})})
	return l
}

// set replaces the value and wakes every waiting reader.
func (l *latest[T]) set(v T) {
	old := l.current.Swap(&version[T]{v, make(chan struct{})})
	close(old.replaced)
}

func (l *latest[T]) get() T { return l.current.Load().value }

// wait returns the newest value that accept takes; it calls accept again after
// every change until ctx or done ends.
func (l *latest[T]) wait(ctx context.Context, done <-chan struct{}, accept func(T) bool) (T, error) {
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
		case <-done:
			var zero T
			return zero, errClosed
		}
	}
}
