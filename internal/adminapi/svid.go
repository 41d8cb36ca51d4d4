package adminapi

import (
	"context"
	"errors"
	"log/slog"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	"github.com/spiffe-node/spiffe-node/internal/spirewire"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/svidpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

// svidService is spire.api.server.svid.v1.SVID as far as a caller on the
// socket may use it.
type svidService struct {
	svidpb.UnimplementedSVIDServer
	td     spiffeid.TrustDomain
	minter minter
}

func (s *svidService) MintX509SVID(ctx context.Context, req *svidpb.MintX509SVIDRequest) (*svidpb.MintX509SVIDResponse, error) {
	id, issued, err := s.minter.MintX509(ctx, req.GetCsr(), spirewire.SecondsFromWire(max(0, req.GetTtl())))
	err = mintFailure("failed to sign X509-SVID", err)
	if err != nil {
		audit(ctx, "mint X509-SVID", err)
		return nil, err
	}
	audit(ctx, "mint X509-SVID", nil, slog.String("spiffe_id", id.String()), slog.Time("expires_at", issued.NotAfter))
	return &svidpb.MintX509SVIDResponse{Svid: &typespb.X509SVID{
		CertChain: issued.Chain,
		Id:        spirewire.IDToWire(id),
		ExpiresAt: issued.NotAfter.Unix(),
	}}, nil
}

// mintFailure tells requests that are wrong from faults. The authority's texts
// about requests are the server's.
func mintFailure(message string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, embedded.ErrInvalid):
		return invalid(err.Error(), nil)
	case strings.HasPrefix(err.Error(), message):
		return fail(codes.Internal, err.Error(), nil)
	}
	return fail(codes.Internal, message, err)
}

func (s *svidService) MintJWTSVID(ctx context.Context, req *svidpb.MintJWTSVIDRequest) (resp *svidpb.MintJWTSVIDResponse, err error) {
	var id spiffeid.ID
	defer func() { audit(ctx, "mint JWT-SVID", err, slog.String("spiffe_id", id.String())) }()
	given, err := workloadID(s.td, req.GetId())
	if err != nil {
		return nil, invalid("invalid SPIFFE ID", err)
	}
	id = given
	if len(req.GetAudience()) == 0 {
		return nil, invalid("at least one audience is required", nil)
	}
	audience := make([]string, 0, len(req.GetAudience()))
	for _, a := range req.GetAudience() {
		if a != "" {
			audience = append(audience, a)
		}
	}
	const message = "failed to sign JWT-SVID"
	if len(audience) == 0 {
		return nil, errEmptyAudience()
	}
	issued, err := s.minter.MintJWT(ctx, id, audience, spirewire.SecondsFromWire(max(0, req.GetTtl())))
	if err != nil {
		return nil, mintFailure(message, err)
	}
	return &svidpb.MintJWTSVIDResponse{Svid: &typespb.JWTSVID{
		Token:     issued.Token,
		Id:        spirewire.IDToWire(id),
		ExpiresAt: issued.ExpiresAt.Unix(),
		IssuedAt:  issued.IssuedAt.Unix(),
	}}, nil
}

// errEmptyAudience is for audiences of which nothing is left.
func errEmptyAudience() error {
	return fail(codes.Internal, "failed to sign JWT-SVID", errors.New("invalid JWT-SVID audience: cannot be empty"))
}

func (s *svidService) MintWITSVID(context.Context, *svidpb.MintWITSVIDRequest) (*svidpb.MintWITSVIDResponse, error) {
	return nil, fail(codes.Unimplemented, "WIT functionality is disabled", nil)
}
