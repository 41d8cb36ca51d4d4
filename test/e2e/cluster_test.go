package e2e_test

import (
	"strings"
	"testing"
	"time"
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
