package v1alpha1

import (
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// DeepCopy is a copy that shares nothing.
func (r *ClusterSPIFFEID) DeepCopy() *ClusterSPIFFEID {
	if r == nil {
		return nil
	}
	out := *r
	out.ObjectMeta = *r.ObjectMeta.DeepCopy()
	s := &out.Spec
	s.DNSNameTemplates = slices.Clone(s.DNSNameTemplates)
	s.WorkloadSelectorTemplates = slices.Clone(s.WorkloadSelectorTemplates)
	s.FederatesWith = slices.Clone(s.FederatesWith)
	s.NamespaceSelector = s.NamespaceSelector.DeepCopy()
	s.PodSelector = s.PodSelector.DeepCopy()
	out.Status.Conditions = slices.Clone(out.Status.Conditions)
	return &out
}

// DeepCopyObject implements runtime.Object.
func (r *ClusterSPIFFEID) DeepCopyObject() runtime.Object { return r.DeepCopy() }

// DeepCopyObject implements runtime.Object.
func (l *ClusterSPIFFEIDList) DeepCopyObject() runtime.Object {
	out := *l
	out.ListMeta = copyListMeta(l.ListMeta)
	out.Items = slices.Clone(l.Items)
	for i := range out.Items {
		out.Items[i] = *l.Items[i].DeepCopy()
	}
	return &out
}

// DeepCopy is a copy that shares nothing.
func (r *ClusterStaticEntry) DeepCopy() *ClusterStaticEntry {
	if r == nil {
		return nil
	}
	out := *r
	out.ObjectMeta = *r.ObjectMeta.DeepCopy()
	s := &out.Spec
	s.Selectors = slices.Clone(s.Selectors)
	s.FederatesWith = slices.Clone(s.FederatesWith)
	s.DNSNames = slices.Clone(s.DNSNames)
	out.Status.Conditions = slices.Clone(out.Status.Conditions)
	return &out
}

// DeepCopyObject implements runtime.Object.
func (r *ClusterStaticEntry) DeepCopyObject() runtime.Object { return r.DeepCopy() }

// DeepCopyObject implements runtime.Object.
func (l *ClusterStaticEntryList) DeepCopyObject() runtime.Object {
	out := *l
	out.ListMeta = copyListMeta(l.ListMeta)
	out.Items = slices.Clone(l.Items)
	for i := range out.Items {
		out.Items[i] = *l.Items[i].DeepCopy()
	}
	return &out
}

// DeepCopy is a copy that shares nothing.
func (r *ClusterFederatedTrustDomain) DeepCopy() *ClusterFederatedTrustDomain {
	if r == nil {
		return nil
	}
	out := *r
	out.ObjectMeta = *r.ObjectMeta.DeepCopy()
	out.Status.Conditions = slices.Clone(out.Status.Conditions)
	return &out
}

// DeepCopyObject implements runtime.Object.
func (r *ClusterFederatedTrustDomain) DeepCopyObject() runtime.Object { return r.DeepCopy() }

// DeepCopyObject implements runtime.Object.
func (l *ClusterFederatedTrustDomainList) DeepCopyObject() runtime.Object {
	out := *l
	out.ListMeta = copyListMeta(l.ListMeta)
	out.Items = slices.Clone(l.Items)
	for i := range out.Items {
		out.Items[i] = *l.Items[i].DeepCopy()
	}
	return &out
}

func copyListMeta(m metav1.ListMeta) metav1.ListMeta { return *m.DeepCopy() }
