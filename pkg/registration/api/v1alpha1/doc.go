// Package v1alpha1 holds the Go types of spire.spiffe.io/v1alpha1:
// ClusterSPIFFEID, ClusterStaticEntry and ClusterFederatedTrustDomain, as users
// of the SPIRE controller manager know them.
//
// # Promise
//
// Every specification that the API server lets through can be read, one by one:
// a value that is wrong makes its own resource wrong and no other. Durations
// are therefore texts here and are parsed where they are used. Status has, next
// to the counters of old, the conditions that say what is wrong.
package v1alpha1
