package main

import (
	"context"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/internal/adminapi"
	"github.com/spiffe-node/spiffe-node/internal/bundleendpoint"
	"github.com/spiffe-node/spiffe-node/internal/config"
	"github.com/spiffe-node/spiffe-node/internal/daemon"
	"github.com/spiffe-node/spiffe-node/internal/federation"
	"github.com/spiffe-node/spiffe-node/internal/upstream"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/authority/nodeattest/jointoken"
	"github.com/spiffe-node/spiffe-node/pkg/authority/nodeattest/k8spsat"
	"github.com/spiffe-node/spiffe-node/pkg/authority/nodeattest/x509pop"
)

// parts is all of a running authority, in the order in which data flows.
type parts struct {
	log       *slog.Logger
	authority *embedded.Authority
	upstream  func() error // closes the CA above
	attestors []string     // their types
	poller    *federation.Poller
	endpoint  *bundleendpoint.Server // nil where the bundle is not served
	identity  adminapi.Certificate   // of this process, to TLS clients
	admin     *adminapi.Server
	remote    *adminapi.Remote // nil where no agents are served
	tasks     []daemon.Task    // beside those of the fields above
}

// wire builds the parts. It is the only place that knows them all.
func (p *process) wire(ctx context.Context) (_ *parts, err error) {
	cfg := p.cfg
	td, err := spiffeid.TrustDomainFromString(cfg.TrustDomain)
	if err != nil {
		return nil, err
	}
	out := &parts{log: p.log}
	defer func() {
		if err != nil {
			out.discard()
		}
	}()
	above, closeAbove, err := upstream.Open(td, cfg.Embedded.Upstream, p.log)
	if err != nil {
		return nil, fmt.Errorf("embedded.%w", err)
	}
	out.upstream = closeAbove
	if out.authority, err = openAuthority(td, above, p); err != nil { //nolint:contextcheck // Open bounds what it waits for
		return nil, err
	}
	if out.identity, err = adminapi.ServerCertificate(out.authority, p.log); err != nil { //nolint:contextcheck // as in a handshake, which has none
		return nil, err
	}
	attestors, err := nodeAttestors(td, out.authority, cfg.NodeAttestation)
	if err != nil {
		return nil, err
	}
	for _, a := range attestors {
		out.attestors = append(out.attestors, a.Type())
	}
	if err := out.addFederation(ctx, p); err != nil {
		return nil, err
	}
	if err := out.addRegistration(td, p); err != nil {
		return nil, err
	}
	if err := out.addBundleMap(p); err != nil {
		return nil, err
	}
	nodes, err := adminapi.NewNodes(adminapi.NodesConfig{
		TrustDomain:        td,
		Authority:          out.authority,
		Attestors:          attestors,
		NoAttestationLimit: !cfg.RateLimits.Attestation,
		NoSigningLimit:     !cfg.RateLimits.Signing,
		Logger:             p.log,
		Metrics:            adminapi.NewMetrics(p.metrics),
	})
	if err != nil {
		return nil, err
	}
	if err := out.addStartupTaint(td, nodes, p); err != nil {
		return nil, err
	}
	out.admin, err = adminapi.New(ctx, adminapi.Config{
		SocketPath:  cfg.Admin.SocketPath,
		Group:       cfg.Admin.Group,
		TrustDomain: td,
		Authority:   out.authority,
		Certificate: out.identity,
		Nodes:       nodes,
		Federation:  out.poller,
		LogLevel:    p.level,
		Logger:      p.log,
		Audit:       p.audit,
	})
	if err != nil {
		return nil, err
	}
	if cfg.Server.Address == "" {
		return out, nil
	}
	admins := make([]spiffeid.ID, len(cfg.Server.AdminIDs))
	for i, text := range cfg.Server.AdminIDs {
		if admins[i], err = spiffeid.FromString(text); err != nil {
			return nil, fmt.Errorf("server.adminIDs: %w", err)
		}
	}
	out.remote, err = adminapi.NewRemote(ctx, adminapi.RemoteConfig{
		Address:     cfg.Server.Address,
		TrustDomain: td,
		Authority:   out.authority,
		Certificate: out.identity,
		Nodes:       nodes,
		AdminIDs:    admins,
		Federation:  out.poller,
		Logger:      p.log,
		Audit:       p.audit,
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

func openAuthority(td spiffeid.TrustDomain, above embedded.Upstream, p *process) (*embedded.Authority, error) {
	e := p.cfg.Embedded
	a, err := embedded.Open(embedded.Config{
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
		Logger:             p.log,
		Metrics:            embedded.NewMetrics(p.metrics),
	})
	if err != nil {
		return nil, fmt.Errorf("embedded: %w", err)
	}
	return a, nil
}

func nodeAttestors(td spiffeid.TrustDomain, a *embedded.Authority, cfg config.NodeAttestation) ([]adminapi.NodeAttestor, error) {
	var out []adminapi.NodeAttestor
	if !cfg.JoinToken.Disabled {
		out = append(out, jointoken.New(td, a))
	}
	if k := cfg.K8sPSAT; k.Cluster != "" {
		rest, err := k8spsat.RESTConfig(k.KubeConfigFile)
		if err != nil {
			return nil, fmt.Errorf("nodeAttestation.k8sPSAT: %w", err)
		}
		client, err := k8spsat.NewClient(rest)
		if err != nil {
			return nil, fmt.Errorf("nodeAttestation.k8sPSAT: %w", err)
		}
		attestor, err := k8spsat.New(k8spsat.Config{
			TrustDomain:     td,
			Cluster:         k.Cluster,
			ServiceAccounts: k.ServiceAccountAllowList,
			Audiences:       k.Audience,
			NodeLabels:      k.AllowedNodeLabelKeys,
			PodLabels:       k.AllowedPodLabelKeys,
			Kubernetes:      client,
		})
		if err != nil {
			return nil, fmt.Errorf("nodeAttestation.k8sPSAT: %w", err)
		}
		out = append(out, attestor)
	}
	if x := cfg.X509PoP; x.Mode != "" {
		attestor, err := x509pop.New(x509pop.Config{
			TrustDomain:      td,
			Mode:             x509pop.Mode(x.Mode),
			CAFiles:          x.CABundlePaths,
			Bundle:           func() *x509bundle.Bundle { return a.OwnBundle().X509Bundle() },
			SVIDPrefix:       x.SVIDPrefix,
			AgentPath:        x.AgentPathTemplate,
			MaxIntermediates: x.MaxIntermediates,
			MaxRSAKeySize:    x.MaxRSAKeySize,
			VerifyCallerIP:   x.VerifyClientIP,
		})
		if err != nil {
			return nil, fmt.Errorf("nodeAttestation.x509pop: %w", err)
		}
		out = append(out, attestor)
	}
	return out, nil
}

// ready is nil when an agent would be served; a CA above that does not answer
// is no reason against that, but worth a remark.
func (p *parts) ready() error {
	if err := p.authority.Ready(); err != nil {
		return err
	}
	if s := p.authority.UpstreamStatus(); s != nil && s.Err != nil {
		return daemon.Remark(s.Err.Error())
	}
	return nil
}

// run runs all parts until ctx ends. The authority outlives those that use it.
func (p *parts) run(ctx context.Context) error {
	tasks := append([]daemon.Task{
		{Name: "embedded authority", Run: p.authority.Run},
		{Name: "admin socket", Run: p.admin.Run},
	}, p.tasks...)
	if p.remote != nil {
		tasks = append(tasks, daemon.Task{Name: "server API", Run: p.remote.Run})
	}
	return errors.Join(daemon.Run(ctx, p.log, tasks...), p.authority.Close(), p.upstream())
}

// discard gives up parts that never ran.
func (p *parts) discard() {
	if p.remote != nil {
		_ = p.remote.Close()
	}
	if p.admin != nil {
		_ = p.admin.Close()
	}
	if p.endpoint != nil {
		_ = p.endpoint.Close()
	}
	if p.authority != nil {
		_ = p.authority.Close()
	}
	if p.upstream != nil {
		_ = p.upstream()
	}
}
