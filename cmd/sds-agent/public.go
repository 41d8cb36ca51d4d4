package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/peersock"
	"github.com/spiffe-node/spiffe-node/internal/sockdir"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/sds"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
	"github.com/spiffe-node/spiffe-node/pkg/workloadapi"
)

const (
	// readBuffer is per connection and for good; requests are a hundred and
	// fifty bytes once Envoy has introduced itself. Larger reads go past the
	// buffer.
	readBuffer = 256
	// writeBuffer is lent to a connection while it writes; most answers fit.
	writeBuffer = 8 << 10
	// window is what a client may send ahead of being read, the protocol's
	// default. Looking for a better one, as gRPC does unless told so, would cost
	// each connection an estimator and each request a ping.
	window = 64<<10 - 1
	// maxRequest bounds one message. Envoy's node description can be long.
	maxRequest = 1 << 20
	// drain is how long streams have to end by themselves after GOAWAY. They
	// never do: clients keep theirs open. It lets answers under way out.
	drain = 250 * time.Millisecond
	// trimAfter is how many connections have to come or go for memory to be
	// given back, and trimPause how often it is looked whether they have.
	trimAfter = 100
	trimPause = time.Second
	// keepLinks is how often the socket's other names are looked after.
	keepLinks = time.Second
)

// public is the server on the socket that pods mount.
type public struct {
	listener *peersock.Listener
	socket   *sockdir.Socket
	grpc     *grpc.Server
	sds      *sds.Server
	workload *workloadapi.Server
	log      *slog.Logger
}

// callers turns the context of a call into what the domain knows of its caller.
type callers struct {
	manager *svid.Manager
}

var errNoPeer = errors.New("the call did not come through the public socket")

func (c callers) subject(ctx context.Context) (attest.Subject, error) {
	p, ok := peersock.FromContext(ctx)
	if !ok {
		return nil, errNoPeer
	}
	return p.Subject()
}

func (c callers) subscribe(ctx context.Context, notify func()) (*svid.Subscription, error) {
	s, err := c.subject(ctx)
	if err != nil {
		return nil, err
	}
	return c.manager.Subscribe(s, notify)
}

func (c callers) snapshot(ctx context.Context) (*svid.Update, error) {
	s, err := c.subject(ctx)
	if err != nil {
		return nil, err
	}
	return c.manager.Snapshot(s)
}

func (c callers) jwt(ctx context.Context, e *entry.Entry, audience []string) (string, error) {
	s, err := c.subject(ctx)
	if err != nil {
		return "", err
	}
	token, err := c.manager.JWT(ctx, s, e, audience)
	if err != nil {
		return "", err
	}
	return token.Token, nil
}

func peerID(ctx context.Context) uint64 {
	if p, ok := peersock.FromContext(ctx); ok {
		return p.ID()
	}
	return 0
}

// logAttrs names the caller in log lines; one that could not be bound is still
// a process of some user.
func (c callers) logAttrs(ctx context.Context) []slog.Attr {
	p, ok := peersock.FromContext(ctx)
	if !ok {
		return nil
	}
	if s, err := p.Subject(); err == nil {
		return s.LogAttrs()
	}
	caller := p.Caller()
	return []slog.Attr{slog.Int("pid", int(caller.PID)), slog.Uint64("uid", uint64(caller.UID))}
}

// newGRPC builds the server. Its buffers are small because connections are many
// and mostly silent; clients open two or three streams in the life of one, so a
// table of header fields would be kept for nothing. The handlers of streams
// contain panics themselves: an interceptor would stay on each one's stack.
func newGRPC(maxStreams int, log *slog.Logger) *grpc.Server {
	opts := []grpc.ServerOption{
		grpc.ForceServerCodecV2(sds.Codec()),
		grpc.Creds(peersock.Credentials()),
		grpc.ReadBufferSize(readBuffer),
		grpc.WriteBufferSize(writeBuffer),
		grpc.StaticStreamWindowSize(window),
		grpc.StaticConnWindowSize(window),
		grpc.HeaderTableSize(0),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxHeaderListSize(16 << 10),
		grpc.MaxConcurrentStreams(uint32(maxStreams)),
		grpc.ConnectionTimeout(10 * time.Second),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.ChainUnaryInterceptor(recoverUnary(log)),
	}
	return grpc.NewServer(opts...)
}

// recoverUnary ends a call, not the process, when a handler panics.
func recoverUnary(log *slog.Logger) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (res any, err error) {
		defer recovered(log, info.FullMethod, &err)
		return handler(ctx, req)
	}
}

func recovered(log *slog.Logger, method string, err *error) {
	if r := recover(); r != nil {
		log.Error("panic in a call", slog.String("method", method), slog.Any("panic", r), slog.String("stack", string(debug.Stack())))
		*err = status.Error(codes.Internal, "internal error")
	}
}

// run serves until ctx ends. The name in the directory goes first, so that
// clients sent away meet the successor, if there is one.
func (p *public) run(ctx context.Context) error {
	var trimming sync.WaitGroup
	defer trimming.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	trimming.Go(func() { p.trim(ctx) })
	var links sync.WaitGroup
	links.Go(func() { p.socket.KeepLinks(ctx, keepLinks, p.linked) })
	served := make(chan error, 1)
	go func() { served <- p.grpc.Serve(p.listener) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve %s: %w", p.socket.Path(), err)
	case <-ctx.Done():
	}
	links.Wait() // or it would make again what is removed now
	err := p.socket.Unpublish()
	stop := time.AfterFunc(drain, p.grpc.Stop)
	p.grpc.GracefulStop()
	stop.Stop()
	return errors.Join(err, <-served)
}

func (p *public) linked(link string, err error) {
	if err != nil {
		p.log.Error("a name of the socket was removed and cannot be made again", slog.String("path", link), slog.Any("error", err))
		return
	}
	p.log.Warn("a name of the socket was removed by somebody else and has been made again", slog.String("path", link))
}

// trim gives memory back to the system when many connections have come or gone
// and it is quiet again. Opening them leaves garbage that the runtime would
// keep for the next burst; here that is the next rollout, hours away. It costs
// one collection per burst; a lower GOGC would cost several during it.
func (p *public) trim(ctx context.Context) {
	tick := time.NewTicker(trimPause)
	defer tick.Stop()
	for trimmed, last := 0, 0; ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		n := p.listener.Len()
		if n == last && max(n-trimmed, trimmed-n) >= trimAfter {
			debug.FreeOSMemory()
			trimmed = n
		}
		last = n
	}
}

// healthService answers grpc.health.v1 on the public socket, for clients that
// probe it as they probe SPIRE Agent's. It attests nobody.
type healthService struct {
	healthpb.UnimplementedHealthServer
	ready func() error
}

func (h healthService) Check(_ context.Context, req *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	if req.GetService() != "" {
		return nil, status.Error(codes.NotFound, "only the health of the whole agent is known; leave service empty")
	}
	res := &healthpb.HealthCheckResponse{Status: healthpb.HealthCheckResponse_SERVING}
	if h.ready() != nil {
		res.Status = healthpb.HealthCheckResponse_NOT_SERVING
	}
	return res, nil
}
