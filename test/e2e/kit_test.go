package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe-node/spiffe-node/test/e2e/cluster"
	"github.com/spiffe-node/spiffe-node/test/e2e/probe"
)

const (
	trustDomain = "example.org"
	ledgerDir   = "/run/spiffe-node/ledger"
)

// within bounds one step of a test.
func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// diagnoseOnFailure writes the cluster's state to a file when the test has
// failed: what is seen from the first node, and from those that joined it.
func diagnoseOnFailure(t *testing.T, joined ...*cluster.Cluster) {
	t.Helper()
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		dir := os.Getenv("E2E_ARTIFACTS")
		if dir == "" {
			dir = os.TempDir()
		}
		for _, n := range append([]*cluster.Cluster{node}, joined...) {
			file := filepath.Join(dir, "spiffe-node-e2e-"+strings.ReplaceAll(t.Name(), "/", "-")+"-"+n.NodeName()+".txt")
			if err := diagnose(context.WithoutCancel(t.Context()), n, file); err != nil {
				t.Logf("no diagnosis: %v", err)
				return
			}
			t.Logf("the cluster's state is in %s", file)
		}
	})
}

func diagnose(ctx context.Context, n *cluster.Cluster, file string) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	n.Diagnose(ctx, f)
	return f.Close()
}

// namespace makes a namespace with a service account for one test.
func namespace(t *testing.T, name string, accounts ...string) {
	t.Helper()
	var m strings.Builder
	fmt.Fprintf(&m, "apiVersion: v1\nkind: Namespace\nmetadata: {name: %s}\n", name)
	for _, sa := range accounts {
		fmt.Fprintf(&m, "---\napiVersion: v1\nkind: ServiceAccount\nmetadata: {name: %s, namespace: %s}\nautomountServiceAccountToken: false\n", sa, name)
	}
	ctx := within(t, time.Minute)
	if err := node.Apply(ctx, m.String()); err != nil {
		t.Fatal(err)
	}
}

// probePod is a pod with the product's volume that runs the probe.
func probePod(name, account string, args ...string) map[string]any {
	return map[string]any{
		"apiVersion": "v1", "kind": "Pod",
		"metadata": map[string]any{"name": name, "labels": map[string]any{"app": "probe", managedLabel: "true"}},
		"spec": map[string]any{
			"serviceAccountName":            account,
			"terminationGracePeriodSeconds": 1,
			"containers": []any{map[string]any{
				"name": "probe", "image": probeImage, "imagePullPolicy": "Never", "args": args,
				"env":             []any{map[string]any{"name": "POD_NAME", "value": name}},
				"securityContext": map[string]any{"readOnlyRootFilesystem": true, "allowPrivilegeEscalation": false, "capabilities": map[string]any{"drop": []any{"ALL"}}},
				"volumeMounts":    []any{map[string]any{"name": "workload-socket", "mountPath": "/run/secrets/workload-spiffe-uds", "readOnly": true}},
			}},
			"volumes": []any{map[string]any{"name": "workload-socket", "csi": map[string]any{"driver": "csi.spiffe.io", "readOnly": true}}},
		},
	}
}

// create makes a pod and returns it as the API server has it.
func create(t *testing.T, ns string, pod map[string]any) *cluster.Pod {
	t.Helper()
	made, err := node.CreatePod(within(t, 30*time.Second), ns, pod)
	if err != nil {
		t.Fatal(err)
	}
	return made
}

// remove deletes a pod and waits until it is gone; it returns how long that took.
func remove(t *testing.T, pod *cluster.Pod) time.Duration {
	t.Helper()
	ctx, begun := within(t, 2*time.Minute), time.Now()
	if err := node.DeletePod(ctx, pod.Metadata.Namespace, pod.Metadata.Name, -1); err != nil && !cluster.IsNotFound(err) {
		t.Fatal(err)
	}
	if err := node.WaitGone(ctx, pod.Metadata.Namespace, pod.Metadata.Name, pod.Metadata.UID); err != nil {
		t.Fatal(err)
	}
	return time.Since(begun)
}

// probeLog polls a probe's log until ok says it has what it waits for.
func probeLog(t *testing.T, pod *cluster.Pod, d time.Duration, ok func(probe.Log) error) probe.Log {
	t.Helper()
	var log probe.Log
	err := cluster.Poll(within(t, d), 100*time.Millisecond, func(ctx context.Context) error {
		text, err := node.Logs(ctx, pod.Metadata.Namespace, pod.Metadata.Name, "probe")
		if err != nil {
			return err
		}
		if log, err = probe.Parse(text); err != nil {
			return cluster.Fatal(err)
		}
		return ok(log)
	})
	if err != nil {
		t.Fatalf("pod %s: %v", pod.Metadata.Name, err)
	}
	return log
}

// nodeLog is probeLog without the API server.
func nodeLog(t *testing.T, pod *cluster.Pod, d time.Duration, ok func(probe.Log) error) probe.Log {
	t.Helper()
	var log probe.Log
	err := cluster.Poll(within(t, d), 100*time.Millisecond, func(context.Context) error {
		text, err := node.NodeLogs(pod, "probe")
		if err != nil {
			return err
		}
		if log, err = probe.Parse(text); err != nil {
			return cluster.Fatal(err)
		}
		return ok(log)
	})
	if err != nil {
		t.Fatalf("pod %s: %v", pod.Metadata.Name, err)
	}
	return log
}

// has waits for the first secret of each name.
func has(names ...string) func(probe.Log) error {
	return func(log probe.Log) error {
		for _, name := range names {
			if _, ok := log.First(name); !ok {
				return fmt.Errorf("no secret %q yet; errors so far: %v", name, log.Errors())
			}
		}
		return nil
	}
}

// agentPod is the product's pod on the node, which must be Ready.
func agentPod(t *testing.T) *cluster.Pod {
	t.Helper()
	var pod *cluster.Pod
	err := cluster.Poll(within(t, 2*time.Minute), 50*time.Millisecond, func(ctx context.Context) error {
		pods, err := node.Pods(ctx, on.namespace, on.selector)
		if err != nil {
			return err
		}
		for i := range pods {
			if err = pods[i].Ready(); err == nil {
				pod = &pods[i]
				return nil
			}
		}
		return errors.Join(errors.New("no pod of the product is ready"), err)
	})
	if err != nil {
		t.Fatal(err)
	}
	return pod
}

// volumeMounts are the mounts of csi.spiffe.io below the pods directory, of
// one pod or, with an empty UID, of all.
func volumeMounts(t *testing.T, uid string) []string {
	t.Helper()
	mounts, err := node.Mounts()
	if err != nil {
		t.Fatal(err)
	}
	var points []string
	for _, m := range mounts {
		if strings.HasPrefix(m.Point, "/var/lib/kubelet/pods/"+uid) && strings.Contains(m.Point, "/volumes/kubernetes.io~csi/") {
			points = append(points, m.Point)
		}
	}
	return points
}

// ledgerRecords are the names of the publish records on the node.
func ledgerRecords(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir(node.NodePath(ledgerDir))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".json") {
			names = append(names, e.Name())
		}
	}
	return names
}

// quantiles describes durations in milliseconds.
func quantiles(d []time.Duration) string {
	if len(d) == 0 {
		return "none"
	}
	d = slices.Sorted(slices.Values(d))
	at := func(q float64) float64 { return float64(d[int(q*float64(len(d)-1)+0.5)]) / float64(time.Millisecond) }
	return fmt.Sprintf("n=%d min %.1f p50 %.1f p90 %.1f p99 %.1f max %.1f ms", len(d), at(0), at(0.5), at(0.9), at(0.99), at(1))
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(s), "\n")
	return line
}
