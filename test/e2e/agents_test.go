package e2e_test

import (
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestSPIREAgents runs SPIRE's own agents and drivers, from its chart, on the
// product's authority: they attest by k8s_psat with tokens of a real kubelet,
// and serve pods that the authority registers.
func TestSPIREAgents(t *testing.T) {
	if rigOnly() {
		t.Skip("E2E_RIG_ONLY is set: the product was not built")
	}
	dir := spireDir(t)
	diagnoseOnFailure(t)
	on = charts()
	importSPIRE(t, dir, node)
	if err := node.BuildHelm(within(t, 15*time.Minute), "."); err != nil {
		t.Fatal(err)
	}
	helm(t, "upgrade", "--install", "-n", chartSpace, "spire-crds", "../../deploy/helm/spiffe-node-crds", "--create-namespace")
	helm(t, append([]string{
		"upgrade", "--install", "-n", chartSpace, "authority", "../../deploy/helm/spiffe-node", "--wait", "--set", "global.spire.trustDomain=" + trustDomain,
		"--set", "csiDriverObject.create=false", "--set", "node.serviceAccount.create=false", "--set-string", "node.nodeSelector.nowhere=true",
	}, here...)...)
	args := []string{"upgrade", "--install", "-n", chartSpace, "spire", filepath.Join(dir, "charts", "spire"), "--wait"}
	for _, v := range append(spireValues, "spire-server.enabled=false") {
		args = append(args, "--set", v)
	}
	helm(t, args...)

	namespace(t, "theirs", "web")
	pod := create(t, "theirs", probePod("web", "web"))
	got, _ := probeLog(t, pod, time.Minute, has("default", "ROOTCA")).First("default")
	t.Logf("container start -> default, by SPIRE Agent: %s", got.SinceStart)
	if want := "spiffe://" + trustDomain + "/ns/theirs/sa/web"; got.SPIFFEID != want {
		t.Errorf("identity is %q, want %q", got.SPIFFEID, want)
	}
	if list := cli(t, "agent", "list"); !strings.Contains(list, "/spire/agent/k8s_psat/example-cluster/") {
		t.Errorf("no agent attested by k8s_psat is listed:\n%s", list)
	}
	if out, err := node.Kubectl(within(t, time.Minute), "get", "pods", "-A", "-o", "name"); err != nil || strings.Contains(out, "spiffe-node") {
		t.Errorf("a node's pod of the product runs (%v):\n%s", err, out)
	}
	remove(t, pod)
	helm(t, "delete", "-n", chartSpace, "spire", "--wait")
	for _, name := range []string{"clusterspiffeids", "clusterstaticentries", "clusterfederatedtrustdomains"} {
		kubectl(t, "delete", "CustomResourceDefinition", name+".spire.spiffe.io")
	}
	helm(t, "delete", "-n", chartSpace, "authority", "--wait")
	helm(t, "delete", "-n", chartSpace, "spire-crds", "--wait")
	kubectl(t, "delete", "namespace", "theirs")
	if _, err := node.OnNode(within(t, time.Minute), "rm", "-rf", "/var/lib/spiffe-node", "/run/spire"); err != nil {
		t.Fatal(err)
	}
}
