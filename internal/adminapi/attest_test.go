package adminapi_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/adminapi"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/agentpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/authority/nodeattest/jointoken"
)

// params is a first message.
func params(kind, payload string, csr []byte) *agentpb.AttestAgentRequest {
	return &agentpb.AttestAgentRequest{Step: &agentpb.AttestAgentRequest_Params_{Params: &agentpb.AttestAgentRequest_Params{
		Data: &typespb.AttestationData{Type: kind, Payload: []byte(payload)}, Params: &agentpb.AgentX509SVIDParams{Csr: csr},
	}}}
}

// converse sends messages, closes and returns how it ended.
func converse(t *testing.T, conn *grpc.ClientConn, messages ...*agentpb.AttestAgentRequest) error {
	t.Helper()
	stream, err := agentpb.NewAgentClient(conn).AttestAgent(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range messages {
		if err := stream.Send(m); err != nil {
			break // the answer says why
		}
	}
	_ = stream.CloseSend()
	for {
		if _, err := stream.Recv(); err != nil {
			return err
		}
	}
}

func TestAttestationIsChecked(t *testing.T) {
	s := serve(t)
	conn := s.dial(t, identity{})
	_, csr := keyAndCSR(t)
	badCSR := bytes.Clone(csr)
	badCSR[len(badCSR)-1] ^= 1
	for _, name := range []string{"bad-csr", "bad-signature"} {
		if _, err := s.CreateJoinToken(t.Context(), name, time.Minute, spiffeid.ID{}); err != nil {
			t.Fatal(err)
		}
	}
	set := func(edit func(*agentpb.AttestAgentRequest_Params)) *agentpb.AttestAgentRequest {
		m := params("join_token", "t", csr)
		edit(m.GetParams())
		return m
	}
	invalid := int32(codes.InvalidArgument)
	for name, tc := range map[string]struct {
		messages []*agentpb.AttestAgentRequest
		want     want
	}{
		"nothing":           {nil, want{invalid, "failed to receive request from stream: EOF"}},
		"empty message":     {[]*agentpb.AttestAgentRequest{{}}, want{invalid, "malformed param: missing params"}},
		"challenge first":   {[]*agentpb.AttestAgentRequest{{Step: &agentpb.AttestAgentRequest_ChallengeResponse{}}}, want{invalid, "malformed param: missing params"}},
		"no data":           {[]*agentpb.AttestAgentRequest{set(func(p *agentpb.AttestAgentRequest_Params) { p.Data = nil })}, want{invalid, "malformed param: missing attestation data"}},
		"no params":         {[]*agentpb.AttestAgentRequest{set(func(p *agentpb.AttestAgentRequest_Params) { p.Params = nil })}, want{invalid, "malformed param: missing X509-SVID parameters"}},
		"no CSR":            {[]*agentpb.AttestAgentRequest{params("join_token", "t", nil)}, want{invalid, "malformed param: missing CSR"}},
		"no type":           {[]*agentpb.AttestAgentRequest{params("", "t", csr)}, want{invalid, "malformed param: missing attestation data type"}},
		"no payload":        {[]*agentpb.AttestAgentRequest{params("join_token", "", csr)}, want{invalid, "malformed param: missing attestation data payload"}},
		"unknown type":      {[]*agentpb.AttestAgentRequest{params("x", "t", csr)}, want{int32(codes.FailedPrecondition), `error getting node attestor: could not find node attestor type "x"`}},
		"unknown token":     {[]*agentpb.AttestAgentRequest{params("join_token", "t", csr)}, want{invalid, "failed to attest: join token does not exist or has already been used"}},
		"unreadable CSR":    {[]*agentpb.AttestAgentRequest{params("join_token", "bad-csr", []byte("x"))}, want{invalid, "failed to parse CSR: *"}},
		"unsigned CSR":      {[]*agentpb.AttestAgentRequest{params("join_token", "bad-signature", badCSR)}, want{invalid, "failed to verify CSR signature: *"}},
		"denied":            {[]*agentpb.AttestAgentRequest{params("knock", "denied", csr)}, want{int32(codes.PermissionDenied), "nodeattestor(knock): not you"}},
		"fault":             {[]*agentpb.AttestAgentRequest{params("knock", "broken", csr)}, want{int32(codes.Internal), "nodeattestor(knock): no answer"}},
		"other namespace":   {[]*agentpb.AttestAgentRequest{params("knock", "stranger", csr)}, want{int32(codes.Internal), "failed to attest: attestor knock named agent *"}},
		"panic":             {[]*agentpb.AttestAgentRequest{params("knock", "panic", csr)}, want{int32(codes.Internal), "internal error*"}},
		"no answer":         {[]*agentpb.AttestAgentRequest{params("knock", "n", csr)}, want{invalid, "failed to receive request from stream: EOF"}},
		"wrong answer":      {[]*agentpb.AttestAgentRequest{params("knock", "n", csr), {}}, want{invalid, "nodeattestor(knock): wrong answer"}},
		"params again":      {[]*agentpb.AttestAgentRequest{params("knock", "n", csr), params("knock", "n", csr)}, want{invalid, "nodeattestor(knock): wrong answer"}},
		"payload as a path": {[]*agentpb.AttestAgentRequest{params("join_token", "../x", csr)}, want{invalid, "failed to attest: join token does not exist or has already been used"}},
	} {
		t.Run(name, func(t *testing.T) { tc.want.checkError(t, converse(t, conn, tc.messages...)) })
	}
	if n := s.AgentCount(); n != 0 {
		t.Errorf("%d agents got in", n)
	}
}

func TestJoinTokens(t *testing.T) {
	s := serve(t)
	socket := start(t, adminapi.Config{Authority: s.Authority, Nodes: s.nodes})
	local := agentpb.NewAgentClient(dial(t, socket))
	for name, tc := range map[string]struct {
		req  *agentpb.CreateJoinTokenRequest
		want want
	}{
		"no ttl":        {&agentpb.CreateJoinTokenRequest{}, want{int32(codes.InvalidArgument), "ttl is required, you must provide one"}},
		"negative":      {&agentpb.CreateJoinTokenRequest{Ttl: -1}, want{int32(codes.InvalidArgument), "ttl is required, you must provide one"}},
		"bad alias":     {&agentpb.CreateJoinTokenRequest{Ttl: 60, AgentId: id("td", "/spire/server")}, want{int32(codes.InvalidArgument), "invalid agent ID: *"}},
		"foreign alias": {&agentpb.CreateJoinTokenRequest{Ttl: 60, AgentId: id("o", "/x")}, want{int32(codes.InvalidArgument), "invalid agent ID: *"}},
		"made":          {&agentpb.CreateJoinTokenRequest{Ttl: 60, Token: "mine", AgentId: id("td", "/alias")}, ok},
		"as a path":     {&agentpb.CreateJoinTokenRequest{Ttl: 60, Token: "a/b"}, want{int32(codes.InvalidArgument), "failed to create token: *"}},
	} {
		_, err := local.CreateJoinToken(t.Context(), tc.req)
		t.Run(name, func(t *testing.T) { tc.want.checkError(t, err) })
	}
	_, err := local.CreateJoinToken(t.Context(), &agentpb.CreateJoinTokenRequest{Ttl: 60, Token: "mine"})
	want{int32(codes.Internal), "failed to create token: datastore-sql: UNIQUE constraint failed: join_tokens.token"}.checkError(t, err)

	agent, again, err := s.attestWith(t, "join_token", "mine")
	if err != nil || again || agent.id.String() != "spiffe://td/spire/agent/join_token/mine" || len(agent.chain) != 1 {
		t.Fatalf("%s, %t, %d certificates, %v", agent.id, again, len(agent.chain), err)
	}
	_, _, err = s.attestWith(t, "join_token", "mine")
	want{int32(codes.InvalidArgument), "failed to attest: join token does not exist or has already been used"}.checkError(t, err)
	// The alias is delivered, and so are entries below it.
	s.entry(t, spiffeid.RequireFromString("spiffe://td/alias"), "/w")
	got, err := entrypb.NewEntryClient(s.dial(t, agent)).GetAuthorizedEntries(t.Context(), &entrypb.GetAuthorizedEntriesRequest{})
	if err != nil || len(got.GetEntries()) != 2 {
		t.Errorf("authorized for %v, %v", got.GetEntries(), err)
	}
	list, err := local.ListAgents(t.Context(), &agentpb.ListAgentsRequest{})
	if err != nil || len(list.GetAgents()) != 1 || list.GetAgents()[0].GetAttestationType() != "join_token" || list.GetAgents()[0].GetCanReattest() {
		t.Errorf("listed %v, %v", list.GetAgents(), err)
	}
	// Eviction takes the alias along; the token stays used.
	if _, err := local.DeleteAgent(t.Context(), &agentpb.DeleteAgentRequest{Id: id("td", agent.id.Path())}); err != nil {
		t.Fatal(err)
	}
	if n := s.Set().Len(); n != 1 {
		t.Errorf("%d entries left", n)
	}

	if _, err := local.CreateJoinToken(t.Context(), &agentpb.CreateJoinTokenRequest{Ttl: 1, Token: "late"}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(1100 * time.Millisecond)
	for _, text := range []string{"join token expired", "failed to attest: join token does not exist or has already been used"} {
		_, _, err = s.attestWith(t, "join_token", "late")
		want{int32(codes.InvalidArgument), text}.checkError(t, err)
	}
}

// Of many agents with one token one gets in.
func TestJoinTokenRace(t *testing.T) {
	s := serve(t)
	if _, err := s.CreateJoinToken(t.Context(), "once", time.Minute, spiffeid.ID{}); err != nil {
		t.Fatal(err)
	}
	_, csr := keyAndCSR(t)
	conn := s.dial(t, identity{})
	var in atomic.Int32
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			if errors.Is(converse(t, conn, params("join_token", "once", csr)), io.EOF) {
				in.Add(1)
			}
		})
	}
	wg.Wait()
	if n := in.Load(); n != 1 {
		t.Errorf("%d agents got in", n)
	}
}

// Agents may attest over the socket too, as on the server; without Nodes an
// authority says that it attests nobody.
func TestAttestationOnTheSocket(t *testing.T) {
	s := serve(t)
	_, csr := keyAndCSR(t)
	if _, err := s.CreateJoinToken(t.Context(), "t", time.Minute, spiffeid.ID{}); err != nil {
		t.Fatal(err)
	}
	if err := converse(t, dial(t, start(t, adminapi.Config{Authority: s.Authority, Nodes: s.nodes})), params(jointoken.Type, "t", csr)); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
	err := converse(t, dial(t, start(t, adminapi.Config{Authority: s.Authority})), params(jointoken.Type, "t", csr))
	if status.Code(err) != codes.Unimplemented {
		t.Error(err)
	}
}

// A renewed SVID and the one before it both count until the new one is used.
func TestRenewalHasTwoPhases(t *testing.T) {
	s := serve(t)
	first := s.joined(t, "a")
	renew := func(as identity) identity {
		t.Helper()
		key, csr := keyAndCSR(t)
		resp, err := agentpb.NewAgentClient(s.dial(t, as)).RenewAgent(t.Context(), &agentpb.RenewAgentRequest{Params: &agentpb.AgentX509SVIDParams{Csr: csr}})
		if err != nil {
			t.Fatal(err)
		}
		return identity{as.id, resp.GetSvid().GetCertChain(), key}
	}
	get := func(as identity) error {
		_, err := entrypb.NewEntryClient(s.dial(t, as)).GetAuthorizedEntries(t.Context(), &entrypb.GetAuthorizedEntriesRequest{})
		return err
	}
	const method = entrypb.Entry_GetAuthorizedEntries_FullMethodName
	lost := renew(first)
	second := renew(first) // replaces the one that never arrived
	if err := get(first); err != nil {
		t.Errorf("the old SVID before the new one is used: %v", err)
	}
	wantDenied(t, get(lost), method, typespb.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
	// Many first uses at once are one.
	var wg sync.WaitGroup
	conn := s.dial(t, second)
	for range 8 {
		wg.Go(func() {
			if _, err := entrypb.NewEntryClient(conn).GetAuthorizedEntries(context.Background(), &entrypb.GetAuthorizedEntriesRequest{}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	wantDenied(t, get(first), method, typespb.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
	record, err := s.Agent(first.id)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(second.chain[0])
	if err != nil {
		t.Fatal(err)
	}
	if record.Serial != cert.SerialNumber.String() || record.NewSerial != "" || !record.ExpiresAt.Equal(cert.NotAfter) {
		t.Errorf("recorded %+v", record)
	}
}

// fullDisk records nothing while it is full.
type fullDisk struct {
	*embedded.Authority
	full atomic.Bool
}

func (d *fullDisk) UpdateAgent(ctx context.Context, id spiffeid.ID, edit func(*embedded.Agent) error) (*embedded.Agent, error) {
	return d.Authority.UpdateAgent(ctx, id, func(a *embedded.Agent) error {
		if err := edit(a); err != nil || !d.full.Load() {
			return err
		}
		return errors.New("disk is full")
	})
}

// A full disk locks no agent out: a renewed SVID counts though its use cannot be
// recorded.
func TestRenewalOnAFullDisk(t *testing.T) {
	disk := &fullDisk{}
	s := serve(t, func(s *settings) { s.disk = disk })
	first := s.joined(t, "a")
	key, csr := keyAndCSR(t)
	renew := &agentpb.RenewAgentRequest{Params: &agentpb.AgentX509SVIDParams{Csr: csr}}
	resp, err := agentpb.NewAgentClient(s.dial(t, first)).RenewAgent(t.Context(), renew)
	if err != nil {
		t.Fatal(err)
	}
	second := identity{first.id, resp.GetSvid().GetCertChain(), key}
	disk.full.Store(true)
	for _, as := range []identity{second, first, second} {
		if _, err := entrypb.NewEntryClient(s.dial(t, as)).GetAuthorizedEntries(t.Context(), &entrypb.GetAuthorizedEntriesRequest{}); err != nil {
			t.Error(err)
		}
	}
	_, err = agentpb.NewAgentClient(s.dial(t, second)).RenewAgent(t.Context(), renew)
	want{int32(codes.Internal), "failed to record agent: disk is full"}.checkError(t, err)
	disk.full.Store(false)
	if _, err = agentpb.NewAgentClient(s.dial(t, second)).RenewAgent(t.Context(), renew); err != nil {
		t.Error(err)
	}
}

func TestRenewalRefusals(t *testing.T) {
	s := serve(t)
	_, csr := keyAndCSR(t)
	full := &agentpb.RenewAgentRequest{Params: &agentpb.AgentX509SVIDParams{Csr: csr}}
	joined := agentpb.NewAgentClient(s.dial(t, s.joined(t, "a")))
	_, err := joined.RenewAgent(t.Context(), &agentpb.RenewAgentRequest{})
	want{int32(codes.InvalidArgument), "params cannot be nil"}.checkError(t, err)
	_, err = joined.RenewAgent(t.Context(), &agentpb.RenewAgentRequest{Params: &agentpb.AgentX509SVIDParams{}})
	want{int32(codes.InvalidArgument), "missing CSR"}.checkError(t, err)
	_, err = joined.RenewAgent(t.Context(), &agentpb.RenewAgentRequest{Params: &agentpb.AgentX509SVIDParams{Csr: []byte("x")}})
	want{int32(codes.InvalidArgument), "failed to parse CSR: *"}.checkError(t, err)
	again, _, err := s.attestWith(t, "knock", "n")
	if err != nil {
		t.Fatal(err)
	}
	_, err = agentpb.NewAgentClient(s.dial(t, again)).RenewAgent(t.Context(), full)
	want{int32(codes.PermissionDenied), "agent must reattest instead of renew"}.checkError(t, err)
	details := status.Convert(err).Details()
	if len(details) != 1 || details[0].(*typespb.PermissionDeniedDetails).GetReason() != typespb.PermissionDeniedDetails_AGENT_MUST_REATTEST {
		t.Errorf("details %v", details)
	}
}

func TestPostStatus(t *testing.T) {
	s := serve(t)
	agent := s.joined(t, "a")
	conn := agentpb.NewAgentClient(s.dial(t, agent))
	for _, tc := range []struct {
		version string
		want    want
		stored  string
	}{
		{"1.2.3", ok, "1.2.3"},
		{"", ok, "1.2.3"},
		{strings.Repeat("x", 255), ok, strings.Repeat("x", 255)},
		{strings.Repeat("x", 256), want{int32(codes.InvalidArgument), "agent version is too long (max 255 characters)"}, strings.Repeat("x", 255)},
	} {
		_, err := conn.PostStatus(t.Context(), &agentpb.PostStatusRequest{AgentVersion: tc.version})
		tc.want.checkError(t, err)
		if record, err := s.Agent(agent.id); err != nil || record.Version != tc.stored {
			t.Errorf("stored %+v, %v", record, err)
		}
	}
}

// Tokens are secrets until they are used: none is written down.
func TestTokensAreNotLogged(t *testing.T) {
	var log bytes.Buffer
	var mu sync.Mutex
	logger := slog.New(slog.NewTextHandler(locked{&mu, &log}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	s := serve(t, func(s *settings) {
		s.nodes.Logger, s.remote.Logger, s.embedded.Logger = logger, logger, logger
	})
	local := agentpb.NewAgentClient(dial(t, start(t, adminapi.Config{Authority: s.Authority, Nodes: s.nodes, Logger: logger})))
	if _, err := local.CreateJoinToken(t.Context(), &agentpb.CreateJoinTokenRequest{Ttl: 60, Token: "hush-hush"}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.attestWith(t, "join_token", "guessed-token"); err == nil {
		t.Fatal("guessed")
	}
	mu.Lock()
	defer mu.Unlock()
	if text := log.String(); strings.Contains(text, "hush-hush") || strings.Contains(text, "guessed-token") || !strings.Contains(text, "create join token") {
		t.Error(text)
	}
}

type locked struct {
	mu *sync.Mutex
	w  io.Writer
}

func (l locked) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

// talk is an agent that says what it is told to.
type talk struct {
	grpc.ServerStream
	ctx      context.Context
	messages []*agentpb.AttestAgentRequest
	result   *agentpb.AttestAgentResponse_Result
}

func (s *talk) Context() context.Context { return s.ctx }

func (s *talk) Recv() (*agentpb.AttestAgentRequest, error) {
	if len(s.messages) == 0 {
		return nil, io.EOF
	}
	m := s.messages[0]
	s.messages = s.messages[1:]
	return m, nil
}

func (s *talk) Send(r *agentpb.AttestAgentResponse) error {
	s.result = r.GetResult()
	return nil
}

// FuzzAttestation sends any first message and any answer: an agent gets in with
// an SVID and a record, or not at all.
func FuzzAttestation(f *testing.F) {
	_, csr := keyAndCSR(f)
	f.Add("join_token", []byte("t"), csr, []byte(nil))
	f.Add("knock", []byte("n"), csr, []byte("who is there?"))
	f.Add("knock", []byte("a/b"), csr, []byte("who is there?"))
	f.Add("", []byte{}, []byte{}, []byte{})
	a, err := embedded.Open(embedded.Config{TrustDomain: td, StatePath: filepath.Join(f.TempDir(), "state", "authority.db")})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = a.Close() })
	n, err := adminapi.NewNodes(adminapi.NodesConfig{TrustDomain: td, Authority: a, Attestors: []adminapi.NodeAttestor{jointoken.New(td, a), knock{}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, kind string, payload, csr, answer []byte) {
		if string(payload) == "panic" {
			t.Skip("recovered a layer above")
		}
		s := &talk{ctx: t.Context(), messages: []*agentpb.AttestAgentRequest{
			params(kind, string(payload), csr), {Step: &agentpb.AttestAgentRequest_ChallengeResponse{ChallengeResponse: answer}},
		}}
		err := n.AttestOver(s)
		if (err == nil) != (s.result != nil) {
			t.Fatalf("result %v, error %v", s.result, err)
		}
		if err == nil {
			if _, err := a.Agent(spiffeid.RequireFromPath(td, s.result.GetSvid().GetId().GetPath())); err != nil {
				t.Error(err)
			}
		}
	})
}
