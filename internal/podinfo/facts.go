package podinfo

import (
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/spiffe-node/spiffe-node/internal/podfacts"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

// Witnesses, as they appear in attest.Pod.
const (
	witnessWatch   = "watch"
	witnessKubelet = "kubelet"
)

// facts are what one pod object says. Immutable.
type facts struct {
	key    string // the object's UID
	uid    string // the UID in the pod's cgroup; another one for static pods
	static bool
	ended  bool // Succeeded or Failed
	cut    bool // more text than podfacts.MaxText
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
	read := podfacts.Of(p)
	f.pod.Selectors, f.cut = read.Pod, read.Cut
	for _, c := range read.Containers {
		f.containers = append(f.containers, attest.Container{ID: c.ID, Name: c.Name, Selectors: c.Selectors})
	}
	return f
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
			if podfacts.ContainerID(s.ContainerID) != "" {
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
