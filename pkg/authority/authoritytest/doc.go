// Package authoritytest is the contract of authority.Authority as tests. Every
// implementation runs Run against itself; what passes may be put behind the
// node without further thought.
package authoritytest
