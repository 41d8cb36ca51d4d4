package workloadapi

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// Limits of a JWT-SVID request.
const (
	maxAudiences     = 128
	maxAudienceBytes = 16 << 10
	maxTokenBytes    = 64 << 10
)

// FetchJWTSVID implements the Workload API.
func (s *Server) FetchJWTSVID(ctx context.Context, req *workload.JWTSVIDRequest) (resp *workload.JWTSVIDResponse, err error) {
	const method = "FetchJWTSVID"
	err = s.guard(ctx, method, func() error {
		id, err := checkJWTRequest(req)
		if err != nil {
			return err
		}
		u, err := s.await(ctx, method, func(u *svid.Update) standing { return standingOf(u, len(wanted(u, id))) })
		if err != nil {
			return err
		}
		resp, err = s.issueJWTs(ctx, wanted(u, id), req.GetAudience())
		return err
	})
	return resp, err
}

func checkJWTRequest(req *workload.JWTSVIDRequest) (id spiffeid.ID, err error) {
	size := 0
	for _, a := range req.GetAudience() {
		size += len(a)
	}
	switch {
	case len(req.GetAudience()) == 0:
		return id, status.Error(codes.InvalidArgument, "audience must be specified")
	case slices.Contains(req.GetAudience(), ""):
		return id, status.Error(codes.InvalidArgument, "audience must not be empty")
	case len(req.GetAudience()) > maxAudiences || size > maxAudienceBytes:
		return id, status.Errorf(codes.InvalidArgument, "more than %d audiences, or more than %d bytes of them", maxAudiences, maxAudienceBytes)
	case req.GetSpiffeId() == "":
		return id, nil
	}
	if id, err = spiffeid.FromString(req.GetSpiffeId()); err != nil {
		return id, status.Errorf(codes.InvalidArgument, "invalid requested SPIFFE ID: %v", err)
	}
	return id, nil
}

// wanted are the matched entries to issue tokens for. A JWT-SVID needs no
// X.509-SVID, so entries without one count.
func wanted(u *svid.Update, id spiffeid.ID) []*entry.Entry {
	entries := matched(u)
	if !id.IsZero() {
		entries = slices.DeleteFunc(entries, func(e *entry.Entry) bool { return e.SPIFFEID != id })
	}
	return unbeaten(entries)
}

// issueJWTs asks for one token per entry. One that fails does not fail the
// others.
func (s *Server) issueJWTs(ctx context.Context, entries []*entry.Entry, audience []string) (*workload.JWTSVIDResponse, error) {
	resp := new(workload.JWTSVIDResponse)
	var failed []error
	for _, e := range entries {
		token, err := s.config.JWT(ctx, e, audience)
		if err != nil {
			s.metrics.jwt.WithLabelValues("failed").Inc()
			s.log.LogAttrs(ctx, slog.LevelWarn, "JWT-SVID not issued", s.attrs(ctx,
				slog.String("entry_id", e.ID), slog.String("spiffe_id", e.SPIFFEID.String()), slog.Any("error", err))...)
			failed = append(failed, fmt.Errorf("entry %s: %w", e.ID, err))
			continue
		}
		s.metrics.jwt.WithLabelValues("issued").Inc()
		resp.Svids = append(resp.Svids, &workload.JWTSVID{SpiffeId: e.SPIFFEID.String(), Svid: token, Hint: e.Hint})
	}
	switch {
	case len(resp.GetSvids()) > 0:
		return resp, nil
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case !slices.ContainsFunc(failed, func(err error) bool { return !forGood(err) }):
		return nil, errNone
	}
	return nil, inner{errors.Join(failed...)}
}

// forGood says whether asking again is useless: the authority will not sign, or
// the entry was withdrawn in between.
func forGood(err error) bool {
	return errors.Is(err, authority.ErrRefused) || errors.Is(err, svid.ErrNotMatched)
}

// FetchJWTBundles implements the Workload API.
func (s *Server) FetchJWTBundles(_ *workload.JWTBundlesRequest, ss grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	const method = "FetchJWTBundles"
	ctx := ss.Context()
	return s.guard(ctx, method, func() error {
		return stream(s, ctx, method, ss.Send, s.jwtBundles)
	})
}

func (s *Server) jwtBundles(u *svid.Update) view[workload.JWTBundlesResponse] {
	v := view[workload.JWTBundlesResponse]{synced: synced(u), trust: u.Keys, response: &workload.JWTBundlesResponse{Bundles: make(map[string][]byte)}}
	list, st := s.bundles(u)
	d := digest{sha256.New()}
	for _, b := range list {
		keys, err := jwks(b)
		if err != nil {
			s.log.Error("JWT bundle cannot be encoded and is left out",
				slog.String("trust_domain", b.TrustDomain().Name()), slog.Any("error", err))
			continue
		}
		v.response.Bundles[b.TrustDomain().IDString()] = keys
		d.add([]byte(b.TrustDomain().Name()), keys)
	}
	v.standing, v.version = st, d.version()
	return v
}

// jwks is a bundle's JWT authorities as a plain JWKS (RFC 7517), in a fixed
// order so that equal content has equal bytes.
func jwks(b *spiffebundle.Bundle) ([]byte, error) {
	keys := b.JWTAuthorities()
	set := jose.JSONWebKeySet{Keys: make([]jose.JSONWebKey, 0, len(keys))}
	for _, kid := range slices.Sorted(maps.Keys(keys)) {
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: keys[kid], KeyID: kid})
	}
	return json.Marshal(set)
}

// ValidateJWTSVID implements the Workload API.
func (s *Server) ValidateJWTSVID(ctx context.Context, req *workload.ValidateJWTSVIDRequest) (resp *workload.ValidateJWTSVIDResponse, err error) {
	const method = "ValidateJWTSVID"
	err = s.guard(ctx, method, func() error {
		switch {
		case req.GetAudience() == "":
			return status.Error(codes.InvalidArgument, "audience must be specified")
		case req.GetSvid() == "":
			return status.Error(codes.InvalidArgument, "svid must be specified")
		case len(req.GetSvid()) > maxTokenBytes:
			return status.Errorf(codes.InvalidArgument, "svid longer than %d bytes", maxTokenBytes)
		}
		u, err := s.await(ctx, method, func(u *svid.Update) standing { _, st := s.bundles(u); return st })
		if err != nil {
			return err
		}
		resp, err = s.validate(u, req)
		return err
	})
	return resp, err
}

func (s *Server) validate(u *svid.Update, req *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	list, _ := s.bundles(u)
	keys := jwtbundle.NewSet()
	for _, b := range list {
		keys.Add(b.JWTBundle())
	}
	token, err := jwtsvid.ParseAndValidate(req.GetSvid(), keys, []string{req.GetAudience()})
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	claims := token.Claims
	if token.ID.TrustDomain() != u.Own.TrustDomain() {
		maps.DeleteFunc(claims, func(name string, _ any) bool {
			return name != "sub" && name != "exp" && name != "aud" && !slices.Contains(s.config.AllowedForeignJWTClaims, name)
		})
	}
	audience := make([]any, len(token.Audience))
	for i, a := range token.Audience {
		audience[i] = a
	}
	claims["aud"] = audience // always a list, whatever the token's form
	out, err := structpb.NewStruct(claims)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "claims cannot be represented: %v", err)
	}
	return &workload.ValidateJWTSVIDResponse{SpiffeId: token.ID.String(), Claims: out}, nil
}
