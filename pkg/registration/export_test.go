package registration

import (
	"context"
	"encoding/json"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/registration/api/v1alpha1"
)

// Engine drives an engine without an API server.
type Engine struct {
	x   *engine
	ctx context.Context
}

func NewEngine(ctx context.Context, cfg Config) (*Engine, error) {
	s, err := cfg.check()
	if err != nil {
		return nil, err
	}
	e := &Engine{ctx: ctx}
	e.x = newEngine(s, newPatcher(s, nil))
	return e, nil
}

// Start is what begin does, without waiting.
func (e *Engine) Start() error {
	set, err := e.x.Authority.Bundles(e.ctx, 0)
	if err != nil {
		return err
	}
	have := make(map[spiffeid.TrustDomain]bool)
	for td := range set.Federated {
		have[td] = true
	}
	e.x.setBundles(have)
	e.x.start()
	e.Step()
	return nil
}

// Step handles what has come in and shows the engine what it wrote.
func (e *Engine) Step() {
	e.x.step(e.ctx)
	if e.x.started {
		e.x.setChanged(e.x.Authority.Set())
		e.x.step(e.ctx)
	}
}

// RetryAll makes all retries due.
func (e *Engine) RetryAll() {
	e.x.retryDue(time.Now().Add(time.Hour))
	e.Step()
}

func (e *Engine) SetBundles(have map[spiffeid.TrustDomain]bool) { e.x.setBundles(have) }
func (e *Engine) SetPod(p *corev1.Pod) {
	o, _ := trim(p.DeepCopy())
	e.x.setPod(o.(*corev1.Pod))
}
func (e *Engine) DeletePod(key string)             { e.x.deletePod(key) }
func (e *Engine) SetNode(n *corev1.Node)           { e.x.setNode(n.DeepCopy()) }
func (e *Engine) DeleteNode(name string)           { e.x.deleteNode(name) }
func (e *Engine) SetNamespace(n *corev1.Namespace) { e.x.setNamespace(&n.DeepCopy().ObjectMeta) }
func (e *Engine) DeleteNamespace(name string)      { e.x.deleteNamespace(name) }
func (e *Engine) SetSlice(s *discoveryv1.EndpointSlice) {
	e.x.setSlice(s.Namespace+"/"+s.Name, s.DeepCopy())
}
func (e *Engine) DeleteSlice(key string)                   { e.x.setSlice(key, nil) }
func (e *Engine) SetSPIFFEID(c *v1alpha1.ClusterSPIFFEID)  { e.x.setRule(c.DeepCopy()) }
func (e *Engine) SetStatic(c *v1alpha1.ClusterStaticEntry) { e.x.setStatic(c.DeepCopy()) }
func (e *Engine) DeleteSPIFFEID(name string)               { e.x.deleteResource(kindSPIFFEID, name) }
func (e *Engine) DeleteStatic(name string)                 { e.x.deleteResource(kindStatic, name) }
func (e *Engine) DeleteFederated(name string)              { e.x.deleteResource(kindFederated, name) }

// Refederate is what a change of relationships does.
func (e *Engine) Refederate() { e.x.federationDirty = true }

func (e *Engine) SetFederated(c *v1alpha1.ClusterFederatedTrustDomain) {
	e.x.setFederated(c.DeepCopy())
}

// SPIFFEIDStatus is the status the resource should have.
func (e *Engine) SPIFFEIDStatus(uid types.UID) v1alpha1.ClusterSPIFFEIDStatus {
	return e.x.wantedOf(e.x.rules[uid].source).status.(v1alpha1.ClusterSPIFFEIDStatus)
}

func (e *Engine) StaticStatus(uid types.UID) v1alpha1.ClusterStaticEntryStatus {
	return e.x.wantedOf(e.x.statics[uid].source).status.(v1alpha1.ClusterStaticEntryStatus)
}

func (e *Engine) FederatedStatus(uid types.UID) v1alpha1.ClusterFederatedTrustDomainStatus {
	return e.x.wantedOf(e.x.federated[uid].source).status.(v1alpha1.ClusterFederatedTrustDomainStatus)
}

// Queued are the statuses handed to the patcher since the last call.
func (e *Engine) Queued() map[string]string {
	out := make(map[string]string)
	for _, j := range e.x.out.queue {
		text, _ := json.Marshal(j.w.status)
		out[j.w.kind+"/"+j.w.name] = string(text)
	}
	clear(e.x.out.queue)
	return out
}

// Sizes are the lengths of what must not grow without need.
func (e *Engine) Sizes() map[string]int {
	x := e.x
	return map[string]int{
		"groups": len(x.groups), "byEntry": len(x.byEntry), "dirty": len(x.dirty), "retry": len(x.retry), "held": len(x.held),
		"pods": len(x.pods), "podsByUID": len(x.podsByUID), "namespaces": len(x.namespaces), "nodes": len(x.nodes),
		"services": len(x.services), "slices": len(x.slices), "foreign": len(x.foreign), "foreignOf": len(x.foreignOf), "foreignPods": x.foreignPods,
		"statusNext": len(x.statusNext), "said": len(x.said),
	}
}

func EntryID(source, pod types.UID) string { return entryID(source, pod) }

func Owns(id string) bool { return newOwnership().owns(id) }

// Render renders one template.
func Render(text string, c *TemplateContext) (string, error) {
	t, err := parseTemplate("field", text)
	if err != nil {
		return "", err
	}
	return t.render(c)
}

func SampleContext() *TemplateContext { return exampleContext() }

// Declared recomputes from scratch what every rule gives a pod: the slow truth
// that the engine must agree with.
func Declared(cfg Config, spec *v1alpha1.ClusterSPIFFEIDSpec, p *corev1.Pod, n *corev1.Node, services []string) (*entry.Entry, error) {
	s, err := cfg.check()
	if err != nil {
		return nil, err
	}
	r, err := compileRule(spec)
	if err != nil {
		return nil, err
	}
	ns := &nodeState{meta: n.ObjectMeta.DeepCopy(), spec: n.Spec.DeepCopy()}
	ns.meta.ResourceVersion = ""
	ns.parent, ns.err = s.parentOf(ns.meta, ns.spec)
	state := &podState{pod: p, node: ns, services: make(map[serviceName]int)}
	for _, name := range services {
		state.services[serviceName{p.Namespace, name}] = 1
	}
	return s.render(r, state)
}
