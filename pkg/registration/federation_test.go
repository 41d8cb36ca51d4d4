package registration_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"maps"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/spiffe-node/spiffe-node/pkg/registration"
	"github.com/spiffe-node/spiffe-node/pkg/registration/api/v1alpha1"
)

var other = spiffeid.RequireTrustDomainFromString("other.org")

// bundleText is a SPIFFE bundle with one X.509 and one JWT authority.
func bundleText(tb testing.TB, sequence uint64) string {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, SubjectKeyId: []byte{1},
	}, &x509.Certificate{}, key.Public(), key)
	if err != nil {
		tb.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	b := spiffebundle.New(other)
	b.AddX509Authority(cert)
	if err := b.AddJWTAuthority("key", key.Public()); err != nil {
		tb.Fatal(err)
	}
	b.SetSequenceNumber(sequence)
	b.SetRefreshHint(time.Minute)
	text, err := b.Marshal()
	if err != nil {
		tb.Fatal(err)
	}
	return string(text)
}

func federated(name string, age int, edit ...func(*v1alpha1.ClusterFederatedTrustDomainSpec)) *v1alpha1.ClusterFederatedTrustDomain {
	c := &v1alpha1.ClusterFederatedTrustDomain{
		ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID("fed-" + name), Generation: 1, CreationTimestamp: metav1.NewTime(epoch.Add(time.Duration(age) * time.Second))},
		Spec: v1alpha1.ClusterFederatedTrustDomainSpec{
			TrustDomain: "other.org", BundleEndpointURL: "https://other.org:8443",
			BundleEndpointProfile: v1alpha1.BundleEndpointProfile{Type: v1alpha1.HTTPSSPIFFE, EndpointSPIFFEID: "spiffe://other.org/spire/server"},
		},
	}
	for _, f := range edit {
		f(&c.Spec)
	}
	return c
}

// TestFederatedBundle: the bundle in the resource is stored, an edited one
// replaces it, one refreshed elsewhere is not set back.
func TestFederatedBundle(t *testing.T) {
	t.Parallel()
	e, a := world(t)
	e.SetSPIFFEID(spiffeID("one", 0, func(s *v1alpha1.ClusterSPIFFEIDSpec) { s.FederatesWith = []string{"other.org", "spiffe://other.org"} }))
	e.SetPod(pod("a/p", "n1"))
	e.Step()
	// The identity does not wait for the foreign bundle.
	check(t, a, entryP)
	if got := condition(e.SPIFFEIDStatus("cr-one").Conditions, registration.CondFederated); !strings.HasPrefix(got, "False BundleMissing 1 entries") {
		t.Error(got)
	}
	c := federated("f", 0)
	e.SetFederated(c)
	e.Step()
	if got := condition(e.FederatedStatus("fed-f").Conditions, registration.CondBundleSet); !strings.HasPrefix(got, "False Missing") {
		t.Error(got)
	}
	c.Spec.TrustDomainBundle, c.Generation = bundleText(t, 1), 2
	e.SetFederated(c)
	e.Step()
	check(t, a, entryP+" federates=other.org")
	b := a.bundles[other]
	if b == nil || b.Sequence != 1 || b.RefreshHint != time.Minute || len(b.X509) != 1 || len(b.JWT) != 1 || b.JWT[0].ID != "key" {
		t.Fatalf("bundle %+v", b)
	}
	st := e.FederatedStatus("fed-f")
	if got := condition(st.Conditions, registration.CondBundleSet); got != "True Stored " {
		t.Error(got)
	}
	if got := condition(st.Conditions, registration.CondRelationshipSet); !strings.HasPrefix(got, "False NotSupported") {
		t.Error(got)
	}
	if got := condition(e.SPIFFEIDStatus("cr-one").Conditions, registration.CondFederated); got != "True BundlesStored " {
		t.Error(got)
	}
	c.Spec.TrustDomainBundle, c.Generation = bundleText(t, 2), 3
	e.SetFederated(c)
	e.Step()
	if a.writes["bundle"] != 2 || a.bundles[other].Sequence != 2 {
		t.Errorf("%d writes", a.writes["bundle"])
	}
	c.Status = e.FederatedStatus("fed-f")
	e2 := newEngine(t, a)
	e2.SetFederated(c)
	start(t, e2)
	if a.writes["bundle"] != 2 {
		t.Error("the restart set the bundle again")
	}
	// A younger resource for the same domain waits for the older one to go.
	young := federated("young", 1, func(s *v1alpha1.ClusterFederatedTrustDomainSpec) { s.TrustDomainBundle = bundleText(t, 9) })
	e.SetFederated(young)
	e.Step()
	if got := condition(e.FederatedStatus("fed-young").Conditions, registration.CondAccepted); !strings.HasPrefix(got, "False Masked") || a.bundles[other].Sequence != 2 {
		t.Error(got)
	}
	e.DeleteFederated("f")
	e.Step()
	if a.bundles[other].Sequence != 9 {
		t.Error("the younger resource was not heard")
	}
}

func TestFederatedRefusals(t *testing.T) {
	t.Parallel()
	for want, edit := range map[string]func(*v1alpha1.ClusterFederatedTrustDomainSpec){
		"trustDomain: trust domain characters":             func(s *v1alpha1.ClusterFederatedTrustDomainSpec) { s.TrustDomain = "A B" },
		"trustDomain: is this authority's own":             func(s *v1alpha1.ClusterFederatedTrustDomainSpec) { s.TrustDomain = "example.org" },
		"bundleEndpointURL: must be":                       func(s *v1alpha1.ClusterFederatedTrustDomainSpec) { s.BundleEndpointURL = "https://u@other.org" },
		"bundleEndpointProfile: https_spiffe needs":        func(s *v1alpha1.ClusterFederatedTrustDomainSpec) { s.BundleEndpointProfile.EndpointSPIFFEID = "" },
		"bundleEndpointProfile: https_web has no":          func(s *v1alpha1.ClusterFederatedTrustDomainSpec) { s.BundleEndpointProfile.Type = v1alpha1.HTTPSWeb },
		"bundleEndpointProfile: type \"x\" is neither":     func(s *v1alpha1.ClusterFederatedTrustDomainSpec) { s.BundleEndpointProfile.Type = "x" },
		"bundleEndpointProfile: endpointSPIFFEID: scheme":  func(s *v1alpha1.ClusterFederatedTrustDomainSpec) { s.BundleEndpointProfile.EndpointSPIFFEID = "x" },
		"trustDomainBundle: spiffebundle: unable to parse": func(s *v1alpha1.ClusterFederatedTrustDomainSpec) { s.TrustDomainBundle = "{" },
	} {
		e, _ := world(t)
		e.SetFederated(federated("f", 0, edit))
		e.Step()
		if got := condition(e.FederatedStatus("fed-f").Conditions, registration.CondAccepted); !strings.HasPrefix(got, "False Invalid "+want) {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// fakeRelationships are relationships in memory.
type fakeRelationships struct {
	have    map[spiffeid.TrustDomain]registration.Relationship
	fail    error
	refresh *registration.Refresh
}

func (f *fakeRelationships) Refresh(spiffeid.TrustDomain) (registration.Refresh, bool) {
	if f.refresh == nil {
		return registration.Refresh{}, false
	}
	return *f.refresh, true
}

func (f *fakeRelationships) Changed() <-chan struct{} { return nil }

func (f *fakeRelationships) Registered(context.Context) ([]registration.Relationship, error) {
	return slices.Collect(maps.Values(f.have)), nil
}

func (f *fakeRelationships) SetRelationship(_ context.Context, r registration.Relationship) error {
	if f.fail == nil {
		f.have[r.TrustDomain] = r
	}
	return f.fail
}

func (f *fakeRelationships) DeleteRelationship(_ context.Context, td spiffeid.TrustDomain) error {
	delete(f.have, td)
	return f.fail
}

func TestRelationships(t *testing.T) {
	t.Parallel()
	gone := spiffeid.RequireTrustDomainFromString("gone.org")
	f := &fakeRelationships{have: map[spiffeid.TrustDomain]registration.Relationship{gone: {TrustDomain: gone}}}
	e := newEngine(t, newFake(), func(c *registration.Config) { c.Relationships = f })
	c := federated("f", 0)
	e.SetFederated(c)
	start(t, e)
	want := map[spiffeid.TrustDomain]registration.Relationship{other: {
		TrustDomain: other, URL: "https://other.org:8443", EndpointSPIFFEID: spiffeid.RequireFromPath(other, "/spire/server"),
	}}
	if diff := cmp.Diff(want, f.have, cmp.Comparer(func(a, b registration.Relationship) bool { return a == b })); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for want, r := range map[string]*registration.Refresh{
		"False Pending the endpoint has not been asked yet": nil,
		"True Fetched ":     {Fetched: true},
		"True Retrying x":   {Fetched: true, Error: "x"},
		"False FetchFailed": {Error: "x"},
		"False Stale x":     {Error: "x", Stale: true},
	} {
		f.refresh = r
		e.Refederate()
		e.Step()
		if got := condition(e.FederatedStatus("fed-f").Conditions, registration.CondBundleFresh); !strings.HasPrefix(got, want) {
			t.Errorf("%q, want %q", got, want)
		}
	}
	f.fail = errors.New("no")
	c.Spec.BundleEndpointURL, c.Generation = "https://b.org", 2
	e.SetFederated(c)
	e.Step()
	if got := condition(e.FederatedStatus("fed-f").Conditions, registration.CondRelationshipSet); got != "False Refused no" {
		t.Error(got)
	}
	f.fail = nil
	e.DeleteFederated("f")
	e.Step()
	if len(f.have) != 0 {
		t.Errorf("left: %v", f.have)
	}
}
