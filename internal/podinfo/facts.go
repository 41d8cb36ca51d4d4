package podinfo

import (
	"maps"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

// Witnesses, as they appear in attest.Pod.
const (
	witnessWatch   = "watch"
	witnessKubelet = "kubelet"
)

// maxText bounds the text of a pod's selectors, in bytes. It is the author of a
// pod who says how many labels it has.
const maxText = 64 << 10

// facts are what one pod object says. Immutable.
type facts struct {
	key    string // the object's UID
	uid    string // the UID in the pod's cgroup; another one for static pods
	static bool
	ended  bool // Succeeded or Failed
	cut    bool // more text than maxText
	pod    attest.Pod
	// containers are those the runtime has made, by ID.
	containers []attest.Container
}

// newFacts reduces a pod; nil for one that is not on the node or cannot be
// anybody's: it has no UID, or is a mirror pod that is not believed.
func newFacts(p *corev1.Pod, node, witness string) *facts {
	if p == nil || p.UID == "" || p.Spec.NodeName != node {
		return nil
	}
	f := &facts{
		key:   string(p.UID),
		uid:   string(p.UID),
		ended: p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed,
	}
	if hash, mirror := p.Annotations[corev1.MirrorPodAnnotationKey]; mirror {
		if !believable(p, hash, node) {
			return nil
		}
		f.uid, f.static = hash, true
	}
	f.pod = attest.Pod{
		UID:            f.uid,
		Namespace:      p.Namespace,
		Name:           p.Name,
		ServiceAccount: p.Spec.ServiceAccountName,
		NodeName:       node,
		Witness:        witness,
	}
	b := &builder{left: maxText}
	b.add("pod-image-count:", strconv.Itoa(len(p.Spec.Containers)))
	b.add("pod-init-image-count:", strconv.Itoa(len(p.Spec.InitContainers)))
	for _, o := range p.OwnerReferences {
		b.add("pod-owner:", o.Kind, ":", o.Name)
		b.add("pod-owner-uid:", o.Kind, ":", string(o.UID))
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
		b.add("pod-label:", k, ":", p.Labels[k])
	}
	f.pod.Selectors, f.cut = b.done(), b.cut
	slices.SortFunc(f.containers, byID)
	return f
}

// container notes a container the runtime has made.
func (f *facts) container(b *builder, s corev1.ContainerStatus) {
	id := containerID(s.ContainerID)
	if id == "" {
		return
	}
	c := &builder{left: b.left}
	c.images("container-image:", s)
	f.containers = append(f.containers, attest.Container{ID: id, Name: s.Name, Selectors: c.done()})
	b.left, b.cut = c.left, b.cut || c.cut
}

func byID(x, y attest.Container) int { return strings.Compare(x.ID, y.ID) }

// find is the container with this ID.
func (f *facts) find(id string) (attest.Container, bool) {
	if f == nil {
		return attest.Container{}, false
	}
	i, ok := slices.BinarySearchFunc(f.containers, id, func(c attest.Container, id string) int { return strings.Compare(c.ID, id) })
	if !ok {
		return attest.Container{}, false
	}
	return f.containers[i], true
}

func (f *facts) equal(o *facts) bool {
	return f.key == o.key && f.uid == o.uid && f.ended == o.ended &&
		f.pod.Namespace == o.pod.Namespace && f.pod.Name == o.pod.Name && f.pod.ServiceAccount == o.pod.ServiceAccount &&
		f.pod.Witness == o.pod.Witness && slices.Equal(f.pod.Selectors, o.pod.Selectors) &&
		slices.EqualFunc(f.containers, o.containers, func(x, y attest.Container) bool {
			return x.ID == y.ID && x.Name == y.Name && slices.Equal(x.Selectors, y.Selectors)
		})
}

// containerID cuts the runtime's name off, as in containerd://ID.
func containerID(s string) string {
	if _, id, ok := strings.Cut(s, "://"); ok {
		return id
	}
	return ""
}

// builder makes k8s selectors of a bounded size.
type builder struct {
	out  []attest.Selector
	left int
	cut  bool
}

func (b *builder) add(parts ...string) {
	text := strings.Join(parts, "") // a new string: it must not keep the object alive
	if len(text) > b.left {
		b.cut = true
		return
	}
	if s, err := attest.NewSelector("k8s", text); err == nil {
		b.left -= len(text)
		b.out = append(b.out, s)
	}
}

// images gives both names of a container's image once there is a container:
// until then the name is the spec's and the ID empty.
func (b *builder) images(kind string, s corev1.ContainerStatus) {
	if containerID(s.ContainerID) == "" {
		return
	}
	b.image(kind, s.Image, s.ImageID)
}

func (b *builder) image(kind, name, id string) {
	if name != "" {
		b.add(kind, name)
	}
	if id != "" && id != name {
		b.add(kind, id)
	}
}

// done removes repetitions, such as those of two containers of one image.
func (b *builder) done() []attest.Selector {
	slices.SortFunc(b.out, attest.Selector.Compare)
	return slices.Clip(slices.Compact(b.out))
}

// believable says whether a mirror pod speaks for the static pod whose cgroup
// carries the hash. See the package comment.
func believable(p *corev1.Pod, hash, node string) bool {
	if hash == "" || p.Annotations[configHashAnnotation] != hash || p.Spec.ServiceAccountName != "" || len(p.OwnerReferences) != 1 {
		return false
	}
	o := p.OwnerReferences[0]
	if o.APIVersion != "v1" || o.Kind != "Node" || o.Name != node || o.Controller == nil || !*o.Controller {
		return false
	}
	for _, list := range [...][]corev1.ContainerStatus{p.Status.ContainerStatuses, p.Status.InitContainerStatuses} {
		for _, s := range list {
			if containerID(s.ContainerID) != "" {
				return true
			}
		}
	}
	return false
}

const configHashAnnotation = "kubernetes.io/config.hash"

// strip is the pod with nothing but what newFacts reads: what a list holds
// until it is complete.
func strip(p *corev1.Pod) *corev1.Pod {
	out := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: p.Namespace, Name: p.Name, UID: p.UID, ResourceVersion: p.ResourceVersion,
			Labels: p.Labels, OwnerReferences: p.OwnerReferences,
		},
		Spec: corev1.PodSpec{
			NodeName:           p.Spec.NodeName,
			ServiceAccountName: p.Spec.ServiceAccountName,
			Containers:         make([]corev1.Container, len(p.Spec.Containers)),
			InitContainers:     make([]corev1.Container, len(p.Spec.InitContainers)),
		},
		Status: corev1.PodStatus{
			Phase:                      p.Status.Phase,
			ContainerStatuses:          stripStatuses(p.Status.ContainerStatuses),
			InitContainerStatuses:      stripStatuses(p.Status.InitContainerStatuses),
			EphemeralContainerStatuses: stripStatuses(p.Status.EphemeralContainerStatuses),
		},
	}
	for _, k := range [...]string{corev1.MirrorPodAnnotationKey, configHashAnnotation} {
		if v, ok := p.Annotations[k]; ok {
			if out.Annotations == nil {
				out.Annotations = map[string]string{}
			}
			out.Annotations[k] = v
		}
	}
	return out
}

func stripStatuses(in []corev1.ContainerStatus) []corev1.ContainerStatus {
	var out []corev1.ContainerStatus
	for _, s := range in {
		out = append(out, corev1.ContainerStatus{Name: s.Name, Image: s.Image, ImageID: s.ImageID, ContainerID: s.ContainerID})
	}
	return out
}

// has says whether a status shows the container.
func (f *facts) has(id string) bool {
	_, ok := f.find(id)
	return ok
}
