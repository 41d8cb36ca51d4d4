package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

const secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// Envoy's pauses before a stream is opened again.
const (
	envoyFirst = 500 * time.Millisecond
	envoyLast  = 30 * time.Second
)

// retry says how long to pause; zero is as Envoy does.
type retry struct{ fixed time.Duration }

func parseRetry(text string) (retry, error) {
	if text == "envoy" {
		return retry{}, nil
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < time.Millisecond || d > envoyLast {
		return retry{}, fmt.Errorf("%q is neither envoy nor a duration from 1ms to %v", text, envoyLast)
	}
	return retry{fixed: d}, nil
}

// String is what parseRetry reads.
func (r retry) String() string {
	if r.fixed > 0 {
		return r.fixed.String()
	}
	return "envoy"
}

// backoff is the state of one stream's pauses.
type backoff struct {
	retry
	next time.Duration
}

func (b *backoff) reset() { b.next = 0 }

func (b *backoff) pause() time.Duration {
	if b.fixed > 0 {
		return b.fixed
	}
	if b.next == 0 {
		b.next = envoyFirst
	}
	d := rand.N(b.next)
	b.next = min(2*b.next, envoyLast)
	return d
}

// window is more than a secret, and enough to switch probing off.
const window = 1 << 20

// dial makes one connection; it is opened by the first stream.
func dial(socket string) (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient("unix:"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithIdleTimeout(0),
		// The clients share the machine with what they measure: they must not
		// fill it with buffers.
		grpc.WithReadBufferSize(4096),
		grpc.WithWriteBufferSize(4096),
		// As Envoy: windows of a fixed size, no probing for a better one.
		grpc.WithInitialWindowSize(window),
		grpc.WithInitialConnWindowSize(window),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(newCodec())),
	)
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", socket, err)
	}
	return conn, nil
}

func node() *corev3.Node {
	return &corev3.Node{
		Id:            "load",
		Cluster:       "load",
		UserAgentName: "envoy",
	}
}

// watch is one stream for one secret name that is kept open, as Envoy does.
type watch struct {
	conn     *grpc.ClientConn
	name     string
	retry    retry
	response func(answer, time.Time)
	refused  func(error)
}

// run keeps the stream open until ctx ends.
func (w *watch) run(ctx context.Context) {
	pauses := backoff{retry: w.retry}
	for {
		err := w.once(ctx, &pauses)
		if ctx.Err() != nil {
			return
		}
		w.refused(err)
		timer := time.NewTimer(pauses.pause())
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
	}
}

func (w *watch) once(ctx context.Context, pauses *backoff) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := w.conn.NewStream(ctx, &streamDesc, streamMethod)
	if err != nil {
		return err
	}
	req := &discoveryv3.DiscoveryRequest{
		Node:          node(),
		ResourceNames: []string{w.name},
		TypeUrl:       secretType,
	}
	for {
		// A failed SendMsg is io.EOF; why is what RecvMsg says.
		_ = stream.SendMsg(req)
		var resp answer
		if err := stream.RecvMsg(&resp); err != nil {
			return err
		}
		at := time.Now()
		pauses.reset()
		w.response(resp, at)
		req = &discoveryv3.DiscoveryRequest{
			VersionInfo:   resp.version,
			ResourceNames: []string{w.name},
			TypeUrl:       secretType,
			ResponseNonce: resp.nonce,
		}
	}
}

// sleep waits unless ctx ends first.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return stopped(ctx)
	case <-timer.C:
		return nil
	}
}

// stopped is why ctx ended.
func stopped(ctx context.Context) error {
	return errors.Join(context.Cause(ctx))
}
