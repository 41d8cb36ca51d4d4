package podinfo_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/spiffe-node/spiffe-node/internal/podinfo"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

// Selectors of a pod, in SPIRE's spelling.
func TestSelectors(t *testing.T) {
	t.Parallel()
	base := []string{
		"k8s:ns:shop", "k8s:sa:web", "k8s:pod-name:web-0", "k8s:pod-uid:" + uidA, "k8s:node-name:node-1",
		"k8s:pod-owner:ReplicaSet:web-5d", "k8s:pod-owner-uid:ReplicaSet:rs-uid",
		"k8s:pod-label:app:web", "k8s:pod-label:tier:",
		"k8s:pod-image-count:1", "k8s:pod-init-image-count:0",
	}
	for _, tc := range []struct {
		name string
		pod  *corev1.Pod
		want []string
	}{
		{"scheduled", makePod(uidA, "web-0"), base},
		{"waiting", makePod(uidA, "web-0", running(waiting("main"))), base},
		{"running", makePod(uidA, "web-0", running(made("main", idA))), append([]string{
			"k8s:pod-image:registry.example/main:1", "k8s:pod-image:registry.example/main@sha256:main",
		}, base...)},
		{"host network and PIDs", makePod(uidA, "web-0", hostNetwork, hostPID), base},
		{
			"job", makePod(uidA, "web-0", ownedBy("Job", "backup", "job-uid")),
			[]string{
				"k8s:ns:shop", "k8s:sa:web", "k8s:pod-name:web-0", "k8s:pod-uid:" + uidA, "k8s:node-name:node-1",
				"k8s:pod-owner:Job:backup", "k8s:pod-owner-uid:Job:job-uid", "k8s:pod-label:app:web", "k8s:pod-label:tier:",
				"k8s:pod-image-count:1", "k8s:pod-init-image-count:0",
			},
		},
		{
			"init and native sidecar", makePod(uidA, "web-0", initContainers(made("setup", idA), made("proxy", idB)), running(waiting("main"))),
			append([]string{
				"k8s:pod-init-image-count:2",
				"k8s:pod-init-image:registry.example/setup:1", "k8s:pod-init-image:registry.example/setup@sha256:setup",
				"k8s:pod-init-image:registry.example/proxy:1", "k8s:pod-init-image:registry.example/proxy@sha256:proxy",
			}, base[:10]...),
		},
		{"ephemeral containers count as no image", makePod(uidA, "web-0", ephemeral(made("debug", idC))), base},
		{
			"static", makePod(uidA, "web-0", mirror(hash), running(made("main", idA))),
			[]string{
				"k8s:ns:shop", "k8s:pod-name:web-0", "k8s:pod-uid:" + hash, "k8s:node-name:node-1",
				"k8s:pod-owner:Node:node-1", "k8s:pod-owner-uid:Node:node-uid", "k8s:pod-label:app:web", "k8s:pod-label:tier:",
				"k8s:pod-image-count:1", "k8s:pod-init-image-count:0",
				"k8s:pod-image:registry.example/main:1", "k8s:pod-image:registry.example/main@sha256:main",
			},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			for _, in := range []*corev1.Pod{tc.pod, podinfo.Strip(tc.pod), podinfo.Strip(podinfo.Strip(tc.pod))} {
				pod, _, _, ok := podinfo.Facts(in, node)
				if !ok {
					t.Fatal("nothing is known")
				}
				if d := cmp.Diff(attest.MustSelectors(tc.want...).Strings(), texts(pod.K8sSelectors())); d != "" {
					t.Error(d)
				}
			}
		})
	}
}

// Which caller is which container: by the runtime's ID and nothing else.
func TestContainers(t *testing.T) {
	t.Parallel()
	restarted := made("main", idB)
	restarted.RestartCount = 1
	restarted.LastTerminationState.Terminated = &corev1.ContainerStateTerminated{ContainerID: "containerd://" + idA}
	ended := made("setup", idA)
	ended.State = corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ContainerID: "containerd://" + idA}}
	for _, tc := range []struct {
		name string
		pod  *corev1.Pod
		want map[string]string // ID -> name
	}{
		{"scheduled", makePod(uidA, "web"), nil},
		{"waiting", makePod(uidA, "web", running(waiting("main"))), nil},
		{"container", makePod(uidA, "web", running(made("main", idA))), map[string]string{idA: "main"}},
		// While its postStart hook runs, the status is the one before the start.
		{"held by a postStart hook", makePod(uidA, "web", running(waiting("proxy"), waiting("main"))), nil},
		{"init", makePod(uidA, "web", initContainers(made("setup", idA)), running(waiting("main"))), map[string]string{idA: "setup"}},
		{"after init", makePod(uidA, "web", initContainers(ended), running(made("main", idB))), map[string]string{idA: "setup", idB: "main"}},
		{"native sidecar", makePod(uidA, "web", initContainers(made("proxy", idA)), running(made("main", idB))), map[string]string{idA: "proxy", idB: "main"}},
		{"ephemeral", makePod(uidA, "web", running(made("main", idA)), ephemeral(made("debug", idC))), map[string]string{idA: "main", idC: "debug"}},
		{"restarted", makePod(uidA, "web", running(restarted)), map[string]string{idB: "main"}},
		{"static", makePod(uidA, "web", mirror(hash), running(made("main", idA))), map[string]string{idA: "main"}},
		{"other runtime", makePod(uidA, "web", running(corev1.ContainerStatus{Name: "main", Image: "x", ContainerID: "cri-o://" + idA})), map[string]string{idA: "main"}},
		{"bare ID", makePod(uidA, "web", running(corev1.ContainerStatus{Name: "main", Image: "x", ContainerID: idA})), nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			_, list, _, ok := podinfo.Facts(podinfo.Strip(tc.pod), node)
			if !ok {
				t.Fatal("nothing is known")
			}
			got := map[string]string{}
			for _, c := range list {
				got[c.ID] = c.Name
			}
			if len(got) != len(tc.want) {
				t.Errorf("containers %v, want %v", got, tc.want)
			}
			for id, name := range tc.want {
				if got[id] != name {
					t.Errorf("container %s is %q, want %q", id, got[id], name)
				}
			}
		})
	}
	_, list, _, _ := podinfo.Facts(makePod(uidA, "web", running(made("main", idA))), node)
	if d := cmp.Diff([]string{"k8s:container-image:registry.example/main:1", "k8s:container-image:registry.example/main@sha256:main"}, texts(list[0].Selectors)); d != "" {
		t.Error(d)
	}
}

// Whoever may create pods cannot speak for a static pod.
func TestMirrorPods(t *testing.T) {
	t.Parallel()
	up := running(made("main", idA))
	for _, tc := range []struct {
		name   string
		change podOption
	}{
		{"nothing made", running(waiting("main"))},
		{"no status", running()},
		{"other hash", func(p *corev1.Pod) { p.Annotations["kubernetes.io/config.hash"] = uidB }},
		{"no hash", func(p *corev1.Pod) { delete(p.Annotations, "kubernetes.io/config.hash") }},
		{"empty hash", mirror("")},
		{"service account", func(p *corev1.Pod) { p.Spec.ServiceAccountName = "web" }},
		{"other node's", func(p *corev1.Pod) { p.OwnerReferences[0].Name = "node-2" }},
		{"on another node", func(p *corev1.Pod) { p.Spec.NodeName = "node-2" }},
		{"owned by no node", func(p *corev1.Pod) { p.OwnerReferences[0].Kind = "ReplicaSet" }},
		{"owned by a node of somebody's", func(p *corev1.Pod) { p.OwnerReferences[0].APIVersion = "example.org/v1" }},
		{"no controller", func(p *corev1.Pod) { p.OwnerReferences[0].Controller = nil }},
		{"two owners", func(p *corev1.Pod) { p.OwnerReferences = append(p.OwnerReferences, p.OwnerReferences[0]) }},
		{"no owner", func(p *corev1.Pod) { p.OwnerReferences = nil }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			p := makePod(uidA, "web", mirror(hash), up, tc.change)
			for _, in := range []*corev1.Pod{p, podinfo.Strip(p)} {
				if pod, _, _, ok := podinfo.Facts(in, node); ok {
					t.Errorf("believed: %+v", pod)
				}
			}
		})
	}
}

// The author of a pod does not say how much memory it takes.
func TestTooMuchText(t *testing.T) {
	t.Parallel()
	p := makePod(uidA, "web", running(made("main", idA)))
	for i := range 20_000 {
		p.Labels[fmt.Sprintf("label-%05d", i)] = strings.Repeat("v", 63)
	}
	pod, list, cut, ok := podinfo.Facts(p, node)
	if !ok || !cut || len(list) != 1 || len(list[0].Selectors) != 2 {
		t.Fatalf("known %v, cut %v, containers %v", ok, cut, list)
	}
	size := 0
	for _, s := range pod.Selectors {
		size += len(s.Value())
	}
	if size > podinfo.MaxText {
		t.Errorf("%d bytes are kept", size)
	}
}

func TestOddPods(t *testing.T) {
	t.Parallel()
	for name, p := range map[string]*corev1.Pod{
		"nil":         nil,
		"empty":       {},
		"no UID":      makePod("", "web"),
		"other node":  makePod(uidA, "web", func(p *corev1.Pod) { p.Spec.NodeName = "node-2" }),
		"unscheduled": makePod(uidA, "web", func(p *corev1.Pod) { p.Spec.NodeName = "" }),
	} {
		if _, _, _, ok := podinfo.Facts(p, node); ok {
			t.Errorf("%s: something is known", name)
		}
	}
	bare := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "u"}, Spec: corev1.PodSpec{NodeName: node}}
	if pod, _, _, ok := podinfo.Facts(bare, node); !ok || pod.UID != "u" {
		t.Errorf("bare pod: %+v, %v", pod, ok)
	}
}

func FuzzFacts(f *testing.F) {
	for _, p := range []*corev1.Pod{
		makePod(uidA, "web-0", running(made("main", idA)), initContainers(made("i", idB)), ephemeral(made("e", idC))),
		makePod(uidA, "web-0", mirror(hash), running(made("main", idA))),
	} {
		data, err := json.Marshal(p)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte(`{"metadata":{"uid":"u","annotations":{"kubernetes.io/config.mirror":""}},"spec":{"nodeName":"node-1"}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var p corev1.Pod
		if json.Unmarshal(data, &p) != nil {
			return
		}
		pod, list, _, ok := podinfo.Facts(&p, node)
		again, list2, _, ok2 := podinfo.Facts(podinfo.Strip(&p), node)
		if ok != ok2 || !cmp.Equal(texts(pod.K8sSelectors()), texts(again.K8sSelectors())) || len(list) != len(list2) {
			t.Fatal("a stripped pod says something else")
		}
		if ok && (pod.UID == "" || pod.NodeName != node) {
			t.Fatalf("accepted %+v", pod)
		}
	})
}
