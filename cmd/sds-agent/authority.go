package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/internal/adminapi"
	"github.com/spiffe-node/spiffe-node/internal/config"
	"github.com/spiffe-node/spiffe-node/internal/daemon"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/authority/spireserver"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// serverWorkers is how many SVIDs are asked for at a time where they travel in
// batches.
const serverWorkers = 128

// openServer makes the client of an authority elsewhere. Nothing is asked
// before it runs: an agent whose server is away serves from its state.
func (n *node) openServer(cfg *config.Agent, td spiffeid.TrustDomain, stateDir string, a *agent) (svid.Entries, error) {
	s := cfg.Authority.SpireServer
	c := spireserver.Config{
		TrustDomain:       td,
		Addresses:         s.Addresses(),
		InsecureBootstrap: s.TrustBundle.Insecure,
		Rebootstrap:       spireserver.Rebootstrap(s.Rebootstrap.Mode),
		RebootstrapDelay:  time.Duration(s.Rebootstrap.Delay),
		RequirePQKEM:      s.RequirePQKEM,
		StateDir:          stateDir,
		StateOf:           stateOf(cfg),
		Version:           version,
		SyncInterval:      time.Duration(s.SyncInterval),
		WithdrawConfirm:   time.Duration(s.WithdrawConfirm),
		Logger:            a.log,
		Metrics:           spireserver.NewMetrics(a.metrics),
	}
	c.Bootstrap, c.Attestor = bootstrap(s.TrustBundle), nodeAttestor(s.NodeAttestation)
	var err error
	n.server, err = spireserver.New(c)
	if errors.Is(err, spireserver.ErrOnDisk) && cfg.Identity.StateDirectory == config.StateAuto {
		c.StateDir = ""
		n.server, err = spireserver.New(c)
	}
	if err != nil {
		return nil, fmt.Errorf("authority.spireServer: %w", err)
	}
	a.log.Info("identities come from a server", slog.Any("addresses", c.Addresses), slog.String("node_attestation", c.Attestor.Type()))
	return n.server, nil
}

// stateOf names the authority that restart state is from. An agent of another
// one that was on this node since it booted has left identities that nobody here
// would accept.
func stateOf(cfg *config.Agent) string {
	if s := cfg.Authority.SpireServer; s.Enabled() {
		return strings.Join(slices.Sorted(slices.Values(s.Addresses())), ",")
	}
	return "in-process " + cfg.Authority.Embedded.StatePath
}

// bootstrap is where the first trust bundle comes from; nil = from whoever
// answers.
func bootstrap(t config.TrustBundle) spireserver.Bootstrap {
	switch {
	case t.Path != "":
		return spireserver.BundleFile(t.Path, t.Format)
	case t.UnixSocket != "":
		return spireserver.BundleSocket(t.UnixSocket, t.URL, t.Format)
	case t.URL != "":
		return spireserver.BundleURL(t.URL, t.Format)
	case t.WorkloadAPISocket != "":
		return spireserver.BundleWorkloadAPI(t.WorkloadAPISocket)
	case t.ConfigMap.Name != "":
		m := t.ConfigMap
		return spireserver.BundleConfigMap(spireserver.ConfigMap{Namespace: m.Namespace, Name: m.Name, Key: m.Key}, t.Format)
	}
	return nil
}

// nodeAttestor proves which node this is.
func nodeAttestor(a config.AgentAttestation) spireserver.NodeAttestor {
	switch {
	case a.Type == config.AttestJoinToken:
		return spireserver.JoinToken{Token: a.JoinToken, Path: a.JoinTokenFile}
	case a.Type == config.AttestX509POP && a.WorkloadAPISocket != "":
		return spireserver.X509POPWorkload{Socket: a.WorkloadAPISocket}
	case a.Type == config.AttestX509POP:
		return spireserver.X509POP{CertificatePath: a.CertificatePath, PrivateKeyPath: a.PrivateKeyPath, IntermediatesPath: a.IntermediatesPath}
	}
	return spireserver.PSAT{Cluster: a.Cluster, TokenPath: a.TokenPath}
}

// signer is whoever signs for this node.
func (n *node) signer() authority.Authority {
	if n.server != nil {
		return n.server
	}
	return n.authority
}

// administered is the authority that the admin socket serves: only the one in
// this process.
func (n *node) administered() adminapi.Authority {
	if n.server != nil {
		return nil
	}
	return n.authority
}

// federation keeps foreign bundles fresh where the authority is in this
// process.
func (n *node) federation() adminapi.Federation {
	if n.poller == nil {
		return nil
	}
	return n.poller
}

// hurry says that somebody waits, or will soon, for what the authority may
// know already.
func (n *node) hurry() {
	if n.server != nil {
		n.server.Hurry()
	}
}

// certificate is this agent's own SVID.
func (n *node) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	if n.server != nil {
		return n.server.Certificate()
	}
	if cert := n.self.svid.Load(); cert != nil {
		return cert, nil
	}
	return nil, errors.New("the agent has no SVID yet")
}

// agentID is this agent's SPIFFE ID; zero until the node is attested.
func (n *node) agentID() string {
	if n.server == nil {
		return n.id.String()
	}
	return n.server.Status().AgentID.String()
}

// canIssue is nil when the authority would sign now.
func (n *node) canIssue() error {
	if n.server != nil {
		return n.server.Ready()
	}
	return n.authority.Ready()
}

// remark says what is wrong although callers are served: nil, or a
// daemon.Remark.
func (n *node) remark() error {
	if n.authority == nil {
		return nil
	}
	if s := n.authority.UpstreamStatus(); s != nil && s.Err != nil {
		return daemon.Remark(s.Err.Error())
	}
	return nil
}

// authorityTasks keep the authority going.
func (n *node) authorityTasks() []daemon.Task {
	if n.server != nil {
		return []daemon.Task{{Name: "server", Run: n.server.Run}}
	}
	return []daemon.Task{{Name: "authority", Run: n.authority.Run}, {Name: "agent SVID", Run: n.self.run}, {Name: "federation", Run: n.poller.Run}}
}

func (n *node) closeAuthority() error {
	switch {
	case n.server != nil:
		return n.server.Close()
	case n.authority != nil:
		return errors.Join(n.authority.Close(), n.upstream())
	case n.upstream != nil:
		return n.upstream()
	}
	return nil
}

// serverStatus is what Inspect says of an authority elsewhere.
func (n *node) serverStatus() adminapi.AuthorityStatus {
	out := adminapi.AuthorityStatus{Kind: "spire-server", State: "ready"}
	s := n.server.Status()
	if err := n.server.Ready(); err != nil {
		out.State, out.Detail = "degraded", err.Error()
		if !s.Attested && !s.Banned && s.LastSync.IsZero() {
			out.State = "starting"
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if set, err := n.server.Bundles(ctx, 0); err == nil {
		// The root that outlives the others is the one that signs, or will.
		for _, root := range set.Own.X509Authorities() {
			if root.NotAfter.After(out.X509AuthorityEnds) {
				out.X509AuthorityID, out.X509AuthorityEnds = fmt.Sprintf("%x", root.SubjectKeyId), root.NotAfter
			}
		}
	}
	return out
}
