// Package csi is the CSI node plugin: it mounts the agent's socket directory
// into pods, writes down which pod each mount belongs to, and registers itself
// with the kubelet.
//
// # Promise
//
// A publish that succeeded left one mount of the live socket directory on the
// target and a record of the pod in the ledger, the record first. A publish
// that failed left nothing. Both it and unpublish may be repeated, run at the
// same time, and be cut short between any two steps: the next call, or the
// reconciliation at the next start, completes or undoes what is there.
// Unpublish touches only what the ledger or the mount table says is ours.
//
// # Threats
//
// Whoever reaches the CSI socket is root; the requests are checked all the
// same, because a wrong pod in the ledger is a wrong identity at the agent.
// The kubelet fills the pod's facts into the volume context and overrides what
// the pod's author wrote there only while the CSIDriver object has
// podInfoOnMount: true. The UID among them must be the one in the target path,
// and the volume ID the kubelet's own for that pod and volume, so that a
// request made up of two pods is refused. The volume context may hold tokens:
// it is never logged.
package csi
