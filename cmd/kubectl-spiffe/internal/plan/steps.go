package plan

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// release is what the plan calls the new release.
const release = "spiffe-node"

// steps are written so that each can be taken back until the last but one.
func (w *world) steps() {
	f, ns := &w.plan.Found, w.agent.namespace
	step := func(title, text string, commands ...string) {
		w.plan.Steps = append(w.plan.Steps, Step{title, text, commands})
	}
	server := "SPIRE Server, its controller manager, the custom resources and their CRDs stay as they are: do not install the chart spiffe-node-crds."
	if f.ControllerManager == "" {
		server = "SPIRE Server and its entries stay as they are; entries go on being made by whoever makes them now."
	}
	step("Keep what stays", server+" Who registers pods does not change.",
		"kubectl spiffe migrate plan -o json > before.json")

	var patches []string
	for _, k := range w.old {
		if k == w.agent || k == w.driver {
			patches = append(patches, fmt.Sprintf("kubectl patch daemonset -n %s %s --type merge -p '%s'", k.namespace, k.name, affinity(k)))
		}
	}
	step("Let the old DaemonSets leave nodes that are labelled",
		"No node has the label yet, so nothing moves; the pods of the DaemonSets are replaced one by one, once. "+
			"Where Helm or GitOps would revert it, put the same affinity into their values (SPIRE's chart: spire-agent.affinity, spiffe-csi-driver.affinity).",
		patches...)

	step("Install beside them",
		"With the values of this plan. It is SPIRE Agent's namespace and service account, so the server's allow-list and agents' SPIFFE IDs stay. No pod starts yet: no node has the label.",
		"kubectl spiffe migrate plan --values > values.yaml",
		fmt.Sprintf("helm upgrade --install -n %s %s deploy/helm/spiffe-node -f values.yaml%s", ns, release, w.beside()))

	commands := []string{}
	for _, n := range w.order() {
		commands = append(commands, fmt.Sprintf("NODE=%s   # %s with the volume", n.Name, pods(len(n.Volumes))))
	}
	if w.left() {
		commands = append(commands,
			"kubectl label node $NODE "+Label+"=true",
			fmt.Sprintf("kubectl rollout status -n %s daemonset/spiffe-node", ns),
			"kubectl spiffe status -A        # the node's agent, its callers and their SVIDs",
			"kubectl spiffe check            # no errors",
			"kubectl spiffe migrate plan     # the node is spiffe-node's, and nobody else's",
		)
		step("Move one node, look, then the others",
			"Nothing is cordoned or drained: running pods keep their mounts and reconnect within seconds, with new SVIDs of the same IDs. "+
				"A mount that is asked for in between waits and is tried again by the kubelet.", commands...)
	}
	step("Go back, at any time before the next step",
		"The old pods come back to the node and take the socket over; running pods reconnect.",
		"kubectl label node $NODE "+Label+"-")
	w.lastSteps(ns, step)
}

// left says whether a node may still have to be moved.
func (w *world) left() bool {
	return len(w.plan.Nodes) == 0 || slices.ContainsFunc(w.plan.Nodes, func(n Node) bool { return n.Agent != byUs })
}

// beside are the flags of helm that hold while the old parts are there: what
// theirs is stays theirs, and only labelled nodes are ours.
func (w *world) beside() string {
	flags := " --set node.serviceAccount.create=false --set-string 'node.nodeSelector." + strings.ReplaceAll(Label, ".", `\.`) + "=true'"
	if w.plan.Found.CSIDriverObject != "" {
		flags = " --set csiDriverObject.create=false" + flags
	}
	return flags
}

// order is the nodes that are still to be moved, those with few pods first.
func (w *world) order() []Node {
	var out []Node
	for limit := range 2 {
		for _, n := range w.plan.Nodes {
			if few := len(n.Volumes) <= 3; n.Agent == bySPIRE && few == (limit == 0) {
				out = append(out, n)
			}
		}
	}
	return out
}

func (w *world) lastSteps(ns string, step func(title, text string, commands ...string)) {
	f := &w.plan.Found
	keep := func(object string) string {
		return fmt.Sprintf("kubectl annotate --overwrite %s helm.sh/resource-policy=keep meta.helm.sh/release-name=%s meta.helm.sh/release-namespace=%s", object, release, ns)
	}
	account := w.account()
	commands := []string{}
	owned := "app.kubernetes.io/managed-by=Helm"
	if f.CSIDriverObject != "" {
		commands = append(commands, keep("csidriver "+f.PluginName), "kubectl label --overwrite csidriver "+f.PluginName+" "+owned)
	}
	commands = append(commands,
		keep(fmt.Sprintf("serviceaccount -n %s %s", ns, account)),
		fmt.Sprintf("kubectl label --overwrite serviceaccount -n %s %s %s", ns, account, owned),
		"# SPIRE's chart: helm upgrade ... --reuse-values --set spire-agent.enabled=false --set spiffe-csi-driver.enabled=false",
		"# without Helm: kubectl delete "+strings.Join(w.oldNames(), " && kubectl delete "),
		fmt.Sprintf("helm upgrade -n %s %s deploy/helm/spiffe-node -f values.yaml", ns, release),
	)
	step("When all nodes have moved: remove the old parts",
		"The CSIDriver object and the service account change hands first: without the former no pod with the volume starts, without the latter agents lose the server. "+
			"From here the way back is to install the old parts again. New nodes need no label any more.", commands...)
	step("Verify", "",
		"kubectl spiffe check && kubectl spiffe status -A",
		"kubectl get csidriver "+f.PluginName,
		fmt.Sprintf("kubectl get daemonset -A   # no SPIRE Agent, no SPIFFE CSI driver; %s/spiffe-node on every node", ns))
}

func (w *world) oldNames() []string {
	var out []string
	for _, k := range w.old {
		if k == w.agent || k == w.driver {
			out = append(out, "daemonset -n "+k.namespace+" "+k.name)
		}
	}
	return out
}

// affinity is the patch by which a DaemonSet keeps off labelled nodes, on top of
// what it asks for already.
func affinity(k *workload) string {
	want := corev1.NodeSelectorRequirement{Key: Label, Operator: corev1.NodeSelectorOpDoesNotExist}
	terms := []corev1.NodeSelectorTerm{{MatchExpressions: []corev1.NodeSelectorRequirement{want}}}
	if a := k.template.Spec.Affinity; a != nil && a.NodeAffinity != nil && a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution != nil {
		if have := a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms; len(have) > 0 {
			terms = nil
			for _, t := range have { // any term may let a pod onto a node
				if !has(t, want) {
					t.MatchExpressions = append(append([]corev1.NodeSelectorRequirement{}, t.MatchExpressions...), want)
				}
				terms = append(terms, t)
			}
		}
	}
	patch := map[string]any{"spec": map[string]any{"template": map[string]any{"spec": map[string]any{"affinity": map[string]any{"nodeAffinity": map[string]any{
		"requiredDuringSchedulingIgnoredDuringExecution": map[string]any{"nodeSelectorTerms": terms},
	}}}}}}
	data, err := json.Marshal(patch)
	if err != nil {
		return "{}" // maps and texts: cannot be
	}
	return strings.ReplaceAll(string(data), "'", `'\''`)
}

func has(t corev1.NodeSelectorTerm, want corev1.NodeSelectorRequirement) bool {
	for _, e := range t.MatchExpressions {
		if e.Key == want.Key && e.Operator == want.Operator {
			return true
		}
	}
	return false
}

// differs is what will be different although everything goes well.
func (w *world) differs() {
	w.plan.Differs = append(w.plan.Differs,
		"A request for an identity that does not exist yet waits for it, over SDS for ever and over the Workload API for 2 s (workloadAPI.fetchWait), instead of failing at once.",
		"With several matching entries SPIRE's order is kept by identity.defaultOrder: spire; without it the default is the entry with the most selectors, then the oldest.",
		"An entry that the server stops listing is withdrawn after 10 s (withdrawConfirm) or when the server refuses to sign, instead of at the first answer without it.",
		"ValidateJWTSVID needs an identity of the caller, or workloadAPI.allowUnauthenticatedVerifiers.",
		"Every caller has unix selectors beside k8s selectors, and container selectors come when the pod's status shows the container, without holding the caller up.",
		"Health is at /livez and /readyz, metrics are at /metrics of the same port under other names (docs/operations.md).",
		"The agent is in no host network and does not ask the kubelet; it needs get, list, watch on pods instead of nodes/proxy.",
		"SVIDs and keys in use are kept on the host's tmpfs, so that a restarted agent serves without the server.",
	)
	if w.plan.Found.Driver != "" {
		w.plan.Differs = append(w.plan.Differs, "A volume is mounted only when the agent answers; init containers that wait for the socket are not needed.")
	}
}
