// Package svid keeps one key and X.509-SVID per registration entry that
// somebody on this node may use, renews it at a spread-out point of its life,
// and hands each caller an immutable picture of what it may have.
//
// # Threats
//
// Private keys live here. They never cross the authority seam, never appear in
// a log or an admin answer, and touch only the host's tmpfs. An SVID leaves
// the package only through Subscription.Update, which writes the audit record
// in the same step. Expired and withdrawn SVIDs are erased, not handed out.
package svid
