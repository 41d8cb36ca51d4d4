package podinfo_test

import (
	"context"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"

	"github.com/spiffe-node/spiffe-node/internal/podinfo"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

// ledger is a publish ledger under the test's control.
type ledger struct {
	mu      sync.Mutex
	pods    map[string]attest.Pod
	watches map[int]func()
	next    int
}

func (l *ledger) Pod(uid string) (attest.Pod, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p, ok := l.pods[uid]
	return p, ok
}

func (l *ledger) Watch(_ string, notify func()) func() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.watches == nil {
		l.watches = map[int]func(){}
	}
	l.next++
	id := l.next
	l.watches[id] = notify
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.watches, id)
	}
}

func (l *ledger) put(p attest.Pod) attest.Pod {
	p.Witness = attest.WitnessLedger
	l.mu.Lock()
	if l.pods == nil {
		l.pods = map[string]attest.Pod{}
	}
	l.pods[p.UID] = p
	var tell []func()
	for _, w := range l.watches {
		tell = append(tell, w)
	}
	l.mu.Unlock()
	for _, f := range tell {
		f()
	}
	return p
}

func published(uid, name string) attest.Pod {
	return attest.Pod{UID: uid, Namespace: "shop", Name: name, ServiceAccount: "web"}
}

// start runs a source until the test ends.
func start(t *testing.T, cfg podinfo.Config) *podinfo.Source {
	t.Helper()
	cfg.Node = node
	s, err := podinfo.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(10 * time.Second):
			t.Error("Run does not end")
		}
	})
	return s
}

// eventually waits for something that becomes true.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !is(); {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

func has(s *podinfo.Source, uid, selector string) func() bool {
	return func() bool {
		pod, _ := s.Pod(uid)
		return slices.Contains(texts(pod.K8sSelectors()), selector)
	}
}

func link(s *podinfo.Source, name string) podinfo.LinkStatus {
	for _, l := range s.Status().Links {
		if l.Name == name {
			return l
		}
	}
	return podinfo.LinkStatus{}
}

// What the watch says joins what the ledger says, and follows the pod, whether
// the server streams lists or not.
func TestWatch(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name     string
		noStream bool
	}{{"lists", true}, {"streamed lists", false}} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			server := newAPIServer(t)
			server.noStream = tc.noStream
			server.put(makePod(uidB, "old", running(made("main", idB))))
			book := &ledger{}
			s := start(t, podinfo.Config{API: server.api(), Ledger: book})
			eventually(t, "the first list", func() bool { return link(s, "pods").Synced })
			if _, ok := s.Container(uidB, idB); !ok {
				t.Error("a listed container is unknown")
			}
			pod, ok := s.Pod(uidA)
			if ok || pod.NodeName != node {
				t.Errorf("an unknown pod: %+v, %v", pod, ok)
			}
			book.put(published(uidA, "web-0"))
			if pod, ok := s.Pod(uidA); !ok || pod.Witness != "ledger" || pod.Name != "web-0" {
				t.Errorf("from the ledger: %+v, %v", pod, ok)
			}
			var notified atomic.Int64
			stop := s.Watch(uidA, func() { notified.Add(1) })
			defer stop()
			server.put(makePod(uidA, "web-0"))
			eventually(t, "labels", has(s, uidA, "k8s:pod-label:app:web"))
			if pod, _ := s.Pod(uidA); pod.Witness != "ledger,watch" || len(s.Testimony(uidA)) != 2 {
				t.Errorf("from both: %+v", pod)
			}
			if _, ok := s.Container(uidA, idA); ok {
				t.Error("a container nobody has made is known")
			}
			server.put(makePod(uidA, "web-0", running(made("main", idA)), label("app", "shop")))
			eventually(t, "the changed label", has(s, uidA, "k8s:pod-label:app:shop"))
			if has(s, uidA, "k8s:pod-label:app:web")() {
				t.Error("the old label is still there")
			}
			if c, ok := s.Container(uidA, idA); !ok || c.Name != "main" {
				t.Errorf("container %+v, %v", c, ok)
			}
			// A heartbeat says nothing new.
			before := notified.Load()
			if before < 2 {
				t.Errorf("%d notifications, want at least 2", before)
			}
			beat := makePod(uidA, "web-0", running(made("main", idA)), label("app", "shop"))
			beat.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
			server.put(beat)
			server.put(makePod(uidB, "old", running(made("main", idB)), label("seen", "yes")))
			eventually(t, "a later event", has(s, uidB, "k8s:pod-label:seen:yes"))
			if n := notified.Load(); n != before {
				t.Errorf("%d notifications of nothing", n-before)
			}
			if n := server.count("get"); n > 1 {
				t.Errorf("a pod was asked for by name %d times", n)
			}
		})
	}
}

// Known facts outlive the API server; without it the ledger suffices.
func TestServerAway(t *testing.T) {
	t.Parallel()
	server := newAPIServer(t)
	server.put(makePod(uidA, "web-0", running(made("main", idA))))
	api := server.api()
	back := server.away()
	book := &ledger{}
	book.put(published(uidA, "web-0"))
	s := start(t, podinfo.Config{API: api, Ledger: book})
	eventually(t, "the first failure", func() bool { return link(s, "pods").LastError != "" })
	if pod, ok := s.Pod(uidA); !ok || pod.ServiceAccount != "web" || pod.Witness != "ledger" {
		t.Errorf("started without a server: %+v, %v", pod, ok)
	}
	if p := s.Problems(); len(p) != 1 || !strings.Contains(p[0], "watch of this node's pods is away") {
		t.Errorf("problems %q", p)
	}
	back()
	eventually(t, "the server's facts", has(s, uidA, "k8s:pod-label:app:web"))
	if p := s.Problems(); len(p) != 0 {
		t.Errorf("problems %q", p)
	}

	back = server.away()
	eventually(t, "the loss to be seen", func() bool { return !link(s, "pods").Connected })
	if !has(s, uidA, "k8s:pod-label:app:web")() {
		t.Error("facts are lost with the server")
	}
	if c, ok := s.Container(uidA, idA); !ok || c.Name != "main" {
		t.Error("containers are lost with the server")
	}
	// Meanwhile one pod goes, another comes, versions are compacted.
	server.remove("shop", "web-0")
	server.put(makePod(uidB, "web-1"))
	server.forget()
	back()
	eventually(t, "the new pod", has(s, uidB, "k8s:pod-name:web-1"))
	eventually(t, "the old pod's end", func() bool { return !has(s, uidA, "k8s:pod-label:app:web")() })
	if !link(s, "pods").Synced {
		t.Error("not synced")
	}
}

// A watch that ends, or is too old, is followed by another.
func TestWatchBreaks(t *testing.T) {
	t.Parallel()
	server := newAPIServer(t)
	server.put(makePod(uidA, "web-0"))
	s := start(t, podinfo.Config{API: server.api()})
	eventually(t, "the pod", has(s, uidA, "k8s:pod-label:app:web"))
	server.breakWatches()
	server.put(makePod(uidA, "web-0", label("app", "two")))
	eventually(t, "the change", has(s, uidA, "k8s:pod-label:app:two"))
	server.put(makePod(uidA, "web-0", label("app", "three")))
	server.forget()
	server.breakWatches()
	eventually(t, "the change told by a new list", has(s, uidA, "k8s:pod-label:app:three"))
	server.change(func() { server.status = 403 })
	server.breakWatches()
	eventually(t, "the refusal", func() bool { return strings.Contains(link(s, "pods").LastError, "refused") })
	server.change(func() { server.status = 0 })
	server.put(makePod(uidA, "web-0", label("app", "four")))
	eventually(t, "the change after a refusal", has(s, uidA, "k8s:pod-label:app:four"))
}

// The ledger is ahead of the watch: the pod is read by name, and its UID
// decides.
func TestFetch(t *testing.T) {
	t.Parallel()
	server := newAPIServer(t)
	server.put(makePod(uidB, "web-1"))
	book := &ledger{}
	var mu sync.Mutex
	var told []string
	s := start(t, podinfo.Config{API: server.api(), Ledger: book, OnPod: func(p attest.Pod) {
		mu.Lock()
		defer mu.Unlock()
		told = append(told, p.UID+" "+p.Witness)
	}})
	eventually(t, "the first list", func() bool { return link(s, "pods").Synced })
	server.change(func() { server.deaf = true })
	server.put(makePod(uidA, "web-0", running(made("main", idA))))
	s.Published(book.put(published(uidA, "web-0")))
	eventually(t, "labels", has(s, uidA, "k8s:pod-label:app:web"))
	if n := server.count("get"); n != 1 {
		t.Errorf("%d reads by name, want 1", n)
	}
	s.Published(book.put(published(uidB, "web-1"))) // known
	// Its successor has its name.
	const gone = "33333333-3333-4333-8333-333333333333"
	s.Published(book.put(published(gone, "web-1")))
	s.Published(book.put(published("44444444-4444-4444-8444-444444444444", "nowhere")))
	eventually(t, "the other reads", func() bool { return server.count("get") == 3 })
	if pod, ok := s.Pod(gone); !ok || pod.Witness != "ledger" {
		t.Errorf("another pod of its name speaks for it: %+v", pod)
	}
	eventually(t, "another read for somebody who calls", func() bool {
		s.Watch(gone, func() {})()
		return server.count("get") > 3
	})
	if p := s.Problems(); len(p) != 0 {
		t.Errorf("problems %q", p)
	}
	server.change(func() { server.deaf = false })
	server.remove("shop", "web-0")
	eventually(t, "the end of a pod that was read", func() bool { return !has(s, uidA, "k8s:pod-label:app:web")() })
	mu.Lock()
	defer mu.Unlock()
	for _, want := range []string{uidA + " ledger", uidA + " ledger,watch", uidB + " ledger,watch", gone + " ledger"} {
		if !slices.Contains(told, want) {
			t.Errorf("OnPod was not told %q, but %q", want, told)
		}
	}
}

// Pods that have ended are not held once nobody uses them.
func TestEndedPods(t *testing.T) {
	t.Parallel()
	server := newAPIServer(t)
	server.put(makePod("done", "done", phase(corev1.PodSucceeded)))
	s := start(t, podinfo.Config{API: server.api()})
	server.put(makePod(uidA, "web-0", running(made("main", idA))))
	server.put(makePod(uidB, "web-1"))
	static := makePod("mirror-uid", "static", mirror(hash), running(made("main", idC)))
	server.put(static)
	eventually(t, "the pods", func() bool { return s.Status().Pods == 3 })
	stopA, stopAgain, stopStatic := s.Watch(uidA, func() {}), s.Watch(uidA, func() {}), s.Watch(hash, func() {})
	server.put(makePod(uidA, "web-0", running(made("main", idA)), phase(corev1.PodFailed)))
	server.put(makePod(uidB, "web-1", phase(corev1.PodSucceeded)))
	server.remove("shop", "static")
	eventually(t, "the end of the unused one", func() bool { return s.Status().Pods == 2 })
	if _, ok := s.Container(uidA, idA); !ok {
		t.Error("the failed pod's container is unknown while it still calls")
	}
	server.remove("shop", "web-0")
	server.put(makePod(uidB, "next"))
	eventually(t, "a later event", has(s, uidB, "k8s:pod-name:next"))
	if !has(s, uidA, "k8s:pod-label:app:web")() || !has(s, hash, "k8s:pod-name:static")() {
		t.Error("a deleted pod's facts are gone while somebody is bound to it")
	}
	stopA()
	if !has(s, uidA, "k8s:pod-label:app:web")() {
		t.Error("dropped while used")
	}
	stopAgain()
	stopAgain()
	stopStatic()
	if pods, statics, interests := s.Held(); pods != 1 || statics != 0 || interests != 0 {
		t.Errorf("held: %d pods, %d static, %d interests", pods, statics, interests)
	}
}

// The hash of a static pod's cgroup leads to its mirror pod; two that claim it
// lead nowhere.
func TestStaticPods(t *testing.T) {
	t.Parallel()
	server := newAPIServer(t)
	s := start(t, podinfo.Config{API: server.api()})
	notified := make(chan struct{}, 16)
	defer s.Watch(hash, func() { notified <- struct{}{} })()
	server.put(makePod("mirror-uid", "etcd-node-1", mirror(hash), running(waiting("main"))))
	server.put(makePod("mirror-uid", "etcd-node-1", mirror(hash), running(made("main", idA))))
	eventually(t, "the static pod", has(s, hash, "k8s:pod-name:etcd-node-1"))
	<-notified
	if pod, ok := s.Pod(hash); !ok || pod.UID != hash || pod.Witness != "watch" {
		t.Errorf("static pod %+v", pod)
	}
	if _, ok := s.Pod("mirror-uid"); ok {
		t.Error("known by the API's UID, which no cgroup has")
	}
	if c, ok := s.Container(hash, idA); !ok || c.Name != "main" {
		t.Errorf("container %+v, %v", c, ok)
	}
	server.put(makePod("other-mirror", "liar", mirror(hash), running(made("main", idB))))
	eventually(t, "doubt", func() bool { _, ok := s.Pod(hash); return !ok })
	server.remove("shop", "liar")
	eventually(t, "the static pod again", has(s, hash, "k8s:pod-name:etcd-node-1"))
	// A mirror pod never speaks for an ordinary one.
	server.put(makePod(uidA, "web-0"))
	server.put(makePod("another", "liar", mirror(uidA), running(made("main", idB))))
	server.put(makePod(uidB, "last"))
	eventually(t, "all of them", has(s, uidB, "k8s:pod-name:last"))
	if !has(s, uidA, "k8s:pod-name:web-0")() {
		t.Error("the mirror pod speaks for the other")
	}
}

func TestNamespaceLabels(t *testing.T) {
	t.Parallel()
	server := newAPIServer(t)
	server.putNamespace("shop", map[string]string{"team": "a"})
	server.putNamespace("other", map[string]string{"team": "b"})
	server.put(makePod(uidA, "web-0"))
	book := &ledger{}
	book.put(published(uidB, "web-1"))
	s := start(t, podinfo.Config{API: server.api(), Ledger: book, NamespaceLabels: true})
	eventually(t, "the namespace's label", has(s, uidA, "k8s:ns-label:team:a"))
	eventually(t, "that of a pod known from the ledger", has(s, uidB, "k8s:ns-label:team:a"))
	notified := make(chan struct{}, 16)
	defer s.Watch(uidA, func() { notified <- struct{}{} })()
	defer s.Watch(uidB, func() { notified <- struct{}{} })()
	server.putNamespace("shop", map[string]string{"team": "c"})
	eventually(t, "the changed label", has(s, uidA, "k8s:ns-label:team:c"))
	<-notified
	<-notified
	if has(s, uidA, "k8s:ns-label:team:a")() || has(s, uidA, "k8s:ns-label:team:b")() {
		t.Error("labels of others")
	}
	without := start(t, podinfo.Config{API: server.api()})
	eventually(t, "the pod", has(without, uidA, "k8s:pod-label:app:web"))
	if has(without, uidA, "k8s:ns-label:team:c")() {
		t.Error("labels of namespaces without being asked")
	}
}

func TestNewRefuses(t *testing.T) {
	t.Parallel()
	kubelet, err := podinfo.NewKubelet(podinfo.KubeletConfig{Address: "node:10250"})
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		cfg  podinfo.Config
		want string
	}{
		"no node":    {podinfo.Config{}, "name of this node"},
		"both":       {podinfo.Config{Node: node, API: newAPIServer(t).api(), Kubelet: kubelet}, "not from both"},
		"namespaces": {podinfo.Config{Node: node, NamespaceLabels: true}, "only the API server"},
	} {
		if _, err := podinfo.New(tc.cfg); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
	if d := cmp.Diff(podinfo.Status{}, start(t, podinfo.Config{}).Status()); d != "" {
		t.Error(d)
	}
}
