package sds

import (
	"context"
	"errors"
	"log/slog"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// Server is the secret discovery service. Safe for concurrent use.
type Server struct {
	config  Config
	resolve *resolver
	metrics *Metrics
	log     *slog.Logger
	ids     atomic.Uint64

	mu   sync.Mutex
	open map[*call]struct{} // guarded by mu
}

// New builds a Server. It reports what is wrong with config.
func New(config Config) (*Server, error) {
	if err := config.validate(); err != nil {
		return nil, err
	}
	names, warning, err := config.Names.parse()
	if err != nil {
		return nil, err
	}
	s := &Server{config: config, metrics: config.Metrics, log: config.logger(), open: make(map[*call]struct{})}
	if s.metrics == nil {
		s.metrics = NewMetrics(nil)
	}
	if warning != "" {
		s.log.Warn("secret names collide", slog.String("detail", warning))
	}
	s.resolve = &resolver{
		names: names, plain: config.DisableSPIFFECertValidation,
		bodies: new(bodies), encoded: s.metrics.encoded.Inc,
	}
	return s, nil
}

const serviceName = "envoy.service.secret.v3.SecretDiscoveryService"

// Register adds the service to a gRPC server, which must use Codec.
func (s *Server) Register(reg grpc.ServiceRegistrar) {
	// Not the generated description: its handlers fix the message types, and
	// these are decoded and encoded by hand.
	reg.RegisterService(&grpc.ServiceDesc{
		ServiceName: serviceName,
		HandlerType: (*any)(nil),
		Methods:     []grpc.MethodDesc{{MethodName: "FetchSecrets", Handler: s.handleFetch}},
		Streams: []grpc.StreamDesc{
			{StreamName: "StreamSecrets", Handler: handleStream, ServerStreams: true, ClientStreams: true},
			{StreamName: "DeltaSecrets", Handler: handleDelta, ServerStreams: true, ClientStreams: true},
		},
		Metadata: "envoy/service/secret/v3/sds.proto",
	}, s)
}

func checkRequest(typeURL string, limits error) error {
	switch {
	case typeURL != "" && typeURL != TypeURL:
		return status.Errorf(codes.InvalidArgument, "type_url %q is not served here; ask for %s", clip(typeURL, 256), TypeURL)
	case errors.Is(limits, errTooManyNames):
		return status.Error(codes.ResourceExhausted, limits.Error())
	case limits != nil:
		return status.Error(codes.InvalidArgument, limits.Error())
	}
	return nil
}

// inner marks errors of the layers below, whose text is not for the caller.
type inner struct{ error }

func (e inner) Unwrap() error { return e.error }

// refusal turns an error of the layers below into a status for the caller and
// a reason for logs and metrics. What went wrong inside stays inside.
func refusal(err error) (reason string, out error) {
	_, below := errors.AsType[inner](err)
	if st, ok := status.FromError(err); ok && st.Code() != codes.Unknown && !below {
		switch st.Code() {
		case codes.ResourceExhausted:
			return reasonOverLimit, err
		case codes.InvalidArgument, codes.Internal: // Internal: undecodable bytes
			return reasonBadRequest, err
		case codes.PermissionDenied:
			return reasonDenied, err
		case codes.Canceled, codes.DeadlineExceeded:
			return reasonClient, err
		}
		return reasonPassing, err
	}
	switch {
	case errors.Is(err, errWithdrawn):
		return reasonWithdrawn, status.Error(codes.PermissionDenied, "identity withdrawn")
	case errors.Is(err, attest.ErrDenied):
		return reasonDenied, status.Error(codes.PermissionDenied, "denied")
	case errors.Is(err, svid.ErrOverLimit):
		return reasonOverLimit, status.Error(codes.ResourceExhausted, "over limit: too many callers wait for an identity")
	case errors.Is(err, errTooManyNames):
		return reasonOverLimit, status.Error(codes.ResourceExhausted, errTooManyNames.Error())
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return reasonClient, status.FromContextError(err).Err()
	}
	return reasonPassing, status.Error(codes.Unavailable, "cannot serve identities now, try again")
}

// contain turns a panic into an error of this call.
func (s *Server) contain(ctx context.Context, err *error) {
	if v := recover(); v != nil {
		*err = s.panicked(ctx, v)
	}
}

func (s *Server) panicked(ctx context.Context, v any) error {
	s.metrics.panics.Inc()
	s.log.LogAttrs(ctx, slog.LevelError, "secret call panicked", s.attrs(ctx,
		slog.Any("panic", v), slog.String("stack", string(debug.Stack())))...)
	return status.Error(codes.Unavailable, "internal fault, try again")
}

func (s *Server) attrs(ctx context.Context, more ...slog.Attr) []slog.Attr {
	if s.config.LogAttrs == nil {
		return more
	}
	return slices.Concat(s.config.LogAttrs(ctx), more)
}
