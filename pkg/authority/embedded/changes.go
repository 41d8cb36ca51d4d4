package embedded

import (
	"context"
	"errors"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/internal/latest"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// Changes are channels that close at the next change of a kind. A bare nudge:
// what changed is found by looking.
type Changes struct {
	Entries, Bundles, Agents <-chan struct{}
}

// Changes are those after this call: who takes them first and looks second
// misses nothing.
func (a *Authority) Changes() Changes {
	var c Changes
	_, c.Entries = a.entries.Look()
	_, c.Bundles = a.bundles.Look()
	_, c.Agents = a.agents.Look()
	return c
}

// wait is the newest of a series of values that accept takes, as soon as there
// is one; errClosed once the authority is closed.
func wait[T any](ctx context.Context, a *Authority, v *latest.Value[T], accept func(T) bool) (T, error) {
	out, err := v.Wait(ctx, a.closed, accept)
	if errors.Is(err, latest.ErrEnded) {
		err = errClosed
	}
	return out, err
}

// Set is what the agent is authorized for now.
func (n *NodeEntries) Set() *entry.Set { return n.view(n.authority.entries.Get()) }

// BundleView is all bundles at one moment, with their taints. A bundle that did
// not change keeps its pointer from one view to the next.
type BundleView struct {
	Version   uint64 // as in authority.BundleSet
	Own       *Bundle
	Federated map[spiffeid.TrustDomain]*Bundle
}

// BundleView is the newest view.
func (a *Authority) BundleView() BundleView {
	book := a.bundles.Get()
	out := BundleView{Version: book.set.Version, Own: book.own.Bundle, Federated: make(map[spiffeid.TrustDomain]*Bundle, len(book.federated))}
	for td, s := range book.federated {
		out.Federated[td] = s.Bundle
	}
	return out
}
