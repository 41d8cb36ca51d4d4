// Package rendertest renders the charts with Helm's own code and looks at the
// objects that come out, as the API server's types. It has no code that ships.
package rendertest
