package registration_test

import (
	"testing"

	"github.com/spiffe-node/spiffe-node/pkg/registration"
	"github.com/spiffe-node/spiffe-node/pkg/registration/api/v1alpha1"
)

// FuzzTemplate: whatever the template, it is refused or gives a bounded text.
func FuzzTemplate(f *testing.F) {
	f.Add(istioID)
	f.Add(`{{ .PodMeta.Labels.app | lower | replace "_" "-" | trunc 3 }}`)
	f.Add(`{{ with .NodeMeta }}{{ .Name }}{{ end }}{{ index .PodSpec.Containers 0 }}`)
	f.Fuzz(func(t *testing.T, text string) {
		if len(text) > 200 || containsLoop(text) {
			t.Skip() // loops may take long, as in any template
		}
		if out, err := registration.Render(text, registration.SampleContext()); err == nil && len(out) > 4096 {
			t.Errorf("%d bytes", len(out))
		}
	})
}

func containsLoop(text string) bool {
	for i := range text {
		for _, word := range []string{"range", "template", "block", "printf"} {
			if len(text)-i >= len(word) && text[i:i+len(word)] == word {
				return true
			}
		}
	}
	return false
}

// FuzzResources: whatever the resources hold, they are refused or lead to
// entries that are ours, in the trust domain and bound to the pod.
func FuzzResources(f *testing.F) {
	f.Add(istioID, "1h", "k8s:ns:{{ .PodMeta.Namespace }}", "{{ .PodMeta.Name }}.x", "other.org", "app", "x", "{}")
	f.Add("spiffe://example.org/{{ .PodMeta.Labels.app }}", "-1", ":", "*.*", "", "", "<no value>", `{"keys":null}`)
	f.Fuzz(func(t *testing.T, id, ttl, selector, dns, with, key, value, bundle string) {
		if containsLoop(id + " " + selector + " " + dns) {
			t.Skip()
		}
		a := newFake()
		e := newEngine(t, a)
		e.SetNamespace(namespace("a"))
		e.SetNode(node("n1"))
		e.SetPod(pod("a/p", "n1", key, value))
		e.SetSPIFFEID(spiffeID("one", 0, func(s *v1alpha1.ClusterSPIFFEIDSpec) {
			s.SPIFFEIDTemplate, s.TTL, s.FederatesWith = id, ttl, []string{with}
			s.WorkloadSelectorTemplates, s.DNSNameTemplates = []string{selector}, []string{dns}
		}))
		e.SetFederated(federated("f", 0, func(s *v1alpha1.ClusterFederatedTrustDomainSpec) { s.TrustDomainBundle, s.TrustDomain = bundle, with }))
		start(t, e)
		for entry := range a.Set().All() {
			if !registration.Owns(entry.ID) || entry.Validate(td) != nil || entry.Selectors.Len() < 1 || entry.ParentID.Path() != "/spire/agent/k8s_psat/demo/node-uid-n1" {
				t.Errorf("entry %+v", entry)
			}
		}
		if s := e.SPIFFEIDStatus("cr-one").Stats; s.EntryFailures > 0 || s.EntrySuccess != a.Set().Len() {
			t.Errorf("%+v", s)
		}
	})
}
