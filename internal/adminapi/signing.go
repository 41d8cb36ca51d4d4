package adminapi

import (
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"slices"

	"google.golang.org/grpc/codes"

	"github.com/spiffe-node/spiffe-node/internal/spirewire"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/bundlepb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/svidpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

// nodeSVIDs is the SVID service where agents and downstream servers are served.
type nodeSVIDs struct {
	svidService
	nodes *Nodes
}

const errNotAuthorized = "entry not found or not authorized"

// BatchNewX509SVID signs for entries that the calling agent is authorized for.
func (s *nodeSVIDs) BatchNewX509SVID(ctx context.Context, req *svidpb.BatchNewX509SVIDRequest) (*svidpb.BatchNewX509SVIDResponse, error) {
	if len(req.GetParams()) == 0 {
		return nil, invalid("missing parameters", nil)
	}
	if err := s.nodes.limits.x509.wait(ctx, len(req.GetParams())); err != nil {
		return nil, err
	}
	resp := &svidpb.BatchNewX509SVIDResponse{}
	for _, p := range req.GetParams() {
		if err := ctx.Err(); err != nil {
			return nil, err // nobody waits for the rest
		}
		svid, err := s.newX509(ctx, p)
		resp.Results = append(resp.Results, &svidpb.BatchNewX509SVIDResponse_Result{Status: resultFor(err), Svid: svid})
	}
	return resp, nil
}

func (s *nodeSVIDs) newX509(ctx context.Context, p *svidpb.NewX509SVIDParams) (_ *typespb.X509SVID, err error) {
	attrs := []slog.Attr{slog.String("entry_id", p.GetEntryId())}
	defer func() { audit(ctx, "sign X509-SVID", err, attrs...) }()
	switch {
	case p.GetEntryId() == "":
		return nil, invalid("missing entry ID", nil)
	case len(p.GetCsr()) == 0:
		return nil, invalid("missing CSR", nil)
	}
	e, ok := s.nodes.authorized(ctx, p.GetEntryId())
	if !ok {
		return nil, fail(codes.NotFound, errNotAuthorized, nil)
	}
	attrs = append(attrs, slog.String("spiffe_id", e.SPIFFEID.String()))
	issued, err := s.nodes.cfg.Authority.SignX509(ctx, authority.X509Request{EntryID: e.ID, SPIFFEID: e.SPIFFEID, CSR: p.GetCsr(), DNSNames: e.DNSNames})
	if err != nil {
		return nil, csrFailure(p.GetCsr(), err)
	}
	attrs = append(attrs, slog.Time("expires_at", issued.NotAfter))
	return svidToWire(e.SPIFFEID, issued), nil
}

// csrFailure finds out what was wrong with a CSR that was refused.
func csrFailure(der []byte, err error) error {
	const message = "failed to sign X509-SVID"
	if !errors.Is(err, authority.ErrRefused) {
		return fail(codes.Internal, message, err)
	}
	csr, perr := x509.ParseCertificateRequest(der)
	if perr != nil {
		return invalid("malformed CSR", perr)
	}
	if serr := csr.CheckSignature(); serr != nil {
		return invalid("invalid CSR signature", serr)
	}
	return fail(codes.Internal, message, err)
}

// NewJWTSVID signs for an entry that the calling agent is authorized for.
func (s *nodeSVIDs) NewJWTSVID(ctx context.Context, req *svidpb.NewJWTSVIDRequest) (_ *svidpb.NewJWTSVIDResponse, err error) {
	if err := s.nodes.limits.jwt.wait(ctx, 1); err != nil {
		return nil, err
	}
	attrs := []slog.Attr{slog.String("entry_id", req.GetEntryId())}
	defer func() { audit(ctx, "sign JWT-SVID", err, attrs...) }()
	e, ok := s.nodes.authorized(ctx, req.GetEntryId())
	switch {
	case !ok:
		return nil, fail(codes.NotFound, errNotAuthorized, nil)
	case len(req.GetAudience()) == 0:
		return nil, invalid("at least one audience is required", nil)
	case !slices.ContainsFunc(req.GetAudience(), func(a string) bool { return a != "" }):
		return nil, errEmptyAudience()
	}
	attrs = append(attrs, slog.String("spiffe_id", e.SPIFFEID.String()))
	issued, err := s.nodes.cfg.Authority.SignJWT(ctx, authority.JWTRequest{EntryID: e.ID, SPIFFEID: e.SPIFFEID, Audience: req.GetAudience()})
	if err != nil {
		return nil, fail(codes.Internal, "failed to sign JWT-SVID", err)
	}
	return &svidpb.NewJWTSVIDResponse{Svid: &typespb.JWTSVID{
		Token: issued.Token, Id: spirewire.IDToWire(e.SPIFFEID),
		ExpiresAt: issued.ExpiresAt.Unix(), IssuedAt: issued.IssuedAt.Unix(),
	}}, nil
}

// BatchNewWITSVID is behind a feature flag on the server.
func (s *nodeSVIDs) BatchNewWITSVID(_ context.Context, req *svidpb.BatchNewWITSVIDRequest) (*svidpb.BatchNewWITSVIDResponse, error) {
	if len(req.GetParams()) == 0 {
		return nil, invalid("missing parameters", nil)
	}
	return nil, fail(codes.Unimplemented, "WIT functionality is disabled", nil)
}

// NewDownstreamX509CA signs the CA of a downstream server.
func (s *nodeSVIDs) NewDownstreamX509CA(ctx context.Context, req *svidpb.NewDownstreamX509CARequest) (_ *svidpb.NewDownstreamX509CAResponse, err error) {
	if err := s.nodes.limits.x509.wait(ctx, 1); err != nil {
		return nil, err
	}
	defer func() { audit(ctx, "sign downstream CA", err) }()
	issued, roots, err := s.nodes.cfg.Authority.NewDownstreamX509CA(ctx, req.GetCsr(), spirewire.SecondsFromWire(max(0, req.GetPreferredTtl())))
	switch {
	case errors.Is(err, embedded.ErrInvalid):
		return nil, invalid(err.Error(), nil)
	case err != nil:
		return nil, fail(codes.Internal, "failed to sign downstream X.509 CA", err)
	}
	resp := &svidpb.NewDownstreamX509CAResponse{CaCertChain: issued.Chain}
	for _, root := range roots {
		resp.X509Authorities = append(resp.X509Authorities, root.Raw)
	}
	return resp, nil
}

// nodeBundles is the Bundle service where downstream servers are served.
type nodeBundles struct {
	bundleService
	nodes *Nodes
}

// PublishJWTAuthority adds the key of a downstream server to the own bundle.
func (s *nodeBundles) PublishJWTAuthority(ctx context.Context, req *bundlepb.PublishJWTAuthorityRequest) (_ *bundlepb.PublishJWTAuthorityResponse, err error) {
	if err := s.nodes.limits.publish.wait(ctx, 1); err != nil {
		return nil, err
	}
	defer func() {
		audit(ctx, "publish JWT authority", err, slog.String("key_id", req.GetJwtAuthority().GetKeyId()))
	}()
	if req.GetJwtAuthority() == nil {
		return nil, invalid("missing JWT authority", nil)
	}
	keys, err := jwtFromWire([]*typespb.JWTKey{req.GetJwtAuthority()})
	if err != nil {
		return nil, invalid("invalid JWT authority", err)
	}
	bundle, err := s.nodes.cfg.Authority.AppendBundle(ctx, nil, keys)
	if err != nil {
		return nil, fail(codes.Internal, "failed to publish JWT key", err)
	}
	return &bundlepb.PublishJWTAuthorityResponse{JwtAuthorities: bundleToWire(bundle).GetJwtAuthorities()}, nil
}

// PublishWITAuthority is not implemented by the server either.
func (s *nodeBundles) PublishWITAuthority(context.Context, *bundlepb.PublishWITAuthorityRequest) (*bundlepb.PublishWITAuthorityResponse, error) {
	return nil, fail(codes.Unimplemented, "WIT-SVID functionality is not yet implemented", nil)
}
