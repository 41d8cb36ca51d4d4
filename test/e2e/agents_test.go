package e2e_test

import (
	"strings"
	"testing"
	"time"
)

// TestSPIREAgents runs SPIRE's own agents and drivers, from its chart, on the
// product's authority: they attest by k8s_psat with tokens of a real kubelet,
// and serve pods that the authority registers.
func TestSPIREAgents(t *testing.T) {
	dir := besideSPIRE(t)
	helmProduct(t, "authority", "--set", "csiDriverObject.create=false", "--set", "node.serviceAccount.create=false", "--set-string", "node.nodeSelector.nowhere=true")
	helmSPIRE(t, dir, chartSpace, "spire-server.enabled=false")

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
	deleteCRDs(t)
	helm(t, "delete", "-n", chartSpace, "authority", "--wait")
	helm(t, "delete", "-n", chartSpace, "spire-crds", "--wait")
	kubectl(t, "delete", "namespace", "theirs")
	if _, err := node.OnNode(within(t, time.Minute), "rm", "-rf", "/var/lib/spiffe-node", "/run/spire"); err != nil {
		t.Fatal(err)
	}
}
