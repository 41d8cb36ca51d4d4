package adminapi

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/localauthoritypb"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

// keyRotator holds the own signing keys and moves them through their lives.
type keyRotator interface {
	X509Authorities() (embedded.LocalAuthorities, error)
	CAChain() []*x509.Certificate
	PrepareX509(ctx context.Context) (embedded.LocalAuthority, error)
	ActivateX509(ctx context.Context, id string) (embedded.LocalAuthority, error)
	TaintX509(ctx context.Context, id string) (embedded.LocalAuthority, error)
	RevokeX509(ctx context.Context, id string) error
	TaintX509Upstream(ctx context.Context, id string) (string, error)
	RevokeX509Upstream(ctx context.Context, id string) (string, error)

	JWTAuthorities() (embedded.LocalAuthorities, error)
	PrepareJWT(ctx context.Context) (embedded.LocalAuthority, error)
	ActivateJWT(ctx context.Context, id string) (embedded.LocalAuthority, error)
	TaintJWT(ctx context.Context, id string) (embedded.LocalAuthority, error)
	RevokeJWT(ctx context.Context, id string) error

	Rotations() []embedded.Rotation
}

// localAuthorityService is spire.api.server.localauthority.v1.LocalAuthority:
// the own signing keys, moved by hand. Nothing here waits for agents; who has
// not acknowledged a key yet is named in the trailer of the answer.
type localAuthorityService struct {
	localauthoritypb.UnimplementedLocalAuthorityServer
	keys keyRotator
}

type authorityState = localauthoritypb.AuthorityState

func stateToWire(a embedded.LocalAuthority) *authorityState {
	return &authorityState{AuthorityId: a.ID, ExpiresAt: a.ExpiresAt.Unix(), UpstreamAuthoritySubjectKeyId: a.UpstreamID}
}

func stateToWireOrNil(a *embedded.LocalAuthority) *authorityState {
	if a == nil {
		return nil
	}
	return stateToWire(*a)
}

// keysFailure is the answer to a step that was not taken: the authority's
// texts are the server's.
func keysFailure(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, authority.ErrNotReady):
		return fail(codes.Unavailable, "server is initializing", nil)
	case errors.Is(err, embedded.ErrInvalid):
		return invalid(err.Error(), nil)
	case errors.Is(err, embedded.ErrPrecondition):
		return fail(codes.FailedPrecondition, err.Error(), nil)
	}
	return fail(codes.Internal, err.Error(), nil)
}

// warningTrailer is where the answer to a step says what an operator should know
// of it. Clients of SPIRE's do not look there.
const warningTrailer = "spiffe-node-warning"

func warn(ctx context.Context, text string) {
	if text == "" {
		return
	}
	text = strings.Map(func(r rune) rune { // a header holds nothing else
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, text)
	_ = grpc.SetTrailer(ctx, metadata.Pairs(warningTrailer, text)) // fails only outside a call
}

// laggards is what to say when a key of a kind is activated now; empty = all
// have it.
func (s *localAuthorityService) laggards(kind string) string {
	for _, r := range s.keys.Rotations() {
		if p := &r.Progress; r.Kind == kind && r.Authorities.Prepared != nil && p.Lagging > 0 {
			return fmt.Sprintf("%d of %d agents and %d of %d consumers have not acknowledged it yet and may refuse what it signs: %s",
				p.Lagging, p.Agents, p.LaggingConsumers, p.Consumers, p.Names())
		}
	}
	return ""
}

// orphans is what to say when the old key of a kind is revoked now.
func (s *localAuthorityService) orphans(kind string) string {
	for _, r := range s.keys.Rotations() {
		if r.Kind == kind && r.Progress.Outdated > 0 {
			return fmt.Sprintf("%d X.509-SVIDs in use hang on a tainted or revoked authority and are refused until they are replaced, which is under way", r.Progress.Outdated)
		}
	}
	return ""
}

func auditKey(ctx context.Context, what string, err error, id string) {
	var attrs []slog.Attr
	if id != "" {
		attrs = append(attrs, slog.String("authority_id", id))
	}
	audit(ctx, what, err, attrs...)
}

func (s *localAuthorityService) GetX509AuthorityState(context.Context, *localauthoritypb.GetX509AuthorityStateRequest) (*localauthoritypb.GetX509AuthorityStateResponse, error) {
	all, err := s.keys.X509Authorities()
	if err != nil {
		return nil, keysFailure(err)
	}
	return &localauthoritypb.GetX509AuthorityStateResponse{
		Active: stateToWire(all.Active), Prepared: stateToWireOrNil(all.Prepared), Old: stateToWireOrNil(all.Old),
	}, nil
}

func (s *localAuthorityService) GetJWTAuthorityState(context.Context, *localauthoritypb.GetJWTAuthorityStateRequest) (*localauthoritypb.GetJWTAuthorityStateResponse, error) {
	all, err := s.keys.JWTAuthorities()
	if err != nil {
		return nil, keysFailure(err)
	}
	return &localauthoritypb.GetJWTAuthorityStateResponse{
		Active: stateToWire(all.Active), Prepared: stateToWireOrNil(all.Prepared), Old: stateToWireOrNil(all.Old),
	}, nil
}

func (s *localAuthorityService) PrepareX509Authority(ctx context.Context, _ *localauthoritypb.PrepareX509AuthorityRequest) (*localauthoritypb.PrepareX509AuthorityResponse, error) {
	made, err := s.keys.PrepareX509(ctx)
	auditKey(ctx, "prepare X.509 authority", err, made.ID)
	if err != nil {
		return nil, keysFailure(err)
	}
	return &localauthoritypb.PrepareX509AuthorityResponse{PreparedAuthority: stateToWire(made)}, nil
}

func (s *localAuthorityService) PrepareJWTAuthority(ctx context.Context, _ *localauthoritypb.PrepareJWTAuthorityRequest) (*localauthoritypb.PrepareJWTAuthorityResponse, error) {
	made, err := s.keys.PrepareJWT(ctx)
	auditKey(ctx, "prepare JWT authority", err, made.ID)
	if err != nil {
		return nil, keysFailure(err)
	}
	return &localauthoritypb.PrepareJWTAuthorityResponse{PreparedAuthority: stateToWire(made)}, nil
}

func (s *localAuthorityService) ActivateX509Authority(ctx context.Context, req *localauthoritypb.ActivateX509AuthorityRequest) (*localauthoritypb.ActivateX509AuthorityResponse, error) {
	lag := s.laggards("x509")
	active, err := s.keys.ActivateX509(ctx, req.GetAuthorityId())
	auditKey(ctx, "activate X.509 authority", err, req.GetAuthorityId())
	if err != nil {
		return nil, keysFailure(err)
	}
	warn(ctx, lag)
	return &localauthoritypb.ActivateX509AuthorityResponse{ActivatedAuthority: stateToWire(active)}, nil
}

func (s *localAuthorityService) ActivateJWTAuthority(ctx context.Context, req *localauthoritypb.ActivateJWTAuthorityRequest) (*localauthoritypb.ActivateJWTAuthorityResponse, error) {
	lag := s.laggards("jwt")
	active, err := s.keys.ActivateJWT(ctx, req.GetAuthorityId())
	auditKey(ctx, "activate JWT authority", err, req.GetAuthorityId())
	if err != nil {
		return nil, keysFailure(err)
	}
	warn(ctx, lag)
	return &localauthoritypb.ActivateJWTAuthorityResponse{ActivatedAuthority: stateToWire(active)}, nil
}

func (s *localAuthorityService) TaintX509Authority(ctx context.Context, req *localauthoritypb.TaintX509AuthorityRequest) (*localauthoritypb.TaintX509AuthorityResponse, error) {
	tainted, err := s.keys.TaintX509(ctx, req.GetAuthorityId())
	auditKey(ctx, "taint X.509 authority", err, req.GetAuthorityId())
	if err != nil {
		return nil, keysFailure(err)
	}
	return &localauthoritypb.TaintX509AuthorityResponse{TaintedAuthority: stateToWire(tainted)}, nil
}

// TaintJWTAuthority leaves out when the key expires, as the server does.
func (s *localAuthorityService) TaintJWTAuthority(ctx context.Context, req *localauthoritypb.TaintJWTAuthorityRequest) (*localauthoritypb.TaintJWTAuthorityResponse, error) {
	tainted, err := s.keys.TaintJWT(ctx, req.GetAuthorityId())
	auditKey(ctx, "taint JWT authority", err, req.GetAuthorityId())
	if err != nil {
		return nil, keysFailure(err)
	}
	return &localauthoritypb.TaintJWTAuthorityResponse{TaintedAuthority: &authorityState{AuthorityId: tainted.ID}}, nil
}

func (s *localAuthorityService) RevokeX509Authority(ctx context.Context, req *localauthoritypb.RevokeX509AuthorityRequest) (*localauthoritypb.RevokeX509AuthorityResponse, error) {
	orphans := s.orphans("x509")
	err := s.keys.RevokeX509(ctx, req.GetAuthorityId())
	auditKey(ctx, "revoke X.509 authority", err, req.GetAuthorityId())
	if err != nil {
		return nil, keysFailure(err)
	}
	warn(ctx, orphans)
	return &localauthoritypb.RevokeX509AuthorityResponse{RevokedAuthority: &authorityState{AuthorityId: req.GetAuthorityId()}}, nil
}

func (s *localAuthorityService) RevokeJWTAuthority(ctx context.Context, req *localauthoritypb.RevokeJWTAuthorityRequest) (*localauthoritypb.RevokeJWTAuthorityResponse, error) {
	err := s.keys.RevokeJWT(ctx, req.GetAuthorityId())
	auditKey(ctx, "revoke JWT authority", err, req.GetAuthorityId())
	if err != nil {
		return nil, keysFailure(err)
	}
	return &localauthoritypb.RevokeJWTAuthorityResponse{RevokedAuthority: &authorityState{AuthorityId: req.GetAuthorityId()}}, nil
}

func auditUpstream(ctx context.Context, what string, err error, id string) {
	audit(ctx, what, err, slog.String("upstream_subject_key_id", id))
}

func (s *localAuthorityService) TaintX509UpstreamAuthority(ctx context.Context, req *localauthoritypb.TaintX509UpstreamAuthorityRequest) (*localauthoritypb.TaintX509UpstreamAuthorityResponse, error) {
	id, err := s.keys.TaintX509Upstream(ctx, req.GetSubjectKeyId())
	auditUpstream(ctx, "taint X.509 upstream authority", err, req.GetSubjectKeyId())
	if err != nil {
		return nil, keysFailure(err)
	}
	return &localauthoritypb.TaintX509UpstreamAuthorityResponse{UpstreamAuthoritySubjectKeyId: id}, nil
}

func (s *localAuthorityService) RevokeX509UpstreamAuthority(ctx context.Context, req *localauthoritypb.RevokeX509UpstreamAuthorityRequest) (*localauthoritypb.RevokeX509UpstreamAuthorityResponse, error) {
	id, err := s.keys.RevokeX509Upstream(ctx, req.GetSubjectKeyId())
	auditUpstream(ctx, "revoke X.509 upstream authority", err, req.GetSubjectKeyId())
	if err != nil {
		return nil, keysFailure(err)
	}
	return &localauthoritypb.RevokeX509UpstreamAuthorityResponse{UpstreamAuthoritySubjectKeyId: id}, nil
}

// errNoWIT is the server's answer too.
func errNoWIT() error {
	return fail(codes.Unimplemented, "WIT-SVID functionality is not yet implemented", nil)
}

func (s *localAuthorityService) GetWITAuthorityState(context.Context, *localauthoritypb.GetWITAuthorityStateRequest) (*localauthoritypb.GetWITAuthorityStateResponse, error) {
	return nil, errNoWIT()
}

func (s *localAuthorityService) PrepareWITAuthority(context.Context, *localauthoritypb.PrepareWITAuthorityRequest) (*localauthoritypb.PrepareWITAuthorityResponse, error) {
	return nil, errNoWIT()
}

func (s *localAuthorityService) ActivateWITAuthority(context.Context, *localauthoritypb.ActivateWITAuthorityRequest) (*localauthoritypb.ActivateWITAuthorityResponse, error) {
	return nil, errNoWIT()
}

func (s *localAuthorityService) TaintWITAuthority(context.Context, *localauthoritypb.TaintWITAuthorityRequest) (*localauthoritypb.TaintWITAuthorityResponse, error) {
	return nil, errNoWIT()
}

func (s *localAuthorityService) RevokeWITAuthority(context.Context, *localauthoritypb.RevokeWITAuthorityRequest) (*localauthoritypb.RevokeWITAuthorityResponse, error) {
	return nil, errNoWIT()
}
