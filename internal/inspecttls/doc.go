// Package inspecttls serves the agent's Inspect service, and nothing else, on
// TLS, so that people without a shell on the node can ask why a pod has its
// identity or none.
//
// It promises that every answer went to a caller whose bearer token the API
// server knows (TokenReview, for this endpoint's audience) and whom the API
// server allows it (SubjectAccessReview), that every call leaves an audit
// record, and that no answer holds a private key: the messages have no place
// for one.
//
// The resources asked for exist in RBAC only:
//
//	get nodes/inspect in spiffe-node.io, by the node's name: everything
//	get pods/inspect  in spiffe-node.io, in a namespace:     Explain of its pods, without the entries of others
//
// A role for administrators, and one for the team of a namespace:
//
//	kind: ClusterRole
//	metadata: {name: spiffe-inspect}
//	rules:
//	- {apiGroups: [spiffe-node.io], resources: [nodes/inspect], verbs: [get]}
//	---
//	kind: Role
//	metadata: {name: spiffe-inspect, namespace: shop}
//	rules:
//	- {apiGroups: [spiffe-node.io], resources: [pods/inspect], verbs: [get]}
//
// The agent itself needs create on tokenreviews and subjectaccessreviews (the
// ClusterRole system:auth-delegator) while the endpoint is on.
//
// Threats: strangers on the pod network (a token first, few connections, no
// work before the token is known), tokens for other audiences (refused, so that
// no pod's token for the API server is of use here and none need be shown),
// floods of made-up tokens (reviews are limited and their results kept), an API
// server that is away (nobody is let in).
package inspecttls
