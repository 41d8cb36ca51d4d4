package injecttest_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	meshconfig "istio.io/api/mesh/v1alpha1"
	"istio.io/istio/operator/pkg/helm"
	"istio.io/istio/operator/pkg/manifest"
	"istio.io/istio/operator/pkg/render"
	"istio.io/istio/operator/pkg/values"
	"istio.io/istio/pilot/pkg/features"
	"istio.io/istio/pkg/config/mesh"
	"istio.io/istio/pkg/kube/inject"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/yaml"
)

const dir = ".."

// charts is where Istio's charts are on this machine.
func charts(t *testing.T) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "istio.io/istio").Output()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(strings.TrimSpace(string(out)), "manifests")
}

// injection is what istiod would inject with.
type injection struct {
	templates inject.Templates
	raw       inject.RawTemplates
	values    inject.ValuesConfig
	mesh      *meshconfig.MeshConfig
}

// fromManifests finds the injector's configuration among rendered objects.
func fromManifests(t *testing.T, objects []manifest.Manifest) injection {
	t.Helper()
	var in injection
	for _, o := range objects {
		if o.GetKind() != "ConfigMap" {
			continue
		}
		data, _, err := unstructured.NestedStringMap(o.Object, "data")
		if err != nil {
			continue
		}
		switch o.GetName() {
		case "istio-sidecar-injector":
			cfg, err := inject.UnmarshalConfig([]byte(data["config"]))
			if err != nil {
				t.Fatal(err)
			}
			in.templates, in.raw = cfg.Templates, cfg.RawTemplates
			if in.values, err = inject.NewValuesConfig(data["values"]); err != nil {
				t.Fatal(err)
			}
		case "istio":
			if in.mesh, err = mesh.ApplyMeshConfig(data["mesh"], mesh.DefaultMeshConfig()); err != nil {
				t.Fatal(err)
			}
		}
	}
	if in.templates == nil || in.mesh == nil {
		t.Fatal("no injection configuration among the rendered objects")
	}
	return in
}

// operator renders an IstioOperator as istioctl install does.
func operator(t *testing.T, file string) []manifest.Manifest {
	t.Helper()
	sets, _, err := render.GenerateManifest([]string{file}, []string{"installPackagePath=" + charts(t)}, false, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	var out []manifest.Manifest
	for _, s := range sets {
		out = append(out, s.Manifests...)
	}
	return out
}

// chart renders one of Istio's charts as helm does, with a file of values.
func chart(t *testing.T, name, release, file string) []manifest.Manifest {
	t.Helper()
	var v map[string]any
	if err := yaml.Unmarshal([]byte(read(t, file)), &v); err != nil {
		t.Fatal(err)
	}
	iop := values.Map{"spec": map[string]any{"installPackagePath": charts(t), "values": v}}
	out, warnings, err := helm.Render(release, "istio-system", name, iop, nil)
	if err != nil {
		t.Fatal(err)
	}
	if warnings != nil {
		t.Errorf("chart %s warns: %v", name, warnings)
	}
	return out
}

// pod injects a Deployment's pod, with classic or native sidecars.
func (in injection) pod(t *testing.T, file string, native bool) *corev1.Pod {
	t.Helper()
	before := features.EnableNativeSidecars
	defer func() { features.EnableNativeSidecars = before }()
	features.EnableNativeSidecars = features.NativeSidecarModeDisabled
	if native {
		features.EnableNativeSidecars = features.NativeSidecarModeEnabled
	}
	var out strings.Builder
	err := inject.IntoResourceFile(nil, in.templates, in.values, "default", in.mesh, strings.NewReader(file), &out, func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	for doc := range strings.SplitSeq(out.String(), "---\n") {
		var u unstructured.Unstructured
		if err := yaml.Unmarshal([]byte(doc), &u.Object); err != nil {
			t.Fatal(err)
		}
		if u.GetKind() == "Deployment" {
			return podOf(t, u.Object)
		}
	}
	t.Fatalf("no Deployment in\n%s", out.String())
	return nil
}

func podOf(t *testing.T, deployment map[string]any) *corev1.Pod {
	t.Helper()
	template, _, err := unstructured.NestedMap(deployment, "spec", "template")
	if err != nil {
		t.Fatal(err)
	}
	var pod corev1.Pod
	// Unknown fields are errors: an API server drops them without a word.
	if err := runtime.DefaultUnstructuredConverter.FromUnstructuredWithValidation(template, &pod, true); err != nil {
		t.Fatal(err)
	}
	return &pod
}

// check holds a pod to what the API server and pilot-agent ask of it.
func check(t *testing.T, pod *corev1.Pod, proxy string) {
	t.Helper()
	names := map[string]bool{}
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		if names[c.Name] {
			t.Errorf("container %s is there twice", c.Name)
		}
		names[c.Name] = true
		if c.Image == "" {
			t.Errorf("container %s has no image", c.Name)
		}
		paths := map[string]bool{}
		for _, m := range c.VolumeMounts {
			if paths[m.MountPath] {
				t.Errorf("container %s has two mounts at %s", c.Name, m.MountPath)
			}
			paths[m.MountPath] = true
			if !slices.ContainsFunc(pod.Spec.Volumes, func(v corev1.Volume) bool { return v.Name == m.Name }) {
				t.Errorf("container %s mounts %q, which is no volume", c.Name, m.Name)
			}
		}
		if c.Name == proxy && !slices.ContainsFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool {
			return m.Name == "workload-socket" && strings.HasSuffix(m.MountPath, "/run/secrets/workload-spiffe-uds")
		}) {
			t.Errorf("the proxy does not see the socket: %v", c.VolumeMounts)
		}
	}
	if !names[proxy] {
		t.Errorf("no container %s: %v", proxy, names)
	}
	seen := map[string]bool{}
	for _, v := range pod.Spec.Volumes {
		if seen[v.Name] {
			t.Errorf("volume %s is there twice", v.Name)
		}
		seen[v.Name] = true
		if n := sources(t, v); n != 1 {
			t.Errorf("volume %s has %d sources; the API server takes one", v.Name, n)
		}
		if v.Name != "workload-socket" {
			continue
		}
		if v.CSI == nil || v.CSI.Driver != "csi.spiffe.io" || v.CSI.ReadOnly == nil || !*v.CSI.ReadOnly {
			t.Errorf("workload-socket is not the read-only CSI volume: %+v", v)
		}
	}
	if !seen["workload-socket"] {
		t.Error("no volume workload-socket")
	}
	if pod.Labels["spiffe.io/spire-managed-identity"] != "true" {
		t.Errorf("the label ClusterSPIFFEIDs select by is missing: %v", pod.Labels)
	}
	admit(t, pod)
}

// sources counts what a volume is made from. An emptyDir of null, which Istio's
// templates have, is an emptyDir to the API server: Go's nil drops it.
func sources(t *testing.T, v corev1.Volume) int {
	t.Helper()
	m, err := runtime.DefaultUnstructuredConverter.ToUnstructured(&v)
	if err != nil {
		t.Fatal(err)
	}
	n := len(m) - 1 // name
	if n == 0 {
		n = 1 // the API server's default is emptyDir
	}
	return n
}

// admit asks a real API server, where there is one.
func admit(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	config := os.Getenv("INJECTTEST_KUBECONFIG")
	if config == "" {
		return
	}
	p := pod.DeepCopy()
	p.APIVersion, p.Kind = "v1", "Pod"
	p.Name, p.Namespace, p.GenerateName = "injected", "default", ""
	p.Spec.ServiceAccountName = "default"
	text, err := yaml.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "kubectl", "--kubeconfig", config, "create", "--dry-run=server", "--validate=strict", "-f", "-")
	cmd.Stdin = strings.NewReader(string(text))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("the API server refuses the pod: %v\n%s\n%s", err, out, text)
	} else {
		t.Logf("API server: %s", strings.TrimSpace(string(out)))
	}
}

func read(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
