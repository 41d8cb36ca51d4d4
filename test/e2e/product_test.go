package e2e_test

import (
	"context"
	"errors"
	"fmt"
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

// TestProduct installs the bundle and takes it through a node's life. Its
// parts build on each other.
func TestProduct(t *testing.T) {
	if rigOnly() {
		t.Skip("E2E_RIG_ONLY is set: the product was not built")
	}
	diagnoseOnFailure(t)
	on = plain()
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
	runParts(t, []part{
		{"late", testLate},
		{"known", testKnown},
		{"kubelet restart", testKubeletRestart},
		{"agent restart", testAgentRestart},
		{"driver restart", testDriverRestart},
		{"product pod replaced", testReplaced},
		{"product pod deleted", testProductDeleted},
		{"driver away", testDriverAway},
		{"API server away", testAPIAway},
		{"reboot", testReboot},
		{"stranger", testStranger},
		{"kinds of pods", testKinds},
		{"mutual TLS", testMutualTLS},
		{"burst", testBurst},
		{"nothing left", testNothingLeft},
	})
	removePlain(t)
}

// part is one step of a test whose steps build on each other.
type part struct {
	name string
	run  func(*testing.T)
}

// runParts stops at the first that fails.
func runParts(t *testing.T, parts []part) {
	t.Helper()
	for _, part := range parts {
		if !t.Run(part.name, func(t *testing.T) { part.run(t); noOtherRestarts(t) }) {
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
	explained := cli(t, "explain", "-pod", "late/web")
	t.Logf("explain -pod late/web:\n%s", explained)
	for _, want := range []string{"late", "web", pod.Metadata.UID} {
		if !strings.Contains(explained, want) {
			t.Errorf("explain does not mention %q", want)
		}
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

// testMutualTLS lets two pods of different service accounts shake hands with
// what they were sent.
func testMutualTLS(t *testing.T) {
	t.Helper()
	namespace(t, "tls", "server", "client")
	ids := map[string]string{"server": register(t, "tls", "server"), "client": register(t, "tls", "client")}
	server := create(t, "tls", probePod("server", "server", "-listen", ":8443"))
	ready, err := node.WaitReady(within(t, time.Minute), "tls", "server")
	if err != nil {
		t.Fatal(err)
	}
	client := create(t, "tls", probePod("client", "client", "-dial", ready.Status.PodIP+":8443"))
	for name, pod := range map[string]*cluster.Pod{"client": server, "server": client} {
		want := ids[name] // the other's
		probeLog(t, pod, time.Minute, func(log probe.Log) error {
			for _, ev := range log {
				if ev.Kind == probe.Peer && ev.Message == "" && ev.SPIFFEID == want {
					return nil
				}
			}
			return fmt.Errorf("no handshake with %s in %+v", want, log)
		})
	}
	remove(t, client)
	remove(t, server)
}

// testKnown measures pods whose entry is there before them.
func testKnown(t *testing.T) {
	t.Helper()
	namespace(t, on.workloads, "web")
	id := register(t, on.workloads, "web")
	count := on.known
	switch {
	case count > 0:
	case testing.Short():
		count = 10
	default:
		count = 40
	}
	var svid, both []time.Duration
	for i := range count {
		pod := create(t, on.workloads, probePod("web-"+strconv.Itoa(i), "web"))
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
	all, err := node.Pods(within(t, 10*time.Second), on.workloads, "app=probe")
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// removePlain makes room for another installation.
func removePlain(t *testing.T) {
	t.Helper()
	ctx, product := within(t, 2*time.Minute), agentPod(t)
	for _, path := range []string{"/apis/apps/v1/namespaces/" + on.namespace + "/daemonsets/spiffe-node", "/apis/storage.k8s.io/v1/csidrivers/csi.spiffe.io"} {
		if err := node.API(ctx, http.MethodDelete, path, nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := node.WaitGone(ctx, on.namespace, product.Metadata.Name, product.Metadata.UID); err != nil {
		t.Fatal(err)
	}
	if _, err := node.OnNode(ctx, "rm", "-r", "/run/spiffe-node"); err != nil {
		t.Fatal(err)
	}
}

// testNothingLeft deletes every pod with a volume, some one by one and the
// rest together.
func testNothingLeft(t *testing.T) {
	t.Helper()
	var took []time.Duration
	all := pods(t)
	single := min(10, len(all))
	for _, pod := range all[:single] {
		took = append(took, remove(t, &pod))
	}
	t.Logf("pod deleted -> gone, one by one: %s", quantiles(took))
	for _, pod := range all[single:] {
		if err := node.DeletePod(within(t, 30*time.Second), pod.Metadata.Namespace, pod.Metadata.Name, -1); err != nil {
			t.Fatal(err)
		}
	}
	for _, pod := range all {
		if err := node.WaitGone(within(t, 2*time.Minute), pod.Metadata.Namespace, pod.Metadata.Name, pod.Metadata.UID); err != nil {
			t.Fatal(err)
		}
		gone(t, &pod)
	}
	if mounts := volumeMounts(t, ""); len(mounts) > 0 {
		t.Errorf("mounts left over: %q", mounts)
	}
	if records := ledgerRecords(t); len(records) > 0 {
		t.Errorf("ledger records left over: %q", records)
	}
}

// gone waits until nothing of a deleted pod is left on the node: no mount, no
// record, no directory. Of a pod deleted by force the API knows nothing any
// more when the kubelet has not even begun.
func gone(t *testing.T, pod *cluster.Pod) {
	t.Helper()
	uid := pod.Metadata.UID
	err := cluster.Poll(within(t, time.Minute), 100*time.Millisecond, func(context.Context) error {
		if mounts := volumeMounts(t, uid); len(mounts) > 0 {
			return fmt.Errorf("mounts are left: %q", mounts)
		}
		for _, name := range ledgerRecords(t) {
			text, err := os.ReadFile(node.NodePath(ledgerDir + "/" + name))
			if err == nil && strings.Contains(string(text), uid) {
				return fmt.Errorf("ledger record %s is left: %s", name, text)
			}
		}
		_, err := os.Stat(node.NodePath("/var/lib/kubelet/pods/" + uid + "/volumes/kubernetes.io~csi"))
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return errors.Join(errors.New("the directory of CSI volumes is left"), err)
	})
	if err != nil {
		t.Errorf("pod %s: %v", pod.Metadata.Name, err)
	}
}
