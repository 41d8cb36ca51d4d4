// Package federation keeps the bundles of foreign trust domains fresh: it
// fetches them from their bundle endpoints, as the SPIFFE Federation
// specification has it.
//
// Promise: each relationship has a task of its own, so an endpoint that is
// wrong, slow or silent holds up nothing but its own bundle. A new or changed
// relationship is fetched at once, later ones well within the refresh hint, and
// after a failure with growing pauses. A bundle is stored only when it differs
// from the stored one. How each one is doing can be asked at any time.
//
// Threats: an endpoint that is not whom it should be decides whom workloads
// trust, so it is authenticated first: by the web's PKI, or by its SPIFFE ID
// and the bundle that is stored for it. What it sends counts for its own trust
// domain only. Answers are bounded in size and time, an older sequence number
// does not replace a newer one, and no endpoint can send this process to
// another host or to addresses that only the host itself should reach.
package federation
