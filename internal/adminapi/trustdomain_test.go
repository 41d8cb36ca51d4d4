package adminapi_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/spiffe-node/spiffe-node/internal/adminapi"
	"github.com/spiffe-node/spiffe-node/internal/adminapi/federationpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/bundlepb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/trustdomainpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

func web(td, url string) *typespb.FederationRelationship {
	return &typespb.FederationRelationship{TrustDomain: td, BundleEndpointUrl: url, BundleEndpointProfile: &typespb.FederationRelationship_HttpsWeb{HttpsWeb: &typespb.HTTPSWebProfile{}}}
}

func spiffe(td, url, id string) *typespb.FederationRelationship {
	return &typespb.FederationRelationship{TrustDomain: td, BundleEndpointUrl: url, BundleEndpointProfile: &typespb.FederationRelationship_HttpsSpiffe{HttpsSpiffe: &typespb.HTTPSSPIFFEProfile{EndpointSpiffeId: id}}}
}

func withBundle(r *typespb.FederationRelationship, b *typespb.Bundle) *typespb.FederationRelationship {
	r.TrustDomainBundle = b
	return r
}

// unreachable answers nothing: the tests are about what is stored.
const unreachable = "https://127.0.0.1:1/bundle"

func TestFederationRelationships(t *testing.T) {
	conn := wire(t)
	c := trustdomainpb.NewTrustDomainClient(conn)
	root, _ := ownKeys(t, bundlepb.NewBundleClient(conn))
	t.Cleanup(func() {
		if onRealServer() {
			_, _ = c.BatchDeleteFederationRelationship(ctx(), &trustdomainpb.BatchDeleteFederationRelationshipRequest{TrustDomains: []string{"r1", "r2", "r3"}})
			_, _ = bundlepb.NewBundleClient(conn).BatchDeleteFederatedBundle(ctx(), &bundlepb.BatchDeleteFederatedBundleRequest{TrustDomains: []string{"r3"}})
		}
	})
	const prefix = "failed to convert federation relationship: "
	bundle := &typespb.Bundle{TrustDomain: "r3", X509Authorities: []*typespb.X509Certificate{{Asn1: root.GetAsn1()}}, SequenceNumber: 4, RefreshHint: 60}
	cases := []struct {
		in   *typespb.FederationRelationship
		want want
	}{
		{nil, want{3, prefix + "failed to parse trust domain: trust domain is missing"}}, // on the wire nil is empty
		{web("X", unreachable), want{3, prefix + "failed to parse trust domain: " + badTD}},
		{web("r1", ""), want{3, prefix + "bundle endpoint URL must use the https scheme"}},
		{web("r1", "http://x"), want{3, prefix + "bundle endpoint URL must use the https scheme"}},
		{web("r1", "https:/x"), want{3, prefix + "bundle endpoint URL must specify the host"}},
		{web("r1", "https://u@x"), want{3, prefix + "bundle endpoint URL must not contain user info"}},
		{web("r1", "https://%"), want{3, prefix + `failed to parse bundle endpoint URL: parse "https://%": invalid URL escape "%"`}},
		{&typespb.FederationRelationship{TrustDomain: "r1", BundleEndpointUrl: unreachable}, want{3, prefix + "unsupported bundle endpoint profile type: <nil>"}},
		{spiffe("r1", unreachable, ""), want{3, prefix + "failed to parse endpoint SPIFFE ID: cannot be empty"}},
		{withBundle(web("r1", unreachable), bundle), want{3, prefix + `trust domain bundle ("r3") must match the trust domain of the federation relationship ("r1")`}},
		{withBundle(web("r1", unreachable), &typespb.Bundle{}), want{3, prefix + "failed to parse bundle: invalid trust domain: trust domain is missing"}},
		{withBundle(web("r1", unreachable), &typespb.Bundle{TrustDomain: "r1", X509Authorities: []*typespb.X509Certificate{{Asn1: []byte("x")}}}), want{3, prefix + "failed to parse bundle: unable to parse X.509 authority: x509: malformed certificate"}},
		{withBundle(web("r1", unreachable), &typespb.Bundle{TrustDomain: "r1", JwtAuthorities: []*typespb.JWTKey{{KeyId: "a", PublicKey: []byte("x")}}}), want{3, prefix + "failed to parse bundle: unable to parse JWT authority: asn1: syntax error: truncated tag or length"}},
		{web("td", unreachable), want{3, "unable to create federation relationship for server trust domain"}},
		{web("r1", unreachable), ok},
		{spiffe("spiffe://r2/x", unreachable, "spiffe://elsewhere/y"), ok},
		{withBundle(spiffe("r3", unreachable, "spiffe://r3/spire/server"), bundle), ok},
		{web("r1", unreachable), want{13, "failed to create federation relationship: datastore-sql: UNIQUE constraint failed: federated_trust_domains.trust_domain"}},
	}
	req := &trustdomainpb.BatchCreateFederationRelationshipRequest{}
	for _, tc := range cases {
		req.FederationRelationships = append(req.FederationRelationships, tc.in)
	}
	created, err := c.BatchCreateFederationRelationship(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	for i, tc := range cases {
		t.Run(fmt.Sprintf("create %d", i), func(t *testing.T) { tc.want.checkStatus(t, created.GetResults()[i].GetStatus()) })
	}
	stored := []*typespb.FederationRelationship{web("r1", unreachable), spiffe("r2", unreachable, "spiffe://elsewhere/y"), cases[16].in}
	if diff := cmp.Diff(stored, []*typespb.FederationRelationship{
		created.GetResults()[14].GetFederationRelationship(), created.GetResults()[15].GetFederationRelationship(), created.GetResults()[16].GetFederationRelationship(),
	}, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	listed, err := c.ListFederationRelationships(t.Context(), &trustdomainpb.ListFederationRelationshipsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(stored, listed.GetFederationRelationships(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	got, err := c.GetFederationRelationship(t.Context(), &trustdomainpb.GetFederationRelationshipRequest{TrustDomain: "spiffe://r3", OutputMask: &typespb.FederationRelationshipMask{BundleEndpointUrl: true}})
	if diff := cmp.Diff(&typespb.FederationRelationship{TrustDomain: "r3", BundleEndpointUrl: unreachable}, got, protocmp.Transform()); err != nil || diff != "" {
		t.Error(err, diff)
	}
	for name, w := range map[string]want{"none": {5, "federation relationship does not exist"}, "X": {3, "failed to parse trust domain: " + badTD}} {
		_, err := c.GetFederationRelationship(t.Context(), &trustdomainpb.GetFederationRelationshipRequest{TrustDomain: name})
		w.checkError(t, err)
	}

	// A mask takes only the URL, but the whole message must be valid.
	const other = "https://127.0.0.1:1/other"
	updated, err := c.BatchUpdateFederationRelationship(t.Context(), &trustdomainpb.BatchUpdateFederationRelationshipRequest{
		FederationRelationships: []*typespb.FederationRelationship{
			web("r2", other), web("none", other), {TrustDomain: "r1", BundleEndpointUrl: other}, web("td", other), nil,
		},
		InputMask: &typespb.FederationRelationshipMask{BundleEndpointUrl: true},
	})
	if err != nil {
		t.Fatal(err)
	}
	for i, w := range []want{
		ok,
		{13, "failed to update federation relationship: unable to fetch federation relationship: record not found"},
		{3, prefix + "unsupported bundle endpoint profile type: <nil>"},
		{13, "failed to update federation relationship: unable to fetch federation relationship: record not found"},
		{3, prefix + "failed to parse trust domain: trust domain is missing"},
	} {
		w.checkStatus(t, updated.GetResults()[i].GetStatus())
	}
	if diff := cmp.Diff(spiffe("r2", other, "spiffe://elsewhere/y"), updated.GetResults()[0].GetFederationRelationship(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}

	deleted, err := c.BatchDeleteFederationRelationship(t.Context(), &trustdomainpb.BatchDeleteFederationRelationshipRequest{TrustDomains: []string{"spiffe://r3/x", "r3", "", "X"}})
	if err != nil {
		t.Fatal(err)
	}
	for i, w := range []want{ok, {5, "federation relationship not found"}, {3, "missing trust domain"}, {3, "failed to parse trust domain: " + badTD}} {
		w.checkStatus(t, deleted.GetResults()[i].GetStatus())
	}
	if name := deleted.GetResults()[0].GetTrustDomain(); name != "r3" {
		t.Errorf("deleted %q", name)
	}
	if _, err := bundlepb.NewBundleClient(conn).GetFederatedBundle(t.Context(), &bundlepb.GetFederatedBundleRequest{TrustDomain: "r3"}); err != nil {
		t.Errorf("the bundle went with the relationship: %v", err)
	}
	if onRealServer() {
		return // it does not refresh what it could not fetch before for a while
	}
	_, err = c.RefreshBundle(t.Context(), &trustdomainpb.RefreshBundleRequest{TrustDomain: "r1"})
	want{12, "this authority does not fetch bundles from endpoints"}.checkError(t, err)
}

const badTD = "trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores"

func TestFederationRelationshipPages(t *testing.T) {
	c := trustdomainpb.NewTrustDomainClient(ours(t))
	req := &trustdomainpb.BatchCreateFederationRelationshipRequest{}
	for i := range 5 {
		req.FederationRelationships = append(req.FederationRelationships, web(fmt.Sprintf("d%d", i), unreachable))
	}
	if _, err := c.BatchCreateFederationRelationship(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	var sizes []int
	token := ""
	for {
		resp, err := c.ListFederationRelationships(t.Context(), &trustdomainpb.ListFederationRelationshipsRequest{PageSize: 2, PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		sizes = append(sizes, len(resp.GetFederationRelationships()))
		if token = resp.GetNextPageToken(); token == "" {
			break
		}
	}
	if diff := cmp.Diff([]int{2, 2, 1, 0}, sizes); diff != "" {
		t.Error(diff)
	}
	_, err := c.ListFederationRelationships(t.Context(), &trustdomainpb.ListFederationRelationshipsRequest{PageSize: 1, PageToken: "x"})
	want{13, "failed to list federation relationships: could not parse token 'x'"}.checkError(t, err)
}

// fakeFederation knows one relationship.
type fakeFederation struct{}

func (fakeFederation) Refresh(_ context.Context, td spiffeid.TrustDomain) error {
	switch td.Name() {
	case "good":
		return nil
	case "bad":
		return errors.New("nobody is there")
	}
	return embedded.ErrNotFound
}

func (fakeFederation) Status() []adminapi.RelationshipStatus {
	return []adminapi.RelationshipStatus{{TrustDomain: spiffeid.RequireTrustDomainFromString("good"), LastSuccess: time.Unix(9, 0), Failures: 2, LastError: "x", Declared: true}}
}

func TestRefreshBundle(t *testing.T) {
	conn := dial(t, start(t, adminapi.Config{Authority: openAuthority(t), LocalAgent: localID, LogLevel: new(slog.LevelVar), Federation: fakeFederation{}}))
	c := trustdomainpb.NewTrustDomainClient(conn)
	for name, w := range map[string]want{
		"good": ok, "bad": {13, "failed to refresh bundle: nobody is there"},
		"none": {5, `no relationship with trust domain "none"`}, "X": {3, "failed to parse trust domain: " + badTD},
	} {
		_, err := c.RefreshBundle(t.Context(), &trustdomainpb.RefreshBundleRequest{TrustDomain: name})
		w.checkError(t, err)
	}
	resp, err := federationpb.NewFederationClient(conn).GetStatus(t.Context(), &federationpb.GetStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]*federationpb.RelationshipStatus{{TrustDomain: "good", LastSuccess: 9, Failures: 2, LastError: "x", Declared: true}}, resp.GetRelationships(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

// Over TLS relationships are for administrators; agents and strangers are
// denied.
func TestFederationOverTLS(t *testing.T) {
	s := serve(t)
	agent := s.joined(t, "a")
	admin := s.workload(t, s.entry(t, agent.id, "/admin", func(e *entry.Entry) { e.Admin = true }))
	const method = trustdomainpb.TrustDomain_ListFederationRelationships_FullMethodName
	list := func(as identity) error {
		_, err := trustdomainpb.NewTrustDomainClient(s.dial(t, as)).ListFederationRelationships(t.Context(), &trustdomainpb.ListFederationRelationshipsRequest{})
		return err
	}
	for _, as := range []identity{{}, agent} {
		wantDenied(t, list(as), method, 0)
	}
	ok.checkError(t, list(admin))
	_, err := trustdomainpb.NewTrustDomainClient(s.dial(t, agent)).RefreshBundle(t.Context(), &trustdomainpb.RefreshBundleRequest{TrustDomain: "x"})
	wantDenied(t, err, trustdomainpb.TrustDomain_RefreshBundle_FullMethodName, 0)
	// How fetching goes is told on the socket only.
	_, err = federationpb.NewFederationClient(s.dial(t, admin)).GetStatus(t.Context(), &federationpb.GetStatusRequest{})
	want{12, "unknown service spiffe.node.federation.v1.Federation"}.checkError(t, err)
}
