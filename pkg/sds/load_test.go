package sds_test

import (
	"context"
	"sync"
	"testing"
	"time"

	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"

	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// A client that does not read holds up neither others nor the layer below nor
// the status.
func TestSlowClient(t *testing.T) {
	w := newWorld(t)
	l := newLayer(w.has(w.web))
	srv, conn := serve(t, l, nil)
	slow := openStream(t, conn)
	slow.send(ask("default"))
	_, conn2 := conn, conn
	good := openStream(t, conn2)
	good.send(ask("default"))
	good.recv()
	other := []*svid.Update{w.has(w.web2), w.has(w.web)}
	for i := range 400 { // far beyond what flow control lets through unread
		l.set(other[i%2])
		good.recv()
	}
	if n := len(srv.Streams()); n != 2 {
		t.Errorf("%d streams", n)
	}
	// It wakes up and gets on with the newest.
	seen := ""
	eventually(t, "caught up", func() bool {
		seen = slow.recv().GetVersionInfo()
		return srv.Streams()[0].Version == seen && srv.Streams()[1].Version == seen
	})
}

// Streams that open, ask and close while the picture changes leave nothing
// behind.
func TestManyStreamsAndChanges(t *testing.T) {
	w := newWorld(t)
	l := newLayer(w.has())
	srv, conn := serve(t, l, nil)
	stop := make(chan struct{})
	var changing sync.WaitGroup
	changing.Go(func() {
		pictures := []*svid.Update{w.has(), w.has(w.web), w.has(w.web2), w.has(w.web, w.db), late(w.has(), w.web)}
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				l.set(pictures[i%len(pictures)])
			}
		}
	})
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			for range 20 {
				ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
				stream, err := secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(ctx)
				if err == nil {
					_ = stream.Send(ask([]string{"default", "ROOTCA", "spiffe://example.org/db", "x"}[i%4 : i%4+1]...))
					if r, err := stream.Recv(); err == nil {
						_ = stream.Send(nonce(ask("default", "ROOTCA"), r.GetNonce(), r.GetVersionInfo()))
						_, _ = stream.Recv()
					}
				}
				cancel()
			}
		})
	}
	wg.Wait()
	close(stop)
	changing.Wait()
	eventually(t, "all gone", func() bool {
		subs, parked := l.counts()
		return subs == 0 && parked == 0 && len(srv.Streams()) == 0
	})
}
