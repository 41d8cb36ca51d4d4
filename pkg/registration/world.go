package registration

import (
	"maps"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// world is what is known of the cluster, indexed so that each event finds what
// it touches. Only the engine's goroutine uses it.
type world struct {
	pods       map[string]*podState // namespace/name -> pod
	podsByUID  map[types.UID]*podState
	byLabel    labelIndex
	namespaces map[string]*nsState
	nodes      map[string]*nodeState
	services   map[types.UID]map[serviceName]int // pod -> services -> slices that say so
	slices     map[string]sliceState             // namespace/name -> slice
	rules      map[types.UID]*rule
	statics    map[types.UID]*staticState
	federated  map[types.UID]*federatedState
	byName     map[string]types.UID // kind/name -> UID of a resource
}

func newWorld() world {
	return world{
		pods: make(map[string]*podState), podsByUID: make(map[types.UID]*podState), byLabel: make(labelIndex),
		namespaces: make(map[string]*nsState), nodes: make(map[string]*nodeState),
		services: make(map[types.UID]map[serviceName]int), slices: make(map[string]sliceState),
		rules: make(map[types.UID]*rule), statics: make(map[types.UID]*staticState),
		federated: make(map[types.UID]*federatedState), byName: make(map[string]types.UID),
	}
}

// podState is an unfinished pod.
type podState struct {
	pod  *corev1.Pod
	ns   *nsState
	node *nodeState // nil until scheduled
	// services are those in front of the pod; shared with world.services.
	services map[serviceName]int
	matches  map[*rule]*match
	primary  int             // entries declared by rules that are no fallback
	foreign  map[string]bool // IDs of entries for this pod that are not ours
}

func (p *podState) name() string { return p.pod.Namespace + "/" + p.pod.Name }

// nsState is a namespace, perhaps one of which only pods are known yet.
type nsState struct {
	name    string
	known   bool
	ignored bool
	labels  map[string]string
	rules   map[*rule]bool // those that select it; none if it is ignored
	pods    map[*podState]bool
}

// nodeState is a node, perhaps one of which only pods are known. A node that
// was deleted is remembered as it was while it has pods: their agent still is
// who it was.
type nodeState struct {
	name    string
	known   bool // has been seen
	present bool // has not been deleted since
	meta    *metav1.ObjectMeta
	spec    *corev1.NodeSpec
	parent  spiffeid.ID
	err     error // why there is no parent
	pods    map[*podState]bool
}

type serviceName struct{ namespace, name string }

type sliceState struct {
	service serviceName
	pods    map[types.UID]bool
}

func finished(p *corev1.Pod) bool {
	return p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
}

// samePod says whether templates and selectors see the same in both.
func samePod(a, b *corev1.Pod) bool {
	x, y := a.ObjectMeta, b.ObjectMeta
	x.ResourceVersion, y.ResourceVersion = "", ""
	return equality.Semantic.DeepEqual(&x, &y) && equality.Semantic.DeepEqual(&a.Spec, &b.Spec)
}

func (x *engine) setPod(pod *corev1.Pod) {
	key := pod.Namespace + "/" + pod.Name
	p := x.pods[key]
	if p != nil && p.pod.UID != pod.UID {
		x.deletePod(key)
		p = nil
	}
	if finished(pod) {
		x.deletePod(key)
		return
	}
	switch {
	case p == nil:
		p = &podState{pod: pod, ns: x.namespace(pod.Namespace), services: x.services[pod.UID], matches: make(map[*rule]*match)}
		p.ns.pods[p] = true
		x.pods[key], x.podsByUID[pod.UID] = p, p
		x.byLabel.add(p, pod.Labels)
		x.findForeign(p)
	case samePod(p.pod, pod):
		p.pod = pod
		return
	default:
		x.byLabel.remove(p, p.pod.Labels)
		p.pod = pod
		x.byLabel.add(p, pod.Labels)
	}
	if p.node == nil && pod.Spec.NodeName != "" {
		p.node = x.node(pod.Spec.NodeName)
		p.node.pods[p] = true
	}
	x.evaluatePod(p)
}

func (x *engine) deletePod(key string) {
	p := x.pods[key]
	if p == nil {
		return
	}
	for r := range p.matches {
		x.unmatch(p, r)
	}
	x.byLabel.remove(p, p.pod.Labels)
	delete(x.pods, key)
	delete(x.podsByUID, p.pod.UID)
	delete(p.ns.pods, p)
	x.forgetNamespace(p.ns)
	if p.node != nil {
		delete(p.node.pods, p)
		x.forgetNode(p.node)
	}
	if len(p.foreign) > 0 {
		x.foreignPods--
	}
	x.pruneHeld(p.pod.UID)
}

func (x *engine) namespace(name string) *nsState {
	ns := x.namespaces[name]
	if ns == nil {
		ns = &nsState{name: name, ignored: x.ignores(name), rules: make(map[*rule]bool), pods: make(map[*podState]bool)}
		x.namespaces[name] = ns
	}
	return ns
}

func (x *engine) forgetNamespace(ns *nsState) {
	if !ns.known && len(ns.pods) == 0 {
		delete(x.namespaces, ns.name)
	}
}

func (x *engine) setNamespace(m *metav1.ObjectMeta) {
	ns := x.namespace(m.Name)
	if ns.known && maps.Equal(ns.labels, m.Labels) {
		return
	}
	ns.known, ns.labels = true, m.Labels
	for _, r := range x.rules {
		if x.selectNamespace(r, ns) {
			x.evaluateNamespace(r, ns)
		}
	}
}

func (x *engine) deleteNamespace(name string) {
	ns := x.namespaces[name]
	if ns == nil {
		return
	}
	ns.known, ns.labels = false, nil
	for _, r := range x.rules {
		if x.selectNamespace(r, ns) {
			x.evaluateNamespace(r, ns)
		}
	}
	x.forgetNamespace(ns)
}

// selectNamespace finds out whether a rule selects a namespace. True if its
// pods must be looked at again.
func (x *engine) selectNamespace(r *rule, ns *nsState) bool {
	selected := r.spec != nil && ns.known && r.spec.namespaces.Matches(labelSet(ns.labels))
	if selected != r.namespaces[ns] {
		x.touch(r.source)
		step := -1
		if selected {
			step = 1
			r.namespaces[ns] = true
		} else {
			delete(r.namespaces, ns)
		}
		if ns.ignored {
			r.ignored += step
		}
	}
	if before := ns.rules[r]; before == (selected && !ns.ignored) {
		return false
	}
	if selected {
		ns.rules[r] = true
	} else {
		delete(ns.rules, r)
	}
	return true
}

func (x *engine) node(name string) *nodeState {
	n := x.nodes[name]
	if n == nil {
		n = &nodeState{name: name, pods: make(map[*podState]bool)}
		x.nodes[name] = n
	}
	return n
}

func (x *engine) forgetNode(n *nodeState) {
	if !n.present && len(n.pods) == 0 {
		delete(x.nodes, n.name)
	}
}

func (x *engine) setNode(node *corev1.Node) {
	n := x.node(node.Name)
	meta, spec := node.ObjectMeta, node.Spec
	meta.ResourceVersion = ""
	n.present = true
	if n.known && equality.Semantic.DeepEqual(n.meta, &meta) && equality.Semantic.DeepEqual(n.spec, &spec) {
		return
	}
	n.known, n.meta, n.spec = true, &meta, &spec
	n.parent, n.err = x.parentOf(n.meta, n.spec)
	for p := range n.pods {
		x.evaluatePod(p)
	}
}

func (x *engine) deleteNode(name string) {
	n := x.nodes[name]
	if n == nil {
		return
	}
	n.present = false
	x.forgetNode(n)
}

// setSlice takes over which pods are behind a service; nil = the slice is gone.
func (x *engine) setSlice(key string, slice *discoveryv1.EndpointSlice) {
	old := x.slices[key]
	var next sliceState
	if slice != nil {
		next = readSlice(slice)
	}
	if old.service == next.service && maps.Equal(old.pods, next.pods) {
		return
	}
	changed := make(map[types.UID]bool)
	for uid := range old.pods {
		if m := x.services[uid]; m[old.service] > 1 {
			m[old.service]--
		} else {
			delete(m, old.service)
			changed[uid] = true
		}
	}
	for uid := range next.pods {
		m := x.services[uid]
		if m == nil {
			m = make(map[serviceName]int)
			x.services[uid] = m
		}
		m[next.service]++
		if m[next.service] == 1 {
			changed[uid] = !changed[uid] || next.service != old.service
		}
	}
	if slice == nil {
		delete(x.slices, key)
	} else {
		x.slices[key] = next
	}
	for uid, really := range changed {
		x.servicesChanged(uid, really)
	}
}

func (x *engine) servicesChanged(uid types.UID, really bool) {
	if len(x.services[uid]) == 0 {
		delete(x.services, uid)
	}
	p := x.podsByUID[uid]
	if p == nil {
		return
	}
	p.services = x.services[uid]
	if !really {
		return
	}
	for r := range p.matches {
		if r.spec.autoDNS {
			x.evaluateRule(p, r)
		}
	}
}

func readSlice(s *discoveryv1.EndpointSlice) sliceState {
	name := s.Labels[discoveryv1.LabelServiceName]
	if name == "" {
		return sliceState{}
	}
	out := sliceState{service: serviceName{s.Namespace, name}, pods: make(map[types.UID]bool)}
	for i := range s.Endpoints {
		// Ready or not: a proxy needs its certificate to become ready.
		if ref := s.Endpoints[i].TargetRef; ref != nil && ref.Kind == "Pod" && ref.UID != "" {
			out.pods[ref.UID] = true
		}
	}
	return out
}
