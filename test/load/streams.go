package main

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
)

// fleet is many connections with one stream per name each.
type fleet struct {
	o     *options
	r     *Report
	names []string
	// response is called for every response, from the stream's goroutine.
	response func(connection, name int, resp answer, at time.Time)

	streams sync.WaitGroup
	conns   []*grpc.ClientConn

	mu    sync.Mutex
	first [][]time.Duration // per name: dial to first secret
	all   []time.Duration   // dial to the last first secret of a connection
}

// open opens all connections, -parallel at a time, and returns when every
// stream has had a secret. The streams stay open until ctx ends.
func (f *fleet) open(ctx context.Context) error {
	f.first = make([][]time.Duration, len(f.names))
	f.conns = make([]*grpc.ClientConn, f.o.n)
	next := atomic.Int64{}
	var wg sync.WaitGroup
	errs := make(chan error, f.o.parallel)
	for range min(f.o.parallel, f.o.n) {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < f.o.n; i = int(next.Add(1)) - 1 {
				if err := f.connect(ctx, i); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	wg.Wait()
	select {
	case err := <-errs:
		return err
	default:
		return nil
	}
}

// connect opens one connection and waits for its first secrets.
func (f *fleet) connect(ctx context.Context, i int) error {
	conn, err := dial(f.o.socket)
	if err != nil {
		return err
	}
	f.conns[i] = conn
	start := time.Now()
	arrived := make(chan time.Duration, len(f.names))
	for k, name := range f.names {
		had := false
		w := &watch{
			conn: conn, name: name, retry: f.o.retry, refused: f.r.fail,
			response: func(resp answer, at time.Time) {
				if resp.resources == 0 {
					return
				}
				if f.response != nil {
					f.response(i, k, resp, at)
				}
				if had {
					return
				}
				had = true
				took := at.Sub(start)
				f.mu.Lock()
				f.first[k] = append(f.first[k], took)
				f.mu.Unlock()
				arrived <- took
			},
		}
		f.streams.Go(func() { w.run(ctx) })
	}
	last := time.Duration(0)
	for range f.names {
		select {
		case took := <-arrived:
			last = max(last, took)
		case <-ctx.Done():
			return fmt.Errorf("connection %d of %d has not got its secrets: %w", i+1, f.o.n, stopped(ctx))
		}
	}
	f.mu.Lock()
	f.all = append(f.all, last)
	f.mu.Unlock()
	return nil
}

// close waits for the streams, whose context has ended, and closes the
// connections.
func (f *fleet) close() {
	f.streams.Wait()
	for _, conn := range f.conns {
		if conn != nil {
			_ = conn.Close()
		}
	}
}

// runStreams is what open connections cost and how soon they are served.
func runStreams(ctx context.Context, o *options, r *Report) error {
	if err := raiseFiles(o.n + 100); err != nil {
		return err
	}
	acc, err := startAccount(ctx, o)
	if err != nil {
		return err
	}
	f := &fleet{o: o, r: r, names: o.names}
	// An Envoy's streams have no deadline, which would cost the server a timer
	// and a kilobyte per stream.
	whole := ctx
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer context.AfterFunc(whole, func() { cancel(context.Cause(whole)) })()
	defer f.close()
	defer cancel(nil)
	opening := time.Now()
	if err := f.open(ctx); err != nil {
		return err
	}
	took := time.Since(opening)
	// The last acknowledgements are still on their way.
	if err := sleep(ctx, 500*time.Millisecond); err != nil {
		return err
	}
	if err := acc.markCPU(); err != nil {
		return err
	}
	for k, name := range f.names {
		r.addTimes("first secret "+name, f.first[k])
	}
	r.addTimes("all secrets of a connection", f.all)
	r.add("connections opened", float64(o.n)/took.Seconds(), "1/s")
	if err := sleep(ctx, o.settle); err != nil {
		return err
	}
	return acc.perConnection(ctx, r, o.n)
}

// account is what the server's processes use, from idle to now.
type account struct {
	o          *options
	own        time.Duration
	idle       float64 // processor seconds per second
	before     usage
	after      usage
	goroutines int
}

// startAccount watches the idle server first.
func startAccount(ctx context.Context, o *options) (*account, error) {
	a := &account{o: o}
	if len(o.pids) > 0 {
		begin, err := readUsage(o.pids)
		if err != nil {
			return nil, err
		}
		if err := sleep(ctx, o.idle); err != nil {
			return nil, err
		}
		if a.before, err = readUsage(o.pids); err != nil {
			return nil, err
		}
		a.idle = (a.before.cpu - begin.cpu).Seconds() / a.before.at.Sub(begin.at).Seconds()
	}
	if o.metrics != "" {
		n, err := goroutines(ctx, o.metrics)
		if err != nil {
			return nil, err
		}
		a.goroutines = n
	}
	a.own = ownCPU()
	return a, nil
}

// markCPU ends the time in which processor time counts.
func (a *account) markCPU() error {
	a.own = ownCPU() - a.own
	if len(a.o.pids) == 0 {
		return nil
	}
	var err error
	a.after, err = readUsage(a.o.pids)
	return err
}

// serverCPU is the processor time beyond what the server uses when idle.
func (a *account) serverCPU() time.Duration {
	span := a.after.at.Sub(a.before.at)
	return a.after.cpu - a.before.cpu - time.Duration(a.idle*float64(span))
}

// perConnection reports what n connections cost that are open now.
func (a *account) perConnection(ctx context.Context, r *Report, n int) error {
	per := float64(n)
	r.add("client CPU per connection", us(a.own)/per, "us")
	if len(a.o.pids) > 0 {
		now, err := readUsage(a.o.pids)
		if err != nil {
			return err
		}
		r.add("server CPU per connection", us(a.serverCPU())/per, "us")
		r.add("server RSS per connection", float64(now.rss-a.before.rss)/1024/per, "KiB")
		r.add("server descriptors per connection", float64(now.fds-a.before.fds)/per, "")
		r.add("server RSS before", mib(a.before.rss), "MiB")
		r.add("server RSS with connections", mib(now.rss), "MiB")
		r.add("server threads", float64(now.threads), "")
		r.add("server CPU when idle", a.idle*1000, "ms/s")
	}
	if a.o.metrics != "" {
		now, err := goroutines(ctx, a.o.metrics)
		if err != nil {
			return err
		}
		r.add("server goroutines per connection", float64(now-a.goroutines)/per, "")
	}
	return nil
}

func mib(bytes int64) float64 { return float64(bytes) / (1 << 20) }
