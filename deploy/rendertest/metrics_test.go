package rendertest_test

import (
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	netv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/spiffe-node/spiffe-node/internal/federation"
	"github.com/spiffe-node/spiffe-node/internal/peersock"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/csi"
	"github.com/spiffe-node/spiffe-node/pkg/sds"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// names is a registerer that only remembers what was registered.
type names struct{ descs []string }

func (n *names) Register(c prometheus.Collector) error { n.MustRegister(c); return nil }
func (n *names) Unregister(prometheus.Collector) bool  { return true }
func (n *names) MustRegister(cs ...prometheus.Collector) {
	for _, c := range cs {
		ch := make(chan *prometheus.Desc, 100)
		c.Describe(ch)
		close(ch)
		for d := range ch {
			n.descs = append(n.descs, d.String())
		}
	}
}

// TestAlerts checks that the alerts ask for series and labels that exist.
func TestAlerts(t *testing.T) {
	var all names
	svid.NewMetrics(&all)
	csi.NewMetrics(&all)
	sds.NewMetrics(&all)
	peersock.NewMetrics(&all)
	embedded.NewMetrics(&all)
	federation.NewMetrics(&all)
	r := render(t, variants["everything"]...)
	groups, _, err := unstructured.NestedSlice(r.kind("PrometheusRule")[0].Object, "spec", "groups")
	if err != nil {
		t.Fatal(err)
	}
	series := regexp.MustCompile(`(spiffe_node_[a-z0-9_]+)(?:\{([a-z_]+)[=!~])?`)
	rules := groups[0].(map[string]any)["rules"].([]any)
	if len(rules) < 8 {
		t.Errorf("only %d alerts", len(rules))
	}
	for _, rule := range rules {
		expr := rule.(map[string]any)["expr"].(string)
		for _, m := range series.FindAllStringSubmatch(expr, -1) {
			i := slices.IndexFunc(all.descs, func(d string) bool { return strings.Contains(d, `fqName: "`+m[1]+`"`) })
			switch {
			case i < 0:
				t.Errorf("no metric %s, of %q", m[1], expr)
			case m[2] != "" && !strings.Contains(all.descs[i], m[2]):
				t.Errorf("metric %s has no label %s: %s", m[1], m[2], all.descs[i])
			}
		}
		text := rule.(map[string]any)["annotations"].(map[string]any)["summary"].(string)
		if strings.Contains(text, "{{ \"") {
			t.Errorf("template left in %q", text)
		}
	}
}

// TestPortNames: what names a port of a pod names one that is there.
func TestPortNames(t *testing.T) {
	r := render(t, variants["everything"]...)
	ports := map[string][]string{}
	for component, spec := range map[string]corev1.PodSpec{
		"node":      find[*appsv1.DaemonSet](t, r, "spiffe-node").Spec.Template.Spec,
		"authority": find[*appsv1.StatefulSet](t, r, "spire-server").Spec.Template.Spec,
	} {
		for _, c := range spec.Containers {
			for _, p := range c.Ports {
				ports[component] = append(ports[component], p.Name)
			}
			for _, probe := range []*corev1.Probe{c.LivenessProbe, c.ReadinessProbe} {
				if !slices.Contains(ports[component], probe.HTTPGet.Port.StrVal) {
					t.Errorf("%s: probe of unknown port %s", c.Name, probe.HTTPGet.Port.StrVal)
				}
			}
		}
	}
	for _, m := range r.kind("PodMonitor") {
		selector, _, _ := unstructured.NestedStringMap(m.Object, "spec", "selector", "matchLabels")
		endpoints, _, _ := unstructured.NestedSlice(m.Object, "spec", "podMetricsEndpoints")
		for _, e := range endpoints {
			if port := e.(map[string]any)["port"].(string); !slices.Contains(ports[selector["app.kubernetes.io/component"]], port) {
				t.Errorf("PodMonitor %s: no port %s", m.GetName(), port)
			}
		}
	}
	for _, name := range []string{"spiffe-node", "spire-server"} {
		p := find[*netv1.NetworkPolicy](t, r, name)
		for _, in := range p.Spec.Ingress {
			for _, port := range in.Ports {
				if !slices.Contains(ports[p.Spec.PodSelector.MatchLabels["app.kubernetes.io/component"]], port.Port.StrVal) {
					t.Errorf("NetworkPolicy %s: no port %s", name, port.Port.StrVal)
				}
			}
		}
	}
	svc := find[*corev1.Service](t, r, "spire-server")
	if !slices.Contains(ports[svc.Spec.Selector["app.kubernetes.io/component"]], svc.Spec.Ports[0].TargetPort.StrVal) {
		t.Errorf("Service: no port %v", svc.Spec.Ports[0].TargetPort)
	}
}
