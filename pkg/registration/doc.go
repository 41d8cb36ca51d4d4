// Package registration writes registration entries for Kubernetes: it watches
// pods, nodes, namespaces, endpoint slices and the resources ClusterSPIFFEID,
// ClusterStaticEntry and ClusterFederatedTrustDomain, and keeps the authority's
// entries as they say. It runs in the authority and nowhere else.
//
// # Promise
//
// A pod's entry exists as soon as the pod is scheduled. A change of a pod
// touches that pod's entries, a change of a resource those of the pods it
// selects; nothing is listed anew. The result depends on the objects, not on
// the order in which they came. An identity that stays is never missing in
// between: entries are updated in place or created before others are deleted,
// and nothing is deleted before everything has been seen once. A resource that
// is wrong is refused with the reason in its status; the others go on, and so
// does its own last valid version.
//
// # Whose entries
//
// Ours are known by their IDs (see EntryPrefix), which are made from the UIDs
// of resource and pod, so that a restart finds them again. All other entries
// are left alone, whoever wrote them.
//
// # Threats
//
// Who may write the cluster-scoped resources decides on identities and is
// trusted with that. Who may only create pods is not: labels, annotations and
// names reach templates as data, what is rendered must be a SPIFFE ID of the
// own trust domain outside /spire, valid selectors and DNS names, or the pod
// gets nothing; and every pod entry demands k8s:pod-uid and the agent of the
// pod's node as parent, so that no pod can have another's identity.
//
// # How it is built
//
// Informers and watches post events; one goroutine owns all state, applies
// the events that have come in (world.go), finds which entries follow (declare.go,
// group.go) and writes the difference in one batch (apply.go). Status is
// written by a goroutine of its own (status.go, patch.go).
package registration
