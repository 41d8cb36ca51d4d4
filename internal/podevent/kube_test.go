package podevent_test

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"

	"github.com/spiffe-node/spiffe-node/internal/podevent"
)

// TestKube: an event is about the pod, in its namespace, and named after it.
func TestKube(t *testing.T) {
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	decoder := serializer.NewCodecFactory(scheme).UniversalDeserializer()
	var got corev1.Event
	var path string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		path = r.Method + " " + r.URL.Path
		if _, _, err := decoder.Decode(body, nil, &got); err != nil {
			t.Error(err)
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusCreated)
		_ = json.NewEncoder(w).Encode(map[string]string{"apiVersion": "v1", "kind": "Event"})
	}))
	t.Cleanup(func() { server.CloseClientConnections(); server.Close() })
	file := filepath.Join(t.TempDir(), "kubeconfig")
	text := `{"apiVersion":"v1","kind":"Config","current-context":"t","clusters":[{"name":"t","cluster":{"server":"` + server.URL + `"}}],"contexts":[{"name":"t","context":{"cluster":"t"}}]}`
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	k, err := podevent.NewKube(file, "test", "node-1")
	if err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("x", 253)
	e := podevent.Event{Pod: podevent.Pod{Namespace: "shop", Name: long, UID: "u1"}, Reason: podevent.ReasonLate, Note: "why"}
	if err := k.Write(t.Context(), e, time.Now()); err != nil {
		t.Fatal(err)
	}
	if path != "POST /api/v1/namespaces/shop/events" {
		t.Errorf("asked %s", path)
	}
	o := got.InvolvedObject
	if o.Kind != "Pod" || o.Name != long || o.UID != "u1" || o.Namespace != "shop" || got.Type != corev1.EventTypeWarning || got.Message != "why" || got.Source.Host != "node-1" || got.FirstTimestamp.IsZero() {
		t.Errorf("%+v", got)
	}
	if len(got.Name) > 253 || !strings.HasPrefix(got.Name, "xxx") || got.Name != strings.ToLower(got.Name) {
		t.Errorf("name %q", got.Name)
	}
	e.Reason = podevent.ReasonConflict
	if err := k.Write(t.Context(), e, time.Now()); err != nil || got.Type != corev1.EventTypeNormal {
		t.Errorf("%v, %v", got.Type, err)
	}
}
