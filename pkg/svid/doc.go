// Package svid keeps one key and X.509-SVID per registration entry that
// somebody on this node may use, renews it at a spread-out point of its life,
// and hands each caller an immutable picture of what it may have.
//
// # Promise
//
// A caller that matches an entry has its SVID as soon as the authority has
// answered; nothing on that way waits for a timer. A change of an entry, a
// bundle or an SVID reaches every caller it concerns once, and no other. While
// an SVID is replaced, for whatever reason, the old one stays until the new
// one is there. When the authority is away, what is valid is served until it
// expires; with restart state also by a restarted agent.
//
// # Threats
//
// Private keys live here. They never cross the authority seam, never appear in
// a log or an admin answer, and touch only the host's tmpfs. An SVID leaves
// the package only through Subscription.Update and Manager.Snapshot, a
// JWT-SVID only through Manager.JWT, and each writes the audit record in the
// same step. Expired and withdrawn SVIDs are erased, not handed out; NotAfter
// is checked against the wall clock at each hand-out, so a clock that jumps
// does not serve the dead. Erasing means that the package lets go of the key:
// Go cannot wipe memory that a sender may still be reading.
//
// # How it is built
//
// One mutex guards the books: records (one per entry in use), views (one per
// caller) and groups (views with the same matches, which share one picture).
// Everything that changes them goes through Manager.do, which then repaints
// the groups concerned and wakes their subscribers outside the lock. Readers
// take the picture from an atomic pointer.
package svid
