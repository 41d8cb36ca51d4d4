package registration_test

import (
	"strings"
	"testing"
)

// refusals are what the CRDs say about wrong resources.
func refusals(t *testing.T, c *cluster) {
	t.Helper()
	spiffe := func(spec string) string {
		return "{apiVersion: spire.spiffe.io/v1alpha1, kind: ClusterSPIFFEID, metadata: {name: r}, spec: {" + spec + "}}"
	}
	const id = "spiffeIDTemplate: 'spiffe://{{ .TrustDomain }}/x'"
	static := func(spec string) string {
		return "{apiVersion: spire.spiffe.io/v1alpha1, kind: ClusterStaticEntry, metadata: {name: r}, spec: {" + spec + "}}"
	}
	const entry = "spiffeID: 'spiffe://example.org/x', parentID: 'spiffe://example.org/spire/server', "
	federated := func(spec string) string {
		return "{apiVersion: spire.spiffe.io/v1alpha1, kind: ClusterFederatedTrustDomain, metadata: {name: r}, spec: {" + spec + "}}"
	}
	const web = "bundleEndpointProfile: {type: https_web}"
	const domain = "trustDomain: other.org, "
	for _, r := range []struct{ resource, text, want string }{
		{"clusterspiffeids", spiffe(id), ""},
		{"clusterspiffeids", spiffe("spiffeIDTemplate: '{{ printf \"spiffe://%s/x\" .TrustDomain }}', ttl: 1h30m, jwtTtl: '0', dnsNameTemplates: ['{{ .PodMeta.Name }}.x', z], workloadSelectorTemplates: ['{{ .PodMeta.Annotations.s }}', 'k8s:ns:x'], federatesWith: [a.org, 'spiffe://b.org'], hint: h, fallback: true, admin: true, downstream: true, autoPopulateDNSNames: true, className: c, podSelector: {matchLabels: {a: b}}, namespaceSelector: {matchExpressions: [{key: a, operator: NotIn, values: [b]}]}"), ""},
		{"clusterspiffeids", spiffe("hint: h"), "spiffeIDTemplate"},
		{"clusterspiffeids", spiffe("spiffeIDTemplate: ''"), "spiffeIDTemplate"},
		{"clusterspiffeids", spiffe("spiffeIDTemplate: 'http://x'"), "should match"},
		{"clusterspiffeids", spiffe("spiffeIDTemplate: 'spiffe://x/{{ .PodMeta.Name }'"), "every {{ of the template needs its }}"},
		{"clusterspiffeids", spiffe(id + ", ttl: 5x"), "spec.ttl"},
		{"clusterspiffeids", spiffe(id + ", ttl: '-5m'"), "spec.ttl"},
		{"clusterspiffeids", spiffe(id + ", workloadSelectorTemplates: [k8s]"), "workloadSelectorTemplates"},
		{"clusterspiffeids", spiffe(id + ", federatesWith: [BAD]"), "federatesWith"},
		{"clusterspiffeids", spiffe(id + ", dnsNameTemplates: ['{{ x']"), "every {{ of the template"},
		{"clusterstaticentries", static(entry + "selectors: ['unix:uid:0']"), ""},
		{"clusterstaticentries", static(entry + "selectors: []"), "selectors"},
		{"clusterstaticentries", static(entry + "selectors: ['unix']"), "selectors"},
		{"clusterstaticentries", static(entry + "storeSVID: true, selectors: ['a:1', 'b:1']"), "same type"},
		{"clusterstaticentries", static(entry + "storeSVID: true, selectors: ['a:1', 'a:2']"), ""},
		{"clusterstaticentries", static("spiffeID: 'spiffe://example.org/spire/x', parentID: 'spiffe://example.org/p', selectors: ['a:1']"), "reserved"},
		{"clusterstaticentries", static("spiffeID: 'spiffe://example.org', parentID: 'spiffe://example.org/p', selectors: ['a:1']"), "spiffeID"},
		{"clusterfederatedtrustdomains", federated(domain + "bundleEndpointURL: 'https://b.org/x', " + web), ""},
		{"clusterfederatedtrustdomains", federated(domain + "bundleEndpointURL: 'https://b.org:8443', bundleEndpointProfile: {type: https_spiffe, endpointSPIFFEID: 'spiffe://other.org/spire/server'}"), ""},
		{"clusterfederatedtrustdomains", federated("trustDomain: 'x/other.org', bundleEndpointURL: 'https://b.org', " + web), "trustDomain"},
		{"clusterfederatedtrustdomains", federated(domain + "bundleEndpointURL: 'http://b.org', " + web), "https URL"},
		{"clusterfederatedtrustdomains", federated(domain + "bundleEndpointURL: 'https://u:p@b.org', " + web), "user name"},
		{"clusterfederatedtrustdomains", federated(domain + "bundleEndpointURL: 'https://b.org', bundleEndpointProfile: {type: https_spiffe}"), "needs endpointSPIFFEID"},
		{"clusterfederatedtrustdomains", federated(domain + "bundleEndpointURL: 'https://b.org', bundleEndpointProfile: {type: https_web, endpointSPIFFEID: 'spiffe://x'}"), "has no endpointSPIFFEID"},
		{"clusterfederatedtrustdomains", federated(domain + "bundleEndpointURL: 'https://b.org', bundleEndpointProfile: {type: other}"), "Unsupported value"},
	} {
		_, err := c.tryCreate(r.resource, r.text)
		switch {
		case err == nil && r.want != "":
			t.Errorf("accepted: %s", r.text)
		case err != nil && r.want == "":
			t.Errorf("refused: %s: %v", r.text, err)
		case err != nil && !strings.Contains(err.Error(), r.want):
			t.Errorf("refused: %s: %v; want %q", r.text, err, r.want)
		}
		if err == nil {
			c.remove(r.resource, "", "r")
		}
	}
}
