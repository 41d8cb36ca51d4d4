package adminapi

import (
	"context"
	"errors"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/spiffe-node/spiffe-node/internal/adminapi/inspectpb"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

// RegisterInspect adds the Inspect service, and nothing else, to a server whose
// callers have been authorized.
func RegisterInspect(s grpc.ServiceRegistrar, source Source) {
	inspectpb.RegisterInspectServer(s, &inspectService{source: source})
}

// inspectService is spiffe.node.inspect.v1.Inspect.
type inspectService struct {
	inspectpb.UnimplementedInspectServer
	source Source
}

func (s *inspectService) Status(ctx context.Context, _ *inspectpb.StatusRequest) (*inspectpb.StatusResponse, error) {
	st, err := s.source.Status(ctx)
	if err != nil {
		return nil, fail(codes.Internal, "failed to read the agent's status", err)
	}
	out := &inspectpb.StatusResponse{
		TrustDomain:        st.TrustDomain,
		AgentId:            st.AgentID,
		Version:            st.Version,
		StartedAt:          stamp(st.StartedAt),
		Mode:               st.Mode,
		PeerIdentification: st.PeerIdentification,
		Authority: &inspectpb.StatusResponse_Authority{
			Kind:                   st.Authority.Kind,
			State:                  st.Authority.State,
			Detail:                 st.Authority.Detail,
			X509AuthorityId:        st.Authority.X509AuthorityID,
			X509AuthorityExpiresAt: stamp(st.Authority.X509AuthorityEnds),
			JwtAuthorityId:         st.Authority.JWTAuthorityID,
			JwtAuthorityExpiresAt:  stamp(st.Authority.JWTAuthorityEnds),
		},
		Entries:     st.Entries,
		Connections: st.Connections,
		Streams:     st.Streams,
		Parked:      st.Parked,
		Sockets:     st.Sockets,
		Warnings:    st.Warnings,
		Trust: &inspectpb.StatusResponse_Trust{
			X509: spreadToWire(st.Trust.X509), Jwt: spreadToWire(st.Trust.JWT), OutdatedSvids: int64(st.Trust.Outdated),
		},
	}
	for _, l := range st.Limits {
		out.Limits = append(out.Limits, &inspectpb.StatusResponse_Limit{Name: l.Name, Used: l.Used, Max: l.Max})
	}
	return out, nil
}

func (s *inspectService) ListConnections(ctx context.Context, _ *inspectpb.ListConnectionsRequest) (*inspectpb.ListConnectionsResponse, error) {
	all, err := s.source.Connections(ctx)
	if err != nil {
		return nil, fail(codes.Internal, "failed to list connections", err)
	}
	return &inspectpb.ListConnectionsResponse{Connections: connectionsToWire(all)}, nil
}

func (s *inspectService) Explain(ctx context.Context, req *inspectpb.ExplainRequest) (*inspectpb.ExplainResponse, error) {
	var target Target
	switch t := req.GetTarget().(type) {
	case *inspectpb.ExplainRequest_Pid:
		target.PID = t.Pid
		if t.Pid <= 0 {
			return nil, invalidf("PID %d is no process", t.Pid)
		}
	case *inspectpb.ExplainRequest_Pod:
		target.PodNamespace, target.PodName = t.Pod.GetNamespace(), t.Pod.GetName()
		if target.PodNamespace == "" || target.PodName == "" {
			return nil, invalid("a pod is named by namespace and name", nil)
		}
	default:
		return nil, invalid("name a PID or a pod", nil)
	}
	found, err := s.source.Explain(ctx, target)
	switch {
	case errors.Is(err, ErrNotFound):
		// The source's text is for the user; the sentinel in it is not.
		text := strings.TrimPrefix(err.Error(), ErrNotFound.Error()+": ")
		return nil, fail(codes.NotFound, strings.TrimSuffix(text, ": "+ErrNotFound.Error()), nil)
	case err != nil:
		return nil, fail(codes.Internal, "failed to explain", err)
	}
	resp := &inspectpb.ExplainResponse{}
	for _, x := range found {
		resp.Explanations = append(resp.Explanations, explanationToWire(x))
	}
	return resp, nil
}

func explanationToWire(x Explanation) *inspectpb.Explanation {
	out := &inspectpb.Explanation{
		Caller:      callerToWire(x.Caller),
		Verdict:     x.Verdict,
		NextStep:    x.NextStep,
		Connections: connectionsToWire(x.Connections),
	}
	for _, p := range x.Phases {
		out.Phases = append(out.Phases, &inspectpb.Explanation_Phase{Name: p.Name, At: stamp(p.At), Detail: p.Detail})
	}
	for _, m := range x.Matches {
		out.Matches = append(out.Matches, &inspectpb.Explanation_Match{
			EntryId: m.EntryID, SpiffeId: m.SPIFFEID, ParentId: m.ParentID, Selectors: m.Selectors.Strings(),
			Hint: m.Hint, IsDefault: m.Default, Serial: m.Serial, NotBefore: stamp(m.NotBefore),
			ExpiresAt: stamp(m.ExpiresAt), LastError: m.LastError,
		})
	}
	for _, n := range x.Nearest {
		out.Nearest = append(out.Nearest, &inspectpb.Explanation_Near{
			EntryId: n.EntryID, SpiffeId: n.SPIFFEID, Selectors: n.Selectors.Strings(), Missing: selectorStrings(n.Missing),
		})
	}
	return out
}

func selectorStrings(in []attest.Selector) []string {
	out := make([]string, len(in))
	for i, s := range in {
		out[i] = s.String()
	}
	return out
}

func callerToWire(c CallerInfo) *inspectpb.Caller {
	return &inspectpb.Caller{
		Pid: c.PID, Uid: c.UID, Gid: c.GID,
		PodUid: c.PodUID, PodNamespace: c.PodNamespace, PodName: c.PodName, ServiceAccount: c.ServiceAccount,
		ContainerId: c.ContainerID, Witnesses: c.Witnesses, Selectors: c.Selectors.Strings(), Denied: c.Denied,
	}
}

func connectionsToWire(in []Connection) []*inspectpb.Connection {
	var out []*inspectpb.Connection
	for _, c := range in {
		conn := &inspectpb.Connection{Id: c.ID, Caller: callerToWire(c.Caller), Since: stamp(c.Since)}
		for _, s := range c.Streams {
			stream := &inspectpb.Stream{
				Api: s.API, Since: stamp(s.Since), Names: s.Names, Late: s.Late, Unknown: s.Unknown,
				ParkedSince: stamp(s.ParkedSince), Version: s.Version, LastPush: stamp(s.LastPush),
				LastAck: stamp(s.LastACK), LastNack: stamp(s.LastNACK), NackText: s.NACKText,
			}
			for _, v := range s.Served {
				stream.Served = append(stream.Served, &inspectpb.Stream_Served{
					Name: v.Name, SpiffeId: v.SPIFFEID, Serial: v.Serial, ExpiresAt: stamp(v.ExpiresAt),
				})
			}
			conn.Streams = append(conn.Streams, stream)
		}
		out = append(out, conn)
	}
	return out
}

// stamp leaves out what has not happened.
func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}
