package podfacts_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/spiffe-node/spiffe-node/internal/podfacts"
)

func TestCaller(t *testing.T) {
	t.Parallel()
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "shop", Name: "web-0", UID: "u1", Labels: map[string]string{"app": "web"},
			OwnerReferences: []metav1.OwnerReference{{Kind: "ReplicaSet", Name: "web", UID: "o1"}},
		},
		Spec: corev1.PodSpec{ServiceAccountName: "web", NodeName: "n1", Containers: make([]corev1.Container, 2)},
		Status: corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{
			{Name: "main", ContainerID: "containerd://c1", Image: "shop/web:1", ImageID: "shop/web@sha256:1"},
			{Name: "waiting", Image: "shop/side:1"},
		}},
	}
	f := podfacts.Of(pod)
	ofPod := []string{
		"k8s:node-name:n1", "k8s:ns:shop", "k8s:pod-image-count:2", "k8s:pod-image:shop/web:1", "k8s:pod-image:shop/web@sha256:1",
		"k8s:pod-init-image-count:0", "k8s:pod-label:app:web", "k8s:pod-name:web-0", "k8s:pod-owner-uid:ReplicaSet:o1", "k8s:pod-owner:ReplicaSet:web",
		"k8s:pod-uid:u1", "k8s:sa:web",
	}
	if d := cmp.Diff(ofPod, f.Caller(pod, nil).Strings()); d != "" {
		t.Error(d)
	}
	if len(f.Containers) != 1 || f.Containers[0].ID != "c1" || f.Cut {
		t.Fatalf("containers %v", f.Containers)
	}
	main := f.Caller(pod, &f.Containers[0])
	for _, s := range append(ofPod, "k8s:container-name:main", "k8s:container-image:shop/web:1", "k8s:container-image:shop/web@sha256:1") {
		if !strings.Contains(main.Key(), s) {
			t.Errorf("%s is missing", s)
		}
	}
	if main.Len() != len(ofPod)+3 {
		t.Errorf("got %v", main.Strings())
	}
}

func TestBounded(t *testing.T) {
	t.Parallel()
	f := podfacts.Of(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"a": strings.Repeat("x", podfacts.MaxText)}}})
	if !f.Cut || len(f.Pod) != 2 {
		t.Errorf("cut %v, %d selectors", f.Cut, len(f.Pod))
	}
}
