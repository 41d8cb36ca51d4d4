// Package latest holds the newest of a series of immutable values and lets
// readers wait for the next.
//
// It promises that reading takes no lock, that a writer waits for nobody, and
// that a reader which looks after it was woken sees the value it was woken for
// or a newer one. It signals that something changed, not what: a slow reader
// skips values. What it holds is shared with every reader, so it must not be
// changed afterwards; that is the one thing that threatens it.
package latest

import (
	"context"
	"errors"
	"sync/atomic"
)

// ErrEnded is the error of a Wait whose done channel was closed.
var ErrEnded = errors.New("there will be no newer value")

// Value is the newest value. Safe for concurrent use. New makes one.
type Value[T any] struct {
	current atomic.Pointer[version[T]]
}

type version[T any] struct {
	value    T
	replaced chan struct{} // closed when a newer value is there
}

// New is a Value that holds v.
func New[T any](v T) *Value[T] {
	l := new(Value[T])
	l.current.Store(&version[T]{v, make(chan struct{})})
	return l
}

// Set replaces the value and wakes every waiting reader.
func (l *Value[T]) Set(v T) {
	old := l.current.Swap(&version[T]{v, make(chan struct{})})
	close(old.replaced)
}

// Get is the newest value.
func (l *Value[T]) Get() T { return l.current.Load().value }

// Look is the newest value and a channel that is closed when there is a newer
// one.
func (l *Value[T]) Look() (T, <-chan struct{}) {
	v := l.current.Load()
	return v.value, v.replaced
}

// Wait is the newest value that accept takes. It looks again after every change
// until ctx ends, which is its error, or done is closed (nil = never), which is
// ErrEnded.
func (l *Value[T]) Wait(ctx context.Context, done <-chan struct{}, accept func(T) bool) (T, error) {
	for {
		v, replaced := l.Look()
		if accept(v) {
			return v, nil
		}
		var zero T
		select {
		case <-replaced:
		case <-ctx.Done():
			return zero, ctx.Err()
		case <-done:
			return zero, ErrEnded
		}
	}
}
