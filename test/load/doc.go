// Command load measures any SDS socket with clients that behave like Envoy:
// this project's agent, SPIRE Agent or another. One run measures one figure;
// `load compare` puts the results of several runs side by side.
//
// It opens unix sockets of this machine only, ends by itself, and reports what
// its own clients cost beside what the server cost, since both share the
// processors. `load -h` is the manual.
package main
