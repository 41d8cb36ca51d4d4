// Package peersock is a unix-socket listener whose connections know who is at
// the other end.
//
// # Promise
//
// A connection that Accept returns belongs to a process that was alive when it
// was identified, is held by a pidfd, has been bound to its pod (or carries
// the reason why not) and is within the limits. It is closed when that process
// ends, whoever else holds its descriptor. A connection costs two descriptors
// and no goroutine.
//
// # Threats
//
// The caller chooses when it exits, forks, execs and passes its end to others;
// it may connect as often as it can. The kernel's record of connect(2)
// (SO_PEERCRED, SO_PEERPIDFD) is the only thing believed about who it is.
// Where the kernel has no SO_PEERPIDFD (before 6.5), a process whose number is
// given to another between connect and accept can be taken for that other one:
// Mode, the log and a metric say when this is so.
package peersock
