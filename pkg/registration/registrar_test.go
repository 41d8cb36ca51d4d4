package registration_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/registration"
)

var getOptions metav1.GetOptions

func gvr(resource string) schema.GroupVersionResource {
	switch {
	case resource == "customresourcedefinitions":
		return schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: resource}
	case strings.HasPrefix(resource, "cluster"):
		return schema.GroupVersionResource{Group: "spire.spiffe.io", Version: "v1alpha1", Resource: resource}
	case resource == "endpointslices":
		return schema.GroupVersionResource{Group: "discovery.k8s.io", Version: "v1", Resource: resource}
	default:
		return schema.GroupVersionResource{Version: "v1", Resource: resource}
	}
}

func dynamicClient(tb testing.TB, cfg *rest.Config) dynamic.Interface {
	tb.Helper()
	cfg = rest.CopyConfig(cfg)
	cfg.QPS = -1
	k, err := dynamic.NewForConfig(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	return k
}

// cluster is an API server, real or not.
type cluster struct {
	tb  testing.TB
	cfg *rest.Config
	k   dynamic.Interface
}

func (c *cluster) in(resource, namespace string) dynamic.ResourceInterface {
	if namespace == "" {
		return c.k.Resource(gvr(resource))
	}
	return c.k.Resource(gvr(resource)).Namespace(namespace)
}

// create makes an object from YAML and returns its UID.
func (c *cluster) create(resource, text string) string {
	c.tb.Helper()
	out, err := c.tryCreate(resource, text)
	if err != nil {
		c.tb.Fatalf("create %s: %v\n%s", resource, err, text)
	}
	return string(out.GetUID())
}

func (c *cluster) tryCreate(resource, text string) (*unstructured.Unstructured, error) {
	c.tb.Helper()
	var u unstructured.Unstructured
	if err := yaml.Unmarshal([]byte(text), &u.Object); err != nil {
		c.tb.Fatalf("%v\n%s", err, text)
	}
	return c.in(resource, u.GetNamespace()).Create(c.tb.Context(), &u, metav1.CreateOptions{})
}

func (c *cluster) edit(resource, namespace, name string, edit func(o *unstructured.Unstructured), sub ...string) {
	c.tb.Helper()
	for range 20 {
		u, err := c.in(resource, namespace).Get(c.tb.Context(), name, getOptions)
		if err != nil {
			c.tb.Fatal(err)
		}
		edit(u)
		if _, err = c.in(resource, namespace).Update(c.tb.Context(), u, metav1.UpdateOptions{}, sub...); err == nil {
			return
		} else if !strings.Contains(err.Error(), "modified") {
			c.tb.Fatal(err)
		}
	}
	c.tb.Fatal("conflict after conflict")
}

func (c *cluster) remove(resource, namespace, name string) {
	c.tb.Helper()
	var now int64
	if err := c.in(resource, namespace).Delete(c.tb.Context(), name, metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
		c.tb.Fatal(err)
	}
}

func (c *cluster) status(resource, name string) string {
	c.tb.Helper()
	u, err := c.in(resource, "").Get(c.tb.Context(), name, getOptions)
	if err != nil {
		c.tb.Fatal(err)
	}
	text, err := json.Marshal(u.Object["status"])
	if err != nil {
		c.tb.Fatal(err)
	}
	return string(text)
}

// eventually waits until f gives want.
func eventually(tb testing.TB, what string, want []string, f func() []string) {
	tb.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		got := f()
		if slices.Equal(got, want) {
			return
		}
		if time.Now().After(deadline) {
			tb.Fatalf("%s (-want +got):\n%s", what, cmp.Diff(want, got))
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// contains waits until f's text has all parts.
func contains(tb testing.TB, f func() string, parts ...string) {
	tb.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		got := f()
		missing := slices.DeleteFunc(slices.Clone(parts), func(p string) bool { return strings.Contains(got, p) })
		if len(missing) == 0 {
			return
		}
		if time.Now().After(deadline) {
			tb.Fatalf("%s\nlacks %q", got, missing)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func openAuthority(tb testing.TB) *embedded.Authority {
	tb.Helper()
	a, err := embedded.Open(embedded.Config{TrustDomain: td, StatePath: filepath.Join(tb.TempDir(), "state", "authority.db")})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := a.Close(); err != nil {
			tb.Error(err)
		}
	})
	return a
}

// startRegistrar runs one until the returned function is called.
func startRegistrar(tb testing.TB, c *cluster, a registration.Authority, edit ...func(*registration.Config)) (*registration.Registrar, func()) {
	tb.Helper()
	cfg := testConfig(tb, a)
	cfg.Client, cfg.StatusInterval = c.cfg, 10*time.Millisecond
	for _, f := range edit {
		f(&cfg)
	}
	r, err := registration.New(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	stopped := false
	stop := func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			tb.Error(err)
		}
	}
	tb.Cleanup(stop)
	return r, stop
}

func podYAML(ns, name, node, labels string) string {
	text := fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {namespace: %s, name: %s, labels: {%s}}\nspec:\n  serviceAccountName: sa-%s\n  containers: [{name: main, image: img}]\n", ns, name, labels, name)
	if node != "" {
		text += "  nodeName: " + node + "\n"
	}
	return text
}

// TestCluster is one story, against a fake API server and against a real one.
func TestCluster(t *testing.T) {
	t.Run("fake", func(t *testing.T) {
		_, cfg := newFakeServer(t)
		story(t, &cluster{t, cfg, dynamicClient(t, cfg)})
	})
	t.Run("real", func(t *testing.T) {
		cfg := realServer(t)
		c := &cluster{t, cfg, dynamicClient(t, cfg)}
		c.installCRDs()
		t.Run("refusals", func(t *testing.T) { refusals(t, &cluster{t, c.cfg, c.k}) })
		story(t, c)
	})
}

func (c *cluster) installCRDs() {
	c.tb.Helper()
	for _, text := range crdFiles(c.tb) {
		c.create("customresourcedefinitions", text)
	}
	for _, resource := range []string{"clusterspiffeids", "clusterstaticentries", "clusterfederatedtrustdomains"} {
		eventually(c.tb, resource, []string{"ok"}, func() []string {
			if _, err := c.in(resource, "").List(c.tb.Context(), metav1.ListOptions{}); err != nil {
				return []string{err.Error()}
			}
			return []string{"ok"}
		})
	}
}

func crdFiles(tb testing.TB) []string {
	tb.Helper()
	files, err := filepath.Glob("../../deploy/helm/spiffe-node-crds/files/*.yaml")
	if err != nil || len(files) != 3 {
		tb.Fatal(files, err)
	}
	var out []string
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			tb.Fatal(err)
		}
		out = append(out, string(bytes.TrimSpace(text)))
	}
	return out
}

func story(t *testing.T, c *cluster) {
	t.Helper()
	a := openAuthority(t)
	r, stop := startRegistrar(t, c, a)
	entries := func() []string { return showAll(a.Set()) }
	c.create("namespaces", "{apiVersion: v1, kind: Namespace, metadata: {name: shop}}")
	node := c.create("nodes", "{apiVersion: v1, kind: Node, metadata: {name: n1}}")
	c.create("clusterspiffeids", seed(t, "istio-sidecar-reg.yaml"))
	c.create("clusterspiffeids", seed(t, "istio-gateway-reg.yaml"))
	c.create("clusterspiffeids", "{apiVersion: spire.spiffe.io/v1alpha1, kind: ClusterSPIFFEID, metadata: {name: broken}, spec: {spiffeIDTemplate: 'spiffe://example.org/{{ .PodMeta.Nope }}'}}")
	contains(t, func() string { return c.status("clusterspiffeids", "broken") }, `"type":"Accepted"`, `"status":"False"`, "can't evaluate field Nope")

	managed := "spiffe.io/spire-managed-identity: 'true'"
	uid := c.create("pods", podYAML("shop", "p", "", managed))
	idle := c.create("pods", podYAML("shop", "q", "n1", ""))
	contains(t, func() string { return c.status("clusterspiffeids", "istio-sidecar-reg") }, `"podsSelected":1`, `"entriesToSet":0`, `"podEntryRenderFailures":0`)
	start := time.Now()
	c.bind("shop", "p", "n1")
	want := fmt.Sprintf("/ns/shop/sa/sa-p <- demo/%s k8s:ns:shop,k8s:pod-uid:%s,k8s:sa:sa-p", node, uid)
	eventually(t, "scheduled", []string{want}, entries)
	t.Logf("bound to stored: %s", time.Since(start))
	if !r.Synced() {
		t.Error("not synced")
	}
	contains(t, func() string { return c.status("clusterspiffeids", "istio-sidecar-reg") }, `"entriesToSet":1`, `"entrySuccess":1`, `"observedGeneration":1`, `"type":"EntriesSet"`)

	// A label makes the other pod one of them, at once.
	c.edit("pods", "shop", "q", func(o *unstructured.Unstructured) {
		o.SetLabels(map[string]string{"spiffe.io/spire-managed-identity": "true"})
	})
	other := strings.NewReplacer("sa-p", "sa-q", uid, idle).Replace(want)
	eventually(t, "labelled", sorted(want, other), entries)
	c.edit("clusterspiffeids", "", "istio-sidecar-reg", func(o *unstructured.Unstructured) {
		_ = unstructured.SetNestedField(o.Object, "1h", "spec", "ttl")
	})
	eventually(t, "edited", sorted(want+" ttl=1h0m0s/0s", other+" ttl=1h0m0s/0s"), entries)

	c.create("clusterstaticentries", "{apiVersion: spire.spiffe.io/v1alpha1, kind: ClusterStaticEntry, metadata: {name: vm}, spec: {spiffeID: 'spiffe://example.org/vm', parentID: 'spiffe://example.org/spire/agent/x', selectors: ['unix:uid:0']}}")
	contains(t, func() string { return c.status("clusterstaticentries", "vm") }, `"rendered":true`, `"masked":false`, `"set":true`)

	// Gone while nobody looks; found at the restart.
	stop()
	set := a.Set()
	c.remove("pods", "shop", "q")
	_, stop = startRegistrar(t, c, a)
	eventually(t, "restarted", sorted(want+" ttl=1h0m0s/0s", "/vm <- /spire/agent/x unix:uid:0"), entries)
	if delta, ok := a.Set().Since(set); !ok || len(delta.Changed) > 0 || len(delta.Removed) != 1 {
		t.Errorf("the restart changed %d entries and removed %d", len(delta.Changed), len(delta.Removed))
	}
	c.edit("pods", "shop", "p", func(o *unstructured.Unstructured) {
		_ = unstructured.SetNestedField(o.Object, "Succeeded", "status", "phase")
	}, "status")
	eventually(t, "finished", []string{"/vm <- /spire/agent/x unix:uid:0"}, entries)
	c.remove("clusterstaticentries", "", "vm")
	eventually(t, "empty", []string{}, entries)
	stop()
}

// bind schedules a pod as the scheduler does.
func (c *cluster) bind(namespace, name, node string) {
	c.tb.Helper()
	if _, fake := strings.CutPrefix(c.cfg.Host, "http://"); fake {
		c.edit("pods", namespace, name, func(o *unstructured.Unstructured) {
			_ = unstructured.SetNestedField(o.Object, node, "spec", "nodeName")
		})
		return
	}
	b := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "v1", "kind": "Binding", "metadata": map[string]any{"name": name, "namespace": namespace},
		"target": map[string]any{"apiVersion": "v1", "kind": "Node", "name": node},
	}}
	if _, err := c.in("pods", namespace).Create(c.tb.Context(), b, metav1.CreateOptions{}, "binding"); err != nil && !strings.Contains(err.Error(), "name") {
		c.tb.Fatal(err)
	}
}

func sorted(list ...string) []string {
	slices.Sort(list)
	return list
}

func seed(tb testing.TB, name string) string {
	tb.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		tb.Fatal(err)
	}
	return string(text)
}
