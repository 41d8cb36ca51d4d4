package inspecttls

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"golang.org/x/net/netutil"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/spiffe-node/spiffe-node/internal/adminapi"
)

// Audience is what tokens for an agent's Inspect endpoint are for, if nothing
// else is configured.
const Audience = "spiffe-node-inspect"

// Limits. The callers are a few people.
const (
	maxConnections  = 64
	maxStreams      = 16
	maxRequest      = 64 << 10
	maxHeaders      = 32 << 10 // tokens are long
	handshakeTime   = 10 * time.Second
	idleTime        = time.Minute
	stopTimeout     = 5 * time.Second
	reviewsPerSec   = 10
	reviewsBurst    = 20
	callsPerSec     = 20
	callsBurst      = 40
	maxUsers        = 256
	defaultKeepTime = 10 * time.Second
)

// Config is what a Server needs.
type Config struct {
	// Address is host:port to listen on. A port of the loopback is enough for
	// kubectl spiffe, which comes by port-forward. Required.
	Address string
	// TLS has the certificate (GetCertificate, so that renewals are served):
	// the agent's own SVID. It is copied; session tickets are switched off,
	// since trust can change between two connections. Required.
	TLS *tls.Config
	// Source answers. Required.
	Source adminapi.Source
	// Reviewer decides who may ask. Required.
	Reviewer Reviewer
	// Node is the name of this node in RBAC. Required.
	Node string
	// Audience of the tokens; "" = Audience.
	Audience string
	// Keep is for how long a review's result is used again; 0 = 10 s. Someone
	// whose rights were taken away may ask for that long.
	Keep time.Duration
	// Logger gets faults; nil = discarded.
	Logger *slog.Logger
	// Audit gets one record per call; nil = Logger.
	Audit *slog.Logger
}

// Server is the endpoint.
type Server struct {
	cfg     Config
	grpc    *grpc.Server
	lis     net.Listener
	reviews *reviews
	users   *limits
}

// New listens; nothing is answered before Run.
func New(ctx context.Context, cfg Config) (*Server, error) {
	if cfg.TLS == nil || cfg.Source == nil || cfg.Reviewer == nil || cfg.Node == "" {
		return nil, errors.New("inspect endpoint: TLS, Source, Reviewer and Node are required")
	}
	cfg.Audience, cfg.Keep = cmp.Or(cfg.Audience, Audience), cmp.Or(cfg.Keep, defaultKeepTime)
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Audit == nil {
		cfg.Audit = cfg.Logger
	}
	lis, err := (&net.ListenConfig{}).Listen(ctx, "tcp", cfg.Address)
	if err != nil {
		return nil, fmt.Errorf("inspect endpoint: %w", err)
	}
	config := cfg.TLS.Clone()
	config.MinVersion = tls.VersionTLS13
	config.SessionTicketsDisabled = true
	s := &Server{
		cfg: cfg, lis: netutil.LimitListener(lis, maxConnections),
		reviews: &reviews{
			reviewer: cfg.Reviewer, audience: cfg.Audience, keep: cfg.Keep,
			limit: rate.NewLimiter(reviewsPerSec, reviewsBurst), kept: map[string]answer{},
		},
		users: &limits{byUser: map[string]*rate.Limiter{}},
	}
	s.grpc = grpc.NewServer(
		grpc.Creds(credentials.NewTLS(config)),
		grpc.UnaryInterceptor(s.unary),
		grpc.StreamInterceptor(noStreams),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(handshakeTime),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: idleTime}),
		grpc.WaitForHandlers(true),
	)
	adminapi.RegisterInspect(s.grpc, cfg.Source)
	return s, nil
}

// Addr is where the server listens.
func (s *Server) Addr() net.Addr { return s.lis.Addr() }

// Run serves until ctx ends and lets calls under way finish for a while. It
// must be called once.
func (s *Server) Run(ctx context.Context) error {
	served := make(chan error, 1)
	go func() { served <- s.grpc.Serve(s.lis) }()
	select {
	case err := <-served:
		return fmt.Errorf("inspect endpoint: %w", err)
	case <-ctx.Done():
	}
	stopped := make(chan struct{})
	go func() {
		s.grpc.GracefulStop()
		close(stopped)
	}()
	timer := time.NewTimer(stopTimeout)
	defer timer.Stop()
	select {
	case <-stopped:
	case <-timer.C:
		s.grpc.Stop()
		<-stopped
	}
	if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("inspect endpoint: %w", err)
	}
	return nil
}

// Close gives up a server that was never run.
func (s *Server) Close() error { return s.lis.Close() }

// limits bounds the calls of each user.
type limits struct {
	mu     sync.Mutex
	byUser map[string]*rate.Limiter
}

func (l *limits) allow(user string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	limiter := l.byUser[user]
	if limiter == nil {
		if len(l.byUser) >= maxUsers {
			clear(l.byUser) // a pause for nobody, a fresh burst for all
		}
		limiter = rate.NewLimiter(callsPerSec, callsBurst)
		l.byUser[user] = limiter
	}
	return limiter.Allow()
}
