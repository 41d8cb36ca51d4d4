package adminapi

import (
	"context"
	"log/slog"
	"runtime/debug"
	"strings"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/agentpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/bundlepb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/svidpb"
)

// notLocal are the methods that the server's policy keeps for attested agents
// and downstream servers: a caller on the socket is neither.
var notLocal = map[string]bool{
	agentpb.Agent_RenewAgent_FullMethodName:            true,
	agentpb.Agent_PostStatus_FullMethodName:            true,
	bundlepb.Bundle_PublishJWTAuthority_FullMethodName: true,
	bundlepb.Bundle_PublishWITAuthority_FullMethodName: true,
	entrypb.Entry_GetAuthorizedEntries_FullMethodName:  true,
	entrypb.Entry_SyncAuthorizedEntries_FullMethodName: true,
	svidpb.SVID_BatchNewX509SVID_FullMethodName:        true,
	svidpb.SVID_NewJWTSVID_FullMethodName:              true,
	svidpb.SVID_BatchNewWITSVID_FullMethodName:         true,
	svidpb.SVID_NewDownstreamX509CA_FullMethodName:     true,
}

// interceptor puts around every call what no handler may forget: the policy,
// a request ID, recovery from panics and the log line.
type interceptor struct {
	log    *slog.Logger
	record *slog.Logger
	// allow is the policy: it refuses the call, or lets it go on with the
	// context it returns.
	allow func(ctx context.Context, method string) (context.Context, error)
}

func (i *interceptor) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (resp any, err error) {
	c := i.begin(ctx, info.FullMethod)
	defer func() {
		if p := recover(); p != nil {
			resp, err = nil, c.panicked(ctx, p)
		}
		c.end(ctx, err)
	}()
	allowed, err := i.allow(ctx, info.FullMethod)
	if err != nil {
		return nil, err
	}
	return next(withCall(allowed, c), req)
}

func (i *interceptor) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
	ctx := ss.Context()
	c := i.begin(ctx, info.FullMethod)
	defer func() {
		if p := recover(); p != nil {
			err = c.panicked(ctx, p)
		}
		c.end(ctx, err)
	}()
	allowed, err := i.allow(ctx, info.FullMethod)
	if err != nil {
		return err
	}
	return next(srv, &streamWith{ss, withCall(allowed, c)})
}

// streamWith is a stream with another context.
type streamWith struct {
	grpc.ServerStream
	ctx context.Context
}

// Context is the one with caller and call in it.
func (s *streamWith) Context() context.Context { return s.ctx }

// call is one RPC under way.
type call struct {
	start  time.Time
	log    *slog.Logger
	record *slog.Logger
}

func (i *interceptor) begin(ctx context.Context, method string) *call {
	attrs := []any{
		slog.String("method", strings.TrimPrefix(method, "/")),
		slog.String("request_id", uuid.NewString()),
	}
	if p, ok := grpcpeer.FromContext(ctx); ok {
		if who, ok := p.Addr.(peer); ok {
			attrs = append(attrs, slog.Int("caller_pid", int(who.pid)), slog.Uint64("caller_uid", uint64(who.uid)))
		} else if _, ok := p.AuthInfo.(credentials.TLSInfo); ok {
			attrs = append(attrs, slog.String("caller_address", p.Addr.String()))
			if who, err := peerIdentity(p); err == nil && !who.id.IsZero() {
				attrs = append(attrs, slog.String("caller_id", who.id.String()))
			}
		}
	}
	return &call{start: time.Now(), log: i.log.With(attrs...), record: i.record.With(attrs...)}
}

// allowLocal is the policy for callers on the socket.
func allowLocal(ctx context.Context, method string) (context.Context, error) {
	if notLocal[method] {
		return nil, errDenied(method)
	}
	return ctx, nil
}

func errDenied(method string) error {
	return status.Errorf(codes.PermissionDenied, "authorization denied for method %s", method)
}

// panicked keeps a fault inside its call. The text of the panic stays in the
// log: it may quote the request.
func (c *call) panicked(ctx context.Context, p any) error {
	c.log.ErrorContext(ctx, "panic in admin call", slog.Any("panic", p), slog.String("stack", string(debug.Stack())))
	return status.Error(codes.Internal, "internal error; the agent's log has the details")
}

func (c *call) end(ctx context.Context, err error) {
	level := slog.LevelDebug
	attrs := []slog.Attr{
		slog.String("code", status.Code(err).String()),
		slog.Duration("took", time.Since(c.start)),
	}
	if err != nil {
		level = slog.LevelWarn
		attrs = append(attrs, slog.String("error", err.Error()))
	}
	c.log.LogAttrs(ctx, level, "admin call", attrs...)
}

// audit records one change, or one refused change, of what the authority
// holds. err nil = done.
func audit(ctx context.Context, what string, err error, attrs ...slog.Attr) {
	c, ok := ctx.Value(callKey{}).(*call)
	if !ok {
		return
	}
	level, outcome := slog.LevelInfo, "done"
	if err != nil {
		level, outcome = slog.LevelWarn, "refused"
		attrs = append(attrs, slog.String("error", err.Error()))
	}
	attrs = append(attrs, slog.String("change", what), slog.String("outcome", outcome), slog.Bool("audit", true))
	c.record.LogAttrs(ctx, level, "admin change", attrs...)
}

type callKey struct{}

func withCall(ctx context.Context, c *call) context.Context {
	return context.WithValue(ctx, callKey{}, c)
}
