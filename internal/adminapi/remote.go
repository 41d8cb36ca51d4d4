package adminapi

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/agentpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/bundlepb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/localauthoritypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/svidpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/trustdomainpb"
	"github.com/spiffe-node/spiffe-node/internal/watchpb"
)

const (
	// maxConnectionAge makes clients connect anew now and then, and show their
	// newest SVID. grpc-go adds a tenth of jitter.
	maxConnectionAge = 3 * time.Minute
	// handshakeTimeout bounds what a caller may take to say who it is.
	handshakeTimeout = 20 * time.Second
	// maxStreams is per connection. Agents have a handful of calls open.
	maxStreams = 250
)

// RemoteConfig is what a Remote needs.
type RemoteConfig struct {
	// Address is host:port to listen on; required.
	Address string
	// TrustDomain is the authority's; required.
	TrustDomain spiffeid.TrustDomain
	// Authority is served; required.
	Authority NodeAuthority
	// Certificate is presented, see [ServerCertificate]; required.
	Certificate Certificate
	// Nodes attest and serve agents; required.
	Nodes *Nodes
	// AdminIDs may use the administrators' calls, beside those with an admin
	// entry. One of a foreign trust domain needs that domain's bundle.
	AdminIDs []spiffeid.ID
	// Federation fetches foreign bundles; nil = nobody does.
	Federation Federation
	// Logger gets one line per call; nil = discarded.
	Logger *slog.Logger
	// Audit gets one record per change, done or refused; nil = Logger.
	Audit *slog.Logger
}

// Remote is the SPIRE Server API over TLS, for agents, downstream servers and
// administrators with an SVID.
type Remote struct {
	cfg      RemoteConfig
	grpc     *grpc.Server
	lis      net.Listener
	stopping chan struct{}
	stopOnce sync.Once
}

// NewRemote listens; nothing is served before Run.
func NewRemote(ctx context.Context, cfg RemoteConfig) (*Remote, error) {
	if cfg.TrustDomain.IsZero() || cfg.Authority == nil || cfg.Certificate == nil || cfg.Nodes == nil {
		return nil, errors.New("server API: trust domain, authority, certificate or nodes are missing")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Audit == nil {
		cfg.Audit = cfg.Logger
	}
	r := &Remote{cfg: cfg, stopping: make(chan struct{})}
	lc := net.ListenConfig{}
	lis, err := lc.Listen(ctx, "tcp", cfg.Address)
	if err != nil {
		return nil, fmt.Errorf("server API: %w", err)
	}
	r.lis = lis
	i := &interceptor{log: cfg.Logger, record: cfg.Audit, allow: r.allow}
	r.grpc = grpc.NewServer(
		grpc.Creds(credentials.NewTLS(&tls.Config{
			MinVersion:             tls.VersionTLS12,
			NextProtos:             []string{"h2"},
			ClientAuth:             tls.RequestClientCert,
			SessionTicketsDisabled: true, // every connection shows its chain
			GetCertificate:         cfg.Certificate,
			VerifyPeerCertificate:  r.verifyPeer,
		})),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionAge: maxConnectionAge, Time: 30 * time.Second, Timeout: 15 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.UnaryInterceptor(i.unary), grpc.StreamInterceptor(i.stream), grpc.WaitForHandlers(true))
	r.register()
	return r, nil
}

func (r *Remote) register() {
	td, a, n := r.cfg.TrustDomain, r.cfg.Authority, r.cfg.Nodes
	entrypb.RegisterEntryServer(r.grpc, &nodeEntries{entryService{td: td, store: a}, n})
	agentpb.RegisterAgentServer(r.grpc, &nodeAgents{agentService{td: td, store: a}, n})
	bundlepb.RegisterBundleServer(r.grpc, &nodeBundles{bundleService{td: td, store: a}, n})
	svidpb.RegisterSVIDServer(r.grpc, &nodeSVIDs{svidService{td: td, minter: a}, n})
	localauthoritypb.RegisterLocalAuthorityServer(r.grpc, &localAuthorityService{keys: a})
	trustdomainpb.RegisterTrustDomainServer(r.grpc, &trustDomainService{td: td, store: a, fetcher: r.cfg.Federation, log: r.cfg.Logger})
	watchpb.RegisterWatchServer(r.grpc, &watchService{nodes: n, stopping: r.stopping})
}

// Addr is where it listens.
func (r *Remote) Addr() net.Addr { return r.lis.Addr() }

// Run serves until ctx ends, and lets calls under way finish for a while. It
// must be called once.
func (r *Remote) Run(ctx context.Context) error {
	if err := serve(ctx, r.grpc, r.lis, func() { r.stopOnce.Do(func() { close(r.stopping) }) }); err != nil {
		return fmt.Errorf("server API: %w", err)
	}
	return nil
}

// Close gives up a server that was never run.
func (r *Remote) Close() error { return r.lis.Close() }
