package podinfo_test

import (
	"os"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/spiffe-node/spiffe-node/internal/podinfo"
)

// A real API server, one that runs pods nowhere: list, watch, get and their
// encodings are as it makes them.
func TestRealServer(t *testing.T) {
	kubeconfig := os.Getenv("PODINFO_KUBECONFIG")
	if kubeconfig == "" {
		t.Skip("PODINFO_KUBECONFIG names no kubeconfig of a scratch API server")
	}
	cfg, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	api, err := podinfo.NewAPI(kubeconfig, "podinfo-test")
	if err != nil {
		t.Fatal(err)
	}
	s := start(t, podinfo.Config{API: api, NamespaceLabels: true})
	pods := client.CoreV1().Pods("default")
	eventually(t, "the first list", func() bool { return link(s, "pods").Synced && link(s, "namespaces").Synced })
	for _, n := range []string{node, "node-2"} {
		p := makePod("", "podinfo-"+n)
		p.Namespace, p.Spec.NodeName, p.ManagedFields, p.Spec.ServiceAccountName = "default", n, nil, ""
		created, err := pods.Create(t.Context(), p, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer pods.Delete(t.Context(), created.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64)}) //nolint:errcheck // scratch
		if n != node {
			continue
		}
		uid := string(created.UID)
		eventually(t, "the pod", has(s, uid, "k8s:pod-label:app:web"))
		eventually(t, "the namespace", has(s, uid, "k8s:ns-label:kubernetes.io/metadata.name:default"))
		created.Status.ContainerStatuses = append(created.Status.ContainerStatuses, made("main", idA))
		if _, err := pods.UpdateStatus(t.Context(), created, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the container", func() bool { c, ok := s.Container(uid, idA); return ok && c.Name == "main" })
	}
	if n := s.Status().Pods; n != 1 {
		t.Errorf("%d pods are held, want this node's", n)
	}
}
