package adminapi_test

import (
	"bytes"
	"crypto/x509"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/bundlepb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/svidpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

func TestBatchNewX509SVID(t *testing.T) {
	s := serve(t)
	agent := s.joined(t, "a")
	e := s.entry(t, agent.id, "/w", func(e *entry.Entry) { e.DNSNames = []string{"b.example", "a.example"}; e.X509SVIDTTL = time.Minute })
	svids := svidpb.NewSVIDClient(s.dial(t, agent))
	_, csr := keyAndCSR(t)
	unsigned := bytes.Clone(csr)
	unsigned[len(unsigned)-1] ^= 1
	items := []struct {
		params *svidpb.NewX509SVIDParams
		want   want
	}{
		{&svidpb.NewX509SVIDParams{}, want{int32(codes.InvalidArgument), "missing entry ID"}},
		{&svidpb.NewX509SVIDParams{EntryId: e.ID}, want{int32(codes.InvalidArgument), "missing CSR"}},
		{&svidpb.NewX509SVIDParams{EntryId: "x", Csr: csr}, want{int32(codes.NotFound), "entry not found or not authorized"}},
		{&svidpb.NewX509SVIDParams{EntryId: e.ID, Csr: []byte("x")}, want{int32(codes.InvalidArgument), "malformed CSR: *"}},
		{&svidpb.NewX509SVIDParams{EntryId: e.ID, Csr: unsigned}, want{int32(codes.InvalidArgument), "invalid CSR signature: *"}},
		{&svidpb.NewX509SVIDParams{EntryId: e.ID, Csr: csr}, ok},
	}
	req := &svidpb.BatchNewX509SVIDRequest{}
	for _, item := range items {
		req.Params = append(req.Params, item.params)
	}
	resp, err := svids.BatchNewX509SVID(t.Context(), req)
	if err != nil || len(resp.GetResults()) != len(items) {
		t.Fatal(resp, err)
	}
	for i, item := range items {
		item.want.checkStatus(t, resp.GetResults()[i].GetStatus())
	}
	svid := resp.GetResults()[5].GetSvid()
	set, err := s.Bundles(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	id, _, err := x509svid.ParseAndVerify(svid.GetCertChain(), set.Own)
	if err != nil || id != e.SPIFFEID || svid.GetId().GetPath() != "/w" || svid.GetHint() != "" {
		t.Errorf("%s, %v, %v", id, svid, err)
	}
	leaf, err := x509.ParseCertificate(svid.GetCertChain()[0])
	if err != nil {
		t.Fatal(err)
	}
	if leaf.Subject.CommonName != "b.example" || leaf.NotAfter.Unix() != svid.GetExpiresAt() || time.Until(leaf.NotAfter) > time.Minute {
		t.Errorf("%s until %s", leaf.Subject, leaf.NotAfter)
	}

	_, err = svids.BatchNewX509SVID(t.Context(), &svidpb.BatchNewX509SVIDRequest{})
	want{int32(codes.InvalidArgument), "missing parameters"}.checkError(t, err)
	_, err = svids.BatchNewX509SVID(t.Context(), &svidpb.BatchNewX509SVIDRequest{Params: make([]*svidpb.NewX509SVIDParams, 501)})
	want{int32(codes.ResourceExhausted), "rejecting request due to certificate signing rate limiting: rate (501) exceeds burst size (500)"}.checkError(t, err)
}

func TestNewJWTSVID(t *testing.T) {
	s := serve(t)
	agent := s.joined(t, "a")
	e := s.entry(t, agent.id, "/w", func(e *entry.Entry) { e.JWTSVIDTTL = time.Minute })
	svids := svidpb.NewSVIDClient(s.dial(t, agent))
	for _, tc := range []struct {
		req  *svidpb.NewJWTSVIDRequest
		want want
	}{
		{&svidpb.NewJWTSVIDRequest{}, want{int32(codes.NotFound), "entry not found or not authorized"}},
		{&svidpb.NewJWTSVIDRequest{EntryId: e.ID}, want{int32(codes.InvalidArgument), "at least one audience is required"}},
		{&svidpb.NewJWTSVIDRequest{EntryId: e.ID, Audience: []string{""}}, want{int32(codes.Internal), "failed to sign JWT-SVID: invalid JWT-SVID audience: cannot be empty"}},
	} {
		_, err := svids.NewJWTSVID(t.Context(), tc.req)
		tc.want.checkError(t, err)
	}
	resp, err := svids.NewJWTSVID(t.Context(), &svidpb.NewJWTSVIDRequest{EntryId: e.ID, Audience: []string{"x", ""}})
	if err != nil {
		t.Fatal(err)
	}
	set, err := s.Bundles(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	got, err := jwtsvid.ParseAndValidate(resp.GetSvid().GetToken(), set.Own, []string{"x"})
	if err != nil || got.ID != e.SPIFFEID || resp.GetSvid().GetIssuedAt() == 0 || resp.GetSvid().GetExpiresAt()-resp.GetSvid().GetIssuedAt() != 60 {
		t.Errorf("%v, %v, %v", got, resp.GetSvid(), err)
	}
}

func TestDownstream(t *testing.T) {
	s := serve(t)
	agent := s.joined(t, "a")
	down := s.workload(t, s.entry(t, agent.id, "/down", func(e *entry.Entry) { e.Downstream = true }))
	conn := s.dial(t, down)
	_, csr := keyAndCSR(t)
	svids := svidpb.NewSVIDClient(conn)
	_, err := svids.NewDownstreamX509CA(t.Context(), &svidpb.NewDownstreamX509CARequest{Csr: []byte("x")})
	want{int32(codes.InvalidArgument), "malformed CSR: *"}.checkError(t, err)
	resp, err := svids.NewDownstreamX509CA(t.Context(), &svidpb.NewDownstreamX509CARequest{Csr: csr, PreferredTtl: 600})
	if err != nil {
		t.Fatal(err)
	}
	ca, err := x509.ParseCertificate(resp.GetCaCertChain()[0])
	if err != nil || !ca.IsCA || len(resp.GetX509Authorities()) != 1 || !strings.Contains(ca.Subject.String(), "OU=DOWNSTREAM-1") {
		t.Errorf("%v, %v", ca, err)
	}

	bundles := bundlepb.NewBundleClient(conn)
	for _, tc := range []struct {
		key  *typespb.JWTKey
		want want
	}{
		{nil, want{int32(codes.InvalidArgument), "missing JWT authority"}},
		{&typespb.JWTKey{PublicKey: []byte("x"), KeyId: "k"}, want{int32(codes.InvalidArgument), "invalid JWT authority: *"}},
		{&typespb.JWTKey{PublicKey: s.OwnBundle().JWT[0].PublicKey}, want{int32(codes.InvalidArgument), "invalid JWT authority: missing key ID"}},
	} {
		_, err := bundles.PublishJWTAuthority(t.Context(), &bundlepb.PublishJWTAuthorityRequest{JwtAuthority: tc.key})
		tc.want.checkError(t, err)
	}
	key := &typespb.JWTKey{PublicKey: s.OwnBundle().JWT[0].PublicKey, KeyId: "downstream"}
	got, err := bundles.PublishJWTAuthority(t.Context(), &bundlepb.PublishJWTAuthorityRequest{JwtAuthority: key})
	if err != nil || len(got.GetJwtAuthorities()) != 2 {
		t.Errorf("%v, %v", got, err)
	}
}

// An agent signs for its entries only as long as it is what it was.
func TestNoSigningAfterABan(t *testing.T) {
	s := serve(t)
	agent := s.joined(t, "a")
	e := s.entry(t, agent.id, "/w")
	svids := svidpb.NewSVIDClient(s.dial(t, agent))
	_, csr := keyAndCSR(t)
	req := &svidpb.BatchNewX509SVIDRequest{Params: []*svidpb.NewX509SVIDParams{{EntryId: e.ID, Csr: csr}}}
	if _, err := svids.BatchNewX509SVID(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteEntry(t.Context(), e.ID); err != nil {
		t.Fatal(err)
	}
	resp, err := svids.BatchNewX509SVID(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	want{int32(codes.NotFound), "entry not found or not authorized"}.checkStatus(t, resp.GetResults()[0].GetStatus())
	if _, err := s.BanAgent(t.Context(), spiffeid.RequireFromString(agent.id.String())); err != nil {
		t.Fatal(err)
	}
	_, err = svids.BatchNewX509SVID(t.Context(), req)
	wantDenied(t, err, svidpb.SVID_BatchNewX509SVID_FullMethodName, typespb.PermissionDeniedDetails_AGENT_BANNED)
}
