// Package podfacts reads a pod's object into k8s selectors, in SPIRE's
// spelling.
//
// It promises the same selectors on a node, where the agent attests callers,
// and on an administrator's machine, where they are only looked at. Threat: the
// author of a pod says how many labels, owners and images it has; what is kept
// of them is bounded.
package podfacts

import (
	"maps"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/spiffe-node/spiffe-node/pkg/selector"
)

// MaxText bounds the text of a pod's selectors, in bytes.
const MaxText = 64 << 10

// Facts are what a pod's object gives beyond its names.
type Facts struct {
	// Pod are the selectors every caller in the pod has: labels, owners, images.
	Pod []selector.Selector
	// Containers are those the runtime has made, sorted by ID.
	Containers []Container
	// Cut says that there was more than MaxText.
	Cut bool
}

// Container is one container of a pod.
type Container struct {
	ID, Name string
	// Selectors are those of its image.
	Selectors []selector.Selector
}

// Of reads a pod's object.
func Of(p *corev1.Pod) Facts {
	var f Facts
	b := NewBuilder(MaxText)
	b.Add("pod-image-count:", strconv.Itoa(len(p.Spec.Containers)))
	b.Add("pod-init-image-count:", strconv.Itoa(len(p.Spec.InitContainers)))
	for _, o := range p.OwnerReferences {
		b.Add("pod-owner:", o.Kind, ":", o.Name)
		b.Add("pod-owner-uid:", o.Kind, ":", string(o.UID))
	}
	for _, s := range p.Status.ContainerStatuses {
		b.images("pod-image:", s)
		f.container(b, s)
	}
	for _, s := range p.Status.InitContainerStatuses {
		b.images("pod-init-image:", s)
		f.container(b, s)
	}
	for _, s := range p.Status.EphemeralContainerStatuses {
		f.container(b, s)
	}
	for _, k := range slices.Sorted(maps.Keys(p.Labels)) {
		b.Add("pod-label:", k, ":", p.Labels[k])
	}
	f.Pod, f.Cut = b.Done(), b.Cut
	slices.SortFunc(f.Containers, func(x, y Container) int { return strings.Compare(x.ID, y.ID) })
	return f
}

// container notes a container the runtime has made.
func (f *Facts) container(b *Builder, s corev1.ContainerStatus) {
	id := ContainerID(s.ContainerID)
	if id == "" {
		return
	}
	c := NewBuilder(b.left)
	c.images("container-image:", s)
	f.Containers = append(f.Containers, Container{ID: id, Name: s.Name, Selectors: c.Done()})
	b.left, b.Cut = c.left, b.Cut || c.Cut
}

// Caller are all k8s selectors of a caller in the container.
func (f Facts) Caller(p *corev1.Pod, c *Container) selector.Set {
	all := append(selector.OfPod(string(p.UID), p.Namespace, p.Spec.ServiceAccountName, p.Name, p.Spec.NodeName), f.Pod...)
	if c != nil {
		b := NewBuilder(MaxText)
		if c.Name != "" {
			b.Add("container-name:", c.Name)
		}
		all = append(append(all, b.Done()...), c.Selectors...)
	}
	return selector.NewSet(all...)
}

// ContainerID cuts the runtime's name off, as in containerd://ID; "" = there is
// no container yet.
func ContainerID(s string) string {
	if _, id, ok := strings.Cut(s, "://"); ok {
		return id
	}
	return ""
}

// Builder makes k8s selectors of a bounded size.
type Builder struct {
	out  []selector.Selector
	left int
	// Cut says that something did not fit.
	Cut bool
}

// NewBuilder is a builder for so many bytes.
func NewBuilder(limit int) *Builder { return &Builder{left: limit} }

// Add adds the selector whose value the parts make.
func (b *Builder) Add(parts ...string) {
	text := strings.Join(parts, "") // a new string: it must not keep the object alive
	if len(text) > b.left {
		b.Cut = true
		return
	}
	if s, err := selector.New("k8s", text); err == nil {
		b.left -= len(text)
		b.out = append(b.out, s)
	}
}

// images gives both names of a container's image once there is a container:
// until then the name is the spec's and the ID empty.
func (b *Builder) images(kind string, s corev1.ContainerStatus) {
	if ContainerID(s.ContainerID) == "" {
		return
	}
	b.Image(kind, s.Image, s.ImageID)
}

// Image adds both names of an image.
func (b *Builder) Image(kind, name, id string) {
	if name != "" {
		b.Add(kind, name)
	}
	if id != "" && id != name {
		b.Add(kind, id)
	}
}

// Done is what was added, without repetitions such as those of two containers
// of one image.
func (b *Builder) Done() []selector.Selector {
	slices.SortFunc(b.out, selector.Selector.Compare)
	return slices.Clip(slices.Compact(b.out))
}
