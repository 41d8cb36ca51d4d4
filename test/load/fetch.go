package main

import (
	"context"
	"errors"
	"sync"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
)

// maxSamples bounds the call times one client keeps.
const maxSamples = 1 << 18

// runFetch is how many FetchSecrets calls the server answers when every client
// asks again at once.
func runFetch(ctx context.Context, o *options, r *Report) error {
	conns := make([]*grpc.ClientConn, o.clients)
	for i := range conns {
		conn, err := dial(o.socket)
		if err != nil {
			return err
		}
		defer conn.Close()
		conns[i] = conn
		// Opens the connection, and shows that there is something to fetch.
		if err := fetch(ctx, conn, o.names); err != nil {
			r.fail(err)
			return err
		}
	}
	acc, err := startAccount(ctx, o)
	if err != nil {
		return err
	}
	begin := time.Now()
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex
		calls int
		times []time.Duration
	)
	for _, conn := range conns {
		wg.Go(func() {
			var mine []time.Duration
			n := 0
			for time.Since(begin) < o.duration && ctx.Err() == nil {
				start := time.Now()
				if err := fetch(ctx, conn, o.names); err != nil {
					r.fail(err)
					// A server that refuses at once is not to be flooded.
					_ = sleep(ctx, 10*time.Millisecond)
					continue
				}
				n++
				if len(mine) < maxSamples {
					mine = append(mine, time.Since(start))
				}
			}
			mu.Lock()
			defer mu.Unlock()
			calls += n
			times = append(times, mine...)
		})
	}
	wg.Wait()
	took := time.Since(begin)
	if err := acc.markCPU(); err != nil {
		return err
	}
	r.add("fetches", float64(calls)/took.Seconds(), "1/s")
	r.addTimes("fetch", times)
	if calls > 0 {
		r.add("client CPU per fetch", us(acc.own)/float64(calls), "us")
	}
	if len(o.pids) > 0 && calls > 0 {
		r.add("server CPU per fetch", us(acc.serverCPU())/float64(calls), "us")
	}
	return stopped(ctx)
}

var errEmpty = errors.New("an answer without secrets")

func fetch(ctx context.Context, conn *grpc.ClientConn, names []string) error {
	var resp answer
	err := conn.Invoke(ctx, fetchMethod, &discoveryv3.DiscoveryRequest{
		Node:          node(),
		ResourceNames: names,
		TypeUrl:       secretType,
	}, &resp)
	if err == nil && resp.resources == 0 {
		err = errEmpty
	}
	return err
}
