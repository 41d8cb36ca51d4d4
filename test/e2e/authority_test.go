package e2e_test

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/spiffe-node/spiffe-node/test/e2e/cluster"
	"github.com/spiffe-node/spiffe-node/test/e2e/probe"
)

// testAuthorityRestart kills the authority's process: no stream ends, the CA
// is the same, and the next pod gets its identity.
func testAuthorityRestart(t *testing.T) {
	t.Helper()
	before, bundle := settled(t), cli(t, "bundle", "show")
	killed := time.Now()
	killProcess(t, findProcess(t, "authority"))
	pod := create(t, on.workloads, probePod("after-authority-restart", "web"))
	got, _ := nodeLog(t, pod, 90*time.Second, has("default", "ROOTCA")).First("default")
	t.Logf("pod created when the authority was killed: default %s after the kill, %s after its own start", got.Time.Sub(killed).Round(time.Millisecond), got.SinceStart)
	explainLate(t, killed, got.Time)
	remove(t, pod)
	gone(t, pod)
	for name, n := range settled(t) {
		if n != before[name] {
			t.Errorf("pod %s lost streams when the authority was killed", name)
		}
	}
	if after := cli(t, "bundle", "show"); after != bundle {
		t.Errorf("another CA after the restart:\n%s\nbefore:\n%s", after, bundle)
	}
}

// explainLate prints what agent and authority have said if it took them long.
func explainLate(t *testing.T, begun, ended time.Time) {
	t.Helper()
	if ended.Sub(begun) < 5*time.Second {
		return
	}
	since := "--since-time=" + begun.UTC().Format(time.RFC3339)
	for _, args := range [][]string{
		{"logs", "-n", chartSpace, server, since},
		{"logs", "-n", chartSpace, agentPod(t).Metadata.Name, "-c", "sds-agent", since},
	} {
		text, err := node.Kubectl(t.Context(), args...)
		lines := strings.SplitAfter(text, "\n")
		t.Logf("%v: error %v\n%s", args, err, strings.Join(lines[:min(len(lines), 60)], ""))
	}
}

// scaleAuthority sets how many authorities there are.
func scaleAuthority(t *testing.T, replicas int) {
	t.Helper()
	patch := map[string]any{"spec": map[string]any{"replicas": replicas}}
	if err := node.API(within(t, 30*time.Second), http.MethodPatch, "/apis/apps/v1/namespaces/"+chartSpace+"/statefulsets/spire-server", patch, nil); err != nil {
		t.Fatal(err)
	}
}

// testAuthorityAway restarts the agent and a workload without the authority.
func testAuthorityAway(t *testing.T) {
	t.Helper()
	agentPod(t)
	outages := settled(t)
	ctx := within(t, 2*time.Minute)
	authority, err := node.Pod(ctx, chartSpace, server)
	if err != nil {
		t.Fatal(err)
	}
	scaleAuthority(t, 0)
	t.Cleanup(func() {
		if t.Failed() {
			scaleAuthority(t, 1)
		}
	})
	if err := node.WaitGone(ctx, chartSpace, server, authority.Metadata.UID); err != nil {
		t.Fatal(err)
	}
	serials := map[string]string{}
	for _, pod := range pods(t) {
		last, _ := probeLog(t, &pod, 10*time.Second, has("default")).Last("default")
		serials[pod.Metadata.Name] = last.Serial
	}
	killContainer(t, "agent")
	t.Logf("agent killed with the authority away -> socket takes connections: %s", socketBack(t))
	all := pods(t)
	var took []time.Duration
	for _, pod := range all {
		seen := outages[pod.Metadata.Name]
		log := nodeLog(t, &pod, 90*time.Second, outagesOver(seen+2))
		took = append(took, log.Outages()[seen:]...)
		if last, _ := log.Last("default"); last.Serial != serials[pod.Metadata.Name] {
			t.Errorf("pod %s has another SVID without an authority to sign it", pod.Metadata.Name)
		}
	}
	t.Logf("agent killed with the authority away -> stream outages: %s", quantiles(took))
	restarted, again := &all[0], time.Now()
	killProbe(t, restarted)
	log := nodeLog(t, restarted, time.Minute, func(log probe.Log) error {
		if len(log) == 0 || log[0].Time.Before(again) {
			return errors.New("the container has not been started again")
		}
		return has("default", "ROOTCA")(log)
	})
	got, _ := log.First("default")
	t.Logf("workload restarted with the authority away: container start -> default %s", got.SinceStart)
	fresh := create(t, on.workloads, probePod("authority-away", "web"))
	nodeLog(t, fresh, time.Minute, has("ROOTCA"))
	begun := time.Now()
	scaleAuthority(t, 1)
	log = nodeLog(t, fresh, 2*time.Minute, has("default"))
	got, _ = log.First("default")
	t.Logf("pod created meanwhile: authority asked back -> default %s", got.Time.Sub(begun).Round(time.Millisecond))
	explainLate(t, begun, got.Time)
	if len(log.Errors()) > 0 {
		t.Errorf("its streams ended: %v", log.Errors())
	}
	if _, err := node.WaitReady(within(t, 2*time.Minute), chartSpace, server); err != nil {
		t.Fatal(err)
	}
	remove(t, fresh)
	gone(t, fresh)
}

// killProbe kills the probe in a pod; the kubelet starts it again.
func killProbe(t *testing.T, pod *cluster.Pod) {
	t.Helper()
	pid, err := node.OnNode(within(t, 30*time.Second), "sh", "-c", fmt.Sprintf("grep -l pod%s /proc/[0-9]*/cgroup | xargs -n1 dirname | while read p; do grep -qa ^/probe $p/cmdline && basename $p; done; true", pod.Metadata.UID))
	if err != nil {
		t.Fatal(err)
	}
	killProcess(t, firstLine(pid))
}
