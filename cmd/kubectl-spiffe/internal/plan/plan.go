package plan

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/spiffe-node/spiffe-node/cmd/kubectl-spiffe/internal/check"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// Label is what the plan has nodes labelled with, once they are spiffe-node's.
const Label = "spiffe-node.io/migrated"

// Input is what a plan is made from.
type Input struct {
	Objects []check.Object
	// Cluster says that Objects is everything there is.
	Cluster bool
	// Unread are kinds that could not be read, with the reason.
	Unread map[string]string
	// Agent chooses one of several SPIRE Agents, as namespace/name; "" = the
	// only one.
	Agent string
	// Entries are the server's; nil = they were not given.
	Entries []*entry.Entry
}

// Plan is what to do.
type Plan struct {
	// Blockers are to be solved first; Warnings are to be known.
	Blockers []Remark `json:"blockers"`
	Warnings []Remark `json:"warnings"`
	Found    Found    `json:"found"`
	Nodes    []Node   `json:"nodes"`
	// Values are for the chart spiffe-node.
	Values map[string]any `json:"values,omitempty"`
	Steps  []Step         `json:"steps"`
	// Differs is what will be different.
	Differs []string `json:"differs"`
	// Identities are the pods whose default identity depends on the order.
	Identities Identities `json:"identities"`
}

// Remark is one thing an operator must know.
type Remark struct {
	What string `json:"what"`
	Do   string `json:"do"`
}

// Found is what runs.
type Found struct {
	TrustDomain       string   `json:"trustDomain,omitempty"`
	ClusterName       string   `json:"clusterName,omitempty"`
	Agent             string   `json:"agent,omitempty"`       // DaemonSet
	AgentConfig       string   `json:"agentConfig,omitempty"` // ConfigMap
	AgentAccount      string   `json:"agentServiceAccount,omitempty"`
	Driver            string   `json:"driver,omitempty"` // DaemonSet
	PluginName        string   `json:"pluginName,omitempty"`
	CSIDriverObject   string   `json:"csiDriverObject,omitempty"` // who owns it
	KubeletPath       string   `json:"kubeletPath,omitempty"`
	SocketDirectory   string   `json:"socketDirectory,omitempty"`
	SocketName        string   `json:"socketName,omitempty"`
	Server            string   `json:"server,omitempty"`
	ServerAddress     string   `json:"serverAddress,omitempty"`
	BundleConfigMap   string   `json:"bundleConfigMap,omitempty"` // name/key
	ControllerManager string   `json:"controllerManager,omitempty"`
	ClassName         string   `json:"className,omitempty"`
	ClusterSPIFFEIDs  int      `json:"clusterSPIFFEIDs"`
	Classes           []string `json:"classes,omitempty"`
	NodeAttestor      string   `json:"nodeAttestor,omitempty"`
}

// Node is one node and who serves it.
type Node struct {
	Name string `json:"name"`
	// Agent is SPIRE, spiffe-node, both or none.
	Agent string `json:"agent"`
	// Volumes are pods with the driver's volume, HostPaths pods that mount the
	// socket directory of the host themselves.
	Volumes   []string `json:"volumes"`
	HostPaths []string `json:"hostPaths,omitempty"`
}

// Step is one thing to do, in order.
type Step struct {
	Title    string   `json:"title"`
	Text     string   `json:"text,omitempty"`
	Commands []string `json:"commands,omitempty"`
}

// Who serves a node.
const (
	byNobody = "none"
	bySPIRE  = "SPIRE"
	byUs     = "spiffe-node"
	byBoth   = "both"
)

// Make makes a plan.
func Make(in Input) *Plan {
	w := newWorld(in)
	w.agents()
	w.drivers()
	w.servers()
	w.csiDriver()
	w.nodes()
	w.podsAtRisk()
	w.identities()
	for _, kind := range sortedKeys(in.Unread) {
		w.warn(fmt.Sprintf("%s could not be read: %s", kind, in.Unread[kind]), "Ask for permission to read them, or give the objects with -f.")
	}
	if w.plan.Found.Agent != "" {
		w.values()
		w.steps()
		w.differs()
	}
	return &w.plan
}

func (w *world) block(what, do string) { w.plan.Blockers = append(w.plan.Blockers, Remark{what, do}) }

func (w *world) warn(what, do string) { w.plan.Warnings = append(w.plan.Warnings, Remark{what, do}) }

func sortedKeys[V any](m map[string]V) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

// nodes says who serves which node.
func (w *world) nodes() {
	at := map[string]*Node{}
	node := func(name string) *Node {
		if at[name] == nil {
			at[name] = &Node{Name: name, Agent: byNobody, Volumes: []string{}}
		}
		return at[name]
	}
	for _, n := range w.nodeObjects {
		node(n.Name)
	}
	for i := range w.pods {
		p := &w.pods[i]
		if p.Spec.NodeName == "" || ended(p) {
			continue
		}
		n := node(p.Spec.NodeName)
		switch {
		case w.isOldAgent(p):
			n.Agent = either(n.Agent, bySPIRE)
		case isOurAgent(p):
			n.Agent = either(n.Agent, byUs)
		case w.hasVolume(p):
			n.Volumes = append(n.Volumes, name(p))
		case w.mountsSocket(p) && !w.isDriver(p):
			n.HostPaths = append(n.HostPaths, name(p))
		}
	}
	for _, key := range sortedKeys(at) {
		n := at[key]
		slices.Sort(n.Volumes)
		slices.Sort(n.HostPaths)
		w.plan.Nodes = append(w.plan.Nodes, *n)
		if n.Agent == byBoth {
			w.block(fmt.Sprintf("node %s runs a SPIRE Agent and an sds-agent", n.Name),
				"Keep one: label the node "+Label+"=true for spiffe-node, or remove the label; see that both DaemonSets have the affinity of the plan.")
		}
	}
}

func either(was, is string) string {
	if was == byNobody || was == is {
		return is
	}
	return byBoth
}

func name(p *corev1.Pod) string { return p.Namespace + "/" + p.Name }

func ended(p *corev1.Pod) bool {
	return p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
}

// sandboxes are runtimes in whose pods the kernel of the node does not see the
// caller.
var sandboxes = []string{"gvisor", "runsc", "kata", "firecracker"}

// podsAtRisk names pods that the new agent cannot tell.
func (w *world) podsAtRisk() {
	bySandbox := map[string][]string{}
	for i := range w.pods {
		p := &w.pods[i]
		if ended(p) || !w.hasVolume(p) && !w.mountsSocket(p) || p.Spec.RuntimeClassName == nil {
			continue
		}
		class := strings.ToLower(*p.Spec.RuntimeClassName)
		handler := strings.ToLower(cmp.Or(w.handlers[*p.Spec.RuntimeClassName], class))
		if slices.ContainsFunc(sandboxes, func(s string) bool { return strings.Contains(class, s) || strings.Contains(handler, s) }) {
			bySandbox[class] = append(bySandbox[class], name(p))
		}
	}
	for _, class := range sortedKeys(bySandbox) {
		w.block(fmt.Sprintf("pods of runtime class %s use the socket: %s", class, some(bySandbox[class])),
			"A sandbox with a kernel of its own hides its processes: callers are seen as the sandbox or not at all, by SPIRE Agent as well. Give these pods another runtime class, or leave their nodes with what they have.")
	}
}

func pods(n int) string {
	if n == 1 {
		return "1 pod"
	}
	return fmt.Sprintf("%d pods", n)
}

// some are the first of a list that may be long.
func some(names []string) string {
	const most = 5
	if len(names) <= most {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
}
