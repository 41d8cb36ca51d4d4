package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe-node/spiffe-node/test/e2e/cluster"
	"github.com/spiffe-node/spiffe-node/test/e2e/probe"
)

const pauseImage = "spiffe-node.test/pause:1"

// testStranger runs a pod of another service account: it gets the bundle and
// nobody's identity.
func testStranger(t *testing.T) {
	t.Helper()
	ctx := within(t, time.Minute)
	if err := node.Apply(ctx, "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: stranger, namespace: "+on.workloads+"}\n"); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	pod := create(t, on.workloads, probePod("stranger", "stranger"))
	probeLog(t, pod, time.Minute, has("ROOTCA"))
	t.Logf("POST -> ROOTCA: %s", time.Since(begun).Round(time.Millisecond))
	<-time.After(3 * time.Second)
	log := probeLog(t, pod, 10*time.Second, has("ROOTCA"))
	if got, ok := log.First("default"); ok {
		t.Errorf("a pod of an unregistered service account got %s", got.SPIFFEID)
	}
	if len(log.Errors()) > 0 {
		t.Errorf("its streams ended: %v", log.Errors())
	}
	t.Logf("pod deleted in %s", remove(t, pod).Round(time.Millisecond))
}

// change edits the spec of a probe pod.
type change func(spec map[string]any)

func set(key string, value any) change { return func(spec map[string]any) { spec[key] = value } }

// asInit makes the probe an init container, with fields set on it, and adds a
// container that only waits.
func asInit(fields map[string]any) change {
	return func(spec map[string]any) {
		c := spec["containers"].([]any)[0].(map[string]any)
		maps.Copy(c, fields)
		spec["initContainers"] = []any{c}
		spec["containers"] = []any{map[string]any{"name": "main", "image": pauseImage, "imagePullPolicy": "Never"}}
	}
}

// testKinds runs the probe in every place of a pod a workload can be.
func testKinds(t *testing.T) {
	t.Helper()
	namespace(t, "kinds", "web")
	id := register(t, "kinds", "web")
	post := map[string]any{"exec": map[string]any{"command": []any{"/probe", "-once"}}}
	var made []*cluster.Pod
	for _, kind := range []struct {
		name   string
		change change
	}{
		{"host-network", set("hostNetwork", true)},
		{"host-pid", set("hostPID", true)},
		{"shared-pid", set("shareProcessNamespace", true)},
		{"init", asInit(map[string]any{"args": []any{"-once"}})},
		{"native-sidecar", asInit(map[string]any{"restartPolicy": "Always"})},
		// The kubelet says the container runs only once the hook has ended.
		{"post-start-held", func(spec map[string]any) {
			spec["containers"].([]any)[0].(map[string]any)["lifecycle"] = map[string]any{"postStart": post}
		}},
	} {
		spec := probePod(kind.name, "web")
		kind.change(spec["spec"].(map[string]any))
		pod := create(t, "kinds", spec)
		made = append(made, pod)
		log := nodeLog(t, pod, time.Minute, has("default"))
		got, _ := log.First("default")
		if got.SPIFFEID != id {
			t.Errorf("%s: identity is %q, want %q", kind.name, got.SPIFFEID, id)
		}
		if len(log.Errors()) > 0 {
			t.Errorf("%s: streams ended: %v", kind.name, log.Errors())
		}
		if _, err := node.WaitReady(within(t, time.Minute), "kinds", kind.name); err != nil {
			t.Errorf("%s: %v", kind.name, err)
		}
		t.Logf("%-16s container start -> default: %s", kind.name, got.SinceStart)
	}
	testRestartedContainer(t, made[0], id)
	testJob(t, id)
	testStaticPod(t)
	for _, pod := range made {
		remove(t, pod)
		gone(t, pod)
	}
}

// testRestartedContainer kills the probe: its next run has the identity again.
func testRestartedContainer(t *testing.T, pod *cluster.Pod, id string) {
	t.Helper()
	killed := time.Now()
	killProbe(t, pod)
	log := nodeLog(t, pod, time.Minute, func(log probe.Log) error {
		if len(log) == 0 || log[0].Time.Before(killed) {
			return fmt.Errorf("the container has not been started again")
		}
		return has("default")(log)
	})
	if got, _ := log.First("default"); got.SPIFFEID != id {
		t.Errorf("restarted container: identity is %q, want %q", got.SPIFFEID, id)
	}
}

// testJob runs a workload that ends by itself.
func testJob(t *testing.T, id string) {
	t.Helper()
	spec := probePod("job", "web", "-once")
	podSpec := spec["spec"].(map[string]any)
	podSpec["restartPolicy"] = "Never"
	job, err := json.Marshal(map[string]any{
		"apiVersion": "batch/v1", "kind": "Job", "metadata": map[string]any{"name": "job", "namespace": "kinds"},
		"spec": map[string]any{"template": map[string]any{"spec": podSpec}},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx := within(t, 2*time.Minute)
	if err := node.Apply(ctx, string(job)); err != nil {
		t.Fatal(err)
	}
	if _, err := node.Kubectl(ctx, "wait", "--namespace", "kinds", "--for=condition=Complete", "--timeout=90s", "job/job"); err != nil {
		t.Fatal(err)
	}
	jobs, err := node.Pods(ctx, "kinds", "job-name=job")
	if err != nil || len(jobs) != 1 {
		t.Fatalf("pods of the job: %d, error %v", len(jobs), err)
	}
	if got, _ := probeLog(t, &jobs[0], 10*time.Second, has("default")).First("default"); got.SPIFFEID != id {
		t.Errorf("job: identity is %q, want %q", got.SPIFFEID, id)
	}
	if _, err := node.Kubectl(ctx, "delete", "--namespace", "kinds", "job/job"); err != nil {
		t.Fatal(err)
	}
	if err := node.WaitGone(ctx, "kinds", jobs[0].Metadata.Name, jobs[0].Metadata.UID); err != nil {
		t.Fatal(err)
	}
	gone(t, &jobs[0])
}

// testStaticPod runs the probe from a file of the kubelet, which refuses CSI
// volumes there, so the socket directory comes as hostPath. Nobody has vouched
// for the pod: it gets the bundle and waits, whatever is registered for its name.
func testStaticPod(t *testing.T) {
	t.Helper()
	name := "static-" + node.NodeName()
	cli(t, "entry", "create", "-parentID", on.parentID(t), "-spiffeID", "spiffe://"+trustDomain+"/static", "-selector", "k8s:ns:kinds", "-selector", "k8s:pod-name:"+name)
	spec := probePod("static", "")
	spec["metadata"].(map[string]any)["namespace"] = "kinds"
	podSpec := spec["spec"].(map[string]any)
	delete(podSpec, "serviceAccountName")
	podSpec["volumes"] = []any{map[string]any{"name": "workload-socket", "hostPath": map[string]any{"path": "/run/spiffe-node/public"}}}
	manifest, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(node.Dir(), "static-pods", "static.json")
	if err := os.WriteFile(file, manifest, 0o600); err != nil {
		t.Fatal(err)
	}
	var mirror *cluster.Pod
	err = cluster.Poll(within(t, time.Minute), 100*time.Millisecond, func(ctx context.Context) (err error) {
		mirror, err = node.Pod(ctx, "kinds", name)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	log := probeLog(t, mirror, time.Minute, has("ROOTCA"))
	if len(log.Errors()) > 0 {
		t.Errorf("static pod: streams ended: %v", log.Errors())
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := node.WaitGone(within(t, 2*time.Minute), "kinds", name, mirror.Metadata.UID); err != nil {
		t.Fatal(err)
	}
}
