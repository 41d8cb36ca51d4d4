package startuptaint_test

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/spiffe-node/spiffe-node/internal/startuptaint"
)

// TestKube checks what is asked of the API server, and that answers are read.
func TestKube(t *testing.T) {
	var mu sync.Mutex
	asked := map[string]string{}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		mu.Lock()
		asked[r.Method+" "+r.URL.RequestURI()] = r.Header.Get("Content-Type") + " " + string(body)
		mu.Unlock()
		w.Header().Set("Content-Type", "application/json")
		write := func(o any) { _ = json.NewEncoder(w).Encode(o) }
		switch r.URL.Path {
		case "/api/v1/nodes/n1":
			write(&corev1.Node{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Node"}, ObjectMeta: metav1.ObjectMeta{Name: "n1", UID: "u1"}})
		case "/apis/storage.k8s.io/v1/csinodes/n1":
			write(&storagev1.CSINode{
				TypeMeta: metav1.TypeMeta{APIVersion: "storage.k8s.io/v1", Kind: "CSINode"},
				Spec:     storagev1.CSINodeSpec{Drivers: []storagev1.CSINodeDriver{{Name: "csi.spiffe.io", NodeID: "n1"}}},
			})
		case "/api/v1/namespaces/spire-server/pods":
			write(&corev1.PodList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "PodList"}, Items: []corev1.Pod{agent(corev1.ConditionTrue)}})
		case "/api/v1/nodes":
			if r.URL.Query().Get("sendInitialEvents") != "" { // as servers before 1.32
				w.WriteHeader(http.StatusUnprocessableEntity)
				write(&metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: "Failure", Reason: metav1.StatusReasonInvalid, Code: 422})
				return
			}
			if r.URL.Query().Get("watch") != "" {
				w.(http.Flusher).Flush()
				<-r.Context().Done()
				return
			}
			write(&corev1.NodeList{
				TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "NodeList"}, ListMeta: metav1.ListMeta{ResourceVersion: "1"},
				Items: []corev1.Node{{
					ObjectMeta: metav1.ObjectMeta{Name: "n1", UID: "u1", ResourceVersion: "1", Labels: map[string]string{"a": "b"}},
					Spec:       corev1.NodeSpec{Taints: []corev1.Taint{noSchedule}},
				}},
			})
		default:
			w.WriteHeader(http.StatusNotFound)
			write(&metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: "Failure", Reason: metav1.StatusReasonNotFound, Code: 404})
		}
	}))
	t.Cleanup(server.Close)
	k, err := startuptaint.NewKube(&rest.Config{Host: server.URL})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)

	if n, err := k.Node(ctx, "n1"); err != nil || n.UID != "u1" {
		t.Errorf("node: %v, %v", n, err)
	}
	for node, want := range map[string]bool{"n1": true, "new": false} {
		if ok, err := k.Registered(ctx, node, "csi.spiffe.io"); err != nil || ok != want {
			t.Errorf("driver on %s: %t, %v", node, ok, err)
		}
	}
	if ok, err := k.Registered(ctx, "n1", "other"); err != nil || ok {
		t.Errorf("another driver: %t, %v", ok, err)
	}
	if pods, err := k.AgentPods(ctx, "n1", "spire-server", "spire-agent"); err != nil || len(pods) != 1 {
		t.Errorf("pods: %v, %v", pods, err)
	}
	if err := k.PatchNode(ctx, "n1", []byte(`{"spec":{}}`)); err != nil {
		t.Error(err)
	}
	seen := make(chan *corev1.Node, 10)
	done := make(chan struct{})
	go func() {
		defer close(done)
		k.Watch(ctx, func(n *corev1.Node) { seen <- n }, func(string) {})
	}()
	if n := <-seen; n.Name != "n1" || len(n.Spec.Taints) != 1 || n.Labels != nil {
		t.Errorf("of a watched node is kept %+v", n)
	}
	cancel()
	<-done

	mu.Lock()
	defer mu.Unlock()
	if got := asked["PATCH /api/v1/nodes/n1"]; got != `application/merge-patch+json {"spec":{}}` {
		t.Errorf("patched with %q", got)
	}
	if _, ok := asked["GET /api/v1/namespaces/spire-server/pods?fieldSelector=spec.nodeName%3Dn1%2Cspec.serviceAccountName%3Dspire-agent"]; !ok {
		t.Errorf("asked for other pods: %v", asked)
	}
}
