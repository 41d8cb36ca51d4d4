package e2e_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe-node/spiffe-node/test/e2e/cluster"
)

// testKubeletRestart restarts the kubelet, which publishes every volume again:
// no mount may be added.
func testKubeletRestart(t *testing.T) {
	t.Helper()
	before := volumeMounts(t, "")
	for range 3 {
		published := driverPublishes(t)
		if err := node.Restart(within(t, time.Minute), "kubelet"); err != nil {
			t.Fatal(err)
		}
		want := published + len(before)
		err := cluster.Poll(within(t, 2*time.Minute), 200*time.Millisecond, func(ctx context.Context) error {
			if now := driverPublishes(t); now < want {
				return fmt.Errorf("the kubelet has published %d volumes again, of %d", now-published, len(before))
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if after := volumeMounts(t, ""); !slices.Equal(slices.Sorted(slices.Values(before)), slices.Sorted(slices.Values(after))) {
		t.Errorf("mounts before %d:\n%s\nafter three kubelet restarts %d:\n%s", len(before), strings.Join(before, "\n"), len(after), strings.Join(after, "\n"))
	}
	undisturbed(t)
}

// undisturbed checks that no probe has lost a stream so far.
func undisturbed(t *testing.T) {
	t.Helper()
	for _, pod := range pods(t) {
		log := probeLog(t, &pod, 10*time.Second, has("default"))
		if len(log.Errors()) > 0 {
			t.Errorf("pod %s had streams end: %v", pod.Metadata.Name, log.Errors())
		}
	}
}

// testAgentRestart kills the agent's process: every stream comes back by itself
// and identities are the same.
func testAgentRestart(t *testing.T) {
	t.Helper()
	before := map[string]string{}
	for _, pod := range pods(t) {
		last, _ := probeLog(t, &pod, 10*time.Second, has("default")).Last("default")
		before[pod.Metadata.Name] = last.Serial
	}
	agentPod(t)
	killContainer(t, "agent")
	t.Logf("agent killed -> socket takes connections: %s", socketBack(t))
	var outages []time.Duration
	for _, pod := range pods(t) {
		log := probeLog(t, &pod, 90*time.Second, outagesOver(2))
		outages = append(outages, log.Outages()...)
		explainSlow(t, &pod, log, log.Outages())
		if last, _ := log.Last("default"); last.Serial != before[pod.Metadata.Name] {
			t.Errorf("pod %s got a new SVID for the agent's restart: serial %s, before %s", pod.Metadata.Name, last.Serial, before[pod.Metadata.Name])
		}
	}
	t.Logf("agent killed -> stream outages: %s", quantiles(outages))
	agentPod(t)
}

// testDriverRestart kills the driver's process: mounts stay and the next pod is published.
func testDriverRestart(t *testing.T) {
	t.Helper()
	before := volumeMounts(t, "")
	agentPod(t)
	killContainer(t, "driver")
	if after := volumeMounts(t, ""); len(after) != len(before) {
		t.Errorf("%d mounts before the driver was killed, %d after", len(before), len(after))
	}
	begun := time.Now()
	pod := create(t, on.workloads, probePod("after-driver-restart", "web"))
	log := probeLog(t, pod, 90*time.Second, has("default"))
	first, _ := log.First("default")
	t.Logf("pod created right after the driver was killed has its identity after %s, %s after its start", first.Time.Sub(begun).Round(time.Millisecond), first.SinceStart)
	agentPod(t)
	t.Logf("pod deleted in %s", remove(t, pod).Round(time.Millisecond))
	gone(t, pod)
}

// testProductDeleted deletes a pod at the moment the product's pod is deleted.
func testProductDeleted(t *testing.T) {
	t.Helper()
	pod := create(t, on.workloads, probePod("orphan", "web"))
	probeLog(t, pod, time.Minute, has("default"))
	product := agentPod(t)
	if err := node.DeletePod(within(t, 30*time.Second), on.namespace, product.Metadata.Name, -1); err != nil {
		t.Fatal(err)
	}
	t.Logf("pod and product deleted together: pod gone after %s", remove(t, pod).Round(time.Millisecond))
	if err := node.WaitGone(within(t, time.Minute), on.namespace, product.Metadata.Name, product.Metadata.UID); err != nil {
		t.Fatal(err)
	}
	newProductPod(t)
	gone(t, pod)
}

// testReplaced deletes the product's pod: the DaemonSet makes a new one on the
// same directories.
func testReplaced(t *testing.T) {
	t.Helper()
	old := agentPod(t)
	mounts := volumeMounts(t, "")
	before := settled(t)
	begun := time.Now()
	if err := node.DeletePod(within(t, 30*time.Second), on.namespace, old.Metadata.Name, -1); err != nil {
		t.Fatal(err)
	}
	if err := node.WaitGone(within(t, time.Minute), on.namespace, old.Metadata.Name, old.Metadata.UID); err != nil {
		t.Fatal(err)
	}
	newProductPod(t)
	t.Logf("product's pod deleted -> successor Ready: %s", time.Since(begun).Round(time.Millisecond))
	var outages []time.Duration
	for _, pod := range pods(t) {
		seen := before[pod.Metadata.Name]
		log := probeLog(t, &pod, 90*time.Second, outagesOver(seen+2))
		outages = append(outages, log.Outages()[seen:]...)
		explainSlow(t, &pod, log, log.Outages()[seen:])
	}
	t.Logf("product's pod deleted -> stream outages: %s", quantiles(outages))
	if after := volumeMounts(t, ""); len(after) != len(mounts) {
		t.Errorf("%d mounts before the product's pod was replaced, %d after", len(mounts), len(after))
	}
}
