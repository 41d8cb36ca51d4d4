package adminapi_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/bundlepb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
)

const badTDName = "trust domain argument is not valid: trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores"

// ownKeys are the own bundle's first authorities: real ones to put elsewhere.
func ownKeys(t *testing.T, c bundlepb.BundleClient) (*typespb.X509Certificate, *typespb.JWTKey) {
	t.Helper()
	b, err := c.GetBundle(t.Context(), &bundlepb.GetBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if b.GetTrustDomain() != "td" || len(b.GetX509Authorities()) == 0 || len(b.GetJwtAuthorities()) == 0 || b.GetRefreshHint() != 0 {
		t.Fatalf("own bundle: %v", b)
	}
	if b.GetJwtAuthorities()[0].GetKeyId() == "" || b.GetJwtAuthorities()[0].GetExpiresAt() == 0 {
		t.Errorf("JWT authority %v needs a key ID and an expiry", b.GetJwtAuthorities()[0])
	}
	return b.GetX509Authorities()[0], b.GetJwtAuthorities()[0]
}

func TestAppendBundle(t *testing.T) {
	c := bundlepb.NewBundleClient(wire(t))
	root, key := ownKeys(t, c)
	before, err := c.GetBundle(t.Context(), &bundlepb.GetBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		req  *bundlepb.AppendBundleRequest
		want want
	}{
		"nothing":        {&bundlepb.AppendBundleRequest{}, want{3, "no authorities to append"}},
		"WIT only":       {&bundlepb.AppendBundleRequest{WitAuthorities: []*typespb.WITKey{{KeyId: "x"}}}, want{3, "no authorities to append"}},
		"no certificate": {&bundlepb.AppendBundleRequest{X509Authorities: []*typespb.X509Certificate{{Asn1: []byte("x")}}}, want{3, "failed to convert X.509 authority: x509: malformed certificate"}},
		"no key":         {&bundlepb.AppendBundleRequest{JwtAuthorities: []*typespb.JWTKey{{KeyId: "a", PublicKey: []byte("x")}}}, want{3, "failed to convert JWT authority: asn1: syntax error: truncated tag or length"}},
		"no key ID":      {&bundlepb.AppendBundleRequest{JwtAuthorities: []*typespb.JWTKey{{PublicKey: key.GetPublicKey()}}}, want{3, "failed to convert JWT authority: missing key ID"}},
		"known root":     {&bundlepb.AppendBundleRequest{X509Authorities: []*typespb.X509Certificate{{Asn1: root.GetAsn1(), Tainted: true}}}, ok},
		"known key":      {&bundlepb.AppendBundleRequest{JwtAuthorities: []*typespb.JWTKey{key}}, ok},
	} {
		t.Run(name, func(t *testing.T) {
			b, err := c.AppendBundle(t.Context(), tc.req)
			tc.want.checkError(t, err)
			if err == nil {
				if diff := cmp.Diff(before, b, protocmp.Transform()); diff != "" {
					t.Errorf("nothing new, but the bundle changed:\n%s", diff)
				}
			}
		})
	}
}

// The server takes an empty certificate into its own bundle, which nobody can
// read from then on. We do not.
func TestAppendEmptyCertificateIsRefused(t *testing.T) {
	c := bundlepb.NewBundleClient(ours(t))
	_, err := c.AppendBundle(t.Context(), &bundlepb.AppendBundleRequest{X509Authorities: []*typespb.X509Certificate{nil}})
	want{3, "failed to convert X.509 authority: no certificate found"}.checkError(t, err)
	ownKeys(t, c)
}

func TestAppendBundleAddsForeignRoot(t *testing.T) {
	foreign, _ := ownKeys(t, bundlepb.NewBundleClient(ours(t)))
	c := bundlepb.NewBundleClient(ours(t))
	before, err := c.GetBundle(t.Context(), &bundlepb.GetBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	after, err := c.AppendBundle(t.Context(), &bundlepb.AppendBundleRequest{X509Authorities: []*typespb.X509Certificate{foreign}})
	if err != nil {
		t.Fatal(err)
	}
	if len(after.GetX509Authorities()) != len(before.GetX509Authorities())+1 || after.GetSequenceNumber() != before.GetSequenceNumber()+1 {
		t.Errorf("before %d authorities, sequence %d; after %d, %d", len(before.GetX509Authorities()), before.GetSequenceNumber(),
			len(after.GetX509Authorities()), after.GetSequenceNumber())
	}
}

func TestFederatedBundles(t *testing.T) {
	conn := wire(t)
	c := bundlepb.NewBundleClient(conn)
	root, key := ownKeys(t, c)
	short := &typespb.BundleMask{SequenceNumber: true, RefreshHint: true}
	t.Cleanup(func() {
		if onRealServer() {
			_, _ = c.BatchDeleteFederatedBundle(ctx(), &bundlepb.BatchDeleteFederatedBundleRequest{
				TrustDomains: []string{"fed1", "fed2"}, Mode: bundlepb.BatchDeleteFederatedBundleRequest_DELETE,
			})
		}
	})
	in := []*typespb.Bundle{
		nil,
		{TrustDomain: "td"},
		{TrustDomain: "X"},
		{TrustDomain: "fed1"},
		{TrustDomain: "fed2", X509Authorities: []*typespb.X509Certificate{{Asn1: []byte("x")}}},
		{TrustDomain: "fed2", JwtAuthorities: []*typespb.JWTKey{{KeyId: "a", PublicKey: []byte("x")}}},
		{
			TrustDomain: "spiffe://fed2/x", X509Authorities: []*typespb.X509Certificate{{Asn1: root.GetAsn1(), Tainted: true}},
			JwtAuthorities: []*typespb.JWTKey{key}, SequenceNumber: 7, RefreshHint: 9,
		},
	}
	wants := func(verb string) []want {
		return []want{
			{3, "trust domain argument is not valid: trust domain is missing"},
			{3, verb + " a federated bundle for the server's own trust domain is not allowed"},
			{3, badTDName},
			ok,
			{3, "failed to convert bundle: unable to parse X.509 authority: x509: malformed certificate"},
			{3, "failed to convert bundle: unable to parse JWT authority: asn1: syntax error: truncated tag or length"},
			ok,
		}
	}

	created, err := c.BatchCreateFederatedBundle(t.Context(), &bundlepb.BatchCreateFederatedBundleRequest{Bundle: append(in, in[3]), OutputMask: short})
	if err != nil {
		t.Fatal(err)
	}
	for i, w := range append(wants("creating"), want{6, "bundle already exists"}) {
		w.checkStatus(t, created.GetResults()[i].GetStatus())
	}
	fed2 := &typespb.Bundle{TrustDomain: "fed2", SequenceNumber: 7, RefreshHint: 9}
	if diff := cmp.Diff(fed2, created.GetResults()[6].GetBundle(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	updated, err := c.BatchUpdateFederatedBundle(t.Context(), &bundlepb.BatchUpdateFederatedBundleRequest{
		Bundle: append(in, &typespb.Bundle{TrustDomain: "none"}), InputMask: &typespb.BundleMask{SequenceNumber: true}, OutputMask: short,
	})
	if err != nil {
		t.Fatal(err)
	}
	for i, w := range append(wants("updating"), want{5, "bundle not found"}) {
		w.checkStatus(t, updated.GetResults()[i].GetStatus())
	}
	set, err := c.BatchSetFederatedBundle(t.Context(), &bundlepb.BatchSetFederatedBundleRequest{Bundle: in, OutputMask: short})
	if err != nil {
		t.Fatal(err)
	}
	for i, w := range wants("setting") {
		w.checkStatus(t, set.GetResults()[i].GetStatus())
	}

	t.Run("get", func(t *testing.T) {
		for name, w := range map[string]want{
			"":              {3, "trust domain argument is not valid: trust domain is missing"},
			"td":            {3, "getting a federated bundle for the server's own trust domain is not allowed"},
			"X":             {3, badTDName},
			"none":          {5, "bundle not found"},
			"spiffe://fed2": ok,
		} {
			b, err := c.GetFederatedBundle(t.Context(), &bundlepb.GetFederatedBundleRequest{TrustDomain: name})
			w.checkError(t, err)
			if err == nil && (b.GetX509Authorities()[0].GetTainted() || b.GetJwtAuthorities()[0].GetKeyId() != key.GetKeyId()) {
				t.Errorf("stored bundle: %v", b)
			}
		}
	})
	t.Run("list to the empty token", func(t *testing.T) {
		var names []string
		for token, first := "", true; first || token != ""; first = false {
			resp, err := c.ListFederatedBundles(t.Context(), &bundlepb.ListFederatedBundlesRequest{PageSize: 1, PageToken: token, OutputMask: &typespb.BundleMask{}})
			if err != nil {
				t.Fatal(err)
			}
			for _, b := range resp.GetBundles() {
				names = append(names, b.GetTrustDomain())
			}
			token = resp.GetNextPageToken()
		}
		if diff := cmp.Diff([]string{"fed1", "fed2"}, names); diff != "" {
			t.Error(diff)
		}
		_, err := c.ListFederatedBundles(t.Context(), &bundlepb.ListFederatedBundlesRequest{PageSize: 1, PageToken: "x"})
		want{13, "failed to list bundles: could not parse token 'x'"}.checkError(t, err)
		n, err := c.CountBundles(t.Context(), &bundlepb.CountBundlesRequest{})
		if err != nil || n.GetCount() != 3 {
			t.Errorf("count %d (%v), want the own one too", n.GetCount(), err)
		}
	})
	t.Run("delete", func(t *testing.T) { deleteFederated(t, c, entrypb.NewEntryClient(conn)) })
}

// deleteFederated needs fed1 and fed2, and deletes both.
func deleteFederated(t *testing.T, c bundlepb.BundleClient, entries entrypb.EntryClient) {
	t.Helper()
	results := create(t, entries,
		newEntry("/fed/1", func(e *typespb.Entry) { e.Id, e.FederatesWith = "fed-1", []string{"fed2", "fed2", "fed1"} }),
		newEntry("/fed/2", func(e *typespb.Entry) { e.Id, e.FederatesWith = "fed-2", []string{"fed1"} }),
	)
	for _, r := range results {
		ok.checkStatus(t, r.GetStatus())
	}
	remove := func(mode bundlepb.BatchDeleteFederatedBundleRequest_Mode, names ...string) []*bundlepb.BatchDeleteFederatedBundleResponse_Result {
		t.Helper()
		resp, err := c.BatchDeleteFederatedBundle(t.Context(), &bundlepb.BatchDeleteFederatedBundleRequest{TrustDomains: names, Mode: mode})
		if err != nil {
			t.Fatal(err)
		}
		return resp.GetResults()
	}
	names := []string{"", "X", "td", "spiffe://fed2/x", "none"}
	for i, r := range remove(bundlepb.BatchDeleteFederatedBundleRequest_RESTRICT, names...) {
		if r.GetTrustDomain() != names[i] {
			t.Errorf("result names %q, want %q as asked", r.GetTrustDomain(), names[i])
		}
		[]want{
			{3, "trust domain argument is not valid: trust domain is missing"},
			{3, badTDName},
			{3, "removing the bundle for the server trust domain is not allowed"},
			{9, "failed to delete federated bundle: datastore-sql: cannot delete bundle; federated with 1 registration entries"},
			{5, "bundle not found"},
		}[i].checkStatus(t, r.GetStatus())
	}
	ok.checkStatus(t, remove(bundlepb.BatchDeleteFederatedBundleRequest_DISSOCIATE, "fed2")[0].GetStatus())
	e, err := entries.GetEntry(t.Context(), &entrypb.GetEntryRequest{Id: "fed-1"})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"fed1"}, e.GetFederatesWith()); diff != "" {
		t.Error(diff)
	}
	ok.checkStatus(t, remove(bundlepb.BatchDeleteFederatedBundleRequest_DELETE, "fed1")[0].GetStatus())
	for _, id := range []string{"fed-1", "fed-2"} {
		_, err := entries.GetEntry(t.Context(), &entrypb.GetEntryRequest{Id: id})
		want{5, "entry not found"}.checkError(t, err)
	}
}
