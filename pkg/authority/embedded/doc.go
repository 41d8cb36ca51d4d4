// Package embedded is an authority in one process: a CA, the registration
// entries, the trust bundles and the attested agents of one trust domain, with
// all state in one file.
//
// Promise: what a call has acknowledged is on the disk and survives kill -9 and
// power failure; what a call has refused changed nothing. Readers never wait
// for the disk: entries and bundles are immutable snapshots, and signing uses
// keys in memory. When the disk is full or read-only, changes fail with a clear
// error while reading and signing go on.
//
// The CA rotates by time on SPIRE Server's thresholds. A new key is in the
// trust bundle long before it signs, and an old root stays there until a day
// after it expired, so no SVID ever outlives its root in the bundle. A CA that
// is expired, or not valid yet because the clock went backwards, never signs;
// it is replaced.
//
// Threats: the state file holds the CA's private keys in the clear. It is
// created with mode 0600 in an owner-only directory and refused if others could
// open it. Only entries in the registry are signed for, and the contents of a
// certificate come from the registry's entry, whatever the request says. A
// damaged, foreign or newer state file is refused and left untouched: starting
// with a fresh CA would cut every workload off.
//
// The state file (format 1) is a bbolt database. Every value is framed with a
// version and a checksum over bucket, key and content (see frame.go):
//
//	meta           format, trust_domain, generation
//	entries        row (8 bytes, big endian) -> entry (entry.MarshalBinary)
//	bundles        row -> bundle; row 0 is the own one
//	agents         row -> agent
//	ca             x509, jwt -> the two slots with their PKCS#8 keys
//	join_tokens    token -> when it expires
//	relationships  row -> where the bundle of a foreign trust domain is served
package embedded
