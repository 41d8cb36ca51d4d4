package registration_test

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"github.com/spiffe-node/spiffe-node/pkg/registration"
	"github.com/spiffe-node/spiffe-node/pkg/registration/api/v1alpha1"
)

// TestStatusPace: at most one write in an interval, only of what changed, and
// ever longer pauses when somebody else writes the same status.
func TestStatusPace(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, newFake())
		c := spiffeID("one", 0)
		e.SetNamespace(namespace("a"))
		e.SetNode(node("n1"))
		e.SetSPIFFEID(c)
		start(t, e)
		const key = "ClusterSPIFFEID/one"
		first := e.Queued()[key]
		if first == "" {
			t.Fatal("no status")
		}
		for i := range 5 {
			e.SetPod(pod(fmt.Sprintf("a/p%d", i), "n1"))
			e.Step()
		}
		if got := e.Queued()[key]; got != "" {
			t.Errorf("written again at once: %s", got)
		}
		time.Sleep(time.Second)
		e.Step()
		second := e.Queued()[key]
		if !strings.Contains(second, `"entrySuccess":5`) {
			t.Errorf("status %s", second)
		}
		observe := func(text string) {
			c.Status = v1alpha1.ClusterSPIFFEIDStatus{}
			if err := json.Unmarshal([]byte(text), &c.Status); err != nil {
				t.Fatal(err)
			}
			e.SetSPIFFEID(c)
			e.Step()
		}
		observe(second)
		time.Sleep(time.Hour)
		e.Step()
		if got := e.Queued()[key]; got != "" {
			t.Errorf("written though nothing changed: %s", got)
		}
		writes := 0
		for range 3600 {
			observe(first) // somebody puts it back
			time.Sleep(time.Second)
			e.Step()
			if e.Queued()[key] != "" {
				writes++
			}
		}
		if writes < 2 || writes > 12 {
			t.Errorf("%d writes in an hour of quarrel", writes)
		}
		// The time of a condition is that of its last change.
		accepted := metav1.Condition{}
		for _, c := range e.SPIFFEIDStatus("cr-one").Conditions {
			if c.Type == registration.CondAccepted {
				accepted = c
			}
		}
		if time.Since(accepted.LastTransitionTime.Time) < time.Hour {
			t.Errorf("condition changed at %s", accepted.LastTransitionTime)
		}
	})
}

// TestStatusEcho: what the API server still shows of the status before is not
// taken for somebody else's, and the next status does not wait for it.
func TestStatusEcho(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, newFake())
		c := spiffeID("one", 0)
		e.SetNamespace(namespace("a"))
		e.SetNode(node("n1"))
		e.SetSPIFFEID(c)
		start(t, e)
		const key = "ClusterSPIFFEID/one"
		if e.Queued()[key] == "" {
			t.Fatal("no status")
		}
		time.Sleep(time.Second)
		e.SetSPIFFEID(c) // as it was before
		e.Step()
		if got := e.Queued()[key]; got != "" {
			t.Errorf("written again before it could be seen: %s", got)
		}
		e.SetPod(pod("a/p", "n1"))
		e.Step()
		if got := e.Queued()[key]; !strings.Contains(got, `"entrySuccess":1`) {
			t.Errorf("the next status waits: %q", got)
		}
		// If the old one is all that ever shows, it is written again.
		e.SetSPIFFEID(c)
		e.Step()
		if got := e.Queued()[key]; got != "" {
			t.Errorf("written again before it could be seen: %s", got)
		}
		time.Sleep(time.Minute)
		e.Step()
		if got := e.Queued()[key]; !strings.Contains(got, `"entrySuccess":1`) {
			t.Errorf("a status that was lost is not repeated: %q", got)
		}
	})
}

// TestMissingCRDs: without them nothing happens, and nothing ends.
func TestMissingCRDs(t *testing.T) {
	t.Parallel()
	f, cfg := newFakeServer(t)
	f.missing["clusterspiffeids"] = true
	c := &cluster{t, cfg, dynamicClient(t, cfg)}
	a := openAuthority(t)
	r, _ := startRegistrar(t, c, a)
	c.create("clusterstaticentries", "{apiVersion: spire.spiffe.io/v1alpha1, kind: ClusterStaticEntry, metadata: {name: vm}, spec: {spiffeID: 'spiffe://example.org/vm', parentID: 'spiffe://example.org/spire/agent/x', selectors: ['unix:uid:0']}}")
	time.Sleep(300 * time.Millisecond)
	if r.Synced() || a.Set().Len() != 0 {
		t.Error("wrote entries without having seen everything")
	}
	f.mu.Lock()
	f.missing["clusterspiffeids"] = false
	f.mu.Unlock()
	eventually(t, "CRDs installed", []string{"/vm <- /spire/agent/x unix:uid:0"}, func() []string { return showAll(a.Set()) })
}

// TestServerAway: the API server's absence changes nothing.
func TestServerAway(t *testing.T) {
	t.Parallel()
	a := openAuthority(t)
	c := &cluster{t, &rest.Config{Host: "http://127.0.0.1:1"}, nil}
	r, stop := startRegistrar(t, c, a)
	time.Sleep(50 * time.Millisecond)
	if r.Synced() {
		t.Error("synced")
	}
	stop()
}

func TestNewRefuses(t *testing.T) {
	t.Parallel()
	_, err := registration.New(registration.Config{ParentTemplate: "{{ .PodMeta.Name }}", IgnoreNamespaces: []string{"("}, StatusInterval: -1})
	if err == nil {
		t.Fatal("no error")
	}
	for _, part := range []string{"missing Client", "missing Authority", "missing TrustDomain", "missing ClusterName", "StatusInterval", "parentIDTemplate", "IgnoreNamespaces"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q lacks %q", err, part)
		}
	}
	a := newFake()
	cfg := testConfig(t, a)
	cfg.ParentTemplate = "no ID"
	if _, err := registration.New(cfg); err == nil {
		t.Error("a parent that is no ID: no error")
	}
}

func TestIgnoredNamespaces(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]int{"kube-system": 0, "my-kube-system": 1, "openshift-x": 0, "xopenshift-": 1} {
		a := newFake()
		e := newEngine(t, a, func(c *registration.Config) { c.IgnoreNamespaces = []string{"kube-system", "openshift-.*"} })
		e.SetNamespace(namespace(name))
		e.SetNode(node("n1"))
		e.SetSPIFFEID(spiffeID("one", 0))
		e.SetPod(pod(name+"/p", "n1"))
		start(t, e)
		if got := a.Set().Len(); got != want {
			t.Errorf("%s: %d entries", name, got)
		}
	}
}

func TestParentTemplate(t *testing.T) {
	t.Parallel()
	a := newFake()
	e := newEngine(t, a, func(c *registration.Config) {
		c.ParentTemplate = "spiffe://{{ .TrustDomain }}/node/{{ .NodeMeta.Labels.zone }}/{{ .NodeMeta.Name }}"
	})
	e.SetNamespace(namespace("a"))
	e.SetNode(node("n1"))
	bare := node("n2")
	bare.Labels = nil
	e.SetNode(bare)
	e.SetSPIFFEID(spiffeID("one", 0))
	e.SetPod(pod("a/p", "n1"))
	e.SetPod(pod("a/q", "n2"))
	start(t, e)
	check(t, a, "/ns/a/sa/sa-p <- /node/z-n1/n1 k8s:pod-uid:uid-a-p")
	if got := condition(e.SPIFFEIDStatus("cr-one").Conditions, registration.CondEntriesSet); !strings.Contains(got, "a/q: parentIDTemplate: a label") {
		t.Error(got)
	}
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	reg := prometheus.NewRegistry()
	e := newEngine(t, newFake(), func(c *registration.Config) { c.Metrics = registration.NewMetrics(reg) })
	e.SetNamespace(namespace("a"))
	e.SetNode(node("n1"))
	e.SetSPIFFEID(spiffeID("one", 0))
	e.SetSPIFFEID(spiffeID("bad", 0, func(s *v1alpha1.ClusterSPIFFEIDSpec) { s.SPIFFEIDTemplate = "" }))
	e.SetPod(pod("a/p", "n1"))
	start(t, e)
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string]float64)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := f.GetName()
			for _, l := range m.GetLabel() {
				name += " " + l.GetValue()
			}
			got[name] = m.GetGauge().GetValue() + m.GetCounter().GetValue()
		}
	}
	for name, want := range map[string]float64{
		"spiffe_node_registration_pods": 1, "spiffe_node_registration_synced": 1, "spiffe_node_registration_entry_changes_total create": 1,
		"spiffe_node_registration_resources ClusterSPIFFEID valid": 1, "spiffe_node_registration_resources ClusterSPIFFEID refused": 1,
	} {
		if got[name] != want {
			t.Errorf("%s = %v, want %v", name, got[name], want)
		}
	}
}

// TestCRDsAndTypes: every field of the Go types is in the schema and the
// reverse.
func TestCRDsAndTypes(t *testing.T) {
	t.Parallel()
	for _, text := range crdFiles(t) {
		crd := parseYAML(t, text)
		kind := dig(crd, "spec", "names", "kind").(string)
		version := dig(crd, "spec", "versions").([]any)[0].(map[string]any)
		properties := dig(version, "schema", "openAPIV3Schema", "properties").(map[string]any)
		for _, part := range []string{"spec", "status"} {
			want := jsonFields(t, kind, part)
			for name := range dig(properties, part, "properties").(map[string]any) {
				if !want[name] {
					t.Errorf("%s.%s.%s is not in the Go type", kind, part, name)
				}
				delete(want, name)
			}
			for name := range want {
				t.Errorf("%s.%s.%s is not in the schema", kind, part, name)
			}
		}
	}
}

func parseYAML(t *testing.T, text string) map[string]any {
	t.Helper()
	var out map[string]any
	if err := yaml.Unmarshal([]byte(text), &out); err != nil {
		t.Fatal(err)
	}
	return out
}

func dig(o map[string]any, path ...string) any {
	var v any = o
	for _, p := range path {
		v = v.(map[string]any)[p]
	}
	return v
}

// jsonFields are the names of a Go type's fields.
func jsonFields(t *testing.T, kind, part string) map[string]bool {
	t.Helper()
	types := map[string]reflect.Type{
		"ClusterSPIFFEID": reflect.TypeFor[v1alpha1.ClusterSPIFFEID](), "ClusterStaticEntry": reflect.TypeFor[v1alpha1.ClusterStaticEntry](),
		"ClusterFederatedTrustDomain": reflect.TypeFor[v1alpha1.ClusterFederatedTrustDomain](),
	}
	field, ok := types[kind].FieldByName(strings.ToUpper(part[:1]) + part[1:])
	if !ok {
		t.Fatalf("%s has no %s", kind, part)
	}
	out := make(map[string]bool)
	for f := range field.Type.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		out[name] = true
	}
	return out
}
