package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// ClusterSPIFFEID gives pods an identity: a template that is rendered for each
// pod it selects.
type ClusterSPIFFEID struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Spec   ClusterSPIFFEIDSpec   `json:"spec"`
	Status ClusterSPIFFEIDStatus `json:"status,omitzero"`
}

// ClusterSPIFFEIDSpec says which pods get which identity.
type ClusterSPIFFEIDSpec struct {
	// SPIFFEIDTemplate is a Go template of the SPIFFE ID; required.
	SPIFFEIDTemplate string `json:"spiffeIDTemplate"`
	// TTL is the life of X.509-SVIDs, as 1h30m; empty or 0 = the authority's
	// default.
	TTL string `json:"ttl,omitempty"`
	// JWTTTL is the life of JWT-SVIDs, likewise.
	JWTTTL string `json:"jwtTtl,omitempty"`
	// DNSNameTemplates are templates of DNS names; the first becomes the
	// certificate's common name.
	DNSNameTemplates []string `json:"dnsNameTemplates,omitempty"`
	// WorkloadSelectorTemplates are templates of selectors, type:value, that a
	// caller must have besides k8s:pod-uid.
	WorkloadSelectorTemplates []string `json:"workloadSelectorTemplates,omitempty"`
	// FederatesWith are foreign trust domains whose bundles the pods get.
	FederatesWith []string `json:"federatesWith,omitempty"`
	// NamespaceSelector selects namespaces by label; nil = all.
	NamespaceSelector *metav1.LabelSelector `json:"namespaceSelector,omitempty"`
	// PodSelector selects pods by label; nil = all.
	PodSelector *metav1.LabelSelector `json:"podSelector,omitempty"`
	// Admin lets holders of the identity use the server's administrative API.
	Admin bool `json:"admin,omitempty"`
	// Downstream marks the identity of a server of lower level.
	Downstream bool `json:"downstream,omitempty"`
	// AutoPopulateDNSNames adds the names of the services in front of the pod.
	AutoPopulateDNSNames bool `json:"autoPopulateDNSNames,omitempty"`
	// ClassName says which controller acts on the resource; empty = any that
	// minds resources without class.
	ClassName string `json:"className,omitempty"`
	// Fallback applies the resource only to pods that no other one without this
	// mark gives an identity.
	Fallback bool `json:"fallback,omitempty"`
	// Hint tells clients with several identities what this one is for.
	Hint string `json:"hint,omitempty"`
}

// ClusterSPIFFEIDStatus says what became of the resource.
type ClusterSPIFFEIDStatus struct {
	// Stats are counters of the present state.
	Stats ClusterSPIFFEIDStats `json:"stats"`
	// ObservedGeneration is the generation the status speaks of.
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// Conditions are Accepted, EntriesSet, Federated and OtherRegistrar.
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// ClusterSPIFFEIDStats count namespaces, pods and entries.
type ClusterSPIFFEIDStats struct {
	// NamespacesSelected counts the namespaces the selector matches.
	NamespacesSelected int `json:"namespacesSelected"`
	// NamespacesIgnored counts those of them the configuration leaves out.
	NamespacesIgnored int `json:"namespacesIgnored"`
	// PodsSelected counts the unfinished pods selected in the others.
	PodsSelected int `json:"podsSelected"`
	// PodEntryRenderFailures counts the pods for which the templates gave no
	// valid entry.
	PodEntryRenderFailures int `json:"podEntryRenderFailures"`
	// EntriesMasked counts entries that an older resource declares too.
	EntriesMasked int `json:"entriesMasked"`
	// EntriesToSet counts the entries that should exist for the resource.
	EntriesToSet int `json:"entriesToSet"`
	// EntryFailures counts those of them that the authority refuses.
	EntryFailures int `json:"entryFailures"`
	// EntrySuccess counts those of them that exist.
	EntrySuccess int `json:"entrySuccess"`
}

// ClusterSPIFFEIDList is a list of ClusterSPIFFEIDs.
type ClusterSPIFFEIDList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata"`
	Items           []ClusterSPIFFEID `json:"items"`
}
