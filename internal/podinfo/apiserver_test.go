package podinfo_test

import (
	"bytes"
	"encoding/json"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"

	"github.com/spiffe-node/spiffe-node/internal/podinfo"
)

// apiServer speaks enough of Kubernetes' API for pods and namespaces: list,
// get, watch from a version with bookmarks, lists as watches, 410 for versions
// that are too old; in protobuf as in JSON. Like the real one it has one
// version for everything.
type apiServer struct {
	t      *testing.T
	codecs serializer.CodecFactory
	server *httptest.Server

	mu       sync.Mutex
	cond     *sync.Cond
	version  int
	oldest   int // versions before this one are gone
	pods     map[string]*corev1.Pod
	spaces   map[string]*corev1.Namespace
	log      []event
	requests map[string]int // by kind of request
	status   int            // answer everything with this; 0: normally
	deaf     bool           // watches are opened and hear nothing
	noStream bool           // refuse lists as watches, as servers before 1.32
	epoch    int            // watches of earlier epochs end
	closing  bool           // no new watches
}

type event struct {
	version int
	kind    string
	object  runtime.Object
}

func newAPIServer(t *testing.T) *apiServer {
	t.Helper()
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	s := &apiServer{
		t: t, codecs: serializer.NewCodecFactory(scheme), version: 1,
		pods: map[string]*corev1.Pod{}, spaces: map[string]*corev1.Namespace{}, requests: map[string]int{},
	}
	s.cond = sync.NewCond(&s.mu)
	s.server = httptest.NewServer(s)
	t.Cleanup(func() {
		s.change(func() { s.closing = true })
		s.server.Close()
	})
	return s
}

func (s *apiServer) api() podinfo.API {
	s.t.Helper()
	api, err := podinfo.NewRESTAPI(&rest.Config{Host: s.server.URL})
	if err != nil {
		s.t.Fatal(err)
	}
	return api
}

// away closes the server; the returned function has a new one at its address.
func (s *apiServer) away() (back func()) {
	s.t.Helper()
	addr := s.server.Listener.Addr().String()
	s.change(func() { s.closing = true })
	s.server.CloseClientConnections()
	s.server.Close()
	return func() {
		s.t.Helper()
		s.change(func() { s.closing = false })
		l, err := (&net.ListenConfig{}).Listen(s.t.Context(), "tcp", addr)
		if err != nil {
			s.t.Fatal(err)
		}
		s.server = &httptest.Server{Listener: l, Config: &http.Server{Handler: s}}
		s.server.Start()
	}
}

func (s *apiServer) breakWatches() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.epoch++
	s.cond.Broadcast()
}

func (s *apiServer) count(kind string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.requests[kind]
}

// change runs f with everything locked.
func (s *apiServer) change(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
	s.cond.Broadcast()
}

func (s *apiServer) put(p *corev1.Pod) {
	s.change(func() {
		s.version++
		p = p.DeepCopy()
		p.ResourceVersion = strconv.Itoa(s.version)
		kind := "ADDED"
		if s.pods[p.Namespace+"/"+p.Name] != nil {
			kind = "MODIFIED"
		}
		s.pods[p.Namespace+"/"+p.Name] = p
		s.log = append(s.log, event{s.version, kind, p})
	})
}

func (s *apiServer) remove(namespace, name string) {
	s.change(func() {
		s.version++
		p := s.pods[namespace+"/"+name].DeepCopy()
		p.ResourceVersion = strconv.Itoa(s.version)
		delete(s.pods, namespace+"/"+name)
		s.log = append(s.log, event{s.version, "DELETED", p})
	})
}

func (s *apiServer) putNamespace(name string, labels map[string]string) {
	s.change(func() {
		s.version++
		ns := &corev1.Namespace{
			TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"},
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels, ResourceVersion: strconv.Itoa(s.version)},
		}
		kind := "ADDED"
		if s.spaces[name] != nil {
			kind = "MODIFIED"
		}
		s.spaces[name] = ns
		s.log = append(s.log, event{s.version, kind, ns})
	})
}

// forget makes every version so far too old.
func (s *apiServer) forget() {
	s.change(func() {
		s.version += 10
		s.oldest, s.log = s.version, nil
	})
}

// ServeHTTP answers one request.
func (s *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	status, noStream := s.status, s.noStream
	s.mu.Unlock()
	q := r.URL.Query()
	parts := strings.Split(strings.TrimPrefix(r.URL.Path, "/api/v1/"), "/")
	kind := parts[0]
	watch := q.Get("watch") == "true"
	switch {
	case kind == "namespaces" && len(parts) > 1:
		kind = "get"
	case watch:
		kind += " watch"
	}
	s.mu.Lock()
	s.requests[kind]++
	s.mu.Unlock()
	if parts[0] == "pods" && q.Get("fieldSelector") != "spec.nodeName="+node {
		s.t.Errorf("pods of the whole cluster are asked for: %s", r.URL)
	}
	switch {
	case status != 0:
		s.fail(w, r, status, metav1.StatusReasonUnknown, "refused")
	case kind == "get":
		s.mu.Lock()
		p := s.pods[parts[1]+"/"+parts[3]]
		s.mu.Unlock()
		if p == nil {
			s.fail(w, r, http.StatusNotFound, metav1.StatusReasonNotFound, "not found")
			return
		}
		s.write(w, r, p)
	case watch && q.Get("sendInitialEvents") != "" && noStream:
		s.fail(w, r, http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, "sendInitialEvents is forbidden")
	case watch:
		s.watch(w, r)
	default:
		s.list(w, r, kind)
	}
}

func (s *apiServer) fail(w http.ResponseWriter, r *http.Request, code int, reason metav1.StatusReason, text string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(&metav1.Status{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: "Failure", Message: text + " " + r.URL.Path, Reason: reason, Code: int32(code),
	})
}

func (s *apiServer) media(r *http.Request) runtime.SerializerInfo {
	want := "application/json"
	if strings.Contains(r.Header.Get("Accept"), "protobuf") {
		want = "application/vnd.kubernetes.protobuf"
	}
	info, _ := runtime.SerializerInfoForMediaType(s.codecs.SupportedMediaTypes(), want)
	return info
}

func (s *apiServer) write(w http.ResponseWriter, r *http.Request, o runtime.Object) {
	info := s.media(r)
	w.Header().Set("Content-Type", info.MediaType)
	if err := s.codecs.EncoderForVersion(info.Serializer, corev1.SchemeGroupVersion).Encode(o, w); err != nil {
		s.t.Error(err)
	}
}

func (s *apiServer) list(w http.ResponseWriter, r *http.Request, kind string) {
	s.mu.Lock()
	meta := metav1.ListMeta{ResourceVersion: strconv.Itoa(s.version)}
	var out runtime.Object
	if kind == "pods" {
		l := &corev1.PodList{ListMeta: meta}
		for _, k := range slices.Sorted(maps.Keys(s.pods)) {
			l.Items = append(l.Items, *s.pods[k])
		}
		out = l
	} else {
		l := &corev1.NamespaceList{ListMeta: meta}
		for _, k := range slices.Sorted(maps.Keys(s.spaces)) {
			l.Items = append(l.Items, *s.spaces[k])
		}
		out = l
	}
	s.mu.Unlock()
	s.write(w, r, out)
}

func (s *apiServer) watch(w http.ResponseWriter, r *http.Request) {
	info := s.media(r)
	w.Header().Set("Content-Type", info.MediaType+";stream=watch")
	w.WriteHeader(http.StatusOK)
	frames := info.StreamSerializer.NewFrameWriter(w)
	inner := s.codecs.EncoderForVersion(info.Serializer, corev1.SchemeGroupVersion)
	outer := s.codecs.EncoderForVersion(info.StreamSerializer.Serializer, corev1.SchemeGroupVersion)
	send := func(kind string, o runtime.Object) {
		var obj, msg bytes.Buffer
		if err := inner.Encode(o, &obj); err != nil {
			s.t.Error(err)
		}
		if err := outer.Encode(&metav1.WatchEvent{Type: kind, Object: runtime.RawExtension{Raw: obj.Bytes()}}, &msg); err != nil {
			s.t.Error(err)
		}
		if _, err := frames.Write(msg.Bytes()); err != nil {
			return
		}
		w.(http.Flusher).Flush()
	}
	pods := strings.HasSuffix(r.URL.Path, "/pods")
	mine := func(o runtime.Object) bool {
		_, pod := o.(*corev1.Pod)
		return pod == pods
	}
	after, _ := strconv.Atoi(r.URL.Query().Get("resourceVersion"))
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-r.Context().Done():
		case <-stop:
		}
		s.mu.Lock()
		s.cond.Broadcast()
		s.mu.Unlock()
	}()
	s.mu.Lock()
	defer s.mu.Unlock()
	epoch := s.epoch
	if r.URL.Query().Get("sendInitialEvents") == "true" {
		after = s.version
		for _, k := range slices.Sorted(maps.Keys(s.pods)) {
			if pods {
				send("ADDED", s.pods[k])
			}
		}
		for _, k := range slices.Sorted(maps.Keys(s.spaces)) {
			if !pods {
				send("ADDED", s.spaces[k])
			}
		}
		meta := metav1.ObjectMeta{ResourceVersion: strconv.Itoa(s.version), Annotations: map[string]string{metav1.InitialEventsAnnotationKey: "true"}}
		if pods {
			send("BOOKMARK", &corev1.Pod{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}, ObjectMeta: meta})
		} else {
			send("BOOKMARK", &corev1.Namespace{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"}, ObjectMeta: meta})
		}
	} else if after < s.oldest {
		send("ERROR", &metav1.Status{
			TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"},
			Status:   "Failure", Reason: metav1.StatusReasonExpired, Code: http.StatusGone, Message: "too old resource version",
		})
		return
	}
	w.(http.Flusher).Flush()
	for r.Context().Err() == nil && s.epoch == epoch && !s.closing {
		if !s.deaf {
			for _, e := range s.log {
				if e.version > after && mine(e.object) {
					send(e.kind, e.object)
					after = e.version
				}
			}
		}
		s.cond.Wait()
	}
}
