package adminapi

import (
	"context"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/spiffe-node/spiffe-node/internal/spirewire"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/debugpb"
)

// debugService is spire.api.server.debug.v1.Debug.
type debugService struct {
	debugpb.UnimplementedDebugServer
	authority Authority
	start     time.Time
}

func (s *debugService) GetInfo(context.Context, *debugpb.GetInfoRequest) (*debugpb.GetInfoResponse, error) {
	if _, err := s.authority.X509Authorities(); err != nil {
		return nil, fail(codes.Internal, "failed to read the authority's keys", err)
	}
	resp := &debugpb.GetInfoResponse{
		Uptime:                int32(time.Since(s.start) / time.Second), // 68 years
		AgentsCount:           int32(s.authority.AgentCount()),          // memory ends first
		EntriesCount:          int32(s.authority.Set().Len()),           // memory ends first
		FederatedBundlesCount: int32(s.authority.BundleCount()),         // the own one counts, as on the server
	}
	// There is no server SVID to show: the authority has no TLS endpoint. The
	// chain is the CA that signs now, up to its root.
	for _, c := range s.authority.CAChain() {
		out := &debugpb.GetInfoResponse_Cert{ExpiresAt: c.NotAfter.Unix(), Subject: c.Subject.String()}
		if len(c.URIs) == 1 {
			if id, err := spiffeid.FromURI(c.URIs[0]); err == nil {
				out.Id = spirewire.IDToWire(id)
			}
		}
		resp.SvidChain = append(resp.SvidChain, out)
	}
	return resp, nil
}

// healthService is grpc.health.v1.Health; only Check, as on the server.
type healthService struct {
	healthpb.UnimplementedHealthServer
	authority Authority
}

// Check says SERVING while there is a CA that signs.
func (s *healthService) Check(_ context.Context, req *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	if req.GetService() != "" {
		return nil, invalid("per-service health is not supported", nil)
	}
	resp := &healthpb.HealthCheckResponse{Status: healthpb.HealthCheckResponse_SERVING}
	if _, err := s.authority.X509Authorities(); err != nil {
		resp.Status = healthpb.HealthCheckResponse_NOT_SERVING
	}
	return resp, nil
}
