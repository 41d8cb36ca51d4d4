package embedded

import (
	"context"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// NodeEntries are the entries that one agent is authorized for: those whose
// chain of parents leads to the agent or to a node alias that matches the
// node's selectors. A ban of the agent takes all of them away, for as long as
// this view lives: a banned agent has to start anew. Safe for concurrent use.
type NodeEntries struct {
	authority *Authority
	agent     spiffeid.ID
	scope     *entry.Scope

	mu        sync.Mutex
	withdrawn *entry.Set // the empty set after a ban
}

// NodeEntries is the view of an agent with the given node selectors.
func (a *Authority) NodeEntries(agent spiffeid.ID, node attest.Selectors) *NodeEntries {
	return &NodeEntries{authority: a, agent: agent, scope: entry.NewScope(agent, node)}
}

// Entries waits until the agent's set is newer than after, or ctx ends. Its
// versions are its own: changes outside the scope do not show.
func (n *NodeEntries) Entries(ctx context.Context, after uint64) (*entry.Set, error) {
	if err := n.authority.ready(ctx); err != nil {
		return nil, err
	}
	var scoped *entry.Set
	_, err := wait(ctx, n.authority, n.authority.entries, func(global *entry.Set) bool {
		scoped = n.view(global)
		return scoped.Version() > after
	})
	if err != nil {
		return nil, err
	}
	return scoped, nil
}

func (n *NodeEntries) view(global *entry.Set) *entry.Set {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.withdrawn != nil {
		return n.withdrawn
	}
	scoped := n.scope.Apply(global)
	if agent, err := n.authority.Agent(n.agent); err != nil || !agent.Banned {
		return scoped
	}
	var all []string
	for e := range scoped.All() {
		all = append(all, e.ID)
	}
	// Of the same lineage, so that the node sees deletions, not a new world.
	n.withdrawn = scoped.With(nil, all)
	return n.withdrawn
}

// SetNode replaces the node selectors and wakes those who wait.
func (n *NodeEntries) SetNode(node attest.Selectors) {
	n.scope.SetNode(node)
	n.authority.mu.Lock()
	defer n.authority.mu.Unlock()
	n.authority.nudge()
}

// nudge lets every waiting reader of entries look again. The caller holds mu.
func (a *Authority) nudge() { a.entries.Set(a.entries.Get()) }
