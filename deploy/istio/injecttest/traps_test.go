package injecttest_test

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	"istio.io/istio/pkg/kube/inject"
	corev1 "k8s.io/api/core/v1"
)

// TestGuideTemplateNative shows the trap that our template avoids: the guide's,
// which names the proxy's container, gives pods without classic sidecars a
// second proxy that has no image.
func TestGuideTemplateNative(t *testing.T) {
	in := fromManifests(t, operator(t, filepath.Join(charts(t), "..", "samples", "security", "spire", "istio-spire-config.yaml")))
	pod := in.pod(t, read(t, filepath.Join(dir, "sample-workload.yaml")), true)
	for _, c := range pod.Spec.Containers {
		if c.Name == "istio-proxy" {
			if c.Image != "" {
				t.Errorf("the second proxy has image %s: this trap is gone, README.md may say so", c.Image)
			}
			return
		}
	}
	t.Error("no second proxy: this trap is gone, README.md may say so")
}

// TestOlderTemplates merges our volume over what templates of older versions
// have in its place (gateways before 1.27, waypoints before 1.31).
func TestOlderTemplates(t *testing.T) {
	in := injectionOf(t, "helm")
	ours := []byte(in.raw["spire"])
	for name, volume := range map[string]string{
		"emptyDir of nothing": `{"name":"workload-socket","emptyDir":{}}`,
		"emptyDir of null":    `{"name":"workload-socket","emptyDir":null}`,
		"emptyDir in memory":  `{"name":"workload-socket","emptyDir":{"medium":"Memory"}}`,
		"csi already":         `{"name":"workload-socket","csi":{"driver":"csi.spiffe.io","readOnly":true}}`,
	} {
		t.Run(name, func(t *testing.T) {
			base := `{"metadata":{"labels":{"a":"b"}},"spec":{"volumes":[` + volume + `,{"name":"other","emptyDir":{}}]}}`
			merged, err := inject.StrategicMergePatchYAML([]byte(base), ours, corev1.Pod{})
			if err != nil {
				t.Fatal(err)
			}
			var pod corev1.Pod
			if err := json.Unmarshal(merged, &pod); err != nil {
				t.Fatal(err)
			}
			if len(pod.Spec.Volumes) != 2 || pod.Labels["a"] != "b" {
				t.Errorf("%s", merged)
			}
			for _, v := range pod.Spec.Volumes {
				if v.Name == "workload-socket" && (sources(t, v) != 1 || v.CSI == nil) {
					t.Errorf("%s", merged)
				}
			}
		})
	}
}

// TestWithoutRetainKeys shows why the template has $retainKeys.
func TestWithoutRetainKeys(t *testing.T) {
	merged, err := inject.StrategicMergePatchYAML(
		[]byte(`{"spec":{"volumes":[{"name":"workload-socket","emptyDir":{}}]}}`),
		[]byte("spec:\n  volumes:\n  - name: workload-socket\n    csi: {driver: csi.spiffe.io, readOnly: true}\n"), corev1.Pod{})
	if err != nil {
		t.Fatal(err)
	}
	var pod corev1.Pod
	if err := json.Unmarshal(merged, &pod); err != nil {
		t.Fatal(err)
	}
	if sources(t, pod.Spec.Volumes[0]) != 2 {
		t.Errorf("one source without $retainKeys: this trap is gone: %s", merged)
	}
}

// TestLabelsAtTheTop shows that labels outside metadata are lost.
func TestLabelsAtTheTop(t *testing.T) {
	merged, err := inject.StrategicMergePatchYAML([]byte(`{"metadata":{"labels":{"a":"b"}}}`), []byte("labels: {c: d}\n"), corev1.Pod{})
	if err != nil {
		t.Fatal(err)
	}
	var pod corev1.Pod
	if err := json.Unmarshal(merged, &pod); err != nil {
		t.Fatal(err)
	}
	if pod.Labels["c"] != "" {
		t.Errorf("the label arrives: this trap is gone: %s", merged)
	}
}

// TestOrder: templates in the other order do no harm in this version of Istio.
func TestOrder(t *testing.T) {
	in := injectionOf(t, "helm")
	workload := strings.Replace(read(t, filepath.Join(dir, "sample-workload.yaml")), "sidecar,spire", "spire,sidecar", 1)
	for _, native := range []bool{false, true} {
		check(t, in.pod(t, workload, native), "istio-proxy")
	}
}
