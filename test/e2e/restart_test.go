package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spiffe-node/spiffe-node/test/e2e/cluster"
	"github.com/spiffe-node/spiffe-node/test/e2e/probe"
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

// socketBack waits until the agent's socket takes connections and returns how
// long that took: the server's part of an outage, without the clients' waits.
func socketBack(t *testing.T) time.Duration {
	t.Helper()
	begun := time.Now()
	err := cluster.Poll(within(t, time.Minute), 5*time.Millisecond, func(ctx context.Context) error {
		conn, err := new(net.Dialer).DialContext(ctx, "unix", node.NodePath("/run/spiffe-node/public/socket"))
		if err != nil {
			return err
		}
		return conn.Close()
	})
	if err != nil {
		t.Fatal(err)
	}
	return time.Since(begun).Round(time.Millisecond)
}

// explainSlow prints what a probe went through if a stream of it was down for
// longer than a fresh start and Envoy's first waits explain.
func explainSlow(t *testing.T, pod *cluster.Pod, log probe.Log, outages []time.Duration) {
	t.Helper()
	if len(outages) > 0 && (len(outages) != 2 || slices.Max(outages) > 8*time.Second) {
		for _, ev := range log[max(0, len(log)-15):] {
			t.Logf("pod %s: %s %s %s attempt %d %s %s", pod.Metadata.Name, ev.Time.Format("15:04:05.000"), ev.Kind, ev.Name, ev.Attempt, ev.Code, ev.Message)
		}
	}
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
	pod := create(t, "known", probePod("after-driver-restart", "web"))
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
	pod := create(t, "known", probePod("orphan", "web"))
	probeLog(t, pod, time.Minute, has("default"))
	product := agentPod(t)
	if err := node.DeletePod(within(t, 30*time.Second), system, product.Metadata.Name, -1); err != nil {
		t.Fatal(err)
	}
	t.Logf("pod and product deleted together: pod gone after %s", remove(t, pod).Round(time.Millisecond))
	if err := node.WaitGone(within(t, time.Minute), system, product.Metadata.Name, product.Metadata.UID); err != nil {
		t.Fatal(err)
	}
	newProductPod(t)
	gone(t, pod)
}

// testDriverAway takes the product off the node, deletes a pod with a volume,
// by force another one, and brings the product back: both are cleaned up.
func testDriverAway(t *testing.T) {
	t.Helper()
	waits := create(t, "known", probePod("waits", "web"))
	forced := create(t, "known", probePod("forced", "web"))
	probeLog(t, waits, time.Minute, has("default"))
	probeLog(t, forced, time.Minute, has("default"))
	product := agentPod(t)
	place := func(selector any) {
		patch := map[string]any{"spec": map[string]any{"template": map[string]any{"spec": map[string]any{"nodeSelector": selector}}}}
		if err := node.API(within(t, 30*time.Second), http.MethodPatch, "/apis/apps/v1/namespaces/"+system+"/daemonsets/spiffe-node", patch, nil); err != nil {
			t.Fatal(err)
		}
	}
	place(map[string]any{"nowhere": "true"})
	if err := node.WaitGone(within(t, time.Minute), system, product.Metadata.Name, product.Metadata.UID); err != nil {
		t.Fatal(err)
	}
	ctx := within(t, time.Minute)
	if err := node.DeletePod(ctx, "known", "waits", -1); err != nil {
		t.Fatal(err)
	}
	if err := node.DeletePod(ctx, "known", "forced", 0); err != nil {
		t.Fatal(err)
	}
	if err := node.WaitGone(ctx, "known", "forced", forced.Metadata.UID); err != nil {
		t.Fatal(err)
	}
	<-time.After(3 * time.Second) // long enough for the kubelet to fail a few times
	if n := len(volumeMounts(t, waits.Metadata.UID)); n != 1 {
		t.Errorf("pod deleted while the driver is away has %d mounts, want its one", n)
	}
	begun := time.Now()
	place(map[string]any{"nowhere": nil})
	newProductPod(t)
	t.Logf("product back and Ready after %s", time.Since(begun).Round(time.Millisecond))
	if err := node.WaitGone(within(t, 2*time.Minute), "known", "waits", waits.Metadata.UID); err != nil {
		t.Fatal(err)
	}
	t.Logf("pod deleted meanwhile is gone %s after the product was asked back", time.Since(begun).Round(time.Millisecond))
	gone(t, waits)
	gone(t, forced)
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

// testReplaced deletes the product's pod: the DaemonSet makes a new one on the
// same directories.
func testReplaced(t *testing.T) {
	t.Helper()
	old := agentPod(t)
	mounts := volumeMounts(t, "")
	before := settled(t)
	begun := time.Now()
	if err := node.DeletePod(within(t, 30*time.Second), system, old.Metadata.Name, -1); err != nil {
		t.Fatal(err)
	}
	if err := node.WaitGone(within(t, time.Minute), system, old.Metadata.Name, old.Metadata.UID); err != nil {
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

// findProcess is the process on the node that runs the agent or the driver.
func findProcess(t *testing.T, name string) string {
	t.Helper()
	program := map[string]string{"agent": "/sds-agent", "driver": "/csi-driver"}[name]
	pid, err := node.OnNode(within(t, 30*time.Second), "pgrep", "-o", "-f", "^"+program)
	if err != nil {
		t.Fatalf("finding the %s: %v", name, err)
	}
	return strings.TrimSpace(pid)
}

// killProcess returns when the process is gone.
func killProcess(t *testing.T, pid string) {
	t.Helper()
	ctx := within(t, 30*time.Second)
	if _, err := node.OnNode(ctx, "kill", "-KILL", pid); err != nil {
		t.Fatal(err)
	}
	err := cluster.Poll(ctx, time.Millisecond, func(context.Context) error {
		if _, err := os.Stat(node.NodePath("/proc/" + pid)); errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return fmt.Errorf("process %s is still there", pid)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// killContainer kills the process of one of the product's containers; the
// kubelet starts it again, at once the first time, then with a back-off.
func killContainer(t *testing.T, name string) {
	t.Helper()
	killProcess(t, findProcess(t, name))
	kills[name]++
}

// kills are how often these tests have killed which container of the product's
// present pod.
var kills = map[string]int{}

// newProductPod says that the product's pod is a new one, or has been through a reboot.
func newProductPod(t *testing.T) {
	t.Helper()
	clear(kills)
	for _, cs := range agentPod(t).Status.ContainerStatuses {
		kills[cs.Name] = cs.RestartCount
	}
}

// noOtherRestarts checks that the product ended only when it was killed.
func noOtherRestarts(t *testing.T) {
	t.Helper()
	err := cluster.Poll(within(t, 30*time.Second), 100*time.Millisecond, func(context.Context) error {
		for _, cs := range agentPod(t).Status.ContainerStatuses {
			if cs.RestartCount != kills[cs.Name] {
				return fmt.Errorf("container %s has been started again %d times, and was killed %d times", cs.Name, cs.RestartCount, kills[cs.Name])
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// settled waits until every stream of the running pods is up, and returns how
// many outages each pod has had so far.
func settled(t *testing.T) map[string]int {
	t.Helper()
	outages := map[string]int{}
	for _, pod := range pods(t) {
		log := nodeLog(t, &pod, 2*time.Minute, func(log probe.Log) error {
			if n := log.Down(); n > 0 {
				return fmt.Errorf("%d streams are down", n)
			}
			return has("default", "ROOTCA")(log)
		})
		outages[pod.Metadata.Name] = len(log.Outages())
	}
	return outages
}

// outagesOver waits until at least n streams have ended and come back.
func outagesOver(n int) func(probe.Log) error {
	return func(log probe.Log) error {
		if have := len(log.Outages()); have < n {
			return fmt.Errorf("%d of %d streams are back: %v", have, n, log.Errors())
		}
		return nil
	}
}

// driverPublishes is how many NodePublishVolume calls the driver has answered.
func driverPublishes(t *testing.T) int {
	t.Helper()
	text, err := node.HTTP(within(t, 10*time.Second), "http://"+agentPod(t).Status.PodIP+":9809/metrics")
	if err != nil {
		t.Fatal(err)
	}
	total := 0
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "spiffe_node_csi_") && strings.Contains(line, "NodePublishVolume") && strings.Contains(line, "_total") {
			fields := strings.Fields(line)
			if n, err := strconv.ParseFloat(fields[len(fields)-1], 64); err == nil {
				total += int(n)
			}
		}
	}
	return total
}
