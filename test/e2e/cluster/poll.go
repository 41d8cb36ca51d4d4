package cluster

import (
	"context"
	"errors"
	"fmt"
	"time"
)

type fatalError struct{ error }

func (f fatalError) Unwrap() error { return f.error }

// Fatal marks an error that ends [Poll] at once.
func Fatal(err error) error { return fatalError{err} }

// Poll calls done every interval until it returns nil, a [Fatal] error, or ctx
// ends; then the error is the last one that done gave.
func Poll(ctx context.Context, interval time.Duration, done func(context.Context) error) error {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	var last error
	for {
		err := done(ctx)
		var fatal fatalError
		switch {
		case err == nil:
			return nil
		case errors.As(err, &fatal):
			return fatal.error
		case ctx.Err() == nil || last == nil:
			last = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ctx.Err(), last)
		case <-tick.C:
		}
	}
}
