package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/spiffe-node/spiffe-node/test/e2e/cluster"
	"github.com/spiffe-node/spiffe-node/test/e2e/probe"
)

// testDriverAway takes the product off the node, deletes a pod with a volume,
// by force another one, and brings the product back: both are cleaned up.
func testDriverAway(t *testing.T) {
	t.Helper()
	waits := create(t, on.workloads, probePod("waits", "web"))
	forced := create(t, on.workloads, probePod("forced", "web"))
	probeLog(t, waits, time.Minute, has("default"))
	probeLog(t, forced, time.Minute, has("default"))
	productAway(t)
	ctx := within(t, time.Minute)
	if err := node.DeletePod(ctx, on.workloads, "waits", -1); err != nil {
		t.Fatal(err)
	}
	if err := node.DeletePod(ctx, on.workloads, "forced", 0); err != nil {
		t.Fatal(err)
	}
	if err := node.WaitGone(ctx, on.workloads, "forced", forced.Metadata.UID); err != nil {
		t.Fatal(err)
	}
	<-time.After(3 * time.Second) // long enough for the kubelet to fail a few times
	if n := len(volumeMounts(t, waits.Metadata.UID)); n != 1 {
		t.Errorf("pod deleted while the driver is away has %d mounts, want its one", n)
	}
	begun := time.Now()
	placeProduct(t, map[string]any{"nowhere": nil})
	newProductPod(t)
	t.Logf("product back and Ready after %s", time.Since(begun).Round(time.Millisecond))
	if err := node.WaitGone(within(t, 2*time.Minute), on.workloads, "waits", waits.Metadata.UID); err != nil {
		t.Fatal(err)
	}
	t.Logf("pod deleted meanwhile is gone %s after the product was asked back", time.Since(begun).Round(time.Millisecond))
	gone(t, waits)
	gone(t, forced)
}

// productAway takes the product's pod off the node until placeProduct has it back.
func productAway(t *testing.T) {
	t.Helper()
	product := agentPod(t)
	placeProduct(t, map[string]any{"nowhere": "true"})
	if err := node.WaitGone(within(t, time.Minute), on.namespace, product.Metadata.Name, product.Metadata.UID); err != nil {
		t.Fatal(err)
	}
}

// placeProduct sets labels of nodes that the DaemonSet asks for.
func placeProduct(t *testing.T, labels map[string]any) {
	t.Helper()
	patch := map[string]any{"spec": map[string]any{"template": map[string]any{"spec": map[string]any{"nodeSelector": labels}}}}
	if err := node.API(within(t, 30*time.Second), http.MethodPatch, "/apis/apps/v1/namespaces/"+on.namespace+"/daemonsets/spiffe-node", patch, nil); err != nil {
		t.Fatal(err)
	}
}

// testAPIAway stops the API server and kills the agent: running pods get their
// identities back without it.
func testAPIAway(t *testing.T) {
	t.Helper()
	all := pods(t)
	before := settled(t)
	if err := node.Stop(within(t, 30*time.Second), "kube-apiserver"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = node.Start(context.WithoutCancel(t.Context()), "kube-apiserver") }) // runs already if the test got that far
	killContainer(t, "agent")
	t.Logf("agent killed -> socket takes connections: %s", socketBack(t))
	var outages []time.Duration
	for _, pod := range all {
		seen := before[pod.Metadata.Name]
		log := nodeLog(t, &pod, 90*time.Second, outagesOver(seen+2))
		outages = append(outages, log.Outages()[seen:]...)
		explainSlow(t, &pod, log, log.Outages()[seen:])
	}
	t.Logf("agent killed with the API server away -> stream outages: %s", quantiles(outages))
	ctx := within(t, time.Minute)
	if err := node.Start(ctx, "kube-apiserver"); err != nil {
		t.Fatal(err)
	}
	err := cluster.Poll(ctx, 100*time.Millisecond, func(ctx context.Context) error {
		return node.API(ctx, http.MethodGet, "/readyz", nil, nil)
	})
	if err != nil {
		t.Fatal(err)
	}
	agentPod(t)
}

// testReboot cuts the node's power: pods come back with one mount and an
// identity each.
func testReboot(t *testing.T) {
	t.Helper()
	all := pods(t)
	begun := time.Now()
	if err := node.Reboot(within(t, 2*time.Minute)); err != nil {
		t.Fatal(err)
	}
	for _, pod := range all {
		log := nodeLog(t, &pod, 3*time.Minute, func(log probe.Log) error {
			if len(log) == 0 || log[0].Time.Before(begun) {
				return errors.New("the pod has not been started again")
			}
			return has("default", "ROOTCA")(log)
		})
		if len(log.Errors()) > 0 {
			t.Logf("pod %s had streams end while the node came up: %v", pod.Metadata.Name, log.Errors())
		}
	}
	t.Logf("node rebooted -> all %d pods have their identities: %s", len(all), time.Since(begun).Round(time.Millisecond))
	err := cluster.Poll(within(t, time.Minute), 100*time.Millisecond, func(context.Context) error {
		for _, cs := range agentPod(t).Status.ContainerStatuses {
			if cs.RestartCount <= kills[cs.Name] {
				return fmt.Errorf("container %s has not been started again since the reboot, as far as the API knows", cs.Name)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	newProductPod(t)
	for _, pod := range all {
		if mounts := volumeMounts(t, pod.Metadata.UID); len(mounts) != 1 {
			t.Errorf("pod %s has %d mounts after the reboot, want 1: %q", pod.Metadata.Name, len(mounts), mounts)
		}
	}
	if n := len(ledgerRecords(t)); n != len(all) {
		t.Errorf("%d ledger records after the reboot, want %d", n, len(all))
	}
}
