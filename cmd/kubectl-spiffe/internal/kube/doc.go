// Package kube is what kubectl-spiffe needs of a cluster: reading a few kinds
// of objects, finding the parts of spiffe-node, and a byte stream into one of
// their containers or ports.
//
// It promises to act as the user of the kubeconfig and as nobody else, to send
// that user's credentials to the API server only, and to change nothing but the
// one token request that the caller asks for. It knows a handful of types
// instead of Kubernetes' whole API, which would triple the command's size.
package kube
