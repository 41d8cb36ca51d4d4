package adminapi

import (
	"context"
	"crypto/x509"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/spiffe-node/spiffe-node/internal/spirewire"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/debugpb"
)

// debugService is spire.api.server.debug.v1.Debug.
type debugService struct {
	debugpb.UnimplementedDebugServer
	authority   Authority
	certificate Certificate // nil: no TLS endpoint
	start       time.Time
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
	chain, err := s.chain()
	if err != nil {
		return nil, fail(codes.Internal, "failed verification against bundle", err)
	}
	for _, c := range chain {
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

// chain is the server's own SVID up to its root. Without a TLS endpoint there is
// none to show, and it begins with the CA that signs now.
func (s *debugService) chain() ([]*x509.Certificate, error) {
	if s.certificate == nil {
		return s.authority.CAChain(), nil
	}
	own, err := s.certificate(nil)
	if err != nil {
		return nil, err
	}
	_, chains, err := x509svid.ParseAndVerify(own.Certificate, s.authority.OwnBundle().X509Bundle())
	if err != nil {
		return nil, err
	}
	return chains[0], nil
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
