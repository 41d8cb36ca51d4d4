package podinfo_test

import (
	"context"
	"fmt"
	"runtime"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kruntime "k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/tools/cache"

	"github.com/spiffe-node/spiffe-node/internal/podinfo"
)

// clientset is the API of client-go's fake. It knows no field selectors, so
// that pods of other nodes arrive too.
type clientset struct{ *fake.Clientset }

type unstreamed struct{ *cache.ListWatch }

func (unstreamed) IsWatchListSemanticsUnSupported() bool { return true }

func (c clientset) Pods(string) cache.ListerWatcherWithContext {
	return unstreamed{&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (kruntime.Object, error) {
			return c.CoreV1().Pods("").List(ctx, o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			return c.CoreV1().Pods("").Watch(ctx, o)
		},
	}}
}

func (c clientset) Pod(ctx context.Context, namespace, name string) (*corev1.Pod, error) {
	return c.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
}

func (c clientset) Namespaces() cache.ListerWatcherWithContext {
	return unstreamed{&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (kruntime.Object, error) {
			return c.CoreV1().Namespaces().List(ctx, o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			return c.CoreV1().Namespaces().Watch(ctx, o)
		},
	}}
}

func TestClientset(t *testing.T) {
	t.Parallel()
	api := clientset{fake.NewClientset(makePod(uidA, "web-0"),
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{"team": "a"}}})}
	s := start(t, podinfo.Config{API: api, NamespaceLabels: true})
	eventually(t, "the listed pod", has(s, uidA, "k8s:pod-label:app:web"))
	eventually(t, "the namespace", has(s, uidA, "k8s:ns-label:team:a"))
	pods := api.CoreV1().Pods("shop")
	if _, err := pods.Create(t.Context(), makePod("other", "other", func(p *corev1.Pod) { p.Spec.NodeName = "node-2" }), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	// The fake loses what happens between a list and its watch.
	eventually(t, "the new pod", func() bool {
		if _, err := pods.Create(t.Context(), makePod(uidB, "web-1"), metav1.CreateOptions{}); err != nil {
			_, _ = pods.Update(t.Context(), makePod(uidB, "web-1"), metav1.UpdateOptions{})
		}
		return has(s, uidB, "k8s:pod-name:web-1")()
	})
	if n := s.Status().Pods; n != 2 {
		t.Errorf("%d pods are held, want those of this node", n)
	}
	if err := pods.Delete(t.Context(), "web-0", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the end of the pod", func() bool { _, ok := s.Pod(uidA); return !ok })
}

// bigPod is of the size clusters have: some 10 kB.
func bigPod(i int) *corev1.Pod {
	p := makePod(fmt.Sprintf("uid-%d", i), fmt.Sprintf("web-%d", i), running(made("main", fmt.Sprintf("%064x", i)), made("proxy", fmt.Sprintf("%064x", i+1000))))
	p.Annotations = map[string]string{"sidecar.istio.io/status": fmt.Sprintf("%04000d", i)}
	for k := range 10 {
		p.Labels[fmt.Sprintf("example.org/label-%d", k)] = fmt.Sprintf("value-%d-%d", k, i)
	}
	for c := range 2 {
		p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: fmt.Sprintf("c%d", c)})
		for e := range 30 {
			p.Spec.Containers[0].Env = append(p.Spec.Containers[0].Env, corev1.EnvVar{Name: fmt.Sprintf("VARIABLE_%d_%d", c, e), Value: fmt.Sprintf("%060d", i)})
		}
	}
	return p
}

// BenchmarkMemory is what a node full of pods costs: bytes held per pod, and the
// time from an empty store to a full one.
func BenchmarkMemory(b *testing.B) {
	const pods = 250
	for b.Loop() {
		before := heap()
		s, err := podinfo.New(podinfo.Config{Node: node})
		if err != nil {
			b.Fatal(err)
		}
		for i := range pods {
			s.Put(bigPod(i))
		}
		b.ReportMetric(float64(heap()-before)/pods, "held-B/pod")
		if n := s.Status().Pods; n != pods {
			b.Fatalf("%d pods", n)
		}
	}
}

func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func TestMemory(t *testing.T) {
	s, err := podinfo.New(podinfo.Config{Node: node})
	if err != nil {
		t.Fatal(err)
	}
	before := heap()
	const pods = 250
	for i := range pods {
		s.Put(bigPod(i))
	}
	held := (heap() - before) / pods
	t.Logf("%d bytes per pod", held)
	if held > 6<<10 {
		t.Errorf("%d bytes are held per pod, want at most 6 KiB", held)
	}
	for i := range pods {
		p := bigPod(i)
		p.Status.Phase = corev1.PodSucceeded
		s.Put(p)
	}
	if n := s.Status().Pods; n != 0 {
		t.Errorf("%d ended pods are held", n)
	}
}
