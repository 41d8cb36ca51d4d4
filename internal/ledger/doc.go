// Package ledger is the publish ledger: which pod each mounted volume belongs
// to, written by the CSI driver before it mounts and read by the agent as a
// witness of who calls.
//
// # Promise
//
// One file per volume, replaced atomically: a reader sees a whole record or
// none. What Put returned nil for is there after a crash of either process; on
// the tmpfs it is meant for it lasts as long as the mounts it describes, until
// the node restarts. A file that cannot be read is reported and never changed,
// and does not keep the others from being read.
//
// # Threats
//
// The directory is the owner's alone: whoever can write to it can name the pod
// a caller is taken for, so a directory others may look into is refused. The
// facts in a record come from the kubelet, which overrides what a pod's author
// puts under the same keys as long as the CSIDriver object says
// podInfoOnMount. Files are parsed strictly all the same: a record is accepted
// only in exactly the form Encode writes.
//
// # Format
//
// A volume's record is <volume ID>.json (see [FileName]), mode 0600:
//
//	{"version":1,"volumeID":"csi-…","volumeName":"spiffe","podNamespace":"default","podName":"web-0",
//	 "podUID":"…","serviceAccount":"web","targetPath":"/var/lib/kubelet/pods/…/mount",
//	 "source":"/run/spire/agent-sockets","sourceDev":26,"sourceIno":1042,
//	 "published":"2026-01-02T03:04:05.000000006Z"}
package ledger
