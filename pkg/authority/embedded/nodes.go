package embedded

import (
	"context"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// NodeEntries are the entries that one agent is authorized for: those whose
// chain of parents leads to the agent or to a node alias that matches the
// node's selectors. Safe for concurrent use.
type NodeEntries struct {
	authority *Authority
	scope     *entry.Scope
}

// NodeEntries is the view of an agent with the given node selectors.
func (a *Authority) NodeEntries(agent spiffeid.ID, node attest.Selectors) *NodeEntries {
	return &NodeEntries{authority: a, scope: entry.NewScope(agent, node)}
}

// Entries waits until the agent's set is newer than after, or ctx ends. Its
// versions are its own: changes outside the scope do not show.
func (n *NodeEntries) Entries(ctx context.Context, after uint64) (*entry.Set, error) {
	if err := n.authority.ready(ctx); err != nil {
		return nil, err
	}
	var scoped *entry.Set
	_, err := n.authority.entries.wait(ctx, n.authority.closed, func(global *entry.Set) bool {
		scoped = n.scope.Apply(global)
		return scoped.Version() > after
	})
	if err != nil {
		return nil, err
	}
	return scoped, nil
}

// SetNode replaces the node selectors and wakes those who wait.
func (n *NodeEntries) SetNode(node attest.Selectors) {
	n.scope.SetNode(node)
	n.authority.mu.Lock()
	defer n.authority.mu.Unlock()
	n.authority.entries.set(n.authority.entries.get())
}
