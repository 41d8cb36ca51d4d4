package k8spsat_test

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/authority/nodeattest"
	"github.com/spiffe-node/spiffe-node/pkg/authority/nodeattest/k8spsat"
)

const secret = "eyJhbGciOi.token.signature"

// cluster is a cluster with one agent pod and one good token.
type cluster struct {
	review *k8spsat.Review
	pod    *k8spsat.Pod
	node   *k8spsat.Node
	err    map[string]error // by method
	asked  []string
}

func newCluster() *cluster {
	return &cluster{
		review: &k8spsat.Review{
			Authenticated: true, Audiences: []string{"spire-server"}, Username: "system:serviceaccount:spiffe-node:agent",
			Extra: map[string][]string{
				"authentication.kubernetes.io/pod-name":  {"agent-x7"},
				"authentication.kubernetes.io/pod-uid":   {"pod-uid"},
				"authentication.kubernetes.io/node-name": {"node-1"},
				"authentication.kubernetes.io/node-uid":  {"node-uid"},
			},
		},
		pod:  &k8spsat.Pod{UID: "pod-uid", ServiceAccount: "agent", NodeName: "node-1", HostIP: "10.0.0.7", Labels: map[string]string{"app": "agent", "secret": "x"}},
		node: &k8spsat.Node{UID: "node-uid", Labels: map[string]string{"zone": "a", "other": "x", "empty": ""}},
		err:  map[string]error{},
	}
}

func (c *cluster) ReviewToken(_ context.Context, token string, audiences []string) (*k8spsat.Review, error) {
	c.asked = append(c.asked, "review "+strings.Join(audiences, ","))
	if token != secret && c.err["review"] == nil {
		return &k8spsat.Review{}, nil
	}
	return c.review, c.err["review"]
}

func (c *cluster) Pod(_ context.Context, namespace, name string) (*k8spsat.Pod, error) {
	c.asked = append(c.asked, "pod "+namespace+"/"+name)
	return c.pod, c.err["pod"]
}

func (c *cluster) Node(_ context.Context, name string) (*k8spsat.Node, error) {
	c.asked = append(c.asked, "node "+name)
	return c.node, c.err["node"]
}

func attestor(tb testing.TB, c k8spsat.Kubernetes) *k8spsat.Attestor {
	tb.Helper()
	a, err := k8spsat.New(k8spsat.Config{
		TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Cluster: "prod",
		ServiceAccounts: []string{"spiffe-node:agent"}, Audiences: []string{"spire-server", "second"},
		NodeLabels: []string{"zone", "missing", "empty"}, PodLabels: []string{"app"}, Kubernetes: c,
	})
	if err != nil {
		tb.Fatal(err)
	}
	return a
}

func payload(cluster, token string) []byte {
	out, err := json.Marshal(map[string]string{"cluster": cluster, "token": token})
	if err != nil {
		panic(err)
	}
	return out
}

func TestAttest(t *testing.T) {
	c := newCluster()
	got, err := attestor(t, c).Attest(t.Context(), payload("prod", secret), nil)
	if err != nil {
		t.Fatal(err)
	}
	if got.AgentID.String() != "spiffe://example.org/spire/agent/k8s_psat/prod/node-uid" || !got.Reattestable {
		t.Errorf("%s, %t", got.AgentID, got.Reattestable)
	}
	var selectors []string
	for s := range got.Selectors.All() {
		selectors = append(selectors, s.String())
	}
	slices.Sort(selectors)
	want := []string{
		"k8s_psat:agent_node_ip:10.0.0.7", "k8s_psat:agent_node_label:empty:", "k8s_psat:agent_node_label:zone:a",
		"k8s_psat:agent_node_name:node-1", "k8s_psat:agent_node_uid:node-uid", "k8s_psat:agent_ns:spiffe-node",
		"k8s_psat:agent_pod_label:app:agent", "k8s_psat:agent_pod_name:agent-x7", "k8s_psat:agent_pod_uid:pod-uid",
		"k8s_psat:agent_sa:agent", "k8s_psat:cluster:prod",
	}
	if diff := cmp.Diff(want, selectors); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"review spire-server,second", "pod spiffe-node/agent-x7", "node node-1"}, c.asked); diff != "" {
		t.Error(diff)
	}
}

func TestRefusals(t *testing.T) {
	for name, tc := range map[string]struct {
		edit    func(*cluster)
		payload []byte
		kind    error // nil = a fault
		want    string
	}{
		"no JSON":             {nil, []byte("x" + secret), nodeattest.ErrInvalid, "failed to unmarshal data payload"},
		"list":                {nil, []byte(`["prod"]`), nodeattest.ErrInvalid, "failed to unmarshal data payload"},
		"number as token":     {nil, []byte(`{"cluster":"prod","token":1}`), nodeattest.ErrInvalid, "failed to unmarshal data payload"},
		"no cluster":          {nil, payload("", secret), nodeattest.ErrInvalid, "missing cluster in attestation data"},
		"no token":            {nil, payload("prod", ""), nodeattest.ErrInvalid, "missing token in attestation data"},
		"other cluster":       {nil, payload("test", secret), nodeattest.ErrInvalid, `not configured for cluster "test"`},
		"long cluster":        {nil, payload(strings.Repeat("x", 300), secret), nodeattest.ErrInvalid, "longer than 255 bytes"},
		"too large":           {nil, payload("prod", strings.Repeat("x", 70_000)), nodeattest.ErrInvalid, "larger than 65536"},
		"bad token":           {nil, payload("prod", "guess"), nodeattest.ErrDenied, `token not authenticated according to TokenReview API for cluster "prod"`},
		"other audience":      {func(c *cluster) { c.review.Audiences = []string{"https://kubernetes.default.svc"} }, nil, nodeattest.ErrDenied, "token not authenticated"},
		"no audience":         {func(c *cluster) { c.review.Audiences = nil }, nil, nodeattest.ErrDenied, "token not authenticated"},
		"a user":              {func(c *cluster) { c.review.Username = "alice" }, nil, nodeattest.ErrDenied, "not a service account's"},
		"odd account":         {func(c *cluster) { c.review.Username = "system:serviceaccount:a:b:c" }, nil, nodeattest.ErrDenied, "not a service account's"},
		"no account":          {func(c *cluster) { c.review.Username = "system:serviceaccount::" }, nil, nodeattest.ErrDenied, "not a service account's"},
		"other account":       {func(c *cluster) { c.review.Username = "system:serviceaccount:spiffe-node:default" }, nil, nodeattest.ErrDenied, `"spiffe-node:default" is not an allowed service account for cluster "prod"`},
		"other namespace":     {func(c *cluster) { c.review.Username = "system:serviceaccount:default:agent" }, nil, nodeattest.ErrDenied, `"default:agent" is not an allowed`},
		"not bound":           {func(c *cluster) { delete(c.review.Extra, "authentication.kubernetes.io/pod-uid") }, nil, nodeattest.ErrDenied, "not bound to a pod"},
		"bound to two":        {func(c *cluster) { c.review.Extra["authentication.kubernetes.io/pod-name"] = []string{"a", "b"} }, nil, nodeattest.ErrDenied, "not bound to a pod"},
		"pod gone":            {func(c *cluster) { c.err["pod"] = k8spsat.ErrGone }, nil, nodeattest.ErrDenied, "pod spiffe-node/agent-x7 is gone"},
		"pod replaced":        {func(c *cluster) { c.pod.UID = "newer" }, nil, nodeattest.ErrDenied, "bound to an earlier pod"},
		"pod of another":      {func(c *cluster) { c.pod.ServiceAccount = "default" }, nil, nodeattest.ErrDenied, "does not run as service account"},
		"pod not scheduled":   {func(c *cluster) { c.pod.NodeName = "" }, nil, nodeattest.ErrDenied, "on no node yet"},
		"pod elsewhere":       {func(c *cluster) { c.pod.NodeName = "node-2" }, nil, nodeattest.ErrDenied, `bound to node "node-1", pod spiffe-node/agent-x7 is on "node-2"`},
		"node gone":           {func(c *cluster) { c.err["node"] = k8spsat.ErrGone }, nil, nodeattest.ErrDenied, `node "node-1" of pod spiffe-node/agent-x7 is gone`},
		"node replaced":       {func(c *cluster) { c.node.UID = "newer" }, nil, nodeattest.ErrDenied, `bound to an earlier node`},
		"node without UID":    {func(c *cluster) { c.node.UID = "" }, nil, nil, "has no UID"},
		"UID is no segment":   {func(c *cluster) { c.node.UID = "a/b"; delete(c.review.Extra, "authentication.kubernetes.io/node-uid") }, nil, nil, "agent ID for node"},
		"no answer on tokens": {func(c *cluster) { c.err["review"] = errors.New("timeout") }, nil, nil, "unable to validate token with TokenReview API: timeout"},
		"no answer on pods":   {func(c *cluster) { c.err["pod"] = errors.New("timeout") }, nil, nil, "unable to get pod"},
		"no answer on nodes":  {func(c *cluster) { c.err["node"] = errors.New("timeout") }, nil, nil, "unable to get node"},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster()
			c.review.Extra = maps.Clone(c.review.Extra)
			if tc.edit != nil {
				tc.edit(c)
			}
			data := tc.payload
			if data == nil {
				data = payload("prod", secret)
			}
			got, err := attestor(t, c).Attest(t.Context(), data, nil)
			if err == nil {
				t.Fatalf("attested as %s", got.AgentID)
			}
			for _, kind := range []error{nodeattest.ErrInvalid, nodeattest.ErrDenied} {
				if errors.Is(err, kind) != (kind == tc.kind) { //nolint:errorlint // the kind itself
					t.Errorf("kind of %v", err)
				}
			}
			if !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), secret) {
				t.Errorf("got %v, want %s", err, tc.want)
			}
		})
	}
}

// Kubernetes before 1.30 does not say the node in the token; the pod does.
func TestTokenWithoutNode(t *testing.T) {
	c := newCluster()
	delete(c.review.Extra, "authentication.kubernetes.io/node-name")
	delete(c.review.Extra, "authentication.kubernetes.io/node-uid")
	if _, err := attestor(t, c).Attest(t.Context(), payload("prod", secret), nil); err != nil {
		t.Error(err)
	}
}

func TestConfiguration(t *testing.T) {
	_, err := k8spsat.New(k8spsat.Config{})
	if err == nil {
		t.Fatal("accepted")
	}
	for _, want := range []string{"trust domain", "cluster", "service accounts", "audiences", "Kubernetes client"} {
		if !strings.Contains(err.Error(), want+" missing") {
			t.Errorf("%v does not name %s", err, want)
		}
	}
}

// FuzzPayload: nothing but the good token gets in, and the token is never
// quoted.
func FuzzPayload(f *testing.F) {
	f.Add([]byte(`{"cluster":"prod","token":"` + secret + `"}`))
	f.Add([]byte(`{"cluster":"prod","token":"x","token":"` + secret + `"}`))
	f.Add([]byte(`{"CLUSTER":"prod","Token":"\u0065"}`))
	f.Add([]byte(`{"cluster":{},"token":[]}`))
	f.Add([]byte("\xff\xfe{"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c := newCluster()
		got, err := attestor(t, c).Attest(t.Context(), data, nil)
		switch {
		case (got == nil) == (err == nil):
			t.Fatal("neither or both of result and error")
		case err == nil && !strings.Contains(string(data), secret) && !strings.Contains(string(data), `\`):
			t.Errorf("attested by %q", data)
		case err != nil && len(err.Error()) > 2000:
			t.Errorf("an error of %d bytes", len(err.Error()))
		}
	})
}
