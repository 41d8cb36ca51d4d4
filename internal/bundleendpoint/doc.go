// Package bundleendpoint serves the trust bundle of the own trust domain to
// others, as the SPIFFE Federation specification has it: one JSON document over
// HTTPS, authenticated by the server's own X509-SVID (https_spiffe) or by a
// certificate of the web's PKI (https_web).
//
// Promise: what is served is the bundle of the moment, with its sequence number
// and a refresh hint. Certificates are renewed without a restart; one that
// cannot be read is no reason to drop the one in use.
//
// Threats: the endpoint is open to the world, so it answers one request only,
// says nothing that is secret, and bounds what a caller may hold: header size,
// time and connections.
package bundleendpoint
