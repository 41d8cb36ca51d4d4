package adminapi

import (
	"context"
	"math"

	"google.golang.org/grpc/codes"

	"github.com/spiffe-node/spiffe-node/internal/adminapi/inspectpb"
	"github.com/spiffe-node/spiffe-node/internal/watchpb"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

// ReportTrust takes the calling agent's word on how far the own trust bundle has
// got on its node.
func (s *watchService) ReportTrust(ctx context.Context, req *watchpb.TrustReport) (*watchpb.TrustReportResponse, error) {
	c := callerOf(ctx)
	if c.agent == nil {
		return nil, errDenied(watchpb.Watch_ReportTrust_FullMethodName)
	}
	if err := s.nodes.limits.report.wait(ctx, 1); err != nil {
		return nil, err
	}
	s.nodes.cfg.Authority.ReportTrust(c.agent.ID, authority.TrustReport{
		X509: progressFromWire(req.GetX509()), JWT: progressFromWire(req.GetJwt()), Outdated: small(req.GetOutdatedSvids()),
	})
	return &watchpb.TrustReportResponse{}, nil
}

func progressFromWire(in *watchpb.TrustProgress) authority.TrustProgress {
	out := authority.TrustProgress{Held: in.GetHeld(), Acknowledged: in.GetAcknowledged(), Consumers: small(in.GetConsumers()), Lagging: small(in.GetLagging())}
	for _, l := range in.GetLaggards()[:min(len(in.GetLaggards()), authority.MaxReportedLaggards)] {
		out.Laggards = append(out.Laggards, authority.Laggard{Name: l.GetName(), API: l.GetApi(), Rejected: l.GetRejected()})
	}
	return out
}

// small is a number that many of can be added up.
func small(n int64) int { return int(min(max(n, 0), math.MaxInt32)) }

// rotationService is spiffe.node.inspect.v1.Rotation.
type rotationService struct {
	inspectpb.UnimplementedRotationServer
	keys keyRotator
}

// Show is how the signing keys stand and who has acknowledged the next ones.
func (s *rotationService) Show(context.Context, *inspectpb.ShowRotationRequest) (*inspectpb.ShowRotationResponse, error) {
	all := s.keys.Rotations()
	if len(all) == 0 {
		return nil, fail(codes.Unavailable, "server is initializing", nil)
	}
	resp := &inspectpb.ShowRotationResponse{}
	for _, r := range all {
		resp.Rotations = append(resp.Rotations, rotationToWire(r))
	}
	return resp, nil
}

func rotationToWire(r embedded.Rotation) *inspectpb.KeyRotation {
	key := func(a *embedded.LocalAuthority) *inspectpb.KeyRotation_Key {
		if a == nil {
			return nil
		}
		return &inspectpb.KeyRotation_Key{Id: a.ID, ExpiresAt: stamp(a.ExpiresAt), UpstreamId: a.UpstreamID}
	}
	p := r.Progress
	out := &inspectpb.KeyRotation{
		Kind: r.Kind, Active: key(&r.Authorities.Active), Prepared: key(r.Authorities.Prepared), Old: key(r.Authorities.Old),
		NextStep: r.NextStep, NextAt: stamp(r.NextAt), Deadline: stamp(r.Deadline), Delayed: r.Delayed,
		Agents: int64(p.Agents), AgentsAcknowledged: int64(p.Acknowledged), AgentsSilent: int64(p.Silent), AgentsLagging: int64(p.Lagging),
		Consumers: int64(p.Consumers), ConsumersLagging: int64(p.LaggingConsumers), OutdatedSvids: int64(p.Outdated),
	}
	if out.Old != nil {
		out.Old.Tainted, out.Old.Revoked = r.OldTainted, r.OldRevoked
	}
	for _, l := range p.Laggards {
		out.Laggards = append(out.Laggards, &inspectpb.KeyRotation_LaggingAgent{
			AgentId: l.ID.String(), Why: l.Why, Consumers: int64(l.Consumers), Laggards: laggardsToWire(l.Laggards),
		})
	}
	return out
}

func laggardsToWire(in []authority.Laggard) (out []*inspectpb.Laggard) {
	for _, l := range in {
		out = append(out, &inspectpb.Laggard{Name: l.Name, Api: l.API, Rejected: l.Rejected})
	}
	return out
}

func spreadToWire(p authority.TrustProgress) *inspectpb.Spread {
	return &inspectpb.Spread{
		Held: p.Held, Acknowledged: p.Acknowledged, Consumers: int64(p.Consumers), Lagging: int64(p.Lagging), Laggards: laggardsToWire(p.Laggards),
	}
}
