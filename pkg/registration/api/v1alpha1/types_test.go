package v1alpha1_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/spiffe-node/spiffe-node/pkg/registration/api/v1alpha1"
)

func TestDeepCopy(t *testing.T) {
	t.Parallel()
	conds := func() []metav1.Condition { return []metav1.Condition{{Type: "a"}} }
	meta := func() metav1.ObjectMeta { return metav1.ObjectMeta{Name: "n", Labels: map[string]string{"a": "b"}} }
	spiffe := func() *v1alpha1.ClusterSPIFFEID {
		return &v1alpha1.ClusterSPIFFEID{
			ObjectMeta: meta(),
			Spec: v1alpha1.ClusterSPIFFEIDSpec{
				DNSNameTemplates: []string{"a"}, WorkloadSelectorTemplates: []string{"a"}, FederatesWith: []string{"a"},
				PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"a": "b"}}, NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"a": "b"}},
			},
			Status: v1alpha1.ClusterSPIFFEIDStatus{Conditions: conds()},
		}
	}
	in := &v1alpha1.ClusterSPIFFEIDList{Items: []v1alpha1.ClusterSPIFFEID{*spiffe()}}
	out := in.DeepCopyObject().(*v1alpha1.ClusterSPIFFEIDList)
	o := &out.Items[0]
	o.Labels["a"], o.Spec.DNSNameTemplates[0], o.Spec.WorkloadSelectorTemplates[0], o.Spec.FederatesWith[0] = "x", "x", "x", "x"
	o.Spec.PodSelector.MatchLabels["a"], o.Spec.NamespaceSelector.MatchLabels["a"], o.Status.Conditions[0].Type = "x", "x", "x"
	if diff := cmp.Diff(*spiffe(), in.Items[0]); diff != "" {
		t.Errorf("the original changed:\n%s", diff)
	}
	static := &v1alpha1.ClusterStaticEntryList{Items: []v1alpha1.ClusterStaticEntry{{
		ObjectMeta: meta(), Spec: v1alpha1.ClusterStaticEntrySpec{Selectors: []string{"a"}, FederatesWith: []string{"a"}, DNSNames: []string{"a"}},
		Status: v1alpha1.ClusterStaticEntryStatus{Conditions: conds()},
	}}}
	s := &static.DeepCopyObject().(*v1alpha1.ClusterStaticEntryList).Items[0]
	s.Labels["a"], s.Spec.Selectors[0], s.Spec.FederatesWith[0], s.Spec.DNSNames[0], s.Status.Conditions[0].Type = "x", "x", "x", "x", "x"
	if i := static.Items[0]; i.Labels["a"] != "b" || i.Spec.Selectors[0] != "a" || i.Spec.FederatesWith[0] != "a" || i.Spec.DNSNames[0] != "a" || i.Status.Conditions[0].Type != "a" {
		t.Errorf("the original changed: %+v", i)
	}
	federated := &v1alpha1.ClusterFederatedTrustDomainList{Items: []v1alpha1.ClusterFederatedTrustDomain{{ObjectMeta: meta(), Status: v1alpha1.ClusterFederatedTrustDomainStatus{Conditions: conds()}}}}
	f := &federated.DeepCopyObject().(*v1alpha1.ClusterFederatedTrustDomainList).Items[0]
	f.Labels["a"], f.Status.Conditions[0].Type = "x", "x"
	if i := federated.Items[0]; i.Labels["a"] != "b" || i.Status.Conditions[0].Type != "a" {
		t.Errorf("the original changed: %+v", i)
	}
	if (*v1alpha1.ClusterSPIFFEID)(nil).DeepCopy() != nil || (*v1alpha1.ClusterStaticEntry)(nil).DeepCopy() != nil || (*v1alpha1.ClusterFederatedTrustDomain)(nil).DeepCopy() != nil {
		t.Error("a copy of nothing is something")
	}
}

func TestScheme(t *testing.T) {
	t.Parallel()
	s := runtime.NewScheme()
	if err := v1alpha1.AddToScheme(s); err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"ClusterSPIFFEID", "ClusterStaticEntry", "ClusterFederatedTrustDomain"} {
		for _, suffix := range []string{"", "List"} {
			if !s.Recognizes(v1alpha1.GroupVersion().WithKind(kind + suffix)) {
				t.Errorf("%s%s is not known", kind, suffix)
			}
		}
	}
}
