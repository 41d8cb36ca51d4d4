// Package repotest holds the tests that keep the repository's layout true: who
// may import whom, how long a file may be, that every package says what it
// promises. It has no code of its own.
package repotest
