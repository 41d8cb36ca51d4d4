package podinfo_test

import (
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

const (
	node = "node-1"
	uidA = "11111111-1111-4111-8111-111111111111"
	uidB = "22222222-2222-4222-8222-222222222222"
	hash = "0123456789abcdef0123456789abcdef"
)

var (
	idA = strings.Repeat("a1", 32)
	idB = strings.Repeat("b2", 32)
	idC = strings.Repeat("c3", 32)
)

type podOption func(*corev1.Pod)

// makePod is a pod that has been scheduled and nothing more.
func makePod(uid, name string, opts ...podOption) *corev1.Pod {
	p := &corev1.Pod{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "shop", Name: name, UID: types.UID(uid),
			Labels: map[string]string{"app": "web", "tier": ""},
			OwnerReferences: []metav1.OwnerReference{
				{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "web-5d", UID: "rs-uid", Controller: new(true)},
			},
			ManagedFields: []metav1.ManagedFieldsEntry{{Manager: "kubelet", FieldsV1: metav1.NewFieldsV1("{}")}},
		},
		Spec: corev1.PodSpec{
			NodeName: node, ServiceAccountName: "web",
			Containers: []corev1.Container{{Name: "main", Image: "registry.example/web:1"}},
		},
		Status: corev1.PodStatus{Phase: corev1.PodPending},
	}
	for _, o := range opts {
		o(p)
	}
	return p
}

func phase(ph corev1.PodPhase) podOption { return func(p *corev1.Pod) { p.Status.Phase = ph } }

func label(k, v string) podOption { return func(p *corev1.Pod) { p.Labels[k] = v } }

func hostNetwork(p *corev1.Pod) { p.Spec.HostNetwork = true }

func hostPID(p *corev1.Pod) { p.Spec.HostPID = true }

func ownedBy(kind, name, uid string) podOption {
	return func(p *corev1.Pod) {
		p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "batch/v1", Kind: kind, Name: name, UID: types.UID(uid)}}
	}
}

// made is a container the runtime has made.
func made(name, id string) corev1.ContainerStatus {
	return corev1.ContainerStatus{
		Name: name, Image: "registry.example/" + name + ":1", ImageID: "registry.example/" + name + "@sha256:" + name, ContainerID: "containerd://" + id,
		State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}},
	}
}

// waiting is a container the kubelet has not made yet.
func waiting(name string) corev1.ContainerStatus {
	return corev1.ContainerStatus{Name: name, Image: "registry.example/" + name + ":1", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "PodInitializing"}}}
}

func running(list ...corev1.ContainerStatus) podOption {
	return func(p *corev1.Pod) { p.Status.Phase, p.Status.ContainerStatuses = corev1.PodRunning, list }
}

func initContainers(list ...corev1.ContainerStatus) podOption {
	return func(p *corev1.Pod) {
		p.Status.InitContainerStatuses = list
		p.Spec.InitContainers = nil
		for _, s := range list {
			p.Spec.InitContainers = append(p.Spec.InitContainers, corev1.Container{Name: s.Name, Image: s.Image})
		}
	}
}

func ephemeral(list ...corev1.ContainerStatus) podOption {
	return func(p *corev1.Pod) {
		p.Status.EphemeralContainerStatuses = list
		for _, s := range list {
			p.Spec.EphemeralContainers = append(p.Spec.EphemeralContainers, corev1.EphemeralContainer{
				EphemeralContainerCommon: corev1.EphemeralContainerCommon{Name: s.Name, Image: s.Image},
			})
		}
	}
}

// mirror is what the kubelet makes of a static pod.
func mirror(h string) podOption {
	return func(p *corev1.Pod) {
		p.Annotations = map[string]string{
			"kubernetes.io/config.mirror": h, "kubernetes.io/config.hash": h,
			"kubernetes.io/config.source": "file", "kubernetes.io/config.seen": "2026-01-02T03:04:05Z",
		}
		p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: node, UID: "node-uid", Controller: new(true)}}
		p.Spec.ServiceAccountName = ""
	}
}

func texts(list []attest.Selector) []string { return attest.NewSelectors(list...).Strings() }
