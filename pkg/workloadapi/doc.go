// Package workloadapi serves the SPIFFE Workload API: X.509- and JWT-SVIDs,
// trust bundles, and validation of JWT-SVIDs.
//
// # Promise
//
// A caller that is merely late (no matching entry yet, no certificate yet) is
// held for a bounded time before it gets the code the specification asks for.
// A stream is sent something only when its content changed; it ends when the
// caller's last identity is withdrawn, not while one is being renewed.
//
// # Threats
//
// A request made by a browser or a confused proxy on behalf of somebody else
// lacks the security header and is refused before anything is looked at. The
// rest of a request is whatever bytes a workload likes; a panic ends one call
// and not the process, a client that does not read blocks its own stream and
// nobody else. Private keys are in responses to the caller they were issued
// for and nowhere else.
package workloadapi
