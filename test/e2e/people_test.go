package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/spiffe-node/spiffe-node/test/e2e/cluster"
)

// spiffe runs kubectl spiffe through the cluster, as kubectl's user.
func spiffe(t *testing.T, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(within(t, time.Minute), plugin, append(args, "--kubeconfig", node.Kubeconfig())...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+node.Kubeconfig())
	begun := time.Now()
	out, err := cmd.CombinedOutput()
	t.Logf("kubectl spiffe %s: %s", strings.Join(args, " "), time.Since(begun).Round(time.Millisecond))
	if strings.Contains(string(out), "PRIVATE KEY") {
		t.Errorf("%v prints a private key", args)
	}
	return string(out), err
}

// mentions checks an answer of kubectl spiffe.
func mentions(t *testing.T, out string, err error, want ...string) {
	t.Helper()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
		return
	}
	for _, w := range want {
		if !strings.Contains(out, w) {
			t.Errorf("no %q in:\n%s", w, out)
		}
	}
}

// byExec are the flags of an administrator who does without the Inspect port.
var byExec = []string{"--inspect-service-account", "none"}

// testPlugin runs kubectl spiffe as an administrator does, through the cluster:
// what an agent is asked goes over its Inspect port, and by exec when told so.
func testPlugin(t *testing.T) {
	t.Helper()
	pod := pods(t)[0]
	name, id := "pod/"+pod.Metadata.Name, "spiffe://"+trustDomain+"/ns/"+on.workloads+"/sa/web"
	for _, tc := range []struct {
		asked int // calls of an agent's Inspect port, at least
		args  []string
		want  []string
	}{
		{2, []string{"status", "-A"}, []string{node.NodeName(), on.workloads + "/" + pod.Metadata.Name, id}},
		{2, []string{"explain", name, "-n", on.workloads}, []string{"Verdict: issued", "istio-sidecar-reg", pod.Metadata.UID, id}},
		{1, []string{"secret", name, "-n", on.workloads}, []string{"default", "ROOTCA", "ACTIVE"}},
		{1, []string{"secret", name, "-n", on.workloads, "-o", "json"}, []string{"ROOTCA"}},
		{0, []string{"agent", "list"}, []string{"/spire/agent/k8s_psat/example-cluster/"}},
		{0, []string{"entry", "show", "-spiffeID", id}, []string{"k8s:pod-uid:" + pod.Metadata.UID}},
		{1, []string{"check"}, []string{"0 errors"}},
	} {
		before := inspectCalls(t)
		out, err := spiffe(t, tc.args...)
		mentions(t, out, err, tc.want...)
		asked := inspectCalls(t)
		if asked-before < tc.asked {
			t.Errorf("%v: %d calls of the Inspect port, want %d", tc.args, asked-before, tc.asked)
		}
		if tc.asked == 0 {
			continue
		}
		out, err = spiffe(t, append(tc.args, byExec...)...)
		mentions(t, out, err, tc.want...)
		if now := inspectCalls(t); now != asked {
			t.Errorf("%v by exec: %d calls of the Inspect port", tc.args, now-asked)
		}
	}
	out, err := spiffe(t, "check", "uninstall")
	if err == nil || !strings.Contains(out, on.workloads+"/"+pod.Metadata.Name) {
		t.Errorf("check uninstall does not name the pod (%v):\n%s", err, out)
	}
	strangers(t)
}

// inspectCalls are the audit records of the Inspect port that let somebody in.
func inspectCalls(t *testing.T) int {
	t.Helper()
	logs := kubectl(t, "logs", "-n", on.namespace, agentPod(t).Metadata.Name, "-c", on.containers["agent"])
	n := 0
	for line := range strings.Lines(logs) {
		if strings.Contains(line, `"inspect call"`) && strings.Contains(line, `"system:serviceaccount:`+on.namespace+`:spiffe-inspect"`) && strings.Contains(line, `"code":"OK"`) {
			n++
		}
	}
	return n
}

// strangers: the Inspect port is not on the pod's network.
func strangers(t *testing.T) {
	t.Helper()
	if text, err := node.HTTP(within(t, 10*time.Second), "http://"+agentPod(t).Status.PodIP+":9985/"); err == nil {
		t.Errorf("the Inspect port answers on the network: %s", text)
	}
}

// team may inspect the pods of its namespace and nothing else.
const team = `
apiVersion: v1
kind: ServiceAccount
metadata: {name: spiffe-inspect, namespace: NAMESPACE}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: spiffe-inspect, namespace: NAMESPACE}
rules:
- {apiGroups: [spiffe-node.io], resources: [pods/inspect], verbs: [get]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: spiffe-inspect, namespace: NAMESPACE}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: spiffe-inspect}
subjects: [{kind: ServiceAccount, name: spiffe-inspect, namespace: NAMESPACE}]
`

// testTeam asks for a namespace's people: about their pods they are told, about
// those of others and about the node they are not.
func testTeam(t *testing.T) {
	t.Helper()
	if err := node.Apply(within(t, time.Minute), strings.ReplaceAll(team, "NAMESPACE", on.workloads)); err != nil {
		t.Fatal(err)
	}
	namespace(t, "team", "web")
	other := create(t, "team", probePod("other", "web"))
	probeLog(t, other, time.Minute, has("default"))
	as := []string{"--inspect-service-account", on.workloads + "/spiffe-inspect"}
	pod := pods(t)[0]
	out, err := spiffe(t, append([]string{"explain", "pod/" + pod.Metadata.Name, "-n", on.workloads}, as...)...)
	mentions(t, out, err, "Verdict: issued", pod.Metadata.UID)
	for _, args := range [][]string{{"explain", "pod/other", "-n", "team"}, {"status", "-A"}} {
		out, err := spiffe(t, append(args, as...)...)
		if err == nil || !strings.Contains(out, "may not") {
			t.Errorf("%v: %v\n%s", args, err, out)
		}
	}
	remove(t, other)
	gone(t, other)
}

// testEvents: the pod says itself why it has no identity, and what is arbitrary
// about the one it has; and a pod that never calls is known all the same.
func testEvents(t *testing.T) {
	t.Helper()
	namespace(t, "events", "web")
	parent := on.parentID(t)
	id := func(name string) string { return "spiffe://" + trustDomain + "/events/" + name }
	entry := func(name string, selectors ...string) {
		args := []string{"entry", "create", "-parentID", parent, "-spiffeID", id(name)}
		for _, s := range append([]string{"k8s:ns:events"}, selectors...) {
			args = append(args, "-selector", s)
		}
		cli(t, args...)
	}
	entry("near", "k8s:sa:web", "k8s:pod-label:version:2")
	late := create(t, "events", unmanaged(probePod("late", "web")))
	silent := unmanaged(probePod("silent", "web", "-socket", "/nowhere/socket"))
	mute := create(t, "events", silent)
	waitEvent(t, late, "SpiffeIdentityLate", "no registration entry matches it", id("near"), "k8s:pod-label:version:2")

	for _, how := range [][]string{nil, byExec} {
		out, err := spiffe(t, append([]string{"explain", "pod/silent", "-n", "events"}, how...)...)
		mentions(t, out, err, "Verdict: not connected", "volume mounted", mute.Metadata.UID, id("near"))
	}
	entry("one", "k8s:sa:web")
	time.Sleep(1100 * time.Millisecond) // the time of creation counts seconds, and the older entry is to win
	entry("two", "k8s:pod-label:app:probe")
	waitEvent(t, late, "SpiffeIdentityAmbiguous", id("one"), id("two"))
	if got := count(t, late, 1); got.SPIFFEID != id("one") {
		t.Errorf("the identity is %s, want the older entry's", got.SPIFFEID)
	}
	for _, name := range []string{"near", "one", "two"} {
		cli(t, "entry", "delete", "-entryID", entryID(t, id(name)))
	}
	for _, pod := range []*cluster.Pod{late, mute} {
		remove(t, pod)
		gone(t, pod)
	}
}

// entryID is the ID of the only entry for a SPIFFE ID.
func entryID(t *testing.T, spiffeID string) string {
	t.Helper()
	_, rest, ok := strings.Cut(cli(t, "entry", "show", "-spiffeID", spiffeID), "Entry ID")
	if !ok {
		t.Fatalf("no entry for %s", spiffeID)
	}
	return strings.Trim(firstLine(rest), " :\t")
}

// waitEvent waits for an event on the pod that says all of want.
func waitEvent(t *testing.T, pod *cluster.Pod, reason string, want ...string) {
	t.Helper()
	begun := time.Now()
	err := cluster.Poll(within(t, time.Minute), 200*time.Millisecond, func(ctx context.Context) error {
		out, err := node.Kubectl(ctx, "get", "events", "-n", pod.Metadata.Namespace,
			"--field-selector", "involvedObject.uid="+pod.Metadata.UID+",reason="+reason, "-o", "jsonpath={.items[*].message}")
		if err != nil {
			return err
		}
		if out == "" {
			return errors.New("no event yet")
		}
		for _, w := range want {
			if !strings.Contains(out, w) {
				return fmt.Errorf("no %q in event %q", w, out)
			}
		}
		t.Logf("%s after %s: %s", reason, time.Since(begun).Round(time.Millisecond), out)
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
