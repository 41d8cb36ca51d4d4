package e2e_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/spiffe-node/spiffe-node/test/e2e/cluster"
)

// TestCluster checks the rig itself: a pod without the product runs, kubectl
// exec and logs reach it, and a kubelet restart leaves it alone.
func TestCluster(t *testing.T) {
	diagnoseOnFailure(t)
	namespace(t, "rig", "plain")
	spec := probePod("plain", "plain", "-socket", "/nowhere/socket")
	spec["spec"].(map[string]any)["volumes"] = nil
	spec["spec"].(map[string]any)["containers"].([]any)[0].(map[string]any)["volumeMounts"] = nil
	pod := create(t, "rig", spec)
	ctx := within(t, time.Minute)
	before, err := node.WaitReady(ctx, "rig", "plain")
	if err != nil {
		t.Fatal(err)
	}
	text, err := node.Logs(ctx, "rig", "plain", "")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(text, `"kind":"start"`) {
		t.Errorf("log of the probe has no start: %q", text)
	}
	if out, err := node.Exec(ctx, "rig", "plain", "", "/probe", "-h"); err != nil || out != "" {
		t.Errorf("exec: %v, output %q", err, out)
	}
	if err := node.Restart(ctx, "kubelet"); err != nil {
		t.Fatal(err)
	}
	after, err := node.WaitReady(ctx, "rig", "plain")
	if err != nil {
		t.Fatal(err)
	}
	if b, a := before.Status.ContainerStatuses[0], after.Status.ContainerStatuses[0]; b.ContainerID != a.ContainerID {
		t.Errorf("kubelet restart replaced the container: %s, then %s", b.ContainerID, a.ContainerID)
	}
	t.Logf("deleted in %s", remove(t, pod).Round(time.Millisecond))
}

// TestSecondNode checks the rig's further nodes: a pod there runs, is reached
// by exec and by logs, and pods of both nodes reach each other and the API
// server's service.
func TestSecondNode(t *testing.T) {
	second, err := cluster.Join(within(t, 3*time.Minute), node, 1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { leave(t, second) })
	diagnoseOnFailure(t, second)
	namespace(t, "rig2", "plain")
	ctx := within(t, time.Minute)
	ips := map[string]string{}
	for _, n := range []*cluster.Cluster{node, second} {
		spec := probePod(n.NodeName(), "plain", "-socket", "/nowhere/socket", "-listen", ":8443")
		spec["spec"].(map[string]any)["volumes"] = nil
		spec["spec"].(map[string]any)["containers"].([]any)[0].(map[string]any)["volumeMounts"] = nil
		spec["spec"].(map[string]any)["nodeName"] = n.NodeName()
		create(t, "rig2", spec)
		pod, err := node.WaitReady(ctx, "rig2", n.NodeName())
		if err != nil {
			t.Fatal(err)
		}
		if out, err := node.Exec(ctx, "rig2", n.NodeName(), "", "/probe", "-h"); err != nil || out != "" {
			t.Errorf("exec: %v, output %q", err, out)
		}
		ips[n.NodeName()] = pod.Status.PodIP
	}
	for _, n := range []*cluster.Cluster{node, second} {
		for _, address := range []string{ips[node.NodeName()] + ":8443", ips[second.NodeName()] + ":8443", "10.96.0.1:443"} {
			if _, err := n.OnNode(ctx, "timeout", "5", "bash", "-c", "</dev/tcp/"+strings.Replace(address, ":", "/", 1)); err != nil {
				t.Errorf("from %s to %s: %v", n.NodeName(), address, err)
			}
		}
	}
	kubectl(t, "delete", "namespace", "rig2")
}

// leave takes a further node out of the cluster.
func leave(t *testing.T, n *cluster.Cluster) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
	defer cancel()
	if err := n.Close(ctx); err != nil {
		t.Error(err)
	}
	if _, err := node.Kubectl(ctx, "delete", "node", n.NodeName()); err != nil {
		t.Error(err)
	}
}
