package inspecttls

import (
	"context"
	"errors"
	"log/slog"
	"runtime/debug"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/adminapi/inspectpb"
)

// What the resources are called in RBAC.
const (
	accessGroup       = "spiffe-node.io"
	accessVerb        = "get"
	accessSubresource = "inspect"
	nodesResource     = "nodes"
	podsResource      = "pods"
)

// unary is around every call: whose token, may they, the record, and recovery.
func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (resp any, err error) {
	start := time.Now()
	var user User
	defer func() {
		if p := recover(); p != nil {
			s.cfg.Logger.ErrorContext(ctx, "panic in inspect call", slog.Any("panic", p), slog.String("stack", string(debug.Stack())))
			resp, err = nil, status.Error(codes.Internal, "internal error; the agent's log has the details")
		}
		s.record(ctx, info.FullMethod, user, req, start, err)
	}()
	token, err := bearer(ctx)
	if err != nil {
		return nil, err
	}
	if user, err = s.reviews.who(ctx, token); err != nil {
		return nil, s.refusal(ctx, err)
	}
	if !s.users.allow(user.Name) {
		return nil, status.Error(codes.ResourceExhausted, "too many calls; try again in a second")
	}
	whole, err := s.allowed(ctx, token, user, req)
	if err != nil {
		return nil, err
	}
	resp, err = next(ctx, req)
	if x, ok := resp.(*inspectpb.ExplainResponse); ok && !whole {
		hideOthers(x)
	}
	return resp, err
}

// bearer is the token of the call.
func bearer(ctx context.Context) (string, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	values := md.Get("authorization")
	if len(values) == 1 {
		scheme, token, ok := strings.Cut(values[0], " ")
		if token = strings.TrimSpace(token); ok && strings.EqualFold(scheme, "bearer") && token != "" {
			return token, nil
		}
	}
	return "", status.Error(codes.Unauthenticated, "show one bearer token in the authorization metadata")
}

// allowed says whether the caller may know everything about the node, or the
// pod asked about only. The error is the caller's refusal.
func (s *Server) allowed(ctx context.Context, token string, user User, req any) (whole bool, err error) {
	node := Access{Verb: accessVerb, Group: accessGroup, Resource: nodesResource, Subresource: accessSubresource, Name: s.cfg.Node}
	ok, err := s.reviews.may(ctx, token, user, node)
	switch {
	case err != nil:
		return false, s.refusal(ctx, err)
	case ok:
		return true, nil
	}
	wanted := node
	if x, isExplain := req.(*inspectpb.ExplainRequest); isExplain && x.GetPod().GetNamespace() != "" && x.GetPod().GetName() != "" {
		wanted = Access{
			Verb: accessVerb, Group: accessGroup, Resource: podsResource, Subresource: accessSubresource,
			Namespace: x.GetPod().GetNamespace(), Name: x.GetPod().GetName(),
		}
		ok, err = s.reviews.may(ctx, token, user, wanted)
		switch {
		case err != nil:
			return false, s.refusal(ctx, err)
		case ok:
			return false, nil
		}
	}
	return false, status.Errorf(codes.PermissionDenied, "user %q may not %s", user.Name, wanted)
}

// refusal is what the caller is told when a review has no good answer.
func (s *Server) refusal(ctx context.Context, err error) error {
	switch {
	case errors.Is(err, ErrUnknownToken):
		return status.Errorf(codes.Unauthenticated, "%v (audience %q)", ErrUnknownToken, s.cfg.Audience)
	case errors.Is(err, errBusy):
		return status.Error(codes.ResourceExhausted, errBusy.Error())
	case ctx.Err() != nil:
		return status.FromContextError(ctx.Err()).Err()
	}
	s.cfg.Logger.WarnContext(ctx, "the API server could not be asked about a caller", slog.String("error", err.Error()))
	return status.Error(codes.Unavailable, "the API server cannot be asked who you are and what you may; exec into the agent's pod works without it")
}

// hideOthers takes the entries of others out of an answer for somebody who may
// ask about this pod only.
func hideOthers(x *inspectpb.ExplainResponse) {
	for _, e := range x.GetExplanations() {
		e.Nearest = nil
	}
}

// record writes who asked what, and what became of it.
func (s *Server) record(ctx context.Context, method string, user User, req any, start time.Time, err error) {
	level := slog.LevelInfo
	attrs := []slog.Attr{
		slog.Bool("audit", true),
		slog.String("method", strings.TrimPrefix(method, "/")),
		slog.String("user", user.Name),
		slog.String("code", status.Code(err).String()),
		slog.Duration("took", time.Since(start)),
	}
	if x, ok := req.(*inspectpb.ExplainRequest); ok {
		attrs = append(attrs, slog.String("pod", x.GetPod().GetNamespace()+"/"+x.GetPod().GetName()), slog.Int("pid", int(x.GetPid())))
	}
	if err != nil {
		level = slog.LevelWarn
		attrs = append(attrs, slog.String("error", status.Convert(err).Message()))
	}
	s.cfg.Audit.LogAttrs(ctx, level, "inspect call", attrs...)
}

// noStreams refuses what this endpoint does not have.
func noStreams(any, grpc.ServerStream, *grpc.StreamServerInfo, grpc.StreamHandler) error {
	return status.Error(codes.Unimplemented, "there are no streams here")
}
