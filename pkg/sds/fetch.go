package sds

import (
	"context"
	"log/slog"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// handleFetch is the gRPC method handler of FetchSecrets.
func (s *Server) handleFetch(_ any, ctx context.Context, decode func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
	q := new(request)
	if err := decode(q); err != nil {
		return nil, err
	}
	if interceptor == nil {
		return s.fetch(ctx, q)
	}
	info := &grpc.UnaryServerInfo{Server: s, FullMethod: "/" + serviceName + "/FetchSecrets"}
	return interceptor(ctx, q, info, func(ctx context.Context, _ any) (any, error) { return s.fetch(ctx, q) })
}

func (s *Server) fetch(ctx context.Context, q *request) (m *message, err error) {
	defer s.contain(ctx, &err)
	outcome := reasonPanic
	defer func() { s.metrics.fetches.WithLabelValues(outcome).Inc() }()
	if err = checkRequest(q.typeURL, q.limits()); err != nil {
		outcome, err = refusal(err)
		return nil, err
	}
	u, err := s.config.Snapshot(ctx)
	if err != nil {
		return nil, s.refuseFetch(ctx, inner{err}, &outcome)
	}
	f := newFetch(s.resolve, q)
	a := f.look(u)
	if len(f.late()) > 0 {
		if a, err = s.awaitFetch(ctx, f, a); err != nil {
			return nil, s.refuseFetch(ctx, err, &outcome)
		}
	}
	if a.send != nil {
		outcome = reasonServed
		return &message{a.send}, nil
	}
	switch {
	case len(f.late()) == 0:
		outcome = reasonUnknown
		return nil, status.Errorf(codes.NotFound, "unknown secret names %q", shorten(f.unknown()))
	case !f.synced:
		outcome = reasonLate
		return nil, status.Error(codes.Unavailable, "late: the agent has not heard from its authority yet")
	}
	outcome = reasonLate
	return nil, status.Errorf(codes.PermissionDenied, "late: no identity issued for %s", clip(strings.Join(shorten(f.late()), " "), 512))
}

func (s *Server) refuseFetch(ctx context.Context, err error, outcome *string) error {
	reason, answer := refusal(err)
	*outcome = reason
	if reason != reasonClient {
		s.log.LogAttrs(ctx, slog.LevelInfo, "secret fetch refused", s.attrs(ctx,
			slog.String("reason", reason), slog.Any("error", err))...)
	}
	return answer
}

// fetch is a stream of one request that is looked at until it can be answered.
type fetch struct {
	stream
	q      *request
	synced bool
}

func newFetch(r *resolver, q *request) *fetch {
	return &fetch{stream: stream{core: core{r: r}}, q: q}
}

// look answers the request from u. Nothing stays behind from an earlier look.
func (f *fetch) look(u *svid.Update) action {
	if u == nil {
		u = new(svid.Update)
	}
	f.synced = u.Synced && u.Own != nil
	f.stream = stream{core: core{r: f.r}}
	return f.request(f.q, u)
}

// awaitFetch holds the call until nothing asked for is late, or the time is up;
// then what is known has to do.
func (s *Server) awaitFetch(ctx context.Context, f *fetch, a action) (action, error) {
	hold := holdTime(ctx, s.config.fetchWait())
	if hold <= 0 {
		return a, nil
	}
	wake := make(chan struct{}, 1)
	sub, err := s.config.Subscribe(ctx, func() {
		select {
		case wake <- struct{}{}:
		default:
		}
	})
	if err != nil {
		return a, inner{err}
	}
	defer sub.Close()
	if err := sub.Park(clip(strings.Join(shorten(f.late()), " "), 512)); err != nil {
		return a, inner{err}
	}
	defer sub.Unpark()
	timer := time.NewTimer(hold)
	defer timer.Stop()
	for {
		if a = f.look(sub.Update()); len(f.late()) == 0 {
			return a, nil
		}
		select {
		case <-wake:
		case <-timer.C:
			return a, nil
		case <-ctx.Done():
			return a, ctx.Err()
		}
	}
}

// holdTime is how long a call may be held: wait, but never past 80 % of the
// time the client gave it.
func holdTime(ctx context.Context, wait time.Duration) time.Duration {
	if deadline, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(deadline)/5*4)
	}
	return wait
}
