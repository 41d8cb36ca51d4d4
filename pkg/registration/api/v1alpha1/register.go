package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// The resources' names in URLs.
const (
	ResourceClusterSPIFFEIDs             = "clusterspiffeids"
	ResourceClusterStaticEntries         = "clusterstaticentries"
	ResourceClusterFederatedTrustDomains = "clusterfederatedtrustdomains"
)

// GroupVersion is spire.spiffe.io/v1alpha1.
func GroupVersion() schema.GroupVersion {
	return schema.GroupVersion{Group: "spire.spiffe.io", Version: "v1alpha1"}
}

// AddToScheme adds the types to a scheme.
func AddToScheme(s *runtime.Scheme) error {
	s.AddKnownTypes(GroupVersion(),
		&ClusterSPIFFEID{}, &ClusterSPIFFEIDList{},
		&ClusterStaticEntry{}, &ClusterStaticEntryList{},
		&ClusterFederatedTrustDomain{}, &ClusterFederatedTrustDomainList{})
	metav1.AddToGroupVersion(s, GroupVersion())
	return nil
}
