// Package k8spsat attests agents by the projected service account token of
// their pod: the k8s_psat type of SPIRE.
//
// Promise: a result names the node on which the API server says that the pod
// runs to which it bound the token, for an allow-listed service account and an
// audience of ours. The agent's ID ends in the UID of that node.
//
// Threats: anybody may send a token, and anything that looks like one. Nothing
// in the payload counts but the token, and nothing in the token counts but what
// TokenReview says of it. A token that is not bound to a pod, or to one that is
// gone, has been replaced under the same name, is on another node than the
// token says, or runs as another account, is refused. Tokens are never logged.
package k8spsat

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/authority/nodeattest"
)

// Type is the attestation type.
const Type = "k8s_psat"

// maxPayload bounds what is parsed, in bytes. Tokens are about one kilobyte.
const maxPayload = 64 << 10

// maxName bounds what is quoted of a payload, in bytes.
const maxName = 255

// Kubernetes is what an attestor asks of a cluster. Safe for concurrent use.
type Kubernetes interface {
	// ReviewToken has the API server check a token for one of the audiences.
	ReviewToken(ctx context.Context, token string, audiences []string) (*Review, error)
	// Pod is a pod by name; ErrGone if there is none.
	Pod(ctx context.Context, namespace, name string) (*Pod, error)
	// Node is a node by name; ErrGone if there is none.
	Node(ctx context.Context, name string) (*Node, error)
}

// ErrGone says that the cluster has no such object.
var ErrGone = errors.New("not found in the cluster")

// Review is what TokenReview says of a token.
type Review struct {
	Authenticated bool
	Audiences     []string // those asked for that are in the token
	Username      string
	Extra         map[string][]string
}

// Pod is what counts of a pod.
type Pod struct {
	UID            string
	ServiceAccount string
	NodeName       string
	HostIP         string
	Labels         map[string]string
}

// Node is what counts of a node.
type Node struct {
	UID    string
	Labels map[string]string
}

// Config says whom to attest.
type Config struct {
	// TrustDomain is that of the agents; required.
	TrustDomain spiffeid.TrustDomain
	// Cluster is the name that agents send; required.
	Cluster string
	// ServiceAccounts are those of the agents, as namespace:name; required.
	ServiceAccounts []string
	// Audiences of the tokens, one of which must be in a token; required.
	Audiences []string
	// NodeLabels and PodLabels are the keys that become selectors.
	NodeLabels, PodLabels []string
	// Kubernetes is the cluster; required.
	Kubernetes Kubernetes
}

// Attestor attests by projected service account token. Safe for concurrent use.
type Attestor struct{ cfg Config }

// New checks the configuration.
func New(cfg Config) (*Attestor, error) {
	var errs []error
	for _, missing := range []struct {
		name string
		is   bool
	}{
		{"trust domain", cfg.TrustDomain.IsZero()},
		{"cluster", cfg.Cluster == ""},
		{"service accounts", len(cfg.ServiceAccounts) == 0},
		{"audiences", len(cfg.Audiences) == 0},
		{"Kubernetes client", cfg.Kubernetes == nil},
	} {
		if missing.is {
			errs = append(errs, fmt.Errorf("k8s_psat: %s missing", missing.name))
		}
	}
	return &Attestor{cfg}, errors.Join(errs...)
}

// Type is k8s_psat.
func (a *Attestor) Type() string { return Type }

// payload is what an agent sends.
type payload struct {
	Cluster string `json:"cluster"`
	Token   string `json:"token"`
}

func (a *Attestor) parse(data []byte) (*payload, error) {
	if len(data) > maxPayload {
		return nil, nodeattest.Invalid("attestation data of %d bytes is larger than %d", len(data), maxPayload)
	}
	var p payload
	if err := json.Unmarshal(data, &p); err != nil {
		// The error may quote the data, and with it a part of a token.
		return nil, nodeattest.Invalid("failed to unmarshal data payload: not a JSON object with the texts cluster and token")
	}
	switch {
	case p.Cluster == "":
		return nil, nodeattest.Invalid("missing cluster in attestation data")
	case p.Token == "":
		return nil, nodeattest.Invalid("missing token in attestation data")
	case len(p.Cluster) > maxName:
		return nil, nodeattest.Invalid("cluster name in attestation data is longer than %d bytes", maxName)
	case p.Cluster != a.cfg.Cluster:
		return nil, nodeattest.Invalid("not configured for cluster %q", p.Cluster)
	}
	return &p, nil
}

// Names of the facts about a bound token.
const (
	extraPodName  = "authentication.kubernetes.io/pod-name"
	extraPodUID   = "authentication.kubernetes.io/pod-uid"
	extraNodeName = "authentication.kubernetes.io/node-name"
	extraNodeUID  = "authentication.kubernetes.io/node-uid"
)

// AgentID is the ID of the agent of a node.
func AgentID(td spiffeid.TrustDomain, cluster, nodeUID string) (spiffeid.ID, error) {
	return spiffeid.FromSegments(td, "spire", "agent", Type, cluster, nodeUID)
}

// Attest takes a JSON object with cluster and token as payload; it asks for no
// challenge.
func (a *Attestor) Attest(ctx context.Context, data []byte, _ func([]byte) ([]byte, error)) (*nodeattest.Result, error) {
	p, err := a.parse(data)
	if err != nil {
		return nil, err
	}
	review, err := a.cfg.Kubernetes.ReviewToken(ctx, p.Token, a.cfg.Audiences)
	if err != nil {
		return nil, fmt.Errorf("unable to validate token with TokenReview API: %w", err)
	}
	if !review.Authenticated || !slices.ContainsFunc(review.Audiences, func(s string) bool { return slices.Contains(a.cfg.Audiences, s) }) {
		return nil, nodeattest.Denied("token not authenticated according to TokenReview API for cluster %q", a.cfg.Cluster)
	}
	namespace, account, err := serviceAccount(review.Username)
	if err != nil {
		return nil, err
	}
	if full := namespace + ":" + account; !slices.Contains(a.cfg.ServiceAccounts, full) {
		return nil, nodeattest.Denied("%q is not an allowed service account for cluster %q", full, a.cfg.Cluster)
	}
	name, podUID := one(review, extraPodName), one(review, extraPodUID)
	if name == "" || podUID == "" {
		return nil, nodeattest.Denied("token is not bound to a pod: project it with a serviceAccountToken volume")
	}
	pod, node, err := a.place(ctx, review, namespace, account, name, podUID)
	if err != nil {
		return nil, err
	}
	id, err := AgentID(a.cfg.TrustDomain, a.cfg.Cluster, node.UID)
	if err != nil {
		return nil, fmt.Errorf("agent ID for node %q: %w", pod.NodeName, err)
	}
	return &nodeattest.Result{
		AgentID:      id,
		Selectors:    a.selectors(namespace, account, name, pod, node),
		Reattestable: true,
	}, nil
}

// serviceAccount reads system:serviceaccount:NAMESPACE:NAME.
func serviceAccount(user string) (namespace, name string, err error) {
	rest, ok := strings.CutPrefix(user, "system:serviceaccount:")
	namespace, name, ok2 := strings.Cut(rest, ":")
	if !ok || !ok2 || namespace == "" || name == "" || strings.Contains(name, ":") {
		return "", "", nodeattest.Denied("token is not a service account's")
	}
	return namespace, name, nil
}

// one is a fact that must be there once to count.
func one(r *Review, key string) string {
	if v := r.Extra[key]; len(v) == 1 {
		return v[0]
	}
	return ""
}

// place finds the pod that the token is bound to and the node it runs on.
func (a *Attestor) place(ctx context.Context, review *Review, namespace, account, name, podUID string) (*Pod, *Node, error) {
	pod, err := a.cfg.Kubernetes.Pod(ctx, namespace, name)
	switch {
	case errors.Is(err, ErrGone):
		return nil, nil, nodeattest.Denied("the token's pod %s/%s is gone", namespace, name)
	case err != nil:
		return nil, nil, fmt.Errorf("unable to get pod %s/%s: %w", namespace, name, err)
	case pod.UID != podUID:
		return nil, nil, nodeattest.Denied("the token is bound to an earlier pod %s/%s", namespace, name)
	case pod.ServiceAccount != account:
		return nil, nil, nodeattest.Denied("pod %s/%s does not run as service account %q", namespace, name, account)
	case pod.NodeName == "":
		return nil, nil, nodeattest.Denied("pod %s/%s is on no node yet", namespace, name)
	}
	if said := one(review, extraNodeName); said != "" && said != pod.NodeName {
		return nil, nil, nodeattest.Denied("the token is bound to node %q, pod %s/%s is on %q", said, namespace, name, pod.NodeName)
	}
	node, err := a.cfg.Kubernetes.Node(ctx, pod.NodeName)
	switch {
	case errors.Is(err, ErrGone):
		return nil, nil, nodeattest.Denied("node %q of pod %s/%s is gone", pod.NodeName, namespace, name)
	case err != nil:
		return nil, nil, fmt.Errorf("unable to get node %q: %w", pod.NodeName, err)
	case node.UID == "":
		return nil, nil, fmt.Errorf("node %q has no UID", pod.NodeName)
	}
	if said := one(review, extraNodeUID); said != "" && said != node.UID {
		return nil, nil, nodeattest.Denied("the token is bound to an earlier node %q", pod.NodeName)
	}
	return pod, node, nil
}

func (a *Attestor) selectors(namespace, account, podName string, pod *Pod, node *Node) attest.Selectors {
	values := []string{
		"cluster:" + a.cfg.Cluster,
		"agent_ns:" + namespace,
		"agent_sa:" + account,
		"agent_pod_name:" + podName,
		"agent_pod_uid:" + pod.UID,
		"agent_node_ip:" + pod.HostIP,
		"agent_node_name:" + pod.NodeName,
		"agent_node_uid:" + node.UID,
	}
	for _, key := range a.cfg.NodeLabels {
		if value, ok := node.Labels[key]; ok {
			values = append(values, "agent_node_label:"+key+":"+value)
		}
	}
	for _, key := range a.cfg.PodLabels {
		if value, ok := pod.Labels[key]; ok {
			values = append(values, "agent_pod_label:"+key+":"+value)
		}
	}
	out := make([]attest.Selector, 0, len(values))
	for _, v := range values {
		// Neither type nor value can be empty, which is all that is checked.
		if s, err := attest.NewSelector(Type, v); err == nil {
			out = append(out, s)
		}
	}
	return attest.NewSelectors(out...)
}
