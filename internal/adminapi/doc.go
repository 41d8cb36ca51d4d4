// Package adminapi serves the SPIRE Server API over the authority inside the
// agent, and the node's own Inspect service, on a unix socket.
//
// Promise: what the real spire-server command, the SPIRE controller manager or
// any other client of that API can do over the server's own socket works here
// with the same codes, texts and result shapes. Status is set in every result
// of a batch. What a socket caller may not do (the agents' own calls) is
// denied in the server's words; what this authority does not offer answers
// UNIMPLEMENTED. Nothing pretends.
//
// Threats: whoever can open the socket can give any workload any identity, so
// the file system is the guard: the directory belongs to the agent's user and
// is closed to others, the socket is closed to all but the owner (and one
// group, if configured), and a directory that is open is refused instead of
// repaired. Requests are still treated as hostile: every field may be missing,
// no request can end the process, and answers never hold a private key. Each
// change is logged with who made it.
package adminapi
