package spireserver

import (
	"context"
	"fmt"
	"slices"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/spirewire"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/svidpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
)

// SignJWT has the server sign a JWT-SVID. Errors as of authority.Authority.
func (c *Client) SignJWT(ctx context.Context, req authority.JWTRequest) (*authority.JWTIssued, error) {
	if err := c.mayAsk(ctx, req.EntryID, req.SPIFFEID); err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(req.Audience, func(s string) bool { return s != "" }) {
		return nil, fmt.Errorf("%w: at least one audience is required", authority.ErrRefused)
	}
	var svid *typespb.JWTSVID
	err := c.call(ctx, "NewJWTSVID", func(ctx context.Context, cc grpc.ClientConnInterface) error {
		res, err := svidpb.NewSVIDClient(cc).NewJWTSVID(ctx, &svidpb.NewJWTSVIDRequest{EntryId: req.EntryID, Audience: req.Audience})
		svid = res.GetSvid()
		return err
	})
	if status.Code(err) == codes.NotFound {
		err = c.settle(ctx, req.EntryID, fmt.Errorf("%w: %s", errUnlisted, status.Convert(err).Message()))
	}
	var issued *authority.JWTIssued
	if err == nil {
		issued, err = c.checkJWT(ctx, req, svid)
	}
	if err != nil {
		return nil, fmt.Errorf("sign JWT-SVID for %s: %w", req.SPIFFEID, sentinel(err))
	}
	return issued, nil
}

// checkJWT makes sure that a token is for the SPIFFE ID of the request and
// signed with a key that those who verify it can know.
func (c *Client) checkJWT(ctx context.Context, req authority.JWTRequest, svid *typespb.JWTSVID) (*authority.JWTIssued, error) {
	token, err := jwt.ParseSigned(svid.GetToken(), []jose.SignatureAlgorithm{
		jose.ES256, jose.ES384, jose.ES512, jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512,
	})
	if err != nil || len(token.Headers) != 1 {
		return nil, fmt.Errorf("%w: a JWT-SVID that is no signed token", errProtocol)
	}
	var claims jwt.Claims
	if err := token.UnsafeClaimsWithoutVerification(&claims); err != nil {
		return nil, fmt.Errorf("%w: a JWT-SVID without claims", errProtocol)
	}
	if claims.Subject != req.SPIFFEID.String() {
		c.Hurry() // the entry has changed
		return nil, fmt.Errorf("%w: the server signed for %q", authority.ErrTryLater, claims.Subject)
	}
	out := &authority.JWTIssued{
		Token:     svid.GetToken(),
		IssuedAt:  spirewire.TimeFromWire(svid.GetIssuedAt()),
		ExpiresAt: spirewire.TimeFromWire(svid.GetExpiresAt()),
	}
	if out.IssuedAt.IsZero() || !out.ExpiresAt.After(out.IssuedAt) {
		return nil, fmt.Errorf("%w: a JWT-SVID issued at %s that expires at %s", errProtocol, out.IssuedAt, out.ExpiresAt)
	}
	if kid := token.Headers[0].KeyID; !c.knowsJWTKey(kid) {
		if err := c.refreshOwn(ctx); err != nil {
			return nil, err
		}
		if !c.knowsJWTKey(kid) {
			return nil, fmt.Errorf("%w: the JWT-SVID's key is not in the trust bundle", authority.ErrTryLater)
		}
	}
	return out, nil
}

func (c *Client) knowsJWTKey(kid string) bool {
	c.store.mu.Lock()
	defer c.store.mu.Unlock()
	return c.store.own != nil && c.store.own.HasJWTAuthority(kid)
}

var _ authority.Authority = (*Client)(nil)
