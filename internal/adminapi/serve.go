package adminapi

import (
	"context"
	"errors"
	"net"
	"time"

	"google.golang.org/grpc"
)

// stopTimeout is how long calls under way may take when a server stops.
const stopTimeout = 10 * time.Second

// serve serves until ctx ends, then lets calls under way finish for a while.
// stopping (may be nil) is called first, to end those that would go on for ever.
func serve(ctx context.Context, g *grpc.Server, l net.Listener, stopping func()) error {
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	if stopping != nil {
		stopping()
	}
	stopped := make(chan struct{})
	go func() {
		g.GracefulStop()
		close(stopped)
	}()
	timer := time.NewTimer(stopTimeout)
	defer timer.Stop()
	select {
	case <-stopped:
	case <-timer.C:
		g.Stop()
		<-stopped
	}
	// Serve has returned because of the stop, which is no news.
	if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return err
	}
	return nil
}
