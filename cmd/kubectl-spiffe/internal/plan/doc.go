// Package plan says how a cluster moves from SPIRE Agent and the SPIFFE CSI driver
// to spiffe-node, from the cluster's objects and the server's entries.
//
// It promises to change nothing, to name what stands in the way before
// anything else, and to say what it could not see. The values it proposes are
// such that running pods keep their mounts: the same socket directory, driver
// name and kubelet directory. Which identity a pod would get is computed by
// the node's own rules (pkg/entry, internal/podfacts). Threat: objects are
// whatever somebody wrote; nothing of them but names and settings is repeated,
// and no Secret is read.
package plan
