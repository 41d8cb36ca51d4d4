package registration_test

import (
	"os"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"

	"github.com/spiffe-node/spiffe-node/pkg/registration"
	"github.com/spiffe-node/spiffe-node/pkg/registration/api/v1alpha1"
)

// TestTemplates: what text/template gives, and what is refused of it.
func TestTemplates(t *testing.T) {
	t.Parallel()
	c := registration.SampleContext()
	c.PodMeta.Labels = map[string]string{"app": "Web_1", "app.kubernetes.io/name": "web"}
	for _, r := range []struct{ text, want, err string }{
		{"spiffe://{{ .TrustDomain }}/ns/{{ .PodMeta.Namespace }}/sa/{{ .PodSpec.ServiceAccountName }}", "spiffe://example.org/ns/example/sa/default", ""},
		{"{{ .ClusterName }}.{{ .ClusterDomain }}/{{ .NodeMeta.Name }}/{{ .NodeSpec.ProviderID }}", "example.cluster.local/node/example:///node", ""},
		{`{{ index .PodMeta.Labels "app.kubernetes.io/name" }}`, "web", ""},
		{`x{{ index .PodMeta.Labels "none" }}`, "x", ""},
		{"{{ .PodMeta.Labels.none }}", "", "a label, annotation or other key it uses is missing"},
		{"{{ if .PodMeta.Labels.none }}x{{ else }}y{{ end }}", "y", ""},
		{`{{ .PodMeta.Labels.none | default "d" }}`, "d", ""},
		{`{{ default "d" .PodMeta.Labels.app }}`, "Web_1", ""},
		{`{{ .PodMeta.Labels.app | lower | replace "_" "-" }}`, "web-1", ""},
		{`{{ regexReplaceAll "[^a-z]" .PodMeta.Labels.app "-" }}`, "-eb--", ""},
		{`{{ sha256sum "a" | trunc 8 }}`, "ca978112", ""},
		{`{{ trunc 99 "a" }}{{ upper "b" }}{{ trim " c " }}{{ trimPrefix "x" "xd" }}{{ trimSuffix "x" "ex" }}`, "aBcde", ""},
		{`{{ join "." (splitList "/" "a/b") }}{{ hasPrefix "a" "ab" }}{{ hasSuffix "a" "ab" }}{{ contains "b" "abc" }}`, "a.btruefalsetrue", ""},
		{`{{ trunc -1 "a" }}`, "", "length is negative"},
		{`{{ regexReplaceAll "(" "a" "" }}`, "", "missing closing"},
		{"{{ range .PodSpec.Containers }}{{ .Name }}{{ end }}", "main", ""},
		{"", "", "is empty"},
		{"{{ .PodMeta.Nope }}", "", "can't evaluate field Nope"},
		{"{{ .PodStatus }}", "", "can't evaluate field PodStatus"},
		{"{{ env \"HOME\" }}", "", `function "env" not defined`},
		{"{{ now }}", "", `function "now" not defined`},
		{"{{ .TrustDomain", "", "unclosed action"},
		{`{{ range $i := 100000 }}x{{ end }}`, "", "more than 4096 bytes"},
		{`{{ index .PodSpec.Containers 5 }}`, "", "out of range"},
	} {
		got, err := registration.Render(r.text, c)
		if (err == nil) != (r.err == "") || err != nil && !strings.Contains(err.Error(), r.err) || got != r.want {
			t.Errorf("%s: got %q, %v; want %q, %q", r.text, got, err, r.want, r.err)
		}
	}
}

func read[T any](t *testing.T, name string) *T {
	t.Helper()
	text, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	out := new(T)
	if err := yaml.UnmarshalStrict(text, out); err != nil {
		t.Fatal(err)
	}
	return out
}

// TestSeed: the resources of Istio's guide, without class, and the chart's
// fallback.
func TestSeed(t *testing.T) {
	t.Parallel()
	a := newFake()
	e := newEngine(t, a)
	for i, name := range []string{"istio-gateway-reg.yaml", "istio-sidecar-reg.yaml"} {
		c := read[v1alpha1.ClusterSPIFFEID](t, name)
		c.UID, c.Generation = types.UID(name), int64(i+1)
		e.SetSPIFFEID(c)
	}
	e.SetSPIFFEID(spiffeID("default", 9, func(s *v1alpha1.ClusterSPIFFEIDSpec) {
		s.Fallback, s.Hint = true, "default"
		s.NamespaceSelector = &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{
			{Key: "kubernetes.io/metadata.name", Operator: metav1.LabelSelectorOpNotIn, Values: []string{"spire-server"}},
		}}
	}))
	for _, n := range []string{"default", "istio-system", "spire-server"} {
		e.SetNamespace(namespace(n))
		e.SetPod(pod(n+"/plain", "n1"))
	}
	e.SetNode(node("n1"))
	gateway := pod("istio-system/gw", "n1", "istio", "ingressgateway", "spiffe.io/spire-managed-identity", "false")
	gateway.Spec.ServiceAccountName = "istio-ingressgateway-service-account"
	e.SetPod(gateway)
	workload := pod("default/curl", "n1", "app", "curl", "spiffe.io/spire-managed-identity", "true")
	workload.Spec.ServiceAccountName = "curl"
	e.SetPod(workload)
	start(t, e)
	const parent = " <- demo/node-uid-n1 "
	check(t, a,
		"/ns/default/sa/curl"+parent+"k8s:ns:default,k8s:pod-uid:uid-default-curl,k8s:sa:curl",
		"/ns/default/sa/sa-plain"+parent+"k8s:pod-uid:uid-default-plain fallback hint=default",
		"/ns/istio-system/sa/istio-ingressgateway-service-account"+parent+"k8s:ns:istio-system,k8s:pod-uid:uid-istio-system-gw,k8s:sa:istio-ingressgateway-service-account",
		"/ns/istio-system/sa/sa-plain"+parent+"k8s:pod-uid:uid-istio-system-plain fallback hint=default",
	)
}

// TestRefusals: what the templates give is checked, and the others go on.
func TestRefusals(t *testing.T) {
	t.Parallel()
	for want, edit := range map[string]func(*v1alpha1.ClusterSPIFFEIDSpec){
		"reserved namespace":                            func(s *v1alpha1.ClusterSPIFFEIDSpec) { s.SPIFFEIDTemplate = "spiffe://example.org/spire/x" },
		"is not a member of trust domain":               func(s *v1alpha1.ClusterSPIFFEIDSpec) { s.SPIFFEIDTemplate = "spiffe://other.org/x" },
		`spiffeIDTemplate: rendered "spiffe://x//"`:     func(s *v1alpha1.ClusterSPIFFEIDSpec) { s.SPIFFEIDTemplate = "spiffe://x//" },
		`workloadSelectorTemplates[0]: selector "nope"`: func(s *v1alpha1.ClusterSPIFFEIDSpec) { s.WorkloadSelectorTemplates = []string{"nope"} },
		`dnsNameTemplates[1]: rendered "-x"`:            func(s *v1alpha1.ClusterSPIFFEIDSpec) { s.DNSNameTemplates = []string{"ok", "-x"} },
	} {
		e, a := world(t)
		e.SetSPIFFEID(spiffeID("bad", 0, edit))
		e.SetSPIFFEID(spiffeID("good", 1))
		e.SetPod(pod("a/p", "n1"))
		e.Step()
		check(t, a, entryP)
		got := e.SPIFFEIDStatus("cr-bad")
		if c := condition(got.Conditions, registration.CondEntriesSet); !strings.Contains(c, want) || got.Stats.PodEntryRenderFailures != 1 {
			t.Errorf("got %q, want %q", c, want)
		}
	}
	for want, edit := range map[string]func(*v1alpha1.ClusterSPIFFEIDSpec){
		"federatesWith[0]": func(s *v1alpha1.ClusterSPIFFEIDSpec) { s.FederatesWith = []string{"A"} },
		"podSelector:": func(s *v1alpha1.ClusterSPIFFEIDSpec) {
			s.PodSelector = &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "a", Operator: "Is"}}}
		},
		"hint: is longer":     func(s *v1alpha1.ClusterSPIFFEIDSpec) { s.Hint = strings.Repeat("a", 1025) },
		"jwtTtl: time:":       func(s *v1alpha1.ClusterSPIFFEIDSpec) { s.JWTTTL = "5" },
		"ttl: 900000h is too": func(s *v1alpha1.ClusterSPIFFEIDSpec) { s.TTL = "900000h" },
		"spiffeIDTemplate: is empty; dnsNameTemplates[0]: is empty": func(s *v1alpha1.ClusterSPIFFEIDSpec) { s.SPIFFEIDTemplate, s.DNSNameTemplates = "", []string{""} },
	} {
		e, _ := world(t)
		e.SetSPIFFEID(spiffeID("bad", 0, edit))
		e.Step()
		if got := condition(e.SPIFFEIDStatus("cr-bad").Conditions, registration.CondAccepted); !strings.HasPrefix(got, "False Invalid "+want) {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func static(name string, age int, edit ...func(*v1alpha1.ClusterStaticEntrySpec)) *v1alpha1.ClusterStaticEntry {
	c := &v1alpha1.ClusterStaticEntry{
		ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID("st-" + name), Generation: 1, CreationTimestamp: spiffeID("", age).CreationTimestamp},
		Spec: v1alpha1.ClusterStaticEntrySpec{
			SPIFFEID: "spiffe://example.org/vm", ParentID: "spiffe://example.org/spire/agent/x", Selectors: []string{"unix:uid:0", "unix:path:/a:b"},
		},
	}
	for _, f := range edit {
		f(&c.Spec)
	}
	return c
}

func TestStaticEntries(t *testing.T) {
	t.Parallel()
	e, a := world(t)
	c := static("one", 0, func(s *v1alpha1.ClusterStaticEntrySpec) {
		s.X509SVIDTTL, s.JWTSVIDTTL, s.DNSNames, s.Hint = "1h", "2m", []string{"b", "a"}, "h"
		s.Admin, s.Downstream, s.StoreSVID = true, true, true
	})
	e.SetStatic(c)
	e.SetStatic(static("two", 1))
	e.Step()
	check(t, a, "/vm <- /spire/agent/x unix:path:/a:b,unix:uid:0 dns=b,a ttl=1h0m0s/2m0s admin downstream store hint=h")
	if s := e.StaticStatus("st-one"); !s.Rendered || s.Masked || !s.Set {
		t.Errorf("%+v", s)
	}
	if s := e.StaticStatus("st-two"); !s.Rendered || !s.Masked || s.Set {
		t.Errorf("%+v", s)
	}
	c.Spec.DNSNames, c.Generation = []string{"a", "a"}, 2
	e.SetStatic(c)
	e.Step()
	if s := e.StaticStatus("st-one"); s.Rendered || !s.Set || !strings.Contains(condition(s.Conditions, registration.CondAccepted), "generation 1 stays in force: dnsNames: a name is given twice") {
		t.Errorf("%+v", s)
	}
	e.DeleteStatic("one")
	e.Step()
	check(t, a, "/vm <- /spire/agent/x unix:path:/a:b,unix:uid:0")
	for want, edit := range map[string]func(*v1alpha1.ClusterStaticEntrySpec){
		"spiffeID: scheme":          func(s *v1alpha1.ClusterStaticEntrySpec) { s.SPIFFEID = "x" },
		"parentID: scheme":          func(s *v1alpha1.ClusterStaticEntrySpec) { s.ParentID = "x" },
		"selectors[0]: selector":    func(s *v1alpha1.ClusterStaticEntrySpec) { s.Selectors = []string{"x"} },
		"selector list is empty":    func(s *v1alpha1.ClusterStaticEntrySpec) { s.Selectors = nil },
		"x509SVIDTTL: time":         func(s *v1alpha1.ClusterStaticEntrySpec) { s.X509SVIDTTL = "x" },
		"datastore-validation: inv": func(s *v1alpha1.ClusterStaticEntrySpec) { s.StoreSVID, s.Selectors = true, []string{"a:1", "b:1"} },
	} {
		e.SetStatic(static("bad", 3, edit))
		e.Step()
		if s := e.StaticStatus("st-bad"); s.Rendered || s.Set || !strings.Contains(condition(s.Conditions, registration.CondAccepted), want) {
			t.Errorf("%+v, want %q", s, want)
		}
		e.DeleteStatic("bad")
	}
	e.DeleteStatic("two")
	e.Step()
	check(t, a)
}
