// Package podinfo knows the pods on this node: their labels, owners, images and
// containers, from a watch of the API server or from the kubelet, joined with
// the publish ledger.
//
// # Promise
//
// Source answers from memory and never waits for anyone. What it holds is
// bounded by the pods on the node: objects are reduced to what selectors are
// made of before they are stored, and pods that have ended, or were deleted,
// are dropped as soon as no caller is bound to them. With the API server, the
// kubelet or the runtime away everything known stays in use, and the ledger
// alone suffices for namespace, name and service account. Status says what is
// away; readiness does not depend on it. What is not known yet is only missing:
// no entry that does not ask for it waits for it.
//
// # Threats
//
// Whoever may create pods chooses their labels, owner references, annotations
// and images; selectors made of these say no more than that. UIDs, node names
// and statuses are the API server's and the kubelet's. What witnesses say of
// one UID is kept apart (Testimony), so that the attestor sees them disagree.
//
// Counts of images come from the pod's spec, which the kubelet's statuses
// follow; image names come from statuses alone, and only once the runtime has
// made the container, because the image in a spec can be replaced while the old
// one still runs. Containers are told apart by the runtime's ID and by nothing
// else, so that a status of a previous run is never taken for this one's. Of a
// pod's labels and images at most 64 KiB are kept: a pod's author must not
// decide how much memory the agent uses.
//
// # Static pods
//
// The kubelet runs a static pod under a UID of its own, the hash of its
// configuration, and that is what its cgroup says. The API server knows only a
// mirror pod with another UID and the hash in an annotation. k8s:pod-uid is the
// hash: it is what the kernel says, and what SPIRE's attestor, which asks the
// kubelet, gives. A mirror pod is believed if
//   - it carries the hash in both annotations, is bound to this node, has no
//     service account, and is owned by the Node of this name and nobody else,
//   - the kubelet has reported one of its containers as made. This is what
//     nobody can forge who may create pods: a status is dropped at creation, and
//     the kubelet reports on a mirror pod only if it runs a static pod of that
//     namespace and name;
//   - no other mirror pod on the node claims the same hash, and no ordinary pod
//     has it as its UID.
package podinfo
