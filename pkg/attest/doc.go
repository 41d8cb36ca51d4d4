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
//
// What a process executes is read when it is bound, moments after connect(2).
// A process that executes another program in those moments and has passed its
// connection on before is taken for that program: unix:path and unix:sha256
// tell programs of one user or pod apart, they do not keep that user or pod
// from running them. unix:path is moreover a name in the caller's own mount
// namespace. Neither should stand alone in a registration entry.
package attest
