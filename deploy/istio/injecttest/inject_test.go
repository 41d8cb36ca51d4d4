package injecttest_test

import (
	"path/filepath"
	"strings"
	"testing"

	"istio.io/istio/operator/pkg/manifest"
	"sigs.k8s.io/yaml"
)

// TestTrustDomain: both installations set what the chart sets.
func TestTrustDomain(t *testing.T) {
	for name, objects := range map[string][]manifest.Manifest{
		"istioctl": operator(t, filepath.Join(dir, "istio-operator.yaml")),
		"helm":     chart(t, "istio-control/istio-discovery", "istiod", filepath.Join(dir, "values-istiod.yaml")),
	} {
		if got := fromManifests(t, objects).mesh.GetTrustDomain(); got != "example.org" {
			t.Errorf("%s: trust domain %q", name, got)
		}
	}
}

// TestSidecar injects the sample workload with Istio's injector, its charts and
// our template.
func TestSidecar(t *testing.T) {
	workload := read(t, filepath.Join(dir, "sample-workload.yaml"))
	for _, name := range []string{"istioctl", "helm"} {
		in := injectionOf(t, name)
		for mode, native := range map[string]bool{"classic": false, "native": true} {
			t.Run(name+"/"+mode, func(t *testing.T) {
				pod := in.pod(t, workload, native)
				check(t, pod, "istio-proxy")
				place := "containers"
				for _, c := range pod.Spec.InitContainers {
					if c.Name == "istio-proxy" {
						place = "initContainers"
					}
				}
				if want := map[bool]string{false: "containers", true: "initContainers"}[native]; place != want {
					t.Errorf("the proxy is among the %s: this did not test %s sidecars", place, mode)
				}
				// The label must come from the template alone as well.
				bare := strings.ReplaceAll(workload, "        spiffe.io/spire-managed-identity: \"true\"\n", "")
				if bare == workload {
					t.Fatal("the sample's label was not found")
				}
				check(t, in.pod(t, bare, native), "istio-proxy")
			})
		}
	}
}

// injectionOf is the injector's configuration after an installation by istioctl
// or helm.
func injectionOf(t *testing.T, name string) injection {
	t.Helper()
	if name == "istioctl" {
		return fromManifests(t, operator(t, filepath.Join(dir, "istio-operator.yaml")))
	}
	return fromManifests(t, chart(t, "istio-control/istio-discovery", "istiod", filepath.Join(dir, "values-istiod.yaml")))
}

// TestGatewayChart injects the Deployment of Istio's gateway chart.
func TestGatewayChart(t *testing.T) {
	in := injectionOf(t, "helm")
	for _, o := range chart(t, "gateway", "istio-ingressgateway", filepath.Join(dir, "values-gateway.yaml")) {
		if o.GetKind() != "Deployment" {
			continue
		}
		text, err := yaml.Marshal(o.Object)
		if err != nil {
			t.Fatal(err)
		}
		pod := in.pod(t, string(text), false)
		check(t, pod, "istio-proxy")
		if pod.Labels["istio"] != "ingressgateway" {
			t.Errorf("the ClusterSPIFFEID for the gateway does not select it: %v", pod.Labels)
		}
		return
	}
	t.Fatal("the gateway chart made no Deployment")
}

// TestOperatorGateway: the Deployment of IstioOperator's ingressGateways is not
// injected, but patched by overlays.
func TestOperatorGateway(t *testing.T) {
	for _, o := range operator(t, filepath.Join(dir, "istio-operator.yaml")) {
		if o.GetKind() == "Deployment" && o.GetName() == "istio-ingressgateway" {
			pod := podOf(t, o.Object)
			check(t, pod, "istio-proxy")
			if pod.Spec.ServiceAccountName != "istio-ingressgateway-service-account" {
				t.Errorf("service account %q is not the one in clusterspiffeids.yaml", pod.Spec.ServiceAccountName)
			}
			return
		}
	}
	t.Fatal("no istio-ingressgateway")
}

// TestSeedGateway: the guide's own configuration, with its init container and
// second mount, still gives a pod that works.
func TestSeedGateway(t *testing.T) {
	file := filepath.Join(charts(t), "..", "samples", "security", "spire", "istio-spire-config.yaml")
	for _, o := range operator(t, file) {
		if o.GetKind() == "Deployment" && o.GetName() == "istio-ingressgateway" {
			pod := podOf(t, o.Object)
			pod.Labels["spiffe.io/spire-managed-identity"] = "true" // the guide selects by istio: ingressgateway
			check(t, pod, "istio-proxy")
			if len(pod.Spec.InitContainers) != 1 || pod.Spec.InitContainers[0].Name != "wait-for-spire-socket" {
				t.Errorf("init containers %v", pod.Spec.InitContainers)
			}
			return
		}
	}
	t.Fatal("no istio-ingressgateway")
}
