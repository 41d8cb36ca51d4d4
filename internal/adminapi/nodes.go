package adminapi

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/authority/nodeattest"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// NodeAttestor turns an agent's proof of the node it runs on into the agent's
// identity. Safe for concurrent use.
type NodeAttestor interface {
	// Type is the attestation type, such as k8s_psat.
	Type() string
	// Attest judges a payload. challenge sends bytes to the agent and returns
	// what it answers; it may be called any number of times until Attest
	// returns. Errors are of the kinds of package nodeattest.
	Attest(ctx context.Context, payload []byte, challenge func([]byte) ([]byte, error)) (*nodeattest.Result, error)
}

// NodeAuthority is what attesting and serving agents takes of an authority;
// *embedded.Authority is one.
type NodeAuthority interface {
	Authority
	agentKeeper
	authority.Authority
	NodeEntries(agent spiffeid.ID, node attest.Selectors) *embedded.NodeEntries
	Changes() embedded.Changes
	BundleView() embedded.BundleView
	NewDownstreamX509CA(ctx context.Context, csr []byte, ttl time.Duration) (*authority.X509Issued, []*x509.Certificate, error)
}

var _ NodeAuthority = (*embedded.Authority)(nil)

// agentKeeper signs for agents and records them.
type agentKeeper interface {
	SignAgent(ctx context.Context, id spiffeid.ID, csr []byte) (*authority.X509Issued, error)
	UpsertAgent(ctx context.Context, agent *embedded.Agent) (*embedded.Agent, error)
	UpdateAgent(ctx context.Context, id spiffeid.ID, edit func(*embedded.Agent) error) (*embedded.Agent, error)
	AgentSeen(id spiffeid.ID)
	ReportTrust(id spiffeid.ID, r authority.TrustReport)
	CreateJoinToken(ctx context.Context, value string, ttl time.Duration, alias spiffeid.ID) (*embedded.JoinToken, error)
}

// NodesConfig is what Nodes need.
type NodesConfig struct {
	// TrustDomain is the authority's; required.
	TrustDomain spiffeid.TrustDomain
	// Authority is required.
	Authority NodeAuthority
	// Attestors are those that agents may use; join tokens can be made if one
	// of them is for join_token.
	Attestors []NodeAttestor
	// NoAttestationLimit and NoSigningLimit lift the rate limits of those calls.
	NoAttestationLimit, NoSigningLimit bool
	// Logger gets faults; nil = discarded.
	Logger *slog.Logger
	// Metrics counts; nil = unregistered ones.
	Metrics *Metrics
}

// Nodes attests the agents of other machines and knows what each is authorized
// for. One is shared by the admin socket and the TLS listener. Safe for
// concurrent use.
type Nodes struct {
	cfg       NodesConfig
	attestors map[string]NodeAttestor
	limits    limits
	instance  string // tells the versions of this process from those of others

	mu    sync.Mutex
	views map[spiffeid.ID]*nodeView
	made  uint64 // views so far
	// watching is how many streams each agent has that have been told all.
	watching map[spiffeid.ID]int
}

// limits are the rate limits, each per address.
type limits struct {
	attest, x509, jwt, publish, status, report *limiter
}

// nodeView is what an agent is authorized for.
type nodeView struct {
	*embedded.NodeEntries
	name     string // unique in this process
	row      int64  // of the agent's record: a new record is a new view
	selector attest.Selectors
}

// NewNodes checks the configuration.
func NewNodes(cfg NodesConfig) (*Nodes, error) {
	if cfg.TrustDomain.IsZero() || cfg.Authority == nil {
		return nil, errors.New("nodes: trust domain or authority is missing")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Metrics == nil {
		cfg.Metrics = NewMetrics(nil)
	}
	n := &Nodes{
		cfg:       cfg,
		attestors: make(map[string]NodeAttestor),
		instance:  strings.ToLower(rand.Text()),
		views:     make(map[spiffeid.ID]*nodeView),
		watching:  make(map[spiffeid.ID]int),
		limits: limits{
			publish: newLimiter(500, "rejecting request due to key publishing rate limiting"),
			status:  newLimiter(10, "rejecting request due to post status rate limiting"),
			report:  newLimiter(100, "rejecting request due to trust report rate limiting"),
		},
	}
	if !cfg.NoAttestationLimit {
		n.limits.attest = newLimiter(1, "rejecting request due to attest agent rate limiting")
	}
	if !cfg.NoSigningLimit {
		n.limits.x509 = newLimiter(500, "rejecting request due to certificate signing rate limiting")
		n.limits.jwt = newLimiter(500, "rejecting request due to JWT signing request rate limiting")
	}
	for _, a := range cfg.Attestors {
		if _, twice := n.attestors[a.Type()]; twice {
			return nil, fmt.Errorf("nodes: two attestors for %s", a.Type())
		}
		n.attestors[a.Type()] = a
	}
	return n, nil
}

// view is what an agent is authorized for; the same for as long as its record
// lives, so that what changed can be told.
func (n *Nodes) view(agent *embedded.Agent) *nodeView {
	n.mu.Lock()
	defer n.mu.Unlock()
	v, ok := n.views[agent.ID]
	switch {
	case !ok || v.row != agent.Row:
		if len(n.views) > 2*n.cfg.Authority.AgentCount()+64 {
			n.sweepLocked()
		}
		n.made++
		v = &nodeView{
			NodeEntries: n.cfg.Authority.NodeEntries(agent.ID, agent.Selectors),
			name:        fmt.Sprintf("%s-%d", n.instance, n.made),
			row:         agent.Row, selector: agent.Selectors,
		}
		n.views[agent.ID] = v
	case !v.selector.Equal(agent.Selectors):
		v.SetNode(agent.Selectors)
		v.selector = agent.Selectors
	}
	return v
}

// sweepLocked forgets the views of agents that are gone.
func (n *Nodes) sweepLocked() {
	for id, v := range n.views {
		if a, err := n.cfg.Authority.Agent(id); err != nil || a.Row != v.row {
			delete(n.views, id)
		}
	}
}

// Serving is nil when the agent is attested, not banned, and holds a stream on
// which it has been told all it is authorized for; else what it lacks.
func (n *Nodes) Serving(id spiffeid.ID) error {
	agent, err := n.cfg.Authority.Agent(id)
	switch {
	case err != nil:
		return fmt.Errorf("agent %s is not attested", id)
	case agent.Banned:
		return fmt.Errorf("agent %s is banned", id)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.watching[id] == 0 {
		return fmt.Errorf("agent %s is not connected", id)
	}
	return nil
}

// serves notes that an agent holds a stream; the returned function that it has
// ended.
func (n *Nodes) serves(id spiffeid.ID) (ended func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.watching[id]++
	return func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.watching[id]--; n.watching[id] == 0 {
			delete(n.watching, id)
		}
	}
}

// authorized finds an entry that the calling agent may have.
func (n *Nodes) authorized(ctx context.Context, entryID string) (*entry.Entry, bool) {
	c := callerOf(ctx)
	if c.agent == nil {
		return nil, false
	}
	return n.view(c.agent).Set().Get(entryID)
}
