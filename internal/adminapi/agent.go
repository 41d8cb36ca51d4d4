package adminapi

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/spiffe-node/spiffe-node/internal/spirewire"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/agentpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// agentService is spire.api.server.agent.v1.Agent without attestation.
type agentService struct {
	agentpb.UnimplementedAgentServer
	td    spiffeid.TrustDomain
	local spiffeid.ID // the agent in this process, if there is one
	store agentStore
}

const errNoAttestation = "this authority serves only the agent it runs in and attests no other"

// expiresLayout is how the filter spells a time.
const expiresLayout = "2006-01-02 15:04:05 -0700 -07"

func (s *agentService) CountAgents(_ context.Context, req *agentpb.CountAgentsRequest) (*agentpb.CountAgentsResponse, error) {
	in := req.GetFilter()
	keep, err := readAgentFilter("failed to count agents", &agentpb.ListAgentsRequest_Filter{
		ByAttestationType: in.GetByAttestationType(), BySelectorMatch: in.GetBySelectorMatch(),
		ByBanned: in.GetByBanned(), ByCanReattest: in.GetByCanReattest(), ByExpiresBefore: in.GetByExpiresBefore(),
	})
	if err != nil {
		return nil, err
	}
	resp := &agentpb.CountAgentsResponse{}
	for a := range s.store.Agents() {
		if keep(a) {
			resp.Count++
		}
	}
	return resp, nil
}

func (s *agentService) ListAgents(_ context.Context, req *agentpb.ListAgentsRequest) (*agentpb.ListAgentsResponse, error) {
	const message = "failed to list agents"
	keep, err := readAgentFilter(message, req.GetFilter())
	if err != nil {
		return nil, err
	}
	p, err := readPage(req.GetPageSize(), req.GetPageToken())
	if err != nil {
		return nil, fail(codes.Internal, message, err)
	}
	var kept []*embedded.Agent
	for a := range s.store.Agents() {
		if keep(a) {
			kept = append(kept, a)
		}
	}
	items, last := cut(p, kept, func(a *embedded.Agent) int64 { return a.Row })
	mask := newMasker(req.GetOutputMask())
	resp := &agentpb.ListAgentsResponse{NextPageToken: p.next(len(items), last)}
	for _, a := range items {
		out := agentToWire(a)
		mask.apply(out)
		resp.Agents = append(resp.Agents, out)
	}
	return resp, nil
}

func (s *agentService) GetAgent(_ context.Context, req *agentpb.GetAgentRequest) (*typespb.Agent, error) {
	a, err := s.find(req.GetId())
	if err != nil {
		return nil, err
	}
	out := agentToWire(a)
	newMasker(req.GetOutputMask()).apply(out)
	return out, nil
}

func (s *agentService) find(in *typespb.SPIFFEID) (*embedded.Agent, error) {
	id, err := agentID(s.td, in)
	if err != nil {
		return nil, invalid("invalid agent ID", err)
	}
	a, err := s.store.Agent(id)
	return a, agentFailure("failed to fetch agent", err)
}

func agentFailure(message string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, embedded.ErrNotFound):
		return fail(codes.NotFound, "agent not found", nil)
	}
	return fail(codes.Internal, message, err)
}

func (s *agentService) DeleteAgent(ctx context.Context, req *agentpb.DeleteAgentRequest) (*emptypb.Empty, error) {
	id, err := s.target(req.GetId())
	if err == nil {
		err = agentFailure("failed to remove agent", s.store.DeleteAgent(ctx, id))
	}
	audit(ctx, "delete agent", err, slog.String("agent_id", id.String()))
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

func (s *agentService) BanAgent(ctx context.Context, req *agentpb.BanAgentRequest) (*emptypb.Empty, error) {
	id, err := s.target(req.GetId())
	if err == nil {
		_, err = s.store.BanAgent(ctx, id)
		err = agentFailure("failed to ban agent", err)
	}
	audit(ctx, "ban agent", err, slog.String("agent_id", id.String()))
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

// target is the agent to ban or delete. The agent in this process is refused:
// it would be back at once, or the authority would have banned itself.
func (s *agentService) target(in *typespb.SPIFFEID) (spiffeid.ID, error) {
	a, err := s.find(in)
	if err != nil {
		return spiffeid.ID{}, err
	}
	if a.ID == s.local {
		return a.ID, fail(codes.FailedPrecondition, "agent "+a.ID.String()+" is this process, which is also the authority: stop it instead", nil)
	}
	return a.ID, nil
}

func (s *agentService) AttestAgent(grpc.BidiStreamingServer[agentpb.AttestAgentRequest, agentpb.AttestAgentResponse]) error {
	return fail(codes.Unimplemented, errNoAttestation, nil)
}

func (s *agentService) CreateJoinToken(context.Context, *agentpb.CreateJoinTokenRequest) (*typespb.JoinToken, error) {
	return nil, fail(codes.Unimplemented, errNoAttestation, nil)
}

// readAgentFilter makes one test of all conditions that are set.
func readAgentFilter(message string, in *agentpb.ListAgentsRequest_Filter) (func(*embedded.Agent) bool, error) {
	var selectors entry.Filter
	if in.GetBySelectorMatch() != nil {
		f, err := readSelectorFilter(in.GetBySelectorMatch())
		switch {
		case errors.Is(err, errEmptySelectors):
			return nil, fail(codes.Internal, message, errors.New("cannot list by empty selectors set"))
		case err != nil:
			return nil, invalid("failed to parse selectors", err)
		case !known(f.Mode):
			return nil, fail(codes.Internal, message, unhandled("", f.Mode))
		}
		selectors.Selectors = f
	}
	// Text that is no time does not filter; that is what the server does.
	before, err := time.Parse(expiresLayout, in.GetByExpiresBefore())
	byTime := err == nil
	return func(a *embedded.Agent) bool {
		return (in.GetByAttestationType() == "" || a.AttestationType == in.GetByAttestationType()) &&
			(in.GetByBanned() == nil || a.Banned == in.GetByBanned().GetValue()) &&
			(in.GetByCanReattest() == nil || a.CanReattest == in.GetByCanReattest().GetValue()) &&
			(!byTime || a.ExpiresAt.Before(before)) &&
			selectors.Keep(&entry.Entry{Selectors: a.Selectors})
	}, nil
}

func agentToWire(a *embedded.Agent) *typespb.Agent {
	return &typespb.Agent{
		Id:                   spirewire.IDToWire(a.ID),
		AttestationType:      a.AttestationType,
		X509SvidSerialNumber: a.Serial,
		X509SvidExpiresAt:    spirewire.TimeToWire(a.ExpiresAt),
		Selectors:            spirewire.SelectorsToWire(a.Selectors),
		Banned:               a.Banned,
		CanReattest:          a.CanReattest,
		AgentVersion:         a.Version,
	}
}
