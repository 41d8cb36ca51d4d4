package registration_test

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/registration"
	"github.com/spiffe-node/spiffe-node/pkg/registration/api/v1alpha1"
)

// model is the cluster as plain lists and the slow truth computed from them.
type model struct {
	cfg      registration.Config
	pods     map[string]*corev1.Pod
	nss      map[string]*corev1.Namespace
	nodes    map[string]*corev1.Node
	rules    map[string]*v1alpha1.ClusterSPIFFEID
	services map[string][]string // pod -> services
	manual   map[string]*entry.Entry
}

// entries is what must be stored: for each pod, resource after resource.
func (m *model) entries(t *testing.T) []string {
	t.Helper()
	best := make(map[string]*v1alpha1.ClusterSPIFFEID)
	text := make(map[string]string)
	declare := func(c *v1alpha1.ClusterSPIFFEID, p *corev1.Pod) bool {
		ns := m.nss[p.Namespace]
		if ns == nil || !matches(t, c.Spec.NamespaceSelector, ns.Labels) || !matches(t, c.Spec.PodSelector, p.Labels) {
			return false
		}
		n := m.nodes[p.Spec.NodeName]
		if n == nil {
			return false
		}
		e, err := registration.Declared(m.cfg, &c.Spec, p, n, m.services[p.Name])
		if err != nil {
			return false
		}
		key := e.SPIFFEID.String() + e.ParentID.String() + e.Selectors.Key()
		if old := best[key]; old == nil || c.CreationTimestamp.Time.Before(old.CreationTimestamp.Time) ||
			c.CreationTimestamp.Equal(&old.CreationTimestamp) && c.UID < old.UID {
			best[key], text[key] = c, show(e)
		}
		return true
	}
	for _, p := range m.pods {
		if p.Status.Phase == corev1.PodSucceeded {
			continue
		}
		found := false
		for _, c := range m.rules {
			if !c.Spec.Fallback && declare(c, p) {
				found = true
			}
		}
		for _, c := range m.rules {
			if c.Spec.Fallback && !found {
				declare(c, p)
			}
		}
	}
	out := slices.AppendSeq([]string{}, maps.Values(text))
	for _, e := range m.manual {
		out = append(out, show(e))
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func matches(t *testing.T, s *metav1.LabelSelector, set map[string]string) bool {
	t.Helper()
	if s == nil {
		return true
	}
	sel, err := metav1.LabelSelectorAsSelector(s)
	if err != nil {
		t.Fatal(err)
	}
	return sel.Matches(labels.Set(set))
}

// TestAnyOrder: after any sequence of events, faults and restarts the entries
// are those that a computation from scratch gives, and no identity that a step
// leaves in place was missing during it.
func TestAnyOrder(t *testing.T) {
	t.Parallel()
	for seed := range uint64(25) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			anyOrder(t, rand.New(rand.NewPCG(seed, 1)))
		})
	}
}

func anyOrder(t *testing.T, r *rand.Rand) {
	t.Helper()
	a := newFake()
	m := &model{
		cfg: testConfig(t, a), pods: make(map[string]*corev1.Pod), nss: make(map[string]*corev1.Namespace), nodes: make(map[string]*corev1.Node),
		rules: make(map[string]*v1alpha1.ClusterSPIFFEID), services: make(map[string][]string), manual: make(map[string]*entry.Entry),
	}
	e := newEngine(t, a)
	start(t, e)
	w := &walk{t: t, r: r, m: m, e: e, a: a}
	for i := range 250 {
		before := identities(a.Set())
		present := before
		a.onSet = func(s *entry.Set) { present = intersect(present, identities(s)) }
		for range 1 + r.IntN(4) {
			w.move()
		}
		if r.IntN(15) == 0 {
			a.fail = errors.New("disk is full")
			w.e.Step()
			a.fail = nil
			w.e.RetryAll()
		}
		w.e.Step()
		w.e.RetryAll()
		a.onSet = nil
		if diff := cmp.Diff(m.entries(t), showAll(a.Set())); diff != "" {
			t.Fatalf("step %d (-want +got):\n%s", i, diff)
		}
		if missing := missing(intersect(before, identities(a.Set())), present); !w.tampered && len(missing) > 0 {
			t.Fatalf("step %d: missing in between: %v", i, missing)
		}
		w.tampered = false
	}
	if s := w.e.Sizes(); s["dirty"]+s["retry"]+s["held"] > 0 || s["byEntry"] != a.Set().Len()-len(m.manual) || s["groups"] > len(m.pods)*len(m.rules) {
		t.Errorf("left over: %v", s)
	}
}

// identities are the pairs of pod and SPIFFE ID that some entry gives.
func identities(s *entry.Set) map[string]bool {
	out := make(map[string]bool)
	for e := range s.All() {
		out[e.SPIFFEID.String()+" "+e.ParentID.String()+" "+e.Selectors.At(e.Selectors.Len()-1).Value()] = true
	}
	return out
}

func intersect(a, b map[string]bool) map[string]bool {
	out := make(map[string]bool)
	for k := range a {
		if b[k] {
			out[k] = true
		}
	}
	return out
}

func missing(want, have map[string]bool) []string {
	var out []string
	for k := range want {
		if !have[k] {
			out = append(out, k)
		}
	}
	return out
}

// walk makes random events.
type walk struct {
	t        *testing.T
	r        *rand.Rand
	m        *model
	e        *registration.Engine
	a        *fakeAuthority
	tampered bool // identities may be missing in this step
}

func (w *walk) pick(list ...string) string { return list[w.r.IntN(len(list))] }

func (w *walk) move() {
	switch w.r.IntN(18) {
	case 0, 1, 2, 3, 4:
		w.pod()
	case 5:
		name := w.pick("a/p", "a/q", "b/p", "b/q")
		delete(w.m.pods, name)
		w.e.DeletePod(name)
	case 6, 7:
		n := namespace(w.pick("a", "b"), "team", w.pick("x", "y"))
		w.m.nss[n.Name] = n
		w.e.SetNamespace(n)
	case 8:
		name := w.pick("a", "b")
		delete(w.m.nss, name)
		w.e.DeleteNamespace(name)
	case 9, 10:
		n := node(w.pick("n1", "n2"))
		n.Labels["zone"] = w.pick("z1", "z2")
		w.m.nodes[n.Name] = n
		w.e.SetNode(n)
	case 11, 12, 13:
		c := w.rule()
		w.m.rules[c.Name] = c
		w.e.SetSPIFFEID(c)
	case 14:
		name := w.pick("r1", "r2", "r3", "r4")
		delete(w.m.rules, name)
		w.e.DeleteSPIFFEID(name)
	case 15:
		w.services()
	case 16:
		w.tamper()
	case 17:
		if w.r.IntN(4) == 0 {
			w.restart()
		}
	}
}

func (w *walk) pod() {
	p := pod(w.pick("a/p", "a/q", "b/p", "b/q"), w.pick("", "n1", "n1", "n2"), "app", w.pick("u", "v", "bad label"))
	key := p.Namespace + "/" + p.Name
	if old := w.m.pods[key]; old != nil && old.Spec.NodeName != "" {
		p.Spec.NodeName = old.Spec.NodeName // pods do not move
	}
	if w.r.IntN(8) == 0 {
		p.Status.Phase = corev1.PodSucceeded
	}
	w.m.pods[key] = p
	w.e.SetPod(p)
	if p.Status.Phase == corev1.PodSucceeded {
		delete(w.m.pods, key) // as the watch shows it
	}
}

func (w *walk) rule() *v1alpha1.ClusterSPIFFEID {
	name := w.pick("r1", "r2", "r3", "r4")
	c := spiffeID(name, strings.Index("r3r1r4", name)/2, func(s *v1alpha1.ClusterSPIFFEIDSpec) {
		s.SPIFFEIDTemplate = w.pick(istioID, "spiffe://example.org/{{ .PodMeta.Labels.app }}", "spiffe://example.org/{{ .NodeMeta.Labels.zone }}/{{ .PodMeta.Name }}")
		s.Fallback, s.AutoPopulateDNSNames = w.r.IntN(3) == 0, w.r.IntN(2) == 0
		s.Hint = w.pick("", "h")
		if w.r.IntN(2) == 0 {
			s.NamespaceSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"team": w.pick("x", "y")}}
		}
		if w.r.IntN(2) == 0 {
			s.PodSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"app": w.pick("u", "v")}}
		}
		if w.r.IntN(3) == 0 {
			s.WorkloadSelectorTemplates = []string{"k8s:ns:{{ .PodMeta.Namespace }}"}
		}
	})
	c.Generation = 0
	return c
}

// services puts a service in front of some pods.
func (w *walk) services() {
	name := w.pick("web", "api")
	var behind []*corev1.Pod
	for _, n := range []string{"p", "q"} {
		list := slices.DeleteFunc(w.m.services[n], func(s string) bool { return s == name })
		if w.r.IntN(2) == 0 {
			behind = append(behind, pod("a/"+n, ""), pod("b/"+n, ""))
			list = append(list, name)
		}
		w.m.services[n] = list
	}
	for _, ns := range []string{"a", "b"} {
		w.e.SetSlice(slice(ns, name, name+"-1", behind...))
	}
}

// tamper changes entries behind the engine's back.
func (w *walk) tamper() {
	w.tampered = true
	for e := range w.a.Set().All() {
		if w.r.IntN(3) > 0 {
			continue
		}
		if !registration.Owns(e.ID) {
			delete(w.m.manual, e.ID)
			w.a.DeleteEntries(w.t.Context(), e.ID)
			continue
		}
		if w.r.IntN(2) == 0 {
			w.a.DeleteEntries(w.t.Context(), e.ID)
			continue
		}
		c := e.Clone()
		c.Admin, c.SPIFFEID = true, spiffeid.RequireFromPath(td, "/tampered")
		w.a.mu.Lock()
		w.a.change([]*entry.Entry{c}, nil)
		w.a.mu.Unlock()
	}
	id := w.pick("m1", "m2")
	e := &entry.Entry{
		ID: id, SPIFFEID: spiffeid.RequireFromPath(td, "/"+id), ParentID: spiffeid.RequireFromPath(td, "/spire/agent/x"),
		Selectors: attest.MustSelectors("k8s:pod-uid:" + w.pick("uid-a-p", "uid-b-q")),
	}
	w.m.manual[id] = e
	w.a.mu.Lock()
	w.a.change([]*entry.Entry{e}, nil)
	w.a.mu.Unlock()
}

// restart begins anew with what the API server would show.
func (w *walk) restart() {
	w.e.Step()
	defer func() { w.tampered = true }() // what follows in this step comes after a write
	w.e = newEngine(w.t, w.a)
	for _, p := range w.m.pods {
		w.e.SetPod(p)
	}
	for _, c := range w.m.rules {
		w.e.SetSPIFFEID(c)
	}
	for _, n := range w.m.nss {
		w.e.SetNamespace(n)
	}
	for _, n := range w.m.nodes {
		w.e.SetNode(n)
	}
	for _, ns := range []string{"a", "b"} {
		for _, name := range []string{"web", "api"} {
			var behind []*corev1.Pod
			for n, list := range w.m.services {
				if slices.Contains(list, name) {
					behind = append(behind, pod(ns+"/"+n, ""))
				}
			}
			w.e.SetSlice(slice(ns, name, name+"-1", behind...))
		}
	}
	writes := w.a.total()
	start(w.t, w.e)
	if !w.tampered && w.a.total() != writes && len(w.pending()) == 0 {
		w.t.Errorf("a restart wrote entries")
	}
}

func (w *walk) pending() []string {
	return slices.DeleteFunc(showAll(w.a.Set()), func(s string) bool { return slices.Contains(w.m.entries(w.t), s) })
}
