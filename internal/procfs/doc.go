// Package procfs reads facts about other processes from /proc.
//
// # Promise
//
// Every reader takes one consistent file with one open, bounds what it reads
// and returns an error rather than a guess. Parsers are separate functions of
// bytes, so that they can be fuzzed. Nothing is ever written or executed.
//
// # Threats
//
// A process number means something only while somebody holds the process: the
// caller of this package must check, after reading, that the process it means
// is still alive (see peersock). The readers use only files whose contents the
// kernel writes and that it can produce without waiting for the process: never
// cmdline, environ or mountinfo.
package procfs
