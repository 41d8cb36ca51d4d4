package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe-node/spiffe-node/test/e2e/cluster"
)

// managerContainer runs spire-controller-manager in the authority's pod.
const managerContainer = `{"spec": {"template": {"spec": {
	"containers": [{
		"name": "spire-controller-manager",
		"image": "ghcr.io/spiffe/spire-controller-manager:` + spireTag + `",
		"args": ["--config=/etc/spire-controller-manager/config.yaml"],
		"env": [{"name": "ENABLE_WEBHOOKS", "value": "true"}],
		"readinessProbe": {"httpGet": {"path": "/readyz", "port": 8083}, "periodSeconds": 1},
		"volumeMounts": [
			{"name": "manager", "mountPath": "/etc/spire-controller-manager"},
			{"name": "manager-tmp", "mountPath": "/tmp"},
			{"name": "admin", "mountPath": "/tmp/spire-server"}
		]
	}],
	"volumes": [
		{"name": "manager", "configMap": {"name": "spire-controller-manager"}},
		{"name": "manager-tmp", "emptyDir": {}}
	]
}}}}`

// TestControllerManager lets SPIRE's own controller manager, with its webhook,
// write the entries of the product's authority, which does no registration
// itself: the webhook's certificate and the bundle that the API server trusts
// it by are the authority's.
func TestControllerManager(t *testing.T) {
	besideSPIRE(t)
	helmProduct(t, "spire", "--set", "registration.enabled=false", "--set", "clusterSPIFFEIDs.default.enabled=false")
	manifest, err := os.ReadFile("testdata/controller-manager.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if err := node.Apply(within(t, time.Minute), string(manifest)); err != nil {
		t.Fatal(err)
	}
	kubectl(t, "patch", "statefulset", "-n", chartSpace, "spire-server", "--type=strategic", "-p", managerContainer)
	kubectl(t, "rollout", "status", "-n", chartSpace, "statefulset/spire-server", "--timeout=50s")

	// The webhook turns down what cannot be, which the API server learns only if
	// it trusts the webhook.
	resource := func(template string) string {
		return fmt.Sprintf("apiVersion: spire.spiffe.io/v1alpha1\nkind: ClusterSPIFFEID\nmetadata: {name: all}\nspec:\n  spiffeIDTemplate: %q\n  podSelector: {matchLabels: {app: probe}}\n", template)
	}
	err = cluster.Poll(within(t, time.Minute), time.Second, func(ctx context.Context) error {
		err := node.Apply(ctx, resource("spiffe://{{ .TrustDomain }}/{{ unheardOf }}"))
		if err == nil {
			return cluster.Fatal(errors.New("it is accepted"))
		}
		if !strings.Contains(err.Error(), `admission webhook "vclusterspiffeid.kb.io" denied the request`) {
			return err // the manager's container is Ready before its webhook is
		}
		t.Log(err)
		return nil
	})
	if err != nil {
		t.Fatalf("a template that does not parse: %v", err)
	}
	if err := node.Apply(within(t, time.Minute), resource("spiffe://{{ .TrustDomain }}/ns/{{ .PodMeta.Namespace }}/sa/{{ .PodSpec.ServiceAccountName }}")); err != nil {
		t.Fatal(err)
	}
	namespace(t, "managed", "web")
	pod := create(t, "managed", probePod("web", "web"))
	got, _ := probeLog(t, pod, time.Minute, has("default", "ROOTCA")).First("default")
	t.Logf("container start -> default, registered by spire-controller-manager: %s", got.SinceStart)
	if want := "spiffe://" + trustDomain + "/ns/managed/sa/web"; got.SPIFFEID != want {
		t.Errorf("identity is %q, want %q", got.SPIFFEID, want)
	}
	if !strings.Contains(cli(t, "entry", "show"), "example-cluster.") {
		t.Error("no entry has the prefix of the manager's entries")
	}
	remove(t, pod)
	thousandPods(t)

	kubectl(t, "delete", "clusterspiffeid", "all")
	if err := node.Delete(within(t, 2*time.Minute), string(manifest)); err != nil {
		t.Fatal(err)
	}
	kubectl(t, "delete", "namespace", "managed")
	testUninstall(t)
}

// thousandPods makes a thousand pods of a node that has no kubelet and waits
// until the authority has an entry for each, and until it has none any more.
func thousandPods(t *testing.T) {
	t.Helper()
	const count = 1000
	ctx := within(t, 5*time.Minute)
	if err := node.API(ctx, http.MethodPost, "/api/v1/nodes", map[string]any{"apiVersion": "v1", "kind": "Node", "metadata": map[string]any{"name": "paper"}}, nil); err != nil {
		t.Fatal(err)
	}
	entries := func(want int) error {
		return cluster.Poll(ctx, 100*time.Millisecond, func(context.Context) error {
			if out := cli(t, "entry", "count"); !strings.HasPrefix(out, strconv.Itoa(want)+" ") {
				return errors.New(out)
			}
			return nil
		})
	}
	begun := time.Now()
	var group sync.WaitGroup
	const creators = 16
	for first := range creators {
		group.Go(func() {
			for i := first; i < count; i += creators {
				pod := probePod("paper-"+strconv.Itoa(i), "web")
				pod["spec"].(map[string]any)["nodeName"] = "paper"
				if _, err := node.CreatePod(ctx, "managed", pod); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	group.Wait()
	if t.Failed() {
		return
	}
	made := time.Since(begun)
	if err := entries(count); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d pods created in %s; all have an entry %s after the first", count, made.Round(time.Millisecond), time.Since(begun).Round(time.Millisecond))
	begun = time.Now()
	kubectl(t, "delete", "pods", "-n", "managed", "--all", "--force", "--wait=false")
	made = time.Since(begun)
	if err := entries(0); err != nil {
		t.Fatal(err)
	}
	t.Logf("deleted in %s; no entry is left %s after the first", made.Round(time.Millisecond), time.Since(begun).Round(time.Millisecond))
	kubectl(t, "delete", "node", "paper")
}
