package rendertest_test

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/yaml"

	"github.com/spiffe-node/spiffe-node/internal/config"
	"github.com/spiffe-node/spiffe-node/pkg/registration/api/v1alpha1"
)

// TestStrict decodes every object as the API server would with
// fieldValidation=Strict, and checks what all must have in common.
func TestStrict(t *testing.T) {
	known := []string{"PodMonitor", "PrometheusRule", "SecurityContextConstraints"}
	eachVariant(t, func(t *testing.T, r *rendered) {
		t.Helper()
		seen := map[string]bool{}
		for _, o := range r.objects {
			gvk := o.raw.GroupVersionKind()
			switch {
			case scheme.Scheme.Recognizes(gvk):
				if _, err := decode(o); err != nil {
					t.Errorf("%s: %v", o.file, err)
				}
			case gvk.Kind == "ClusterSPIFFEID":
				var cr v1alpha1.ClusterSPIFFEID
				if err := yaml.UnmarshalStrict(o.text, &cr); err != nil {
					t.Errorf("%s: %v", o.file, err)
				}
			case gvk.Kind == "ClusterFederatedTrustDomain":
				var cr v1alpha1.ClusterFederatedTrustDomain
				if err := yaml.UnmarshalStrict(o.text, &cr); err != nil {
					t.Errorf("%s: %v", o.file, err)
				}
			case !slices.Contains(known, gvk.Kind):
				t.Errorf("%s: unknown kind %s", o.file, gvk)
			}
			key := gvk.Kind + "/" + o.raw.GetNamespace() + "/" + o.raw.GetName()
			if seen[key] {
				t.Errorf("%s is rendered twice", key)
			}
			seen[key] = true
			if o.raw.GetLabels()["app.kubernetes.io/part-of"] != "spiffe-node" {
				t.Errorf("%s lacks the common labels: %v", key, o.raw.GetLabels())
			}
		}
	})
}

// TestConfiguration gives what the chart writes to the programs' own parsers.
func TestConfiguration(t *testing.T) {
	eachVariant(t, func(t *testing.T, r *rendered) {
		t.Helper()
		agent := find[*corev1.ConfigMap](t, r, "spiffe-node").Data["agent.yaml"]
		c, err := config.Parse("agent.yaml", []byte(agent), nil)
		if err != nil {
			t.Fatalf("%v\n%s", err, agent)
		}
		if c.TrustDomain != "example.org" || c.Mode != config.ModeKubernetes {
			t.Errorf("agent: trust domain %q, mode %q", c.TrustDomain, c.Mode)
		}
		cm, ok := lookup[*corev1.ConfigMap](t, r, "spire-server")
		if !ok {
			return
		}
		text := cm.Data["authority.yaml"]
		a, err := config.ParseAuthority("authority.yaml", []byte(text), nil)
		if err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		k := a.NodeAttestation.K8sPSAT
		if diff := cmp.Diff([]string{namespace + ":spire-agent"}, k.ServiceAccountAllowList); diff != "" {
			t.Errorf("the authority admits other agents (-want +got):\n%s", diff)
		}
		if k.Cluster != "example-cluster" {
			t.Errorf("cluster %q", k.Cluster)
		}
	})
}

func TestDaemonSet(t *testing.T) {
	eachVariant(t, func(t *testing.T, r *rendered) {
		t.Helper()
		ds := find[*appsv1.DaemonSet](t, r, "spiffe-node")
		spec := ds.Spec.Template.Spec
		if !spec.HostPID || spec.HostNetwork || spec.HostIPC {
			t.Errorf("hostPID %t, hostNetwork %t, hostIPC %t", spec.HostPID, spec.HostNetwork, spec.HostIPC)
		}
		if *spec.AutomountServiceAccountToken {
			t.Error("the API token is mounted into every container")
		}
		if len(spec.Tolerations) != 1 || spec.Tolerations[0].Operator != corev1.TolerationOpExists || spec.Tolerations[0].Key != "" {
			t.Errorf("does not reach every node: %v", spec.Tolerations)
		}
		if spec.PriorityClassName != "system-node-critical" {
			t.Errorf("priority class %q", spec.PriorityClassName)
		}
		ru := ds.Spec.UpdateStrategy.RollingUpdate
		if ru.MaxSurge.IntValue() != 1 || ru.MaxUnavailable.IntValue() != 0 {
			t.Errorf("rolling update %v", ru)
		}
		for k, v := range ds.Spec.Selector.MatchLabels {
			if ds.Spec.Template.Labels[k] != v {
				t.Errorf("selector %s=%s does not select the template", k, v)
			}
		}
		driver, agent := container(t, spec, "csi-driver"), container(t, spec, "sds-agent")
		if !*driver.SecurityContext.Privileged || !*driver.SecurityContext.ReadOnlyRootFilesystem {
			t.Error("driver: privileged with a read-only root is what it needs")
		}
		sc := agent.SecurityContext
		if *sc.Privileged || *sc.AllowPrivilegeEscalation || !*sc.ReadOnlyRootFilesystem || !slices.Equal(sc.Capabilities.Drop, []corev1.Capability{"ALL"}) {
			t.Errorf("agent's security context: %+v", sc)
		}
		for _, c := range spec.Containers {
			for _, m := range c.VolumeMounts {
				bidirectional := m.MountPropagation != nil && *m.MountPropagation == corev1.MountPropagationBidirectional
				if bidirectional != (c.Name == "csi-driver" && m.Name == "pods") {
					t.Errorf("container %s: mount %s has propagation %v", c.Name, m.Name, m.MountPropagation)
				}
				if !slices.ContainsFunc(spec.Volumes, func(v corev1.Volume) bool { return v.Name == m.Name }) {
					t.Errorf("container %s mounts %q, which is no volume", c.Name, m.Name)
				}
			}
			for _, p := range c.Ports {
				if p.HostPort != 0 {
					t.Errorf("container %s takes port %d of the host: two pods could not overlap", c.Name, p.HostPort)
				}
			}
		}
		for _, m := range driver.VolumeMounts {
			if m.MountPath == "/var/run/secrets/kubernetes.io/serviceaccount" || strings.Contains(m.MountPath, "tokens") {
				t.Errorf("the driver is given a token: %s", m.MountPath)
			}
		}
		testPaths(t, r, spec, driver)
	})
}

// testPaths checks that the parts that share a directory name the same one.
func testPaths(t *testing.T, r *rendered, spec corev1.PodSpec, driver corev1.Container) {
	t.Helper()
	c, err := config.Parse("agent.yaml", []byte(find[*corev1.ConfigMap](t, r, "spiffe-node").Data["agent.yaml"]), nil)
	if err != nil {
		t.Fatal(err)
	}
	args := map[string]string{}
	for _, a := range driver.Args {
		k, v, _ := strings.Cut(a, "=")
		args[k] = v
	}
	if args["-workload-api-socket-dir"] != c.Socket.Directory {
		t.Errorf("the driver mounts %s, the agent listens in %s", args["-workload-api-socket-dir"], c.Socket.Directory)
	}
	if args["-ledger-dir"] != c.Attestation.Kubernetes.LedgerDirectory {
		t.Errorf("the driver writes to %s, the agent reads %s", args["-ledger-dir"], c.Attestation.Kubernetes.LedgerDirectory)
	}
	if !strings.HasPrefix(args["-csi-socket-path"], args["-kubelet-root"]+"/plugins/"+args["-plugin-name"]+"/") {
		t.Errorf("the kubelet would not find %s", args["-csi-socket-path"])
	}
	if dir := c.Identity.StateDirectory; dir != config.StateAuto && !strings.HasPrefix(dir, "/run/") {
		t.Errorf("restart state in %s, which need not be a tmpfs", dir)
	}
	if def := filepath.Dir(config.DefaultStateDirectory); c.Identity.StateDirectory == config.StateAuto &&
		!slices.ContainsFunc(spec.Volumes, func(v corev1.Volume) bool { return v.HostPath != nil && v.HostPath.Path == def }) {
		t.Errorf("restart state is kept in %s, which is not the host's", def)
	}
	// Without it the agent does not start on nodes with cgroup v2.
	agent := container(t, spec, "sds-agent")
	i := slices.IndexFunc(spec.Volumes, func(v corev1.Volume) bool { return v.HostPath != nil && v.HostPath.Path == "/sys/fs/cgroup" })
	if i < 0 || !slices.ContainsFunc(agent.VolumeMounts, func(m corev1.VolumeMount) bool { return m.Name == spec.Volumes[i].Name && m.ReadOnly }) {
		t.Error("the agent does not see the host's cgroups")
	}
	for _, name := range []string{"sockets", "state", "plugin", "registry", "pods"} {
		i := slices.IndexFunc(spec.Volumes, func(v corev1.Volume) bool { return v.Name == name })
		j := slices.IndexFunc(driver.VolumeMounts, func(m corev1.VolumeMount) bool { return m.Name == name })
		if i < 0 || j < 0 || spec.Volumes[i].HostPath == nil || spec.Volumes[i].HostPath.Path != driver.VolumeMounts[j].MountPath {
			t.Errorf("host directory %q is not where it is on the host", name)
		}
	}
}

func container(t *testing.T, spec corev1.PodSpec, name string) corev1.Container {
	t.Helper()
	i := slices.IndexFunc(spec.Containers, func(c corev1.Container) bool { return c.Name == name })
	if i < 0 {
		t.Fatalf("no container %q", name)
	}
	return spec.Containers[i]
}

func TestCSIDriver(t *testing.T) {
	d := find[*storagev1.CSIDriver](t, render(t, variants["default"]...), "csi.spiffe.io")
	want := storagev1.CSIDriverSpec{
		AttachRequired:       new(false),
		PodInfoOnMount:       new(true),
		FSGroupPolicy:        new(storagev1.NoneFSGroupPolicy),
		VolumeLifecycleModes: []storagev1.VolumeLifecycleMode{storagev1.VolumeLifecycleEphemeral},
	}
	if diff := cmp.Diff(want, d.Spec); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if got := d.Labels["security.openshift.io/csi-ephemeral-volume-profile"]; got != "restricted" {
		t.Errorf("csi-ephemeral-volume-profile %q", got)
	}
	if _, ok := lookup[*storagev1.CSIDriver](t, render(t, variants["other places"]...), "b.csi.spiffe.io"); ok {
		t.Error("csiDriverObject.create=false makes one")
	}
}

// TestAgentPermissions holds agents to what the design gives them, and what was
// asked for beside.
func TestAgentPermissions(t *testing.T) {
	eachVariant(t, func(t *testing.T, r *rendered) {
		t.Helper()
		role := find[*rbacv1.ClusterRole](t, r, "spire-server-spire-agent")
		want := map[string][]string{
			"pods": {"get", "list", "watch"}, "events": {"create"},
			"tokenreviews": {"create"}, "subjectaccessreviews": {"create"}, // for the Inspect port
		}
		switch {
		case strings.HasSuffix(t.Name(), "/other_places"):
			delete(want, "tokenreviews")
			delete(want, "subjectaccessreviews")
		case strings.HasSuffix(t.Name(), "/pods"):
			want["namespaces"] = []string{"get", "list", "watch"}
		case strings.HasSuffix(t.Name(), "/kubelet"):
			delete(want, "pods")
			want["nodes/pods"] = []string{"get"}
		}
		got := map[string][]string{}
		for _, rule := range role.Rules {
			for _, res := range rule.Resources {
				got[res] = rule.Verbs
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("agents may (-want +got):\n%s", diff)
		}
		for _, o := range r.kind("ClusterRoleBinding") {
			if ref, _, _ := nested(o.Object, "roleRef", "name"); ref == "spire-server-spire-agent" {
				return
			}
		}
		t.Error("agents are not bound to their role")
	})
}

// TestAuthorityPermissions: no wildcard, no secret, no write to pods or nodes.
func TestAuthorityPermissions(t *testing.T) {
	role := find[*rbacv1.ClusterRole](t, render(t, variants["everything"]...), "spire-server-spire-server")
	writes := map[string]bool{}
	for _, rule := range role.Rules {
		for _, res := range rule.Resources {
			if strings.Contains(res, "*") || slices.Contains(rule.Verbs, "*") || res == "secrets" {
				t.Errorf("the authority may %v %s", rule.Verbs, res)
			}
			for _, verb := range rule.Verbs {
				if !slices.Contains([]string{"get", "list", "watch"}, verb) {
					writes[res] = true
				}
			}
		}
	}
	want := map[string]bool{
		"tokenreviews": true, "events": true, "clusterspiffeids/status": true,
		"clusterstaticentries/status": true, "clusterfederatedtrustdomains/status": true,
	}
	if diff := cmp.Diff(want, writes); diff != "" {
		t.Errorf("the authority writes (-want +got):\n%s", diff)
	}
}

// TestStartupTaint: whoever removes the taint may patch nodes and runs on tainted
// ones; nobody else may and does.
func TestStartupTaint(t *testing.T) {
	for name, on := range map[string]bool{"default": false, "start-up taint": true} {
		r := render(t, variants[name]...)
		a, err := config.ParseAuthority("authority.yaml", []byte(find[*corev1.ConfigMap](t, r, "spire-server").Data["authority.yaml"]), nil)
		if err != nil {
			t.Fatal(err)
		}
		patches := false
		for _, rule := range find[*rbacv1.ClusterRole](t, r, "spire-server-spire-server").Rules {
			patches = patches || slices.Contains(rule.Resources, "nodes") && slices.Contains(rule.Verbs, "patch")
		}
		tolerates := slices.ContainsFunc(find[*appsv1.StatefulSet](t, r, "spire-server").Spec.Template.Spec.Tolerations, func(o corev1.Toleration) bool {
			return o.Key == "spiffe-node.io/agent-not-ready" && o.Operator == corev1.TolerationOpExists && o.Effect == ""
		})
		if (a.StartupTaint.Key != "") != on || patches != on || tolerates != on {
			t.Errorf("%s: key %q, may patch nodes %t, tolerates the taint %t", name, a.StartupTaint.Key, patches, tolerates)
		}
	}
}

func TestAuthority(t *testing.T) {
	volumes := func(name string) (*appsv1.StatefulSet, corev1.VolumeSource) {
		s := find[*appsv1.StatefulSet](t, render(t, variants[name]...), "spire-server")
		for _, v := range s.Spec.Template.Spec.Volumes {
			if v.Name == "state" {
				return s, v.VolumeSource
			}
		}
		return s, corev1.VolumeSource{}
	}
	s, src := volumes("default")
	if len(s.Spec.VolumeClaimTemplates) != 1 || src != (corev1.VolumeSource{}) {
		t.Errorf("default: %d claims and volume %v", len(s.Spec.VolumeClaimTemplates), src)
	}
	pod := s.Spec.Template.Spec
	if *pod.SecurityContext.RunAsUser == 0 || !*pod.SecurityContext.RunAsNonRoot {
		t.Error("the authority runs as root without need")
	}
	if *pod.SecurityContext.FSGroupChangePolicy != corev1.FSGroupChangeOnRootMismatch {
		t.Error("every restart would open the state directory to the group")
	}
	if pod.Containers[0].Name != "spire-server" {
		t.Errorf("container %q: kubectl exec -c spire-server would not find it", pod.Containers[0].Name)
	}
	if s, src := volumes("one node"); src.HostPath == nil || len(s.Spec.VolumeClaimTemplates) > 0 || *s.Spec.Template.Spec.SecurityContext.RunAsUser != 0 {
		t.Errorf("one node: %v", src)
	}
	if _, src := volumes("emptyDir"); src.EmptyDir == nil {
		t.Errorf("emptyDir: %v", src)
	}
	if _, ok := lookup[*appsv1.StatefulSet](t, render(t, variants["external"]...), "spire-server"); ok {
		t.Error("an external server does not need ours")
	}
}

// TestSeedCommand: the pod spire-server-0 finds its socket without flags.
func TestSeedCommand(t *testing.T) {
	r := render(t, variants["default"]...)
	a, err := config.ParseAuthority("authority.yaml", []byte(find[*corev1.ConfigMap](t, r, "spire-server").Data["authority.yaml"]), nil)
	if err != nil {
		t.Fatal(err)
	}
	if a.Admin.SocketPath != "/tmp/spire-server/private/api.sock" {
		t.Errorf("admin socket %s", a.Admin.SocketPath)
	}
}

// TestUninstallNote runs the command of the notes that names pods.
func TestUninstallNote(t *testing.T) {
	notes := render(t, variants["default"]...).files["NOTES.txt"]
	_, rest, ok := strings.Cut(notes, "-o jsonpath='")
	if !ok {
		t.Fatal(notes)
	}
	expr, _, _ := strings.Cut(rest, "'")
	if got, want := jsonPath(t, expr, "testdata/pods.json"), "default/curl\nistio-system/gateway\n"; got != want {
		t.Errorf("%s\ngives %q, want %q", expr, got, want)
	}
}
