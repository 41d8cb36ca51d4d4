package registration_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	"k8s.io/client-go/rest"
)

// object is any Kubernetes object.
type object = map[string]any

// fakeServer is as much of an API server as clients of these resources see:
// create, replace, delete, list, watch and a merge patch of the status.
type fakeServer struct {
	mu       sync.Mutex
	version  int
	objects  map[string]map[string]object // resource -> namespace/name -> object
	history  []watchEvent
	changed  chan struct{} // closed at each change
	patches  int
	missing  map[string]bool // resources that are not served
	shutdown chan struct{}
}

type watchEvent struct {
	version  int
	resource string
	kind     string
	object   object
}

func newFakeServer(tb testing.TB) (*fakeServer, *rest.Config) {
	tb.Helper()
	f := &fakeServer{objects: make(map[string]map[string]object), changed: make(chan struct{}), missing: make(map[string]bool), shutdown: make(chan struct{})}
	s := httptest.NewServer(f)
	tb.Cleanup(func() {
		close(f.shutdown)
		s.CloseClientConnections()
		s.Close()
	})
	return f, &rest.Config{Host: s.URL}
}

// path takes a request's path apart.
func (f *fakeServer) path(r *http.Request) (prefix, resource, namespace, name, sub string) {
	parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	n := 2 // api/v1
	if parts[0] == "apis" {
		n = 3
	}
	prefix, parts = strings.Join(parts[:n], "/"), parts[n:]
	if parts[0] == "namespaces" && len(parts) > 2 {
		namespace, parts = parts[1], parts[2:]
	}
	parts = append(parts, "", "")
	return prefix, parts[0], namespace, parts[1], parts[2]
}

func status(w http.ResponseWriter, code int, reason string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(object{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": reason, "code": code})
}

func reply(w http.ResponseWriter, o object) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(o)
}

// ServeHTTP implements http.Handler.
func (f *fakeServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	prefix, resource, namespace, name, sub := f.path(r)
	f.mu.Lock()
	gone := f.missing[resource]
	f.mu.Unlock()
	switch {
	case gone:
		status(w, http.StatusNotFound, "NotFound")
	case r.URL.Query().Get("sendInitialEvents") == "true":
		status(w, http.StatusUnprocessableEntity, "Invalid") // as a server without streaming lists
	case r.Method == http.MethodGet && r.URL.Query().Get("watch") != "":
		f.watch(w, r, resource)
	case r.Method == http.MethodGet && name == "":
		f.list(w, prefix, resource)
	default:
		f.change(w, r, resource, namespace, name, sub)
	}
}

func (f *fakeServer) list(w http.ResponseWriter, prefix, resource string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	items := []object{}
	for _, key := range slices.Sorted(maps.Keys(f.objects[resource])) {
		items = append(items, f.objects[resource][key])
	}
	kinds := map[string]string{
		"namespaces": "NamespaceList", "nodes": "NodeList", "pods": "PodList", "endpointslices": "EndpointSliceList",
		"clusterspiffeids": "ClusterSPIFFEIDList", "clusterstaticentries": "ClusterStaticEntryList", "clusterfederatedtrustdomains": "ClusterFederatedTrustDomainList",
	}
	_, version, _ := strings.Cut(prefix, "/")
	reply(w, object{"kind": kinds[resource], "apiVersion": version, "metadata": object{"resourceVersion": fmt.Sprint(f.version)}, "items": items})
}

func (f *fakeServer) watch(w http.ResponseWriter, r *http.Request, resource string) {
	w.Header().Set("Content-Type", "application/json")
	var after int
	_, _ = fmt.Sscan(r.URL.Query().Get("resourceVersion"), &after)
	out := json.NewEncoder(w)
	for {
		f.mu.Lock()
		var events []watchEvent
		for _, ev := range f.history {
			if ev.version > after && ev.resource == resource {
				events = append(events, ev)
			}
		}
		after = f.version
		changed := f.changed
		f.mu.Unlock()
		for _, ev := range events {
			if out.Encode(object{"type": ev.kind, "object": ev.object}) != nil {
				return
			}
		}
		w.(http.Flusher).Flush()
		select {
		case <-changed:
		case <-r.Context().Done():
			return
		case <-f.shutdown:
			return
		}
	}
}

func (f *fakeServer) change(w http.ResponseWriter, r *http.Request, resource, namespace, name, sub string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var in object
	if r.Method != http.MethodGet && r.Method != http.MethodDelete {
		if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
			status(w, http.StatusBadRequest, "BadRequest")
			return
		}
	}
	if name == "" {
		name = in["metadata"].(object)["name"].(string)
	}
	key := name
	if namespace != "" {
		key = namespace + "/" + name
	}
	old := f.objects[resource][key]
	if old == nil && r.Method != http.MethodPost {
		status(w, http.StatusNotFound, "NotFound")
		return
	}
	switch r.Method {
	case http.MethodGet:
		reply(w, old)
	case http.MethodDelete:
		delete(f.objects[resource], key)
		f.event(resource, "DELETED", copyOf(old))
		reply(w, old)
	case http.MethodPatch:
		f.patch(w, resource, key, sub, old, in)
	default:
		f.put(w, resource, key, namespace, sub, old, in)
	}
}

// patch merges a status; a UID in it is a precondition.
func (f *fakeServer) patch(w http.ResponseWriter, resource, key, sub string, old, in object) {
	if m, ok := in["metadata"].(object); ok && m["uid"] != nil && m["uid"] != old["metadata"].(object)["uid"] {
		status(w, http.StatusConflict, "Conflict")
		return
	}
	o := copyOf(old)
	o[sub] = in[sub]
	f.patches++
	f.objects[resource][key] = o
	f.event(resource, "MODIFIED", o)
	reply(w, o)
}

func (f *fakeServer) put(w http.ResponseWriter, resource, key, namespace, sub string, old, in object) {
	if f.objects[resource] == nil {
		f.objects[resource] = make(map[string]object)
	}
	m := in["metadata"].(object)
	kind, generation := "ADDED", 1.0
	if namespace != "" {
		m["namespace"] = namespace
	}
	if old != nil {
		was := old["metadata"].(object)
		m["uid"], m["creationTimestamp"] = was["uid"], was["creationTimestamp"]
		kind, generation = "MODIFIED", was["generation"].(float64)
		if fmt.Sprint(old["spec"]) != fmt.Sprint(in["spec"]) {
			generation++
		}
		if sub == "" && strings.HasPrefix(resource, "cluster") {
			in["status"] = old["status"]
		}
	} else {
		m["uid"] = fmt.Sprintf("00000000-0000-0000-0000-%012d", f.version)
		m["creationTimestamp"] = "2026-01-01T00:00:00Z"
	}
	m["generation"] = generation
	f.objects[resource][key] = in
	f.event(resource, kind, in)
	reply(w, in)
}

func (f *fakeServer) event(resource, kind string, o object) {
	f.version++
	o["metadata"].(object)["resourceVersion"] = fmt.Sprint(f.version)
	f.history = append(f.history, watchEvent{f.version, resource, kind, copyOf(o)})
	close(f.changed)
	f.changed = make(chan struct{})
}

func copyOf(o object) object {
	text, err := json.Marshal(o)
	if err != nil {
		panic(err)
	}
	var out object
	if err := json.Unmarshal(text, &out); err != nil {
		panic(err)
	}
	return out
}
