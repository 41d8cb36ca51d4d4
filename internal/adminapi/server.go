package adminapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/spiffe-node/spiffe-node/internal/adminapi/federationpb"
	"github.com/spiffe-node/spiffe-node/internal/adminapi/inspectpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/agentpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/bundlepb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/debugpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/localauthoritypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/loggerpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/svidpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/trustdomainpb"
)

// DefaultSocketPath is where the agent serves and the command line client
// looks, if neither is told otherwise.
const DefaultSocketPath = spirewire.DefaultAdminSocket

// Config is what a Server needs.
type Config struct {
	// SocketPath is the unix socket; "" = DefaultSocketPath. Its directory is
	// made with mode 0700 if it is missing, and refused if it is there and
	// open to others.
	SocketPath string
	// Group may use the socket beside the owner: a name or a number, "" =
	// nobody. The directory is then 0750 and the socket 0660.
	Group string
	// TrustDomain is the authority's. Required.
	TrustDomain spiffeid.TrustDomain
	// Authority is served as the SPIRE Server API; nil serves nothing of it but
	// Logger: for agents whose authority is elsewhere.
	Authority Authority
	// Certificate is what the TLS listeners present, see [ServerCertificate]; nil
	// = there are none.
	Certificate Certificate
	// Nodes attests other agents; nil = the authority serves only the agent in
	// this process.
	Nodes *Nodes
	// LocalAgent is the agent in this process, which cannot be banned or
	// deleted; zero = none.
	LocalAgent spiffeid.ID
	// Federation fetches foreign bundles; nil = nobody does.
	Federation Federation
	// Source is served as Inspect; nil = no Inspect service.
	Source Source
	// LogLevel is what the Logger service reads and sets; nil = no Logger
	// service. The level at New is the launch level.
	LogLevel *slog.LevelVar
	// Logger gets one line per call; nil = discarded.
	Logger *slog.Logger
	// Audit gets one record per change, done or refused; nil = Logger. Give it
	// a logger that LogLevel does not govern, or whoever may set the level can
	// silence the record.
	Audit *slog.Logger
}

// Server is the admin socket.
type Server struct {
	cfg  Config
	grpc *grpc.Server
	lis  *listener
}

// New makes the socket; nothing is served before Run.
func New(ctx context.Context, cfg Config) (*Server, error) {
	if cfg.TrustDomain.IsZero() {
		return nil, errors.New("admin API: trust domain is missing")
	}
	if cfg.SocketPath == "" {
		cfg.SocketPath = DefaultSocketPath
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Audit == nil {
		cfg.Audit = cfg.Logger
	}
	lis, err := listen(ctx, cfg.SocketPath, cfg.Group)
	if err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, lis: lis}
	i := &interceptor{log: cfg.Logger, record: cfg.Audit, allow: allowLocal}
	s.grpc = grpc.NewServer(grpc.UnaryInterceptor(i.unary), grpc.StreamInterceptor(i.stream), grpc.WaitForHandlers(true))
	s.register()
	return s, nil
}

func (s *Server) register() {
	td := s.cfg.TrustDomain
	if a := s.cfg.Authority; a != nil {
		entrypb.RegisterEntryServer(s.grpc, &entryService{td: td, store: a})
		agents := agentService{td: td, local: s.cfg.LocalAgent, store: a}
		if n := s.cfg.Nodes; n != nil {
			agentpb.RegisterAgentServer(s.grpc, &nodeAgents{agents, n})
		} else {
			agentpb.RegisterAgentServer(s.grpc, &agents)
		}
		bundlepb.RegisterBundleServer(s.grpc, &bundleService{td: td, store: a})
		svidpb.RegisterSVIDServer(s.grpc, &svidService{td: td, minter: a})
		localauthoritypb.RegisterLocalAuthorityServer(s.grpc, &localAuthorityService{keys: a})
		trustdomainpb.RegisterTrustDomainServer(s.grpc, &trustDomainService{td: td, store: a, fetcher: s.cfg.Federation, log: s.cfg.Logger})
		inspectpb.RegisterRotationServer(s.grpc, &rotationService{keys: a})
		debugpb.RegisterDebugServer(s.grpc, &debugService{authority: a, certificate: s.cfg.Certificate, start: time.Now()})
		healthpb.RegisterHealthServer(s.grpc, &healthService{authority: a})
	}
	if s.cfg.LogLevel != nil {
		loggerpb.RegisterLoggerServer(s.grpc, &loggerService{level: s.cfg.LogLevel, launch: s.cfg.LogLevel.Level()})
	}
	if s.cfg.Federation != nil {
		federationpb.RegisterFederationServer(s.grpc, &federationService{fetcher: s.cfg.Federation})
	}
	if s.cfg.Source != nil {
		inspectpb.RegisterInspectServer(s.grpc, &inspectService{source: s.cfg.Source})
	}
}

// Addr is the socket's path.
func (s *Server) Addr() net.Addr { return s.lis.Addr() }

// Run serves until ctx ends, lets calls under way finish for a while, and
// removes the socket. It must be called once.
func (s *Server) Run(ctx context.Context) error {
	if err := serve(ctx, s.grpc, s.lis, nil); err != nil {
		return fmt.Errorf("admin API: %w", err)
	}
	return nil
}

// Close gives up a server that was never run.
func (s *Server) Close() error { return s.lis.Close() }
