// Package sanity runs csi-sanity, the conformance suite of the CSI community,
// against the real driver with real mounts. It is a module of its own, so that
// the suite's dependencies are not the product's.
//
// The suite is made for drivers with a controller and read-write volumes. Two
// helpers, both named in the output, give it what a node-only driver of
// read-only inline volumes cannot: a throw-away controller whose CreateVolume
// answers what the kubelet would send for such a volume, and a proxy before the
// node service that says readonly, as the kubelet does for csi.readOnly, and
// spells the target path as the kubelet does. A second run without the proxy
// shows that the driver refuses what the suite sends by itself.
package sanity
