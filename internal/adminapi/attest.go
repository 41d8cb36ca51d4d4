package adminapi

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/spirewire"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/agentpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/authority/nodeattest"
	"github.com/spiffe-node/spiffe-node/pkg/authority/nodeattest/jointoken"
)

const (
	// attestTimeout bounds a whole attestation: anybody can start one.
	attestTimeout = time.Minute
	// maxAgentVersion is in bytes.
	maxAgentVersion = 255
)

// nodeAgents is the Agent service where agents can attest.
type nodeAgents struct {
	agentService
	nodes *Nodes
}

// AttestAgent attests an agent and signs its SVID.
func (s *nodeAgents) AttestAgent(stream grpc.BidiStreamingServer[agentpb.AttestAgentRequest, agentpb.AttestAgentResponse]) error {
	ctx, cancel := context.WithTimeout(stream.Context(), attestTimeout)
	defer cancel()
	if err := s.nodes.limits.attest.wait(ctx, 1); err != nil {
		return err
	}
	talk := &conversation{ctx: ctx, stream: stream}
	params, err := talk.open()
	if err != nil {
		return err
	}
	kind := params.GetData().GetType()
	attestor, ok := s.nodes.attestors[kind]
	if !ok {
		s.nodes.cfg.Metrics.attestations.WithLabelValues("other", "invalid").Inc()
		return fail(codes.FailedPrecondition, "error getting node attestor", fmt.Errorf("could not find node attestor type %q", kind))
	}
	agent, issued, err := s.attest(ctx, attestor, params, talk.challenge)
	s.nodes.cfg.Metrics.attestations.WithLabelValues(kind, attestOutcome(err)).Inc()
	attrs := []slog.Attr{slog.String("attestation_type", kind)}
	if agent != nil {
		attrs = append(attrs, slog.String("agent_id", agent.ID.String()), slog.String("serial", agent.Serial), slog.Time("expires_at", agent.ExpiresAt))
	}
	audit(ctx, "attest agent", err, attrs...)
	if err != nil {
		return err
	}
	return stream.Send(&agentpb.AttestAgentResponse{Step: &agentpb.AttestAgentResponse_Result_{Result: &agentpb.AttestAgentResponse_Result{
		Svid:         svidToWire(agent.ID, issued),
		Reattestable: agent.CanReattest,
	}}})
}

func attestOutcome(err error) string {
	switch status.Code(err) {
	case codes.OK:
		return "ok"
	case codes.InvalidArgument:
		return "invalid"
	case codes.PermissionDenied:
		return "denied"
	default:
		return "error"
	}
}

// attest has the proof judged, signs the agent's SVID and records the agent. A
// record is there before the agent knows its SVID.
func (s *nodeAgents) attest(ctx context.Context, attestor NodeAttestor, params *agentpb.AttestAgentRequest_Params, challenge func([]byte) ([]byte, error)) (*embedded.Agent, *authority.X509Issued, error) {
	result, err := attestor.Attest(nodeattest.WithCaller(ctx, callerOf(ctx).address), params.GetData().GetPayload(), challenge)
	if err != nil {
		return nil, nil, attestFailure(attestor.Type(), err)
	}
	id := result.AgentID
	if prefix := "/spire/agent/" + attestor.Type() + "/"; !id.MemberOf(s.td) || !strings.HasPrefix(id.Path(), prefix) {
		return nil, nil, fail(codes.Internal, "failed to attest", fmt.Errorf("attestor %s named agent %q", attestor.Type(), id))
	}
	store := s.nodes.cfg.Authority
	if known, err := store.Agent(id); err == nil && known.Banned {
		return nil, nil, errBanned()
	}
	issued, err := store.SignAgent(ctx, id, params.GetParams().GetCsr())
	if err != nil {
		return nil, nil, signFailure(err)
	}
	serial, err := serialOf(issued)
	if err != nil {
		return nil, nil, err
	}
	agent, err := store.UpsertAgent(ctx, &embedded.Agent{
		ID: id, AttestationType: attestor.Type(), Serial: serial, ExpiresAt: issued.NotAfter,
		Selectors: result.Selectors, CanReattest: result.Reattestable,
	})
	switch {
	case errors.Is(err, embedded.ErrPrecondition):
		return nil, nil, errBanned()
	case err != nil:
		return nil, nil, fail(codes.Internal, "failed to record agent", err)
	}
	return agent, issued, nil
}

func errBanned() error { return fail(codes.PermissionDenied, "failed to attest: agent is banned", nil) }

// attestFailure is the answer to what an attestor said. join_token is part of
// the server itself, every other type a plugin of that name.
func attestFailure(kind string, err error) error {
	code := codes.Internal
	switch {
	case errors.Is(err, nodeattest.ErrInvalid):
		code = codes.InvalidArgument
	case errors.Is(err, nodeattest.ErrDenied):
		code = codes.PermissionDenied
	case status.Code(err) != codes.Unknown:
		return err // from the stream
	}
	if kind == jointoken.Type {
		return fail(code, err.Error(), nil)
	}
	return fail(code, fmt.Sprintf("nodeattestor(%s): %s", kind, err), nil)
}

// signFailure is the answer when an agent's CSR could not be signed. The
// authority's texts about requests are the server's.
func signFailure(err error) error {
	if errors.Is(err, embedded.ErrInvalid) {
		return invalid(err.Error(), nil)
	}
	return fail(codes.Internal, "failed to sign X509-SVID", err)
}

func serialOf(issued *authority.X509Issued) (string, error) {
	leaf, err := x509.ParseCertificate(issued.Chain[0])
	if err != nil {
		return "", fail(codes.Internal, "failed to read the X509-SVID that was signed", err)
	}
	return leaf.SerialNumber.String(), nil
}

func svidToWire(id spiffeid.ID, issued *authority.X509Issued) *typespb.X509SVID {
	return &typespb.X509SVID{CertChain: issued.Chain, Id: spirewire.IDToWire(id), ExpiresAt: issued.NotAfter.Unix()}
}

// conversation is the server's side of an attestation. An agent that falls
// silent does not hold it for longer than the context lives.
type conversation struct {
	ctx    context.Context
	stream grpc.BidiStreamingServer[agentpb.AttestAgentRequest, agentpb.AttestAgentResponse]
}

// open receives the first message and checks that it is complete.
func (c *conversation) open() (*agentpb.AttestAgentRequest_Params, error) {
	req, err := c.receive()
	if err != nil {
		return nil, err
	}
	params := req.GetParams()
	var missing string
	switch {
	case params == nil:
		missing = "missing params"
	case params.GetData() == nil:
		missing = "missing attestation data"
	case params.GetParams() == nil:
		missing = "missing X509-SVID parameters"
	case len(params.GetParams().GetCsr()) == 0:
		missing = "missing CSR"
	case params.GetData().GetType() == "":
		missing = "missing attestation data type"
	case len(params.GetData().GetPayload()) == 0:
		missing = "missing attestation data payload"
	default:
		return params, nil
	}
	return nil, invalid("malformed param", errors.New(missing))
}

func (c *conversation) challenge(data []byte) ([]byte, error) {
	if err := c.stream.Send(&agentpb.AttestAgentResponse{Step: &agentpb.AttestAgentResponse_Challenge{Challenge: data}}); err != nil {
		return nil, err
	}
	req, err := c.receive()
	if err != nil {
		return nil, err
	}
	return req.GetChallengeResponse(), nil
}

func (c *conversation) receive() (*agentpb.AttestAgentRequest, error) {
	type message struct {
		req *agentpb.AttestAgentRequest
		err error
	}
	got := make(chan message, 1)
	// It ends with the stream, which ends with the handler.
	go func() {
		req, err := c.stream.Recv()
		got <- message{req, err}
	}()
	select {
	case m := <-got:
		switch {
		case errors.Is(m.err, io.EOF):
			return nil, invalid("failed to receive request from stream", io.EOF)
		case m.err != nil:
			return nil, m.err
		}
		return m.req, nil
	case <-c.ctx.Done():
		return nil, fail(codes.DeadlineExceeded, "the agent did not continue its attestation in time", nil)
	}
}

// RenewAgent signs another SVID for an agent that cannot attest again. Both
// count until the new one is used.
func (s *nodeAgents) RenewAgent(ctx context.Context, req *agentpb.RenewAgentRequest) (_ *agentpb.RenewAgentResponse, err error) {
	if err := s.nodes.limits.x509.wait(ctx, 1); err != nil {
		return nil, err
	}
	c := callerOf(ctx)
	if c.agent == nil {
		return nil, fail(codes.NotFound, "agent not found", nil)
	}
	defer func() { audit(ctx, "renew agent", err, slog.String("agent_id", c.id.String())) }()
	switch {
	case c.agent.CanReattest:
		st := status.New(codes.PermissionDenied, "agent must reattest instead of renew")
		return nil, withReason(st, typespb.PermissionDeniedDetails_AGENT_MUST_REATTEST)
	case req.GetParams() == nil:
		return nil, invalid("params cannot be nil", nil)
	case len(req.GetParams().GetCsr()) == 0:
		return nil, invalid("missing CSR", nil)
	}
	store := s.nodes.cfg.Authority
	issued, err := store.SignAgent(ctx, c.id, req.GetParams().GetCsr())
	if err != nil {
		return nil, signFailure(err)
	}
	serial, err := serialOf(issued)
	if err != nil {
		return nil, err
	}
	_, err = store.UpdateAgent(ctx, c.id, func(a *embedded.Agent) error {
		// Banned, or attested anew, while this was signed.
		if a.Banned || !promote(a, c.serial()) {
			return errAgent(agentpb.Agent_RenewAgent_FullMethodName, typespb.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
		}
		a.NewSerial, a.NewExpiresAt = serial, issued.NotAfter
		return nil
	})
	switch {
	case err == nil:
	case errors.Is(err, embedded.ErrNotFound), status.Code(err) == codes.PermissionDenied:
		return nil, agentGone(err)
	default:
		return nil, fail(codes.Internal, "failed to record agent", err)
	}
	s.nodes.cfg.Metrics.renewals.Inc()
	return &agentpb.RenewAgentResponse{Svid: svidToWire(c.id, issued)}, nil
}

// agentGone is what an update says when the agent was evicted or replaced
// meanwhile.
func agentGone(err error) error {
	if errors.Is(err, embedded.ErrNotFound) {
		return fail(codes.NotFound, "agent not found", nil)
	}
	return err
}

// PostStatus takes down the version of an agent.
func (s *nodeAgents) PostStatus(ctx context.Context, req *agentpb.PostStatusRequest) (*agentpb.PostStatusResponse, error) {
	if err := s.nodes.limits.status.wait(ctx, 1); err != nil {
		return nil, err
	}
	version := req.GetAgentVersion()
	if len(version) > maxAgentVersion {
		return nil, invalidf("agent version is too long (max %d characters)", maxAgentVersion)
	}
	c := callerOf(ctx)
	if c.agent == nil {
		return nil, fail(codes.NotFound, "agent not found", nil)
	}
	if version == "" || version == c.agent.Version {
		return &agentpb.PostStatusResponse{}, nil
	}
	_, err := s.nodes.cfg.Authority.UpdateAgent(ctx, c.id, func(a *embedded.Agent) error {
		a.Version = version
		return nil
	})
	switch {
	case errors.Is(err, embedded.ErrNotFound):
		return nil, agentGone(err)
	case err != nil:
		return nil, fail(codes.Internal, "failed to update agent", err)
	}
	return &agentpb.PostStatusResponse{}, nil
}

// CreateJoinToken makes a token, and the alias entry if an ID is asked for. The
// token is no part of the record of this.
func (s *nodeAgents) CreateJoinToken(ctx context.Context, req *agentpb.CreateJoinTokenRequest) (_ *typespb.JoinToken, err error) {
	var alias spiffeid.ID
	defer func() {
		audit(ctx, "create join token", err, slog.String("alias", alias.String()), slog.Int("ttl_seconds", int(req.GetTtl())))
	}()
	if _, ok := s.nodes.attestors[jointoken.Type]; !ok {
		return nil, fail(codes.FailedPrecondition, "attestation by join_token is switched off here", nil)
	}
	if req.GetTtl() < 1 {
		return nil, invalid("ttl is required, you must provide one", nil)
	}
	if req.GetAgentId() != nil {
		if alias, err = workloadID(s.td, req.GetAgentId()); err != nil {
			return nil, invalid("invalid agent ID", err)
		}
	}
	const message = "failed to create token"
	token, err := s.nodes.cfg.Authority.CreateJoinToken(ctx, req.GetToken(), spirewire.SecondsFromWire(req.GetTtl()), alias)
	switch {
	case errors.Is(err, embedded.ErrInvalid):
		return nil, invalid(message, err)
	case err != nil:
		return nil, fail(codes.Internal, message, err)
	}
	return &typespb.JoinToken{Value: token.Value, ExpiresAt: token.ExpiresAt.Unix()}, nil
}
