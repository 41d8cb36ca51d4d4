package adminapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/trustdomainpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

// relationshipStore holds where the bundles of foreign trust domains are
// served. Changes are noticed by whoever fetches them.
type relationshipStore interface {
	Relationships() []embedded.Relationship
	Relationship(td spiffeid.TrustDomain) (embedded.Relationship, error)
	CreateRelationship(ctx context.Context, r embedded.Relationship, bundle *embedded.Bundle) (embedded.Relationship, error)
	UpdateRelationship(ctx context.Context, td spiffeid.TrustDomain, bundle *embedded.Bundle, edit func(*embedded.Relationship) error) (embedded.Relationship, error)
	DeleteRelationship(ctx context.Context, td spiffeid.TrustDomain) error
	FederatedBundle(td spiffeid.TrustDomain) (*embedded.Bundle, error)
	OwnBundle() *embedded.Bundle
}

// trustDomainService is spire.api.server.trustdomain.v1.TrustDomain.
type trustDomainService struct {
	trustdomainpb.UnimplementedTrustDomainServer
	td    spiffeid.TrustDomain
	store relationshipStore
	// fetcher is nil where nobody fetches bundles.
	fetcher Federation
	log     *slog.Logger
}

func (s *trustDomainService) ListFederationRelationships(_ context.Context, req *trustdomainpb.ListFederationRelationshipsRequest) (*trustdomainpb.ListFederationRelationshipsResponse, error) {
	p, err := readPage(req.GetPageSize(), req.GetPageToken())
	if err != nil {
		return nil, fail(codes.Internal, "failed to list federation relationships", err)
	}
	items, last := cut(p, s.store.Relationships(), func(r embedded.Relationship) int64 { return r.Row })
	mask := newMasker(req.GetOutputMask())
	resp := &trustdomainpb.ListFederationRelationshipsResponse{NextPageToken: p.next(len(items), last)}
	for _, r := range items {
		resp.FederationRelationships = append(resp.FederationRelationships, s.answer(r, mask))
	}
	return resp, nil
}

func (s *trustDomainService) GetFederationRelationship(_ context.Context, req *trustdomainpb.GetFederationRelationshipRequest) (*typespb.FederationRelationship, error) {
	td, err := relationDomain(req.GetTrustDomain())
	if err != nil {
		return nil, err
	}
	r, err := s.store.Relationship(td)
	switch {
	case errors.Is(err, embedded.ErrNotFound):
		return nil, fail(codes.NotFound, "federation relationship does not exist", nil)
	case err != nil:
		return nil, fail(codes.Internal, "failed to fetch federation relationship", err)
	}
	return s.answer(r, newMasker(req.GetOutputMask())), nil
}

func (s *trustDomainService) BatchCreateFederationRelationship(ctx context.Context, req *trustdomainpb.BatchCreateFederationRelationshipRequest) (*trustdomainpb.BatchCreateFederationRelationshipResponse, error) {
	mask := newMasker(req.GetOutputMask())
	resp := &trustdomainpb.BatchCreateFederationRelationshipResponse{}
	for _, in := range req.GetFederationRelationships() {
		out, err := s.create(ctx, in, mask)
		resp.Results = append(resp.Results, &trustdomainpb.BatchCreateFederationRelationshipResponse_Result{Status: resultFor(err), FederationRelationship: out})
		auditRelationship(ctx, "create federation relationship", err, in)
	}
	return resp, nil
}

func (s *trustDomainService) create(ctx context.Context, in *typespb.FederationRelationship, mask *masker) (*typespb.FederationRelationship, error) {
	r, bundle, err := relationshipFromWire(in)
	switch {
	case err != nil:
		return nil, invalid("failed to convert federation relationship", err)
	case r.TrustDomain == s.td:
		return nil, invalid("unable to create federation relationship for server trust domain", nil)
	}
	if r, err = s.store.CreateRelationship(ctx, r, bundle); err != nil {
		return nil, fail(codes.Internal, "failed to create federation relationship", err)
	}
	s.warn(ctx, r)
	out := s.answer(r, mask)
	if bundle == nil { // as the server has it: what was stored before is no part of the answer
		out.TrustDomainBundle = nil
	}
	return out, nil
}

func (s *trustDomainService) BatchUpdateFederationRelationship(ctx context.Context, req *trustdomainpb.BatchUpdateFederationRelationshipRequest) (*trustdomainpb.BatchUpdateFederationRelationshipResponse, error) {
	mask := newMasker(req.GetOutputMask())
	resp := &trustdomainpb.BatchUpdateFederationRelationshipResponse{}
	for _, in := range req.GetFederationRelationships() {
		out, err := s.update(ctx, in, req.GetInputMask(), mask)
		resp.Results = append(resp.Results, &trustdomainpb.BatchUpdateFederationRelationshipResponse_Result{Status: resultFor(err), FederationRelationship: out})
		auditRelationship(ctx, "update federation relationship", err, in)
	}
	return resp, nil
}

func (s *trustDomainService) update(ctx context.Context, in *typespb.FederationRelationship, fields *typespb.FederationRelationshipMask, mask *masker) (*typespb.FederationRelationship, error) {
	// The whole message must be valid, whatever the mask takes of it.
	given, bundle, err := relationshipFromWire(in)
	if err != nil {
		return nil, invalid("failed to convert federation relationship", err)
	}
	const message = "failed to update federation relationship"
	if given.TrustDomain == s.td { // which nothing can be stored for
		return nil, fail(codes.Internal, message, errors.New("unable to fetch federation relationship: record not found"))
	}
	if fields != nil && !fields.GetTrustDomainBundle() {
		bundle = nil
	}
	r, err := s.store.UpdateRelationship(ctx, given.TrustDomain, bundle, func(next *embedded.Relationship) error {
		if fields == nil || fields.GetBundleEndpointUrl() {
			next.EndpointURL = given.EndpointURL
		}
		if fields == nil || fields.GetBundleEndpointProfile() {
			next.EndpointID = given.EndpointID
		}
		return nil
	})
	if err != nil {
		// NOT_FOUND would drop the cause; the server answers Internal.
		return nil, fail(codes.Internal, message, err)
	}
	s.warn(ctx, r)
	return s.answer(r, mask), nil
}

func (s *trustDomainService) BatchDeleteFederationRelationship(ctx context.Context, req *trustdomainpb.BatchDeleteFederationRelationshipRequest) (*trustdomainpb.BatchDeleteFederationRelationshipResponse, error) {
	resp := &trustdomainpb.BatchDeleteFederationRelationshipResponse{}
	for _, name := range req.GetTrustDomains() {
		said, err := s.delete(ctx, name)
		resp.Results = append(resp.Results, &trustdomainpb.BatchDeleteFederationRelationshipResponse_Result{Status: resultFor(err), TrustDomain: said})
		audit(ctx, "delete federation relationship", err, slog.String("trust_domain", name))
	}
	return resp, nil
}

// delete returns the name to answer with, too.
func (s *trustDomainService) delete(ctx context.Context, name string) (string, error) {
	if name == "" {
		return name, invalid("missing trust domain", nil)
	}
	td, err := relationDomain(name)
	if err != nil {
		return name, err
	}
	switch err := s.store.DeleteRelationship(ctx, td); {
	case errors.Is(err, embedded.ErrNotFound):
		return td.Name(), fail(codes.NotFound, "federation relationship not found", nil)
	case err != nil:
		return td.Name(), fail(codes.Internal, "failed to delete federation relationship", err)
	}
	return td.Name(), nil
}

// RefreshBundle fetches a bundle while the caller waits.
func (s *trustDomainService) RefreshBundle(ctx context.Context, req *trustdomainpb.RefreshBundleRequest) (_ *emptypb.Empty, err error) {
	defer func() { audit(ctx, "refresh federated bundle", err, slog.String("trust_domain", req.GetTrustDomain())) }()
	td, err := relationDomain(req.GetTrustDomain())
	if err != nil {
		return nil, err
	}
	if s.fetcher == nil {
		return nil, fail(codes.Unimplemented, "this authority does not fetch bundles from endpoints", nil)
	}
	switch err := s.fetcher.Refresh(ctx, td); {
	case errors.Is(err, embedded.ErrNotFound):
		return nil, fail(codes.NotFound, fmt.Sprintf("no relationship with trust domain %q", td), nil)
	case err != nil:
		return nil, fail(codes.Internal, "failed to refresh bundle", err)
	}
	return &emptypb.Empty{}, nil
}

func relationDomain(name string) (spiffeid.TrustDomain, error) {
	td, err := spiffeid.TrustDomainFromString(name)
	if err != nil {
		return td, invalid("failed to parse trust domain", err)
	}
	return td, nil
}

// relationshipFromWire reads a relationship and the bundle in it, if any.
func relationshipFromWire(in *typespb.FederationRelationship) (r embedded.Relationship, bundle *embedded.Bundle, err error) {
	if in == nil {
		return r, nil, errors.New("missing federation relationship")
	}
	if r.TrustDomain, err = spiffeid.TrustDomainFromString(in.GetTrustDomain()); err != nil {
		return r, nil, fmt.Errorf("failed to parse trust domain: %w", err)
	}
	r.EndpointURL = in.GetBundleEndpointUrl()
	if err := embedded.CheckEndpointURL(r.EndpointURL); err != nil {
		return r, nil, err
	}
	switch profile := in.GetBundleEndpointProfile().(type) {
	case *typespb.FederationRelationship_HttpsWeb:
	case *typespb.FederationRelationship_HttpsSpiffe:
		if r.EndpointID, err = spiffeid.FromString(profile.HttpsSpiffe.GetEndpointSpiffeId()); err != nil {
			return r, nil, fmt.Errorf("failed to parse endpoint SPIFFE ID: %w", err)
		}
	default:
		return r, nil, fmt.Errorf("unsupported bundle endpoint profile type: %T", profile)
	}
	if given := in.GetTrustDomainBundle(); given != nil {
		if bundle, err = relationBundle(r.TrustDomain, given); err != nil {
			return r, nil, err
		}
	}
	return r, bundle, nil
}

func relationBundle(td spiffeid.TrustDomain, in *typespb.Bundle) (*embedded.Bundle, error) {
	// The zero trust domain is nobody's: the own one is refused later, as a
	// relationship.
	bundle, err := bundleFromWire(spiffeid.TrustDomain{}, in, "")
	switch {
	case err != nil:
		return nil, fmt.Errorf("failed to parse bundle: %w", unconverted(err))
	case bundle.TrustDomain != td:
		return nil, fmt.Errorf("trust domain bundle (%q) must match the trust domain of the federation relationship (%q)", in.GetTrustDomain(), td)
	}
	return bundle, nil
}

// unconverted is the error of bundleFromWire without the words that only the
// Bundle service puts before it.
func unconverted(err error) error {
	var f *failure
	if !errors.As(err, &f) || f.cause == nil {
		return err
	}
	switch f.message {
	case "failed to convert bundle: unable to parse X.509 authority":
		return fmt.Errorf("unable to parse X.509 authority: %w", f.cause)
	case "failed to convert bundle: unable to parse JWT authority":
		return fmt.Errorf("unable to parse JWT authority: %w", f.cause)
	case "trust domain argument is not valid":
		return fmt.Errorf("invalid trust domain: %w", f.cause)
	}
	return f.cause
}

// answer is a relationship with the bundle that is stored now.
func (s *trustDomainService) answer(r embedded.Relationship, mask *masker) *typespb.FederationRelationship {
	out := &typespb.FederationRelationship{TrustDomain: r.TrustDomain.Name(), BundleEndpointUrl: r.EndpointURL}
	if r.EndpointID.IsZero() {
		out.BundleEndpointProfile = &typespb.FederationRelationship_HttpsWeb{HttpsWeb: &typespb.HTTPSWebProfile{}}
	} else {
		out.BundleEndpointProfile = &typespb.FederationRelationship_HttpsSpiffe{HttpsSpiffe: &typespb.HTTPSSPIFFEProfile{EndpointSpiffeId: r.EndpointID.String()}}
	}
	if b, err := s.store.FederatedBundle(r.TrustDomain); err == nil {
		out.TrustDomainBundle = bundleToWire(b)
	}
	mask.apply(out)
	if mask.clears("bundle_endpoint_profile") { // a oneof, not a field
		out.BundleEndpointProfile = nil
	}
	return out
}

// warn says what will keep a new relationship from working.
func (s *trustDomainService) warn(ctx context.Context, r embedded.Relationship) {
	if r.EndpointID.IsZero() || r.EndpointID.MemberOf(s.td) {
		return
	}
	if _, err := s.store.FederatedBundle(r.EndpointID.TrustDomain()); err != nil && s.log != nil {
		s.log.WarnContext(ctx, "no bundle is stored by which the bundle endpoint could be known; give one with `bundle set`",
			slog.String("trust_domain", r.TrustDomain.Name()), slog.String("endpoint_id", r.EndpointID.String()))
	}
}

func auditRelationship(ctx context.Context, what string, err error, in *typespb.FederationRelationship) {
	audit(ctx, what, err, slog.String("trust_domain", in.GetTrustDomain()), slog.String("bundle_endpoint_url", in.GetBundleEndpointUrl()),
		slog.String("endpoint_id", in.GetHttpsSpiffe().GetEndpointSpiffeId()), slog.Bool("with_bundle", in.GetTrustDomainBundle() != nil))
}
