// Package spireserver is the agent's client for an authority that speaks the
// SPIRE Server API: an unmodified SPIRE Server or cmd/authority.
//
// # Promise
//
// The Client attests the node, keeps the agent's own SVID fresh, and follows
// the entries and bundles this agent is authorized for: by the authority's
// watch where it has one, else by polling, faster while somebody waits
// (Hurry). It signs through the server in batches. A server that is away, an
// agent SVID that has expired and a ban end nobody's identity: what was issued
// stays until it expires, and the client comes back within about a second of
// the server's return. Its own state lives on tmpfs, so an agent that is
// restarted goes on with the SVID it had.
//
// An entry that a server stops listing is withdrawn only after it has been
// missing for Config.WithdrawConfirm in at least two complete answers, or when
// the server also refuses to sign for it.
//
// # Threats
//
// Whoever stands between agent and server: every connection is TLS to a peer
// that proves to be spiffe://TRUST_DOMAIN/spire/server under the trust bundle;
// only InsecureBootstrap gives that up, and only for the first contact. The
// server itself is trusted to decide, not to be well-formed: nothing in its
// messages can end the process, an entry or bundle that makes no sense is left
// out or replaced by the last good one, and an SVID is handed on only if it
// belongs to the key, the SPIFFE ID and a known root. The join token and the
// agent's key appear in no log.
package spireserver
