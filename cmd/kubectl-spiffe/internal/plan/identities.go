package plan

import (
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/spiffe-node/spiffe-node/internal/podfacts"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// Identities are what the entries give to pods.
type Identities struct {
	// Judged says that entries were given.
	Judged bool `json:"judged"`
	// Callers are the containers that were looked at, Several those that match
	// more than one entry.
	Callers int `json:"callers"`
	Several int `json:"several"`
	// Change are those whose default identity depends on the order.
	Change []Change `json:"change"`
	// NotJudged are entries with selectors that a pod's object does not give,
	// such as unix.
	NotJudged []string `json:"notJudged,omitempty"`
}

// Change is a caller whose default identity is another by our order than by
// SPIRE's.
type Change struct {
	Pod        string   `json:"pod"`
	Containers []string `json:"containers,omitempty"` // none: no container was made yet
	SPIRE      string   `json:"spire"`
	SPIREEntry string   `json:"spireEntry"`
	Node       string   `json:"node"`
	NodeEntry  string   `json:"nodeEntry"`
	Matches    int      `json:"matches"`
}

// identities compares the two orders for each caller that uses the socket.
func (w *world) identities() {
	out := &w.plan.Identities
	out.Change = []Change{}
	if w.in.Entries == nil {
		return
	}
	out.Judged = true
	var judged []*entry.Entry
	impossible := []string{}
	for _, e := range w.in.Entries {
		switch kind := foreign(e); kind {
		case "":
			judged = append(judged, e)
		case "unix":
			out.NotJudged = append(out.NotJudged, e.ID)
		default:
			if isWorkload(e) {
				impossible = append(impossible, fmt.Sprintf("%s (%s)", e.ID, kind))
			}
		}
	}
	if len(impossible) > 0 {
		w.block(fmt.Sprintf("entries have selectors that no sds-agent gives: %s", some(impossible)),
			"Who gets these identities now would lose them: give the entries k8s or unix selectors.")
	}
	for i := range w.pods {
		p := &w.pods[i]
		if !ended(p) && (w.hasVolume(p) || w.mountsSocket(p) && !w.isDriver(p) && !w.isOldAgent(p)) {
			w.pod(p, judged)
		}
	}
	if n := len(out.Change); n > 0 {
		w.warn(fmt.Sprintf("%s would have another default identity by spiffe-node's own order", pods(distinct(out.Change))),
			"The values below keep SPIRE's order (identity.defaultOrder: spire). Before you remove it, give the entries selectors or hints that tell them apart.")
	}
}

func distinct(all []Change) int {
	seen := map[string]bool{}
	for _, c := range all {
		seen[c.Pod] = true
	}
	return len(seen)
}

// notGiven are the k8s selectors that SPIRE Agent can give and the sds-agent
// cannot.
var notGiven = []string{"image-signature:", "image-attestations:", "image-signature-"}

// foreign is the kind of selector by which an entry cannot be judged from a
// pod's object; "" = there is none.
func foreign(e *entry.Entry) string {
	unix := ""
	for s := range e.Selectors.All() {
		switch {
		case s.Type() == "unix":
			unix = "unix"
		case s.Type() != "k8s":
			return s.Type()
		case slices.ContainsFunc(notGiven, func(p string) bool { return strings.HasPrefix(s.Value(), p) }):
			return "k8s:" + strings.SplitN(s.Value(), ":", 2)[0]
		}
	}
	return unix
}

// isWorkload leaves out entries of nodes, whose selectors are the server's.
func isWorkload(e *entry.Entry) bool {
	return !strings.HasSuffix(e.ParentID.Path(), "/spire/server")
}

// pod judges one pod: all its containers, since any of them may call.
func (w *world) pod(p *corev1.Pod, entries []*entry.Entry) {
	facts := podfacts.Of(p)
	callers := []*podfacts.Container{nil}
	if len(facts.Containers) > 0 {
		callers = callers[:0]
		for i := range facts.Containers {
			callers = append(callers, &facts.Containers[i])
		}
	}
	var changes []Change
	for _, c := range callers {
		w.plan.Identities.Callers++
		set := facts.Caller(p, c)
		var matches []*entry.Entry
		for _, e := range entries {
			if isWorkload(e) && w.onNode(e, p.Spec.NodeName) && e.Matches(set) {
				matches = append(matches, e)
			}
		}
		if len(matches) < 2 {
			continue
		}
		w.plan.Identities.Several++
		entry.Sort(matches, entry.OrderSPIRE, "")
		was := matches[0]
		entry.Sort(matches, entry.OrderNode, "")
		if is := matches[0]; is.SPIFFEID != was.SPIFFEID {
			change := Change{Pod: name(p), SPIRE: was.SPIFFEID.String(), SPIREEntry: was.ID, Node: is.SPIFFEID.String(), NodeEntry: is.ID, Matches: len(matches)}
			if c != nil {
				change.Containers = []string{c.Name}
			}
			changes = append(changes, change)
		}
	}
	// Containers that change alike are one line.
	for _, c := range changes {
		all := w.plan.Identities.Change
		i := slices.IndexFunc(all, func(x Change) bool {
			return x.Pod == c.Pod && x.SPIREEntry == c.SPIREEntry && x.NodeEntry == c.NodeEntry && x.Matches == c.Matches
		})
		if i >= 0 {
			all[i].Containers = append(all[i].Containers, c.Containers...)
			continue
		}
		w.plan.Identities.Change = append(all, c)
	}
}

// onNode says whether an entry is one of a node: its parent is the node's
// agent, or something that agents are given, which may be any's.
func (w *world) onNode(e *entry.Entry, node string) bool {
	path := e.ParentID.Path()
	if !strings.HasPrefix(path, "/spire/agent/k8s_psat/") {
		return true
	}
	for i := range w.nodeObjects {
		if n := &w.nodeObjects[i]; n.Name == node {
			return strings.HasSuffix(path, "/"+string(n.UID))
		}
	}
	return true // the node's UID is not known
}
