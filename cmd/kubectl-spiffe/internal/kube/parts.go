package kube

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// How the parts of spiffe-node are labelled. The chart calls the DaemonSet's
// pods node.
const (
	agentLabels     = "app.kubernetes.io/name=spiffe-node,app.kubernetes.io/component in (node,agent)"
	authorityLabels = "app.kubernetes.io/name=spiffe-node,app.kubernetes.io/component in (authority,server)"

	containerAnnotation = "kubectl.kubernetes.io/default-container"
	inspectPortName     = "inspect"
)

// knownNamespaces are tried by those who may not list pods everywhere.
var knownNamespaces = []string{"spire-server", "spiffe-node", "spire-system", "spire"}

// Part is a pod of spiffe-node.
type Part struct {
	Namespace, Pod, Node string
	// Container is the one with the admin socket.
	Container string
	// Running says whether that container can be asked.
	Running bool
	// Ready is the pod's condition.
	Ready bool
	// InspectPort is the port of the agent's Inspect endpoint; 0 = it has none.
	InspectPort int32
	created     metav1.Time
}

// Agents are the pods with an agent, by node. In namespace only, unless it is
// empty.
func (c *Cluster) Agents(ctx context.Context, namespace string) ([]Part, error) {
	return c.parts(ctx, namespace, agentLabels, "sds-agent", "agent")
}

// AgentOf is the agent that serves a node: the newest that runs, since two
// overlap while one replaces the other.
func (c *Cluster) AgentOf(ctx context.Context, namespace, node string) (Part, error) {
	all, err := c.Agents(ctx, namespace)
	if err != nil {
		return Part{}, err
	}
	all = slices.DeleteFunc(all, func(p Part) bool { return p.Node != node })
	if len(all) == 0 {
		return Part{}, fmt.Errorf("no agent of spiffe-node runs on node %s: does its DaemonSet tolerate the node's taints?", node)
	}
	return all[0], nil
}

// Authority is the cluster's authority.
func (c *Cluster) Authority(ctx context.Context, namespace string) (Part, error) {
	all, err := c.parts(ctx, namespace, authorityLabels, "authority", "spire-server")
	if err != nil {
		return Part{}, err
	}
	if len(all) == 0 {
		return Part{}, errors.New("no authority of spiffe-node runs in this cluster: if a SPIRE Server is the authority, use its own spire-server command; " +
			"a socket of this machine is meant with --local or -socketPath")
	}
	return all[0], nil
}

// Current keeps for each node the part that serves it.
func Current(parts []Part) []Part {
	seen := map[string]bool{}
	return slices.DeleteFunc(slices.Clone(parts), func(p Part) bool {
		was := seen[p.Node]
		seen[p.Node] = true
		return was
	})
}

func (c *Cluster) parts(ctx context.Context, namespace, labels string, containers ...string) ([]Part, error) {
	pods, err := c.podsOf(ctx, namespace, labels)
	if err != nil {
		return nil, err
	}
	var out []Part
	for i := range pods {
		if pods[i].Spec.NodeName != "" {
			out = append(out, partOf(&pods[i], containers))
		}
	}
	slices.SortFunc(out, func(a, b Part) int {
		return cmp.Or(cmp.Compare(a.Node, b.Node), cmp.Compare(rank(a), rank(b)), b.created.Compare(a.created.Time), cmp.Compare(a.Pod, b.Pod))
	})
	return out, nil
}

func rank(p Part) int {
	switch {
	case p.Running && p.Ready:
		return 0
	case p.Running:
		return 1
	}
	return 2
}

func (c *Cluster) podsOf(ctx context.Context, namespace, labels string) ([]corev1.Pod, error) {
	if namespace != "" {
		return List[corev1.Pod](ctx, c, PodsPath(namespace), labels, "")
	}
	pods, err := List[corev1.Pod](ctx, c, PodsPath(""), labels, "")
	if !IsForbidden(err) {
		return pods, err
	}
	for _, ns := range knownNamespaces {
		if pods, perr := List[corev1.Pod](ctx, c, PodsPath(ns), labels, ""); perr == nil && len(pods) > 0 {
			return pods, nil
		}
	}
	return nil, fmt.Errorf("you may not list pods in all namespaces; name the one of spiffe-node with --spiffe-namespace: %w", err)
}

// PodsPath is where pods are listed; "" = of all namespaces.
func PodsPath(namespace string) string {
	if namespace == "" {
		return "/api/v1/pods"
	}
	return "/api/v1/namespaces/" + namespace + "/pods"
}

func partOf(pod *corev1.Pod, names []string) Part {
	p := Part{Namespace: pod.Namespace, Pod: pod.Name, Node: pod.Spec.NodeName, created: pod.CreationTimestamp}
	// Our own names first: the default container may be any.
	var found *corev1.Container
	for _, name := range append(slices.Clone(names), pod.Annotations[containerAnnotation]) {
		i := slices.IndexFunc(pod.Spec.Containers, func(c corev1.Container) bool { return c.Name == name })
		if i >= 0 && found == nil {
			found = &pod.Spec.Containers[i]
		}
	}
	if found == nil && len(pod.Spec.Containers) > 0 {
		found = &pod.Spec.Containers[0]
	}
	if found != nil {
		p.Container = found.Name
		for _, port := range found.Ports {
			if port.Name == inspectPortName {
				p.InspectPort = port.ContainerPort
			}
		}
	}
	for _, st := range pod.Status.ContainerStatuses {
		if st.Name == p.Container {
			p.Running = st.State.Running != nil
		}
	}
	for _, cond := range pod.Status.Conditions {
		if cond.Type == corev1.PodReady {
			p.Ready = cond.Status == corev1.ConditionTrue
		}
	}
	return p
}

// Token asks for a short-lived token of a service account that is good for
// one audience: the API server itself does not take it.
func (c *Cluster) Token(ctx context.Context, namespace, account, audience string) (string, error) {
	seconds := int64(600) // the least the API server gives
	var out authenticationv1.TokenRequest
	err := c.Create(ctx, "/api/v1/namespaces/"+namespace+"/serviceaccounts/"+account+"/token", &authenticationv1.TokenRequest{
		TypeMeta: metav1.TypeMeta{APIVersion: "authentication.k8s.io/v1", Kind: "TokenRequest"},
		Spec:     authenticationv1.TokenRequestSpec{Audiences: []string{audience}, ExpirationSeconds: &seconds},
	}, &out)
	if err != nil {
		return "", err
	}
	return out.Status.Token, nil
}
