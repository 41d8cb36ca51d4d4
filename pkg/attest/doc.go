// Package attest decides who calls: it turns the process at the other end of a
// connection into a set of selectors that registration entries can match.
//
// # Promise
//
// A caller is bound once per connection to the pod and container its cgroup
// names; its selectors are derived from that binding whenever the pod changes.
//
// # Threats
//
// The caller controls its memory, its files, its mount, cgroup and user
// namespaces, the names of cgroups it creates below its own, and the moment at
// which it exits, forks or execs. It does not control the process the kernel
// recorded at connect(2), the absolute cgroup path above its own container,
// or the publish ledger. Only the latter three decide. Facts that disagree
// refuse the caller; facts that are missing leave selectors out.
package attest
