// Package daemon is what the commands share to be well-behaved processes: named
// tasks that end together, logging, and the health and metrics endpoint.
//
// It promises that a failing task ends the others and that its error is
// reported, and that health answers before anything else has started.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"syscall"
)

// Task is one named part of a daemon. Run works until ctx ends (then it
// returns nil or ctx's error) or something fails.
type Task struct {
	Name string
	Run  func(ctx context.Context) error
}

// Run runs all tasks until ctx ends or one of them returns. Every task sees its
// context end as soon as any task has returned. Run waits for all of them and
// returns the errors that are not just the end of ctx, each with its task's
// name. A task that returns nil before ctx has ended ends the others too: a
// daemon with a part missing must not go on.
func Run(ctx context.Context, log *slog.Logger, tasks ...Task) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex
		errs []error
	)
	for _, t := range tasks {
		wg.Go(func() {
			defer cancel()
			err := t.Run(ctx)
			ended := ctx.Err() != nil
			switch {
			case err == nil && !ended:
				log.Warn("task ended early", slog.String("task", t.Name))
			case err != nil && (!ended || !errors.Is(err, context.Canceled)):
				mu.Lock()
				errs = append(errs, fmt.Errorf("%s: %w", t.Name, err))
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// SignalContext is a context that ends at SIGTERM or SIGINT. A second signal
// ends the process at once, for the operator who will not wait.
func SignalContext(parent context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := signal.NotifyContext(parent, syscall.SIGTERM, os.Interrupt)
	context.AfterFunc(ctx, cancel) // restores the default action for the second signal
	return ctx, cancel
}
