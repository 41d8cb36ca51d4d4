package podinfo

import (
	"context"
	"maps"
	"slices"
	"sync"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/spiffe-node/spiffe-node/internal/podfacts"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

// namespaces holds the labels of the cluster's namespaces, as selectors. It is
// the one thing here that grows with the cluster, hence an option.
type namespaces struct {
	link    *link
	changed func(names map[string]bool)

	mu   sync.RWMutex
	sets map[string][]attest.Selector // by namespace
}

var _ cache.TransformingStore = (*namespaces)(nil)

func newNamespaces(l *link, changed func(map[string]bool)) *namespaces {
	return &namespaces{link: l, changed: changed, sets: map[string][]attest.Selector{}}
}

func (n *namespaces) run(ctx context.Context, api API) {
	reflect(ctx, api.Namespaces(), n.link, n.link.metrics, &corev1.Namespace{}, n)
}

// selectors are those of the namespace's labels.
func (n *namespaces) selectors(name string) []attest.Selector {
	n.mu.RLock()
	defer n.mu.RUnlock()
	return n.sets[name]
}

// Transformer keeps name and labels.
func (*namespaces) Transformer() cache.TransformFunc {
	return func(obj any) (any, error) {
		if ns, ok := obj.(*corev1.Namespace); ok && ns != nil {
			return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns.Name, UID: ns.UID, ResourceVersion: ns.ResourceVersion, Labels: ns.Labels}}, nil
		}
		return obj, nil
	}
}

// Add takes over a namespace's labels.
func (n *namespaces) Add(obj any) error {
	if ns, ok := obj.(*corev1.Namespace); ok && ns != nil {
		n.set(ns.Name, labels(ns))
	}
	return nil
}

// Update takes over a namespace's labels.
func (n *namespaces) Update(obj any) error { return n.Add(obj) }

// Delete forgets a namespace.
func (n *namespaces) Delete(obj any) error {
	if gone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
		obj = gone.Obj
	}
	if ns, ok := obj.(*corev1.Namespace); ok && ns != nil {
		n.set(ns.Name, nil)
	}
	return nil
}

// Replace takes over a complete list.
func (n *namespaces) Replace(list []any, _ string) error {
	sets := make(map[string][]attest.Selector, len(list))
	for _, obj := range list {
		if ns, ok := obj.(*corev1.Namespace); ok && ns != nil {
			if set := labels(ns); len(set) > 0 {
				sets[ns.Name] = set
			}
		}
	}
	n.mu.Lock()
	old := n.sets
	n.sets = sets
	n.mu.Unlock()
	other := map[string]bool{}
	for name, set := range sets {
		if !slices.Equal(old[name], set) {
			other[name] = true
		}
	}
	for name := range old {
		if _, ok := sets[name]; !ok {
			other[name] = true
		}
	}
	n.changed(other)
	n.link.synced()
	return nil
}

// Resync has nothing to do.
func (*namespaces) Resync() error { return nil }

func (n *namespaces) set(name string, set []attest.Selector) {
	n.mu.Lock()
	same := slices.Equal(n.sets[name], set)
	switch {
	case len(set) == 0:
		delete(n.sets, name)
	case !same:
		n.sets[name] = set
	}
	n.mu.Unlock()
	if !same {
		n.changed(map[string]bool{name: true})
	}
}

func labels(ns *corev1.Namespace) []attest.Selector {
	b := podfacts.NewBuilder(podfacts.MaxText)
	for _, k := range slices.Sorted(maps.Keys(ns.Labels)) {
		b.Add("ns-label:", k, ":", ns.Labels[k])
	}
	return b.Done()
}
