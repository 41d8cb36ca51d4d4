package attest_test

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

func itoa(n int) string { return strconv.Itoa(n) }

func podProc(tb testing.TB) string {
	tb.Helper()
	return fakeProc(tb, "0::/\n", map[int]string{
		10: "0::/kubepods/burstable/pod" + uidA + "/" + ctrA + "\n",
		11: "0::/kubepods/burstable/pod" + uidA + "/" + ctrB + "\n",
		12: "0::/kubepods/burstable/pod" + uidB + "/" + ctrB + "\n",
		13: "0::/system.slice/sshd.service\n",
		14: "4:memory:/kubepods/pod" + uidA + "\n3:pids:/kubepods/pod" + uidB + "\n",
		15: "not a cgroup file",
	})
}

func web() *attest.Pod {
	return &attest.Pod{UID: uidA, Namespace: "shop", Name: "web-0", ServiceAccount: "web", Witness: attest.WitnessLedger}
}

func newPods(tb testing.TB, s *source, change func(*attest.Config)) *attest.Attestor {
	tb.Helper()
	cfg := attest.Config{Mode: attest.ModeKubernetes, Proc: podProc(tb)}
	if s != nil {
		cfg.Pods = s
	}
	if change != nil {
		change(&cfg)
	}
	a, err := attest.New(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	return a
}

func bindPID(tb testing.TB, a *attest.Attestor, pid int32) *attest.Binding {
	tb.Helper()
	b, err := a.Bind(context.Background(), attest.Caller{PID: pid, UID: 1000, GID: 1000, Process: alive{}})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(b.Close)
	return b
}

func wantSelectors(t *testing.T, b *attest.Binding, want ...string) {
	t.Helper()
	if d := cmp.Diff(attest.MustSelectors(want...).Strings(), b.Selectors().Strings()); d != "" {
		t.Error(d)
	}
}

// The pod's facts come late, change, and go.
func TestPodFacts(t *testing.T) {
	t.Parallel()
	s := &source{}
	a := newPods(t, s, nil)
	b := bindPID(t, a, 10)
	var notified atomic.Int64
	stop := b.Watch(func() { notified.Add(1) })
	wantSelectors(t, b, "k8s:pod-uid:"+uidA)
	if b.PodUID() != uidA || b.ContainerID() != ctrA || b.LimitKey() != uidA || !b.InPod() {
		t.Errorf("bound to pod %q container %q, key %q", b.PodUID(), b.ContainerID(), b.LimitKey())
	}
	if _, ok := b.Pod(); ok {
		t.Error("an unknown pod is known")
	}
	if d := cmp.Diff([]string{"kernel", "cgroup"}, b.Witnesses()); d != "" {
		t.Error(d)
	}

	s.set(uidA, web())
	if notified.Load() != 1 {
		t.Errorf("%d notifications, want 1", notified.Load())
	}
	full := []string{"k8s:pod-uid:" + uidA, "k8s:ns:shop", "k8s:sa:web", "k8s:pod-name:web-0"}
	wantSelectors(t, b, full...)
	if pod, ok := b.Pod(); !ok || pod.Name != "web-0" {
		t.Errorf("Pod = %+v, %v", pod, ok)
	}
	if d := cmp.Diff([]string{"kernel", "cgroup", "ledger"}, b.Witnesses()); d != "" {
		t.Error(d)
	}
	asked := s.asked.Load()
	for range 100 {
		b.Selectors()
	}
	if s.asked.Load() != asked {
		t.Error("the source is asked although nothing has changed")
	}

	more := web()
	more.NodeName = "n1"
	more.Selectors = []attest.Selector{attest.MustSelector("k8s:pod-label:app:web")}
	s.ctrs = map[string]attest.Container{uidA + "/" + ctrA: {Name: "main", Selectors: []attest.Selector{attest.MustSelector("k8s:container-image:x")}}}
	s.set(uidA, more)
	wantSelectors(t, b, append(full, "k8s:node-name:n1", "k8s:pod-label:app:web", "k8s:container-name:main", "k8s:container-image:x")...)
	wantSelectors(t, bindPID(t, a, 11), append(full, "k8s:node-name:n1", "k8s:pod-label:app:web")...)
	if s.watching() != 1 {
		t.Errorf("%d watches for two bindings of one pod, want 1", s.watching())
	}

	s.ctrs = nil
	s.set(uidA, nil)
	wantSelectors(t, b, "k8s:pod-uid:"+uidA)
	stop()
	n := notified.Load()
	s.set(uidA, web())
	if notified.Load() != n {
		t.Error("notified after stop")
	}
	wantSelectors(t, b, full...)
}

func TestOutsidePods(t *testing.T) {
	t.Parallel()
	a := newPods(t, &source{}, nil)
	b := bindPID(t, a, 13)
	wantSelectors(t, b)
	if b.LimitKey() != "uid:1000" || b.InPod() {
		t.Errorf("LimitKey %q, InPod %v", b.LimitKey(), b.InPod())
	}
	both := newPods(t, &source{}, func(c *attest.Config) {
		c.Mode = attest.ModeBoth
		c.Unix.PasswdFile, c.Unix.GroupFile = "/nonexistent", "/nonexistent"
	})
	wantSelectors(t, bindPID(t, both, 13), "unix:uid:1000", "unix:gid:1000")
	wantSelectors(t, bindPID(t, both, 10), "unix:uid:1000", "unix:gid:1000", "k8s:pod-uid:"+uidA)
	wantSelectors(t, bindPID(t, newPods(t, nil, nil), 10), "k8s:pod-uid:"+uidA)
}

// A site that insists on the ledger hears nothing, not even unix selectors,
// until the ledger knows the pod; that is late, not denied.
func TestRequireLedger(t *testing.T) {
	t.Parallel()
	s := &source{}
	b := bindPID(t, newPods(t, s, func(c *attest.Config) { c.RequireLedger, c.Mode = true, attest.ModeBoth }), 10)
	wantSelectors(t, b)
	watched := web()
	watched.Witness = "watch"
	s.set(uidA, watched)
	wantSelectors(t, b)
	watched.Witness = "watch,ledger"
	s.set(uidA, watched)
	if !b.Selectors().Contains(attest.MustSelector("k8s:sa:web")) || !b.Selectors().Contains(attest.MustSelector("unix:uid:1000")) {
		t.Errorf("selectors %v", b.Selectors().Strings())
	}
	s.set(uidA, nil)
	wantSelectors(t, b)
	if b.Err() != nil {
		t.Errorf("late became %v", b.Err())
	}
}

// Witnesses that disagree refuse the caller, and agreeing again does not help.
func TestWitnessesDisagree(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name   string
		change func(*attest.Pod)
	}{
		{"uid", func(p *attest.Pod) { p.UID = uidB }},
		{"namespace", func(p *attest.Pod) { p.Namespace = "other" }},
		{"name", func(p *attest.Pod) { p.Name = "other" }},
		{"service account", func(p *attest.Pod) { p.ServiceAccount = "other" }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := &source{}
			s.set(uidA, web())
			a := newPods(t, s, func(c *attest.Config) { c.Mode = attest.ModeBoth })
			b := bindPID(t, a, 10)
			if b.Selectors().Len() == 0 || b.Err() != nil {
				t.Fatalf("before: %v, %v", b.Selectors().Strings(), b.Err())
			}
			lie := web()
			tc.change(lie)
			s.set(uidA, lie)
			for range 2 {
				wantSelectors(t, b)
				if err := b.Err(); !errors.Is(err, attest.ErrDenied) {
					t.Errorf("Err = %v, want ErrDenied", err)
				}
				if pod, ok := b.Pod(); ok {
					t.Errorf("Pod = %+v of a denied caller", pod)
				}
				s.set(uidA, web())
			}
			wantSelectors(t, bindPID(t, a, 11))
		})
	}
	a := newPods(t, nil, nil)
	for _, pid := range []int32{14, 15, 16} {
		if _, err := a.Bind(context.Background(), attest.Caller{PID: pid, Process: alive{}}); !errors.Is(err, attest.ErrDenied) {
			t.Errorf("caller %d: %v, want ErrDenied", pid, err)
		}
	}
}

// Facts that fill in step by step are no disagreement.
func TestFactsFillIn(t *testing.T) {
	t.Parallel()
	s := &source{}
	s.set(uidA, &attest.Pod{Namespace: "shop"})
	b := bindPID(t, newPods(t, s, nil), 10)
	wantSelectors(t, b, "k8s:pod-uid:"+uidA, "k8s:ns:shop")
	s.set(uidA, web())
	wantSelectors(t, b, "k8s:pod-uid:"+uidA, "k8s:ns:shop", "k8s:sa:web", "k8s:pod-name:web-0")
	s.set(uidA, &attest.Pod{Name: "web-0"})
	wantSelectors(t, b, "k8s:pod-uid:"+uidA, "k8s:pod-name:web-0")
	if b.Err() != nil {
		t.Error(b.Err())
	}
}

func TestClose(t *testing.T) {
	t.Parallel()
	s := &source{}
	a := newPods(t, s, nil)
	b1, b2, b3 := bindPID(t, a, 10), bindPID(t, a, 11), bindPID(t, a, 12)
	if a.Pods() != 2 || s.watching() != 2 {
		t.Errorf("%d pods, %d watches, want 2", a.Pods(), s.watching())
	}
	var notified atomic.Int64
	stop := b1.Watch(func() { notified.Add(1) })
	b1.Close()
	b1.Close()
	b1.Watch(func() { notified.Add(1) })()
	s.set(uidA, web())
	stop()
	if notified.Load() != 0 {
		t.Error("notified after Close")
	}
	b2.Close()
	b3.Close()
	if a.Pods() != 0 || s.watching() != 0 {
		t.Errorf("after Close: %d pods, %d watches", a.Pods(), s.watching())
	}
}

func TestLogAttrs(t *testing.T) {
	t.Parallel()
	s := &source{}
	p := web()
	p.Selectors = []attest.Selector{attest.MustSelector("k8s:pod-label:password:hunter2")}
	s.set(uidA, p)
	var text strings.Builder
	for _, attr := range bindPID(t, newPods(t, s, nil), 10).LogAttrs() {
		text.WriteString(attr.String() + " ")
	}
	for _, want := range []string{"pid=10", "uid=1000", "pod_uid=" + uidA, "namespace=shop", "pod=web-0", "service_account=web", "container=" + ctrA} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("%q lacks %q", text.String(), want)
		}
	}
	if strings.Contains(text.String(), "hunter2") {
		t.Errorf("%q shows a label", text.String())
	}
}

// Everything at once, for the race detector and for lock order.
func TestConcurrently(t *testing.T) {
	t.Parallel()
	s := &source{}
	a := newPods(t, s, nil)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := range 200 {
				b, err := a.Bind(context.Background(), attest.Caller{PID: int32(10 + i%3), Process: alive{}})
				if err != nil {
					t.Error(err)
					return
				}
				stop := b.Watch(func() {})
				b.Selectors()
				b.Witnesses()
				b.LogAttrs()
				stop()
				b.Close()
			}
		})
		wg.Go(func() {
			for i := range 200 {
				if i%2 == 0 {
					s.set(uidA, web())
				} else {
					s.set(uidA, nil)
				}
			}
		})
	}
	wg.Wait()
	if a.Pods() != 0 || s.watching() != 0 {
		t.Errorf("left over: %d pods, %d watches", a.Pods(), s.watching())
	}
}
