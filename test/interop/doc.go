// Package interop tries the built commands from outside, with clients this
// project did not write: go-spiffe's Workload API client and TLS, Envoy's own
// protobuf types on the wire, openssl. Every test runs a real agent process on
// real sockets.
package interop
