package e2e_test

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/spiffe-node/spiffe-node/test/e2e/cluster"
)

const startupTaint = "spiffe-node.io/agent-not-ready"

// testStartupTaint taints the node while the product is away: the taint stays
// until the product is back, and then only ours goes. What runs there tolerates
// nothing and stays, as the effect is NoSchedule.
func testStartupTaint(t *testing.T) {
	t.Helper()
	productAway(t)
	foreign := map[string]any{"key": "example.org/other", "effect": "PreferNoSchedule"}
	taint(t, map[string]any{"key": startupTaint, "effect": "NoSchedule", "value": "true"}, foreign)
	<-time.After(3 * time.Second) // for the authority to be wrong in
	if got := taints(t); !slices.Contains(got, startupTaint) {
		t.Errorf("the taint went without an agent: %v", got)
	}
	pod := create(t, on.workloads, probePod("on-a-new-node", "web"))
	begun := time.Now()
	placeProduct(t, map[string]any{"nowhere": nil})
	err := cluster.Poll(within(t, 2*time.Minute), 50*time.Millisecond, func(context.Context) error {
		if got := taints(t); slices.Contains(got, startupTaint) {
			return fmt.Errorf("still tainted: %v", got)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("product asked back -> start-up taint gone: %s", time.Since(begun).Round(time.Millisecond))
	newProductPod(t)
	t.Logf("product asked back -> Ready: %s", time.Since(begun).Round(time.Millisecond))
	got, _ := probeLog(t, pod, time.Minute, has("default", "ROOTCA")).First("default")
	t.Logf("pod that had to wait for it: container start -> default %s", got.SinceStart)
	if left := taints(t); !slices.Equal(left, []string{"example.org/other"}) {
		t.Errorf("taints left: %v", left)
	}
	taint(t)
	remove(t, pod)
	gone(t, pod)
}

// taint sets the node's taints.
func taint(t *testing.T, all ...map[string]any) {
	t.Helper()
	patch := map[string]any{"spec": map[string]any{"taints": append([]map[string]any{}, all...)}}
	if err := node.API(within(t, 30*time.Second), http.MethodPatch, "/api/v1/nodes/"+node.NodeName(), patch, nil); err != nil {
		t.Fatal(err)
	}
}

// taints are the keys of the node's taints.
func taints(t *testing.T) []string {
	t.Helper()
	var n struct {
		Spec struct{ Taints []struct{ Key string } }
	}
	if err := node.API(within(t, 30*time.Second), http.MethodGet, "/api/v1/nodes/"+node.NodeName(), nil, &n); err != nil {
		t.Fatal(err)
	}
	var keys []string
	for _, taint := range n.Spec.Taints {
		keys = append(keys, taint.Key)
	}
	return keys
}
