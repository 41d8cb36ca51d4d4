package registration_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/registration"
	"github.com/spiffe-node/spiffe-node/pkg/registration/api/v1alpha1"
)

func check(t *testing.T, a *fakeAuthority, want ...string) {
	t.Helper()
	if want == nil {
		want = []string{}
	}
	if diff := cmp.Diff(want, showAll(a.Set())); diff != "" {
		t.Errorf("entries (-want +got):\n%s", diff)
	}
}

// world is two namespaces, two nodes and a pod on the first.
func world(t *testing.T) (*registration.Engine, *fakeAuthority) {
	t.Helper()
	a := newFake()
	e := newEngine(t, a)
	e.SetNamespace(namespace("a", "team", "x"))
	e.SetNamespace(namespace("b"))
	e.SetNamespace(namespace("kube-system"))
	e.SetNode(node("n1"))
	e.SetNode(node("n2"))
	start(t, e)
	return e, a
}

const entryP = "/ns/a/sa/sa-p <- demo/node-uid-n1 k8s:pod-uid:uid-a-p"

func TestPodLifecycle(t *testing.T) {
	t.Parallel()
	e, a := world(t)
	e.SetSPIFFEID(spiffeID("one", 0))
	e.SetPod(pod("a/p", ""))
	e.Step()
	check(t, a)
	e.SetPod(pod("a/p", "n1"))
	e.Step()
	check(t, a, entryP)
	id := registration.EntryID("cr-one", "uid-a-p")
	if _, ok := a.Set().Get(id); !ok || !registration.Owns(id) {
		t.Errorf("no entry %s", id)
	}
	// What templates do not see changes nothing.
	writes := a.total()
	p := pod("a/p", "n1")
	p.ResourceVersion, p.Status.Phase = "2", corev1.PodRunning
	e.SetPod(p)
	e.Step()
	if a.total() != writes {
		t.Error("a change of status led to a write")
	}
	// A terminating pod keeps its identity, a finished one does not.
	p.DeletionTimestamp = &metav1.Time{Time: epoch}
	e.SetPod(p)
	e.Step()
	check(t, a, entryP)
	p.Status.Phase = corev1.PodSucceeded
	e.SetPod(p)
	e.Step()
	check(t, a)
	// A successor of the name, seen as an update.
	e.SetPod(pod("a/p", "n1"))
	e.Step()
	p = pod("a/p", "n2")
	p.UID = "other"
	e.SetPod(p)
	e.Step()
	check(t, a, "/ns/a/sa/sa-p <- demo/node-uid-n2 k8s:pod-uid:other")
	e.DeletePod("a/p")
	e.Step()
	check(t, a)
	for what, n := range e.Sizes() {
		if n != 0 && what != "namespaces" && what != "nodes" && what != "statusNext" && what != "said" {
			t.Errorf("%s: %d left", what, n)
		}
	}
}

// TestFieldsKeepTheEntry: while only fields change, IDs included, the entry
// stays the same one.
func TestFieldsKeepTheEntry(t *testing.T) {
	t.Parallel()
	e, a := world(t)
	c := spiffeID("one", 0)
	e.SetSPIFFEID(c)
	e.SetPod(pod("a/p", "n1", "app", "x"))
	e.Step()
	for i, edit := range []func(){
		func() { c.Spec.SPIFFEIDTemplate = "spiffe://example.org/{{ .PodMeta.Labels.app }}" },
		func() { c.Spec.WorkloadSelectorTemplates = []string{"k8s:ns:{{ .PodMeta.Namespace }}"} },
		func() { c.Spec.TTL, c.Spec.JWTTTL, c.Spec.Hint, c.Spec.Admin = "90m", "1m30.5s", "h", true },
		func() {
			c.Spec.DNSNameTemplates, c.Spec.Downstream = []string{"{{ .PodMeta.Name }}.example", "{{ .PodMeta.Name }}.example"}, true
		},
		func() { c.Spec.Fallback = true },
	} {
		edit()
		c.Generation++
		e.SetSPIFFEID(c)
		e.Step()
		if n := a.Set().Len(); n != 1 {
			t.Fatalf("step %d: %d entries", i, n)
		}
		if _, ok := a.Set().Get(registration.EntryID("cr-one", "uid-a-p")); !ok {
			t.Fatalf("step %d: another entry", i)
		}
	}
	check(t, a, "/x <- demo/node-uid-n1 k8s:ns:a,k8s:pod-uid:uid-a-p dns=p.example ttl=1h30m0s/1m30s admin downstream fallback hint=h")
	if a.writes["create"] != 1 || a.writes["delete"] != 0 || a.writes["update"] != 5 {
		t.Errorf("writes: %v", a.writes)
	}
	e.SetPod(pod("a/p", "n1", "app", "y"))
	e.Step()
	check(t, a, "/y <- demo/node-uid-n1 k8s:ns:a,k8s:pod-uid:uid-a-p dns=p.example ttl=1h30m0s/1m30s admin downstream fallback hint=h")
	// The label is gone: there is no such identity any more.
	e.SetPod(pod("a/p", "n1"))
	e.Step()
	check(t, a)
	if got := condition(e.SPIFFEIDStatus("cr-one").Conditions, registration.CondEntriesSet); !strings.Contains(got, "False RenderFailed 1 pod get no entry, among them a/p: spiffeIDTemplate: a label") {
		t.Error(got)
	}
}

func TestSelectors(t *testing.T) {
	t.Parallel()
	e, a := world(t)
	c := spiffeID("one", 0, func(s *v1alpha1.ClusterSPIFFEIDSpec) {
		s.NamespaceSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"team": "x"}}
		s.PodSelector = &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "app", Operator: metav1.LabelSelectorOpExists}}}
	})
	e.SetSPIFFEID(c)
	e.SetPod(pod("a/p", "n1", "app", "x"))
	e.SetPod(pod("a/q", "n1"))
	e.SetPod(pod("b/p", "n1", "app", "x"))
	e.SetPod(pod("kube-system/p", "n1", "app", "x"))
	e.Step()
	check(t, a, entryP)
	e.SetNamespace(namespace("b", "team", "x"))
	e.SetNamespace(namespace("kube-system", "team", "x"))
	e.SetPod(pod("a/q", "n1", "app", "x"))
	e.Step()
	check(t, a, entryP, "/ns/a/sa/sa-q <- demo/node-uid-n1 k8s:pod-uid:uid-a-q", "/ns/b/sa/sa-p <- demo/node-uid-n1 k8s:pod-uid:uid-b-p")
	got := e.SPIFFEIDStatus("cr-one").Stats
	want := v1alpha1.ClusterSPIFFEIDStats{NamespacesSelected: 3, NamespacesIgnored: 1, PodsSelected: 3, EntriesToSet: 3, EntrySuccess: 3}
	if got != want {
		t.Errorf("stats %+v, want %+v", got, want)
	}
	e.SetNamespace(namespace("b"))
	e.DeleteNamespace("kube-system")
	e.SetPod(pod("a/q", "n1"))
	e.Step()
	check(t, a, entryP)
	want = v1alpha1.ClusterSPIFFEIDStats{NamespacesSelected: 1, PodsSelected: 1, EntriesToSet: 1, EntrySuccess: 1}
	if got := e.SPIFFEIDStatus("cr-one").Stats; got != want {
		t.Errorf("stats %+v, want %+v", got, want)
	}
	e.DeleteSPIFFEID("one")
	e.Step()
	check(t, a)
}

func TestFallback(t *testing.T) {
	t.Parallel()
	e, a := world(t)
	const def, own = "/def/p <- demo/node-uid-n1 k8s:pod-uid:uid-a-p fallback", "/own/x <- demo/node-uid-n1 k8s:pod-uid:uid-a-p"
	fallback := spiffeID("default", 0, func(s *v1alpha1.ClusterSPIFFEIDSpec) {
		s.SPIFFEIDTemplate, s.Fallback = "spiffe://example.org/def/{{ .PodMeta.Name }}", true
	})
	main := spiffeID("main", 1, func(s *v1alpha1.ClusterSPIFFEIDSpec) {
		s.SPIFFEIDTemplate = "spiffe://example.org/own/{{ .PodMeta.Labels.app }}"
		s.PodSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"managed": "true"}}
	})
	e.SetSPIFFEID(fallback)
	e.SetPod(pod("a/p", "n1"))
	e.Step()
	check(t, a, def)
	e.SetSPIFFEID(main)
	e.SetPod(pod("a/p", "n1", "managed", "true", "app", "x"))
	e.Step()
	check(t, a, own)
	// A failure to render does not suppress the fallback.
	e.SetPod(pod("a/p", "n1", "managed", "true"))
	e.Step()
	check(t, a, def)
	e.SetPod(pod("a/p", "n1", "managed", "true", "app", "x"))
	main.Spec.Fallback, main.Generation = true, 2
	e.SetSPIFFEID(main)
	e.Step()
	check(t, a, def, own+" fallback")
	main.Spec.Fallback, main.Generation = false, 3
	e.SetSPIFFEID(main)
	e.Step()
	check(t, a, own)
	e.DeleteSPIFFEID("main")
	e.Step()
	check(t, a, def)
}

// TestMasking: the oldest of several resources that declare one entry has it;
// when it goes, the next takes over the entry itself.
func TestMasking(t *testing.T) {
	t.Parallel()
	e, a := world(t)
	hint := func(h string) func(*v1alpha1.ClusterSPIFFEIDSpec) {
		return func(s *v1alpha1.ClusterSPIFFEIDSpec) { s.Hint = h }
	}
	e.SetSPIFFEID(spiffeID("young", 2, hint("young")))
	e.SetPod(pod("a/p", "n1"))
	e.Step()
	check(t, a, entryP+" hint=young")
	e.SetSPIFFEID(spiffeID("old", 1, hint("old")))
	e.Step()
	check(t, a, entryP+" hint=old")
	if got := e.SPIFFEIDStatus("cr-young"); got.Stats.EntriesMasked != 1 || got.Stats.EntriesToSet != 0 || got.Stats.EntrySuccess != 0 ||
		condition(got.Conditions, registration.CondEntriesSet) != "True SomeMasked 1 entry declared by an older resource too" {
		t.Errorf("status %+v", got)
	}
	// The old one turns to another identity; the entry it leaves is needed.
	old := spiffeID("old", 1, func(s *v1alpha1.ClusterSPIFFEIDSpec) { s.SPIFFEIDTemplate = "spiffe://example.org/else" })
	old.Generation = 2
	present := true
	a.onSet = func(s *entry.Set) {
		present = present && strings.Contains(strings.Join(showAll(s), "\n"), entryP)
	}
	e.SetSPIFFEID(old)
	e.Step()
	check(t, a, "/else <- demo/node-uid-n1 k8s:pod-uid:uid-a-p", entryP+" hint=young")
	e.DeleteSPIFFEID("old")
	e.Step()
	check(t, a, entryP+" hint=young")
	if !present {
		t.Error("an identity that stays was missing in between")
	}
	e.DeleteSPIFFEID("young")
	e.Step()
	check(t, a)
}

func TestNodes(t *testing.T) {
	t.Parallel()
	e, a := world(t)
	e.SetSPIFFEID(spiffeID("one", 0))
	e.SetPod(pod("a/p", "n3"))
	e.Step()
	check(t, a) // its node is not known yet
	if got := e.SPIFFEIDStatus("cr-one").Stats; got.PodEntryRenderFailures != 0 || got.PodsSelected != 1 {
		t.Errorf("stats %+v", got)
	}
	e.SetNode(node("n3"))
	e.Step()
	check(t, a, "/ns/a/sa/sa-p <- demo/node-uid-n3 k8s:pod-uid:uid-a-p")
	// The node is deleted: its agent is who it was. It comes back as another.
	e.DeleteNode("n3")
	e.Step()
	check(t, a, "/ns/a/sa/sa-p <- demo/node-uid-n3 k8s:pod-uid:uid-a-p")
	n := node("n3")
	n.UID = "new"
	e.SetNode(n)
	e.Step()
	check(t, a, "/ns/a/sa/sa-p <- demo/new k8s:pod-uid:uid-a-p")
	if a.writes["delete"] != 0 {
		t.Errorf("writes: %v", a.writes)
	}
	e.DeletePod("a/p")
	e.DeleteNode("n3")
	e.Step()
	if n := e.Sizes()["nodes"]; n != 2 {
		t.Errorf("%d nodes known", n)
	}
}

func TestServiceNames(t *testing.T) {
	t.Parallel()
	e, a := world(t)
	e.SetSPIFFEID(spiffeID("one", 0, func(s *v1alpha1.ClusterSPIFFEIDSpec) {
		s.AutoPopulateDNSNames, s.DNSNameTemplates = true, []string{"first.example", "web.a"}
	}))
	p := pod("a/p", "n1")
	e.SetSlice(slice("a", "web", "web-1", p))
	e.SetSlice(slice("a", "web", "web-2", p))
	e.SetSlice(slice("b", "foreign", "foreign-1", p))
	e.SetSlice(slice("a", "", "loose", p))
	e.SetPod(p)
	e.Step()
	const web = " dns=first.example,web.a,web,web.a.svc,web.a.svc.cluster.local"
	check(t, a, entryP+web)
	e.SetSlice(slice("a", "api", "api-1", p))
	e.Step()
	check(t, a, entryP+" dns=first.example,web.a,api,api.a,api.a.svc,api.a.svc.cluster.local,web,web.a.svc,web.a.svc.cluster.local")
	e.SetSlice(slice("a", "api", "api-1"))
	e.DeleteSlice("a/web-1")
	e.Step()
	check(t, a, entryP+web)
	e.DeleteSlice("a/web-2")
	e.DeleteSlice("a/loose")
	e.DeleteSlice("b/foreign-1")
	e.DeleteSlice("a/api-1")
	e.Step()
	check(t, a, entryP+" dns=first.example,web.a")
	if s := e.Sizes(); s["services"] != 0 || s["slices"] != 0 {
		t.Errorf("left over: %v", s)
	}
}

// TestRefusedKeepsLastValid: a mistake does not take identities away.
func TestRefusedKeepsLastValid(t *testing.T) {
	t.Parallel()
	e, a := world(t)
	c := spiffeID("one", 0)
	e.SetSPIFFEID(c)
	e.SetSPIFFEID(spiffeID("other", 1, func(s *v1alpha1.ClusterSPIFFEIDSpec) { s.SPIFFEIDTemplate = "spiffe://example.org/{{ bad" }))
	e.SetPod(pod("a/p", "n1"))
	e.Step()
	check(t, a, entryP)
	c.Spec.SPIFFEIDTemplate, c.Spec.TTL, c.Generation = "spiffe://example.org/{{ .PodMeta.Nmae }}", "-1h", 2
	e.SetSPIFFEID(c)
	e.SetPod(pod("a/q", "n1"))
	e.Step()
	check(t, a, entryP, "/ns/a/sa/sa-q <- demo/node-uid-n1 k8s:pod-uid:uid-a-q")
	got := condition(e.SPIFFEIDStatus("cr-one").Conditions, registration.CondAccepted)
	for _, part := range []string{"False Invalid generation 1 stays in force", "can't evaluate field Nmae", "ttl: -1h is negative"} {
		if !strings.Contains(got, part) {
			t.Errorf("condition %q lacks %q", got, part)
		}
	}
	if got := condition(e.SPIFFEIDStatus("cr-other").Conditions, registration.CondAccepted); !strings.HasPrefix(got, "False Invalid spiffeIDTemplate:") {
		t.Error(got)
	}

	// A restart with the mistake in place keeps what is there, until the pod
	// goes or the mistake is mended.
	e2 := newEngine(t, a)
	for _, n := range []string{"a", "b"} {
		e2.SetNamespace(namespace(n))
	}
	e2.SetNode(node("n1"))
	e2.SetSPIFFEID(c)
	e2.SetPod(pod("a/p", "n1"))
	e2.SetPod(pod("a/q", "n1"))
	start(t, e2)
	check(t, a, entryP, "/ns/a/sa/sa-q <- demo/node-uid-n1 k8s:pod-uid:uid-a-q")
	e2.DeletePod("a/q")
	e2.Step()
	check(t, a, entryP)
	c.Spec.SPIFFEIDTemplate, c.Spec.TTL, c.Generation = "spiffe://example.org/{{ .PodMeta.Name }}", "", 3
	deletes := a.writes["delete"]
	e2.SetSPIFFEID(c)
	e2.Step()
	check(t, a, "/p <- demo/node-uid-n1 k8s:pod-uid:uid-a-p")
	if a.writes["delete"] != deletes {
		t.Error("the entry was replaced, not updated")
	}
}

func TestClasses(t *testing.T) {
	t.Parallel()
	a := newFake()
	e := newEngine(t, a, func(c *registration.Config) { c.ClassName = "ours" })
	e.SetNamespace(namespace("a"))
	e.SetNode(node("n1"))
	e.SetPod(pod("a/p", "n1"))
	class := func(name, class string) *v1alpha1.ClusterSPIFFEID {
		return spiffeID(name, 0, func(s *v1alpha1.ClusterSPIFFEIDSpec) {
			s.ClassName, s.SPIFFEIDTemplate = class, "spiffe://example.org/"+name
		})
	}
	e.SetSPIFFEID(class("none", ""))
	e.SetSPIFFEID(class("mine", "ours"))
	e.SetSPIFFEID(class("theirs", "spire-spire"))
	start(t, e)
	const of = " <- demo/node-uid-n1 k8s:pod-uid:uid-a-p"
	check(t, a, "/mine"+of, "/none"+of)
	e.Queued()
	e.SetSPIFFEID(class("mine", "spire-spire"))
	e.SetSPIFFEID(class("theirs", ""))
	e.Step()
	check(t, a, "/none"+of, "/theirs"+of)
	if _, written := e.Queued()["ClusterSPIFFEID/mine"]; written {
		t.Error("status of another controller's resource written")
	}
}

// TestOthersEntries: what others write stays, what they do to ours does not.
func TestOthersEntries(t *testing.T) {
	t.Parallel()
	e, a := world(t)
	manual := &entry.Entry{SPIFFEID: spiffeid.RequireFromPath(td, "/manual"), ParentID: spiffeid.RequireFromPath(td, "/spire/agent/x"), Selectors: attest.MustSelectors("k8s:pod-uid:uid-a-p")}
	a.CreateEntries(t.Context(), manual)
	const m = "/manual <- /spire/agent/x k8s:pod-uid:uid-a-p"
	e.SetSPIFFEID(spiffeID("one", 0))
	e.SetPod(pod("a/p", "n1"))
	e.Step()
	check(t, a, m, entryP)
	if got := condition(e.SPIFFEIDStatus("cr-one").Conditions, registration.CondOtherRegistrar); !strings.HasPrefix(got, "True ForeignEntries 1 pod") {
		t.Errorf("condition %q", got)
	}
	id := registration.EntryID("cr-one", "uid-a-p")
	a.DeleteEntries(t.Context(), id)
	e.Step()
	e.Step()
	check(t, a, m, entryP)
	ours, _ := a.Set().Get(id)
	changed := ours.Clone()
	changed.Admin = true
	stray := ours.Clone()
	stray.ID, stray.SPIFFEID = registration.EntryID("x", "y"), spiffeid.RequireFromPath(td, "/stray")
	a.mu.Lock()
	a.change([]*entry.Entry{changed, stray}, nil)
	a.mu.Unlock()
	e.Step()
	e.Step()
	check(t, a, m, entryP)
	a.DeleteEntries(t.Context(), "manual-1")
	e.Step()
	if got := condition(e.SPIFFEIDStatus("cr-one").Conditions, registration.CondOtherRegistrar); got != "" {
		t.Errorf("condition %q", got)
	}
	// A manual entry in the way is named, and ours follows when it goes.
	e.DeletePod("a/p")
	e.Step()
	same := ours.Clone()
	same.ID = "by-hand"
	a.CreateEntries(t.Context(), same)
	e.SetPod(pod("a/p", "n1"))
	e.Step()
	if got := condition(e.SPIFFEIDStatus("cr-one").Conditions, registration.CondEntriesSet); !strings.Contains(got, "False WriteFailed 1 entry cannot be written, among them that of pod a/p: entry by-hand, which was written by somebody else") {
		t.Errorf("condition %q", got)
	}
	a.DeleteEntries(t.Context(), "by-hand")
	e.Step()
	e.Step()
	if _, ok := a.Set().Get(id); !ok {
		t.Error("not written after the other went")
	}
}

func TestWritesThatFail(t *testing.T) {
	t.Parallel()
	e, a := world(t)
	a.fail = errors.New("disk is full")
	e.SetSPIFFEID(spiffeID("one", 0))
	e.SetPod(pod("a/p", "n1"))
	e.Step()
	check(t, a)
	if got := e.SPIFFEIDStatus("cr-one").Stats; got.EntryFailures != 1 || got.EntriesToSet != 1 || got.EntrySuccess != 0 {
		t.Errorf("stats %+v", got)
	}
	a.fail = nil
	e.RetryAll()
	check(t, a, entryP)
	a.fail = errors.New("disk is full")
	e.DeletePod("a/p")
	e.Step()
	check(t, a, entryP)
	a.fail = nil
	e.RetryAll()
	check(t, a)
	if s := e.Sizes(); s["retry"] != 0 || s["groups"] != 0 {
		t.Errorf("left over: %v", s)
	}
}
