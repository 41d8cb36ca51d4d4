package injecttest_test

import (
	"path/filepath"
	"strings"
	"testing"

	meshconfig "istio.io/api/mesh/v1alpha1"
	"istio.io/istio/pilot/pkg/config/kube/gatewaycommon"
	"istio.io/istio/pkg/kube/inject"
	appsv1 "k8s.io/api/apps/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	gateway "sigs.k8s.io/gateway-api/apis/v1"
	"sigs.k8s.io/yaml"
)

// TestWaypoint fills in Istio's own waypoint and gateway templates and merges
// our ConfigMap over them, as istiod does for a Gateway with parametersRef.
func TestWaypoint(t *testing.T) {
	in := injectionOf(t, "helm")
	var overlay string
	var gw gateway.Gateway
	for doc := range strings.SplitSeq(read(t, filepath.Join(dir, "waypoint.yaml")), "\n---\n") {
		var u unstructured.Unstructured
		if err := yaml.Unmarshal([]byte(doc), &u.Object); err != nil {
			t.Fatal(err)
		}
		if u.GetKind() == "ConfigMap" {
			overlay, _, _ = unstructured.NestedString(u.Object, "data", "deployment")
			continue
		}
		if err := yaml.UnmarshalStrict([]byte(doc), &gw); err != nil {
			t.Fatal(err)
		}
	}
	if ref := gw.Spec.Infrastructure.ParametersRef; ref == nil || ref.Name != "waypoint-spiffe" || ref.Kind != "ConfigMap" {
		t.Fatalf("the Gateway does not name the ConfigMap: %+v", ref)
	}
	for _, name := range []string{"waypoint", "kube-gateway"} {
		t.Run(name, func(t *testing.T) {
			text := fill(t, in, name, &gw)
			js, err := yaml.YAMLToJSON([]byte(text))
			if err != nil {
				t.Fatal(err)
			}
			merged, err := inject.StrategicMergePatchYAML(js, []byte(overlay), appsv1.Deployment{})
			if err != nil {
				t.Fatal(err)
			}
			var u unstructured.Unstructured
			if err := u.UnmarshalJSON(merged); err != nil {
				t.Fatal(err)
			}
			check(t, podOf(t, u.Object), "istio-proxy")
		})
	}
}

// fill gives the Deployment that a template of the gateway controller makes.
func fill(t *testing.T, in injection, name string, gw *gateway.Gateway) string {
	t.Helper()
	input := struct {
		gatewaycommon.TemplateInput
		ProxyImage, AgentgatewayImage string
		ProxyConfig                   *meshconfig.ProxyConfig
		MeshConfig                    *meshconfig.MeshConfig
		Values                        map[string]any
	}{
		TemplateInput: gatewaycommon.TemplateInput{
			Gateway: gw, GatewayClass: string(gw.Spec.GatewayClassName), DeploymentName: gw.Name, ServiceAccount: gw.Name,
			KubeVersion: 134, ProxyUID: 1337, ProxyGID: 1337, GatewayNameLabel: "gateway.networking.k8s.io/gateway-name",
			ControllerLabel: "istio.io-mesh-controller", ClusterID: "Kubernetes",
		},
		ProxyImage:  "docker.io/istio/proxyv2",
		ProxyConfig: in.mesh.GetDefaultConfig(),
		MeshConfig:  in.mesh,
		Values:      in.values.Map(),
	}
	parsed, err := inject.ParseTemplates(inject.RawTemplates{name: in.raw[name]})
	if err != nil {
		t.Fatal(err)
	}
	tmpl := parsed[name]
	var out strings.Builder
	if err := tmpl.Execute(&out, input); err != nil {
		t.Fatal(err)
	}
	for doc := range strings.SplitSeq(out.String(), "\n---\n") {
		if strings.Contains(doc, "kind: Deployment") {
			return doc
		}
	}
	t.Fatalf("no Deployment in\n%s", out.String())
	return ""
}
