package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spiffe-node/spiffe-node/test/e2e/cluster"
	"github.com/spiffe-node/spiffe-node/test/e2e/probe"
)

// TestProduct installs the bundle and takes it through a node's life. Its
// parts build on each other.
func TestProduct(t *testing.T) {
	if rigOnly() {
		t.Skip("E2E_RIG_ONLY is set: the product was not built")
	}
	diagnoseOnFailure(t)
	begun := time.Now()
	manifests, err := os.ReadFile("testdata/product.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if err := node.Apply(within(t, time.Minute), string(manifests)); err != nil {
		t.Fatal(err)
	}
	agentPod(t)
	t.Logf("applied -> Ready: %s", time.Since(begun).Round(time.Millisecond))
	for _, part := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"late", testLate},
		{"known", testKnown},
		{"kubelet restart", testKubeletRestart},
		{"agent restart", testAgentRestart},
		{"driver restart", testDriverRestart},
		{"driver away", testDriverAway},
		{"product pod replaced", testReplaced},
		{"nothing left", testNothingLeft},
	} {
		if !t.Run(part.name, part.run) {
			t.FailNow()
		}
	}
}

// testLate starts a pod nobody has registered: it gets the bundle, no error,
// and its identity the moment there is an entry.
func testLate(t *testing.T) {
	t.Helper()
	namespace(t, "late", "web")
	pod := create(t, "late", probePod("web", "web"))
	log := probeLog(t, pod, time.Minute, has("ROOTCA"))
	first, _ := log.First("ROOTCA")
	t.Logf("container start -> ROOTCA: %s", first.SinceStart)
	if len(log.Errors()) > 0 {
		t.Errorf("streams of an unregistered pod ended: %v", log.Errors())
	}
	begun := time.Now()
	id := register(t, "late", "web")
	log = probeLog(t, pod, 30*time.Second, has("default"))
	got, _ := log.First("default")
	t.Logf("entry create (with kubectl exec) -> default: %s", got.Time.Sub(begun).Round(time.Millisecond))
	if got.SPIFFEID != id {
		t.Errorf("identity is %q, want %q", got.SPIFFEID, id)
	}
	if len(log.Errors()) > 0 {
		t.Errorf("streams ended while waiting for the entry: %v", log.Errors())
	}
	if ca, _ := log.First("ROOTCA"); !slices.Equal(ca.TrustDomains, []string{trustDomain}) {
		t.Errorf("ROOTCA is for %q, want %q", ca.TrustDomains, trustDomain)
	}
	remove(t, pod)
	gone(t, pod)
}

// testKnown measures pods whose entry is there before them.
func testKnown(t *testing.T) {
	t.Helper()
	namespace(t, "known", "web")
	id := register(t, "known", "web")
	const count = 10
	var svid, both []time.Duration
	for i := range count {
		pod := create(t, "known", probePod("web-"+strconv.Itoa(i), "web"))
		log := probeLog(t, pod, time.Minute, has("default", "ROOTCA"))
		own, _ := log.First("default")
		ca, _ := log.First("ROOTCA")
		svid = append(svid, own.SinceStart)
		both = append(both, max(own.SinceStart, ca.SinceStart))
		if own.SPIFFEID != id {
			t.Errorf("pod %s is %q, want %q", pod.Metadata.Name, own.SPIFFEID, id)
		}
		if len(log.Errors()) > 0 {
			t.Errorf("pod %s had streams end: %v", pod.Metadata.Name, log.Errors())
		}
		if mounts := volumeMounts(t, pod.Metadata.UID); len(mounts) != 1 {
			t.Errorf("pod %s has %d mounts, want 1: %q", pod.Metadata.Name, len(mounts), mounts)
		}
	}
	t.Logf("container start -> default: %s", quantiles(svid))
	t.Logf("container start -> both:    %s", quantiles(both))
}

// pods are those that testKnown left running.
func pods(t *testing.T) []cluster.Pod {
	t.Helper()
	all, err := node.Pods(within(t, 10*time.Second), "known", "app=probe")
	if err != nil {
		t.Fatal(err)
	}
	return all
}

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
	killContainer(t, "agent")
	var outages []time.Duration
	for _, pod := range pods(t) {
		log := probeLog(t, &pod, 90*time.Second, func(log probe.Log) error {
			if n := len(log.Outages()); n < 2 {
				return fmt.Errorf("%d of 2 streams are back: %v", n, log.Errors())
			}
			return nil
		})
		outages = append(outages, log.Outages()...)
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

// testDriverAway deletes a pod at the moment its driver is killed.
func testDriverAway(t *testing.T) {
	t.Helper()
	pod := create(t, "known", probePod("orphan", "web"))
	probeLog(t, pod, time.Minute, has("default"))
	killContainer(t, "driver")
	t.Logf("pod deleted as its driver was killed: gone after %s", remove(t, pod).Round(time.Millisecond))
	gone(t, pod)
	agentPod(t)
}

// testReplaced deletes the product's pod: the DaemonSet makes a new one on the
// same directories.
func testReplaced(t *testing.T) {
	t.Helper()
	old := agentPod(t)
	mounts := volumeMounts(t, "")
	before := map[string]int{}
	for _, pod := range pods(t) {
		before[pod.Metadata.Name] = len(probeLog(t, &pod, 10*time.Second, has("default")).Outages())
	}
	begun := time.Now()
	if err := node.DeletePod(within(t, 30*time.Second), system, old.Metadata.Name, -1); err != nil {
		t.Fatal(err)
	}
	if err := node.WaitGone(within(t, time.Minute), system, old.Metadata.Name, old.Metadata.UID); err != nil {
		t.Fatal(err)
	}
	agentPod(t)
	t.Logf("product's pod deleted -> successor Ready: %s", time.Since(begun).Round(time.Millisecond))
	var outages []time.Duration
	for _, pod := range pods(t) {
		seen := before[pod.Metadata.Name]
		log := probeLog(t, &pod, 90*time.Second, func(log probe.Log) error {
			if n := len(log.Outages()) - seen; n < 2 {
				return fmt.Errorf("%d of 2 streams are back: %v", n, log.Errors())
			}
			return nil
		})
		outages = append(outages, log.Outages()[seen:]...)
	}
	t.Logf("product's pod deleted -> stream outages: %s", quantiles(outages))
	if after := volumeMounts(t, ""); len(after) != len(mounts) {
		t.Errorf("%d mounts before the product's pod was replaced, %d after", len(mounts), len(after))
	}
}

// testNothingLeft deletes every pod with a volume.
func testNothingLeft(t *testing.T) {
	t.Helper()
	var took []time.Duration
	for _, pod := range pods(t) {
		took = append(took, remove(t, &pod))
		gone(t, &pod)
	}
	t.Logf("pod deleted -> gone: %s", quantiles(took))
	if mounts := volumeMounts(t, ""); len(mounts) > 0 {
		t.Errorf("mounts left over: %q", mounts)
	}
	if records := ledgerRecords(t); len(records) > 0 {
		t.Errorf("ledger records left over: %q", records)
	}
}

// gone checks that nothing of a deleted pod is left on the node.
func gone(t *testing.T, pod *cluster.Pod) {
	t.Helper()
	uid := pod.Metadata.UID
	if mounts := volumeMounts(t, uid); len(mounts) > 0 {
		t.Errorf("pod %s left mounts: %q", pod.Metadata.Name, mounts)
	}
	for _, name := range ledgerRecords(t) {
		text, err := os.ReadFile(node.NodePath(ledgerDir + "/" + name))
		if err == nil && strings.Contains(string(text), uid) {
			t.Errorf("pod %s left ledger record %s: %s", pod.Metadata.Name, name, text)
		}
	}
	// The kubelet removes the pod's directory once nothing is in it.
	err := cluster.Poll(within(t, 30*time.Second), 200*time.Millisecond, func(context.Context) error {
		_, err := os.Stat(node.NodePath("/var/lib/kubelet/pods/" + uid + "/volumes/kubernetes.io~csi"))
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return errors.Join(errors.New("the pod's CSI volumes directory is still there"), err)
	})
	if err != nil {
		t.Errorf("pod %s: %v", pod.Metadata.Name, err)
	}
}

// killContainer kills the process of one of the product's containers with
// SIGKILL; the kubelet starts it again.
func killContainer(t *testing.T, name string) {
	t.Helper()
	pod := agentPod(t)
	program := map[string]string{"agent": "/sds-agent", "driver": "/csi-driver"}[name]
	ctx := within(t, 30*time.Second)
	pid, err := node.OnNode(ctx, "pgrep", "-o", "-f", "^"+program)
	if err != nil {
		t.Fatalf("finding the %s of pod %s: %v", name, pod.Metadata.Name, err)
	}
	if _, err := node.OnNode(ctx, "kill", "-KILL", strings.TrimSpace(pid)); err != nil {
		t.Fatal(err)
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
