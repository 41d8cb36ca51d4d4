package entry

import (
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/selector"
)

// Scope is what one agent is authorized for: of all entries of the trust
// domain those whose chain of parents leads to the agent or to a node alias.
//
// A node alias is an entry with the parent /spire/server whose selectors are
// among the node's; its SPIFFE ID then counts as the agent's, and it is itself
// never part of the scope. Every entry in the scope is in turn a parent.
// Cycles are harmless; entries of a foreign trust domain are left out.
//
// Safe for concurrent use.
type Scope struct {
	agent  spiffeid.ID
	server spiffeid.ID

	mu       sync.Mutex
	node     selector.Set
	stale    bool                 // node has changed since out was made
	lineage  *lineage             // of the set Apply saw last
	version  uint64               // likewise
	roots    map[spiffeid.ID]bool // the agent and its aliases
	aliases  map[string]bool      // entry IDs behind roots
	out      *Set
	rebuilds int
}

// serverPath is the SPIFFE ID path of a SPIRE Server, the parent of aliases.
const serverPath = "/spire/server"

// ServerID is the SPIFFE ID of the trust domain's server.
func ServerID(td spiffeid.TrustDomain) spiffeid.ID {
	id, err := spiffeid.FromPath(td, serverPath)
	if err != nil {
		panic(err) // the path is a constant; only the zero trust domain gets here
	}
	return id
}

// NewScope starts the scope of an agent with the given node selectors.
func NewScope(agent spiffeid.ID, node selector.Set) *Scope {
	return &Scope{agent: agent, server: ServerID(agent.TrustDomain()), node: node}
}

// SetNode replaces the node selectors; the next Apply sees them.
func (sc *Scope) SetNode(node selector.Set) {
	sc.mu.Lock()
	defer sc.mu.Unlock()
	if !sc.node.Equal(node) {
		sc.node, sc.stale = node, true
	}
}

// Apply is the part of a set that is in scope. All its results are of one
// lineage with versions of their own: two calls whose results are equal return
// the same set, and Changes works between them. A set older than the one seen
// last changes nothing. Entries keep their pointers, not their rows.
func (sc *Scope) Apply(global *Set) *Set {
	sc.mu.Lock()
	defer sc.mu.Unlock()
	if sc.out == nil {
		sc.out = NewSet()
	}
	known := sc.lineage == global.lineage && !sc.stale
	if known && global.version <= sc.version {
		return sc.out
	}
	if d, ok := global.Changes(sc.version); !known || !ok || !sc.follow(global, d) {
		sc.rebuild(global)
	}
	sc.lineage, sc.version, sc.stale = global.lineage, global.version, false
	return sc.out
}

// follow takes over a delta if it cannot have moved anything but the changed
// entries themselves in or out of scope; otherwise it does nothing and says
// false.
func (sc *Scope) follow(global *Set, d Delta) bool {
	var changed []*Entry
	var removed []string
	for _, e := range d.Removed {
		if sc.aliases[e.ID] {
			return false
		}
		if old, ok := sc.out.Get(e.ID); ok {
			if global.hasChildren(old.SPIFFEID) {
				return false
			}
			removed = append(removed, e.ID)
		}
	}
	added := make(map[spiffeid.ID]bool)
	for _, e := range d.Changed {
		if sc.aliases[e.ID] || sc.isAlias(e) {
			return false
		}
		if old, ok := sc.out.Get(e.ID); ok {
			if old.SPIFFEID != e.SPIFFEID || old.ParentID != e.ParentID {
				return false
			}
			changed = append(changed, e)
			continue
		}
		if !sc.eligible(e) || !sc.isParent(e.ParentID) && !added[e.ParentID] {
			continue
		}
		if !sc.isParent(e.SPIFFEID) && !added[e.SPIFFEID] {
			if global.hasChildren(e.SPIFFEID) {
				return false
			}
			added[e.SPIFFEID] = true
		}
		changed = append(changed, e)
	}
	sc.out = sc.out.With(changed, removed)
	return true
}

// rebuild walks the whole scope and records how it differs from the last one.
func (sc *Scope) rebuild(global *Set) {
	sc.rebuilds++
	sc.roots = map[spiffeid.ID]bool{sc.agent: true}
	sc.aliases = make(map[string]bool)
	queue := []spiffeid.ID{sc.agent}
	visited := map[spiffeid.ID]bool{sc.agent: true}
	visit := func(id spiffeid.ID) {
		if !visited[id] {
			visited[id] = true
			queue = append(queue, id)
		}
	}
	for _, e := range global.Match(sc.node) {
		if sc.isAlias(e) {
			sc.aliases[e.ID] = true
			sc.roots[e.SPIFFEID] = true
			visit(e.SPIFFEID)
		}
	}
	members := make(map[string]bool)
	var changed []*Entry
	for len(queue) > 0 {
		parent := queue[0]
		queue = queue[1:]
		for e := range global.ByParent(parent) {
			if !sc.eligible(e) {
				continue
			}
			members[e.ID] = true
			if old, ok := sc.out.Get(e.ID); !ok || old != e {
				changed = append(changed, e)
			}
			visit(e.SPIFFEID)
		}
	}
	var removed []string
	for e := range sc.out.All() {
		if !members[e.ID] {
			removed = append(removed, e.ID)
		}
	}
	sc.out = sc.out.With(changed, removed)
}

// eligible says whether e may be in scope if its parent is.
func (sc *Scope) eligible(e *Entry) bool {
	td := sc.agent.TrustDomain()
	return e.ParentID.MemberOf(td) && e.SPIFFEID.MemberOf(td) && e.ParentID != sc.server
}

func (sc *Scope) isAlias(e *Entry) bool {
	return e.ParentID == sc.server && e.SPIFFEID.MemberOf(sc.agent.TrustDomain()) && e.Matches(sc.node)
}

// isParent says whether children of id were in scope after the last Apply.
func (sc *Scope) isParent(id spiffeid.ID) bool {
	if sc.roots[id] {
		return true
	}
	for range sc.out.BySPIFFEID(id) {
		return true
	}
	return false
}
