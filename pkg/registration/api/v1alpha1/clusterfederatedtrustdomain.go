package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// ClusterFederatedTrustDomain makes a foreign trust domain known: where its
// bundle is served and, if given, the bundle to begin with.
type ClusterFederatedTrustDomain struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Spec   ClusterFederatedTrustDomainSpec   `json:"spec"`
	Status ClusterFederatedTrustDomainStatus `json:"status,omitzero"`
}

// ClusterFederatedTrustDomainSpec is the federation relationship.
type ClusterFederatedTrustDomainSpec struct {
	// TrustDomain is its name; required.
	TrustDomain string `json:"trustDomain"`
	// BundleEndpointURL is the https URL the bundle is served at; required.
	BundleEndpointURL string `json:"bundleEndpointURL"`
	// BundleEndpointProfile says how the endpoint is authenticated.
	BundleEndpointProfile BundleEndpointProfile `json:"bundleEndpointProfile"`
	// TrustDomainBundle is a SPIFFE bundle (JWKS) to begin with.
	TrustDomainBundle string `json:"trustDomainBundle,omitempty"`
	// ClassName says which controller acts on the resource.
	ClassName string `json:"className,omitempty"`
}

// ProfileType is a bundle endpoint profile.
type ProfileType string

// The profiles.
const (
	HTTPSWeb    ProfileType = "https_web"
	HTTPSSPIFFE ProfileType = "https_spiffe"
)

// BundleEndpointProfile says how a bundle endpoint is authenticated.
type BundleEndpointProfile struct {
	// Type is the profile; required.
	Type ProfileType `json:"type"`
	// EndpointSPIFFEID is the endpoint's identity under https_spiffe.
	EndpointSPIFFEID string `json:"endpointSPIFFEID,omitempty"`
}

// ClusterFederatedTrustDomainStatus says what became of the relationship.
type ClusterFederatedTrustDomainStatus struct {
	// ObservedGeneration is the generation the status speaks of.
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// BundleHash is the SHA-256 of the trustDomainBundle last given to the
	// authority: a bundle that has been refreshed since is not set back.
	BundleHash string `json:"bundleHash,omitempty"`
	// Conditions are Accepted, BundleSet, RelationshipSet and BundleFresh.
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// ClusterFederatedTrustDomainList is a list of ClusterFederatedTrustDomains.
type ClusterFederatedTrustDomainList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata"`
	Items           []ClusterFederatedTrustDomain `json:"items"`
}
