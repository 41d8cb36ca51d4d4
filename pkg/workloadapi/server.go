package workloadapi

import (
	"context"
	"errors"
	"log/slog"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// Server is the SPIFFE Workload API. WIT-SVIDs are answered Unimplemented.
// Safe for concurrent use.
type Server struct {
	workload.UnimplementedSpiffeWorkloadAPIServer

	config  Config
	metrics *Metrics
	log     *slog.Logger
	views   views
	ids     atomic.Uint64

	mu   sync.Mutex
	open map[*flow]struct{} // guarded by mu
}

// New builds a Server. It reports what is wrong with config.
func New(config Config) (*Server, error) {
	if err := config.validate(); err != nil {
		return nil, err
	}
	s := &Server{config: config, metrics: config.Metrics, log: config.logger(), open: make(map[*flow]struct{})}
	if s.metrics == nil {
		s.metrics = NewMetrics(nil)
	}
	return s, nil
}

// Register adds the service to a gRPC server.
func (s *Server) Register(reg grpc.ServiceRegistrar) {
	workload.RegisterSpiffeWorkloadAPIServer(reg, s)
}

// securityHeader must be in every request, exactly once, saying "true": SPIFFE
// Workload Endpoint, section 5.
const securityHeader = "workload.spiffe.io"

var (
	errNoHeader  = status.Error(codes.InvalidArgument, "security header missing from request")
	errNone      = status.Error(codes.PermissionDenied, "no identity issued")
	errNotSynced = status.Error(codes.Unavailable, "late: the agent has not heard from its authority yet")
	errWithdrawn = errors.New("last identity withdrawn")
)

func checkHeader(ctx context.Context) error {
	md, _ := metadata.FromIncomingContext(ctx)
	if v := md.Get(securityHeader); len(v) != 1 || v[0] != "true" {
		return errNoHeader
	}
	return nil
}

// inner marks errors of the layers below, whose text is not for the caller.
type inner struct{ error }

func (e inner) Unwrap() error { return e.error }

// refusal turns an error into an outcome for logs and metrics and a status for
// the caller. What went wrong inside stays inside.
func refusal(err error) (outcome string, out error) {
	if _, below := errors.AsType[inner](err); !below {
		if errors.Is(err, errWithdrawn) {
			return outcomeWithdrawn, errNone
		}
		if st, ok := status.FromError(err); ok {
			return statusOutcome(err, st.Code()), err
		}
	}
	switch {
	case errors.Is(err, attest.ErrDenied):
		return outcomeDenied, status.Error(codes.PermissionDenied, "denied")
	case errors.Is(err, svid.ErrOverLimit):
		return outcomeOverLimit, status.Error(codes.ResourceExhausted, "over limit: too many callers wait for an identity")
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return outcomeClient, status.FromContextError(err).Err()
	}
	return outcomeUnavailable, status.Error(codes.Unavailable, "cannot serve identities now, try again")
}

func statusOutcome(err error, code codes.Code) string {
	switch {
	case errors.Is(err, errNoHeader):
		return outcomeNoHeader
	case errors.Is(err, errNone), errors.Is(err, errNotSynced):
		return outcomeLate
	case code == codes.Canceled, code == codes.DeadlineExceeded:
		return outcomeClient
	case code == codes.InvalidArgument:
		return outcomeBadRequest
	case code == codes.ResourceExhausted:
		return outcomeOverLimit
	case code == codes.PermissionDenied:
		return outcomeDenied
	}
	return outcomeUnavailable
}

// guard runs one call: header first, panics contained, outcome recorded.
func (s *Server) guard(ctx context.Context, method string, call func() error) (err error) {
	outcome := outcomeServed
	defer func() { s.metrics.calls.WithLabelValues(method, outcome).Inc() }()
	err = func() (err error) {
		defer s.contain(ctx, method, &err)
		if err := checkHeader(ctx); err != nil {
			return err
		}
		return call()
	}()
	if err == nil {
		return nil
	}
	cause := err
	outcome, err = refusal(err)
	if outcome != outcomeClient {
		s.log.LogAttrs(ctx, slog.LevelInfo, "workload call ended", s.attrs(ctx,
			slog.String("method", method), slog.String("outcome", outcome), slog.Any("error", cause))...)
	}
	return err
}

// contain turns a panic into an error of this call.
func (s *Server) contain(ctx context.Context, method string, err *error) {
	if v := recover(); v != nil {
		s.metrics.panics.Inc()
		s.log.LogAttrs(ctx, slog.LevelError, "workload call panicked", s.attrs(ctx, slog.String("method", method),
			slog.Any("panic", v), slog.String("stack", string(debug.Stack())))...)
		*err = status.Error(codes.Unavailable, "internal fault, try again")
	}
}

func (s *Server) attrs(ctx context.Context, more ...slog.Attr) []slog.Attr {
	if s.config.LogAttrs == nil {
		return more
	}
	return slices.Concat(s.config.LogAttrs(ctx), more)
}

// holdTime is how long a call may be held: wait, but never past 80 % of the
// time the client gave it.
func holdTime(ctx context.Context, wait time.Duration) time.Duration {
	if deadline, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(deadline)/5*4)
	}
	return max(wait, 0)
}
