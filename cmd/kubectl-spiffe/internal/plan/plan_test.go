package plan_test

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"github.com/spiffe-node/spiffe-node/cmd/kubectl-spiffe/internal/check"
	"github.com/spiffe-node/spiffe-node/cmd/kubectl-spiffe/internal/plan"
)

const cluster = "../../testdata/cluster/spire.yaml"

// changed is the plan for the cluster with some of its text changed and more
// objects added.
func changed(t *testing.T, in plan.Input, more string, oldnew ...string) *plan.Plan {
	t.Helper()
	data, err := os.ReadFile(cluster)
	if err != nil {
		t.Fatal(err)
	}
	text := string(data)
	for i := 0; i < len(oldnew); i += 2 {
		if !strings.Contains(text, oldnew[i]) {
			t.Fatalf("%q is not in %s", oldnew[i], cluster)
		}
	}
	text = strings.NewReplacer(oldnew...).Replace(text) + "\n---\n" + more
	if in.Objects, err = check.Parse("f", strings.NewReader(text)); err != nil {
		t.Fatal(err)
	}
	return plan.Make(in)
}

func TestWhatStandsInTheWay(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		more   string
		oldnew []string
		agent  string
		want   []string // in a blocker's words; none = no blocker
	}{
		"nothing": {},
		"node attestor": {
			oldnew: []string{`"k8s_psat": {"plugin_data": {"cluster": "prod"}}`, `"aws_iid": {"plugin_data": {}}`},
			want:   []string{"plugins.NodeAttestor.aws_iid", "nodes could not attest"},
		},
		"delegates": {
			oldnew: []string{`"log_level": "info"`, `"authorized_delegates": ["spiffe://corp.example/cilium"]`},
			want:   []string{"spiffe://corp.example/cilium may use the Delegated Identity API"},
		},
		"broker": {
			oldnew: []string{`"log_level": "info"`, `"experimental": {"broker": {"socket_path": "/b", "brokers": []}}`},
			want:   []string{"somebody may use the Broker API"},
		},
		"broken configuration":     {oldnew: []string{`"log_level": "info"`, `"log_level"`}, want: []string{"ConfigMap spire-system/spire-agent is not to be read"}},
		"no configuration":         {oldnew: []string{"agent.conf: |", "other.conf: |"}, want: []string{"configuration of DaemonSet spire-system/spire-agent could not be read"}},
		"socket in an emptyDir":    {oldnew: []string{"{name: spire-agent-socket-dir, hostPath: {path: /run/spire/agent-sockets, type: DirectoryOrCreate}}", "{name: spire-agent-socket-dir, emptyDir: {}}"}, want: []string{"is the volume spire-agent-socket-dir, not a directory of the host"}},
		"driver's other directory": {oldnew: []string{"{name: sockets, hostPath: {path: /run/spire/agent-sockets}}", "{name: sockets, hostPath: {path: /run/other}}"}, want: []string{"mounts /run/other into pods, but SPIRE Agent's socket is in /run/spire/agent-sockets"}},
		"CSIDriver":                {oldnew: []string{"podInfoOnMount: true", "podInfoOnMount: false"}, want: []string{"does not say podInfoOnMount: true"}},
		"no agent":                 {oldnew: []string{"image: ghcr.io/spiffe/spire-agent:1.15.3", "image: corp/identity:1"}, want: []string{"no DaemonSet of SPIRE Agent was found"}},
		"no such agent":            {agent: "a/b", want: []string{"there is no SPIRE Agent a/b", "Name one of: spire-system/spire-agent."}},
		"several agents": {
			more: `{apiVersion: apps/v1, kind: DaemonSet, metadata: {name: second, namespace: x}, spec: {template: {spec: {containers: [{name: a, image: "spire-agent:1"}]}}}}`,
			want: []string{"there are several SPIRE Agents: spire-system/spire-agent, x/second"},
		},
		"sandbox": {
			more: `{apiVersion: v1, kind: Pod, metadata: {name: s, namespace: x}, spec: {nodeName: node1, runtimeClassName: safe, volumes: [{name: v, csi: {driver: csi.spiffe.io}}]}, status: {phase: Running}}
---
{apiVersion: node.k8s.io/v1, kind: RuntimeClass, metadata: {name: safe}, handler: runsc}`,
			want: []string{"pods of runtime class safe use the socket: x/s"},
		},
		"both on a node": {
			more: `{apiVersion: v1, kind: Pod, metadata: {name: n, namespace: x, labels: {app.kubernetes.io/name: spiffe-node}}, spec: {nodeName: node1, containers: [{name: sds-agent, image: sds-agent}]}, status: {phase: Running}}`,
			want: []string{"node node1 runs a SPIRE Agent and an sds-agent"},
		},
		"both register": {
			more: `{apiVersion: v1, kind: ConfigMap, metadata: {name: n, namespace: x, labels: {app.kubernetes.io/name: spiffe-node}}, data: {a: "kind: AuthorityConfiguration\nregistration: {enabled: true}\n"}}`,
			want: []string{"both register pods"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := changed(t, plan.Input{Agent: c.agent}, c.more, c.oldnew...)
			var all strings.Builder
			for _, b := range p.Blockers {
				if b.What == "" || b.Do == "" {
					t.Errorf("incomplete: %+v", b)
				}
				all.WriteString(b.What + "\n" + b.Do + "\n")
			}
			for _, want := range c.want {
				if !strings.Contains(all.String(), want) {
					t.Errorf("nobody says %q:\n%s", want, all.String())
				}
			}
			if len(c.want) == 0 && len(p.Blockers) > 0 {
				t.Errorf("in the way: %s", all.String())
			}
		})
	}
}

// A cluster that has partly moved: what is left to do is what is said.
func TestHalfWay(t *testing.T) {
	t.Parallel()
	p := changed(t, plan.Input{},
		`{apiVersion: v1, kind: Pod, metadata: {name: n, namespace: x, labels: {app.kubernetes.io/name: spiffe-node}}, spec: {nodeName: node1, containers: [{name: sds-agent, image: sds-agent}]}, status: {phase: Running}}`,
		"metadata: {name: spire-agent-a, namespace: spire-system, labels: {app.kubernetes.io/name: agent}}\nspec:\n  nodeName: node1", "metadata: {name: spire-agent-a, namespace: spire-system}\nspec:\n  nodeName: node3")
	got := map[string]string{}
	for _, n := range p.Nodes {
		got[n.Name] = n.Agent
	}
	if got["node1"] != "spiffe-node" || got["node2"] != "SPIRE" || got["node3"] != "SPIRE" || len(p.Blockers) > 0 {
		t.Errorf("nodes %v, in the way %v", got, p.Blockers)
	}
	commands := ""
	for _, s := range p.Steps {
		commands += strings.Join(s.Commands, "\n")
	}
	if strings.Contains(commands, "NODE=node1") || !strings.Contains(commands, "NODE=node2") {
		t.Errorf("the nodes still to be moved are wrong:\n%s", commands)
	}
}

// FuzzMake: any objects make a plan whose remarks say something.
func FuzzMake(f *testing.F) {
	data, err := os.ReadFile(cluster)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte("kind: DaemonSet\nspec: {template: {spec: {containers: [{image: spire-agent, args: [-config], volumeMounts: [{}]}], volumes: [{}]}}}\n"))
	f.Add([]byte("kind: ConfigMap\ndata: {a: \"kind: ControllerManagerConfig\"}\n---\nkind: Pod\nspec: {runtimeClassName: kata}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		objects, _ := check.Parse("f", bytes.NewReader(data))
		_ = plan.ConfigMaps(objects)
		p := plan.Make(plan.Input{Objects: objects, Cluster: true})
		for _, r := range append(p.Blockers, p.Warnings...) {
			if r.What == "" || r.Do == "" {
				t.Errorf("incomplete: %+v", r)
			}
		}
		if (p.Values == nil) != (len(p.Steps) == 0) {
			t.Error("steps without values, or the other way round")
		}
	})
}
