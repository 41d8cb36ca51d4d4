// Package sds serves X.509 identities and trust bundles as Envoy secrets: the
// secret discovery service v3 in its three forms, state of the world, delta
// and fetch.
//
// # Promise
//
// What a caller may have and asks for is sent the moment it exists, and again
// only when its content changes. A caller that is merely late (no matching
// entry yet, no certificate yet, bundle not known yet) waits on an open
// stream; a name that is no secret of ours neither ends a stream nor holds up
// the others on it. A first request is always answered in full as far as
// anything is known, whatever version the client says it has.
//
// # Threats
//
// A request is whatever bytes a workload likes: every field may be absent, at
// every depth, and every list may be long. Lists are limited, a panic ends one
// call and not the process, a client that does not read blocks its own stream
// and nobody else. Encoded private keys are shared between the streams that
// may have them and live as long as the SVID they were made from, no longer.
package sds
