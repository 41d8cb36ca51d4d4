// Package issue holds the keys of the embedded authority and signs with them.
//
// Promise: a certificate leaves this package only in one order: the contents
// are built, the to-be-signed bytes are parsed again with an independent parser
// and compared with the profile, and only then the key signs exactly those
// bytes, once. Draft carries the result of the first two steps and cannot be
// made elsewhere, so the unsafe order cannot be written down.
//
// Threat: the caller of the authority chooses the public key and nothing else.
// Of a CSR only the key is taken, after its signature and its strength were
// checked. The profile is that of SPIRE Server 1.15 for workload X509-SVIDs
// (subject C=US, O=SPIRE, CN = first DNS name; one URI SAN; key usages of a
// TLS peer on both sides; never a CA).
//
// A CA that somebody above has signed is taken only with its whole chain to the
// root, and only if a certificate below it would verify: order, path lengths,
// name constraints, usages. Where names are constrained, each certificate is
// verified up to the root before it leaves.
//
// Nothing here touches the disk or the network. All types are safe for
// concurrent use.
package issue
