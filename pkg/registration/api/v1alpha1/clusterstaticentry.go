package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// ClusterStaticEntry is one registration entry, spelled out.
type ClusterStaticEntry struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Spec   ClusterStaticEntrySpec   `json:"spec"`
	Status ClusterStaticEntryStatus `json:"status,omitzero"`
}

// ClusterStaticEntrySpec is the entry.
type ClusterStaticEntrySpec struct {
	// SPIFFEID is the identity; required.
	SPIFFEID string `json:"spiffeID"`
	// ParentID is the node, node alias or server that may issue it; required.
	ParentID string `json:"parentID"`
	// Selectors, type:value, must all be met; at least one.
	Selectors []string `json:"selectors"`
	// FederatesWith are foreign trust domains whose bundles the workload gets.
	FederatesWith []string `json:"federatesWith,omitempty"`
	// X509SVIDTTL is the life of X.509-SVIDs, as 1h30m; empty or 0 = the
	// authority's default.
	X509SVIDTTL string `json:"x509SVIDTTL,omitempty"`
	// JWTSVIDTTL is the life of JWT-SVIDs, likewise.
	JWTSVIDTTL string `json:"jwtSVIDTTL,omitempty"`
	// DNSNames in order; the first becomes the certificate's common name.
	DNSNames []string `json:"dnsNames,omitempty"`
	// Hint tells clients with several identities what this one is for.
	Hint string `json:"hint,omitempty"`
	// Admin lets holders of the identity use the server's administrative API.
	Admin bool `json:"admin,omitempty"`
	// Downstream marks the identity of a server of lower level.
	Downstream bool `json:"downstream,omitempty"`
	// StoreSVID marks an identity that is kept in a store of secrets.
	StoreSVID bool `json:"storeSVID,omitempty"`
	// ClassName says which controller acts on the resource.
	ClassName string `json:"className,omitempty"`
}

// ClusterStaticEntryStatus says what became of the entry.
type ClusterStaticEntryStatus struct {
	// Rendered: the specification is a valid entry.
	Rendered bool `json:"rendered"`
	// Masked: an older resource declares the same entry.
	Masked bool `json:"masked"`
	// Set: the entry exists.
	Set bool `json:"set"`
	// ObservedGeneration is the generation the status speaks of.
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// Conditions are Accepted, EntriesSet and Federated.
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// ClusterStaticEntryList is a list of ClusterStaticEntries.
type ClusterStaticEntryList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata"`
	Items           []ClusterStaticEntry `json:"items"`
}
