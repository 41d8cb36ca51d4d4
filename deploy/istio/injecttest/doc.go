// Package injecttest injects deploy/istio's templates with Istio's own code,
// from Istio's own charts, and looks at the pods that come out. It is a module
// of its own because Istio brings hundreds of others. It has no code that ships.
package injecttest
