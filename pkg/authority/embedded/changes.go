package embedded

import (
	"github.com/spiffe/go-spiffe/v2/spiffeid"

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
	return Changes{a.entries.changed(), a.bundles.changed(), a.agents.changed()}
}

// changed closes when a newer value is there.
func (l *latest[T]) changed() <-chan struct{} { return l.current.Load().replaced }

// Set is what the agent is authorized for now.
func (n *NodeEntries) Set() *entry.Set { return n.view(n.authority.entries.get()) }

// BundleView is all bundles at one moment, with their taints. A bundle that did
// not change keeps its pointer from one view to the next.
type BundleView struct {
	Version   uint64 // as in authority.BundleSet
	Own       *Bundle
	Federated map[spiffeid.TrustDomain]*Bundle
}

// BundleView is the newest view.
func (a *Authority) BundleView() BundleView {
	book := a.bundles.get()
	out := BundleView{Version: book.set.Version, Own: book.own.Bundle, Federated: make(map[spiffeid.TrustDomain]*Bundle, len(book.federated))}
	for td, s := range book.federated {
		out.Federated[td] = s.Bundle
	}
	return out
}
