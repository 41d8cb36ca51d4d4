package e2e_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe-node/spiffe-node/test/e2e/cluster"
	"github.com/spiffe-node/spiffe-node/test/e2e/probe"
)

// move is a cluster of two nodes on its way from SPIRE to the product. What is
// done to it are the commands that `kubectl spiffe migrate plan` prints.
type move struct {
	t     *testing.T
	dir   string // where the commands run: deploy/ of this repository and values.yaml
	spire string
	nodes []*cluster.Cluster
	pods  map[string][]*cluster.Pod // by node, those that stay
	since time.Time                 // all of them have shaken hands
}

// plan is what these tests read of migrate plan -o json.
type plan struct {
	Blockers, Warnings []struct{ What, Do string }
	Nodes              []struct{ Name, Agent string }
	Steps              []struct {
		Title    string
		Commands []string
	}
}

// TestMove takes a cluster with SPIRE's own chart (server, controller manager
// with its webhook, agents, CSI drivers) to the product node by node, one of
// them back and forth again, and removes SPIRE's agents and drivers, all while
// pods of both nodes shake hands.
func TestMove(t *testing.T) {
	if rigOnly() {
		t.Skip("E2E_RIG_ONLY is set: the product was not built")
	}
	m := &move{t: t, spire: spireDir(t), dir: t.TempDir(), pods: map[string][]*cluster.Pod{}}
	second, err := cluster.Join(within(t, 5*time.Minute), node, 1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { leave(t, second) })
	m.nodes = []*cluster.Cluster{node, second}
	diagnoseOnFailure(t, second)
	on = installation{namespace: spireSpace, workloads: "moved", sockets: "/run/spire/agent-sockets"}
	m.install()
	m.workloads()

	before := m.plan()
	m.asked(before, "SPIRE", "SPIRE")
	t.Log(m.run("kubectl spiffe migrate plan"))
	m.run(m.step(before, "Let the old DaemonSets leave")...)
	m.run("kubectl rollout status -n spire daemonset/spire-agent --timeout=3m", "kubectl rollout status -n spire daemonset/spire-spiffe-csi-driver --timeout=3m")
	m.asked(m.plan(), "SPIRE", "SPIRE")
	m.beside(before)

	m.there(m.nodes[1])
	m.asked(m.plan(), "SPIRE", "spiffe-node")
	m.back(m.nodes[1])
	m.asked(m.plan(), "SPIRE", "SPIRE")
	m.there(m.nodes[1])
	m.there(m.nodes[0])
	after := m.plan()
	m.asked(after, "spiffe-node", "spiffe-node")
	m.removeOld(after)
	m.shaken()
	m.end()
}

// run runs commands as an administrator would, in a directory with deploy/, and
// returns what they print.
func (m *move) run(commands ...string) string {
	m.t.Helper()
	bin, err := cluster.CacheDir(cluster.Config{}, "bin")
	if err != nil {
		m.t.Fatal(err)
	}
	cmd := exec.CommandContext(within(m.t, 6*time.Minute), "bash", "-euxo", "pipefail", "-c", strings.Join(commands, "\n"))
	cmd.Dir = m.dir
	cmd.Env = append(os.Environ(), "KUBECONFIG="+node.Kubeconfig(), "PATH="+filepath.Dir(plugin)+":"+bin+":"+os.Getenv("PATH"),
		"HELM_CACHE_HOME="+m.dir, "HELM_CONFIG_HOME="+m.dir, "HELM_DATA_HOME="+m.dir)
	var complaints strings.Builder
	cmd.Stderr = &complaints
	out, err := cmd.Output()
	if err != nil {
		m.t.Fatalf("%v\n%s\n%s", err, out, complaints.String())
	}
	return string(out)
}

func (m *move) plan() *plan {
	m.t.Helper()
	var p plan
	if err := json.Unmarshal([]byte(m.run("kubectl spiffe migrate plan -o json")), &p); err != nil {
		m.t.Fatal(err)
	}
	return &p
}

// asked checks what the plan says of the nodes, in the order of their names.
func (m *move) asked(p *plan, agents ...string) {
	m.t.Helper()
	for i, n := range p.Nodes {
		if i >= len(agents) || n.Agent != agents[i] {
			m.t.Errorf("the plan says %+v, want %q", p.Nodes, agents)
			return
		}
	}
	if len(p.Blockers) > 0 {
		m.t.Errorf("the plan sees something in the way: %+v", p.Blockers)
	}
}

// step is the commands of one step.
func (m *move) step(p *plan, title string) []string {
	m.t.Helper()
	for _, s := range p.Steps {
		if strings.HasPrefix(s.Title, title) {
			return s.Commands
		}
	}
	m.t.Fatalf("the plan has no step %q: %+v", title, p.Steps)
	return nil
}

// install brings up SPIRE as its guide says.
func (m *move) install() {
	m.t.Helper()
	importSPIRE(m.t, m.spire, m.nodes...)
	if err := node.BuildHelm(within(m.t, 15*time.Minute), "."); err != nil {
		m.t.Fatal(err)
	}
	repository, err := filepath.Abs("../..")
	if err != nil {
		m.t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(repository, "deploy"), filepath.Join(m.dir, "deploy")); err != nil {
		m.t.Fatal(err)
	}
	if _, err := node.OnNode(within(m.t, time.Minute), "mkdir", "-p", "/var/lib/spire-server"); err != nil {
		m.t.Fatal(err)
	}
	helm(m.t, "upgrade", "--install", "-n", spireSpace, "spire-crds", filepath.Join(m.spire, "charts", "spire-crds"), "--create-namespace")
	helmSPIRE(m.t, m.spire, spireSpace)
}

// workloads starts pods on both nodes, one of which shakes hands with all.
func (m *move) workloads() {
	m.t.Helper()
	namespace(m.t, on.workloads, "web")
	pinned := func(n *cluster.Cluster, name string, args ...string) *cluster.Pod {
		pod := probePod(name, "web", args...)
		pod["spec"].(map[string]any)["nodeName"] = n.NodeName()
		made := create(m.t, on.workloads, pod)
		m.pods[n.NodeName()] = append(m.pods[n.NodeName()], made)
		return made
	}
	pinned(m.nodes[0], "server", "-listen", ":8443")
	server, err := node.WaitReady(within(m.t, time.Minute), on.workloads, "server")
	if err != nil {
		m.t.Fatal(err)
	}
	for i, n := range m.nodes {
		for j := range 3 {
			pinned(n, fmt.Sprintf("client-%d-%d", i, j), "-dial", server.Status.PodIP+":8443", "-dial-again")
		}
	}
	for _, n := range m.nodes {
		for _, pod := range m.pods[n.NodeName()] {
			log := probeLog(m.t, pod, 2*time.Minute, has("default", "ROOTCA"))
			got, _ := log.First("default")
			if want := "spiffe://" + trustDomain + "/ns/" + on.workloads + "/sa/web"; got.SPIFFEID != want {
				m.t.Errorf("pod %s is %q, want %q", pod.Metadata.Name, got.SPIFFEID, want)
			}
		}
	}
	for _, n := range m.nodes {
		for _, pod := range m.pods[n.NodeName()] {
			shaking(m.t, pod, 0)
		}
	}
	m.since = time.Now()
}

// shaking waits for ten more handshakes of a pod and returns how many it has had.
func shaking(t *testing.T, pod *cluster.Pod, since int) (count int) {
	t.Helper()
	probeLog(t, pod, time.Minute, func(log probe.Log) error {
		count = 0
		for _, ev := range log {
			if ev.Kind == probe.Peer && ev.Message == "" {
				count++
			}
		}
		if count < since+10 {
			return fmt.Errorf("%d handshakes, want %d", count, since+10)
		}
		return nil
	})
	return count
}

// beside installs the product, which no node has yet.
func (m *move) beside(p *plan) {
	m.t.Helper()
	commands := m.step(p, "Install beside them")
	m.run(commands[0])
	values := filepath.Join(m.dir, "values.yaml")
	text, err := os.ReadFile(values)
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Logf("values.yaml:\n%s", text)
	if err := os.WriteFile(values, []byte(string(text)+"\nimage:\n  tag: "+chartTag+"\n"), 0o600); err != nil {
		m.t.Fatal(err)
	}
	m.run(commands[1:]...)
	if out := m.run("kubectl get daemonset -n spire spiffe-node -o jsonpath={.status.desiredNumberScheduled}"); out != "0" {
		m.t.Errorf("the new DaemonSet wants %s pods before a node is labelled", out)
	}
}

// state is what must be the same after a node has moved.
type state struct {
	mounts   []string
	outages  map[string]int
	restarts map[string]string
	shaken   map[string]int
}

func (m *move) state(n *cluster.Cluster) state {
	m.t.Helper()
	s := state{outages: map[string]int{}, restarts: map[string]string{}, shaken: map[string]int{}}
	mounts, err := n.Mounts()
	if err != nil {
		m.t.Fatal(err)
	}
	for _, mount := range mounts {
		if strings.Contains(mount.Point, "/volumes/kubernetes.io~csi/") {
			s.mounts = append(s.mounts, mount.Root+" on "+mount.Point)
		}
	}
	slices.Sort(s.mounts)
	for _, pod := range m.pods[n.NodeName()] {
		log := probeLog(m.t, pod, 10*time.Second, has("default"))
		s.outages[pod.Metadata.Name] = len(log.Outages())
		now, err := node.Pod(within(m.t, 10*time.Second), on.workloads, pod.Metadata.Name)
		if err != nil {
			m.t.Fatal(err)
		}
		s.restarts[pod.Metadata.Name] = now.Status.ContainerStatuses[0].ContainerID
		s.shaken[pod.Metadata.Name] = shaking(m.t, pod, 0)
	}
	return s
}

// same compares a node after a change with what it was, once the streams of
// all its pods have been down and are back.
func (m *move) same(n *cluster.Cluster, was state, what string) {
	m.t.Helper()
	var outages []time.Duration
	for _, pod := range m.pods[n.NodeName()] {
		seen := was.outages[pod.Metadata.Name]
		log := probeLog(m.t, pod, 2*time.Minute, outagesOver(seen+2))
		outages = append(outages, log.Outages()[seen:]...)
		explainSlow(m.t, pod, log, log.Outages()[seen:])
	}
	m.t.Logf("%s: %s -> streams down: %s", n.NodeName(), what, quantiles(outages))
	now := m.state(n)
	if !slices.Equal(was.mounts, now.mounts) {
		m.t.Errorf("%s: mounts before:\n%s\nafter:\n%s", what, strings.Join(was.mounts, "\n"), strings.Join(now.mounts, "\n"))
	}
	for name, id := range was.restarts {
		if now.restarts[name] != id {
			m.t.Errorf("%s: pod %s was started again", what, name)
		}
		if now.shaken[name] <= was.shaken[name] {
			m.t.Errorf("%s: pod %s has shaken no hands since", what, name)
		}
	}
	// The old pods' mounts lead to the directory that the new agent serves.
	for _, mount := range now.mounts {
		_, point, _ := strings.Cut(mount, " on ")
		if out, err := n.OnNode(within(m.t, 10*time.Second), "test", point, "-ef", on.sockets); err != nil {
			m.t.Errorf("%s: %s is another directory than %s: %v %s", what, point, on.sockets, err, out)
		}
	}
	m.shaken()
}

// shaken checks that no handshake has failed since all pods had their secrets.
func (m *move) shaken() {
	m.t.Helper()
	for _, n := range m.nodes {
		for _, pod := range m.pods[n.NodeName()] {
			for _, ev := range probeLog(m.t, pod, 10*time.Second, has("default")) {
				if ev.Kind == probe.Peer && ev.Message != "" && ev.Time.After(m.since) {
					m.t.Errorf("pod %s: %s a handshake failed: %s", pod.Metadata.Name, ev.Time.Format(time.TimeOnly), ev.Message)
				}
			}
		}
	}
}

// passing lets a pod come and another, which the other driver mounted, go.
func (m *move) passing(n *cluster.Cluster, old *cluster.Pod) (left *cluster.Pod) {
	m.t.Helper()
	if old != nil {
		m.t.Logf("%s: pod of the other driver deleted in %s", n.NodeName(), remove(m.t, old).Round(time.Millisecond))
		mounts, err := n.Mounts()
		if err != nil {
			m.t.Fatal(err)
		}
		for _, mount := range mounts {
			if strings.Contains(mount.Point, old.Metadata.UID) {
				m.t.Errorf("left of pod %s: %s", old.Metadata.Name, mount.Point)
			}
		}
	}
	pod := probePod(fmt.Sprintf("passing-%d", time.Now().UnixNano()), "web")
	pod["spec"].(map[string]any)["nodeName"] = n.NodeName()
	begun := time.Now()
	left = create(m.t, on.workloads, pod)
	log := probeLog(m.t, left, 2*time.Minute, has("default", "ROOTCA"))
	got, _ := log.First("default")
	m.t.Logf("%s: a new pod has its identity %s after it was created, %s after its start", n.NodeName(), got.Time.Sub(begun).Round(time.Millisecond), got.SinceStart)
	return left
}

// there moves a node to the product.
func (m *move) there(n *cluster.Cluster) {
	m.t.Helper()
	old := m.passing(n, nil)
	was := m.state(n)
	m.run("NODE="+n.NodeName(), "kubectl label node $NODE spiffe-node.io/migrated=true", "kubectl rollout status -n spire daemonset/spiffe-node --timeout=3m")
	m.only(n, "spiffe-node")
	m.same(n, was, "SPIRE -> spiffe-node")
	remove(m.t, m.passing(n, old))
	m.run("kubectl spiffe status -A", "kubectl spiffe check")
	m.run("kubectl spiffe explain -n " + on.workloads + " pod/" + m.pods[n.NodeName()][0].Metadata.Name)
}

// back moves a node to SPIRE again.
func (m *move) back(n *cluster.Cluster) {
	m.t.Helper()
	old := m.passing(n, nil)
	was := m.state(n)
	m.run("NODE="+n.NodeName(), "kubectl label node $NODE spiffe-node.io/migrated-",
		"kubectl rollout status -n spire daemonset/spire-agent --timeout=3m", "kubectl rollout status -n spire daemonset/spire-spiffe-csi-driver --timeout=3m")
	m.only(n, "spire-agent")
	m.same(n, was, "spiffe-node -> SPIRE")
	remove(m.t, m.passing(n, old))
}

// only waits until the pods of one side are the only ones on a node.
func (m *move) only(n *cluster.Cluster, agent string) {
	m.t.Helper()
	err := cluster.Poll(within(m.t, 2*time.Minute), 200*time.Millisecond, func(ctx context.Context) error {
		pods, err := node.Pods(ctx, spireSpace, "")
		if err != nil {
			return err
		}
		var errs []error
		for _, p := range pods {
			name := p.Metadata.Name
			if p.Spec.NodeName != n.NodeName() || strings.HasPrefix(name, "spire-server-") {
				continue
			}
			if ours := strings.HasPrefix(name, "spiffe-node-"); ours != (agent == "spiffe-node") {
				errs = append(errs, fmt.Errorf("%s is still there", name))
			} else {
				errs = append(errs, p.Ready())
			}
		}
		return errors.Join(errs...)
	})
	if err != nil {
		m.t.Fatal(err)
	}
}

// removeOld takes SPIRE's agents and drivers away for good.
func (m *move) removeOld(p *plan) {
	m.t.Helper()
	was := m.state(m.nodes[0])
	for _, command := range m.step(p, "When all nodes have moved") {
		switch {
		case strings.HasPrefix(command, "# SPIRE's chart:"):
			helmSPIRE(m.t, m.spire, spireSpace, "spire-agent.enabled=false", "spiffe-csi-driver.enabled=false")
		case !strings.HasPrefix(command, "#"):
			m.run(command)
		}
	}
	m.run("kubectl rollout status -n spire daemonset/spiffe-node --timeout=3m",
		"kubectl label node --all spiffe-node.io/migrated-", "kubectl rollout status -n spire daemonset/spiffe-node --timeout=3m")
	left := m.run("kubectl get daemonset -A -o name", "kubectl get csidriver -o name", "kubectl get serviceaccount -n spire -o name")
	m.t.Logf("what is left:\n%s", left)
	for _, old := range []string{"daemonset.apps/spire-agent", "daemonset.apps/spire-spiffe-csi-driver"} {
		if strings.Contains(left, old) {
			m.t.Errorf("%s is still there", old)
		}
	}
	for _, want := range []string{"daemonset.apps/spiffe-node", "csidriver.storage.k8s.io/csi.spiffe.io", "serviceaccount/spire-agent"} {
		if !strings.Contains(left, want) {
			m.t.Errorf("%s is gone", want)
		}
	}
	if now := m.state(m.nodes[0]); !slices.Equal(was.mounts, now.mounts) {
		m.t.Errorf("mounts before SPIRE's parts were removed:\n%s\nafter:\n%s", strings.Join(was.mounts, "\n"), strings.Join(now.mounts, "\n"))
	}
	for _, n := range m.nodes {
		remove(m.t, m.passing(n, nil))
	}
	m.run("kubectl spiffe check")
}

// end leaves the first node as the other tests expect it.
func (m *move) end() {
	m.t.Helper()
	for _, pods := range m.pods {
		for _, pod := range pods {
			remove(m.t, pod)
		}
	}
	deleteCRDs(m.t)
	for _, name := range []string{"spiffe-node", "spire", "spire-crds"} {
		helm(m.t, "delete", "-n", spireSpace, name, "--wait")
	}
	m.run("kubectl delete csidriver csi.spiffe.io --ignore-not-found", "kubectl delete namespace spire moved")
	if _, err := node.OnNode(within(m.t, time.Minute), "rm", "-rf", "/var/lib/spire-server", "/var/lib/spiffe-node", "/run/spiffe-node", "/run/spire"); err != nil {
		m.t.Fatal(err)
	}
}
