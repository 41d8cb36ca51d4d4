package main

import (
	"context"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/spiffe-node/spiffe-node/internal/adminapi"
	"github.com/spiffe-node/spiffe-node/internal/config"
	"github.com/spiffe-node/spiffe-node/internal/daemon"
	"github.com/spiffe-node/spiffe-node/internal/federation"
	"github.com/spiffe-node/spiffe-node/internal/inspecttls"
	"github.com/spiffe-node/spiffe-node/internal/ledger"
	"github.com/spiffe-node/spiffe-node/internal/peersock"
	"github.com/spiffe-node/spiffe-node/internal/podevent"
	"github.com/spiffe-node/spiffe-node/internal/podinfo"
	"github.com/spiffe-node/spiffe-node/internal/rollout"
	"github.com/spiffe-node/spiffe-node/internal/sockdir"
	"github.com/spiffe-node/spiffe-node/internal/upstream"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/authority/spireserver"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/sds"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
	"github.com/spiffe-node/spiffe-node/pkg/workloadapi"
)

// node is all parts of a running agent, in the order in which data flows.
type node struct {
	log       *slog.Logger
	id        spiffeid.ID
	order     entry.Order
	upstream  func() error        // closes the CA above authority; nil without authority
	authority *embedded.Authority // or
	server    *spireserver.Client // where the authority is elsewhere
	self      *self
	poller    *federation.Poller // with authority
	ledger    *ledger.Reader     // nil outside kubernetes mode
	pods      *podinfo.Source    // likewise
	attestor  *attest.Attestor
	manager   *svid.Manager
	stateDir  string // where restart state is kept; empty: nowhere
	socket    *sockdir.Socket
	public    *public
	rollout   *rollout.Reporter
	admin     *adminapi.Server
	inspect   *inspecttls.Server // nil: off
	events    *podevent.Reporter // nil: no API server
}

// wire builds the parts. It is the only place that knows them all.
func (a *agent) wire(ctx context.Context) (_ *node, err error) {
	cfg := a.cfg
	td, err := spiffeid.TrustDomainFromString(cfg.TrustDomain)
	if err != nil {
		return nil, err
	}
	n := &node{log: a.log}
	defer func() {
		if err != nil {
			n.discard()
		}
	}()
	if n.id, err = spiffeid.FromSegments(td, "spire", "agent", "local", cfg.Node.Name); err != nil {
		return nil, fmt.Errorf("agent ID: %w", err)
	}
	if cfg.Identity.DefaultOrder == "spire" {
		n.order = entry.OrderSPIRE
	}
	stateDir := cfg.Identity.StateDirectory
	if stateDir == config.StateAuto {
		stateDir = config.DefaultStateDirectory
	}
	var entries svid.Entries
	if cfg.Authority.SpireServer.Enabled() {
		entries, err = n.openServer(cfg, td, stateDir, a)
	} else {
		entries, err = n.openAuthority(ctx, cfg, td, a)
	}
	if err != nil {
		return nil, err
	}
	identities := svid.Config{
		Authority:          n.signer(),
		Entries:            entries,
		KeyType:            cfg.Identity.X509SVIDKeyType,
		Order:              n.order,
		DefaultHint:        cfg.SDS.DefaultHint,
		StateDir:           stateDir,
		StateOf:            stateOf(cfg),
		MaxParked:          cfg.Limits.ParkedPerPod,
		AvailabilityTarget: time.Duration(cfg.Identity.AvailabilityTarget),
		MaxIdle:            cfg.Identity.MaxX509SVIDs,
		MaxJWT:             cfg.Identity.MaxJWTSVIDs,
		OnLate:             n.onLate,
		OnAmbiguous:        n.onAmbiguous,
		OnPark:             n.hurry,
		Logger:             a.log,
		Audit:              a.audit,
		Metrics:            svid.NewMetrics(a.metrics),
	}
	if n.server != nil {
		identities.Workers = serverWorkers
	}
	n.manager, err = svid.New(identities)
	if errors.Is(err, svid.ErrOnDisk) && cfg.Identity.StateDirectory == config.StateAuto {
		a.log.Warn("no restart state is kept: a restarted agent waits for its authority", slog.Any("error", err))
		identities.StateDir = ""
		n.manager, err = svid.New(identities)
	}
	if err != nil {
		return nil, err
	}
	n.stateDir = identities.StateDir
	if w := n.swapWarning(); w != "" {
		a.log.Warn("keys may reach a disk", slog.String("warning", w))
	}
	if err := n.buildAttestor(cfg, a.metrics); err != nil {
		return nil, err
	}
	if err := n.buildPublic(cfg, a); err != nil {
		return nil, err
	}
	n.rollout = n.newRollout()
	n.admin, err = adminapi.New(ctx, adminapi.Config{
		SocketPath:  cfg.Admin.SocketPath,
		TrustDomain: td,
		Authority:   n.administered(),
		Source:      inspector{agent: a, node: n},
		LocalAgent:  n.id,
		Federation:  n.federation(),
		LogLevel:    a.level,
		Logger:      a.log,
		Audit:       a.audit,
	})
	if err != nil {
		return nil, err
	}
	if err := n.openCluster(ctx, a); err != nil {
		return nil, err
	}
	return n, nil
}

func (n *node) buildAttestor(cfg *config.Agent, reg prometheus.Registerer) (err error) {
	c := attest.Config{
		Mode: attest.ModeUnix,
		Unix: attest.UnixConfig{
			DiscoverPath: cfg.Attestation.Unix.DiscoverWorkloadPath,
			SizeLimit:    cfg.Attestation.Unix.WorkloadSizeLimit,
		},
		Logger: n.log,
	}
	if cfg.Mode == config.ModeKubernetes {
		k := cfg.Attestation.Kubernetes
		if err := n.openPods(cfg, reg); err != nil {
			return err
		}
		c.Mode, c.Pods, c.RequireLedger = attest.ModeBoth, n.pods, k.RequireLedger
		if k.CgroupRoot != "" {
			c.KubeletCgroups = []string{k.CgroupRoot}
		}
	}
	n.attestor, err = attest.New(c)
	return err
}

func (n *node) buildPublic(cfg *config.Agent, a *agent) (err error) {
	n.socket, err = sockdir.Listen(cfg.Socket.Directory, cfg.Socket.Name, cfg.Socket.AlternateNames...)
	if err != nil {
		return err
	}
	listener, err := peersock.New(n.socket.UnixListener, peersock.Config{
		Bind: func(ctx context.Context, c attest.Caller) (attest.Subject, error) {
			b, err := n.attestor.Bind(ctx, c)
			if err != nil {
				return nil, err // not b: a nil *Binding is not a nil Subject
			}
			return b, nil
		},
		MaxConns:       cfg.Limits.Connections,
		MaxConnsPerUID: cfg.Limits.ConnectionsPerUID,
		MaxConnsPerKey: cfg.Limits.ConnectionsPerPod,
		Logger:         a.log,
		Metrics:        peersock.NewMetrics(a.metrics),
	})
	if err != nil {
		return err
	}
	if cfg.Attestation.RequirePeerPIDFD && listener.Mode() != peersock.ModePidfd {
		return errors.New("attestation.requirePeerPIDFD is set, but this kernel has no SO_PEERPIDFD (Linux 6.5)")
	}
	c := callers{n.manager}
	p := &public{listener: listener, socket: n.socket, grpc: newGRPC(cfg.Limits.StreamsPerConn, a.log), log: a.log}
	wait := time.Duration(cfg.WorkloadAPI.FetchWait)
	if wait == 0 {
		wait = -1 // both services take 0 for their own default
	}
	if !cfg.SDS.Disabled {
		p.sds, err = sds.New(sds.Config{
			Subscribe: func(ctx context.Context, notify func()) (sds.Subscription, error) { return c.subscribe(ctx, notify) },
			Snapshot:  c.snapshot,
			PeerID:    peerID,
			LogAttrs:  c.logAttrs,
			Names: sds.Names{
				SVID:       text(cfg.SDS.DefaultSVIDName),
				Bundle:     text(cfg.SDS.DefaultBundleName),
				AllBundles: text(cfg.SDS.DefaultAllBundlesName),
			},
			DisableSPIFFECertValidation: cfg.SDS.DisableSPIFFECertValidation,
			FetchWait:                   wait,
			Logger:                      a.log,
			Metrics:                     sds.NewMetrics(a.metrics),
		})
		if err != nil {
			return err
		}
		p.sds.Register(p.grpc)
	}
	if !cfg.WorkloadAPI.Disabled {
		p.workload, err = workloadapi.New(workloadapi.Config{
			Subscribe: func(ctx context.Context, notify func()) (workloadapi.Subscription, error) {
				return c.subscribe(ctx, notify)
			},
			JWT:                           c.jwt,
			Snapshot:                      c.snapshot,
			PeerID:                        peerID,
			LogAttrs:                      c.logAttrs,
			FetchWait:                     wait,
			AllowUnauthenticatedVerifiers: cfg.WorkloadAPI.AllowUnauthenticatedVerifiers,
			AllowedForeignJWTClaims:       cfg.WorkloadAPI.AllowedForeignJWTClaims,
			Logger:                        a.log,
			Metrics:                       workloadapi.NewMetrics(a.metrics),
		})
		if err != nil {
			return err
		}
		p.workload.Register(p.grpc)
	}
	healthpb.RegisterHealthServer(p.grpc, healthService{ready: n.ready})
	n.public = p
	return nil
}

func text(s *string) string {
	if s == nil {
		return ""
	}
	return *s
}

// openAuthority opens the embedded authority and makes this agent known to it.
func (n *node) openAuthority(ctx context.Context, cfg *config.Agent, td spiffeid.TrustDomain, a *agent) (svid.Entries, error) {
	e := cfg.Authority.Embedded
	above, closeAbove, err := upstream.Open(td, e.Upstream, a.log)
	if err != nil {
		return nil, fmt.Errorf("authority.embedded.%w", err)
	}
	n.upstream = closeAbove
	n.authority, err = embedded.Open(embedded.Config{
		TrustDomain: td,
		StatePath:   e.StatePath,
		CAKeyType:   embedded.KeyType(e.CAKeyType),
		JWTKeyType:  embedded.KeyType(e.JWTKeyType),
		CATTL:       time.Duration(e.CATTL),
		CASubject: pkix.Name{
			Country:      e.CASubject.Country,
			Organization: e.CASubject.Organization,
			CommonName:   e.CASubject.CommonName,
		},
		Upstream:           above,
		DefaultX509SVIDTTL: time.Duration(e.DefaultX509SVIDTTL),
		DefaultJWTSVIDTTL:  time.Duration(e.DefaultJWTSVIDTTL),
		JWTIssuer:          e.JWTIssuer,
		Logger:             a.log,
		Metrics:            embedded.NewMetrics(a.metrics),
	})
	if err != nil {
		return nil, fmt.Errorf("authority.embedded: %w", err)
	}
	n.poller, err = federation.New(federation.Config{Store: n.authority, Logger: a.log, Metrics: federation.NewMetrics(a.metrics)})
	if err != nil {
		return nil, err
	}
	selectors := []attest.Selector{attest.MustSelector("local:node:" + cfg.Node.Name)}
	for _, s := range cfg.Node.Selectors {
		sel, err := attest.ParseSelector(s)
		if err != nil {
			return nil, fmt.Errorf("node.selectors: %w", err)
		}
		selectors = append(selectors, sel)
	}
	n.self = &self{node: n, selectors: attest.NewSelectors(selectors...)}
	if err := n.self.start(ctx); err != nil {
		return nil, err
	}
	return n.authority.NodeEntries(n.id, n.self.selectors), nil
}

func (n *node) onLate(s attest.Subject, what string, since time.Time) {
	attrs := append([]slog.Attr{slog.String("waits_for", what), slog.Duration("since", time.Since(since))}, s.LogAttrs()...)
	n.log.LogAttrs(context.Background(), slog.LevelWarn, "a caller has been waiting for its identity; kubectl-spiffe explain says why", attrs...)
	n.reportLate(s, since)
}

// ready is nil when a caller that matches an entry would be served.
func (n *node) ready() error {
	switch {
	case !n.manager.Status().Synced:
		return errors.New("waiting for entries and bundles")
	case !n.socket.Current():
		return errors.New("the socket's name leads elsewhere: another agent has taken over or removed it")
	}
	return n.canIssue()
}

func (n *node) socketNames(cfg *config.Agent) []string {
	out := []string{n.socket.Path()}
	for _, name := range cfg.Socket.AlternateNames {
		out = append(out, filepath.Join(cfg.Socket.Directory, name))
	}
	return out
}

// run runs all parts until ctx ends. The authority outlives those that use it.
func (n *node) run(ctx context.Context) error {
	tasks := append(n.authorityTasks(),
		daemon.Task{Name: "identities", Run: n.manager.Run},
		daemon.Task{Name: "trust bundle's spread", Run: n.rollout.Run},
		daemon.Task{Name: "public socket", Run: n.public.run},
		daemon.Task{Name: "admin socket", Run: n.admin.Run},
	)
	if n.ledger != nil {
		tasks = append(tasks, daemon.Task{Name: "publish ledger", Run: n.ledger.Run}, daemon.Task{Name: "pods", Run: n.pods.Run})
	}
	if n.events != nil {
		tasks = append(tasks, daemon.Task{Name: "pod events", Run: n.events.Run})
	}
	if n.inspect != nil {
		tasks = append(tasks, daemon.Task{Name: "inspect port", Run: n.inspect.Run})
	}
	return errors.Join(daemon.Run(ctx, n.log, tasks...), n.closeAuthority())
}

// discard gives up parts that never ran.
func (n *node) discard() {
	if n.inspect != nil {
		_ = n.inspect.Close()
	}
	if n.admin != nil {
		_ = n.admin.Close()
	}
	if n.public != nil {
		_ = n.public.listener.Close()
	}
	if n.socket != nil {
		_ = n.socket.Unpublish()
		_ = n.socket.Close()
	}
	_ = n.closeAuthority()
}
