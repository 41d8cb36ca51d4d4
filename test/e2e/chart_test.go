package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe-node/spiffe-node/test/e2e/cluster"
	"github.com/spiffe-node/spiffe-node/test/e2e/probe"
)

const (
	chartTag   = "e2e"
	chartSpace = "spire-server"
	server     = "spire-server-0"
)

// charts is the installation of the Helm charts: one authority for the cluster.
func charts() installation {
	return installation{
		namespace:    chartSpace,
		selector:     "app.kubernetes.io/name=spiffe-node,app.kubernetes.io/component=node",
		containers:   map[string]string{"agent": "sds-agent", "driver": "csi-driver"},
		sockets:      "/run/spire/agent-sockets",
		driverHealth: ":9810",
		workloads:    "auto",
		automatic:    true,
		cli: func(t *testing.T, args ...string) string {
			t.Helper()
			return kubectl(t, append([]string{"exec", "-n", chartSpace, server, "--", "/opt/spire/bin/spire-server"}, args...)...)
		},
		parentID: func(t *testing.T) string {
			t.Helper()
			list := cli(t, "agent", "list")
			id := regexp.MustCompile(`spiffe://\S+/spire/agent/k8s_psat/\S+`).FindString(list)
			if id == "" {
				t.Fatalf("no agent attested by k8s_psat is listed:\n%s", list)
			}
			return id
		},
	}
}

func kubectl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := node.Kubectl(within(t, time.Minute), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// helm runs a command of the guide's; what the registry would have given is set.
func helm(t *testing.T, args ...string) string {
	t.Helper()
	out, err := node.Helm(within(t, 3*time.Minute), args...)
	if err != nil {
		for _, name := range []string{server} {
			logs, _ := node.Kubectl(t.Context(), "logs", "-n", chartSpace, name, "--tail=40")
			t.Logf("%s:\n%s", name, logs)
		}
		events, _ := node.Kubectl(t.Context(), "get", "pods,events", "-n", chartSpace)
		t.Log(events)
		t.Fatal(err)
	}
	return out
}

// here are the values without which no chart works on this node: images have
// been imported under a tag, and there are no persistent volumes.
var here = []string{"--set", "image.tag=" + chartTag, "--set", "authority.embedded.persistence.type=hostPath"}

// managed is the ClusterSPIFFEID of Istio's guide, which has no class.
const managed = `
apiVersion: spire.spiffe.io/v1alpha1
kind: ClusterSPIFFEID
metadata:
  name: istio-sidecar-reg
spec:
  spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/ns/{{ .PodMeta.Namespace }}/sa/{{ .PodSpec.ServiceAccountName }}"
  podSelector:
    matchLabels:
      spiffe.io/spire-managed-identity: "true"
`

// TestChart installs the charts with the commands of Istio's guide and takes
// them through a node's life. Its parts build on each other.
func TestChart(t *testing.T) {
	if rigOnly() {
		t.Skip("E2E_RIG_ONLY is set: the product was not built")
	}
	diagnoseOnFailure(t)
	on = charts()
	testInstall(t)
	runParts(t, []part{
		{"fallback", testFallback},
		{"upgrade", testUpgrade},
		{"known", testKnown},
		{"plugin", testPlugin},
		{"team", testTeam},
		{"events", testEvents},
		{"label", testLabel},
		{"resource", testResource},
		{"manual", testManual},
		{"guide", testGuide},
		{"kubelet restart", testKubeletRestart},
		{"agent restart", testAgentRestart},
		{"driver restart", testDriverRestart},
		{"product pod replaced", testReplaced},
		{"product pod deleted", testProductDeleted},
		{"authority restart", testAuthorityRestart},
		{"authority away", testAuthorityAway},
		{"rollout", testRollout},
		{"start-up taint", testStartupTaint},
		{"driver away", testDriverAway},
		{"API server away", testAPIAway},
		{"reboot", testReboot},
		{"mutual TLS", testMutualTLS},
		{"burst", testBurst},
		{"nothing left", testNothingLeft},
	})
	testUninstall(t)
}

// helmCRDs installs the chart of the resources.
func helmCRDs(t *testing.T) {
	t.Helper()
	helm(t, "upgrade", "--install", "-n", chartSpace, "spire-crds", "../../deploy/helm/spiffe-node-crds", "--create-namespace")
}

// helmProduct installs or upgrades the chart as a release, with more flags of helm.
func helmProduct(t *testing.T, release string, more ...string) {
	t.Helper()
	helm(t, slices.Concat([]string{"upgrade", "--install", "-n", chartSpace, release, "../../deploy/helm/spiffe-node", "--wait", "--set", "global.spire.trustDomain=" + trustDomain}, here, more)...)
}

// deleteCRDs removes the resources and their kinds.
func deleteCRDs(t *testing.T) {
	t.Helper()
	for _, name := range []string{"clusterspiffeids", "clusterstaticentries", "clusterfederatedtrustdomains"} {
		kubectl(t, "delete", "CustomResourceDefinition", name+".spire.spiffe.io")
	}
}

func testInstall(t *testing.T) {
	t.Helper()
	if err := node.BuildHelm(within(t, 15*time.Minute), "."); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	helmCRDs(t)
	helmProduct(t, "spire")
	t.Logf("helm install of both charts -> all Ready: %s", time.Since(begun).Round(time.Millisecond))
	newProductPod(t)
}

// testFallback starts a pod that no resource but the chart's own selects.
func testFallback(t *testing.T) {
	t.Helper()
	namespace(t, "fallback", "web")
	pod := create(t, "fallback", unmanaged(probePod("web", "web")))
	got, _ := probeLog(t, pod, time.Minute, has("default", "ROOTCA")).First("default")
	t.Logf("container start -> default: %s", got.SinceStart)
	if want := "spiffe://" + trustDomain + "/ns/fallback/sa/web"; got.SPIFFEID != want {
		t.Errorf("identity is %q, want %q", got.SPIFFEID, want)
	}
	remove(t, pod)
	gone(t, pod)
}

// testUpgrade takes the chart's own ClusterSPIFFEID away and changes the agent's
// configuration under running pods, then registers pods as the guide does.
func testUpgrade(t *testing.T) {
	t.Helper()
	if err := node.Apply(within(t, time.Minute), managed); err != nil {
		t.Fatal(err)
	}
	namespace(t, on.workloads, "web")
	var made []*cluster.Pod
	for i := range 10 {
		pod := create(t, on.workloads, probePod(fmt.Sprint("upgraded-", i), "web"))
		probeLog(t, pod, time.Minute, has("default", "ROOTCA"))
		made = append(made, pod)
	}
	rollOut(t, "clusterSPIFFEIDs.default.enabled=false", "node.agent.logLevel=debug")
	for _, pod := range made {
		remove(t, pod)
		gone(t, pod)
	}
}

// testRollout replaces the product's pod by another of the same chart.
func testRollout(t *testing.T) {
	t.Helper()
	rollOut(t, "clusterSPIFFEIDs.default.enabled=false", "node.agent.logLevel=info", "startupTaint.enabled=true")
}

// rollOut changes values and says what the running pods' streams saw of it.
func rollOut(t *testing.T, values ...string) {
	t.Helper()
	mounts, before, old := volumeMounts(t, ""), settled(t), agentPod(t)
	serials := map[string]string{}
	for _, pod := range pods(t) {
		last, _ := probeLog(t, &pod, 10*time.Second, has("default")).Last("default")
		serials[pod.Metadata.Name] = last.Serial
	}
	var flags []string
	for _, v := range values {
		flags = append(flags, "--set", v)
	}
	begun := time.Now()
	helmProduct(t, "spire", flags...)
	if err := node.WaitGone(within(t, time.Minute), on.namespace, old.Metadata.Name, old.Metadata.UID); err != nil {
		t.Fatal(err)
	}
	newProductPod(t)
	t.Logf("helm upgrade -> successor Ready, predecessor gone: %s", time.Since(begun).Round(time.Millisecond))
	var outages []time.Duration
	for _, pod := range pods(t) {
		seen := before[pod.Metadata.Name]
		log := nodeLog(t, &pod, 90*time.Second, outagesOver(seen+2))
		outages = append(outages, log.Outages()[seen:]...)
		explainSlow(t, &pod, log, log.Outages()[seen:])
		if last, _ := log.Last("default"); last.Serial != serials[pod.Metadata.Name] {
			t.Errorf("pod %s got a new SVID for the upgrade", pod.Metadata.Name)
		}
	}
	t.Logf("helm upgrade -> stream outages: %s", quantiles(outages))
	if after := volumeMounts(t, ""); !slices.Equal(sorted(mounts), sorted(after)) {
		t.Errorf("mounts before the upgrade:\n%s\nafter:\n%s", strings.Join(mounts, "\n"), strings.Join(after, "\n"))
	}
}

func sorted(s []string) []string { return slices.Sorted(slices.Values(s)) }

// unmanaged takes the label off.
func unmanaged(pod map[string]any) map[string]any {
	delete(pod["metadata"].(map[string]any)["labels"].(map[string]any), managedLabel)
	return pod
}

// label sets a pod's label, or with nil removes it.
func label(t *testing.T, pod *cluster.Pod, key string, value any) {
	t.Helper()
	patch := map[string]any{"metadata": map[string]any{"labels": map[string]any{key: value}}}
	path := "/api/v1/namespaces/" + pod.Metadata.Namespace + "/pods/" + pod.Metadata.Name
	if err := node.API(within(t, 30*time.Second), http.MethodPatch, path, patch, nil); err != nil {
		t.Fatal(err)
	}
}

// count waits for the n-th secret called default and returns it.
func count(t *testing.T, pod *cluster.Pod, n int) probe.Event {
	t.Helper()
	var last probe.Event
	probeLog(t, pod, 30*time.Second, func(log probe.Log) error {
		have := 0
		for _, ev := range log {
			if ev.Kind == probe.Secret && ev.Name == "default" {
				have, last = have+1, ev
			}
		}
		if have < n {
			return fmt.Errorf("%d secrets called default so far, want %d; errors: %v", have, n, log.Errors())
		}
		return nil
	})
	return last
}

// withdrawn waits for the n-th end of a stream and returns it.
func withdrawn(t *testing.T, pod *cluster.Pod, n int) probe.Event {
	t.Helper()
	log := probeLog(t, pod, 30*time.Second, func(log probe.Log) error {
		if len(log.Errors()) < n {
			return errors.New("no stream has ended: the identity is still there")
		}
		return nil
	})
	ev := log.Errors()[n-1]
	if ev.Code != "PermissionDenied" || ev.Name != "default" {
		t.Errorf("the stream ended with %s %q for %q, want PermissionDenied for default", ev.Code, ev.Message, ev.Name)
	}
	return ev
}

// testLabel gives a running pod the label, takes it away and gives it back.
func testLabel(t *testing.T) {
	t.Helper()
	namespace(t, "label", "web")
	pod := create(t, "label", unmanaged(probePod("web", "web")))
	probeLog(t, pod, time.Minute, has("ROOTCA"))
	<-time.After(2 * time.Second)
	if got, ok := probeLog(t, pod, time.Minute, has("ROOTCA")).First("default"); ok {
		t.Errorf("a pod without the label is %q", got.SPIFFEID)
	}
	begun := time.Now()
	label(t, pod, managedLabel, "true")
	got := count(t, pod, 1)
	t.Logf("label set -> default: %s", got.Time.Sub(begun).Round(time.Millisecond))
	begun = time.Now()
	label(t, pod, managedLabel, nil)
	ev := withdrawn(t, pod, 1)
	t.Logf("label removed -> withdrawn: %s", ev.Time.Sub(begun).Round(time.Millisecond))
	begun = time.Now()
	label(t, pod, managedLabel, "true")
	got = count(t, pod, 2)
	t.Logf("label set again -> default: %s, the client's wait included", got.Time.Sub(begun).Round(time.Millisecond))
	remove(t, pod)
	gone(t, pod)
}

// testResource creates, breaks, repairs and deletes a ClusterSPIFFEID beside a running pod.
func testResource(t *testing.T) {
	t.Helper()
	namespace(t, "resource", "web")
	spec := unmanaged(probePod("web", "web"))
	spec["metadata"].(map[string]any)["labels"].(map[string]any)["team"] = "blue"
	pod := create(t, "resource", spec)
	probeLog(t, pod, time.Minute, has("ROOTCA"))
	resource := func(template string) string {
		return fmt.Sprintf("apiVersion: spire.spiffe.io/v1alpha1\nkind: ClusterSPIFFEID\nmetadata: {name: blue}\nspec:\n  spiffeIDTemplate: %q\n  podSelector: {matchLabels: {team: blue}}\n", template)
	}
	begun := time.Now()
	if err := node.Apply(within(t, time.Minute), resource("spiffe://{{ .TrustDomain }}/team/{{ .PodMeta.Labels.team }}")); err != nil {
		t.Fatal(err)
	}
	got := count(t, pod, 1)
	t.Logf("ClusterSPIFFEID applied (with kubectl) -> default: %s", got.Time.Sub(begun).Round(time.Millisecond))
	if want := "spiffe://" + trustDomain + "/team/blue"; got.SPIFFEID != want {
		t.Errorf("identity is %q, want %q", got.SPIFFEID, want)
	}
	begun = time.Now()
	if err := node.Apply(within(t, time.Minute), resource("spiffe://{{ .TrustDomain }}/pod/{{ .PodMeta.Name }}")); err != nil {
		t.Fatal(err)
	}
	got = count(t, pod, 2)
	t.Logf("template changed (with kubectl) -> new default: %s", got.Time.Sub(begun).Round(time.Millisecond))
	if want := "spiffe://" + trustDomain + "/pod/web"; got.SPIFFEID != want {
		t.Errorf("identity is %q, want %q", got.SPIFFEID, want)
	}
	if errs := probeLog(t, pod, time.Minute, has("default")).Errors(); len(errs) > 0 {
		t.Errorf("the change of a template ended streams: %v", errs)
	}
	var status string
	err := cluster.Poll(within(t, 30*time.Second), 100*time.Millisecond, func(ctx context.Context) (err error) {
		status, err = node.Kubectl(ctx, "get", "clusterspiffeid", "blue", "-o", "jsonpath={.status.stats}")
		if err == nil && !strings.Contains(status, `"podsSelected":1`) {
			err = fmt.Errorf("status does not say that one pod is selected: %s", status)
		}
		return err
	})
	t.Logf("status: %s", status)
	if err != nil {
		t.Error(err)
	}
	begun = time.Now()
	kubectl(t, "delete", "clusterspiffeid", "blue")
	ev := withdrawn(t, pod, 1)
	t.Logf("ClusterSPIFFEID deleted (with kubectl) -> withdrawn: %s", ev.Time.Sub(begun).Round(time.Millisecond))
	remove(t, pod)
	gone(t, pod)
}

// testManual registers by hand, with a node alias as the guide does.
func testManual(t *testing.T) {
	t.Helper()
	namespace(t, "manual", "web")
	parent := on.parentID(t)
	alias := "spiffe://" + trustDomain + "/ns/spire/sa/spire-agent"
	cli(t, "entry", "create", "-node", "-spiffeID", alias,
		"-selector", "k8s_psat:cluster:example-cluster", "-selector", "k8s_psat:agent_ns:"+chartSpace, "-selector", "k8s_psat:agent_sa:spire-agent",
		"-socketPath", "/run/spire/sockets/server.sock")
	for i, parent := range []string{parent, alias} {
		name := fmt.Sprint("web-", i)
		spec := unmanaged(probePod(name, "web"))
		spec["metadata"].(map[string]any)["labels"].(map[string]any)["instance"] = name
		pod := create(t, "manual", spec)
		probeLog(t, pod, time.Minute, has("ROOTCA"))
		id := "spiffe://" + trustDomain + "/manual/" + name
		begun := time.Now()
		out := cli(t, "entry", "create", "-parentID", parent, "-spiffeID", id,
			"-selector", "k8s:ns:manual", "-selector", "k8s:sa:web", "-selector", "k8s:pod-label:instance:"+name)
		got := count(t, pod, 1)
		t.Logf("entry create (with kubectl exec) below %s -> default: %s", parent, got.Time.Sub(begun).Round(time.Millisecond))
		if got.SPIFFEID != id {
			t.Errorf("identity is %q, want %q", got.SPIFFEID, id)
		}
		if !strings.Contains(cli(t, "entry", "show", "-spiffeID", id), id) {
			t.Error("entry show does not show the entry")
		}
		entryID := regexp.MustCompile(`Entry ID\s*:\s*(\S+)`).FindStringSubmatch(out)
		if entryID == nil {
			t.Fatalf("entry create does not say the entry's ID:\n%s", out)
		}
		begun = time.Now()
		cli(t, "entry", "delete", "-entryID", entryID[1])
		ev := withdrawn(t, pod, 1)
		t.Logf("entry delete -> withdrawn: %s", ev.Time.Sub(begun).Round(time.Millisecond))
		remove(t, pod)
		gone(t, pod)
	}
}

// testGuide checks what Istio's guide shows of the server, and with the gateway's resource.
func testGuide(t *testing.T) {
	t.Helper()
	namespace(t, "istio-system", "istio-ingressgateway-service-account")
	err := node.Apply(within(t, time.Minute), `
apiVersion: spire.spiffe.io/v1alpha1
kind: ClusterSPIFFEID
metadata:
  name: istio-ingressgateway-reg
spec:
  spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/ns/{{ .PodMeta.Namespace }}/sa/{{ .PodSpec.ServiceAccountName }}"
  workloadSelectorTemplates:
    - "k8s:ns:istio-system"
    - "k8s:sa:istio-ingressgateway-service-account"
`)
	if err != nil {
		t.Fatal(err)
	}
	pod := create(t, "istio-system", unmanaged(probePod("gateway", "istio-ingressgateway-service-account")))
	got, _ := probeLog(t, pod, time.Minute, has("default", "ROOTCA")).First("default")
	t.Logf("gateway: container start -> default: %s", got.SinceStart)
	id := "spiffe://" + trustDomain + "/ns/istio-system/sa/istio-ingressgateway-service-account"
	if got.SPIFFEID != id {
		t.Errorf("identity is %q, want %q", got.SPIFFEID, id)
	}
	shown := kubectl(t, "exec", "-t", server, "-n", chartSpace, "-c", "spire-server", "--", "./bin/spire-server", "entry", "show")
	for _, want := range []string{id, "k8s:pod-uid:" + pod.Metadata.UID, "/spire/agent/k8s_psat/example-cluster/"} {
		if !strings.Contains(shown, want) {
			t.Errorf("entry show does not mention %q:\n%s", want, shown)
		}
	}
	kubectl(t, "delete", "clusterspiffeid", "istio-ingressgateway-reg")
	remove(t, pod)
	gone(t, pod)
}

// testUninstall removes the charts, the resources first as the guide says.
func testUninstall(t *testing.T) {
	t.Helper()
	begun := time.Now()
	deleteCRDs(t)
	helm(t, "delete", "-n", chartSpace, "spire", "--wait")
	helm(t, "delete", "-n", chartSpace, "spire-crds", "--wait")
	t.Logf("helm delete: %s", time.Since(begun).Round(time.Millisecond))
	testUninstalled(t)
	t.Logf("helm delete -> nothing left: %s", time.Since(begun).Round(time.Millisecond))
}

// testUninstalled waits until nothing is left of the product on the node or in
// the API, but for the authority's state, which it removes.
func testUninstalled(t *testing.T) {
	t.Helper()
	err := cluster.Poll(within(t, time.Minute), 200*time.Millisecond, func(ctx context.Context) error {
		return errors.Join(objectsLeft(ctx), filesLeft())
	})
	if err != nil {
		t.Errorf("left over: %v", err)
	}
	if mounts := volumeMounts(t, ""); len(mounts) > 0 {
		t.Errorf("mounts left over: %q", mounts)
	}
	// The authority's state stays, as a claim would; the next test has its own.
	if _, err := node.OnNode(within(t, time.Minute), "rm", "-r", "/var/lib/spiffe-node"); err != nil {
		t.Fatal(err)
	}
}

// objectsLeft names what the charts or the product have left in the API.
func objectsLeft(ctx context.Context) error {
	var errs []error
	for _, args := range [][]string{
		{"get", "all,configmaps,serviceaccounts,roles,rolebindings,networkpolicies,poddisruptionbudgets,secrets", "-n", chartSpace, "-o", "name"},
		{"get", "csidrivers,clusterroles,clusterrolebindings,customresourcedefinitions,priorityclasses", "-o", "name"},
	} {
		left, err := node.Kubectl(ctx, args...)
		if err != nil {
			return err
		}
		for line := range strings.Lines(left) {
			if strings.Contains(line, "spi") {
				errs = append(errs, errors.New(strings.TrimSpace(line)))
			}
		}
	}
	return errors.Join(errs...)
}

// filesLeft names what the product has left on the node; directories may stay,
// as does the authority's state.
func filesLeft() error {
	var errs []error
	for _, dir := range []string{"/var/lib/kubelet/plugins/csi.spiffe.io", "/var/lib/kubelet/plugins_registry", on.sockets, ledgerDir} {
		entries, err := os.ReadDir(node.NodePath(dir))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
		for _, e := range entries {
			errs = append(errs, fmt.Errorf("%s/%s", dir, e.Name()))
		}
	}
	return errors.Join(errs...)
}
