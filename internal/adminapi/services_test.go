package adminapi_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"net/url"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/spiffe-node/spiffe-node/internal/adminapi"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/agentpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/bundlepb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/debugpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/localauthoritypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/loggerpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/svidpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
)

func newCSR(t *testing.T, subject pkix.Name, dns []string, uris ...string) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	req := &x509.CertificateRequest{Subject: subject, DNSNames: dns}
	for _, u := range uris {
		parsed, err := url.Parse(u)
		if err != nil {
			t.Fatal(err)
		}
		req.URIs = append(req.URIs, parsed)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, req, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestMintX509SVID(t *testing.T) {
	conn := wire(t)
	c := svidpb.NewSVIDClient(conn)
	none := pkix.Name{}
	forged := newCSR(t, none, nil, "spiffe://td/w")
	forged[len(forged)-1] ^= 1
	for name, tc := range map[string]struct {
		csr  []byte
		want want
	}{
		"none":          {nil, want{3, "missing CSR"}},
		"garbage":       {[]byte("x"), want{3, "malformed CSR: asn1: syntax error: truncated tag or length"}},
		"forged":        {forged, want{3, "failed to verify CSR signature: x509: ECDSA verification failure"}},
		"no URI":        {newCSR(t, none, nil), want{3, "CSR URI SAN is required"}},
		"two URIs":      {newCSR(t, none, nil, "spiffe://td/a", "spiffe://td/b"), want{3, "only one URI SAN is expected"}},
		"foreign":       {newCSR(t, none, nil, "spiffe://o/a"), want{3, `CSR URI SAN is invalid: "spiffe://o/a" is not a member of trust domain "td"`}},
		"agent":         {newCSR(t, none, nil, "spiffe://td/spire/agent/x"), want{3, `CSR URI SAN is invalid: "spiffe://td/spire/agent/x" is not a workload in trust domain "td"; path is in the reserved namespace`}},
		"not SPIFFE":    {newCSR(t, none, nil, "http://x"), want{3, "CSR URI SAN is invalid: scheme is missing or invalid"}},
		"DNS":           {newCSR(t, none, []string{"a..b"}, "spiffe://td/w"), want{3, "CSR DNS name is invalid: idna error\nidna: invalid label \"a..b\""}},
		"wildcard over": {newCSR(t, none, []string{"*.b", "a.b"}, "spiffe://td/w"), want{3, "CSR DNS name contains a wildcard that covers another non-wildcard name: *"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := c.MintX509SVID(t.Context(), &svidpb.MintX509SVIDRequest{Csr: tc.csr})
			tc.want.checkError(t, err)
		})
	}

	resp, err := c.MintX509SVID(t.Context(), &svidpb.MintX509SVIDRequest{
		Csr: newCSR(t, pkix.Name{Organization: []string{"Org"}, CommonName: "cn"}, []string{"x.y", "a.b"}, "spiffe://td/w"), Ttl: 600,
	})
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(resp.GetSvid().GetCertChain()[0])
	if err != nil {
		t.Fatal(err)
	}
	if got := leaf.Subject.String(); got != "CN=x.y,O=Org" {
		t.Errorf("subject %s: the CSR's, with the first DNS name as CN", got)
	}
	if left := time.Until(leaf.NotAfter); left < 9*time.Minute || left > 11*time.Minute || resp.GetSvid().GetExpiresAt() != leaf.NotAfter.Unix() {
		t.Errorf("expires in %s", left)
	}
	bundle, err := bundlepb.NewBundleClient(conn).GetBundle(t.Context(), &bundlepb.GetBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	for _, a := range bundle.GetX509Authorities() {
		root, err := x509.ParseCertificate(a.GetAsn1())
		if err != nil {
			t.Fatal(err)
		}
		roots.AddCert(root)
		// The chain never holds the self-signed root.
		if slices.ContainsFunc(resp.GetSvid().GetCertChain(), func(der []byte) bool { return string(der) == string(a.GetAsn1()) }) {
			t.Error("root in the chain")
		}
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(id("td", "/w"), resp.GetSvid().GetId(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

func TestMintJWTSVID(t *testing.T) {
	conn := wire(t)
	c := svidpb.NewSVIDClient(conn)
	for name, tc := range map[string]struct {
		req  *svidpb.MintJWTSVIDRequest
		want want
	}{
		"no ID":          {&svidpb.MintJWTSVIDRequest{Audience: []string{"a"}}, want{3, "invalid SPIFFE ID: request must specify SPIFFE ID"}},
		"reserved":       {&svidpb.MintJWTSVIDRequest{Id: id("td", "/spire/x"), Audience: []string{"a"}}, want{3, `invalid SPIFFE ID: "spiffe://td/spire/x" is not a workload in trust domain "td"; path is in the reserved namespace`}},
		"no audience":    {&svidpb.MintJWTSVIDRequest{Id: id("td", "/w")}, want{3, "at least one audience is required"}},
		"empty audience": {&svidpb.MintJWTSVIDRequest{Id: id("td", "/w"), Audience: []string{""}}, want{13, "failed to sign JWT-SVID: invalid JWT-SVID audience: cannot be empty"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := c.MintJWTSVID(t.Context(), tc.req)
			tc.want.checkError(t, err)
		})
	}
	resp, err := c.MintJWTSVID(t.Context(), &svidpb.MintJWTSVIDRequest{Id: id("td", "/w"), Audience: []string{"a", "", "b"}, Ttl: 120})
	if err != nil {
		t.Fatal(err)
	}
	_, key := ownKeys(t, bundlepb.NewBundleClient(conn))
	pub, err := x509.ParsePKIXPublicKey(key.GetPublicKey())
	if err != nil {
		t.Fatal(err)
	}
	keys := jwtbundle.New(td)
	if err := keys.AddJWTAuthority(key.GetKeyId(), pub); err != nil {
		t.Fatal(err)
	}
	svid, err := jwtsvid.ParseAndValidate(resp.GetSvid().GetToken(), keys, []string{"b"})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"a", "b"}, svid.Audience); diff != "" {
		t.Error(diff)
	}
	if got := resp.GetSvid().GetExpiresAt() - resp.GetSvid().GetIssuedAt(); got != 120 || svid.Expiry.Unix() != resp.GetSvid().GetExpiresAt() {
		t.Errorf("lives %d s", got)
	}
}

func TestAgents(t *testing.T) {
	conn := ours(t)
	c := agentpb.NewAgentClient(conn)
	type filter = agentpb.ListAgentsRequest_Filter
	future := time.Now().Add(2 * time.Hour).UTC().Format("2006-01-02 15:04:05 -0700 -07")
	for name, tc := range map[string]struct {
		filter *filter
		n      int
	}{
		"all":                   {nil, 1},
		"type":                  {&filter{ByAttestationType: "local"}, 1},
		"other type":            {&filter{ByAttestationType: "join_token"}, 0},
		"banned":                {&filter{ByBanned: wrapperspb.Bool(true)}, 0},
		"not banned":            {&filter{ByBanned: wrapperspb.Bool(false)}, 1},
		"can re-attest":         {&filter{ByCanReattest: wrapperspb.Bool(true)}, 0},
		"selectors":             {&filter{BySelectorMatch: &typespb.SelectorMatch{Selectors: selectors("local:node:node1"), Match: 2}}, 1},
		"other selectors":       {&filter{BySelectorMatch: &typespb.SelectorMatch{Selectors: selectors("local:node:node2"), Match: 2}}, 0},
		"expires before":        {&filter{ByExpiresBefore: future}, 1},
		"expires before, past":  {&filter{ByExpiresBefore: "2006-01-02 15:04:05 +0000 +00"}, 0},
		"text that is no time":  {&filter{ByExpiresBefore: "soon"}, 1},
		"two that exclude each": {&filter{ByAttestationType: "local", ByBanned: wrapperspb.Bool(true)}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			resp, err := c.ListAgents(t.Context(), &agentpb.ListAgentsRequest{Filter: tc.filter})
			if err != nil || len(resp.GetAgents()) != tc.n {
				t.Errorf("listed %v (%v), want %d", resp.GetAgents(), err, tc.n)
			}
			counted, err := c.CountAgents(t.Context(), &agentpb.CountAgentsRequest{Filter: &agentpb.CountAgentsRequest_Filter{
				ByAttestationType: tc.filter.GetByAttestationType(), BySelectorMatch: tc.filter.GetBySelectorMatch(),
				ByBanned: tc.filter.GetByBanned(), ByCanReattest: tc.filter.GetByCanReattest(), ByExpiresBefore: tc.filter.GetByExpiresBefore(),
			}})
			if err != nil || int(counted.GetCount()) != tc.n {
				t.Errorf("counted %d (%v), want %d", counted.GetCount(), err, tc.n)
			}
		})
	}
	got, err := c.GetAgent(t.Context(), &agentpb.GetAgentRequest{Id: id("td", localID.Path()), OutputMask: &typespb.AgentMask{AttestationType: true, AgentVersion: true}})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&typespb.Agent{Id: id("td", localID.Path()), AttestationType: "local", AgentVersion: "test"}, got, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	refusal := want{9, "agent spiffe://td/spire/agent/local/node1 is this process, which is also the authority: stop it instead"}
	_, err = c.BanAgent(t.Context(), &agentpb.BanAgentRequest{Id: id("td", localID.Path())})
	refusal.checkError(t, err)
	_, err = c.DeleteAgent(t.Context(), &agentpb.DeleteAgentRequest{Id: id("td", localID.Path())})
	refusal.checkError(t, err)
}

func TestAgentErrors(t *testing.T) {
	c := agentpb.NewAgentClient(wire(t))
	for _, tc := range []struct {
		id   *typespb.SPIFFEID
		want want
	}{
		{nil, want{3, "invalid agent ID: request must specify SPIFFE ID"}},
		{id("", ""), want{3, "invalid agent ID: trust domain is missing"}},
		{id("td", ""), want{3, `invalid agent ID: "spiffe://td" is not an agent in trust domain "td"; path is empty`}},
		{id("td", "/x"), want{3, `invalid agent ID: "spiffe://td/x" is not an agent in trust domain "td"; path is not in the agent namespace`}},
		{id("o", "/spire/agent/x"), want{3, `invalid agent ID: "spiffe://o/spire/agent/x" is not a member of trust domain "td"`}},
		{id("td", "/spire/agent/none"), want{5, "agent not found"}},
	} {
		_, err := c.GetAgent(t.Context(), &agentpb.GetAgentRequest{Id: tc.id})
		tc.want.checkError(t, err)
		_, err = c.BanAgent(t.Context(), &agentpb.BanAgentRequest{Id: tc.id})
		tc.want.checkError(t, err)
		_, err = c.DeleteAgent(t.Context(), &agentpb.DeleteAgentRequest{Id: tc.id})
		tc.want.checkError(t, err)
	}
	list := func(f *agentpb.ListAgentsRequest_Filter, token string) error {
		_, err := c.ListAgents(t.Context(), &agentpb.ListAgentsRequest{Filter: f, PageSize: 1, PageToken: token})
		return err
	}
	match := func(m *typespb.SelectorMatch) *agentpb.ListAgentsRequest_Filter {
		return &agentpb.ListAgentsRequest_Filter{BySelectorMatch: m}
	}
	want{13, "failed to list agents: cannot list by empty selectors set"}.checkError(t, list(match(&typespb.SelectorMatch{}), ""))
	want{3, "failed to parse selectors: missing selector type"}.checkError(t, list(match(&typespb.SelectorMatch{Selectors: []*typespb.Selector{nil}}), ""))
	want{13, `failed to list agents: datastore-sql: unhandled match behavior '\t'`}.checkError(t, list(match(&typespb.SelectorMatch{Selectors: selectors("a:b"), Match: 9}), ""))
	want{13, "failed to list agents: could not parse token 'x'"}.checkError(t, list(nil, "x"))
}

// A caller on the socket is neither an agent nor a downstream server, and what
// is not served says so.
func TestDenied(t *testing.T) {
	conn := wire(t)
	denied := func(method string) want { return want{7, "authorization denied for method " + method} }
	for _, method := range []string{
		agentpb.Agent_RenewAgent_FullMethodName, agentpb.Agent_PostStatus_FullMethodName,
		bundlepb.Bundle_PublishJWTAuthority_FullMethodName, bundlepb.Bundle_PublishWITAuthority_FullMethodName,
		entrypb.Entry_GetAuthorizedEntries_FullMethodName,
		svidpb.SVID_BatchNewX509SVID_FullMethodName, svidpb.SVID_NewJWTSVID_FullMethodName,
		svidpb.SVID_BatchNewWITSVID_FullMethodName, svidpb.SVID_NewDownstreamX509CA_FullMethodName,
	} {
		err := conn.Invoke(t.Context(), method, &typespb.Status{}, &typespb.Status{})
		denied(method).checkError(t, err)
	}
	stream, err := entrypb.NewEntryClient(conn).SyncAuthorizedEntries(t.Context())
	if err == nil {
		_, err = stream.Recv()
	}
	denied(entrypb.Entry_SyncAuthorizedEntries_FullMethodName).checkError(t, err)
	err = conn.Invoke(t.Context(), svidpb.SVID_MintWITSVID_FullMethodName, &typespb.Status{}, &typespb.Status{})
	want{12, "WIT functionality is disabled"}.checkError(t, err)
}

func TestNotServed(t *testing.T) {
	conn := ours(t)
	const none = "this authority serves only the agent it runs in and attests no other"
	c := agentpb.NewAgentClient(conn)
	_, err := c.CreateJoinToken(t.Context(), &agentpb.CreateJoinTokenRequest{Ttl: 60})
	want{12, none}.checkError(t, err)
	stream, err := c.AttestAgent(t.Context())
	if err == nil {
		_, err = stream.Recv()
	}
	want{12, none}.checkError(t, err)
}

func TestDebugAndHealth(t *testing.T) {
	conn := wire(t)
	info, err := debugpb.NewDebugClient(conn).GetInfo(t.Context(), &debugpb.GetInfoRequest{})
	if err != nil {
		t.Fatal(err)
	}
	chain := info.GetSvidChain()
	if len(chain) == 0 || info.GetFederatedBundlesCount() < 1 {
		t.Fatalf("info: %v", info)
	}
	if last := chain[len(chain)-1]; last.GetId().GetTrustDomain() != "td" || last.GetExpiresAt() < time.Now().Unix() {
		t.Errorf("root: %v", last)
	}
	if onRealServer() {
		if id := chain[0].GetId(); id.GetPath() != "/spire/server" {
			t.Errorf("leaf: %v", chain[0])
		}
	}
	h := healthpb.NewHealthClient(conn)
	resp, err := h.Check(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil || resp.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("health: %v, %v", resp.GetStatus(), err)
	}
	_, err = h.Check(t.Context(), &healthpb.HealthCheckRequest{Service: "x"})
	want{3, "per-service health is not supported"}.checkError(t, err)
	_, err = h.List(t.Context(), &healthpb.HealthListRequest{})
	want{12, "method List not implemented"}.checkError(t, err)
	stream, err := h.Watch(t.Context(), &healthpb.HealthCheckRequest{})
	if err == nil {
		_, err = stream.Recv()
	}
	want{12, "method Watch not implemented"}.checkError(t, err)
}

// With a TLS endpoint the chain is that of the server's own SVID, also below a
// new CA.
func TestDebugShowsTheServersSVID(t *testing.T) {
	a := openAuthority(t)
	identity, err := adminapi.ServerCertificate(a, nil)
	if err != nil {
		t.Fatal(err)
	}
	conn := dial(t, start(t, adminapi.Config{Authority: a, Certificate: identity, LocalAgent: localID}))
	check := func() {
		t.Helper()
		info, err := debugpb.NewDebugClient(conn).GetInfo(t.Context(), &debugpb.GetInfoRequest{})
		if err != nil {
			t.Fatal(err)
		}
		chain := info.GetSvidChain()
		if len(chain) != 2 || chain[0].GetId().GetPath() != "/spire/server" || chain[0].GetSubject() != "O=SPIRE,C=US" || chain[1].GetId().GetPath() != "" {
			t.Errorf("chain: %v", chain)
		}
	}
	check()
	keys := localauthoritypb.NewLocalAuthorityClient(conn)
	prepared, err := keys.PrepareX509Authority(t.Context(), &localauthoritypb.PrepareX509AuthorityRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := keys.ActivateX509Authority(t.Context(), &localauthoritypb.ActivateX509AuthorityRequest{AuthorityId: prepared.GetPreparedAuthority().GetAuthorityId()}); err != nil {
		t.Fatal(err)
	}
	check()
}

func TestLogger(t *testing.T) {
	c := loggerpb.NewLoggerClient(wire(t))
	reset, err := c.ResetLogLevel(t.Context(), &loggerpb.ResetLogLevelRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for level := typespb.LogLevel_PANIC; level <= typespb.LogLevel_TRACE; level++ {
		got, err := c.SetLogLevel(t.Context(), &loggerpb.SetLogLevelRequest{NewLevel: level})
		if err != nil || got.GetCurrentLevel() != level || got.GetLaunchLevel() != reset.GetLaunchLevel() {
			t.Errorf("set %s: %v, %v", level, got, err)
		}
	}
	_, err = c.SetLogLevel(t.Context(), &loggerpb.SetLogLevelRequest{})
	want{3, "newLevel value cannot be LogLevel_UNSPECIFIED"}.checkError(t, err)
	_, err = c.SetLogLevel(t.Context(), &loggerpb.SetLogLevelRequest{NewLevel: 8})
	want{3, "unsupported log level"}.checkError(t, err)
	if _, err := c.ResetLogLevel(t.Context(), &loggerpb.ResetLogLevelRequest{}); err != nil {
		t.Error(err)
	}
	got, err := c.GetLogger(t.Context(), &loggerpb.GetLoggerRequest{})
	if err != nil || got.GetCurrentLevel() != typespb.LogLevel_INFO {
		t.Errorf("after reset: %v, %v", got, err)
	}
}
