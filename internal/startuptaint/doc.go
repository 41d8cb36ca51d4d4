// Package startuptaint takes the start-up taint off nodes that can give pods
// their identities. A node pool puts it on new nodes (Karpenter's startupTaints,
// a kubelet's --register-with-taints), and no pod that does not tolerate it is
// scheduled there before its volume could be mounted and its identity issued.
//
// # Promise
//
// The taint goes once the kubelet has the driver registered, the node's agent is
// attested and holds its stream to this authority open, and a pod of the agents
// is Ready on the node, which it is only while it can issue. Whatever its effect,
// only the taint with the configured key is touched; the patch names the version
// of the node it was made for, so that nobody's change is undone. A node that
// does not become ready keeps its taint, and the log says what it lacks. Nothing
// is ever tainted here.
//
// # Threats
//
// Whoever may patch nodes may taint, untaint and label every node: RBAC knows no
// smaller right. It is given only where the chart's startupTaint is enabled, and
// used for one field. What is believed of a node is the kubelet's (CSINode), the
// API server's (which pod of the agents' service account is where, and Ready),
// and this authority's own (who is attested and connected). An agent can speak
// for its own node only.
package startuptaint
