// Package cluster brings up a real Kubernetes of one node for tests:
// kube-apiserver, etcd, controller manager, scheduler, kube-proxy, kubelet,
// containerd, runc and CNI, with nothing pulled from a registry.
//
// # Promise
//
// Everything runs in mount, PID, network, UTS and IPC namespaces of its own,
// under one process that is the PID namespace's init. When that process ends,
// for whatever reason, the kernel ends every other process (containers
// included) and drops every mount and interface; what remains are the scratch
// directory and empty cgroups, which Down and the next Up remove. A cluster
// that is not detached ends with the process that started it, even when that
// process is killed. The host's /run, /var/lib, /var/log/pods and
// sysctls are not written to: the node sees its own, /var/lib as a
// copy-on-write view. A hostPath volume elsewhere is the host's.
//
// # Shape
//
// Up starts init (this very executable again: call [Main] first thing in main
// or TestMain), which starts the supervisor, which prepares the namespaces,
// starts the components and answers on a control socket. The API server listens inside
// on 10.96.0.1:443, so in-cluster clients work as they do anywhere; a
// forwarder lends it a port on the loopback of the host. [Cluster] drives all
// of it: manifests, pods, logs, commands on the node, component restarts, the
// node's mount table, and a dump of everything when a test fails.
//
// # Limits
//
// It needs root, overlayfs, the Debian packages that [Packages] lists, and the binaries
// that [Build] makes. One cluster at a time runs on a machine, since cgroups
// are shared: a lock says so.
package cluster
