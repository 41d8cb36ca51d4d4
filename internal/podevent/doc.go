// Package podevent tells the people who own a pod, by events on it, what keeps
// it from its identity: what kubectl describe pod shows needs no right to ask an
// agent.
//
// # Promise
//
// Report never waits. An event is written once for each pod and reason in ten
// minutes, about one a second for the whole node; what does not fit is dropped
// and counted, and an API server that is away or forbids it costs one line in the
// log. Nothing else depends on events.
//
// # Threats
//
// A pod's author decides how often and as what pods come: queue, memory and rate
// are bounded. Events are read by whoever may read events of the namespace: the
// text is to name nothing of other namespaces, and holds no secret. The right to
// create events is one to every namespace; RBAC cannot say "of this node's
// pods".
package podevent
