package e2e_test

import (
	"fmt"
	"testing"
	"time"
)

// managedLabel is what Istio's guide registers pods by.
const managedLabel = "spiffe.io/spire-managed-identity"

// installation says where one way of installing the product puts its parts.
type installation struct {
	namespace    string
	selector     string            // of the node's pod
	containers   map[string]string // agent and driver by what these tests call them
	sockets      string            // directory on the node
	driverHealth string            // ":port"
	workloads    string            // namespace of the pods that stay
	// cli runs kubectl-spiffe where entries are written.
	cli func(t *testing.T, args ...string) string
	// parentID is the agent's.
	parentID func(t *testing.T) string
	// automatic says that every pod of these tests is registered by itself.
	automatic bool
	// known is how many pods stay; 0 = 40, or 10 with -short.
	known int
}

// plain is testdata/product.yaml: every node its own authority.
func plain() installation {
	return installation{
		namespace:    "spiffe-node",
		selector:     "app=spiffe-node",
		containers:   map[string]string{"agent": "agent", "driver": "driver"},
		sockets:      "/run/spiffe-node/public",
		driverHealth: ":9809",
		workloads:    "known",
		cli: func(t *testing.T, args ...string) string {
			t.Helper()
			pod := agentPod(t)
			args = append(append([]string{"/kubectl-spiffe"}, args...), "-socketPath", "/run/spiffe-node/admin/api.sock")
			out, err := node.Exec(within(t, 30*time.Second), pod.Metadata.Namespace, pod.Metadata.Name, "agent", args...)
			if err != nil {
				t.Fatal(err)
			}
			return out
		},
		parentID: func(*testing.T) string { return "spiffe://" + trustDomain + "/spire/agent/local/" + node.NodeName() },
	}
}

// on is the installation under test.
var on installation

// cli runs kubectl-spiffe where the installation's entries are written.
func cli(t *testing.T, args ...string) string {
	t.Helper()
	return on.cli(t, args...)
}

// register makes sure a service account's pods have an identity: by an entry,
// unless the installation does that by itself.
func register(t *testing.T, ns, account string) string {
	t.Helper()
	id := fmt.Sprintf("spiffe://%s/ns/%s/sa/%s", trustDomain, ns, account)
	if !on.automatic {
		cli(t, "entry", "create", "-parentID", on.parentID(t), "-spiffeID", id, "-selector", "k8s:ns:"+ns, "-selector", "k8s:sa:"+account)
	}
	return id
}
