package adminapi_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/agentpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/bundlepb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/debugpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/localauthoritypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/loggerpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/svidpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/internal/watchpb"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

func (s *server) verifyServer(raw [][]byte) error {
	set, err := s.Bundles(context.Background(), 0)
	if err != nil {
		return err
	}
	id, _, err := x509svid.ParseAndVerify(raw, set.Own)
	if err == nil && id != spiffeid.RequireFromPath(td, "/spire/server") {
		err = fmt.Errorf("the server is %s", id)
	}
	return err
}

func TestServerCertificate(t *testing.T) {
	s := serve(t)
	var serials []string
	for range 2 {
		cfg := s.clientTLS(identity{})
		cfg.ClientSessionCache = tls.NewLRUClientSessionCache(4)
		conn, err := tls.Dial("tcp", s.address, cfg)
		if err != nil {
			t.Fatal(err)
		}
		state := conn.ConnectionState()
		leaf := state.PeerCertificates[0]
		if state.NegotiatedProtocol != "h2" || state.DidResume || len(state.PeerCertificates) != 1 {
			t.Errorf("%q, resumed %t, %d certificates", state.NegotiatedProtocol, state.DidResume, len(state.PeerCertificates))
		}
		if len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) != 0 || leaf.IsCA || leaf.Subject.String() != "O=SPIRE,C=US" {
			t.Errorf("certificate %s, CA %t, for %v", leaf.Subject, leaf.IsCA, leaf.DNSNames)
		}
		serials = append(serials, leaf.SerialNumber.String())
		_ = conn.Close()
	}
	if serials[0] != serials[1] {
		t.Error("signed anew for every handshake")
	}
	// A tainted root is left at once.
	local, err := s.X509Authorities()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.RotateNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.TaintX509(t.Context(), local.Active.ID); err != nil {
		t.Fatal(err)
	}
	conn, err := tls.Dial("tcp", s.address, s.clientTLS(identity{}))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if conn.ConnectionState().PeerCertificates[0].SerialNumber.String() == serials[0] {
		t.Error("the certificate of a tainted root is still shown")
	}
}

func TestHandshakes(t *testing.T) {
	s := serve(t)
	other := serve(t) // same trust domain, other keys
	agent := s.joined(t, "a")
	for name, tc := range map[string]struct {
		edit func(*tls.Config)
		ok   bool
	}{
		"anonymous":         {func(*tls.Config) {}, true},
		"agent":             {func(c *tls.Config) { *c = *s.clientTLS(agent) }, true},
		"TLS 1.2":           {func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }, true},
		"TLS 1.1":           {func(c *tls.Config) { c.MaxVersion = tls.VersionTLS11 }, false},
		"HTTP/1.1":          {func(c *tls.Config) { c.NextProtos = []string{"http/1.1"} }, false},
		"foreign signature": {func(c *tls.Config) { *c = *s.clientTLS(other.joined(t, "a")) }, false},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := s.clientTLS(identity{})
			tc.edit(cfg)
			conn, err := tls.Dial("tcp", s.address, cfg)
			if err == nil {
				// In TLS 1.3 the client learns of a refusal when it reads. A server
				// that took it sends its settings.
				_ = conn.SetReadDeadline(time.Now().Add(5 * time.Second))
				_, err = conn.Read(make([]byte, 9))
				_ = conn.Close()
			}
			if (err == nil) != tc.ok {
				t.Errorf("got %v", err)
			}
		})
	}
}

// The services of the socket alone are unknown here, even to agents.
func TestSocketServicesAreNotRemote(t *testing.T) {
	s := serve(t)
	conn := s.dial(t, s.joined(t, "a"))
	_, derr := debugpb.NewDebugClient(conn).GetInfo(t.Context(), &debugpb.GetInfoRequest{})
	_, lerr := loggerpb.NewLoggerClient(conn).GetLogger(t.Context(), &loggerpb.GetLoggerRequest{})
	_, herr := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{})
	for service, err := range map[string]error{"spire.api.server.debug.v1.Debug": derr, "spire.api.server.logger.v1.Logger": lerr, "grpc.health.v1.Health": herr} {
		want{int32(codes.Unimplemented), "unknown service " + service}.checkError(t, err)
	}
}

// callers by class; every method of every service is tried by each.
const (
	anyone = 1 << iota
	admin
	downstream
	agentOnly
)

var allowed = map[string]int{
	"AttestAgent": anyone, "GetBundle": anyone,
	"CountAgents": admin, "ListAgents": admin, "GetAgent": admin, "DeleteAgent": admin, "BanAgent": admin, "CreateJoinToken": admin,
	"RenewAgent": agentOnly, "PostStatus": agentOnly,
	"CountBundles": admin, "AppendBundle": admin, "PublishJWTAuthority": downstream, "PublishWITAuthority": downstream,
	"ListFederatedBundles": admin, "GetFederatedBundle": admin | agentOnly, "BatchCreateFederatedBundle": admin,
	"BatchUpdateFederatedBundle": admin, "BatchSetFederatedBundle": admin, "BatchDeleteFederatedBundle": admin,
	"CountEntries": admin, "ListEntries": admin, "GetEntry": admin, "BatchCreateEntry": admin, "BatchUpdateEntry": admin,
	"BatchDeleteEntry": admin, "GetAuthorizedEntries": agentOnly, "SyncAuthorizedEntries": agentOnly,
	"MintX509SVID": admin, "MintJWTSVID": admin, "MintWITSVID": admin, "BatchNewX509SVID": agentOnly, "NewJWTSVID": agentOnly,
	"BatchNewWITSVID": agentOnly, "NewDownstreamX509CA": downstream,
	"Watch": agentOnly, "ReportTrust": agentOnly,

	"GetX509AuthorityState": admin, "PrepareX509Authority": admin, "ActivateX509Authority": admin, "TaintX509Authority": admin, "RevokeX509Authority": admin,
	"GetJWTAuthorityState": admin, "PrepareJWTAuthority": admin, "ActivateJWTAuthority": admin, "TaintJWTAuthority": admin, "RevokeJWTAuthority": admin,
	"GetWITAuthorityState": admin, "PrepareWITAuthority": admin, "ActivateWITAuthority": admin, "TaintWITAuthority": admin, "RevokeWITAuthority": admin,
	"TaintX509UpstreamAuthority": admin, "RevokeX509UpstreamAuthority": admin,
}

func methods() (names []string) {
	for _, d := range []grpc.ServiceDesc{agentpb.Agent_ServiceDesc, bundlepb.Bundle_ServiceDesc, entrypb.Entry_ServiceDesc, svidpb.SVID_ServiceDesc, watchpb.Watch_ServiceDesc, localauthoritypb.LocalAuthority_ServiceDesc} {
		for _, m := range d.Methods {
			names = append(names, "/"+d.ServiceName+"/"+m.MethodName)
		}
		for _, m := range d.Streams {
			names = append(names, "/"+d.ServiceName+"/"+m.StreamName)
		}
	}
	return names
}

// tryCall makes a call with an empty request; streams and unary calls look
// alike on the wire.
func tryCall(t *testing.T, conn *grpc.ClientConn, method string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method)
	if err != nil {
		t.Fatal(err)
	}
	_ = stream.SendMsg(&emptypb.Empty{})
	_ = stream.CloseSend()
	return stream.RecvMsg(&emptypb.Empty{})
}

func TestPolicy(t *testing.T) {
	local := spiffeid.RequireFromString("spiffe://td/console")
	s := serve(t, func(s *settings) { s.remote.AdminIDs = []spiffeid.ID{local} })
	agent := s.joined(t, "a")
	plain := s.workload(t, s.entry(t, agent.id, "/plain"))
	callers := map[string]struct {
		as    identity
		class int
		// reason an agent's call is denied for
		reason typespb.PermissionDeniedDetails_Reason
	}{
		"anonymous":  {identity{}, 0, 0},
		"workload":   {plain, 0, typespb.PermissionDeniedDetails_AGENT_NOT_ATTESTED},
		"agent":      {agent, agentOnly, 0},
		"admin":      {s.workload(t, s.entry(t, agent.id, "/admin", func(e *entry.Entry) { e.Admin = true })), admin, typespb.PermissionDeniedDetails_AGENT_NOT_ATTESTED},
		"downstream": {s.workload(t, s.entry(t, agent.id, "/down", func(e *entry.Entry) { e.Downstream = true })), downstream, typespb.PermissionDeniedDetails_AGENT_NOT_ATTESTED},
		"configured": {s.workload(t, s.entry(t, agent.id, "/console")), admin, typespb.PermissionDeniedDetails_AGENT_NOT_ATTESTED},
	}
	for name, c := range callers {
		t.Run(name, func(t *testing.T) {
			conn := s.dial(t, c.as)
			for _, method := range methods() {
				may, known := allowed[shortName(method)]
				if !known {
					t.Errorf("%s is not in this test's table", method)
				}
				err := tryCall(t, conn, method)
				switch {
				case may&(anyone|c.class) != 0:
					if status.Code(err) == codes.PermissionDenied {
						t.Errorf("%s: %v", method, err)
					}
				case may&agentOnly != 0:
					wantDenied(t, err, method, c.reason)
				default:
					wantDenied(t, err, method, 0)
				}
			}
		})
	}
}

// A foreign administrator gets in by configuration and bundle, and nobody else
// of its trust domain does.
func TestForeignAdmin(t *testing.T) {
	far := spiffeid.RequireTrustDomainFromString("far")
	console := spiffeid.RequireFromPath(far, "/console")
	s := serve(t, func(s *settings) { s.remote.AdminIDs = []spiffeid.ID{console} })
	f, err := embedded.Open(embedded.Config{TrustDomain: far, StatePath: filepath.Join(t.TempDir(), "state", "far.db")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	foreign := &server{Authority: f}
	mint := func(path string) identity {
		e, err := f.CreateEntry(t.Context(), &entry.Entry{
			SPIFFEID: spiffeid.RequireFromPath(far, path), ParentID: spiffeid.RequireFromPath(far, "/spire/server"), Selectors: localSelectors,
		})
		if err != nil {
			t.Fatal(err)
		}
		return foreign.workload(t, e)
	}
	count := func(as identity) error {
		_, err := entrypb.NewEntryClient(s.dial(t, as)).CountEntries(t.Context(), &entrypb.CountEntriesRequest{})
		return err
	}
	admin := mint("/console")
	if err := count(admin); status.Code(err) != codes.Unavailable {
		t.Errorf("without the foreign bundle: %v", err)
	}
	if err := s.SetFederatedBundle(t.Context(), f.OwnBundle()); err != nil {
		t.Fatal(err)
	}
	if err := count(admin); err != nil {
		t.Error(err)
	}
	if err := count(mint("/other")); status.Code(err) != codes.Unavailable {
		t.Errorf("somebody else of the foreign trust domain: %v", err)
	}
}

// What an agent's SVID is worth, in the words that tell the agent what to do.
func TestAgentStanding(t *testing.T) {
	s := serve(t, func(s *settings) { s.embedded.DefaultX509SVIDTTL = 3 * time.Second })
	const method = entrypb.Entry_GetAuthorizedEntries_FullMethodName
	get := func(conn *grpc.ClientConn) error {
		_, err := entrypb.NewEntryClient(conn).GetAuthorizedEntries(t.Context(), &entrypb.GetAuthorizedEntriesRequest{})
		return err
	}
	old := s.joined(t, "short")
	short := s.dial(t, old)
	if err := get(short); err != nil {
		t.Fatal(err)
	}
	began := time.Now()

	first, again, err := s.attestWith(t, "knock", "n1")
	if err != nil || !again {
		t.Fatal(again, err)
	}
	conn := s.dial(t, first)
	if err := get(conn); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.attestWith(t, "knock", "n1"); err != nil {
		t.Fatal(err)
	}
	wantDenied(t, get(conn), method, typespb.PermissionDeniedDetails_AGENT_NOT_ACTIVE)

	banned, _, err := s.attestWith(t, "knock", "n2")
	if err != nil {
		t.Fatal(err)
	}
	conn = s.dial(t, banned)
	if _, err := s.BanAgent(t.Context(), banned.id); err != nil {
		t.Fatal(err)
	}
	wantDenied(t, get(conn), method, typespb.PermissionDeniedDetails_AGENT_BANNED)
	_, _, err = s.attestWith(t, "knock", "n2")
	want{int32(codes.PermissionDenied), "failed to attest: agent is banned"}.checkError(t, err)
	if n := len(status.Convert(err).Details()); n != 0 {
		t.Errorf("%d details", n)
	}
	if err := s.DeleteAgent(t.Context(), banned.id); err != nil {
		t.Fatal(err)
	}
	wantDenied(t, get(conn), method, typespb.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
	if _, _, err = s.attestWith(t, "knock", "n2"); err != nil {
		t.Errorf("attesting after eviction: %v", err)
	}

	time.Sleep(time.Until(began.Add(3500 * time.Millisecond)))
	wantDenied(t, get(short), method, typespb.PermissionDeniedDetails_AGENT_EXPIRED)
	if err := get(s.dial(t, old)); status.Code(err) != codes.Unavailable {
		t.Errorf("a new connection with an expired SVID: %v", err)
	}
}

// Agent A gets nothing of agent B's, and nothing it could write.
func TestAgentsAreKeptApart(t *testing.T) {
	s := serve(t)
	a, b := s.joined(t, "a"), s.joined(t, "b")
	ofA, ofB := s.entry(t, a.id, "/wa"), s.entry(t, b.id, "/wb")
	s.entry(t, b.id, "/wb2")
	below := s.entry(t, ofB.SPIFFEID, "/below")
	conn := s.dial(t, a)
	entries := entrypb.NewEntryClient(conn)
	got, err := entries.GetAuthorizedEntries(t.Context(), &entrypb.GetAuthorizedEntriesRequest{})
	if err != nil || len(got.GetEntries()) != 1 || got.GetEntries()[0].GetId() != ofA.ID {
		t.Errorf("A is authorized for %v, %v", got.GetEntries(), err)
	}
	sync, err := entries.SyncAuthorizedEntries(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := sync.Send(&entrypb.SyncAuthorizedEntriesRequest{}); err != nil {
		t.Fatal(err)
	}
	page, err := sync.Recv()
	if err != nil || len(page.GetEntries()) != 1 {
		t.Errorf("A is sent %v, %v", page.GetEntries(), err)
	}
	_, csr := keyAndCSR(t)
	svids := svidpb.NewSVIDClient(conn)
	resp, err := svids.BatchNewX509SVID(t.Context(), &svidpb.BatchNewX509SVIDRequest{Params: []*svidpb.NewX509SVIDParams{
		{EntryId: ofB.ID, Csr: csr}, {EntryId: below.ID, Csr: csr}, {EntryId: "no such", Csr: csr}, {EntryId: ofA.ID, Csr: csr},
	}})
	if err != nil {
		t.Fatal(err)
	}
	refused := want{int32(codes.NotFound), "entry not found or not authorized"}
	for i, w := range []want{refused, refused, refused, ok} {
		r := resp.GetResults()[i]
		w.checkStatus(t, r.GetStatus())
		if (r.GetSvid() != nil) != (w == ok) {
			t.Errorf("result %d: %v", i, r.GetSvid())
		}
	}
	_, err = svids.NewJWTSVID(t.Context(), &svidpb.NewJWTSVIDRequest{EntryId: ofB.ID, Audience: []string{"x"}})
	refused.checkError(t, err)

	_, err = entries.BatchCreateEntry(t.Context(), &entrypb.BatchCreateEntryRequest{Entries: []*typespb.Entry{{
		SpiffeId: id("td", "/mine"), ParentId: id("td", a.id.Path()), Selectors: selectors("unix:uid:0"),
	}}})
	wantDenied(t, err, entrypb.Entry_BatchCreateEntry_FullMethodName, 0)
	_, err = entries.BatchUpdateEntry(t.Context(), &entrypb.BatchUpdateEntryRequest{Entries: []*typespb.Entry{{Id: ofA.ID, Admin: true}}})
	wantDenied(t, err, entrypb.Entry_BatchUpdateEntry_FullMethodName, 0)
	_, err = entries.BatchDeleteEntry(t.Context(), &entrypb.BatchDeleteEntryRequest{Ids: []string{ofB.ID}})
	wantDenied(t, err, entrypb.Entry_BatchDeleteEntry_FullMethodName, 0)
	_, err = agentpb.NewAgentClient(conn).CreateJoinToken(t.Context(), &agentpb.CreateJoinTokenRequest{Ttl: 60})
	wantDenied(t, err, agentpb.Agent_CreateJoinToken_FullMethodName, 0)
	if n := s.Set().Len(); n != 4 {
		t.Errorf("%d entries", n)
	}
}

// The agent's first GetBundle comes without a certificate.
func TestBundlesForAgents(t *testing.T) {
	s := serve(t)
	b, err := bundlepb.NewBundleClient(s.dial(t, identity{})).GetBundle(t.Context(), &bundlepb.GetBundleRequest{})
	if err != nil || len(b.GetX509Authorities()) != 1 || len(b.GetJwtAuthorities()) != 1 || b.GetJwtAuthorities()[0].GetKeyId() == "" || b.GetTrustDomain() != "td" {
		t.Fatalf("got %v, %v", b, err)
	}
	root, err := x509.ParseCertificate(b.GetX509Authorities()[0].GetAsn1())
	if err != nil || !root.IsCA {
		t.Error(root, err)
	}
	bundles := bundlepb.NewBundleClient(s.dial(t, s.joined(t, "a")))
	_, err = bundles.GetFederatedBundle(t.Context(), &bundlepb.GetFederatedBundleRequest{TrustDomain: "far"})
	want{int32(codes.NotFound), "bundle not found"}.checkError(t, err)
	far := &embedded.Bundle{TrustDomain: spiffeid.RequireTrustDomainFromString("far"), X509: []embedded.Root{{Certificate: root}}}
	if err := s.SetFederatedBundle(t.Context(), far); err != nil {
		t.Fatal(err)
	}
	got, err := bundles.GetFederatedBundle(t.Context(), &bundlepb.GetFederatedBundleRequest{TrustDomain: "spiffe://far"})
	if err != nil || got.GetTrustDomain() != "far" || !cmp.Equal(got.GetX509Authorities()[0].GetAsn1(), root.Raw) {
		t.Errorf("got %v, %v", got, err)
	}
}

// Stopping ends what would go on for ever, and soon.
func TestStop(t *testing.T) {
	s := serve(t)
	conn := s.dial(t, s.joined(t, "a"))
	stream, err := watchpb.NewWatchClient(conn).Watch(t.Context(), &watchpb.WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	s.stop()
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("took %s", took)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("got %v", err)
	}
	var refused *net.OpError
	if conn, err := net.Dial("tcp", s.address); err == nil || !errors.As(err, &refused) {
		t.Errorf("still listening: %v, %v", conn, err)
	}
}
